"""Losses as pure functions; they add up over queries, so that any split of a batch over ranks gives the same sum."""

import torch
from torch import Tensor


def sampled_softmax(positive: Tensor, negative: Tensor, hits: Tensor) -> Tensor:
    """Sum of the cross-entropies of the true tail among itself and the negatives.

    Args:
        positive: ``(B,)`` scores of the true tails.
        negative: ``(B, N)`` scores of the negatives.
        hits: ``(B, N)`` true where a negative is the true tail; these do not count.
    """
    logits = torch.cat([positive.unsqueeze(1), negative.masked_fill(hits, -torch.inf)], dim=1)
    return (logits.logsumexp(dim=1) - positive).sum()


def n3(*moduli: Tensor) -> Tensor:
    """Sum of cubed absolute values: the weighted nuclear 3-norm of Lacroix et al. 2018."""
    return sum((modulus.pow(3).sum() for modulus in moduli), start=torch.zeros(()))
