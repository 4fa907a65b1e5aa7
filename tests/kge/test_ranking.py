"""How many entities are better: against brute force, in tiles, with ties."""

import ctypes
import gc
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from multirank import without_c_loops
from torch.nn import functional as F

from shardemb.kge import KnowledgeGraphModel, ModelConfig, ranking
from shardemb.kge.known_answers import SIDES, KnownAnswers
from shardemb.kge.ranking import Comparison, with_all, with_drawn
from shardemb.kge.scorers import SCORERS

TRIPLES = torch.stack(
    [torch.arange(300) % 41, torch.arange(300) % 3, torch.arange(300) * 7 % 41], dim=1
)
ASKED = TRIPLES[:50]
#: their scores of round numbers are not exact in float32, so that what ties depends on the order of
#: a sum
INEXACT = ("hole", "quate", "rotate")


def _model(
    scorer: str, rows: int = 41, rounded: bool = True, dim: int = 8, **options
) -> KnowledgeGraphModel:
    model = KnowledgeGraphModel(
        rows, 3, ModelConfig(scorer=scorer, dim=dim, init_std=1.0, **options), seed=5
    )
    if rounded:  # so that there are ties
        for table in (model.entity, model.relation):
            stored = table._stored_rows()
            table._load_stored_rows({**stored, "weight": stored["weight"].round()})
    return model.eval()


def _compare(
    rank: int,
    world_size: int,
    scorer: str,
    reciprocal: bool,
    filtered: bool,
    tile: int,
    loops: bool,
) -> tuple:
    model = _model(scorer, rounded=scorer not in INEXACT, reciprocal=reciprocal)
    if scorer == "distmult":
        model.entity.normalizer = F.hardtanh
    known = KnownAnswers([TRIPLES], 3, only=ASKED) if filtered else None
    before = ranking._TILE, ranking._BATCH, ranking._GROUP, ranking._PAIRS
    if tile:  # several tiles, batches and groups
        ranking._TILE, ranking._BATCH, ranking._GROUP, ranking._PAIRS = tile, 16, 32, 30
    try:
        if loops:
            found = [with_all(model, side, ASKED, known) for side in SIDES]
        else:
            with without_c_loops():
                found = [with_all(model, side, ASKED, known) for side in SIDES]
    finally:
        ranking._TILE, ranking._BATCH, ranking._GROUP, ranking._PAIRS = before
    with torch.no_grad():
        return found, model.entity(None).clone(), model.relation(None).clone()


def _expected(
    scorer: str, entity: torch.Tensor, relation: torch.Tensor, reciprocal: bool, filtered: bool
) -> list[Comparison]:
    """One query after the other, from scores of one product."""
    function, found = SCORERS[scorer], []
    known = {(h, r, t) for h, r, t in TRIPLES.tolist()}
    for side in SIDES:
        lines = []
        for h, r, t in ASKED.tolist():
            asked, answer, kind = (t, h, r + 3 * reciprocal) if side == "head" else (h, t, r)
            by_head = side == "head" and not reciprocal
            query = function.query(entity[[asked]], relation[[kind]], by_head)
            scores = function.score_all(query, entity, exact=True)[0]
            triples = [(e, r, t) if side == "head" else (h, r, e) for e in range(len(entity))]
            others = scores[
                [
                    e
                    for e in range(len(entity))
                    if e != answer and not (filtered and triples[e] in known)
                ]
            ]
            lines.append(
                ((others > scores[answer]).sum(), (others == scores[answer]).sum(), len(others) + 1)
            )
        found.append(Comparison(*torch.tensor(lines, dtype=torch.double).unbind(1)))
    return found


def _equal(got: Comparison, expected: Comparison) -> None:
    for name in ("better", "equal", "options"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=0, atol=0)


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("loops", [True, False], ids=["C", "torch"])
@pytest.mark.parametrize("tile", [0, 256])
def test_all_entities(rank_pool, world_size: int, scorer: str, loops: bool, tile: int) -> None:
    reciprocal, filtered = scorer not in ("rotate", "distmult"), bool(tile)
    for found, entity, relation in rank_pool(
        _compare, world_size, scorer, reciprocal, filtered, tile, loops
    ):
        for got, expected in zip(
            found, _expected(scorer, entity, relation, reciprocal, filtered), strict=True
        ):
            _equal(got, expected)
            assert expected.equal.any() == (scorer not in INEXACT)


def _duplicates(
    rank: int, world_size: int, scorer: str, dim: int, rows: int, threads: int
) -> list[Comparison]:
    """All entities have the same row, which is no round number.

    One tile is the last rank's, and short.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    model = _model(scorer, rows, rounded=False, dim=dim)
    one = torch.randn(1, dim, generator=torch.Generator().manual_seed(dim))
    model.entity._load_stored_rows(
        {**model.entity._stored_rows(), "weight": one.expand(model.entity.plan.num_local, dim)}
    )
    number = torch.arange(100)
    triples = torch.stack([number * 37 % rows, number % 3, number * 91 % rows], dim=1)
    try:
        return [
            *(with_all(model, side, triples, None) for side in SIDES),
            with_drawn(model, "tail", triples, None, 60, 0),
        ]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("dim", "rows", "threads"), [(7, 5003, 1), (50, 5003, 2), (128, 9001, 2), (500, 4099, 1)]
)
@pytest.mark.parametrize("scorer", ["distmult", "transe", "transe_l1"])
def test_equal_rows_tie_wherever_they_are(
    rank_pool, scorer: str, dim: int, rows: int, threads: int
) -> None:
    for ranks in (1, 3):
        for found in rank_pool(_duplicates, ranks, scorer, dim, rows, threads):
            for side in found:
                assert not side.better.any()
                assert side.equal.equal(side.options - 1)


def _drawn(rank: int, world_size: int, filtered: bool, size: int, seed: int = 3) -> tuple:
    before, ranking._DRAWN = ranking._DRAWN, size
    model = _model("complex")
    known = KnownAnswers([TRIPLES], 3, only=ASKED) if filtered else None
    try:
        found = [with_drawn(model, side, ASKED, known, 20, seed) for side in SIDES]
    finally:
        ranking._DRAWN = before
    with torch.no_grad():
        return found, model.entity(None).clone(), model.relation(None).clone()


@pytest.mark.parametrize("filtered", [False, True])
def test_drawn_candidates(rank_pool, world_size: int, filtered: bool) -> None:
    """The same at any number of ranks and size of blocks; against scores of the same draws."""
    known = {tuple(triple) for triple in TRIPLES.tolist()}
    for size in (1, 8 * 21 * 7, 1 << 24):
        for found, entity, relation in rank_pool(_drawn, world_size, filtered, size):
            for number, side in enumerate(SIDES):
                lines = []
                for place, (h, r, t) in enumerate(ASKED.tolist()):
                    asked, answer, kind = (t, h, r + 3) if side == "head" else (h, t, r)
                    drawn = np.random.default_rng([3, number, place]).integers(41, size=20).tolist()
                    triples = [(e, r, t) if side == "head" else (h, r, e) for e in drawn]
                    kept = [
                        e
                        for e, one in zip(drawn, triples, strict=True)
                        if e != answer and not (filtered and one in known)
                    ]
                    query = SCORERS["complex"].query(entity[[asked]], relation[[kind]], False)
                    scores = (query * entity).sum(1)
                    lines.append(
                        (
                            (scores[kept] > scores[answer]).sum(),
                            (scores[kept] == scores[answer]).sum(),
                            len(kept) + 1,
                        )
                    )
                _equal(
                    found[number], Comparison(*torch.tensor(lines, dtype=torch.double).unbind(1))
                )
    (first, *_), (second, *_) = (
        rank_pool(_drawn, 1, filtered, 1 << 24)[0],
        rank_pool(_drawn, 1, filtered, 1 << 24, 4)[0],
    )
    assert not first[0].better.equal(second[0].better)


def test_many_drawn_candidates_tell_the_rank_among_all() -> None:
    model = _model("complex", 1001, rounded=False)
    triples = torch.stack(
        [torch.arange(60), torch.arange(60) % 3, torch.arange(60) * 17 % 1001], dim=1
    )
    whole, drawn = (
        with_all(model, "tail", triples, None),
        with_drawn(model, "tail", triples, None, 20_000, 0),
    )
    share = (drawn.better / drawn.options - whole.better / whole.options).abs()
    assert share.max() < 5 * math.sqrt(0.25 / 20_000)


def test_what_is_done_is_told() -> None:
    done: list[int] = []
    model = _model("complex")
    with_all(model, "head", TRIPLES, None, done.append)
    with_drawn(model, "head", TRIPLES, None, 5, 0, done.append)
    assert sum(done) == 2 * len(TRIPLES)
    for found in (
        with_all(model, "tail", TRIPLES[:0], None),
        with_drawn(model, "tail", TRIPLES[:0], None, 5, 0),
    ):
        assert found.better.shape == found.options.shape == (0,)


def _peaks(rank: int, world_size: int) -> list[int]:
    """Bytes above what there was before, after a first time."""
    torch.manual_seed(0)
    model = _model("complex", 200_000, dim=16)
    triples = torch.stack(
        [torch.arange(1024), torch.arange(1024) % 3, torch.arange(1024) * 190], dim=1
    )
    # one query has half of all entities as known answers
    hub = torch.stack(
        [torch.full((100_000,), 5), torch.full((100_000,), 2), torch.arange(100_000) * 2], dim=1
    )
    known, peaks = KnownAnswers([triples, hub], 3, only=triples), []
    ranking._DRAWN, ranking._PAIRS = 1 << 18, 1 << 15
    for run in (
        lambda n: with_all(model, "tail", triples[:n], known),
        lambda n: with_drawn(model, "tail", triples[:n], known, 10_000, 0),
    ):
        run(32)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = _kilobytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        run(1024)
        peaks.append(1024 * (_kilobytes("VmHWM") - before))
    return peaks


def _kilobytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_is_bounded(run_ranks) -> None:
    """All scores at once would be 800 MB, all rows that are drawn 660 MB."""
    for ranks in (1, 2):
        for peaks in run_ranks(_peaks, ranks):
            assert max(peaks) < 40e6, peaks
