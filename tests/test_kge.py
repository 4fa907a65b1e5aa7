"""Scorers, losses, sampling, ranking: against PyKEEN's interactions and evaluator, and against brute force."""

import pytest
import torch
from torch.nn import functional as F

from shardemb.kge import KnowledgeGraphModel, ModelConfig
from shardemb.kge.evaluation import KnownTails, filtered_ranks, metrics
from shardemb.kge.losses import n3, sampled_softmax
from shardemb.kge.sampling import Sampler, SamplingConfig, with_reciprocals
from shardemb.kge.scorers import SCORERS


@pytest.mark.parametrize(("name", "theirs"), [("complex", "ComplExInteraction"), ("distmult", "DistMultInteraction")])
def test_scores_equal_pykeens(name: str, theirs: str) -> None:
    interaction = getattr(pytest.importorskip("pykeen.nn.modules"), theirs)()
    scorer = SCORERS[name]()
    h, r, t = torch.randn(3, 5, 8).double()

    def seen(x: torch.Tensor) -> torch.Tensor:
        return torch.complex(*x.chunk(2, -1)) if name == "complex" else x

    expected = interaction(seen(h), seen(r), seen(t))
    query = scorer.query(h, r)
    torch.testing.assert_close(scorer.score(query, t), expected)
    torch.testing.assert_close(scorer.score_all(query, t).diagonal(), expected)
    torch.testing.assert_close(scorer.modulus(h), seen(h).abs())


def test_complex_rows_need_two_parts() -> None:
    with pytest.raises(ValueError, match="got dim=7, expected an even one"):
        ModelConfig(dim=7)


def test_losses() -> None:
    positive, negative = torch.randn(4, requires_grad=True), torch.randn(4, 3)
    hits = (torch.tensor([1]), torch.tensor([2]))
    logits = torch.cat([positive[:, None], negative], 1)
    logits[1, 3] = -torch.inf
    expected = F.cross_entropy(logits, torch.zeros(4, dtype=torch.int64), reduction="sum")
    torch.testing.assert_close(sampled_softmax(positive, negative, hits), expected)
    torch.testing.assert_close(n3(torch.full((2, 3), 2.0), torch.ones(1)), torch.tensor(49.0))


def test_chunks_do_not_depend_on_the_ranks() -> None:
    queries = with_reciprocals(torch.randint(20, (157, 3)), 20)
    config = SamplingConfig(batch_size=64, chunk_size=20, num_negatives=7)

    def epoch(world_size: int) -> list:
        samplers = [Sampler(queries, 20, config, 3, rank, world_size) for rank in range(world_size)]
        order = samplers[0].order(1)
        steps = []
        for step in range(samplers[0].num_steps):
            chunks = [chunk for sampler in samplers for chunk in sampler.chunks(order, 1, step)]
            assert sum(len(chunk.heads) for chunk in chunks) == samplers[0].batch_size(step)
            steps.append(sorted((c.heads.tolist(), c.tails.tolist(), c.negatives.tolist()) for c in chunks))
        return steps

    for world_size in (2, 3, 7):
        assert epoch(world_size) == epoch(1)
    sampler = Sampler(queries, 20, config, 3)
    assert sorted(sampler.order(1).tolist()) == list(range(314))
    assert not torch.equal(sampler.order(1), sampler.order(2))
    chunk = sampler.chunks(sampler.order(0), 0, 0)[0]
    rows, columns = chunk.hits()
    expected = (chunk.tails[:, None] == chunk.negatives).nonzero()
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == sorted(map(tuple, expected.tolist()))


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
    return filtered_ranks(model, TRIPLES[:50], KnownTails(TRIPLES, 3)), *whole


@pytest.mark.parametrize("normalizer", [False, True])
def test_ranks_equal_brute_force(run_ranks, world_size: int, normalizer: bool) -> None:
    known = {tuple(triple) for triple in with_reciprocals(TRIPLES, 3).tolist()}
    for got, entity, relation in run_ranks(_ranks, world_size, normalizer):
        scorer, expected = SCORERS["complex"](), []
        for h, r, t in with_reciprocals(TRIPLES[:50], 3).tolist():
            scores = scorer.score_all(scorer.query(entity[[h]], relation[[r]]), entity)[0]
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
    halves = [torch.view_as_real(r(None).detach()).transpose(1, 2).flatten(1) for r in theirs.entity_representations]
    ours.entity.load_stored_rows({**ours.entity.stored_rows(), "weight": halves[0]})
    kinds = torch.view_as_real(theirs.relation_representations[0](None).detach())
    conjugate = kinds * torch.tensor([1, -1])  # the reciprocal of a ComplEx relation is its conjugate
    both = torch.cat([kinds, conjugate]).transpose(1, 2).flatten(1)
    ours.relation.load_stored_rows({"weight": both})
    results = RankBasedEvaluator(filtered=True).evaluate(
        theirs, TRIPLES[:60], batch_size=20, additional_filter_triples=[TRIPLES], use_tqdm=False
    )
    got = metrics(filtered_ranks(ours, TRIPLES[:60], KnownTails(TRIPLES, 3)))
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
        filtered_ranks(model, TRIPLES, KnownTails(TRIPLES, 3))


@pytest.mark.parametrize("what", ["entity", "relation", "overflow"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_nan_is_not_a_good_rank(run_ranks, ranks: int, what: str) -> None:
    run_ranks(_not_finite, ranks, what)
