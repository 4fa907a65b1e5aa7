"""How long `shardemb ingest` takes for Debian's graph of packages and files, and in how much memory.

    .venv/bin/python benchmarks/ingest.py --work /work/debian [--shared /work/shared] [--memory 4GiB] [--keep]

11.8 million entities, 23.6 million triples. Before, as root: ``apt-get install apt-file && apt-get update``. ``--work`` keeps
the triples as TSV for the next time. Writes ``benchmarks/results/ingest_debian_<cores>_<date>.json``.
"""

import gzip
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

#: where apt keeps what it has fetched
LISTS = Path("/var/lib/apt/lists")
#: lines that are written at once
CHUNK = 1 << 19
SPLITS = ("train", "valid", "test")


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
    """Return the folder with ``train.tsv``, ``valid.tsv`` and ``test.tsv``; made if it is not there."""
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
    for split, rows in (("train", np.flatnonzero(is_train)), ("valid", held["valid"]), ("test", held["test"])):
        with (partial / f"{split}.tsv").open("w", encoding="utf-8", newline="\n") as file:
            for start in range(0, len(rows), CHUNK):
                h, r, t = triples[rows[start : start + CHUNK]].T
                file.write("\n".join(entities[h] + "\t" + relations[r] + "\t" + entities[t]) + "\n")
    partial.rename(out)
    return out


if __name__ == "__main__":
    prepare(Path("/work/debian"), Path("/work/shared/tools/build_debian.py"))
