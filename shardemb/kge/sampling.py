"""Batches and negatives that depend on seed, epoch and step, never on the number of ranks.

A global batch is cut into chunks; the queries of a chunk share their negatives, and ranks take the chunks in turn. So
one rank and four see the same chunks, and add up the same loss.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingConfig:
    """How training triples become batches."""

    #: queries (a triple, or its reciprocal) in a step, over all ranks
    batch_size: int = 2048
    #: queries that share negatives
    chunk_size: int = 1024
    #: uniformly drawn entities per chunk
    num_negatives: int = 1000

    def __post_init__(self) -> None:
        for name in ("batch_size", "chunk_size", "num_negatives"):
            if getattr(self, name) < 1:
                raise ValueError(f"sampling.{name}: got {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True)
class Chunk:
    """Queries with common negatives."""

    #: (B,) entity ids
    heads: Tensor
    #: (B,) relation ids, reciprocal ones included
    relations: Tensor
    #: (B,) entity ids
    tails: Tensor
    #: (N,) entity ids
    negatives: Tensor

    def hits(self) -> tuple[Tensor, Tensor]:
        """Return rows and columns ``(n,)`` of the ``(B, N)`` scores where a negative is the query's own tail."""
        ids, order = self.negatives.sort()
        rows, places = equal_range(ids, self.tails)
        return rows, order[places]


def equal_range(sorted_values: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return all pairs of a place in ``wanted`` ``(B,)`` and a place in ``sorted_values`` ``(T,)`` with equal values."""
    wanted = wanted.contiguous()
    start = torch.searchsorted(sorted_values, wanted)
    count = torch.searchsorted(sorted_values, wanted, right=True) - start
    places = torch.arange(len(wanted)).repeat_interleave(count)
    within = torch.arange(len(places)) - (count.cumsum(0) - count).repeat_interleave(count)
    return places, start.repeat_interleave(count) + within


def with_reciprocals(triples: Tensor, num_relations: int) -> Tensor:
    """Return ``(2T, 3)``: the triples, then (tail, relation + num_relations, head) of each."""
    heads, relations, tails = triples.unbind(1)
    return torch.cat([triples, torch.stack([tails, relations + num_relations, heads], dim=1)])


class Sampler:
    """Chunks of an epoch, for one rank.

    Args:
        queries: ``(T, 3)`` head, relation, tail; see :func:`with_reciprocals`.
        num_entities: negatives are 0 to ``num_entities - 1``.
        config: sizes.
        seed: of the order and the negatives.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(
        self, queries: Tensor, num_entities: int, config: SamplingConfig, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.queries, self.num_entities, self.config = queries, num_entities, config
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self.num_steps = -(-len(queries) // config.batch_size)

    def _generator(self, *key: int) -> torch.Generator:
        words = np.random.SeedSequence([self._seed, *key]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(words[0]))

    def order(self, epoch: int) -> Tensor:
        """Return the permutation ``(T,)`` of an epoch."""
        return torch.randperm(len(self.queries), generator=self._generator(epoch))

    def batch_size(self, step: int) -> int:
        """Return the queries of a step over all ranks; the last step of an epoch may have fewer."""
        return min(self.config.batch_size, len(self.queries) - step * self.config.batch_size)

    def chunks(self, order: Tensor, epoch: int, step: int) -> list[Chunk]:
        """Return this rank's chunks of a step; none if there are more ranks than chunks."""
        start = step * self.config.batch_size
        batch = order[start : start + self.batch_size(step)]
        chunks = []
        for number, part in enumerate(batch.split(self.config.chunk_size)):
            if number % self._world_size == self._rank:
                generator = self._generator(epoch, step, number)
                negatives = torch.randint(self.num_entities, (self.config.num_negatives,), generator=generator)
                heads, relations, tails = self.queries[part].unbind(1)
                chunks.append(Chunk(heads, relations, tails, negatives))
        return chunks
