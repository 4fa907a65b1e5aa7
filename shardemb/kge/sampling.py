"""Batches and negatives that depend on seed, epoch and step, not on the number of ranks.

A global batch is cut into chunks. The queries of a chunk share their negatives, and the ranks take
chunks in turn, so every number of ranks sums the same loss.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import numpy as np
import torch
from torch import Tensor

from shardemb.exceptions import InputError
from shardemb.kge.known_answers import (
    SIDES,
    KnownAnswers,
    Side,
    columns_of,
    equal_range,
    subsampling_weights,
)
from shardemb.utils.validation import at_least, one_of, within

#: most triples shuffled at once (12 to 24 MB), and the least if there are many chunks
_BLOCK, _LEAST_BLOCK = 1 << 20, 1 << 12
#: pairs of a query and an answer processed at once
_PAIRS = 1 << 22


@dataclass(frozen=True)
class SamplingConfig:
    """How training triples become batches."""

    #: what an answer is compared with: "negatives", drawn ones; "1vsall", every entity; "kvsall",
    #: every entity, with all known answers of a query as true ones
    scheme: str = "negatives"
    #: triples in a step, over all ranks; with "kvsall" queries
    batch_size: int = 1024
    #: triples that share negatives
    chunk_size: int = 512
    #: entities drawn per chunk and side
    num_negatives: int = 1000
    #: how they are drawn: "uniform", or by "degree", the triples that an entity is in
    negatives: str = "uniform"
    #: the degree's power; word2vec's 0.75
    degree_power: float = 0.75
    #: take the answers of the chunk's other triples as negatives besides
    in_batch: bool = False
    #: leave out negatives that a training triple makes a true answer; takes 32 bytes a triple on
    #: each rank
    filtered: bool = False
    #: which side of a triple is replaced: "both", "tail", "head", or one of them by "bernoulli"
    #: (Wang et al. 2014)
    corrupt: str = "both"

    def __post_init__(self) -> None:
        allowed = {
            "scheme": ("negatives", "1vsall", "kvsall"),
            "negatives": ("uniform", "degree"),
            "corrupt": ("both", "tail", "head", "bernoulli"),
        }
        one_of("sampling", self, allowed)
        least = 0 if self.in_batch else 1
        at_least("sampling", self, batch_size=1, chunk_size=1, num_negatives=least)
        within("sampling", self, degree_power=(0, 4))
        if self.in_batch and not self.num_negatives and self.chunk_size == 1:
            raise InputError(
                "sampling.chunk_size: got 1 with in_batch and num_negatives = 0, which leaves no"
                " negatives at all"
            )
        if self.scheme == "negatives":
            return
        defaults = {"filtered": False, "in_batch": False, "negatives": "uniform"}
        for name, default in defaults.items():
            if (value := getattr(self, name)) != default:
                raise InputError(
                    f"sampling.{name}: got {value!r} with scheme {self.scheme!r}, which draws no"
                    " negatives"
                )
        if self.corrupt == "bernoulli":
            raise InputError(
                f"sampling.corrupt: got 'bernoulli' with scheme {self.scheme!r}, expected 'both',"
                " 'tail' or 'head'"
            )


@dataclass(frozen=True)
class Batch:
    """C chunks of c triples, S corruptions of each triple, and N candidates for each corruption."""

    #: (C, c) entity ids
    heads: Tensor
    #: (C, c) relation ids
    relations: Tensor
    #: (C, c) entity ids
    tails: Tensor
    #: (C, c) factors of the losses; None for 1
    weights: Tensor | None
    #: length S: whether the head is replaced, for all triples or for each ``(C, c)``
    replaced_heads: tuple[Tensor | bool, ...]
    #: (S, C, N) ids of the replacing entities
    candidates: Tensor
    #: (n,) flat indices in ``(S, C, c, N)`` of candidates to ignore: true answers (with
    #: ``filtered``, all known ones)
    masked: Tensor


@dataclass(frozen=True)
class Queries:
    """Queries of all ranks, each with its true answers among all entities."""

    #: (Q,) ids of the known entities
    entities: Tensor
    #: (Q,) relation ids
    relations: Tensor
    #: (Q,) whether the head is the answer
    head: Tensor
    #: (n,) indices of queries, ascending, and their true answers ``(n,)``
    places: Tensor
    answers: Tensor
    #: (Q,) factors of the losses; None for 1
    weights: Tensor | None


def seed_of(*key: int) -> int:
    """Return a seed of torch's generators from a key of integers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


class Sampler:
    """Batches of an epoch, for one rank.

    Args:
        triples: ``(T, 3)`` head, relation, tail; may be memory-mapped, it is read in blocks.
        num_entities: rows of the entity table.
        num_relations: relations of the graph.
        config: batch sizes and negatives.
        seed: of the order and the negatives.
        rank: this process.
        world_size: number of processes.
        subsampling: weigh triples by :func:`~shardemb.kge.known_answers.subsampling_weights`.
    """

    def __init__(
        self,
        triples: Tensor,
        num_entities: int,
        num_relations: int,
        config: SamplingConfig,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        subsampling: bool = False,
    ) -> None:
        self.triples, self.num_entities, self.config = triples, num_entities, config
        self._seed, self._rank, self._world_size = seed, rank, world_size
        against_known = config.filtered or config.scheme == "kvsall"
        self._known = self._weights = self._cumulated = self._head_chance = None
        if against_known or subsampling:
            known = KnownAnswers([triples], num_relations)
            self._known = known if against_known else None  # takes 32 bytes a triple
            self._weights = subsampling_weights(triples, known) if subsampling else None
        bernoulli = config.corrupt == "bernoulli"
        both = bernoulli or config.corrupt == "both"
        self._sides: tuple[Side, ...] = SIDES if both else (cast(Side, config.corrupt),)
        #: corruptions, and so queries, of each triple
        self.num_corruptions = 1 if bernoulli else len(self._sides)
        if config.negatives == "degree":
            self._cumulated = self._degrees()
        if bernoulli:
            self._head_chance = self._bernoulli(num_relations)
        #: triples, or queries with "kvsall"
        self.num_samples = len(triples)
        if config.scheme == "kvsall" and self._known is not None:
            parts = []
            for side in self._sides:
                entities, relations = self._known.queries(side)
                is_head = torch.full_like(relations, side == "head")
                parts.append(torch.stack([entities, relations, is_head], dim=1))
            self._queries = torch.cat(parts)
            self.num_samples = len(self._queries)
        self.num_steps = -(-self.num_samples // config.batch_size)
        # the chunks of a step come from different blocks, all in memory
        streams = -(-config.batch_size // config.chunk_size) if config.scheme == "negatives" else 1
        self._block_size = max(_LEAST_BLOCK, _BLOCK // streams)
        self._order: tuple[int, Tensor] | None = None
        self._blocks: dict[int, tuple[tuple[int, int], Tensor]] = {}

    def _degrees(self) -> np.ndarray:
        degrees = np.zeros(self.num_entities, np.int64)
        for block in self.triples.split(_BLOCK):
            ids = block[:, [0, 2]].reshape(-1).numpy()
            degrees += np.bincount(ids, minlength=self.num_entities)
        return np.cumsum(degrees**self.config.degree_power)

    def _bernoulli(self, num_relations: int) -> Tensor:
        """Return the chance, by relation, that the head is replaced (Wang et al. 2014)."""
        blocks = self.triples.split(_BLOCK)
        count = torch.zeros(num_relations, dtype=torch.float64)
        for block in blocks:
            count += torch.bincount(block[:, 1].long(), minlength=num_relations)
        per_entity = []
        for column in (0, 2):
            keys = [
                (block[:, 1].long() * self.num_entities + block[:, column]).unique()
                for block in blocks
            ]
            relations = torch.cat(keys).unique() // self.num_entities
            entities = torch.bincount(relations, minlength=num_relations)
            per_entity.append(count / entities.clamp_min(1))
        tails_per_head, heads_per_tail = per_entity
        return tails_per_head / (tails_per_head + heads_per_tail).clamp_min(1e-12)

    def _generator(self, *key: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(self._seed, *key))

    def size(self, step: int) -> int:
        """Return a step's triples (or queries) on all ranks; the last step has fewer."""
        return min(self.config.batch_size, self.num_samples - step * self.config.batch_size)

    def places(self, epoch: int, step: int, chunk: int | None = None) -> Tensor:
        """Return indices of a step's samples ``(B,)``, or of one chunk's ``(c,)``.

        An epoch goes over whole blocks in random order, each shuffled, and a partial block last.
        Each chunk has its own part of that order: a rank reads only triples that it trains.
        """
        batch, size = self.config.batch_size, self.config.chunk_size
        whole = self.num_samples // batch
        if chunk is None:
            return self._ordered(epoch, step * batch, step * batch + self.size(step), 0)
        first = chunk * size
        size = min(size, self.size(step) - first)
        start = whole * first + step * size if step < whole else whole * batch + first
        return self._ordered(epoch, start, start + size, chunk)

    def _ordered(self, epoch: int, start: int, stop: int, stream: int) -> Tensor:
        parts, length = [], self._block_size
        whole = self.num_samples // length
        while start < stop:
            key = (epoch, start // length)
            if stream not in self._blocks or self._blocks[stream][0] != key:
                if self._order is None or self._order[0] != epoch:
                    self._order = epoch, torch.randperm(whole, generator=self._generator(epoch, 0))
                block = int(self._order[1][key[1]]) if key[1] < whole else whole
                size = min(length, self.num_samples - block * length)
                generator = self._generator(epoch, 1, block)
                shuffled = torch.randperm(size, generator=generator) + block * length
                self._blocks[stream] = key, shuffled
            within = start % length
            part = self._blocks[stream][1][within : within + stop - start]
            parts.append(part)
            start += len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def batches(self, epoch: int, step: int) -> list[Batch]:
        """Return this rank's chunks of a step, grouped by size; empty without chunks."""
        samples, size = self.size(step), self.config.chunk_size
        own = list(range(-(-samples // size)))[self._rank :: self._world_size]
        full = [chunk for chunk in own if chunk < samples // size]
        # each chunk has a seed, so that a rank draws only its own negatives
        seed, generator = seed_of(self._seed, epoch, 2, step), torch.Generator()
        batches = []
        for chunks in (full, own[len(full) :]):
            drawn, coins = [], []
            for chunk in chunks:
                generator.manual_seed((seed + chunk) % (1 << 63))
                drawn.append(self._draw(generator))
                if self._head_chance is not None:
                    coins.append(torch.rand(min(size, samples - chunk * size), generator=generator))
            if chunks:
                rows = torch.stack([self.places(epoch, step, chunk) for chunk in chunks])
                tossed = torch.stack(coins) if coins else None
                batches.append(self._batch(rows, torch.stack(drawn, dim=1), tossed))
        return batches

    def _draw(self, generator: torch.Generator) -> Tensor:
        shape = (self.num_corruptions, self.config.num_negatives)
        if self._cumulated is None:
            return torch.randint(self.num_entities, shape, generator=generator)
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64).numpy()
        places = self._cumulated.searchsorted(uniform * self._cumulated[-1], side="right")
        return torch.from_numpy(places)

    def _batch(self, rows: Tensor, candidates: Tensor, coins: Tensor | None) -> Batch:
        triples = self.triples[rows.reshape(-1)].long()
        heads, relations, tails = triples.reshape(*rows.shape, 3).unbind(-1)
        replaced: tuple[Tensor | bool, ...] = tuple(side == "head" for side in self._sides)
        if coins is not None and self._head_chance is not None:
            replaced = (coins < self._head_chance[relations],)
        answers = torch.stack([choose(head, heads, tails) for head in replaced])
        if self.config.in_batch:
            candidates = torch.cat([candidates, answers], dim=2)
        masked = self._masked((heads, relations, tails), replaced, answers, candidates)
        weights = None if self._weights is None else self._weights[rows]
        return Batch(heads, relations, tails, weights, replaced, candidates, masked)

    def _masked(
        self,
        columns: tuple[Tensor, Tensor, Tensor],
        replaced: tuple[Tensor | bool, ...],
        answers: Tensor,
        candidates: Tensor,
    ) -> Tensor:
        size, width, entities = answers.shape[2], candidates.shape[2], self.num_entities
        # give the entities of each chunk distinct numbers
        chunks = answers[..., 0].numel()
        shift = torch.arange(0, chunks * entities, entities).view(*answers.shape[:2], 1)
        numbers, order = (candidates + shift).view(-1).sort()
        matches = [equal_range(numbers, (answers + shift).view(-1))]
        if self.config.filtered and self._known is not None:
            for corruption, head in enumerate(replaced):
                for query, known in self._true_answers(head, *columns):
                    place = query + corruption * columns[0].numel()
                    number, match = equal_range(numbers, known + place // size * entities)
                    matches.append((place[number], match))
        query, place = map(torch.cat, zip(*matches, strict=True))
        return query * width + order[place] % width

    def _true_answers(
        self, head: Tensor | bool, heads: Tensor, relations: Tensor, tails: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        assert self._known is not None
        replaced = head if isinstance(head, Tensor) else torch.full(heads.shape, head)
        for side in SIDES:
            places = (replaced == (side == "head")).reshape(-1).nonzero().squeeze(1)
            entities = (tails if side == "head" else heads).reshape(-1)[places]
            of_query = relations.reshape(-1)[places]
            cuts = self._known.cuts(side, entities, of_query, _PAIRS).tolist()
            for start, stop in pairwise([0, *cuts, len(places)]):
                part = slice(start, stop)
                query, answers = self._known.answers(side, entities[part], of_query[part])
                yield places[part][query], answers

    def queries(self, epoch: int, step: int) -> Queries:
        """Return the queries of a step on all ranks, for "1vsall" or "kvsall"."""
        places = self.places(epoch, step)
        if self.config.scheme == "kvsall":
            assert self._known is not None
            entities, relations, head = self._queries[places].unbind(1)
            pairs = []
            for side in self._sides:
                asked = (head == (side == "head")).nonzero().squeeze(1)
                within, answers = self._known.answers(side, entities[asked], relations[asked])
                pairs.append(torch.stack([asked[within], answers]))
            query, answers = torch.cat(pairs, dim=1).unique(dim=1)
            return Queries(entities, relations, head.bool(), query, answers, None)
        parts = [columns_of(side, self.triples[places]) for side in self._sides]
        entities, relations, answers = map(torch.cat, zip(*parts, strict=True))
        return Queries(
            entities,
            relations,
            torch.cat([torch.full((len(places),), side == "head") for side in self._sides]),
            torch.arange(len(answers)),
            answers,
            None if self._weights is None else self._weights[places].repeat(len(self._sides)),
        )


def choose(head: Tensor | bool, heads: Tensor, tails: Tensor) -> Tensor:
    """Return heads where ``head``, otherwise tails: ids ``(C, c)``, or rows ``(C, c, D)``."""
    if isinstance(head, bool):
        return heads if head else tails
    mask = head.to(heads.device)
    return torch.where(mask if heads.dim() == mask.dim() else mask.unsqueeze(-1), heads, tails)
