"""The main job on 1 and on 2 workers.

Quality, wall time, CPU time, and the same once more with another seed.

    .venv/bin/python benchmarks/main_job.py [--dataset wordnet] [--set KEY=VALUE ...]

Runs ``shardemb train`` as a user would, one run after the other, and writes
``benchmarks/results/main_job_<machine>_<date>.json``.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import write


def run(workers: int, arguments: list[str], folder: Path) -> dict:
    """Run the command once; CPU seconds are those of all its processes."""
    command = ["shardemb", "train", "--workers", str(workers), "--output", str(folder), *arguments]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([Path(sys.executable).parent / command[0], *command[1:]], check=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = sorted(record["triples_per_second"] for record in records if record["kind"] == "train")
    test = {
        key: records[-1][key] for key in ("mrr", "hits_at_1", "hits_at_3", "hits_at_10", "seconds")
    }
    return {
        "workers": workers,
        "wall_s": round(wall, 1),
        "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "median_triples_per_s": rates[len(rates) // 2],
        "test": test,
    }


def main() -> None:
    """Run all and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="wordnet")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    runs = []
    for seed in range(arguments.seeds):
        for workers in (1, 2):
            with tempfile.TemporaryDirectory() as folder:
                settings = [
                    part
                    for value in [*arguments.set, f"training.seed={seed}"]
                    for part in ("--set", value)
                ]
                runs.append(
                    {
                        "seed": seed,
                        **run(
                            workers,
                            ["--dataset", arguments.dataset, *settings],
                            Path(folder) / "run",
                        ),
                    }
                )
                print(runs[-1], flush=True)
    differences = [
        abs(one["test"]["mrr"] - two["test"]["mrr"])
        for one, two in zip(runs[::2], runs[1::2], strict=True)
    ]
    body = {"largest_mrr_difference_between_1_and_2_workers": max(differences), "runs": runs}
    write(f"main_job_{arguments.dataset.replace(':', '-')}", body)


if __name__ == "__main__":
    main()
