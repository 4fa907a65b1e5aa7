"""Every scorer against PyKEEN's interaction of the same name, on the same rows.

And its gradient.
"""

from collections.abc import Callable

import pytest
import torch
from pykeen.nn import modules
from torch import Tensor

from shardemb.kge.model import ModelConfig
from shardemb.kge.scorers import SCORERS


def identity(*rows: Tensor) -> tuple[Tensor, ...]:
    return rows


def as_complex(*rows: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) for x in rows)


def as_quaternions(*rows: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.unflatten(-1, (-1, 4)) for x in rows)


def in_halves(head: Tensor, relation: Tensor, tail: Tensor) -> tuple[tuple[Tensor, ...], ...]:
    # a row is (e_h, e_t); the forward product takes the head's first and the tail's second half
    return head.chunk(2, dim=-1), relation.chunk(2, dim=-1), tail.chunk(2, dim=-1)[::-1]


INTERACTIONS: dict[str, tuple[modules.Interaction, Callable[..., tuple]]] = {
    "complex": (modules.ComplExInteraction(), as_complex),
    "distmult": (modules.DistMultInteraction(), identity),
    "hole": (modules.HolEInteraction(), identity),
    "quate": (modules.QuatEInteraction(), as_quaternions),
    "rotate": (modules.RotatEInteraction(), as_complex),
    "simple": (modules.SimplEInteraction(), in_halves),
    "transe": (modules.TransEInteraction(p=2), identity),
    "transe_l1": (modules.TransEInteraction(p=1), identity),
}


def rows(name: str, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(dim)
    head, relation, tail = (torch.randn(7, dim, generator=generator) for _ in range(3))
    return head.requires_grad_(), relation.requires_grad_(), tail.requires_grad_()


def normalized(name: str, relation: Tensor) -> Tensor:
    normalizer = SCORERS[name].relation_normalizer
    return relation if normalizer is None else normalizer(relation)


@pytest.mark.parametrize("dim", [4, 12, 128])
@pytest.mark.parametrize("name", SCORERS)
def test_scores_are_pykeens(name: str, dim: int) -> None:
    inputs = head, relation, tail = rows(name, dim)
    scorer, (interaction, adapt) = SCORERS[name], INTERACTIONS[name]
    expected = interaction(*adapt(head, normalized(name, relation), tail))
    gradients = torch.autograd.grad(expected.sum(), inputs)
    unit = normalized(name, relation)
    for query, answer in (
        (scorer.query(head, unit, False), tail),
        (scorer.query(tail, unit, True), head),
    ):
        score = scorer.score(query, answer)
        torch.testing.assert_close(score, expected, rtol=1e-5, atol=1e-5)
        found = torch.autograd.grad(score.sum(), inputs, retain_graph=True)
        torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("side", ["head", "tail"])
@pytest.mark.parametrize("name", SCORERS)
def test_shared_candidates_are_scored_as_single_ones(name: str, side: str, exact: bool) -> None:
    head, relation, tail = rows(name, 12)
    relation = normalized(name, relation)
    scorer, (interaction, adapt) = SCORERS[name], INTERACTIONS[name]
    candidates = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(5)).requires_grad_()
    head, relation, tail = (
        x[:6].unflatten(0, (2, 3)) for x in (head, relation, tail)
    )  # two groups of three queries
    if side == "tail":
        query = scorer.query(head, relation, False)
        triples = head.unsqueeze(2), relation.unsqueeze(2), candidates.unsqueeze(1)
    else:
        query = scorer.query(tail, relation, True)
        triples = candidates.unsqueeze(1), relation.unsqueeze(2), tail.unsqueeze(2)
    expected = interaction(*adapt(*(x.expand(2, 3, 5, 12) for x in triples)))
    scores = scorer.score_all(query, candidates, exact=exact)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(scores.shape, generator=torch.Generator().manual_seed(6))
    found, wanted = (
        torch.autograd.grad((x * weights).sum(), candidates)[0] for x in (scores, expected)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["transe", "rotate", "transe_l1"])
def test_a_candidate_at_its_query_has_a_gradient(name: str) -> None:
    query = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scores = SCORERS[name].score_all(query, query.detach())
    assert torch.isfinite(torch.autograd.grad(scores.sum(), query)[0]).all()


def test_a_dimension_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="dim: got 6, expected a multiple of 4 for 'quate'"):
        ModelConfig(scorer="quate", dim=6)
