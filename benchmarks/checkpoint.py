"""What saving costs a training run, and how fast a checkpoint is loaded and opened.

Next to the disk's own speed.

    .venv/bin/python benchmarks/checkpoint.py [--rows 10000000] [--seconds 20] [--windows 8]
    [--open-rows 40000000]

One process with all cores, a table of rows x 64 in float32 with row-wise Adagrad. Files are taken
out of the page cache before they are read. Writes
``benchmarks/results/checkpoint_<cores>_<date>.json``.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from measure import draw_ids, proc_bytes
from report import write

import shardemb
from shardemb import Embedding, RowWiseAdagrad, checkpoint

DIM = 64
#: ids of a training step
IDS = 65536


def _evict(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _read_all(folder: Path) -> None:
    """Read files one after the other, 16 MiB at a time, into the same buffer."""
    buffer = memoryview(bytearray(1 << 24))
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _write_all(path: Path, size: int) -> None:
    """Write as many bytes to the disk, 16 MiB at a time."""
    buffer = os.urandom(1 << 24)
    with path.open("wb", buffering=0) as file:
        for start in range(0, size, len(buffer)):
            file.write(buffer[: size - start])
        os.fsync(file.fileno())


def _timed(function, *arguments, **options) -> float:
    start = time.perf_counter()
    function(*arguments, **options)
    return time.perf_counter() - start


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return proc_bytes("/proc/self/status", "VmHWM")


def files(table: Embedding, optimizer: RowWiseAdagrad, base: Path, rounds: int) -> dict:
    """Save and load in turn with plain writing and reading of as many bytes."""
    times: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        times.setdefault(name, []).append(seconds)

    peaks = {}
    for step in range(rounds):
        before = _reset_peak()
        note("save", _timed(checkpoint.save, base / "run", step, table, [optimizer], keep=1))
        peaks["save"] = proc_bytes("/proc/self/status", "VmHWM") - before
        path = Path(checkpoint.checkpoints(base / "run")[-1])
        size = _size(path)
        # as a save does: the new one first, then the old one goes; blocks that no file had before
        # may be slower to write
        note("write", _timed(_write_all, base / f"plain-{step}", size))
        (base / f"plain-{step - 1}").unlink(missing_ok=True)
        for name, how in (("read", None), ("load, sha256", "sha256"), ("load, size", "size")):
            _evict(path)
            before = _reset_peak()
            if how is None:
                note(name, _timed(_read_all, path))
            else:
                note(name, _timed(checkpoint.load, path, table, [optimizer], verify=how))
                peaks[name] = proc_bytes("/proc/self/status", "VmHWM") - before
    median = {name: statistics.median(values) for name, values in times.items()}
    ratio = {
        name: statistics.median(
            disk / ours for disk, ours in zip(times[against], times[name], strict=True)
        )
        for name, against in (("save", "write"), ("load, sha256", "read"), ("load, size", "read"))
    }
    return {
        "bytes": size,
        "files": len(list(path.iterdir())) - 1,
        "gigabytes_per_s": {
            name: round(size / seconds / 1e9, 3) for name, seconds in median.items()
        },
        "seconds": {name: [round(value, 2) for value in values] for name, values in times.items()},
        "speed_relative_to_the_disk": {name: round(value, 3) for name, value in ratio.items()},
        "bar_load": 0.5,
        "extra_peak_bytes": peaks,
    }


def background(
    table: Embedding, optimizer: RowWiseAdagrad, base: Path, seconds: float, rounds: int
) -> dict:
    """Count the steps in windows of so many seconds.

    With a save at the beginning of every second one, and of its CPU time.

    What a save every 60 s costs is what a window with one loses, times the window's part of 60 s.
    The machine's speed changes from minute to minute, so the windows are short and many, and the
    CPU time of a save on its own, which is what it can take from training where all cores are busy,
    stands beside it.
    """
    batches = draw_ids("zipf", table.max_id, 16 * IDS).chunk(16)
    saver = checkpoint.AsyncSaver(base / "background", keep=1)
    rates: dict[bool, list[float]] = {False: [], True: []}
    foreground, whole = [], []
    number = 0
    for window in range(2 * rounds + 1):
        saves = window % 2 == 0
        start, steps, done = time.perf_counter(), 0, None
        if saves:
            saver.save(window, table, [optimizer])
            foreground.append(time.perf_counter() - start)
        while time.perf_counter() - start < seconds or (saves and done is None):
            table(batches[number % 16]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            saver.check()
            number, steps = number + 1, steps + 1
            if saves and done is None and saver._saving is None:
                done = time.perf_counter() - start
        elapsed = time.perf_counter() - start
        saver.wait()
        if window:  # the first one makes the buffers
            rates[saves].append(steps / elapsed)
            if saves:
                whole.append(done)
    lost = [
        1 - with_save / without
        for without, with_save in zip(rates[False], rates[True], strict=True)
    ]
    cpu = []
    for step in range(3):
        start = time.process_time()
        saver.save(1000 + step, table, [optimizer])
        saver.wait()
        cpu.append(time.process_time() - start)
    cores = len(os.sched_getaffinity(0))
    return {
        "ids_per_step": IDS,
        "threads": torch.get_num_threads(),
        "window_s": seconds,
        "steps_per_s": {
            "without": [round(r, 2) for r in rates[False]],
            "with a save": [round(r, 2) for r in rates[True]],
        },
        "lost_in_a_window": [round(cost, 4) for cost in lost],
        "cost_every_60_s": round(statistics.median(lost) * seconds / 60, 4),
        "cpu_s_of_a_save": [round(value, 2) for value in cpu],
        "cpu_of_a_save_in_60_s_of_all_cores": round(statistics.median(cpu) / (60 * cores), 4),
        "bar": 0.05,
        "copy_s": [round(value, 2) for value in foreground],
        "written_after_s": [round(value, 2) for value in whole],
    }


def opening(rows: int, base: Path) -> dict:
    """Open a checkpoint of so many rows, taken out of the page cache, and look 1000 rows up."""
    path = Path(
        checkpoint.save(base / "large", 1, Embedding(rows, shape=DIM, seed=1, initialize=True))
    )
    _evict(path)
    start = time.perf_counter()
    store = shardemb.open_store(path)
    opened = time.perf_counter() - start
    ids = torch.randint(rows, (1000,))
    cold = _timed(store.lookup, ids)
    warm = _timed(store.lookup, ids)
    return {
        "rows": rows,
        "bytes": _size(path),
        "open_s": round(opened, 4),
        "bar_s": 1.0,
        "first_1000_rows_s": round(cold, 4),
        "again_s": round(warm, 5),
    }


def main() -> None:
    """Run all and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--seconds", type=float, default=20.0, help="of a window of training")
    parser.add_argument("--windows", type=int, default=8, help="with a save, and as many without")
    parser.add_argument("--rounds", type=int, default=3, help="of saving and loading")
    parser.add_argument("--open-rows", type=int, default=40_000_000)
    parser.add_argument(
        "--folder", type=Path, help="on the disk to be measured; default: the temporary folder's"
    )
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    body = {"rows": arguments.rows, "dim": DIM}
    base = Path(tempfile.mkdtemp(dir=arguments.folder, prefix="shardemb-checkpoint-"))
    try:
        table = Embedding(arguments.rows, shape=DIM, seed=1, initialize=True)
        optimizer = RowWiseAdagrad(table.parameters(), lr=0.1)
        table(torch.arange(5)).sum().backward()
        optimizer.step()
        body["files"] = files(table, optimizer, base, arguments.rounds)
        print(body["files"], flush=True)
        shutil.rmtree(base / "run")
        body["background"] = background(
            table, optimizer, base, arguments.seconds, arguments.windows
        )
        print(body["background"], flush=True)
        shutil.rmtree(base / "background")
        del table, optimizer
        body["open"] = opening(arguments.open_rows, base)
        print(body["open"], flush=True)
    finally:
        shutil.rmtree(base)
    write("checkpoint", body, arguments.output)


if __name__ == "__main__":
    main()
