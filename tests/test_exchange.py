import re
import time

import numpy as np
import pytest
import torch

import shardemb


def _lookup(rank: int, world_size: int, rows: int, dim: int, counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Look up random ids, another number on each rank; return ids and what came."""
    table = shardemb.Embedding(rows, shape=dim, seed=1)
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(max(rows, 1), (counts[rank],), generator=generator)
    return ids, table(ids).detach()


@pytest.mark.parametrize(("rows", "dim"), [(501, 7), (2, 1), (1, 6), (4, 128), (501, 0)])
def test_rows_come_back_in_order(run_ranks, world_size: int, rows: int, dim: int) -> None:
    """More ranks than rows, rows that ranks do not divide, empty batches, odd columns."""
    whole = shardemb.Embedding(rows, shape=dim, seed=1)(None)
    for counts in ([5, 0, 17, 3], [0, 0, 0, 0], [0, 300, 1, 0]):
        for ids, got in run_ranks(_lookup, world_size, rows, dim, counts):
            assert torch.equal(got, whole[ids])


BAD = {
    "too large": (lambda: torch.tensor([3, 501, 4]), IndexError, r"got id 501 among 3 ids, expected 0 <= id < 501"),
    "negative": (lambda: torch.tensor([3, -1]), IndexError, r"got id -1 among 2 ids"),
    "huge": (lambda: torch.tensor([2**62]), IndexError, str(2**62)),
    "float": (lambda: torch.tensor([1.0]), TypeError, r"dtype torch.float32, expected torch.int64 or torch.int32"),
    "nan": (lambda: torch.tensor([torch.nan]), RuntimeError, r"dtype torch.float32"),
    "bool": (lambda: torch.tensor([True]), TypeError, r"dtype torch.bool"),
    "list": (lambda: [1, 2], AttributeError, r"type list, expected a torch.Tensor"),
    "array": (lambda: np.array([1]), AttributeError, r"type ndarray"),
}


def _bad(rank: int, world_size: int, kind: str, gradient: str) -> tuple[str, str, float, bool]:
    """Only the last rank's ids are bad; all ranks must say so, and the table must stay."""
    make, error, _ = BAD[kind]
    table = shardemb.Embedding(501, shape=6, seed=1, name="people", gradient=gradient, constrainer="normalize")
    table.post_parameter_update()
    before = table.local_rows().clone()
    ids = make() if rank == world_size - 1 else torch.arange(10)
    start = time.perf_counter()
    try:
        table(ids)
    except error as caught:
        seconds = time.perf_counter() - start
        name, text = type(caught).__name__, str(caught)
    table.post_parameter_update()
    unchanged = torch.equal(before, table.local_rows())
    table(torch.arange(3)).sum().backward()  # the ranks still understand each other
    return name, text, seconds, unchanged


@pytest.mark.parametrize("kind", BAD)
def test_bad_ids_raise_on_every_rank(run_ranks, world_size: int, kind: str) -> None:
    _all_ranks_say_so(run_ranks, world_size, kind, "sparse")


@pytest.mark.parametrize("kind", ["too large", "float"])
def test_bad_ids_do_not_reach_fbgemm(run_ranks, kind: str) -> None:
    _all_ranks_say_so(run_ranks, 3, kind, "fused")


def _all_ranks_say_so(run_ranks, world_size: int, kind: str, gradient: str) -> None:
    answers = run_ranks(_bad, world_size, kind, gradient)
    for name, text, seconds, unchanged in answers:
        assert (name, text) == answers[0][:2]
        assert f"table 'people', rank {world_size - 1} of {world_size}" in text
        assert re.search(BAD[kind][2], text)
        assert seconds < 1
        assert unchanged


def _disagree(rank: int, world_size: int) -> str:
    with pytest.raises(ValueError, match="ranks make different tables") as caught:
        shardemb.Embedding(501 + rank, shape=6)
    return str(caught.value)


def test_ranks_that_make_different_tables_are_told(run_ranks) -> None:
    for text in run_ranks(_disagree, 2):
        assert "501 x (6,)" in text
        assert "502 x (6,)" in text
