"""Losses of true answers against negatives, as pure functions.

Each takes the scores of true answers ``(...)`` and of negatives ``(..., N)``, ignores negatives
that are -inf, and returns a loss for each query ``(...)``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shardemb.exceptions import InputError
from shardemb.utils.validation import at_least, one_of, within


class _Softmax(torch.autograd.Function):
    """Computes loss and gradient in one pass over the scores; autograd needs eight."""

    @staticmethod
    def forward(ctx: Any, positive: Tensor, negative: Tensor, smoothing: float) -> Tensor:
        top, share = negative.amax(-1), negative.softmax(-1)  # one pass; the rest is (...)
        wrong = top - share.amax(-1).log()
        empty = top == -torch.inf
        if empty.any():  # no negative counts
            share[empty], wrong = 0, wrong.masked_fill(empty, -torch.inf)
        total = torch.logaddexp(wrong, positive)
        loss = total - positive
        first, scale = torch.expm1(-loss), (wrong - total).exp()
        if smoothing:  # the true answer's target is 1 - smoothing; all share smoothing
            counts = negative > -torch.inf
            part = smoothing / (counts.sum(-1) + 1)
            others = negative.masked_fill(~counts, 0).sum(-1) + positive
            loss += smoothing * positive - part * others
            first += smoothing - part
            share = share * scale.unsqueeze(-1) - part.unsqueeze(-1) * counts
            scale = torch.ones_like(scale)
        ctx.save_for_backward(first, share, scale)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        first, share, scale = ctx.saved_tensors
        return first * grad, share * (scale * grad).unsqueeze(-1), None


def softmax(positive: Tensor, negative: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of the true answer, as torch.nn.functional.cross_entropy."""
    wide = torch.promote_types(positive.dtype, torch.float32)
    return _Softmax.apply(positive.to(wide), negative.to(wide), label_smoothing)


def logistic(positive: Tensor, negative: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return binary cross-entropy: the true answer's plus the mean of the negatives'.

    With label smoothing ``s`` the targets are ``1 - s / 2`` and ``s / 2``.
    """
    counts = negative > -torch.inf
    wrong = F.softplus(negative)
    if label_smoothing:
        wrong = wrong - label_smoothing / 2 * negative.masked_fill(~counts, 0)
    right = F.softplus(-positive) + label_smoothing / 2 * positive
    return right + wrong.sum(-1) / counts.sum(-1).clamp_min(1)


def margin_ranking(positive: Tensor, negative: Tensor, margin: float = 1.0) -> Tensor:
    """Return the mean of ``max(0, margin + negative - positive)`` (Bordes et al. 2013)."""
    counts = negative > -torch.inf
    return (margin + negative - positive.unsqueeze(-1)).relu().sum(-1) / counts.sum(-1).clamp_min(1)


def self_adversarial(
    positive: Tensor, negative: Tensor, margin: float = 9.0, temperature: float = 1.0
) -> Tensor:
    """Return the self-adversarial loss (Sun et al. 2019).

    A softmax without gradient gives hard negatives more weight.
    """
    weights = (temperature * negative.detach()).softmax(-1)
    weights = weights.nan_to_num(0)  # NaN where no negative counts
    return (F.softplus(-margin - positive) + (weights * F.softplus(margin + negative)).sum(-1)) / 2


@dataclass(frozen=True)
class LossConfig:
    """The loss and its settings."""

    #: "softmax", "logistic", "margin" or "self_adversarial"
    name: str = "softmax"
    #: of "margin" and "self_adversarial"
    margin: float = 1.0
    #: of "self_adversarial": larger weighs hard negatives more
    temperature: float = 1.0
    #: part of the target that all candidates share ("softmax"), or taken from both classes
    #: ("logistic")
    label_smoothing: float = 0.0
    #: weigh a triple by 1 / sqrt(how often its (head, relation) and (relation, tail) occur), as
    #: word2vec (Sun et al. 2019)
    subsampling: bool = False

    def __post_init__(self) -> None:
        one_of("loss", self, {"name": sorted(LOSSES)})
        at_least("loss", self, margin=0)
        within("loss", self, label_smoothing=(0, 0.99), temperature=(0.001, 1000))
        if self.label_smoothing and "label_smoothing" not in LOSSES[self.name][1]:
            raise InputError(
                f"loss.label_smoothing: got {self.label_smoothing} with loss {self.name!r}, which"
                " has no labels"
            )

    def __call__(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Return losses ``(...)`` from scores ``(...)`` and ``(..., N)``."""
        function, options = LOSSES[self.name]
        return function(positive, negative, **{option: getattr(self, option) for option in options})


#: by name: the function and the settings that it takes
LOSSES: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "softmax": (softmax, ("label_smoothing",)),
    "logistic": (logistic, ("label_smoothing",)),
    "margin": (margin_ranking, ("margin",)),
    "self_adversarial": (self_adversarial, ("margin", "temperature")),
}


def lp(*moduli: Tensor, power: float) -> Tensor:
    """Sum absolute values to a power; 3 is N3 (Lacroix et al. 2018)."""
    return sum((modulus.pow(power).sum() for modulus in moduli), start=torch.zeros(()))
