"""Queries of triples, and an index of their known answers.

A triple answers two queries: (head, relation, ?) by its tail and (?, relation, tail) by its head.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

#: the entity that a query asks for
Side = Literal["head", "tail"]
SIDES: tuple[Side, Side] = ("tail", "head")
#: triples indexed at once
_BLOCK = 1 << 20


def columns_of(side: Side, triples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return known entities, relations and answers of queries: int64 ``(B,)`` each."""
    heads, relations, tails = triples.long().unbind(1)
    return (tails, relations, heads) if side == "head" else (heads, relations, tails)


def equal_range(sorted_values: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return indices of equal values in ``wanted`` ``(B,)`` and ``sorted_values`` ``(T,)``."""
    none = torch.zeros(0, dtype=torch.int64)
    if not len(sorted_values):
        return none, none
    start = torch.searchsorted(sorted_values, wanted.contiguous())
    equal = sorted_values[start.clamp_max(len(sorted_values) - 1)] == wanted
    places = equal.nonzero().squeeze(1)
    if not len(places):
        return none, none
    start = start[places]
    count = torch.searchsorted(sorted_values, wanted[places], right=True) - start
    if len(places) == int(count.sum()):  # all values are distinct
        return places, start
    repeated = places.repeat_interleave(count)
    within = torch.arange(len(repeated)) - (count.cumsum(0) - count).repeat_interleave(count)
    return repeated, start.repeat_interleave(count) + within


class KnownAnswers:
    """An index of the answers that triples give to queries, by side.

    Args:
        splits: ``(T, 3)`` each: head, relation, tail.
        num_relations: relations of the graph.
        only: ``(B, 3)`` triples, to index only their queries; None for all.
        gather: concatenates ``(n, 2)`` pairs of all ranks, if each indexes a part of the splits.
    """

    def __init__(
        self,
        splits: Sequence[Tensor],
        num_relations: int,
        only: Tensor | None = None,
        gather: Callable[[Tensor], Tensor] = lambda pairs: pairs,
    ) -> None:
        self._num_relations = num_relations
        self._index = {}
        for side in SIDES:
            keys, answers = gather(self._pairs(splits, side, only)).unbind(1)
            order = keys.sort()
            self._index[side] = order.values, answers[order.indices]

    def _key(self, entities: Tensor, relations: Tensor) -> Tensor:
        return entities.long() * self._num_relations + relations

    def _pairs(self, splits: Sequence[Tensor], side: Side, only: Tensor | None) -> Tensor:
        wanted = None if only is None else self._key(*columns_of(side, only)[:2]).unique()
        pairs = [torch.empty(0, 2, dtype=torch.int64)]
        for triples in splits:
            for block in triples.split(_BLOCK):
                entities, relations, answers = columns_of(side, block)
                keys = self._key(entities, relations)
                if wanted is not None:
                    asked, _ = equal_range(wanted, keys)
                    keys, answers = keys[asked], answers[asked]
                pairs.append(torch.stack([keys, answers], dim=1))
        return torch.cat(pairs)

    def answers(self, side: Side, entities: Tensor, relations: Tensor) -> tuple[Tensor, Tensor]:
        """Return indices ``(n,)`` of queries ``(B,)``, ascending, and answers, with duplicates."""
        keys, answers = self._index[side]
        places, rows = equal_range(keys, self._key(entities, relations))
        return places, answers[rows]

    def counts(self, side: Side, entities: Tensor, relations: Tensor) -> Tensor:
        """Return the number of triples that answer each query, ``(B,)``."""
        keys, wanted = self._index[side][0], self._key(entities, relations)
        return torch.searchsorted(keys, wanted, right=True) - torch.searchsorted(keys, wanted)

    def cuts(self, side: Side, entities: Tensor, relations: Tensor, most: int) -> Tensor:
        """Return indices that cut queries ``(B,)`` into parts of about ``most`` answers."""
        ends = self.counts(side, entities, relations).cumsum(0) // most
        return ends.diff().nonzero().squeeze(1) + 1

    def queries(self, side: Side) -> tuple[Tensor, Tensor]:
        """Return entities and relations ``(Q,)`` of the distinct queries."""
        keys = self._index[side][0].unique_consecutive()
        return keys // self._num_relations, keys % self._num_relations


def subsampling_weights(triples: Tensor, known: KnownAnswers) -> Tensor:
    """Return float32 weights ``(T,)`` of mean 1, lower for frequent queries.

    ``1 / sqrt(4 + triples of (head, relation) + triples of (relation, tail))``, Sun et al. 2019.
    """
    heads, relations, tails = triples.unbind(1)
    counts = known.counts("tail", heads, relations) + known.counts("head", tails, relations)
    weights = (counts + 4).rsqrt()
    return weights / weights.double().mean().float()
