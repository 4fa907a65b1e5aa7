"""A run's figures: one JSON object a line while it goes, one picture of them; and the memory that is free."""

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from shardemb.files import replacing

if TYPE_CHECKING:  # those that make a dataset have no use for it
    import torch

T = TypeVar("T")


class MetricsFile:
    """Appends records to ``metrics.jsonl``, each with the time (seconds since 1970), flushed at once.

    Args:
        path: of the file.
        step: keep an earlier run's records up to this step, drop later ones and its test; 0 starts a new file.
        tensorboard: folder for TensorBoard's event files, in which the numbers stand too; None for none.
    """

    def __init__(self, path: Path, step: int = 0, tensorboard: Path | None = None) -> None:
        old = read_metrics(path) if step and path.exists() else []
        kept = [record for record in old if record["step"] <= step and record["kind"] != "test"]
        with replacing(path) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._events: Any = None
        if tensorboard is not None:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(tensorboard), purge_step=step + 1)

    def write(self, kind: str, step: int, **figures: Any) -> None:
        """Append a record of a kind ("train", "valid", "test") at an optimizer step."""
        record = {"time": round(time.time(), 3), "kind": kind, "step": step, **figures}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, figure in figures.items():
                for place, value in enumerate(figure) if isinstance(figure, list) else [("", figure)]:
                    if isinstance(value, int | float):
                        self._events.add_scalar(f"{kind}/{name}{place}", value, step)
            self._events.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        if self._events is not None:
            self._events.close()


#: (kind, step, figures), on every rank: see :func:`listen`
Listener = Callable[[str, int, dict[str, Any]], None]
_listeners: list[Listener] = []


def listen(listener: Listener) -> None:
    """Let a function hear of the records of this process's jobs, on every rank: for a launcher that passes them on."""
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
    """Return the state of a run in a few lines: where it is, how fast, what each rank holds, and how good it was.

    Args:
        records: of the metrics file.
        now: seconds since 1970.
    """
    lines = []
    train = next((record for record in reversed(records) if record["kind"] == "train"), None)
    if train is not None:
        memory = " ".join(f"{size / 2**30:.2f}" for size in train["memory_bytes"])
        lines = [
            f"epoch {train['epoch']:.2f}  step {train['step']:,}  loss {train['loss']:.4f}  ({now - train['time']:.0f} s ago)",
            f"{train['triples_per_second']:,} triples/s  {1000 * train['step_seconds']:.2f} ms a step",
            f"a step: {train['touched_rows']:,} rows updated, {train['exchange_bytes'] / 2**20:.2f} MiB sent between ranks",
            f"the busiest rank updates {train['imbalance']:.2f} times the mean; GiB of memory by rank: {memory}",
        ]
    for kind in ("valid", "test"):
        found = [record for record in records if record["kind"] == kind]
        if found:
            best = max(found, key=lambda record: record["mrr"])
            last = f"{kind} MRR {found[-1]['mrr']:.4f} after epoch {found[-1]['epoch']:g}"
            lines.append(last + (f", best {best['mrr']:.4f} after epoch {best['epoch']:g}" if len(found) > 1 else ""))
    return "\n".join(lines)


def plot_metrics(records: list[dict[str, Any]], path: Path) -> None:
    """Draw loss, MRR and triples a second over epochs, in the format of the path's suffix (".png", ".svg", ".pdf")."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
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
    figure.legend(loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=120)


def progress(items: Sequence[T], what: str, unit: float = 1.0, shown: bool = True) -> Iterator[T]:
    """Go over items with a progress bar, which appears after a few seconds.

    Args:
        items: to go over.
        what: is being done.
        unit: rows in an item.
        shown: whether there is a bar at all, on this rank.
    """
    bar = progress_bar(total=round(len(items) * unit), desc=what, unit=" rows", delay=3, disable=not shown)
    with bar:
        for item in items:
            yield item
            bar.update(unit)


def progress_bar(**options: Any) -> tqdm:
    """Make a tqdm bar that writes few lines into a log file."""
    tqdm.set_lock(threading.RLock())  # its default lock is a semaphore between processes, which a killed rank leaks
    return tqdm(unit_scale=True, mininterval=0.2 if sys.stderr.isatty() else 10, **options)


def free_bytes(device: "torch.device") -> int | None:
    """Bytes that can be allocated on a device now, shared by the ranks of this machine; None where it cannot be known."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    free = available_bytes() if device.type == "cpu" else None
    return None if free is None else free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def resident_bytes() -> int:
    """Bytes of memory that this process has; 0 where it cannot be known."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") if status.exists() else 0


def available_bytes() -> int | None:
    """Bytes of memory that are free, or can be made so at once, here or in this container; None where it cannot be known."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    free = int(available.split()[1]) * 1024
    limit = container_bytes()
    return free if limit is None else min(free, limit[1])


def total_bytes() -> int:
    """Bytes of memory that this machine has, or that this container may have."""
    total, limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), container_bytes()
    return total if limit is None else min(total, limit[0])


def container_bytes(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> tuple[int, int] | None:
    """Bytes of memory that this process's container, or job, may have, and those of them that are free; None without a limit.

    Read from Linux' control groups, version 2 or 1, of this process and all above it
    (https://docs.kernel.org/admin-guide/cgroup-v2.html, "Memory").
    """
    found = []
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        base, old = (root / "memory", "total_") if kinds else (root, "")
        limit, used = ("memory.limit_in_bytes", "memory.usage_in_bytes") if old else ("memory.max", "memory.current")
        group = base / path.lstrip("/")
        for folder in (group, *(above for above in group.parents if above.is_relative_to(base))):
            try:
                most, now = (folder / limit).read_text().strip(), int((folder / used).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except OSError:  # a container sees its own group as the root
                continue
            if most != "max" and int(most) < 1 << 60:  # version 1 has no word for "no limit"
                found.append((int(most), max(0, int(most) - now + int(stat[old + "inactive_file"]))))
    return (min(most for most, _ in found), min(free for _, free in found)) if found else None


def cpu_name() -> str:
    """Return the processor's name as Linux gives it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
