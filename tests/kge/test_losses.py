"""Losses against torch's and PyKEEN's, with negatives that do not count."""

import pytest
import torch
from pykeen import losses as pykeen_losses
from torch import Tensor
from torch.nn import functional as F

from shardemb.kge.losses import LOSSES, LossConfig, lp


def scores(masked: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    positive = 3 * torch.randn(2, 5, generator=generator)
    negative = 3 * torch.randn(2, 5, 7, generator=generator)
    if masked:
        negative[0, 1, 3] = negative[1, 2, 0] = negative[1, 2, 6] = -torch.inf
    return positive.requires_grad_(), negative.requires_grad_()


def check(config: LossConfig, expected: Tensor, positive: Tensor, negative: Tensor) -> None:
    loss = config(positive, negative)
    assert loss.shape == positive.shape
    torch.testing.assert_close(loss, expected)
    weights = torch.randn(
        loss.shape, generator=torch.Generator().manual_seed(1)
    )  # queries may weigh differently
    found, wanted = (
        torch.autograd.grad((x * weights).sum(), [positive, negative]) for x in (loss, expected)
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_softmax_is_torchs_cross_entropy(smoothing: float) -> None:
    positive, negative = scores()
    logits = torch.cat([positive.unsqueeze(-1), negative], dim=-1).flatten(0, 1)
    target = torch.zeros(10, dtype=torch.int64)
    expected = F.cross_entropy(logits, target, label_smoothing=smoothing, reduction="none").view(
        2, 5
    )
    check(LossConfig("softmax", label_smoothing=smoothing), expected, positive, negative)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_logistic_is_torchs_binary_cross_entropy(smoothing: float) -> None:
    positive, negative = scores()
    right, wrong = (
        torch.full_like(positive, 1 - smoothing / 2),
        torch.full_like(negative, smoothing / 2),
    )
    expected = F.binary_cross_entropy_with_logits(positive, right, reduction="none")
    expected = expected + F.binary_cross_entropy_with_logits(
        negative, wrong, reduction="none"
    ).mean(-1)
    check(LossConfig("logistic", label_smoothing=smoothing), expected, positive, negative)


def test_margin_and_self_adversarial_are_pykeens() -> None:
    positive, negative = (x.flatten(0, 1) for x in scores())
    for config, theirs in (
        (LossConfig("margin", margin=1.5), pykeen_losses.MarginRankingLoss(margin=1.5)),
        (
            LossConfig("self_adversarial", margin=2.0, temperature=0.7),
            pykeen_losses.NSSALoss(2.0, 0.7),
        ),
    ):
        expected = theirs.process_slcwa_scores(positive.unsqueeze(1), negative)
        torch.testing.assert_close(config(positive, negative).mean(), expected)
        found = torch.autograd.grad(config(positive, negative).mean(), [positive, negative])
        wanted = torch.autograd.grad(expected, [positive, negative])
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_minus_infinite_does_not_count(name: str) -> None:
    positive, negative = scores(masked=True)
    config = LossConfig(name, label_smoothing=0.1 if "label_smoothing" in LOSSES[name][1] else 0.0)
    loss = config(positive, negative)
    found = torch.autograd.grad(loss.sum(), [positive, negative])
    assert not found[1][negative == -torch.inf].any()
    assert torch.isfinite(found[1]).all()
    left = negative[1, 2, 1:6]  # as if the two had never been drawn
    torch.testing.assert_close(loss[1, 2], config(positive[1, 2], left))
    wanted = torch.autograd.grad(config(positive[1, 2], left), [positive, negative])
    torch.testing.assert_close(found[0][1, 2], wanted[0][1, 2])
    torch.testing.assert_close(found[1][1, 2], wanted[1][1, 2])
    none = torch.full((1, 3), -torch.inf)
    assert torch.isfinite(config(torch.zeros(1), none)).all()


def test_powers_of_absolute_values() -> None:
    x = torch.tensor([[1.0, 2.0], [0.5, 3.0]])
    assert lp(x, x[:1], power=3).item() == pytest.approx(1 + 8 + 0.125 + 27 + 1 + 8)
    assert lp(x, power=2).item() == pytest.approx(1 + 4 + 0.25 + 9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "hinge"}, "loss.name: got 'hinge', expected one of"),
        ({"margin": -1.0}, "loss.margin: got -1.0, expected"),
        ({"temperature": float("nan")}, "loss.temperature: got nan, expected 0.001 to 1000"),
        ({"label_smoothing": 1.0}, "loss.label_smoothing: got 1.0, expected 0 to 0.99"),
        ({"name": "margin", "label_smoothing": 0.1}, "with loss 'margin', which has no labels"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossConfig(**settings)
