"""The loss of a step, and the rows after it, against plain torch over whole tables.

At every world size.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import shardemb
from shardemb.kge import KnowledgeGraphModel, ModelConfig
from shardemb.kge.losses import LossConfig
from shardemb.kge.optimizers import OptimizerConfig
from shardemb.kge.sampling import Sampler, SamplingConfig
from shardemb.kge.scorers import SCORERS

ENTITIES, RELATIONS, DIM = 29, 3, 8
TRIPLES = torch.stack(
    [
        torch.arange(90) ** 2 % ENTITIES,
        torch.arange(90) % RELATIONS,
        torch.arange(90) * 7 % ENTITIES,
    ],
    1,
)
TRIPLES = TRIPLES.unique(dim=0)

Case = dict[str, dict[str, Any]]
CASES: dict[str, Case] = {
    "default": {},
    "symmetric": {"model": {"reciprocal": False}},
    "lp": {"model": {"reciprocal": False, "n3": 0.0, "lp": 0.1, "lp_power": 2.0}},
    "bernoulli": {
        "model": {"reciprocal": False},
        "sampling": {"corrupt": "bernoulli", "filtered": True},
    },
    "bernoulli_reciprocal": {"sampling": {"corrupt": "bernoulli"}},
    "logistic": {"loss": {"name": "logistic", "subsampling": True}, "sampling": {"in_batch": True}},
    "margin": {"loss": {"name": "margin"}, "sampling": {"chunk_size": 1, "corrupt": "head"}},
    "self_adversarial": {"loss": {"name": "self_adversarial", "subsampling": True}},
    "smoothing": {"loss": {"label_smoothing": 0.1}, "sampling": {"corrupt": "tail"}},
    "constrained": {"model": {"constrainer": "normalize", "scorer": "transe"}},
    **{
        f"1vsall_{name}": {"sampling": {"scheme": "1vsall"}, "loss": {"name": name}}
        for name in ("softmax", "logistic")
    },
    **{
        f"kvsall_{name}": {
            "sampling": {"scheme": "kvsall"},
            "loss": {"name": name, "label_smoothing": 0.2},
            "model": {"reciprocal": False},
        }
        for name in ("softmax", "logistic")
    },
    "1vsall_weighted_tails": {
        "sampling": {"scheme": "1vsall", "corrupt": "tail"},
        "loss": {"subsampling": True},
    },
    **{name: {"model": {"scorer": name, "reciprocal": False}} for name in SCORERS},
}
#: SGD keeps what a step did apart from the size of its gradient
OPTIMIZER = OptimizerConfig(name="sgd", entity_lr=1.0, relation_lr=0.5)


def parts(case: Case, rank: int, world_size: int) -> tuple[KnowledgeGraphModel, Sampler]:
    sampling = SamplingConfig(
        **{"batch_size": 33, "chunk_size": 10, "num_negatives": 6, **case.get("sampling", {})}
    )
    loss = LossConfig(**case.get("loss", {}))
    config = ModelConfig(**{"dim": DIM, "init_std": 0.5, "n3": 0.02, **case.get("model", {})})
    model = KnowledgeGraphModel(
        ENTITIES, RELATIONS, config, 7, loss, dense=sampling.scheme != "negatives"
    )
    return model, Sampler(
        TRIPLES, ENTITIES, RELATIONS, sampling, 3, rank, world_size, loss.subsampling
    )


def step(rank: int, world_size: int, case: Case) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Two steps: the sum of losses over ranks, and all rows."""
    model, sampler = parts(case, rank, world_size)
    coordinator, found = shardemb.Coordinator(model, OPTIMIZER.make(model)), []
    for number in range(2):
        if sampler.config.scheme == "negatives":
            total, plain = model.loss(sampler.batches(0, number))
        else:
            total, plain = model.loss_vs_all(sampler.queries(0, number))
        (total / 50).backward()
        coordinator.step()
        with torch.no_grad():
            model.eval()
            found.append((plain, model.entity(None).clone(), model.relation(None).clone()))
            model.train()
    return found


def oracle(case: Case) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The same with whole tables as plain tensors, one query at a time."""
    model, sampler = parts(case, 0, 1)
    entity, relation = (
        table._stored_rows()["weight"].clone().requires_grad_()
        for table in (model.entity, model.relation)
    )
    config, loss_config, scorer, found = model.config, model.loss_config, model.scorer, []
    optimizer = torch.optim.SGD(
        [{"params": [entity], "lr": 1.0}, {"params": [relation], "lr": 0.5}]
    )

    def query(head: bool, known: Tensor, relation_id: int) -> tuple[Tensor, Tensor]:
        r = relation[relation_id + RELATIONS * (head and config.reciprocal)]
        r = r if scorer.relation_normalizer is None else scorer.relation_normalizer(r[None])[0]
        by_head = head and not config.reciprocal
        return r, scorer.query(known, r, by_head)

    def penalty(*rows: Tensor) -> Tensor:
        moduli = [scorer.modulus(row) for row in rows]
        return sum(
            config.n3 * m.pow(3).sum() + config.lp * m.pow(config.lp_power).sum() for m in moduli
        )  # type: ignore[return-value]

    for number in range(2):
        losses, penalties = [], []
        if sampler.config.scheme == "negatives":
            for batch in sampler.batches(0, number):
                masked = set(batch.masked.tolist())
                for place in range(len(batch.replaced_heads) * batch.heads.numel()):
                    corruption, at = divmod(place, batch.heads.numel())
                    c, width = at // batch.heads.shape[1], batch.candidates.shape[2]
                    replaced = batch.replaced_heads[corruption]
                    head = replaced if isinstance(replaced, bool) else bool(replaced.flatten()[at])
                    h, t = entity[batch.heads.flatten()[at]], entity[batch.tails.flatten()[at]]
                    r, q = query(head, t if head else h, int(batch.relations.flatten()[at]))
                    others = [
                        e
                        for n, e in enumerate(batch.candidates[corruption, c].tolist())
                        if place * width + n not in masked
                    ]
                    scores = torch.stack([scorer.score(q, entity[e]) for e in others])
                    weight = 1 if batch.weights is None else batch.weights.flatten()[at]
                    losses.append(weight * loss_config(scorer.score(q, h if head else t), scores))
                    penalties.append(penalty(h, r, t))
        else:
            queries = sampler.queries(0, number)
            for place in range(len(queries.entities)):
                known = entity[queries.entities[place]]
                r, q = query(bool(queries.head[place]), known, int(queries.relations[place]))
                scores = scorer.score_all(q[None], entity)[0]
                labels = (
                    F.one_hot(queries.answers[queries.places == place], ENTITIES).sum(0).float()
                )
                smoothing = loss_config.label_smoothing
                if loss_config.name == "softmax":
                    loss = F.cross_entropy(scores, labels / labels.sum(), label_smoothing=smoothing)
                else:
                    targets = labels * (1 - smoothing) + smoothing / 2
                    loss = F.binary_cross_entropy_with_logits(scores, targets)
                losses.append(loss if queries.weights is None else loss * queries.weights[place])
                penalties.append(penalty(known, r))
        total = torch.stack(losses).sum()
        ((total + sum(penalties)) / 50).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            if config.constrainer:
                entity.copy_(F.normalize(entity))
            normalizer = scorer.relation_normalizer
            found.append(
                (
                    total.detach(),
                    entity.clone(),
                    (relation if normalizer is None else normalizer(relation)).clone(),
                )
            )
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_plain_torchs(run_ranks, world_size: int, case: str) -> None:
    expected = oracle(CASES[case])
    results = run_ranks(step, world_size, CASES[case])
    for number, (loss, entity, relation) in enumerate(expected):
        torch.testing.assert_close(
            sum(result[number][0] for result in results), loss, rtol=1e-4, atol=1e-4
        )
        for result in results:
            torch.testing.assert_close(result[number][1], entity, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(result[number][2], relation, rtol=1e-4, atol=1e-5)


def _few_rows(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """Two entities over more ranks: some own no row, some no query."""
    triples = torch.tensor([[0, 0, 1]])
    model = KnowledgeGraphModel(2, 1, ModelConfig(dim=4, init_std=1.0), 1, dense=True)
    sampler = Sampler(
        triples, 2, 1, SamplingConfig(scheme="1vsall", batch_size=1), 0, rank, world_size
    )
    total, plain = model.loss_vs_all(sampler.queries(0, 0))
    total.backward()
    return plain, sum(table._stored_rows()["weight"].sum() for table in (model.entity,))  # type: ignore[return-value]


def test_ranks_without_rows_or_queries(run_ranks) -> None:
    (one,) = run_ranks(_few_rows, 1)
    torch.testing.assert_close(sum(result[0] for result in run_ranks(_few_rows, 4)), one[0])


def _dropout() -> Tensor:
    model, sampler = parts({"model": {"entity_dropout": 0.5, "relation_dropout": 0.3}}, 0, 1)
    batches = sampler.batches(0, 0)
    torch.manual_seed(0)
    first, second = (model.loss(batches)[0].item() for _ in range(2))
    model.eval()
    calm = [model.loss(batches)[0].item() for _ in range(2)]
    assert first != second
    assert calm[0] == calm[1]


def test_dropout_is_of_training_alone() -> None:
    _dropout()


def test_sparse_rows_have_no_gradient_of_all() -> None:
    model, _ = parts({}, 0, 1)
    with pytest.raises(
        ValueError, match="table 'entity': got kernel='sparse', expected 'dense' for trainable rows"
    ):
        model.entity.local_rows(trainable=True)


@pytest.mark.parametrize("scorer", ["transe", "rotate"])
def test_small_distances_are_no_differences_in_bfloat16(scorer: str) -> None:
    model, _ = parts({"model": {"scorer": scorer, "init_std": 10.0, "reciprocal": False}}, 0, 1)
    query = model.queries("tail", torch.arange(9), torch.zeros(9, dtype=torch.int64)).detach()
    with torch.autocast("cpu", torch.bfloat16):
        near = model.scorer.score_all(query, query + 0.01)
    torch.testing.assert_close(
        near.diagonal(), torch.full((9,), -0.01 * DIM**0.5), rtol=0.5, atol=0.03
    )


@pytest.mark.parametrize("scheme", ["negatives", "1vsall"])
def test_scores_in_bfloat16_are_near(scheme: str) -> None:
    model, sampler = parts({"model": {"init_std": 1.0}, "sampling": {"scheme": scheme}}, 0, 1)

    def loss() -> tuple[Tensor, Tensor]:
        if scheme == "negatives":
            return model.loss(sampler.batches(0, 0))
        return model.loss_vs_all(sampler.queries(0, 0))

    exact = loss()[1]
    with torch.autocast("cpu", torch.bfloat16):
        total, near = loss()
    total.backward()
    assert near.dtype == torch.float32
    assert near != exact
    torch.testing.assert_close(near, exact, rtol=0.02, atol=0.0)
