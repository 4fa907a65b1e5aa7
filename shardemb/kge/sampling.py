"""Batches and negatives that depend on seed, epoch and step, never on the number of ranks.

A global batch is cut into chunks; the queries of a chunk share their negatives, and ranks take the
chunks in turn. So one rank and four see the same chunks, and add up the same loss. A triple is two
queries: (head, relation, ?) for its tail and (?, relation, tail) for its head.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from shardemb.exceptions import InputError
from shardemb.utils.validation import at_least, one_of, within

Side = Literal["head", "tail"]
SIDES: tuple[Side, Side] = ("tail", "head")

#: triples that are shuffled at once: 12 to 24 MB of the file are read together
_BLOCK = 1 << 20
#: and in each of many chunks' parts
_LEAST_BLOCK = 1 << 12
#: pairs of a query and an answer that are looked at together
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
        one_of(
            "sampling",
            self,
            {
                "scheme": ("negatives", "1vsall", "kvsall"),
                "negatives": ("uniform", "degree"),
                "corrupt": ("both", "tail", "head", "bernoulli"),
            },
        )
        at_least(
            "sampling", self, batch_size=1, chunk_size=1, num_negatives=0 if self.in_batch else 1
        )
        within("sampling", self, degree_power=(0, 4))
        if self.in_batch and not self.num_negatives and self.chunk_size == 1:
            raise InputError(
                "sampling.chunk_size: got 1 with in_batch and num_negatives = 0, which leaves no"
                " negatives at all"
            )
        for name, idle in (
            ("filtered", self.filtered),
            ("in_batch", self.in_batch),
            ("negatives", self.negatives != "uniform"),
        ):
            if idle and self.scheme != "negatives":
                raise InputError(
                    f"sampling.{name}: got {getattr(self, name)!r} with scheme {self.scheme!r},"
                    " which draws no negatives"
                )
        if self.scheme != "negatives" and self.corrupt == "bernoulli":
            raise InputError(
                f"sampling.corrupt: got 'bernoulli' with scheme {self.scheme!r}, expected 'both',"
                " 'tail' or 'head'"
            )


@dataclass(frozen=True)
class Batch:
    """C chunks of c triples each, corrupted in S ways, each with N candidates a chunk."""

    #: (C, c) entity ids
    heads: Tensor
    #: (C, c) relation ids
    relations: Tensor
    #: (C, c) entity ids
    tails: Tensor
    #: (C, c) by which a triple's loss is multiplied; None for 1
    weights: Tensor | None
    #: S times, for all triples or for each ``(C, c)``: whether the head is replaced instead of the
    #: tail
    replaced_heads: tuple[Tensor | bool, ...]
    #: (S, C, N) entity ids that take its place
    candidates: Tensor
    #: places ``(n,)`` in ``(S, C, c, N)`` of what does not count: the true answer itself, and other
    #: true ones if filtered
    hits: Tensor


@dataclass(frozen=True)
class Queries:
    """Queries of all ranks, each with its true answers among all entities."""

    #: (Q,) entity ids: heads where tails are asked for, tails where heads are
    entities: Tensor
    #: (Q,) relation ids
    relations: Tensor
    #: (Q,) where the head is asked for
    head: Tensor
    #: (n,) places in the queries, ascending, and the true answers ``(n,)``
    places: Tensor
    answers: Tensor
    #: (Q,) by which a query's loss is multiplied; None for 1
    weights: Tensor | None


def seed_of(*key: int) -> int:
    """Return a seed of torch's generators for a key of whole numbers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def columns_of(side: Side, triples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the entities that are known where a side is asked for, the relations, and the answers.

    ``(B,)`` each, int64.
    """
    heads, relations, tails = triples.long().unbind(1)
    return (tails, relations, heads) if side == "head" else (heads, relations, tails)


def equal_range(sorted_values: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places of equal values in ``wanted`` ``(B,)`` and ``sorted_values`` ``(T,)``."""
    start = torch.searchsorted(sorted_values, wanted.contiguous())
    here = torch.zeros(0, dtype=torch.int64)
    if len(sorted_values):
        here = (
            (sorted_values[start.clamp_max(len(sorted_values) - 1)] == wanted).nonzero().squeeze(1)
        )
    if not len(here):
        return here, here
    start = start[here]
    count = torch.searchsorted(sorted_values, wanted[here], right=True) - start
    if len(here) == int(count.sum()):  # each value stands there once
        return here, start
    places = here.repeat_interleave(count)
    within = torch.arange(len(places)) - (count.cumsum(0) - count).repeat_interleave(count)
    return places, start.repeat_interleave(count) + within


class Known:
    """The answers that triples give to queries, by side.

    Args:
        splits: ``(T, 3)`` each: head, relation, tail.
        num_relations: of the graph.
        only: ``(B, 3)`` triples whose queries will be asked; memory and time go by these, not by
            the splits. None for any.
        whole: brings pairs ``(n, 2)`` of all ranks together, if each has a part of the splits.
    """

    def __init__(
        self,
        splits: Sequence[Tensor],
        num_relations: int,
        only: Tensor | None = None,
        whole: Callable[[Tensor], Tensor] = lambda pairs: pairs,
    ) -> None:
        self._num_relations = num_relations
        self._index = {side: self._make(splits, side, only, whole) for side in SIDES}

    def _key(self, entities: Tensor, relations: Tensor) -> Tensor:
        return entities.long() * self._num_relations + relations

    def _make(
        self,
        splits: Sequence[Tensor],
        side: Side,
        only: Tensor | None,
        whole: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        wanted = None if only is None else self._key(*columns_of(side, only)[:2]).unique()
        pairs = [torch.empty(0, 2, dtype=torch.int64)]
        for triples in splits:
            for block in triples.split(_BLOCK):
                entities, relations, found = columns_of(side, block)
                key = self._key(entities, relations)
                if wanted is not None:
                    place = torch.searchsorted(wanted, key).clamp_max(len(wanted) - 1)
                    here = (
                        wanted[place] == key
                        if len(wanted)
                        else torch.zeros_like(key, dtype=torch.bool)
                    )
                    key, found = key[here], found[here]
                pairs.append(torch.stack([key, found], dim=1))
        keys, answers = whole(torch.cat(pairs)).unbind(1)
        order = keys.sort()
        return order.values, answers[order.indices]

    def answers(self, side: Side, entities: Tensor, relations: Tensor) -> tuple[Tensor, Tensor]:
        """Return places ``(n,)`` in the queries ``(B,)``, ascending.

        And the known answers ``(n,)``, duplicates included.
        """
        keys, answers = self._index[side]
        places, found = equal_range(keys, self._key(entities, relations))
        return places, answers[found]

    def counts(self, side: Side, entities: Tensor, relations: Tensor) -> Tensor:
        """Return how many triples answer each query, ``(B,)``."""
        keys, wanted = self._index[side][0], self._key(entities, relations)
        return torch.searchsorted(keys, wanted, right=True) - torch.searchsorted(keys, wanted)

    def cuts(self, side: Side, entities: Tensor, relations: Tensor, most: int) -> Tensor:
        """Return where to cut queries ``(B,)`` into parts of about ``most`` known answers each.

        Or of one query.
        """
        ends = self.counts(side, entities, relations).cumsum(0) // most
        return ends.diff().nonzero().squeeze(1) + 1

    def queries(self, side: Side) -> tuple[Tensor, Tensor]:
        """Return entities and relations ``(Q,)`` of all queries, each once."""
        keys = self._index[side][0].unique_consecutive()
        return keys // self._num_relations, keys % self._num_relations


def subsampling_weights(triples: Tensor, known: Known) -> Tensor:
    """Return ``(T,)`` float32 of mean 1.

    ``1 / sqrt(triples of (head, relation) + triples of (relation, tail))``.

    Sun et al. 2019, whose counts begin at 4 instead of 0.
    """
    heads, relations, tails = triples.unbind(1)
    counts = known.counts("tail", heads, relations) + known.counts("head", tails, relations)
    weights = (counts + 4).rsqrt()
    return weights / weights.double().mean().float()


class Sampler:
    """Batches of an epoch, for one rank.

    Args:
        triples: ``(T, 3)`` head, relation, tail; read where they lie, a block at a time.
        num_entities: entities are 0 to ``num_entities - 1``.
        num_relations: of the graph.
        config: sizes, and how negatives are made.
        seed: of the order and the negatives.
        rank: of this process.
        world_size: number of processes.
        subsampling: weigh triples, see :func:`subsampling_weights`.
        shared: triples of all ranks, if ``triples`` are this rank's share of them: then it takes
            its chunks from these, so that batches depend on the number of ranks. 0 if they are all.

    Raises:
        ValueError: a share with settings that need all triples.
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
        shared: int = 0,
    ) -> None:
        if shared:
            _check_shared(config, subsampling)
        self._shared = shared
        self.triples, self.num_entities, self.config = triples, num_entities, config
        self._seed, self._rank, self._world_size = seed, rank, world_size
        stays = config.filtered or config.scheme == "kvsall"
        known = Known([triples], num_relations) if stays or subsampling else None
        self._known = known if stays else None  # it takes 32 bytes a triple
        self._weights = (
            subsampling_weights(triples, known) if subsampling and known is not None else None
        )
        self._sides: tuple[Side, ...] = (
            SIDES if config.corrupt in ("both", "bernoulli") else (cast(Side, config.corrupt),)
        )
        if config.scheme == "kvsall" and self._known is not None:
            parts = [(side, *self._known.queries(side)) for side in self._sides]
            columns = [
                (entities, kinds, torch.full_like(kinds, side == "head"))
                for side, entities, kinds in parts
            ]
            self._queries = torch.cat([torch.stack(column, dim=1) for column in columns])
        #: in which a triple is corrupted; as many queries come of it
        self.ways = 1 if config.corrupt == "bernoulli" else len(self._sides)
        self._cumulated = self._degrees() if config.negatives == "degree" else None
        self._replace_head = (
            self._bernoulli(num_relations) if config.corrupt == "bernoulli" else None
        )
        #: triples, or queries with "kvsall"
        self.num_samples = (
            len(self._queries) if config.scheme == "kvsall" else shared or len(triples)
        )
        self.num_steps = -(-self.num_samples // config.batch_size)
        # chunks read at places of their own, so that a rank holds a shuffled block for each of its
        # chunks
        streams = -(-config.batch_size // config.chunk_size) if config.scheme == "negatives" else 1
        self._block_size = max(_LEAST_BLOCK, _BLOCK // streams)
        self._order: tuple[int, Tensor] | None = None
        self._blocks: dict[int, tuple[tuple[int, int], Tensor]] = {}

    def _degrees(self) -> np.ndarray:
        degrees = np.zeros(self.num_entities, np.int64)
        for block in self.triples.split(_BLOCK):
            degrees += np.bincount(
                block[:, [0, 2]].reshape(-1).numpy(), minlength=self.num_entities
            )
        return np.cumsum(degrees**self.config.degree_power)

    def _bernoulli(self, num_relations: int) -> Tensor:
        """Return by relation the chance that the head is replaced.

        Tails a head over tails a head plus heads a tail.
        """
        count = torch.zeros(num_relations, dtype=torch.float64)
        each = []
        for column in (0, 2):
            keys = []
            for block in self.triples.split(_BLOCK):
                keys.append((block[:, 1].long() * self.num_entities + block[:, column]).unique())
            each.append(
                torch.bincount(
                    torch.cat(keys).unique() // self.num_entities, minlength=num_relations
                ).double()
            )
        for block in self.triples.split(_BLOCK):
            count += torch.bincount(block[:, 1].long(), minlength=num_relations)
        tails_a_head, heads_a_tail = (count / some.clamp_min(1) for some in each)
        return tails_a_head / (tails_a_head + heads_a_tail).clamp_min(1e-12)

    def _generator(self, *key: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(self._seed, *key))

    def size(self, step: int) -> int:
        """Return the triples (or queries) of a step over all ranks.

        The last step of an epoch may have fewer.
        """
        return min(self.config.batch_size, self.num_samples - step * self.config.batch_size)

    def places(self, epoch: int, step: int, chunk: int | None = None) -> Tensor:
        """Return where samples of a step stand.

        All of them ``(B,)``, one after the other, or those of a chunk ``(c,)``.

        An epoch goes over whole blocks in random order, each shuffled, the rest last. Each chunk of
        its whole steps has a part of that order to itself, so that a rank reads no more of the
        triples than it trains.
        """
        batch, size = self.config.batch_size, self.config.chunk_size
        whole = self.num_samples // batch
        if chunk is None:
            return self._ordered(epoch, step * batch, step * batch + self.size(step), 0)
        first = chunk * size
        size = min(size, self.size(step) - first)
        if self._shared:  # its chunks in turn, over and over
            mine = len(range(self._rank, -(-batch // self.config.chunk_size), self._world_size))
            start = (
                (step * mine + chunk // self._world_size)
                * self.config.chunk_size
                % len(self.triples)
            )
            parts = []
            while size:
                stop = min(start + size, len(self.triples))
                parts.append(self._ordered(epoch, start, stop, 0))
                start, size = 0, size - (stop - start)
            return torch.cat(parts)
        start = whole * first + step * size if step < whole else whole * batch + first
        return self._ordered(epoch, start, start + size, chunk)

    def _ordered(self, epoch: int, start: int, stop: int, stream: int) -> Tensor:
        """Return where the samples at ``[start, stop)`` of an epoch's order stand."""
        parts, length = [], self._block_size
        samples = len(self.triples) if self._shared else self.num_samples
        whole = samples // length
        while start < stop:
            key = (epoch, start // length)
            if stream not in self._blocks or self._blocks[stream][0] != key:
                if self._order is None or self._order[0] != epoch:
                    self._order = epoch, torch.randperm(whole, generator=self._generator(epoch, 0))
                block = int(self._order[1][key[1]]) if key[1] < whole else whole
                size = min(length, samples - block * length)
                shuffled = (
                    torch.randperm(size, generator=self._generator(epoch, 1, block))
                    + block * length
                )
                self._blocks[stream] = key, shuffled
            within = start % length
            part = self._blocks[stream][1][within : within + stop - start]
            parts.append(part)
            start += len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def batches(self, epoch: int, step: int) -> list[Batch]:
        """Return this rank's chunks of a step, those of equal size together.

        None if there are more ranks than chunks.
        """
        samples, size = self.size(step), self.config.chunk_size
        mine = list(range(-(-samples // size)))[self._rank :: self._world_size]
        full = [chunk for chunk in mine if chunk < samples // size]
        # a seed for each chunk: a rank draws for its own alone, however many others there are
        seed, generator = seed_of(self._seed, epoch, 2, step), torch.Generator()
        found = []
        for chunks in (full, mine[len(full) :]):
            drawn, coins = [], []
            for chunk in chunks:
                generator.manual_seed((seed + chunk) % (1 << 63))
                drawn.append(self._draw((self.ways, self.config.num_negatives), generator))
                if self._replace_head is not None:
                    coins.append(torch.rand(min(size, samples - chunk * size), generator=generator))
            if chunks:
                rows = torch.stack([self.places(epoch, step, chunk) for chunk in chunks])
                found.append(
                    self._batch(
                        rows, torch.stack(drawn, dim=1), torch.stack(coins) if coins else None
                    )
                )
        return found

    def _draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if self._cumulated is None:
            return torch.randint(self.num_entities, shape, generator=generator)
        at = (
            torch.rand(shape, generator=generator, dtype=torch.float64).numpy()
            * self._cumulated[-1]
        )
        return torch.from_numpy(self._cumulated.searchsorted(at, side="right"))

    def _batch(self, rows: Tensor, candidates: Tensor, coins: Tensor | None) -> Batch:
        heads, relations, tails = (
            self.triples[rows.reshape(-1)].long().reshape(*rows.shape, 3).unbind(-1)
        )
        if coins is not None and self._replace_head is not None:
            replaced: tuple[Tensor | bool, ...] = (coins < self._replace_head[relations],)
        else:
            replaced = tuple(side == "head" for side in self._sides)
        answers = torch.stack([_choose(head, heads, tails) for head in replaced])
        if self.config.in_batch:
            candidates = torch.cat([candidates, answers], dim=2)
        hits = self._hits(replaced, heads, relations, tails, answers, candidates)
        weights = None if self._weights is None else self._weights[rows]
        return Batch(heads, relations, tails, weights, replaced, candidates, hits)

    def _hits(
        self,
        replaced: tuple[Tensor | bool, ...],
        heads: Tensor,
        relations: Tensor,
        tails: Tensor,
        answers: Tensor,
        candidates: Tensor,
    ) -> Tensor:
        """Return the places in ``(S, C, c, N)`` of candidates that do not count."""
        size, width = answers.shape[2], candidates.shape[2]
        # numbers of a chunk are apart from those of another
        shift = torch.arange(
            0, answers[..., 0].numel() * self.num_entities, self.num_entities
        ).view(*answers.shape[:2], 1)
        numbers, order = (candidates + shift).view(-1).sort()
        found = [equal_range(numbers, (answers + shift).view(-1))]
        if self.config.filtered and self._known is not None:
            for way, head in enumerate(replaced):
                first = way * heads.numel()
                for query, known in self._true(head, heads, relations, tails):
                    of = query + first
                    which, place = equal_range(numbers, known + of // size * self.num_entities)
                    found.append((of[which], place))
        query, place = (
            found[0]
            if len(found) == 1
            else (torch.cat(parts) for parts in zip(*found, strict=True))
        )
        return query * width + order[place] % width

    def _true(
        self, head: Tensor | bool, heads: Tensor, relations: Tensor, tails: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield places in ``(C, c)`` and the known answers of these queries.

        Not too many at a time.
        """
        assert self._known is not None
        replaced = head if isinstance(head, Tensor) else torch.full(heads.shape, head)
        for side in SIDES:
            places = (replaced == (side == "head")).reshape(-1).nonzero().squeeze(1)
            entities = (tails if side == "head" else heads).reshape(-1)[places]
            kinds = relations.reshape(-1)[places]
            cuts = self._known.cuts(side, entities, kinds, _PAIRS).tolist()
            for start, stop in pairwise([0, *cuts, len(places)]):
                query, answers = self._known.answers(side, entities[start:stop], kinds[start:stop])
                yield places[start:stop][query], answers

    def queries(self, epoch: int, step: int) -> Queries:
        """Return the queries of a step with "1vsall" or "kvsall", of all ranks."""
        places = self.places(epoch, step)
        if self.config.scheme == "kvsall":
            assert self._known is not None
            entities, relations, head = self._queries[places].unbind(1)
            found = []
            for side in self._sides:
                numbers = (head == (side == "head")).nonzero().squeeze(1)
                within, answers = self._known.answers(side, entities[numbers], relations[numbers])
                found.append(torch.stack([numbers[within], answers]))
            at, answers = torch.cat(found, dim=1).unique(dim=1)
            return Queries(entities, relations, head.bool(), at, answers, None)
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


def _check_shared(config: SamplingConfig, subsampling: bool) -> None:
    whole = {
        "sampling.scheme": config.scheme != "negatives" and config.scheme,
        "sampling.negatives": config.negatives == "degree" and config.negatives,
        "sampling.corrupt": config.corrupt == "bernoulli" and config.corrupt,
        "sampling.filtered": config.filtered,
        "loss.subsampling": subsampling,
    }
    for name, value in whole.items():
        if value:
            raise InputError(
                f"{name}: got {value!r}, which needs all training triples, but each rank has a"
                " share of them alone"
            )


def _choose(head: Tensor | bool, heads: Tensor, tails: Tensor) -> Tensor:
    if isinstance(head, bool):
        return heads if head else tails
    return torch.where(head, heads, tails)
