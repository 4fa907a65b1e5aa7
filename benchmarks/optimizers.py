"""Row-wise optimizers against torch.optim's, and what a constrainer costs.

CPU time of one step, in turn in one process.

``python benchmarks/optimizers.py [--rows 1000000] [--dim 128] [--rounds 9] [--output FILE]``

A step is lookup, backward, optimizer, constrainer, on one thread. Each round times every contestant
once, in turn, after a walk through 64 MiB, so that all of them find the same in the caches; the
table gives medians of process CPU time in ms, and the median over rounds of the ratio to torch's.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import draw_ids
from report import write
from torch.nn import functional as F

from shardemb import Coordinator, Embedding, optim

PAIRS = {
    "SGD": (torch.optim.SGD, optim.SparseSGD),
    "Adagrad": (torch.optim.Adagrad, optim.SparseAdagrad),
    "row-wise Adagrad": (None, optim.RowWiseAdagrad),
    "Adam": (torch.optim.SparseAdam, optim.LazyAdam),
    "row-wise Adam": (None, optim.RowWiseAdam),
}


def torch_step(
    rows: torch.Tensor, cls: type[torch.optim.Optimizer], ids: torch.Tensor
) -> Callable[[], None]:
    """A step of torch.nn.Embedding(sparse=True)."""
    table = torch.nn.Embedding(*rows.shape, _weight=rows.clone(), sparse=True)
    optimizer = cls(table.parameters(), lr=0.01)

    def step() -> None:
        table(ids).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(
    rows: torch.Tensor,
    cls: type[torch.optim.Optimizer],
    ids: torch.Tensor,
    constrainer: str | None = None,
    apart: bool = False,
) -> Callable[[], None]:
    """A step of shardemb.Embedding under the coordinator.

    Or with the constrainer in a pass of its own.
    """
    table = Embedding(len(rows), shape=rows.shape[1], constrainer=constrainer, seed=0)
    table.load_state_dict({"weight": rows})
    optimizer = cls(table.parameters(), lr=0.01)
    coordinator = Coordinator(table, optimizer)

    def step() -> None:
        table(ids).sum().backward()
        if apart:
            optimizer.step()
            table.post_parameter_update()
            optimizer.zero_grad()
        else:
            coordinator.step()

    return step


def all_rows_step(rows: torch.Tensor, ids: torch.Tensor) -> Callable[[], None]:
    """What PyKEEN's post_parameter_update adds to a step: all rows are constrained."""
    table = torch.nn.Embedding(*rows.shape, _weight=rows.clone(), sparse=True)
    optimizer = torch.optim.Adagrad(table.parameters(), lr=0.01)

    def step() -> None:
        table(ids).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        table.weight.data = F.normalize(table.weight.data)

    return step


def time_in_turn(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """CPU ms of each step, round by round; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    other = torch.zeros(16 << 20)
    for number in range(rounds + 1):
        for name, step in steps.items():
            other.add_(1)
            start = time.process_time()
            step()
            if number:
                times[name].append(1e3 * (time.process_time() - start))
    return times


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = F.normalize(torch.randn(arguments.rows, arguments.dim))
    results: list[dict[str, Any]] = []

    def measure(
        number: int, kind: str, steps: dict[str, Callable[[], None]], baseline: str
    ) -> None:
        times = time_in_turn(steps, arguments.rounds)
        for name, values in times.items():
            ratio = statistics.median(a / b for a, b in zip(values, times[baseline], strict=True))
            results.append(
                {
                    "ids": number,
                    "kind": kind,
                    "step": name,
                    "cpu_ms": round(statistics.median(values), 3),
                }
                | ({"ratio": round(ratio, 3), "to": baseline} if name != baseline else {})
            )
            print(
                f"{number:6} {kind:8} {name:45} {statistics.median(values):9.2f} ms  {ratio:6.2f} x"
                f" {baseline}",
                flush=True,
            )

    for number in (4096, 65536):
        for kind in ("uniform", "zipf"):
            ids = draw_ids(kind, arguments.rows, number)
            for name, (theirs, ours) in PAIRS.items():
                steps = {f"shardemb {name}": our_step(rows, ours, ids)}
                if theirs is not None:
                    steps = {f"torch {name}": torch_step(rows, theirs, ids), **steps}
                measure(number, kind, steps, next(iter(steps)))
            steps = {
                "Adagrad, no constrainer": our_step(rows, optim.SparseAdagrad, ids),
                "Adagrad, normalize in the same pass": our_step(
                    rows, optim.SparseAdagrad, ids, "normalize"
                ),
                "Adagrad, normalize in a pass of its own": our_step(
                    rows, optim.SparseAdagrad, ids, "normalize", apart=True
                ),
                "torch Adagrad, normalize on all rows": all_rows_step(rows, ids),
            }
            measure(number, kind, steps, "Adagrad, no constrainer")
    write("optimizers", {"threads": 1, "results": results}, arguments.output)


if __name__ == "__main__":
    main()
