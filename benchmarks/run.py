"""Runs step, train, rank, checkpoint and scaling one after the other.

A quick set in five minutes, or the full one.

    ./dev bench [--output FOLDER]     small tables, everything tried, nothing judged; into
    runs/bench-<date> ./dev bench --full [--large FOLDER]
                                      as docs/performance.md has them, an hour at most, 24 GB; into
                                      benchmarks/results

Each script writes a JSON file with machine, versions, command and date, and pictures of it. Leave
the machine alone meanwhile.
"""

import argparse
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

from report import RESULTS

HERE = Path(__file__).parent
#: script: its arguments in the quick set, and in the full one
SETS = {
    "step": ("--quick --rounds 1", ""),
    "train": ("--entities 6400 --triples 40000 --rounds 1 --dim 32 --pykeen-steps 1", ""),
    "rank": (
        (
            "--rows 20000 --dim 32 --queries 40 --rounds 1 --drawn-rows 3000 --drawn-dim 8"
            " --pykeen-rows 500"
        ),
        "",
    ),
    "checkpoint": ("--rows 20000 --rounds 1 --seconds 0.3 --windows 1 --open-rows 20000", ""),
    "scaling": ("--quick --rounds 1", ""),
}


def main() -> int:
    """Run a set; 1 if a script fails, after the others."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="the full set")
    parser.add_argument(
        "--large",
        type=Path,
        help="dataset folder of a graph of 1e7 entities, for train: see ingest.py",
    )
    parser.add_argument("--only", default=",".join(SETS), help="scripts, with commas between them")
    parser.add_argument("--output", type=Path, help="folder of the results")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    if unknown := set(chosen) - set(SETS):
        parser.error(
            f"--only: got {', '.join(sorted(unknown))}, expected scripts among {','.join(SETS)}"
        )
    if arguments.output is None and not arguments.full:
        arguments.output = HERE.parent / "runs" / f"bench-{datetime.now():%Y%m%d-%H%M%S}"
    failed = []
    for name in chosen:
        start, command = (
            time.perf_counter(),
            [sys.executable, str(HERE / f"{name}.py"), *SETS[name][arguments.full].split()],
        )
        if name == "train" and arguments.large is not None:
            command += ["--large", str(arguments.large)]
        if arguments.output is not None:
            command += ["--output", str(arguments.output / f"{name}.json")]
        done = subprocess.run(command, check=False, stdout=sys.stderr)
        print(
            f"{name}: {time.perf_counter() - start:.0f} s{' FAILED' * bool(done.returncode)}",
            flush=True,
        )
        if done.returncode:
            failed.append(name)
            continue
        folder = arguments.output or RESULTS
        written = max(folder.glob(f"{name}*.json"), key=lambda path: path.stat().st_mtime)
        for path in [written, *sorted(folder.glob(f"{written.stem}*.png"))]:
            print(f"  {path}", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
