"""A benchmark's result, which says where, when and how it was measured."""

import importlib.metadata
import json
import os
import platform
import sys
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import torch
from plots import draw

from shardemb.utils.memory import cpu_name

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "torchrec",
    "fbgemm-gpu-cpu",
    "fbgemm-gpu",
    "numpy",
    "pyarrow",
    "duckdb",
    "pykeen",
    "shardemb",
)


def write(name: str, body: dict[str, Any], path: Path | None = None) -> None:
    """Write what was measured, with command, date, machine, versions and how memory is allocated.

    And draw it.

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
        "machine": {
            "cpu": cpu_name(),
            "capability": torch.backends.cpu.get_cpu_capability(),  # FBGEMM's kernels differ by it
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
        "versions": versions,
        "environment": {
            key: value
            for key, value in os.environ.items()
            if key.startswith(("MALLOC_", "LD_PRELOAD", "OMP_"))
        },
        **body,
    }
    path = path or RESULTS / f"{name}_{os.cpu_count()}cores_{today}.json"
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    print(path, *draw(path), sep="\n")
