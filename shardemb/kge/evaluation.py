"""Exact filtered ranking over all entities; each rank scores the rows that it owns, and only counts travel."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardemb import collectives
from shardemb.kge.model import KnowledgeGraphModel
from shardemb.kge.sampling import SIDES, Known, Side
from shardemb.plan import RowPlan

#: scores held at a time: 32 MB, which the C library keeps for the next batch; more would be mapped anew each time
MAX_SCORES = 1 << 23


@dataclass(frozen=True)
class EvaluationConfig:
    """How triples are ranked."""

    #: leave out other true answers (of any split)
    filtered: bool = True


def evaluate(
    model: KnowledgeGraphModel, triples: Tensor, splits: Sequence[Tensor], config: EvaluationConfig, seed: int = 0
) -> dict[str, float]:
    """Rank heads and tails of triples, and return the metrics. A collective."""
    known = Known(splits, model.num_relations, only=triples)
    return metrics(torch.cat([ranks(model, side, triples, known) for side in SIDES]))


@torch.no_grad()
def ranks(model: KnowledgeGraphModel, side: Side, triples: Tensor, known: Known) -> Tensor:
    """Rank one side of each triple among all entities but the known true ones. A collective.

    Args:
        model: in any mode.
        side: that is asked for.
        triples: ``(T, 3)``, the same on all ranks.
        known: what is left out.

    Returns:
        ``(T,)`` float64: 1 + better + equal / 2, PyKEEN's "realistic" rank.

    Raises:
        FloatingPointError: a score is NaN or infinite, on all ranks.
    """
    entity = model.entity
    plan, rows = entity.plan, entity.local_rows()
    found = []
    asked, answer = (2, 0) if side == "head" else (0, 2)
    for batch in triples.long().split(max(1, MAX_SCORES // max(1, plan.block))):
        query = model.queries(side, batch[:, asked], batch[:, 1])
        scores = model.scorer.score_all(query, rows, exact=True)
        finite = not scores.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(scores))).all())
        here, places = _owned(batch[:, answer], plan)
        true = scores.new_full((len(batch),), -torch.inf)
        true[here] = scores[here, places]  # out of the same product, so that an answer equals itself to the last bit
        _all_reduce(model, true, collectives.MAX)
        scores[here, places] = -torch.inf
        of, answers = known.answers(side, batch[:, asked], batch[:, 1])
        here, places = _owned(answers, plan)
        scores[of[here], places] = -torch.inf
        better, equal = _count(scores > true.unsqueeze(1)), _count(scores == true.unsqueeze(1))
        counts = torch.stack([better, equal, torch.full_like(better, not finite)])
        _all_reduce(model, counts, collectives.SUM)
        if counts[2].any():  # NaN is neither better nor equal, so that it would take the first rank
            raise FloatingPointError(
                f"scores are NaN or infinite: the rows of {entity.name!r} or {model.relation.name!r} have grown too large; "
                f"lower the learning rates"
            )
        found.append(1 + counts[0].double() + counts[1].double() / 2)
    return torch.cat(found) if found else torch.empty(0, dtype=torch.float64)


def _owned(ids: Tensor, plan: RowPlan) -> tuple[Tensor, Tensor]:
    """Return the places ``(m,)`` of the ids ``(n,)`` that this rank owns, and their row numbers here."""
    rows = plan.slots(ids) - plan.first
    here = ((rows >= 0) & (rows < plan.num_local)).nonzero().squeeze(1)
    return here, rows[here]


def _count(mask: Tensor) -> Tensor:
    """Count true values in each row; numpy's counting costs a fifth of a sum over bools on the CPU."""
    return mask.sum(1) if mask.is_cuda else torch.from_numpy(np.count_nonzero(mask.numpy(), axis=1))


def _all_reduce(model: KnowledgeGraphModel, tensor: Tensor, op: Any) -> None:
    if model.entity.plan.world_size > 1:
        collectives.all_reduce(tensor, op, operation="ranking")


def metrics(ranks: Tensor) -> dict[str, float]:
    """Return mean reciprocal rank and Hits@1, 3, 10 of ranks ``(n,)``."""
    summary = {"mrr": ranks.reciprocal().mean().item()}
    for k in (1, 3, 10):
        summary[f"hits_at_{k}"] = (ranks <= k).double().mean().item()
    return summary
