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

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "numpy", "pyarrow", "duckdb", "pykeen", "shardemb")


def write(name: str, body: dict[str, Any], path: Path | None = None) -> Path:
    """Write what was measured, with the command, the date, the machine, the versions and how memory is allocated.

    Args:
        name: of the file in ``benchmarks/results``; the number of cores and the date are added.
        body: what was measured.
        path: another file.

    Returns:
        Where it was written.
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
        "environment": {key: value for key, value in os.environ.items() if key.startswith(("MALLOC_", "LD_PRELOAD", "OMP_"))},
        **body,
    }
    path = path or RESULTS / f"{name}_{os.cpu_count()}cores_{today}.json"
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    print(path)
    return path


def cpu_name() -> str:
    """Return the processor's name as Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
