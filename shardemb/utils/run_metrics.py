"""A run's metrics: JSON lines, a summary and a plot."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shardemb.utils.files import write_text


class MetricsFile:
    """Appends records to ``metrics.jsonl``, with the time in seconds since 1970.

    Keeps an earlier run's records up to ``step``, except tests; 0 starts a new file.
    ``tensorboard`` is a folder for event files with the same numbers.
    """

    def __init__(self, path: Path, step: int = 0, tensorboard: Path | None = None) -> None:
        old = read_metrics(path) if step and path.exists() else []
        kept = [record for record in old if record["step"] <= step and record["kind"] != "test"]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a", encoding="utf-8")
        self._events: Any = None
        if tensorboard is not None:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(tensorboard), purge_step=step + 1)

    def write(self, kind: str, step: int, **figures: Any) -> None:
        """Append a record ("train", "valid", "test") of an optimizer step, and flush it."""
        record = {"time": round(time.time(), 3), "kind": kind, "step": step, **figures}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._events is None:
            return
        for name, figure in figures.items():
            numbered = enumerate(figure) if isinstance(figure, list) else [("", figure)]
            for number, value in numbered:
                if isinstance(value, int | float):
                    self._events.add_scalar(f"{kind}/{name}{number}", value, step)
        self._events.flush()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


#: (kind, step, figures), called on every rank
Listener = Callable[[str, int, dict[str, Any]], None]
_listeners: list[Listener] = []


def listen(listener: Listener) -> None:
    """Call a function with each record of this process's jobs, on every rank."""
    _listeners.append(listener)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call a function with each record, within the block."""
    listen(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def tell(kind: str, step: int, figures: dict[str, Any]) -> None:
    """Pass a record to all listeners."""
    for listener in _listeners:
        listener(kind, step, figures)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a metrics file, without an incomplete last line."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def describe(records: Sequence[dict[str, Any]], now: float) -> str:
    """Summarize a run at time ``now``: progress, speed, memory by rank, metrics."""
    lines = []
    train = next((record for record in reversed(records) if record["kind"] == "train"), None)
    if train is not None:
        memory = " ".join(f"{size / 2**30:.2f}" for size in train["memory_bytes"])
        ago, speed = now - train["time"], train["triples_per_second"]
        sent = train["exchange_bytes"] / 2**20
        lines = [
            f"epoch {train['epoch']:.2f}  step {train['step']:,}  loss {train['loss']:.4f}"
            f"  ({ago:.0f} s ago)",
            f"{speed:,} triples/s  {1000 * train['step_seconds']:.2f} ms a step",
            f"a step: {train['touched_rows']:,} rows updated, {sent:.2f} MiB sent between ranks",
            f"the busiest rank updates {train['imbalance']:.2f} times the mean; GiB of memory by"
            f" rank: {memory}",
        ]
    for kind in ("valid", "test"):
        ranked = [record for record in records if record["kind"] == kind]
        if ranked:
            text = f"{kind} MRR {ranked[-1]['mrr']:.4f} after epoch {ranked[-1]['epoch']:g}"
            if len(ranked) > 1:
                best = max(ranked, key=lambda record: record["mrr"])
                text += f", best {best['mrr']:.4f} after epoch {best['epoch']:g}"
            lines.append(text)
    return "\n".join(lines)


def plot_metrics(records: list[dict[str, Any]], path: Path) -> None:
    """Plot loss, MRR and triples a second over epochs; the suffix gives the format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6))  # a computed layout doubles the time
    FigureCanvasAgg(figure)
    left, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    right = left.twinx()
    train = [r for r in records if r["kind"] == "train"]
    epochs = [r["epoch"] for r in train]
    left.plot(epochs, [r["loss"] for r in train], color="tab:gray", label="training loss")
    below.plot(epochs, [r["triples_per_second"] for r in train], color="tab:gray")
    best = max((r["mrr"] for r in records if "mrr" in r), default=1.0)
    for kind, style, size in (("valid", "o-", 5), ("test", "*", 12)):
        ranked = [r for r in records if r["kind"] == kind]
        if ranked:
            label = f"{kind} MRR, {ranked[-1]['triples']:,} triples ({ranked[-1]['mrr']:.3f})"
            epochs, mrr = [r["epoch"] for r in ranked], [r["mrr"] for r in ranked]
            right.plot(epochs, mrr, style, label=label, markersize=size)
    left.set(ylabel="loss per query", ylim=(0, None))
    right.set(ylabel="MRR", ylim=(0, 1.15 * best))
    below.set(xlabel="epoch", ylabel="triples per second", ylim=(0, None))
    figure.subplots_adjust(left=0.11, right=0.91, bottom=0.09, top=0.92, hspace=0.08)
    figure.legend(loc="upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)
