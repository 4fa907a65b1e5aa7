"""One lookup's way between ranks: ids to the owners of their rows, rows back, gradients by the exact transpose.

With one rank nothing is communicated. With several, a forward makes three collectives and a backward one:

1. counts, all to all: how many ids each rank asks of each other one; -1 says that the sender's ids are bad, so that all
   ranks raise the same error instead of waiting for each other;
2. ids, all to all, as row numbers of the owner's shard;
3. rows, all to all, then a permutation back into the order of the ids. Backward runs 3. the other way.

Every rank takes part in every lookup, with an empty batch if it has no ids, and in every backward.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardemb.plan import RowPlan
from shardemb.types import GradientReduction, IdTypeError

_ERRORS: dict[str, type[Exception]] = {e.__name__: e for e in (IndexError, IdTypeError, AttributeError)}


@dataclass(frozen=True)
class Route:
    """The way of one lookup."""

    #: (M,) rows of this rank's shard that all ranks together ask for, in order of the asking rank
    rows: Tensor
    #: (n,) where the answer to this rank's i-th id stands among the rows that come back; None with one rank
    permutation: Tensor | None
    #: ids that this rank sent to each rank
    sent: list[int]
    #: ids that each rank sent to this one
    received: list[int]


class Exchange:
    """Routes ids and rows of one table.

    Args:
        plan: where the rows lie; its world size is the group's.
        group: process group; None with one rank.
        reduction: "mean" divides the gradients that arrive by the number of ranks, as DistributedDataParallel does;
            "sum" leaves them.
    """

    def __init__(self, plan: RowPlan, group: Any, reduction: GradientReduction) -> None:
        self.plan = plan
        self.group = group
        self._scale = 1.0 / plan.world_size if reduction == "mean" else 1.0

    def check(self, ids: Any) -> Exception | None:
        """Return the error that these ids deserve; it names table, value, range and rank."""
        plan = self.plan
        where = f"table {plan.table!r}, rank {plan.rank} of {plan.world_size}"
        if not isinstance(ids, Tensor):
            return AttributeError(f"{where}: got ids of type {type(ids).__name__}, expected a torch.Tensor of integers")
        if ids.dtype not in (torch.int32, torch.int64):
            return IdTypeError(f"{where}: got ids of dtype {ids.dtype}, expected torch.int64 or torch.int32: convert them")
        if ids.numel():
            low, high = (int(x) for x in torch.aminmax(ids))
            if low < 0 or high >= plan.num_rows:
                bad = low if low < 0 else high
                return IndexError(
                    f"{where}: index out of range: got id {bad} among {ids.numel()} ids, expected 0 <= id < {plan.num_rows}"
                )
        return None

    def send_ids(self, ids: Any, device: torch.device) -> Route:
        """Check flat ids ``(n,)`` and bring them to the owners of their rows. A collective.

        Raises:
            IndexError: an id out of range, on all ranks.
            IdTypeError: ids that are not int32 or int64, on all ranks; it is a TypeError and a RuntimeError.
            AttributeError: ids that are not a tensor, on all ranks.
        """
        error = self.check(ids)
        if self.plan.world_size == 1:
            if error is not None:
                raise error
            rows = ids.to(device, torch.int64).contiguous()  # FBGEMM would read a strided tensor as if it were dense
            return Route(rows, None, [len(rows)], [len(rows)])
        world_size = self.plan.world_size
        counts = torch.full((world_size,), -1, device=device)
        if error is None:
            counts, local, permutation = self._bucketize(ids.to(device, torch.int64).contiguous())
        answer = torch.empty_like(counts)
        dist.all_to_all_single(answer, counts, group=self.group)
        received = answer.tolist()
        if error is not None or min(received) < 0:
            self._raise_everywhere(error)
        sent = counts.tolist()
        rows = local.new_empty(sum(received))
        dist.all_to_all_single(rows, local, received, sent, group=self.group)
        return Route(rows, permutation, sent, received)

    def check_everywhere(self, ids: Any, device: torch.device) -> None:
        """Raise on all ranks what the ids of any rank deserve: :meth:`send_ids` without sending. A collective."""
        error = self.check(ids)
        if self.plan.world_size > 1:
            bad = torch.tensor(int(error is not None), device=device)
            dist.all_reduce(bad, dist.ReduceOp.MAX, group=self.group)
            if bad:
                self._raise_everywhere(error)
        elif error is not None:
            raise error

    def _bucketize(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids per owner ``(W,)``, row numbers within the owner's shard ``(n,)``, and their permutation ``(n,)``."""
        import fbgemm_gpu  # noqa: F401  # registers the operator

        lengths, local, _, _, permutation = torch.ops.fbgemm.block_bucketize_sparse_features(
            torch.full((1,), len(ids), dtype=torch.int64, device=ids.device),
            ids,
            False,
            True,
            torch.full((1,), self.plan.block, dtype=torch.int64, device=ids.device),
            self.plan.world_size,
        )
        return lengths, local, permutation

    def _raise_everywhere(self, error: Exception | None) -> None:
        told: list[Any] = [None] * self.plan.world_size
        dist.all_gather_object(told, None if error is None else (type(error).__name__, str(error)), group=self.group)
        bad = [entry for entry in told if entry is not None]
        raise _ERRORS[bad[0][0]]("; ".join(text for _, text in bad))

    def return_rows(self, rows: Tensor, route: Route) -> Tensor:
        """Bring the owners' rows ``(M, D)`` back to who asked: ``(n, D)`` in the order of the ids. A collective."""
        if route.permutation is None:
            return rows
        return _ReturnRows.apply(rows, route, self.group, self._scale)


class _ReturnRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, route: Route, group: Any, scale: float) -> Tensor:
        ctx.route, ctx.group, ctx.scale = route, group, scale
        assert route.permutation is not None
        back = rows.new_empty(len(route.permutation), rows.shape[1])
        if rows.shape[1]:
            dist.all_to_all_single(back, rows.contiguous(), route.sent, route.received, group=group)
        return back.index_select(0, route.permutation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        route = ctx.route
        # the permutation has no duplicates, so this copy is exact and needs no sum
        by_owner = torch.empty_like(grad, memory_format=torch.contiguous_format).index_copy_(0, route.permutation, grad)
        rows = grad.new_empty(len(route.rows), grad.shape[1])
        if grad.shape[1]:
            dist.all_to_all_single(rows, by_owner, route.received, route.sent, group=ctx.group)
        return (rows if ctx.scale == 1 else rows.mul_(ctx.scale)), None, None, None
