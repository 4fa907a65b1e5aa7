"""Counts entities that score better than a triple's answer, and that score the same.

Each rank scores its own rows, in tiles that are counted while in cache; only counts travel between
ranks. Tiles have one shape on all ranks, so that equal rows get bitwise equal scores.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shardemb import kernels
from shardemb.comm import collectives
from shardemb.exceptions import NonfiniteError
from shardemb.kge.known_answers import SIDES, KnownAnswers, Side, columns_of
from shardemb.kge.model import KnowledgeGraphModel
from shardemb.sharding.placement import RowPlan

#: queries of a tile, and its scores: 2 MiB, a core's cache; more on a GPU. Within 2 % of the
#: fastest (128 columns, EPYC, 512 KiB L2)
_BATCH = 256
_TILE, _TILE_CUDA = 1 << 19, 1 << 24
#: queries looked up together, and their known answers
_GROUP, _PAIRS = 2048, 1 << 20
#: numbers in candidate rows looked up together by a rank: 64 MiB in float32
_DRAWN = 1 << 24


@dataclass(frozen=True)
class Comparison:
    """Exact counts of T queries' candidates, in float64."""

    #: (T,) candidates that score higher
    better: Tensor
    #: (T,) candidates that score the same, without the answer
    equal: Tensor
    #: (T,) candidates, with the answer
    options: Tensor


@dataclass(frozen=True)
class _Tiling:
    #: queries and rows of a tile
    batch: int
    width: int
    #: batches of queries
    batches: int

    def numbers(self, queries: Tensor, rows: Tensor) -> Tensor:
        """Number scores by tile of rows, batch, query in the batch, row in the tile."""
        tile = rows // self.width * self.batches + queries // self.batch
        return (tile * self.batch + queries % self.batch) * self.width + rows % self.width

    def queries(self, numbers: Tensor) -> Tensor:
        batch = numbers // (self.batch * self.width) % self.batches
        return batch * self.batch + numbers // self.width % self.batch


@torch.no_grad()
def with_all(
    model: KnowledgeGraphModel,
    side: Side,
    triples: Tensor,
    known: KnownAnswers | None,
    on_done: Callable[[int], object] = lambda n: None,
) -> Comparison:
    """Compare one side of each triple with all entities. A collective.

    Args:
        model: in evaluation mode.
        side: the side to predict.
        triples: ``(T, 3)``, the same on all ranks.
        known: answers that are not candidates.
        on_done: called with the number of finished queries.

    Raises:
        FloatingPointError: a score is NaN or infinite, on all ranks.
    """
    entity, scorer = model.entity, model.scorer
    plan, rows = entity.plan, entity.local_rows()
    batch = min(_BATCH, _round_up(max(1, len(triples)), 16))
    limit = _TILE_CUDA if rows.is_cuda else _TILE
    width = max(batch, min(limit // batch, _round_up(plan.block, 16)))
    tiles = [(_padded(tile, width), len(tile)) for tile in rows.split(width)] if len(rows) else []
    summaries = [torch.empty(4, 0)]
    for entities, relations, answers in _groups(side, triples, known, _GROUP):
        query = _padded(model.queries(side, entities, relations), batch).split(batch)
        answer_rows = _padded(entity(answers.to(rows.device)), batch).split(batch)
        true = torch.cat(
            [
                scorer.score_all(q, _padded(a, width), exact=True).diagonal()
                for q, a in zip(query, answer_rows, strict=True)
            ]
        )
        tiling = _Tiling(batch, width, len(query))
        left_out = _left_out(side, (entities, relations, answers), known, plan, tiling)
        size = batch * width
        bounds = torch.arange(1, len(tiles) * len(query) + 1) * size
        ends = torch.searchsorted(left_out, bounds).tolist()
        places = (left_out % size).to(rows.device)
        out = true.new_empty(len(left_out))
        counts = torch.zeros(len(query), 3, batch, dtype=torch.int64, device=rows.device)
        start = 0
        for ((tile, n), number), end in zip(product(tiles, range(len(query))), ends, strict=True):
            scores = scorer.score_all(query[number], tile, exact=True)
            kernels.count_better(scores, true[number * batch :][:batch], n, counts[number])
            if end > start:
                torch.index_select(scores.view(-1), 0, places[start:end], out=out[start:end])
                start = end
        queries = tiling.queries(left_out).to(rows.device)
        answer, total = true[queries], len(query) * batch
        less_better, less_equal, dropped = (
            torch.bincount(queries[which], minlength=total)
            for which in (out > answer, out == answer, slice(None))
        )
        better, equal, finite = counts.transpose(0, 1).reshape(3, -1)
        summary = torch.stack([better - less_better, equal - less_equal, finite, dropped])
        summaries.append(_all_reduced(summary[:, : len(answers)]))
        on_done(len(answers))
        _check_finite(model, bool((summaries[-1][2] == plan.num_rows).all()))
    better, equal, _, dropped = torch.cat(summaries, dim=1).double()
    return Comparison(better, equal, plan.num_rows - dropped + 1)


@torch.no_grad()
def with_drawn(
    model: KnowledgeGraphModel,
    side: Side,
    triples: Tensor,
    known: KnownAnswers | None,
    number: int,
    seed: int,
    on_done: Callable[[int], object] = lambda n: None,
) -> Comparison:
    """Compare one side of each triple with ``number`` uniformly drawn entities. A collective.

    The draw depends only on seed, side and the triple's index. Answers and known answers are not
    candidates. Other arguments and errors: :func:`with_all`.
    """
    entity, scorer, plan = model.entity, model.scorer, model.entity.plan
    size = plan.world_size * max(1, _DRAWN // ((number + 1) * max(1, plan.dim)))
    counts = torch.zeros(4, len(triples), dtype=torch.int64)
    for start in range(0, len(triples), size):
        stop = min(start + size, len(triples))
        own = torch.arange(start, stop)[plan.rank :: plan.world_size]
        entities, relations, answers = columns_of(side, triples[own])
        drawn = torch.empty(len(own), number, dtype=torch.int64)
        for line, query in zip(drawn, own.tolist(), strict=True):
            generator = np.random.default_rng([seed, SIDES.index(side), query])
            line.copy_(torch.from_numpy(generator.integers(plan.num_rows, size=number)))
        kept = ~_known_among(side, triples[own], drawn, known)
        queries = model.queries(side, entities, relations).unsqueeze(1)
        rows = entity(torch.cat([answers.unsqueeze(1), drawn], dim=1).to(entity.device))
        scores = scorer.score(queries, rows).cpu()
        true, others = scores[:, :1], scores[:, 1:]
        better, equal = (others > true) & kept, (others == true) & kept
        finite = torch.isfinite(scores).all(1)
        counts[:, own] = torch.stack([better.sum(1), equal.sum(1), kept.sum(1), finite])
        on_done(stop - start)
    better, equal, options, finite = _all_reduced(counts.to(entity.device)).double()
    _check_finite(model, bool(finite.all()))
    return Comparison(better, equal, options + 1)


def _groups(
    side: Side, triples: Tensor, known: KnownAnswers | None, size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for block in triples.split(size) if len(triples) else ():
        entities, relations, _ = columns = columns_of(side, block)
        if known is None:
            yield columns
            continue
        cuts = known.cuts(side, entities, relations, _PAIRS)
        yield from zip(*(column.tensor_split(cuts) for column in columns), strict=True)


def _left_out(
    side: Side,
    columns: tuple[Tensor, Tensor, Tensor],
    known: KnownAnswers | None,
    plan: RowPlan,
    tiling: _Tiling,
) -> Tensor:
    """Return the distinct numbers of this rank's scores that are not candidates."""
    entities, relations, answers = columns
    queries = torch.arange(len(answers))
    if known is not None:
        others, known_answers = known.answers(side, entities, relations)
        queries, answers = torch.cat([queries, others]), torch.cat([answers, known_answers])
    owned, rows = plan.owned(answers)
    return tiling.numbers(queries[owned], rows).unique()


def _known_among(side: Side, triples: Tensor, drawn: Tensor, known: KnownAnswers | None) -> Tensor:
    """Return which entities ``(B, K)`` are answers of triples ``(B, 3)``, own or known."""
    among = drawn == columns_of(side, triples)[2].unsqueeze(1)
    if known is None:
        return among
    start = 0
    for entities, relations, _ in _groups(side, triples, known, _GROUP):
        queries, answers = known.answers(side, entities, relations)
        part = slice(start, start + len(entities))
        start = part.stop
        if not len(answers):
            continue
        stride = int(max(answers.max(), drawn.max())) + 1
        pairs = (queries * stride + answers).sort().values
        wanted = torch.arange(len(entities)).unsqueeze(1) * stride + drawn[part]
        place = torch.searchsorted(pairs, wanted).clamp_max_(len(pairs) - 1)
        among[part] |= pairs[place] == wanted
    return among


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _padded(rows: Tensor, multiple: int) -> Tensor:
    return F.pad(rows, (0, 0, 0, -len(rows) % multiple)) if len(rows) % multiple else rows


def _all_reduced(counts: Tensor) -> Tensor:
    counts = counts.contiguous()
    collectives.all_reduce(counts, operation="ranking")
    return counts.cpu()


def _check_finite(model: KnowledgeGraphModel, finite: bool) -> None:
    if not finite:  # NaN is neither better nor equal, so it would rank first
        raise NonfiniteError(
            f"scores are NaN or infinite: the rows of {model.entity.name!r} or"
            f" {model.relation.name!r} have grown too large; lower the learning rates"
        )
