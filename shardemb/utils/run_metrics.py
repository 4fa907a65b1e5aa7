"""A run's figures: one JSON object a line while it goes, TensorBoard's events, one picture."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shardemb.utils.files import replacing
from shardemb.utils.tensorboard import EventFile


class MetricsFile:
    """Appends records to ``metrics.jsonl``, each with the time (seconds since 1970), flushed.

    Args:
        path: of the file.
        step: keep an earlier run's records up to this step, drop later ones and its test; 0 starts
            a new file.
        tensorboard: folder for TensorBoard's event files, which get the numbers too; None for none.
    """

    def __init__(self, path: Path, step: int = 0, tensorboard: Path | None = None) -> None:
        old = read_metrics(path) if step and path.exists() else []
        kept = [record for record in old if record["step"] <= step and record["kind"] != "test"]
        with replacing(path) as partial:
            text = "".join(json.dumps(record) + "\n" for record in kept)
            partial.write_text(text, encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._events = None if tensorboard is None else EventFile(tensorboard, step + 1)

    def write(self, kind: str, step: int, **figures: Any) -> None:
        """Append a record of a kind ("train", "valid", "test") at an optimizer step."""
        record = {"time": round(time.time(), 3), "kind": kind, "step": step, **figures}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._events is not None:
            scalars = {}
            for name, figure in figures.items():
                several = isinstance(figure, list)
                for place, value in enumerate(figure) if several else [("", figure)]:
                    if isinstance(value, int | float):
                        scalars[f"{kind}/{name}{place}"] = value
            self._events.write(record["time"], step, scalars)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


#: (kind, step, figures), on every rank: see :func:`listen`
Listener = Callable[[str, int, dict[str, Any]], None]
_listeners: list[Listener] = []


def listen(listener: Listener) -> None:
    """Let a function hear of the records of this process's jobs, on every rank.

    For a launcher that passes them on.
    """
    _listeners.append(listener)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let a function hear of them within the block alone."""
    listen(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def tell(kind: str, step: int, figures: dict[str, Any]) -> None:
    """Let all listeners hear of a record."""
    for listener in _listeners:
        listener(kind, step, figures)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a metrics file; a last line that was cut off by a kill is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            records.append(json.loads(line))
    return records


def describe(records: Sequence[dict[str, Any]], now: float) -> str:
    """Return the state of a run in a few lines.

    Where it is, how fast, what each rank holds, and how good it was.

    Args:
        records: of the metrics file.
        now: seconds since 1970.
    """
    lines = []
    train = next((record for record in reversed(records) if record["kind"] == "train"), None)
    if train is not None:
        memory = " ".join(f"{size / 2**30:.2f}" for size in train["memory_bytes"])
        lines = [
            (
                f"epoch {train['epoch']:.2f}  step {train['step']:,}  loss {train['loss']:.4f} "
                f" ({now - train['time']:.0f} s ago)"
            ),
            (
                f"{train['triples_per_second']:,} triples/s  {1000 * train['step_seconds']:.2f} ms"
                " a step"
            ),
            (
                f"a step: {train['touched_rows']:,} rows updated,"
                f" {train['exchange_bytes'] / 2**20:.2f} MiB sent between ranks"
            ),
            (
                f"the busiest rank updates {train['imbalance']:.2f} times the mean; GiB of memory"
                f" by rank: {memory}"
            ),
        ]
    for kind in ("valid", "test"):
        found = [record for record in records if record["kind"] == kind]
        if found:
            best = max(found, key=lambda record: record["mrr"])
            last = f"{kind} MRR {found[-1]['mrr']:.4f} after epoch {found[-1]['epoch']:g}"
            lines.append(
                last
                + (
                    f", best {best['mrr']:.4f} after epoch {best['epoch']:g}"
                    if len(found) > 1
                    else ""
                )
            )
    return "\n".join(lines)


def plot_metrics(records: list[dict[str, Any]], path: Path) -> None:
    """Draw loss, MRR and triples a second over epochs, as a ".png", ".svg" or ".pdf"."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6))  # a computed layout would double the time
    FigureCanvasAgg(figure)
    left, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    right = left.twinx()
    train = [r for r in records if r["kind"] == "train"]
    epochs = [r["epoch"] for r in train]
    left.plot(epochs, [r["loss"] for r in train], color="tab:gray", label="training loss")
    below.plot(epochs, [r["triples_per_second"] for r in train], color="tab:gray")
    best = max((r["mrr"] for r in records if "mrr" in r), default=1.0)
    for kind, style in (("valid", "o-"), ("test", "*")):
        of_kind = [r for r in records if r["kind"] == kind]
        if of_kind:
            last = of_kind[-1]["mrr"]
            label = f"{kind} MRR, {of_kind[-1]['triples']:,} triples ({last:.3f})"
            epochs, mrr = [r["epoch"] for r in of_kind], [r["mrr"] for r in of_kind]
            right.plot(epochs, mrr, style, label=label, markersize=12 if kind == "test" else 5)
    left.set(ylabel="loss per query", ylim=(0, None))
    right.set(ylabel="MRR", ylim=(0, 1.15 * best))
    below.set(xlabel="epoch", ylabel="triples per second", ylim=(0, None))
    figure.subplots_adjust(left=0.11, right=0.91, bottom=0.09, top=0.92, hspace=0.08)
    figure.legend(loc="upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)
