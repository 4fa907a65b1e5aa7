"""Collectives through shared memory: what gloo gives, also where there is no room.

How ranks end is in test_watchdog.py.
"""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shardemb.comm import collectives, shared_memory
from shardemb.comm.watchdog import watch


def _way() -> Any:
    """Return what the default group's collectives go through; None for gloo."""
    return collectives._host_ranks.get(watch(None))


def _exchanged(
    rank: int, world_size: int, dtype: torch.dtype, scale: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Send `rank + other` times `scale` rows to each other rank.

    Return what came, and what should.
    """
    counts = [scale * (rank + other) for other in range(world_size)]
    tensor = torch.cat(
        [torch.full((count, 3), 10 * rank + other) for other, count in enumerate(counts)]
    ).to(dtype)
    known = counts if scale % 2 else None
    arrived = collectives.all_to_all(tensor, counts, known, group=None, operation="a test")
    assert arrived.counts == counts
    out = arrived.rows
    expected = torch.cat(
        [torch.full((count, 3), 10 * other + rank) for other, count in enumerate(counts)]
    ).to(dtype)
    return out, expected


def _exchange(rank: int, world_size: int, most_bytes: int) -> tuple[bool, list[int]]:
    before, shared_memory.MOST_BYTES = shared_memory.MOST_BYTES, most_bytes
    try:
        for dtype in (torch.float32, torch.int64, torch.uint8, torch.bool):
            for scale in (
                1,
                0,
                17,
                40_000,
                1,
                130_000,
                3,
            ):  # none at all, and more than there is room for at first
                assert torch.equal(*_exchanged(rank, world_size, dtype, scale))
        way = _way()
        return way is not None, [memory._capacity for memory in way.memories] if way else []
    finally:
        shared_memory.MOST_BYTES = before


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_all_to_all(run_ranks, ranks: int) -> None:
    for rank, (used, rooms) in enumerate(run_ranks(_exchange, ranks, shared_memory.MOST_BYTES)):
        assert used
        assert rooms[rank] > shared_memory.FIRST_BYTES


def test_messages_that_are_too_large_for_some_ranks_go_by_gloo(run_ranks) -> None:
    for used, rooms in run_ranks(_exchange, 3, shared_memory.FIRST_BYTES):
        assert used
        assert rooms == [shared_memory.FIRST_BYTES] * 3


def _reduce(rank: int, world_size: int) -> None:
    for shape in ((), (0,), (7, 3), (600, 601)):
        for dtype in (torch.float32, torch.float64, torch.int64):
            for op, expected in (
                (collectives.SUM, sum(range(1, world_size + 1))),
                (collectives.MAX, world_size),
                (collectives.MIN, 1),
            ):
                tensor = torch.full(shape, rank + 1, dtype=dtype)
                collectives.all_reduce(tensor, op, operation="a test")
                assert torch.equal(tensor, torch.full(shape, expected, dtype=dtype))
    product = torch.tensor(2.0)
    collectives.all_reduce(product, dist.ReduceOp.PRODUCT, operation="a test")  # gloo's
    assert product == 2.0**world_size
    strided = torch.arange(6.0).reshape(2, 3).T
    collectives.all_reduce(strided, operation="a test")
    assert torch.equal(strided, world_size * torch.arange(6.0).reshape(2, 3).T)
    assert _way() is not None


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_reduce(run_ranks, ranks: int) -> None:
    run_ranks(_reduce, ranks)


def _without(rank: int, world_size: int, why: str, folder: Path) -> bool:
    shared_memory._FOLDER = folder
    if why == "no room" and rank == 1:
        shared_memory._reserve = _full
    if why == "another machine" and rank == 1:
        shared_memory._FOLDER = folder / "elsewhere"
        shared_memory._FOLDER.mkdir()
    if why == "not wanted" and rank == 0:
        os.environ["SHARDEMB_SHARED_MEMORY"] = "0"
    assert torch.equal(*_exchanged(rank, world_size, torch.float32, 5))
    if why == "another machine" and rank == 1:
        shared_memory._FOLDER.rmdir()
    return _way() is None


def _full(file: Any, size: int) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("why", ["no room", "another machine", "not wanted"])
def test_where_one_rank_cannot_all_take_gloo(run_ranks, tmp_path: Path, why: str) -> None:
    assert run_ranks(_without, 3, why, tmp_path) == [True] * 3
    assert not list(tmp_path.iterdir())


def _grow_into_a_full_disk(rank: int, world_size: int) -> bool:
    assert torch.equal(*_exchanged(rank, world_size, torch.float32, 5))
    if rank == 1:
        shared_memory._reserve = _full
    assert torch.equal(*_exchanged(rank, world_size, torch.float32, 100_000))
    assert torch.equal(*_exchanged(rank, world_size, torch.float32, 5))
    return _way() is not None


def test_room_that_cannot_be_made_later(run_ranks) -> None:
    assert run_ranks(_grow_into_a_full_disk, 2) == [True] * 2


def _disagree(rank: int, world_size: int) -> list[str]:
    texts = []
    with pytest.raises(RuntimeError) as caught:
        collectives.all_reduce(torch.zeros(2 + rank), operation="a test")
    texts.append(str(caught.value))
    with pytest.raises(RuntimeError) as caught:
        collectives.all_to_all(torch.zeros(2, 2), [1, 1], [2, 1], group=None, operation="a test")
    return [*texts, str(caught.value)]


def test_messages_of_other_sizes_are_refused(run_ranks) -> None:
    """gloo's all-reduce would give garbage.

    And its all-to-all unfilled rows or the end of the process.
    """
    first, second = run_ranks(_disagree, 2)
    assert first == [
        "rank 1 of this group sent 12 bytes, expected 8",
        "rank 0 of this group sent 8 bytes, expected 16",
    ]
    assert second[0] == "rank 0 of this group sent 8 bytes, expected 12"


def _wait_after_growth(rank: int, world_size: int) -> None:
    for rows in (1, 60_000, 150_000, 400_000):  # room is made three times, and older mappings go
        assert torch.equal(*_exchanged(rank, world_size, torch.float32, rows))
    if rank == 0:
        time.sleep(1.5)  # so that the others ask whether it is alive
    assert torch.equal(*_exchanged(rank, world_size, torch.float32, 5))
    assert _way() is not None


def test_a_rank_that_is_late_is_alive(run_ranks) -> None:
    run_ranks(_wait_after_growth, 2)
