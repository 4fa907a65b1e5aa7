"""How long `shardemb ingest` takes for Debian's graph of packages and files.

And in how much memory.

    .venv/bin/python benchmarks/ingest.py --work /work/debian [--shared /work/shared] [--memory
    4GiB]

11.8 million entities, 23.6 million triples. Before, as root: ``apt-get install apt-file && apt-get
update``. ``--work`` keeps the triples as TSV for the next time. Writes
``benchmarks/results/ingest_debian_<cores>_<date>.json``.
"""

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from report import write

#: where apt keeps what it has fetched
LISTS = Path("/var/lib/apt/lists")
#: lines that are written at once
CHUNK = 1 << 19
ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
}


def decode(work: Path) -> list[Path]:
    """Decode apt's lists: of the packages, then of their files."""
    found = []
    for ending in ("binary-amd64_Packages", "Contents-all", "Contents-amd64"):
        (packed,) = LISTS.glob(f"*debian_dists_bookworm_main_{ending}.lz4")
        out = work / ending.rpartition("_")[2]
        with out.open("wb") as file:
            subprocess.run(["/usr/lib/apt/apt-helper", "cat-file", packed], stdout=file, check=True)
        found.append(out)
    return found


def label(raw: bytes) -> str:
    """Make a label of what a package or a file is called, which may be anything."""
    text = raw.decode(errors="backslashreplace")
    for bad in "\0\t\r\ufeff":
        text = text.replace(bad, f"%{ord(bad):02x}")
    return text if text == text.strip() else f"{text}%"


def prepare(work: Path, tool: Path) -> Path:
    """Return the folder with ``train.tsv``, ``valid.tsv`` and ``test.tsv``.

    Made if it is not there.
    """
    out, graph = work / "tsv", work / "debian-files"
    if out.is_dir():
        return out
    work.mkdir(parents=True, exist_ok=True)
    if not (graph / "split.npz").exists():
        subprocess.run([sys.executable, tool, "files", *decode(work), work], check=True)
    with gzip.open(graph / "entities.txt.gz") as file:
        entities = np.array([label(line) for line in file.read().split(b"\n")[:-1]], dtype=object)
    relations = np.array((graph / "relations.txt").read_text().split(), dtype=object)
    triples, held = np.load(graph / "triples.npy", mmap_mode="r"), np.load(graph / "split.npz")
    is_train = np.ones(len(triples), dtype=bool)
    is_train[held["valid"]] = is_train[held["test"]] = False
    partial = work / "tsv.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for split, rows in (
        ("train", np.flatnonzero(is_train)),
        ("valid", held["valid"]),
        ("test", held["test"]),
    ):
        with (partial / f"{split}.tsv").open("w", encoding="utf-8", newline="\n") as file:
            for start in range(0, len(rows), CHUNK):
                h, r, t = triples[rows[start : start + CHUNK]].T
                file.write("\n".join(entities[h] + "\t" + relations[r] + "\t" + entities[t]) + "\n")
    partial.rename(out)
    return out


def measure(source: Path, out: Path, memory: str, threads: int) -> dict:
    """Ingest in a process of its own, whose time and memory the kernel counts."""
    shutil.rmtree(out, ignore_errors=True)
    arguments = [str(source), str(out), "--memory", memory, "--threads", str(threads)]
    start, load = time.perf_counter(), os.getloadavg()[0]
    process = subprocess.Popen(
        [sys.executable, "-m", "shardemb", "ingest", *arguments], env=ENVIRONMENT
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"shardemb ingest ended with status {status}")
    told = json.loads((out / "dataset.json").read_text())
    return {
        "ingest": " ".join(["shardemb", "ingest", *arguments]),
        "entities": told["entities"],
        "relations": told["relations"],
        "triples": told["triples"],
        "duplicates": told["duplicates"],
        "input_bytes": sum(entry["size"] for entry in told["sources"]),
        "output_bytes": sum(entry["size"] for entry in told["files"].values()),
        "memory": memory,
        "threads": threads,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_mib": usage.ru_maxrss >> 10,
        "load_before": round(load, 2),
        "bar": "1e7 entities, 2.4e7 triples in 4 GiB",
    }


def opened(out: Path) -> dict:
    """Open the dataset in a process of its own, and look a label up."""
    script = """if True:
        import json, sys, time
        from shardemb.kge import Triples
        def peak():
            lines = open("/proc/self/status")
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) >> 10
        before, start = peak(), time.perf_counter()
        data = Triples.load(sys.argv[1])
        loaded = time.perf_counter() - start
        label = data.entities.label(len(data.entities) // 3)
        assert data.entities.ids([label])[0] == len(data.entities) // 3
        looked = time.perf_counter() - start - loaded
        times = {"seconds": round(loaded, 4), "label_seconds": round(looked, 4)}
        print(json.dumps({**times, "extra_peak_mib": peak() - before}))
    """
    done = subprocess.run(
        [sys.executable, "-c", script, out],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def main() -> None:
    """Make the triples if they are not there, ingest, open, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of the triples, and of the dataset"
    )
    parser.add_argument(
        "--shared",
        type=Path,
        default=Path("/work/shared"),
        help="folder with tools/build_debian.py",
    )
    parser.add_argument("--source", type=Path, help="other triples instead")
    parser.add_argument("--memory", default="4GiB")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="of the result")
    arguments = parser.parse_args()
    source = arguments.source or prepare(
        arguments.work, arguments.shared / "tools" / "build_debian.py"
    )
    out, new = arguments.work / "dataset", arguments.work / "dataset.new"
    body = measure(source, new, arguments.memory, arguments.threads)
    shutil.rmtree(out, ignore_errors=True)  # who has mapped it keeps it
    new.rename(out)
    write("ingest_debian", {**body, "open": opened(out)}, arguments.output)


if __name__ == "__main__":
    main()
