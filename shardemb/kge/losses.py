"""Losses as pure functions; they add up over queries, so that any split of a batch over ranks gives the same sum."""

import torch
from torch import Tensor


def sampled_softmax(positive: Tensor, negative: Tensor, hits: tuple[Tensor, Tensor]) -> Tensor:
    """Sum of the cross-entropies of the true tail among itself and the negatives.

    Args:
        positive: ``(B,)`` scores of the true tails.
        negative: ``(B, N)`` scores of the negatives.
        hits: rows and columns ``(n,)`` where a negative is the true tail; these do not count.
    """
    logits = torch.cat([positive.unsqueeze(1), negative], dim=1)
    logits[hits[0], hits[1] + 1] = -torch.inf
    return (logits.logsumexp(dim=1) - positive).sum()


def n3(*moduli: Tensor) -> Tensor:
    """Sum of cubed absolute values: the weighted nuclear 3-norm of Lacroix et al. 2018."""
    return sum((modulus.pow(3).sum() for modulus in moduli), start=torch.zeros(()))
