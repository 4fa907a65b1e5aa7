"""What the benchmarks share: the ids that they draw, and a result that says where, when and how it was measured."""

import importlib.metadata
import json
import os
import platform
import sys
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "numpy", "pykeen", "shardemb")


def draw_ids(kind: str, rows: int, number: int, seed: int = 0) -> torch.Tensor:
    """Draw ids ``(number,)``: "uniform", or "zipf" with exponent 0.8; the seed draws other ids, the popular stay the same.

    Popular ids are spread over the table; those of "zipf in id order" are the first ones.
    """
    generator = np.random.default_rng(seed)
    if kind == "uniform":
        return torch.from_numpy(generator.integers(rows, size=number))
    shares = np.cumsum(np.arange(1, rows + 1) ** -0.8)
    ids = np.minimum(np.searchsorted(shares / shares[-1], generator.random(number)), rows - 1)
    return torch.from_numpy(ids if kind == "zipf in id order" else np.random.default_rng(0).permutation(rows)[ids])


def write(name: str, body: dict[str, Any], path: Path | None = None) -> None:
    """Write what was measured, with the command, the date, the machine and the versions.

    Args:
        name: of the file in ``benchmarks/results``; the number of cores and the date are added.
        body: what was measured.
        path: another file.
    """
    today, versions = date.today().isoformat(), {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    document = {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": today,
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": versions,
        **body,
    }
    path = path or RESULTS / f"{name}_{os.cpu_count()}cores_{today}.json"
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    print(path)


def cpu_name() -> str:
    """Return the processor's name as Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
