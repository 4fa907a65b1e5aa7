"""Bags of ids against torch.nn.EmbeddingBag, and batches of ranks that do not have equally many."""

from typing import Any

import pytest
import torch
from torch import nn

import shardemb
from shardemb import Coordinator, Embedding, embedding_bag, join_batches


def _bags(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw ids, offsets and weights; some bags are empty, and one rank may have none at all."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    lengths = torch.tensor([0, 3, 1, 0, 5, 2, 0])[: 7 * ((rank + step) % 3 > 0)]
    ids = torch.randint(13, (int(lengths.sum()),), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)[:-1]])[: len(lengths)]
    return ids, offsets, torch.rand(len(ids), generator=generator)


def _options(mode: str, weights: torch.Tensor | None, padding: int | None) -> dict[str, Any]:
    return {"mode": mode, "padding_idx": padding} | (
        {} if weights is None else {"per_sample_weights": weights}
    )


def _pooled(
    rank: int, world_size: int, mode: str, weighted: bool, padding: int | None
) -> tuple[list[torch.Tensor], torch.Tensor]:
    sharding = shardemb.Sharding(gradient_reduction="sum")
    table = Embedding(13, shape=4, seed=0, initialize=True, sharding=sharding)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    pooled = []
    for step in range(4):
        ids, offsets, weights = _bags(rank, step)
        options = _options(mode, weights if weighted else None, padding)
        out = embedding_bag(table, ids, offsets, **options)
        pooled.append(out.detach())
        out.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return pooled, table.full_state_dict("torch")["weight"]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("padding", [None, 5])
@pytest.mark.parametrize(
    ("mode", "weighted"), [("sum", False), ("sum", True), ("mean", False), ("max", False)]
)
def test_bags_equal_torchs(
    rank_pool, mode: str, weighted: bool, padding: int | None, ranks: int
) -> None:
    start = Embedding(13, shape=4, seed=0, initialize=True).full_state_dict("torch")["weight"]
    oracle = nn.EmbeddingBag.from_pretrained(start.clone(), freeze=False, mode=mode)
    oracle.padding_idx = padding
    optimizer = torch.optim.SGD(oracle.parameters(), lr=0.1)
    expected: list[list[torch.Tensor]] = []
    for step in range(4):
        outs = []
        for rank in range(ranks):
            ids, offsets, weights = _bags(rank, step)
            outs.append(oracle(ids, offsets, weights if weighted else None))
        sum(out.square().sum() for out in outs).backward()
        expected.append([out.detach().clone() for out in outs])
        optimizer.step()
        optimizer.zero_grad()
    for rank, (pooled, rows) in enumerate(rank_pool(_pooled, ranks, mode, weighted, padding)):
        for step, out in enumerate(pooled):
            torch.testing.assert_close(out, expected[step][rank])
        torch.testing.assert_close(rows, oracle.weight.detach())


def test_bags_of_one_length_and_of_other_shapes() -> None:
    table = Embedding(13, shape=(2, 3), seed=0, initialize=True)
    ids = torch.randint(13, (5, 4))
    assert torch.allclose(embedding_bag(table, ids, mode="sum"), table(ids).sum(1))
    offsets = torch.tensor([0, 7, 7, 20])
    out = embedding_bag(table, ids.reshape(-1), offsets, include_last_offset=True)
    assert out.shape == (3, 2, 3)
    assert torch.allclose(out[0], table(ids.reshape(-1)[:7]).mean(0))
    assert torch.equal(out[1], torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("ids", "options", "text"),
    [
        ([1, 2], {}, r"got ids of shape \(2,\) and no offsets"),
        ([[1, 2]], {"offsets": [0]}, r"got ids of shape \(1, 2\) and offsets"),
        ([1, 2], {"offsets": [0, 3]}, "expected rising ones from 0 to at most"),
        ([1, 2], {"offsets": [1]}, "expected rising ones"),
        ([1, 2], {"offsets": [0, 2, 1]}, "expected rising ones"),
        ([[1, 2]], {"per_sample_weights": [[1.0, 2.0]]}, "with mode='mean', expected"),
        ([[1, 2]], {"per_sample_weights": [[1.0]], "mode": "sum"}, r"got per.*\(1, 1\)"),
    ],
)
def test_bags_that_do_not_fit(ids: list, options: dict, text: str) -> None:
    tensors = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in options.items()}
    with pytest.raises(ValueError, match=f"table 'people': .*{text}"):
        embedding_bag(Embedding(13, shape=4, name="people"), torch.tensor(ids), **tensors)


def _joined(rank: int, world_size: int) -> tuple[int, torch.Tensor]:
    table = Embedding(13, shape=4, seed=0, initialize=True)
    coordinator = Coordinator(table, torch.optim.SGD(table.parameters(), lr=0.1))
    batches = [torch.tensor([number, rank]) for number in range(2 * rank)]
    steps = 0
    for ids in join_batches(batches, torch.empty(0, dtype=torch.int64)):
        table(ids).sum().backward()
        coordinator.step()
        steps += 1
    assert not list(join_batches([], "empty"))
    return steps, table.full_state_dict("torch")["weight"]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_with_other_numbers_of_batches(run_ranks, ranks: int) -> None:
    rows = Embedding(13, shape=4, seed=0, initialize=True).full_state_dict("torch")["weight"]
    for rank in range(ranks):
        for number in range(2 * rank):
            rows[number] -= 0.1 / ranks
            rows[rank] -= 0.1 / ranks
    for steps, got in run_ranks(_joined, ranks):
        assert steps == 2 * (ranks - 1)
        torch.testing.assert_close(got, rows)
