"""Exact filtered ranking over all entities; each rank scores the rows that it owns, and only counts travel."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardemb import collectives
from shardemb.kge.model import KnowledgeGraphModel
from shardemb.kge.sampling import equal_range, with_reciprocals
from shardemb.plan import RowPlan

#: scores held at a time: 32 MB, which the C library keeps for the next batch; more would be mapped anew each time
MAX_SCORES = 1 << 23


class KnownTails:
    """For each (head, relation), the tails that are known to be true and are left out of a ranking.

    Args:
        triples: ``(T, 3)`` of all splits, without reciprocals.
        num_relations: relations of the graph.
    """

    def __init__(self, triples: Tensor, num_relations: int) -> None:
        queries = with_reciprocals(triples, num_relations)
        self._num_relations = 2 * num_relations
        self._keys, order = self._key(queries).sort()
        self._tails = queries[order, 2]

    def _key(self, queries: Tensor) -> Tensor:
        return queries[:, 0] * self._num_relations + queries[:, 1]

    def pairs(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return places ``(n,)`` in ``queries`` ``(B, 3)`` and the tails ``(n,)`` known for them."""
        places, found = equal_range(self._keys, self._key(queries))
        return places, self._tails[found]


@torch.no_grad()
def filtered_ranks(model: KnowledgeGraphModel, triples: Tensor, known: KnownTails) -> Tensor:
    """Rank the tail, then the head, of each triple among all entities but the known true ones. A collective.

    Args:
        model: in any mode.
        triples: ``(T, 3)``, the same on all ranks.
        known: what is left out.

    Returns:
        ``(2T,)`` float64: 1 + better + equal / 2, PyKEEN's "realistic" rank; tails of all triples, then heads.

    Raises:
        FloatingPointError: a score is NaN or infinite, on all ranks.
    """
    entity = model.entity
    plan, rows = entity.plan, entity.local_rows()
    ranks = []
    for batch in with_reciprocals(triples, model.num_relations).split(max(1, MAX_SCORES // max(1, plan.block))):
        query = model.queries(batch[:, 0], batch[:, 1])
        scores = model.scorer.score_all(query, rows)
        finite = not scores.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(scores))).all())
        here, places = _owned(batch[:, 2], plan)
        true = scores.new_full((len(batch),), -torch.inf)
        true[here] = scores[here, places]  # out of the same product, so that a tail equals itself to the last bit
        _all_reduce(model, true, collectives.MAX)
        scores[here, places] = -torch.inf
        of, tails = known.pairs(batch)
        here, places = _owned(tails, plan)
        scores[of[here], places] = -torch.inf
        better, equal = _count(scores > true.unsqueeze(1)), _count(scores == true.unsqueeze(1))
        counts = torch.stack([better, equal, torch.full_like(better, not finite)])
        _all_reduce(model, counts, collectives.SUM)
        if counts[2].any():  # NaN is neither better nor equal, so that it would take the first rank
            raise FloatingPointError(
                f"scores are NaN or infinite: the rows of {entity.name!r} or {model.relation.name!r} have grown too large; "
                f"lower the learning rates"
            )
        ranks.append(1 + counts[0].double() + counts[1].double() / 2)
    return torch.cat(ranks) if ranks else torch.empty(0, dtype=torch.float64)


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
