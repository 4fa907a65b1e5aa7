"""How soon a job on Ray trains again after a worker was killed, and what it loses.

    .venv/bin/python benchmarks/ray_recovery.py [--kills 5]

Trains WordNet on two workers of a Ray of this machine's, with a checkpoint every second, and kills
one of them with SIGKILL at a random moment, over and over. Times go from the kill to the first
record of steps that were trained again; lost are the steps between the newest record before the
kill and the checkpoint that the job went on from. A job that nobody kills must end with the same
loss. Writes ``benchmarks/results/ray_recovery_<machine>_<date>.json``.
"""

import argparse
import json
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from report import write

from shardemb.kge import ModelConfig, SamplingConfig, TrainingConfig, Triples, train
from shardemb.launch import ray
from shardemb.launch.ray import RayOptions, run_on_ray
from shardemb.utils import run_metrics


def job(folder: Path, epochs: int) -> dict[str, float]:
    """Train on a rank that says when it has trained."""
    rank = dist.get_rank()
    (folder / f"pid-{rank}").write_text(str(os.getpid()))

    def listener(kind: str, step: int, figures: dict[str, Any]) -> None:
        if rank == 0:
            with (folder / "steps").open("a") as file:
                file.write(
                    json.dumps(
                        [time.time(), kind, step, figures["loss"] if kind == "train" else None]
                    )
                    + "\n"
                )

    run_metrics.listen(listener)
    _, result = train(
        Triples.load("wordnet"),
        ModelConfig(dim=64),
        sampling=SamplingConfig(num_negatives=200),
        training=TrainingConfig(
            epochs=epochs, validate_every=0, checkpoint_seconds=1.0, checkpoint_every=epochs
        ),
        output=folder / "run",
        resume=True,
        progress=False,
    )
    return result


def steps(folder: Path) -> list[list[Any]]:
    """Return (time, kind, step, loss) of what was trained so far."""
    path = folder / "steps"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def kill(folder: Path, draw: random.Random) -> dict[str, Any]:
    """Kill rank 1 at a random moment of training, and wait until steps are trained again."""
    seen = len(steps(folder))
    while len(steps(folder)) < seen + 3:  # it is at work, and has saved something
        time.sleep(0.01)
    time.sleep(1.0 + draw.uniform(0, 1))
    at = time.time()
    os.kill(int((folder / "pid-1").read_text()), signal.SIGKILL)
    before = steps(folder)
    deadline = at + 300
    while not [entry for entry in steps(folder)[len(before) :] if entry[0] > at + 1]:
        if time.time() > deadline:
            raise TimeoutError("not trained again after 300 s")
        time.sleep(0.05)
    again = next(entry for entry in steps(folder)[len(before) :] if entry[0] > at + 1)
    return {
        "seconds": round(again[0] - at, 1),
        "lost_steps": max(0, before[-1][2] - (again[2] - 20)),
    }


def run(folder: Path, epochs: int, kills: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Run a job and kill its ranks so often; return what was seen, and its result."""
    done: list[Any] = []

    def call() -> None:
        options = RayOptions(address=None, max_failures=kills)
        with ray.connected("local", cpus=2, log_to_driver=False):
            done.append(run_on_ray(job, 2, folder, epochs, options=options, storage=folder / "ray"))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    draw = random.Random(0)
    found = [kill(folder, draw) for _ in range(kills)]
    thread.join(1200)
    return found, done[0]


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--output", type=Path, help="another file for the result")
    arguments = parser.parse_args()
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    with tempfile.TemporaryDirectory() as base:
        folders = [Path(base) / name for name in ("killed", "whole")]
        for folder in folders:
            folder.mkdir()
        found, killed = run(folders[0], arguments.epochs, arguments.kills)
        _, whole = run(folders[1], arguments.epochs, 0)
        losses = [
            [entry for entry in steps(folder) if entry[1] == "train"][-1][3] for folder in folders
        ]
    body = {
        "kills": found,
        "seconds": {
            "median": statistics.median(each["seconds"] for each in found),
            "most": max(e["seconds"] for e in found),
        },
        "checkpoint_seconds": 1.0,
        "last_loss": {"killed": losses[0], "whole": losses[1]},
        "test_mrr": {"killed": killed["mrr"], "whole": whole["mrr"]},
        "bar_s": 60,
    }
    print(json.dumps(body, indent=1))
    write("ray_recovery", body, arguments.output)


if __name__ == "__main__":
    main()
