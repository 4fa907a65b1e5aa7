"""Rows a second of a lookup.

In this process from mapped files, and from a service's shards, in turn in one run.

``python benchmarks/serving.py [--rows 1000000] [--dim 128] [--ids 4096] [--rounds 200] [--output
FILE]``

Each round times every contestant once, by wall clock, with ids of its own, uniform; medians are
written. The service runs on a Ray of this machine, so that shards and client share its cores.
"""

import argparse
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from report import write

import shardemb
from shardemb import Embedding, checkpoint
from shardemb.launch.ray import connected
from shardemb.serving.ray_service import serve


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--ids", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with ExitStack() as ends:
        folder = ends.enter_context(tempfile.TemporaryDirectory())
        checkpoint.save(
            folder, 1, Embedding(arguments.rows, shape=arguments.dim, seed=0, name="rows")
        )
        ray = ends.enter_context(connected("local", cpus=4, log_to_driver=False))
        readers: dict[str, Any] = {"in process": shardemb.open_store(folder)}
        for shards in (1, 2):
            service = ends.enter_context(serve(folder, shards, f"{shards} shard(s)"))
            readers[f"{shards} shard(s)"] = service.client()
        times: dict[str, list[float]] = {name: [] for name in readers}
        for number in range(arguments.rounds + 1):
            ids = torch.randint(arguments.rows, (arguments.ids,))
            for name, reader in readers.items():
                start = time.perf_counter()
                reader.lookup(ids)
                if number:  # the first warms up
                    times[name].append(time.perf_counter() - start)
        version = ray.__version__
    found = {}
    for name, seconds in times.items():
        median = statistics.median(seconds)
        found[name] = {"rows_per_s": round(arguments.ids / median), "ms": round(1e3 * median, 3)}
        print(f"{name:12} {arguments.ids / median:12,.0f} rows/s  {1e3 * median:8.3f} ms")
    settings = {name: getattr(arguments, name) for name in ("rows", "dim", "ids", "rounds")}
    write("serving", {**settings, "ray": version, "lookup": found}, arguments.output)


if __name__ == "__main__":
    main()
