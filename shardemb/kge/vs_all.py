"""Losses over all entities: every rank scores all queries against its own rows.

Forward gathers the queries ``(Q, D)`` and reduces the largest score, the sum of exponentials and
the true answers' score of each. Backward sums the queries' gradients. No row is sent.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shardemb.comm import collectives
from shardemb.sharding.placement import RowPlan


def share_of(total: int, plan: RowPlan) -> slice:
    """Return this rank's share of ``total`` queries, in the order of ranks."""
    block = -(-total // plan.world_size)
    return slice(min(plan.rank * block, total), min((plan.rank + 1) * block, total))


def gather_queries(query: Tensor, total: int, plan: RowPlan) -> Tensor:
    """Gather the queries ``(Q, D)`` of all ranks. A collective, as is its backward."""
    return query if plan.world_size == 1 else _Gather.apply(query, total, plan)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, total: int, plan: RowPlan) -> Tensor:
        ctx.share = share_of(total, plan)
        return collectives.all_gather_rows(query, operation="queries of all ranks")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.contiguous().clone()
        collectives.all_reduce(grad, operation="gradients of the queries")
        return grad[ctx.share], None, None


def vs_all(
    scores: Tensor,
    labels: tuple[Tensor, Tensor],
    counts: Tensor,
    num_entities: int,
    name: str,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return losses ``(Q,)`` of scores whose columns are sharded over ranks. A collective.

    Args:
        scores: ``(Q, R)`` against this rank's rows; overwritten.
        labels: queries and local rows ``(n,)`` of the true answers.
        counts: ``(Q,)`` true answers on all ranks.
        num_entities: columns on all ranks.
        name: "softmax": cross-entropy, the true answers share the target; "logistic": mean binary
            cross-entropy of all entities.
        label_smoothing: as in :mod:`shardemb.kge.losses`.
    """
    wide = torch.promote_types(scores.dtype, torch.float32)
    return _VsAll.apply(scores.to(wide), labels, counts, num_entities, name, label_smoothing)


def _reduce(tensor: Tensor, op: Any = collectives.SUM) -> Tensor:
    collectives.all_reduce(tensor, op, operation="scores against all entities")
    return tensor


class _VsAll(torch.autograd.Function):
    """Overwrites the scores with their gradient, to hold only one ``(Q, R)``."""

    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        labels: tuple[Tensor, Tensor],
        counts: Tensor,
        num_entities: int,
        name: str,
        smoothing: float,
    ) -> Tensor:
        scores = scores.detach()
        none = scores.new_zeros(len(scores))
        true = none.index_put((labels[0],), scores[labels], accumulate=True)
        smoothed = [scores.sum(1)] if smoothing else []
        if name == "softmax":
            share = 1.0 / counts
            top = scores.amax(1) if scores.shape[1] else none.fill_(-torch.inf)
            top = _reduce(top, collectives.MAX)
            scores.sub_(top.unsqueeze(1)).exp_()
            total, true, *all_scores = _reduce(torch.stack([scores.sum(1), true, *smoothed]))
            loss = total.log() + top - (1 - smoothing) * true * share
            scores.div_(total.unsqueeze(1))
            if smoothing:
                loss -= smoothing / num_entities * all_scores[0]
                scores.sub_(smoothing / num_entities)
            scores.index_put_(labels, -(1 - smoothing) * share[labels[0]], accumulate=True)
        else:
            softplus = F.softplus(scores).sum(1)
            total, true, *all_scores = _reduce(torch.stack([softplus, true, *smoothed]))
            loss = total - (1 - smoothing) * true
            scores.sigmoid_()
            if smoothing:
                loss -= smoothing / 2 * all_scores[0]
                scores.sub_(smoothing / 2)
            scores.index_put_(labels, scores.new_full((1,), smoothing - 1), accumulate=True)
            loss /= num_entities
            scores.div_(num_entities)
        ctx.save_for_backward(scores)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (scores,) = ctx.saved_tensors
        return scores * grad.unsqueeze(1), None, None, None, None, None
