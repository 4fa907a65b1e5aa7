"""Ranking: against PyKEEN's evaluator, and against brute force."""

import pytest
import torch
from torch.nn import functional as F

from shardemb.kge import KnowledgeGraphModel, ModelConfig
from shardemb.kge.evaluation import EvaluationConfig, evaluate, ranks
from shardemb.kge.sampling import Known
from shardemb.kge.scorers import SCORERS

TRIPLES = torch.stack([torch.arange(300) % 41, torch.arange(300) % 3, torch.arange(300) * 7 % 41], dim=1)


def _ranks(rank: int, world_size: int, normalizer: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    model = KnowledgeGraphModel(41, 3, ModelConfig(dim=4, init_std=1.0), seed=5)
    if normalizer:
        model.entity.normalizer = F.normalize
    with torch.no_grad():
        rows = model.entity.stored_rows()
        tied = rows["weight"].round()  # so that there are ties
        model.entity.load_stored_rows({**rows, "weight": tied})
        whole = model.entity(None).clone(), model.relation(None).clone()
    known = Known([TRIPLES], 3, only=TRIPLES[:50])
    return torch.cat([ranks(model, side, TRIPLES[:50], known) for side in ("tail", "head")]), *whole


@pytest.mark.parametrize("normalizer", [False, True])
def test_ranks_equal_brute_force(run_ranks, world_size: int, normalizer: bool) -> None:
    queries = [*TRIPLES.tolist(), *([t, r + 3, h] for h, r, t in TRIPLES.tolist())]
    known = {tuple(query) for query in queries}
    for got, entity, relation in run_ranks(_ranks, world_size, normalizer):
        scorer, expected = SCORERS["complex"](), []
        for h, r, t in [*queries[:50], *queries[300:350]]:
            scores = scorer.score_all(scorer.tail_query(entity[[h]], relation[[r]]), entity)[0]
            others = [scores[e].item() for e in range(41) if e != t and (h, r, e) not in known]
            better, equal = sum(s > scores[t] for s in others), sum(s == scores[t] for s in others)
            expected.append(1 + better + equal / 2)
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.double))


def test_metrics_equal_pykeens_evaluator() -> None:
    """Same weights, PyKEEN's ComplEx and its filtered, realistic evaluation of both sides."""
    pytest.importorskip("pykeen")
    from pykeen.evaluation import RankBasedEvaluator
    from pykeen.models import ComplEx
    from pykeen.triples import CoreTriplesFactory

    factory = CoreTriplesFactory.create(TRIPLES)
    theirs = ComplEx(triples_factory=factory, embedding_dim=4, random_seed=0)
    ours = KnowledgeGraphModel(41, 3, ModelConfig(dim=8), seed=0)
    entities = torch.view_as_real(theirs.entity_representations[0](None).detach()).flatten(1)
    ours.entity.load_stored_rows({**ours.entity.stored_rows(), "weight": entities})
    kinds = torch.view_as_real(theirs.relation_representations[0](None).detach())
    conjugate = kinds * torch.tensor([1, -1])  # the reciprocal of a ComplEx relation is its conjugate
    both = torch.cat([kinds, conjugate]).flatten(1)
    ours.relation.load_stored_rows({"weight": both})
    results = RankBasedEvaluator(filtered=True).evaluate(
        theirs, TRIPLES[:60], batch_size=20, additional_filter_triples=[TRIPLES], use_tqdm=False
    )
    got = evaluate(ours, TRIPLES[:60], [TRIPLES], EvaluationConfig())
    assert got["mrr"] == pytest.approx(results.get_metric("both.realistic.inverse_harmonic_mean_rank"), abs=1e-6)
    for k in (1, 3, 10):
        assert got[f"hits_at_{k}"] == pytest.approx(results.get_metric(f"both.realistic.hits_at_{k}"), abs=1e-6)


def _not_finite(rank: int, world_size: int, what: str) -> None:
    model = KnowledgeGraphModel(41, 3, ModelConfig(dim=4, init_std=1e30 if what == "overflow" else 0.1), seed=5)
    with torch.no_grad():
        if what == "entity" and rank == world_size - 1:
            model.entity._embeddings.weight[0, 0] = torch.nan
        if what == "relation":
            model.relation._embeddings.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="scores are NaN or infinite: the rows of 'entity' or 'relation'"):
        evaluate(model, TRIPLES, [TRIPLES], EvaluationConfig())


@pytest.mark.parametrize("what", ["entity", "relation", "overflow"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_nan_is_not_a_good_rank(run_ranks, ranks: int, what: str) -> None:
    run_ranks(_not_finite, ranks, what)
