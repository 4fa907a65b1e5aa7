"""A step costs what it touches.

No operator, and no loop in C, goes over the whole table after the first step.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from multirank import without_c_loops
from torch.utils._python_dispatch import TorchDispatchMode

import shardemb
from shardemb import Coordinator, Embedding, kernels, optim

ROWS = 50_021
#: operators that may be given a whole table, since they look at some rows only, or at none
PARTIAL = {"aten::index_select", "aten::embedding", "aten::index_copy_"} | {
    f"aten::{view}"
    for view in (
        "detach",
        "view",
        "slice",
        "alias",
        "_unsafe_view",
        "t",
        "as_strided",
        "_reshape_alias",
    )
}


class WholeTables(TorchDispatchMode):
    """Names each operator that gets or makes something with as many rows as the shard.

    And is not known to be partial.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.found = rows, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [
            t
            for t in torch.utils._pytree.tree_leaves((args, kwargs, out))
            if isinstance(t, torch.Tensor)
        ]
        name = func._schema.name
        sparse = any(
            t.is_sparse for t in tensors
        )  # torch.optim adds a sparse gradient to a dense table
        if name not in PARTIAL and not name.startswith("fbgemm::") and not sparse:
            self.found += [name] * any(t.numel() >= self.rows for t in tensors)
        return out


@contextmanager
def rows_moved() -> Iterator[dict[str, int]]:
    """Count the rows that kernels.py's functions read and write."""
    moved = {"read": 0, "written": 0}
    before = {name: getattr(kernels, name) for name in ("take", "put", "update", "constrain")}

    def count(name: str, *kinds: str) -> None:
        def counting(*args: Any, **kwargs: Any) -> Any:
            rows = args[3].unique if name == "update" else args[1]
            for kind in kinds:
                moved[kind] += len(rows)
            return before[name](*args, **kwargs)

        setattr(kernels, name, counting)

    count("take", "read")
    count("put", "written")
    count("update", "read", "written")
    if kernels.why_not() is None:  # otherwise it takes and puts
        count("constrain", "read", "written")
    try:
        yield moved
    finally:
        for name, function in before.items():
            setattr(kernels, name, function)


OPTIMIZERS = {
    **{
        cls.__name__: cls
        for cls in (optim.SparseSGD, optim.SparseAdagrad, optim.RowWiseAdagrad, optim.LazyAdam)
    },
    "RowWiseAdam": optim.RowWiseAdam,
    "torch SGD": torch.optim.SGD,
    "torch SparseAdam": torch.optim.SparseAdam,
}


def _steps(
    rank: int, world_size: int, name: str, constrainer: str | None, c_loops: bool
) -> tuple[list[str], dict[str, int]]:
    """Train two steps of three lookups, then look at a third."""
    with nullcontext() if c_loops else without_c_loops():
        gradient = "fused" if name == "fused" else "sparse"
        table = Embedding(ROWS, shape=4, kernel=gradient, constrainer=constrainer, seed=0)
        coordinator = Coordinator(
            table, OPTIMIZERS[name](table.parameters(), lr=0.1) if name in OPTIMIZERS else ()
        )
        generator = torch.Generator().manual_seed(rank)
        for step in range(3):
            ids = torch.randint(ROWS, (3, 100), generator=generator)
            watch = WholeTables(table.plan.num_local) if step == 2 else nullcontext()
            with watch, rows_moved() as moved:
                if gradient == "fused":
                    table(ids).cos().sum().backward()
                else:
                    sum(table(part).cos().sum() for part in ids).backward()
                coordinator.step()
        assert table.constrainer is None or table.local_rows().norm(dim=1).allclose(
            torch.tensor(1.0)
        )
        return watch.found, moved


@pytest.mark.parametrize("c_loops", [True, False])
@pytest.mark.parametrize("constrainer", [None, "normalize"])
@pytest.mark.parametrize("name", ["fused", *OPTIMIZERS])
def test_only_touched_rows_are_read_and_written(
    name: str, constrainer: str | None, c_loops: bool
) -> None:
    found, moved = _steps(0, 1, name, constrainer, c_loops)
    assert found == []
    assert (
        moved["read"] <= 300 * 2
    )  # the lookup, then the update, or the constrainer's pass after another's update
    assert moved["written"] <= 300 * 2
    if name == "RowWiseAdagrad" and c_loops and kernels.why_not() is None:
        assert moved["read"] >= 300 + 290  # it does count


@pytest.mark.parametrize("name", ["fused", "RowWiseAdagrad"])
def test_on_several_ranks_too(run_ranks, name: str) -> None:
    for found, moved in run_ranks(_steps, 3, name, "normalize", True):
        assert found == []
        # all ranks' ids, 300 each, and the answers to this rank's
        assert max(moved.values()) <= 900 * 2 + 300


def test_what_goes_over_all_rows_is_found() -> None:
    """The test of the test: a dense gradient costs all rows, and the first constraint does."""
    table = Embedding(ROWS, shape=4, kernel="dense", seed=0)
    with WholeTables(ROWS) as watch:
        table(torch.tensor([1])).sum().backward()
    assert watch.found
    table = Embedding(ROWS, shape=4, constrainer="normalize", seed=0)
    with WholeTables(ROWS) as watch, rows_moved():
        assert shardemb.kernels.rows.take(
            table._embeddings.weight.detach(), torch.tensor([1])
        ).shape == (1, 4)
        assert not watch.found
        table._embeddings.weight.detach().clone()
    assert watch.found == ["aten::clone"]
