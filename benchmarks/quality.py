"""Quality on published graphs.

Trains each configuration as a user would, and keeps the filtered test metrics, seed and time.

    .venv/bin/python benchmarks/quality.py [--workers 1] [--seeds 1] [CONFIG.toml ...]

Without configurations it takes all of ``configs/``; ``NAME-SCORER.toml`` trains on the folder
NAME of ``--data``. Writes
``benchmarks/results/quality_<machine>_<date>.json``.
"""

import argparse
import tempfile
from pathlib import Path

from main_job import run
from report import write


def main() -> None:
    """Run all and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="*", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--output", type=Path, help="another file for the result")
    arguments = parser.parse_args()
    root, body = Path(__file__).parent.parent, {}
    for config in arguments.configs or sorted((root / "configs").glob("*.toml")):
        runs, dataset = [], arguments.data / config.stem.rpartition("-")[0]
        for seed in range(arguments.seeds):
            settings = [
                part
                for value in [*arguments.set, f"training.seed={seed}"]
                for part in ("--set", value)
            ]
            with tempfile.TemporaryDirectory() as folder:
                command = [str(config), "--dataset", str(dataset), *settings]
                result = run(arguments.workers, command, Path(folder) / "run")
                runs.append({"seed": seed, **result})
            print(config, runs[-1], flush=True)
        body[config.stem] = {"runs": runs, "configuration": config.read_text()}
    write("quality", body, arguments.output)


if __name__ == "__main__":
    main()
