"""How many entities score better than a triple's answer, and how many the same.

Only counts travel between ranks.

All entities are compared where they lie: each rank scores its own rows, in tiles that are counted
while they are in the cache. Tiles have one shape on all ranks, so that equal rows get equal scores
to the last bit, wherever they stand.
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
from shardemb.kge.model import KnowledgeGraphModel
from shardemb.kge.sampling import SIDES, Known, Side, columns_of
from shardemb.sharding.placement import RowPlan

#: queries of a tile, and its scores: 2 MiB, which a core's share of the caches holds; on a GPU what
#: keeps it busy. With 128 columns this is within 2 % of the fastest of 64 to 4096 queries and 1024
#: to 16384 rows (EPYC, 512 KiB of second cache)
_BATCH = 256
_TILE, _TILE_CUDA = 1 << 19, 1 << 24
#: queries whose rows are looked up together, and their answers that are left out
_GROUP, _PAIRS = 2048, 1 << 20
#: numbers in the candidates' rows that a rank looks up together: 64 MiB in float32
_DRAWN = 1 << 24


@dataclass(frozen=True)
class Comparison:
    """The candidates of T queries against their answers; float64, exact."""

    #: (T,) candidates that score higher
    better: Tensor
    #: (T,) that score the same, without the answer
    equal: Tensor
    #: (T,) candidates, with the answer
    options: Tensor


@torch.no_grad()
def with_all(
    model: KnowledgeGraphModel,
    side: Side,
    triples: Tensor,
    known: Known | None,
    told: Callable[[int], object] = lambda n: None,
) -> Comparison:
    """Compare one side of each triple with all entities. A collective.

    Args:
        model: in evaluation mode, without dropout.
        side: that is asked for.
        triples: ``(T, 3)``, the same on all ranks.
        known: answers that are no candidates; None for all entities.
        told: is called with the number of queries that are done.

    Raises:
        FloatingPointError: a score is NaN or infinite, on all ranks.
    """
    entity, scorer = model.entity, model.scorer
    plan, rows = entity.plan, entity.local_rows()
    batch = min(_BATCH, _round_up(max(1, len(triples)), 16))
    limit = _TILE_CUDA if rows.is_cuda else _TILE
    width = max(batch, min(limit // batch, _round_up(plan.block, 16)))
    tiles = [(_padded(tile, width), len(tile)) for tile in rows.split(width)] if len(rows) else []
    found = []
    for entities, relations, answers in _groups(side, triples, known, _GROUP):
        query = _padded(model.queries(side, entities, relations), batch).split(batch)
        true = torch.cat(
            [
                scorer.score_all(q, _padded(a, width), exact=True).diagonal()
                for q, a in zip(
                    query, _padded(entity(answers.to(rows.device)), batch).split(batch), strict=True
                )
            ]
        )
        pairs = _left_out(side, entities, relations, answers, known, plan, batch, width, len(query))
        ends = torch.searchsorted(
            pairs, torch.arange(1, len(tiles) * len(query) + 1) * (batch * width)
        ).tolist()
        places = (pairs % (batch * width)).to(rows.device)
        out, counts = (
            true.new_empty(len(pairs)),
            torch.zeros(len(query), 3, batch, dtype=torch.int64, device=rows.device),
        )
        start = 0
        for ((tile, n), number), end in zip(product(tiles, range(len(query))), ends, strict=True):
            scores = scorer.score_all(query[number], tile, exact=True)
            kernels.count_better(scores, true[number * batch :][:batch], n, counts[number])
            if end > start:
                torch.index_select(scores.view(-1), 0, places[start:end], out=out[start:end])
                start = end
        queries = (pairs // (batch * width) % len(query) * batch + pairs // width % batch).to(
            rows.device
        )
        answer, number = true[queries], len(query) * batch
        less = [
            torch.bincount(queries[which], minlength=number)
            for which in (out > answer, out == answer, slice(None))
        ]
        better, equal, finite = counts.transpose(0, 1).reshape(3, -1)
        summary = torch.stack([better - less[0], equal - less[1], finite, less[2]])[
            :, : len(answers)
        ]
        found.append(_all_reduced(summary))
        told(len(answers))
        _check_finite(model, bool((found[-1][2] == plan.num_rows).all()))
    better, equal, _, dropped = _joined(found, 4)
    return Comparison(better, equal, plan.num_rows - dropped + 1)


@torch.no_grad()
def with_drawn(
    model: KnowledgeGraphModel,
    side: Side,
    triples: Tensor,
    known: Known | None,
    number: int,
    seed: int,
    told: Callable[[int], object] = lambda n: None,
) -> Comparison:
    """Compare one side of each triple with a number of entities, drawn uniformly for each.

    A collective.

    What is drawn depends on seed, side and the triple's place alone. The answer is no candidate,
    nor is a known one. The ranks share the queries. Arguments and errors are those of
    :func:`with_all`.
    """
    entity, scorer, plan = model.entity, model.scorer, model.entity.plan
    size = max(1, _DRAWN // ((number + 1) * max(1, plan.dim)))
    counts = torch.zeros(4, len(triples), dtype=torch.int64)
    for start in range(0, len(triples), size * plan.world_size):
        mine = torch.arange(start, min(start + size * plan.world_size, len(triples)))[
            plan.rank :: plan.world_size
        ]
        entities, relations, answers = columns_of(side, triples[mine])
        drawn = torch.empty(len(mine), number, dtype=torch.int64)
        for line, query in zip(drawn, mine.tolist(), strict=True):
            generator = np.random.default_rng([seed, SIDES.index(side), query])
            line.copy_(torch.from_numpy(generator.integers(plan.num_rows, size=number)))
        kept = ~_known_among(side, triples[mine], drawn, known)
        query = model.queries(side, entities, relations).unsqueeze(1)
        rows = entity(torch.cat([answers.unsqueeze(1), drawn], dim=1).to(entity.device))
        scores = scorer.score(query, rows).cpu()
        true, others = scores[:, :1], scores[:, 1:]
        better, equal = (others > true) & kept, (others == true) & kept
        finite = torch.isfinite(scores).all(1)
        counts[:, mine] = torch.stack([better.sum(1), equal.sum(1), kept.sum(1), finite])
        told(min(size * plan.world_size, len(triples) - start))
    better, equal, options, finite = _all_reduced(counts.to(entity.device)).double()
    _check_finite(model, bool(finite.all()))
    return Comparison(better, equal, options + 1)


def _groups(
    side: Side, triples: Tensor, known: Known | None, size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the columns of triples that are ranked together.

    Few enough, with few enough known answers.
    """
    for block in triples.split(size) if len(triples) else ():
        entities, relations, _ = columns = columns_of(side, block)
        if known is None:
            yield columns
            continue
        cuts = known.cuts(side, entities, relations, _PAIRS)
        yield from zip(*(column.tensor_split(cuts) for column in columns), strict=True)


def _left_out(
    side: Side,
    entities: Tensor,
    relations: Tensor,
    answers: Tensor,
    known: Known | None,
    plan: RowPlan,
    batch: int,
    width: int,
    batches: int,
) -> Tensor:
    """Return each pair of a query and a row of this rank that is no candidate, once, as a number.

    Its digits are the tile's rows, the tile's batch, the query within the batch, and the row within
    the tile.
    """
    of, found = torch.arange(len(answers)), answers
    if known is not None:
        more, others = known.answers(side, entities, relations)
        of, found = torch.cat([of, more]), torch.cat([found, others])
    here, rows = plan.owned(found)
    of = of[here]
    return (
        ((rows // width * batches + of // batch) * batch + of % batch) * width + rows % width
    ).unique()


def _known_among(side: Side, triples: Tensor, drawn: Tensor, known: Known | None) -> Tensor:
    """Return where entities ``(B, K)`` are the answers of triples ``(B, 3)``, or known ones."""
    hits, start = drawn == columns_of(side, triples)[2].unsqueeze(1), 0
    for entities, relations, _ in (
        _groups(side, triples, known, _GROUP) if known is not None else ()
    ):
        of, found = known.answers(side, entities, relations)  # type: ignore[union-attr]
        part, stride = (
            slice(start, start + len(entities)),
            (int(max(found.max(), drawn.max())) + 1 if len(found) else 1),
        )
        pairs = (of * stride + found).sort().values
        wanted = torch.arange(len(entities)).unsqueeze(1) * stride + drawn[part]
        if len(pairs):
            hits[part] |= (
                pairs[torch.searchsorted(pairs, wanted).clamp_max_(len(pairs) - 1)] == wanted
            )
        start += len(entities)
    return hits


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _padded(rows: Tensor, multiple: int) -> Tensor:
    """Return rows ``(n, D)`` with zeros behind, up to a multiple."""
    return F.pad(rows, (0, 0, 0, -len(rows) % multiple)) if len(rows) % multiple else rows


def _all_reduced(counts: Tensor) -> Tensor:
    """Add the counts of all ranks up."""
    counts = counts.contiguous()
    collectives.all_reduce(counts, operation="ranking")
    return counts.cpu()


def _joined(found: list[Tensor], lines: int) -> Tensor:
    return (torch.cat(found, dim=1) if found else torch.empty(lines, 0)).double()


def _check_finite(model: KnowledgeGraphModel, finite: bool) -> None:
    if not finite:  # NaN is neither better nor equal, so that it would take the first rank
        raise NonfiniteError(
            f"scores are NaN or infinite: the rows of {model.entity.name!r} or"
            f" {model.relation.name!r} have grown too large; lower the learning rates"
        )
