"""Metrics against PyKEEN's evaluator with the same weights, on UMLS and Kinships."""

from functools import cache
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from shardemb.kge import KnowledgeGraphModel, ModelConfig, Triples
from shardemb.kge.evaluation import TIES, EvaluationConfig, evaluate, report

SCORERS = {
    "distmult": ("DistMult", {}),
    "complex": ("ComplEx", {}),
    "transe": ("TransE", {"scoring_fct_norm": 2}),
    "transe_l1": ("TransE", {"scoring_fct_norm": 1}),
    "rotate": ("RotatE", {}),
}
DIM = 12
TRIPLES = torch.stack(
    [torch.arange(300) % 41, torch.arange(300) % 3, torch.arange(300) * 7 % 41], dim=1
)


@cache
def _graph(name: str) -> Triples:
    return Triples.load(f"pykeen:{name}")


@cache
def _weights(scorer: str, entities: int, relations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Small round numbers, so that scores are exact and tie.

    The last third of the entities are copies of others.

    RotatE's relations are rotations, so its scores are not exact anyway: only the copies tie.
    """
    generator = torch.Generator().manual_seed(7)
    entity, relation = (torch.randn(n, DIM, generator=generator) for n in (entities, relations))
    if scorer == "rotate":
        relation = F.normalize(relation.unflatten(1, (-1, 2)), dim=-1).flatten(1)
    else:
        entity, relation = entity.mul(1.5).round(), relation.mul(1.5).round()
    entity[-(entities // 3) :] = entity[: entities // 3]
    return entity, relation


@cache
def _theirs(scorer: str, dataset: str, filtered: bool) -> dict[str, float]:
    from pykeen import models
    from pykeen.evaluation import RankBasedEvaluator
    from pykeen.triples import CoreTriplesFactory

    data = _graph(dataset)
    splits = [split.long() for split in (data.train, data.valid, data.test)]
    sizes = len(data.entities), len(data.relations)
    factory = CoreTriplesFactory(splits[0], num_entities=sizes[0], num_relations=sizes[1])
    name, options = SCORERS[scorer]
    is_complex = scorer in ("complex", "rotate")
    model = getattr(models, name)(
        triples_factory=factory, embedding_dim=DIM // (1 + is_complex), random_seed=0, **options
    )
    tables = model.entity_representations[0], model.relation_representations[0]
    for table, weight in zip(tables, _weights(scorer, *sizes), strict=True):
        table._embeddings.weight.data.copy_(weight)

    class Evaluator(RankBasedEvaluator):
        """PyKEEN's, until 1.11.1 without true scores for raw ranks.

        Which its pull request 1620 has mended.
        """

        def process_scores_(
            self, hrt_batch: Any, target: str, scores: Any, true_scores: Any = None, **options: Any
        ) -> None:
            answers = hrt_batch[:, [0 if target == "head" else 2]]
            true_scores = scores.gather(1, answers) if true_scores is None else true_scores
            super().process_scores_(hrt_batch, target, scores, true_scores, **options)

    return (
        Evaluator(filtered=filtered)
        .evaluate(
            model,
            splits[2],
            batch_size=64,
            additional_filter_triples=splits[:2] if filtered else None,
            use_tqdm=False,
        )
        .to_flat_dict()
    )


def _ours(rank: int, world_size: int, scorer: str, dataset: str, filtered: bool) -> dict[str, Any]:
    data = _graph(dataset)
    sizes = len(data.entities), len(data.relations)
    model = KnowledgeGraphModel(
        *sizes, ModelConfig(scorer=scorer, dim=DIM, reciprocal=False), seed=0
    )
    weights = _weights(scorer, *sizes)
    plan = model.entity.plan
    model.entity._load_stored_rows(
        {**model.entity._stored_rows(), "weight": weights[0][plan.local_ids()]}
    )
    model.relation._load_stored_rows({"weight": weights[1]})
    splits = [data.train, data.valid, data.test]
    return {
        ties: (
            report(
                model, data.test, splits, EvaluationConfig(filtered, ties, hits=[1, 3, 5, 10])
            ).sides
        )
        for ties in TIES
    }


@pytest.mark.parametrize("filtered", [True, False], ids=["filtered", "raw"])
@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("dataset", ["umls", "kinships"])
def test_equals_pykeens_evaluator(rank_pool, dataset: str, scorer: str, filtered: bool) -> None:
    pytest.importorskip("pykeen")
    theirs = _theirs(scorer, dataset, filtered)
    for world_size in (1, 2, 3):
        for found in rank_pool(_ours, world_size, scorer, dataset, filtered):
            assert (
                found["optimistic"]["both"]["mrr"] > found["pessimistic"]["both"]["mrr"] + 0.002
            )  # there are ties
            for ties, sides in found.items():
                for side, figures in sides.items():
                    expected = {
                        "mrr": theirs[f"{side}.{ties}.inverse_harmonic_mean_rank"],
                        "mr": theirs[f"{side}.{ties}.arithmetic_mean_rank"],
                        **{
                            f"hits_at_{k}": theirs[f"{side}.{ties}.hits_at_{k}"]
                            for k in (1, 3, 5, 10)
                        },
                    }
                    if ties == "realistic":  # PyKEEN adjusts no other
                        expected["amri"] = theirs[
                            f"{side}.{ties}.adjusted_arithmetic_mean_rank_index"
                        ]
                        assert set(figures) == set(expected)
                    # of a mean rank of 60 in PyKEEN's float32, 1e-6 are a part of the last digit
                    assert {name: figures[name] for name in expected} == pytest.approx(
                        expected, abs=1e-6, rel=1e-7
                    )


def _small(rank: int, world_size: int, candidates: int) -> tuple:
    options = {"entity_dropout": 0.5, "relation_dropout": 0.5}
    model = KnowledgeGraphModel(41, 3, ModelConfig(dim=4, init_std=1.0, **options), seed=5)
    config = EvaluationConfig(per_relation=True, hits=[2], candidates=candidates)
    found = [
        report(model.train(mode), TRIPLES[:100], [TRIPLES], config, seed=3)
        for mode in (True, False)
    ]
    assert not model.training
    assert found[0] == found[1]  # without dropout
    model.train()
    alone = {
        (kind, side): (
            report(model, TRIPLES[:100][TRIPLES[:100, 1] == kind], [TRIPLES], config).sides[side]
        )
        for kind in range(3)
        for side in ("tail", "head")
    }
    assert model.training
    assert (
        evaluate(model, TRIPLES[:100], [TRIPLES], config, 3)
        == found[0].metrics
        == found[0].sides["both"]
    )
    return found[0], alone


def test_relations_one_by_one(rank_pool) -> None:
    (found, alone), *_ = rank_pool(_small, 2, 0)
    assert [(row["relation"], row["side"]) for row in found.table] == list(alone)
    assert [row["count"] for row in found.table] == [34, 34, 33, 33, 33, 33]
    for row in found.table:
        assert {name: row[name] for name in ("mrr", "mr", "hits_at_2", "amri")} == alone[
            row["relation"], row["side"]
        ]
    whole = sum(row["mrr"] * row["count"] for row in found.table) / 200
    assert found.metrics["mrr"] == pytest.approx(whole, abs=1e-12)


def test_drawn_candidates_are_the_same_on_any_number_of_ranks(rank_pool, world_size: int) -> None:
    ((expected, _),) = rank_pool(_small, 1, 9)
    for found, _ in rank_pool(_small, world_size, 9):
        assert found == expected
    assert expected.metrics["mr"] < 10


def test_what_is_no_setting_is_refused() -> None:
    for options in (
        {"ties": "random"},
        {"candidates": -1},
        {"hits": [0]},
        {"hits": [1, 1]},
        {"hits": [True]},
        {"hits": ["1"]},
    ):
        with pytest.raises(
            ValueError, match=rf"evaluation.{next(iter(options))}: got .*, expected"
        ):
            EvaluationConfig(**options)
    model = KnowledgeGraphModel(41, 3, ModelConfig(dim=4), seed=5)
    with pytest.raises(ValueError, match="got 41 of 41 entities, expected fewer"):
        evaluate(model, TRIPLES, [TRIPLES], EvaluationConfig(candidates=41))
    with pytest.raises(ValueError, match="no triples to rank"):
        evaluate(model, TRIPLES[:0], [TRIPLES], EvaluationConfig())


def test_a_single_entity_is_ranked_by_chance() -> None:
    model = KnowledgeGraphModel(1, 1, ModelConfig(dim=4), seed=5)
    got = evaluate(model, torch.zeros(2, 3, dtype=torch.int64), [], EvaluationConfig())
    assert got == {
        "mrr": 1.0,
        "mr": 1.0,
        "hits_at_1": 1.0,
        "hits_at_3": 1.0,
        "hits_at_10": 1.0,
        "amri": 0.0,
    }


def _not_finite(rank: int, world_size: int, what: str, candidates: int) -> None:
    model = KnowledgeGraphModel(
        41, 3, ModelConfig(dim=4, init_std=1e30 if what == "overflow" else 0.1), seed=5
    )
    with torch.no_grad():
        if what == "entity" and rank == world_size - 1:
            model.entity._embeddings.weight[0, 0] = torch.nan
        if what == "relation":
            model.relation._embeddings.weight[0, 0] = torch.nan
    with pytest.raises(
        FloatingPointError, match="scores are NaN or infinite: the rows of 'entity' or 'relation'"
    ):
        evaluate(model, TRIPLES, [TRIPLES], EvaluationConfig(candidates=candidates))


@pytest.mark.parametrize("what", ["entity", "relation", "overflow"])
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("candidates", [0, 20])
def test_nan_is_not_a_good_rank(rank_pool, ranks: int, what: str, candidates: int) -> None:
    rank_pool(_not_finite, ranks, what, candidates)
