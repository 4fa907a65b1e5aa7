import functools
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.distributed as dist

import shardemb
from shardemb import Sharding
from shardemb.comm import collectives
from shardemb.comm.shared_memory import HostRanks


def _lookup(
    rank: int, world_size: int, rows: int, dim: int, counts: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
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
    "too large": (
        lambda: torch.tensor([3, 501, 4]),
        IndexError,
        r"got id 501 among 3 ids, expected 0 <= id < 501",
    ),
    "negative": (lambda: torch.tensor([3, -1]), IndexError, r"got id -1 among 2 ids"),
    "huge": (lambda: torch.tensor([2**62]), IndexError, str(2**62)),
    "float": (
        lambda: torch.tensor([1.0]),
        TypeError,
        r"dtype torch.float32, expected torch.int64 or torch.int32",
    ),
    "nan": (lambda: torch.tensor([torch.nan]), RuntimeError, r"dtype torch.float32"),
    "bool": (lambda: torch.tensor([True]), TypeError, r"dtype torch.bool"),
    "list": (lambda: [1, 2], AttributeError, r"type list, expected a torch.Tensor"),
    "array": (lambda: np.array([1]), AttributeError, r"type ndarray"),
}


def _bad(rank: int, world_size: int, kind: str, gradient: str) -> tuple[str, str, float, bool]:
    """Only the last rank's ids are bad; all ranks must say so, and the table must stay."""
    make, error, _ = BAD[kind]
    table = shardemb.Embedding(
        501, shape=6, seed=1, name="people", kernel=gradient, constrainer="normalize"
    )
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
        assert seconds < 15  # not the time-out of 30 s
        assert unchanged


def _disagree(rank: int, world_size: int) -> str:
    with pytest.raises(ValueError, match="ranks disagree in max_id") as caught:
        shardemb.Embedding(501 + rank, shape=6)
    return str(caught.value)


def test_ranks_that_make_different_tables_are_told(run_ranks) -> None:
    for text in run_ranks(_disagree, 2):
        assert "table 'embedding'" in text
        assert "max_id 501 on rank 0" in text
        assert "502 on rank 1" in text


COLLECTIVES = (
    "all_to_all_single",
    "all_reduce",
    "all_gather",
    "all_gather_object",
    "broadcast",
    "barrier",
    "all_to_all",
)


@contextmanager
def counted() -> Iterator[list[str]]:
    """Name the collectives as they are called, through shared memory too."""
    collectives.all_reduce(torch.zeros(1), operation="ranks meet in it first")
    places = [(dist, name) for name in COLLECTIVES] + [(HostRanks, "send")]
    before, called = [(place, name, getattr(place, name)) for place, name in places], []
    try:
        for place, name, function in before:
            setattr(
                place,
                name,
                lambda *args, name=name, function=function, **kwargs: (
                    called.append(name) or function(*args, **kwargs)
                ),
            )
        yield called
    finally:
        for place, name, function in before:
            setattr(place, name, function)


def _collectives(rank: int, world_size: int, gradient: str, number: int) -> tuple[int, ...]:
    table = shardemb.Embedding(5001, shape=6, seed=1, kernel=gradient)
    optimizers = [] if gradient == "fused" else shardemb.RowWiseAdagrad(table.parameters(), lr=0.1)
    coordinator = shardemb.Coordinator(table, optimizers)
    ids = torch.arange(number + rank)
    counts = []
    with counted() as called:
        rows = table(ids)
        counts.append(len(called))
        rows.sum().backward()
        counts.append(len(called))
        coordinator.step()
        counts.append(len(called))
        waiting = table.prefetch(ids)
        counts.append(len(called))
        table(waiting)
        counts.append(len(called))
    return tuple(b - a for a, b in zip([0, *counts], counts, strict=False))


@pytest.mark.parametrize("gradient", ["sparse", "fused"])
@pytest.mark.parametrize("number", [0, 20, 2000])
def test_collectives_of_a_step(run_ranks, world_size: int, gradient: str, number: int) -> None:
    """Ids travel with their counts; updates and constrainers need no other rank."""
    expected = (2, 1, 0, 1, 1) if world_size > 1 else (0, 0, 0, 0, 0)
    for counts in run_ranks(_collectives, world_size, gradient, number):
        assert counts == expected


def _steady(rank: int, world_size: int) -> list[int]:
    """Collectives of lookups forward, one after the other, of as many ids a rank, by gloo."""
    os.environ["SHARDEMB_SHARED_MEMORY"] = "0"
    tables = [
        shardemb.Embedding(50_001, shape=2, seed=1, initialize=True, name=name) for name in "ab"
    ]
    generator, found = torch.Generator().manual_seed(rank), []
    for number in [2000, 2100, 1900, 30, 2000, 30_000, 2000, *[5] * 18, 2000, 2000]:
        ids = torch.randint(50_001, (number,), generator=generator)
        with counted() as called:
            rows = tables[len(found) % 2](ids)
        found.append(len(called))
        assert torch.equal(
            rows, tables[0]._embeddings.weight[ids] if world_size == 1 else _all_rows()[ids]
        )
    return found


@functools.cache
def _all_rows() -> torch.Tensor:
    return shardemb.Embedding(50_001, shape=2, seed=1, initialize=True)(None).detach()


def test_a_lookup_as_large_as_the_one_before_saves_a_message(run_ranks) -> None:
    calm = [2] * 18
    for found in run_ranks(_steady, 2):
        assert found == [
            3,
            2,
            2,
            2,
            2,
            3,
            2,
            *calm,
            3,
            2,
        ]  # 30,000 ids are too many; 17 small lookups take the room away


def _sent_once(
    rank: int, world_size: int, deduplicate: bool, number: int
) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Look ids up that are often the same.

    Return how many travel, the rows, and the gradient of the whole table.
    """
    table = shardemb.Embedding(
        501,
        shape=7,
        seed=1,
        dtype=torch.float64,
        sharding=Sharding(deduplicate=deduplicate, gradient_reduction="sum"),
    )
    ids = torch.arange(number) % (7 + rank)
    rows = table(ids)
    (rows * torch.arange(number)[:, None]).square().sum().backward()
    whole = torch.zeros(501, 7, dtype=torch.float64)
    whole[table.plan.local_ids()] = table._embeddings.weight.grad.to_dense()
    return sum(table._lookup.send(ids).sent), rows.detach(), whole


@pytest.mark.parametrize("number", [30, 3000])
def test_each_id_is_sent_once(run_ranks, number: int) -> None:
    once, often = (run_ranks(_sent_once, 3, deduplicate, number) for deduplicate in (True, False))
    for rank, ((few, rows, grad), (many, same_rows, same_grad)) in enumerate(
        zip(once, often, strict=True)
    ):
        assert (few, many) == (7 + rank, number)
        assert rows.equal(same_rows)
        torch.testing.assert_close(grad, same_grad)


def _half(
    rank: int, world_size: int, wire_dtype: torch.dtype | None, number: int
) -> tuple[torch.Tensor, ...]:
    """Rows and gradients of many magnitudes, one of them beyond float16."""
    table = shardemb.Embedding(
        501, shape=6, seed=1, sharding=Sharding(wire_dtype=wire_dtype, gradient_reduction="sum")
    )
    with torch.no_grad():
        weight = table._embeddings.weight
        weight.copy_(
            ((table.plan.local_ids()[:, None] + 1) * torch.tensor([1e-3, -1e-2, 0.1, 1, 10, 1e4]))
            / 7
        )
    ids = torch.arange(number) % 501
    rows = table(ids)
    factors = torch.linspace(-3, 3, number)[:, None] + 0.01
    (rows * factors).sum().backward()
    whole = torch.zeros(501, 6)
    whole[table.plan.local_ids()] = weight.grad.to_dense()
    return rows.detach(), whole


@pytest.mark.parametrize(("wire_dtype", "digits"), [(torch.float16, 11), (torch.bfloat16, 8)])
def test_half_precision_on_the_wire(run_ranks, wire_dtype: torch.dtype, digits: int) -> None:
    """What the docstring says is lost, and no more.

    What is beyond float16's range becomes infinite, never something else.
    """
    exact, half = (run_ranks(_half, 2, wire, 501) for wire in (None, wire_dtype))
    for (rows, grad), (got, got_grad) in zip(exact, half, strict=True):
        inside = rows.abs() < (65504 if wire_dtype == torch.float16 else torch.inf)
        assert ((got - rows).abs() <= rows.abs() * 2**-digits)[inside].all()
        assert got.isinf()[~inside].all()
        assert not got.equal(rows)
        assert ((got_grad - grad).abs() <= grad.abs() * 2**-digits).all()
        assert not got_grad.equal(grad)
    assert inside.all() == (wire_dtype == torch.bfloat16)
    with pytest.raises(
        ValueError,
        match=r"wire_dtype: got torch.float32, expected one of None, torch.float16, torch.bfloat16",
    ):
        shardemb.Embedding(3, shape=2, sharding=Sharding(wire_dtype=torch.float32))


def _prefetch(rank: int, world_size: int, unique: bool, number: int) -> None:
    """The same training with and without prefetched ids."""
    tables = [
        shardemb.Embedding(
            501,
            shape=6,
            seed=1,
            unique=unique,
            normalizer="normalize",
            normalizer_kwargs={"dim": -1},
        )
        for _ in "ab"
    ]
    optimizers = [shardemb.RowWiseAdagrad(table.parameters(), lr=0.1) for table in tables]
    generator = torch.Generator().manual_seed(rank)
    batches = [torch.randint(501, (number - rank, 2), generator=generator) for _ in range(4)]
    waiting = tables[1].prefetch(batches[0])
    for step, batch in enumerate(batches):
        plain, prefetched = tables[0](batch), tables[1](waiting)
        assert plain.equal(prefetched)
        if step + 1 < len(batches):
            waiting = tables[1].prefetch(
                batches[step + 1]
            )  # before this step's backward and update
        for rows, optimizer in zip((plain, prefetched), optimizers, strict=True):
            rows.cos().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert tables[0].local_rows().equal(tables[1].local_rows())
    table = tables[0]
    with pytest.raises(
        ValueError,
        match=r"table 'embedding(-2)?': got ids that were prefetched by table 'embedding'",
    ):
        tables[1](table.prefetch(batches[0]))
    ids = batches[0].clone()
    waiting = table.prefetch(ids)
    ids.fill_(500)  # the buffer is used again
    assert table(waiting).equal(table(batches[0]))
    with pytest.raises(IndexError, match=f"rank {world_size - 1} of {world_size}.*got id 501"):
        table.prefetch(torch.tensor([501 if rank == world_size - 1 else 3]))


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("number", [12, 700])
def test_prefetched_ids(run_ranks, world_size: int, unique: bool, number: int) -> None:
    run_ranks(_prefetch, world_size, unique, number)
