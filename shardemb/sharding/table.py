"""The rows of one table on this rank: their memory, their gradient, and which of them changed.

This room knows nothing of other ranks: it looks up row numbers of its own shard.
"""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from shardemb import kernels
from shardemb.exceptions import UsageError
from shardemb.kernels import CHUNK_ROWS
from shardemb.optim import moves_touched_rows_only, why_refused
from shardemb.sharding.placement import RowPlan
from shardemb.utils import logs
from shardemb.utils.types import RowFunction

_log = logs.logger(__name__)


class _RowSet:
    """Row numbers of a shard, collected batch by batch.

    All rows once there are as many, when a pass over all is no dearer.
    """

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self.clear()

    def clear(self) -> None:
        self._batches: list[Tensor] | None = []
        self._count = 0

    def add(self, rows: Tensor) -> None:
        self._count += rows.shape[0]
        if self._count > self._num_rows:
            self._batches = None
        elif self._batches is not None:
            self._batches.append(rows)

    def add_all(self) -> None:
        self._batches, self._count = None, self._num_rows

    def __bool__(self) -> bool:
        return self._count > 0

    def merge(self, other: "_RowSet") -> None:
        if other._batches is None:
            self.add_all()
        else:
            for rows in other._batches:
                self.add(rows)

    def unique(self) -> Tensor | None:
        """Return the rows ``(n,)``, each once; None for all."""
        if self._batches is None:
            return None
        if not self._batches:
            return torch.empty(0, dtype=torch.int64)
        rows = self._batches[0] if len(self._batches) == 1 else torch.cat(self._batches)
        return kernels.merge(rows, self._num_rows).unique

    def take(self) -> Tensor | None:
        """Return the rows as :meth:`unique` does, and collect anew."""
        rows = self.unique()
        self.clear()
        return rows


class Table(nn.Module):
    """A shard: ``weight`` ``(R, D)``, a differentiable lookup, and the rows that changed.

    Args:
        plan: which rows these are.
        track: remember the rows that get a gradient, for :meth:`constrain_`.
    """

    weight: Tensor
    _full_passes = 0

    def __init__(self, plan: RowPlan, track: bool) -> None:
        super().__init__()
        self.plan = plan
        if plan.world_size > 1:
            #: which rows the weight is, see :meth:`_here`; for the state dict
            self.register_buffer("rows", torch.tensor(self._here()))
        self._track = track
        self._changed = _RowSet(plan.num_local)
        self.touch_all()

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.weight.device

    def _here(self) -> tuple[int, ...]:
        """Return the first slot, one past the last, how many the whole table has.

        And the order of the slots.
        """
        plan = self.plan
        order = (plan.spread.multiplier, plan.spread.offset) if plan.spread is not None else ()
        return (plan.first, plan.first + plan.num_local, plan.num_rows, *order)

    def lookup(self, rows: Tensor) -> Tensor:
        """Return ``(n, D)`` for row numbers ``(n,)`` of this shard.

        Which the caller has checked.
        """
        raise NotImplementedError

    def set_learning_rate(self, lr: float) -> None:
        """Change the learning rate of the updates that backward makes."""
        raise UsageError(
            f"table {self.plan.table!r} is not fused: set the learning rate in its optimizer"
        )

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return what backward's optimizer keeps for each row, ``(R, ...)`` by name.

        Loading takes the same.
        """
        return {}

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Put back what :meth:`optimizer_state` gave."""

    def reset_optimizer_state(self) -> None:
        """Forget what backward's optimizer keeps, in place."""

    @property
    def any_changed(self) -> bool:
        """Whether rows changed that no :meth:`constrain_` has seen."""
        return bool(self._changed)

    def touch_all(self) -> None:
        """Take every row as changed."""
        self._changed.add_all()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take this rank's rows as they were saved here, or its part of a whole table."""
        plan, key, here = self.plan, f"{prefix}rows", self._here()
        weight = state_dict.get(f"{prefix}weight")
        if key in state_dict:
            saved = tuple(state_dict[key].tolist())
            if saved != here:
                error_msgs.append(
                    f"table {plan.table!r}, rank {plan.rank} of {plan.world_size}: got rows"
                    f" {saved[0]} to {saved[1]} of {saved[2]}, expected {here[0]} to {here[1]} of"
                    f" {here[2]}: to load at another number of ranks use shardemb.checkpoint, or"
                    " save Embedding.full_state_dict()"
                )
                return
        elif isinstance(weight, Tensor) and weight.dim() == 2 and len(weight) == plan.num_rows:
            if plan.world_size > 1:
                state_dict[f"{prefix}weight"] = weight[plan.local_ids().to(weight.device)]
                state_dict[key] = self.rows
        elif isinstance(weight, Tensor) and plan.world_size > 1:
            error_msgs.append(
                f"table {plan.table!r}, rank {plan.rank} of {plan.world_size}: got a whole table of"
                f" shape {tuple(weight.shape)}, expected {(plan.num_rows, plan.dim)}"
            )
            return
        if plan.world_size == 1:
            state_dict.pop(key, None)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self.touch_all()

    def _watch(self, out: Tensor, rows: Tensor) -> None:
        """Remember ``rows`` when their gradient arrives: a lookup alone changes nothing."""
        if self._track and out.requires_grad:
            out.register_hook(lambda grad: self._got_gradient(rows))

    def _got_gradient(self, rows: Tensor) -> None:
        self._changed.add(rows)

    @torch.no_grad()
    def constrain_(self, function: RowFunction, changed_only: bool) -> int:
        """Apply ``function`` on ``(n, D)`` in place.

        To all rows or to those that changed since the last call.

        Returns:
            The number of rows that it was applied to.
        """
        weight = self.weight.detach()
        rows = self._take_changed() if changed_only else None
        if rows is not None:
            if rows.shape[0]:
                kernels.constrain(weight, rows.to(weight.device), function)
            return rows.shape[0]
        self._full_passes += 1
        if self._full_passes == 2:  # the first must take all rows
            _log.info("table %r: constrains all %d rows again", self.plan.table, len(weight))
        for chunk in weight.split(CHUNK_ROWS) if len(weight) else ():
            chunk.copy_(function(chunk))
        return len(weight)

    def _take_changed(self) -> Tensor | None:
        """Return the rows ``(n,)`` that changed since the last call, each once.

        None for all rows.
        """
        return self._changed.take()


class ParameterTable(Table):
    """A shard whose ``weight`` is an ordinary Parameter.

    With a dense or a sparse (COO) gradient.
    """

    def __init__(
        self,
        plan: RowPlan,
        *,
        sparse: bool,
        trainable: bool,
        dtype: torch.dtype,
        device: torch.device,
        track: bool,
    ) -> None:
        super().__init__(plan, track)
        plan.check_fits(dtype.itemsize, device)
        self.sparse = sparse
        weight = kernels.empty((plan.num_local, plan.dim), dtype, device)
        self.weight = nn.Parameter(weight, requires_grad=trainable)
        #: rows whose gradient came, and which no optimizer has updated yet as far as is known
        self._waiting = _RowSet(plan.num_local)
        _TABLES.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _TABLES.add(self)

    def _got_gradient(self, rows: Tensor) -> None:
        self._waiting.add(rows)

    def after_step(self, moved_others: bool, constrained: bool) -> None:
        """Take the rows that an optimizer has updated as changed.

        Those in the gradient, however they came there.

        Args:
            moved_others: the optimizer changed other rows too.
            constrained: it has constrained what it changed.
        """
        if not self._track:
            return
        grad = self.weight.grad
        self._waiting.clear()
        if moved_others or (
            grad is not None and not grad.is_sparse
        ):  # dense: from a loss on the weight itself
            self.touch_all()
        elif grad is not None and not constrained:
            self._changed.add(grad._indices()[0])

    def _take_changed(self) -> Tensor | None:
        # rows that still wait stay so: their update may come after this call, or came from no
        # torch.optim optimizer
        self._changed.merge(self._waiting)
        return super()._take_changed()

    def lookup(self, rows: Tensor) -> Tensor:
        """Return ``(n, D)``; the gradient adds up in ``weight.grad``."""
        out = (
            _SparseLookup.apply(self.weight, rows)
            if self.sparse
            else F.embedding(rows, self.weight)
        )
        self._watch(out, rows)
        return out


class _SparseLookup(torch.autograd.Function):
    """F.embedding with a sparse gradient, over rows of a table too large for any cache."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = weight.shape
        return kernels.take(weight, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return (
            torch.sparse_coo_tensor(
                rows[None], kernels.contiguous(grad), ctx.shape, check_invariants=False
            ),
            None,
        )


_TABLES: weakref.WeakSet[ParameterTable] = weakref.WeakSet()


def _tables_of(optimizer: torch.optim.Optimizer) -> Iterator[tuple[ParameterTable, dict[str, Any]]]:
    # none in most programs that import this package, whose optimizers pay nothing then
    by_id = {id(table._parameters["weight"]): table for table in _TABLES}
    for group in optimizer.param_groups if by_id else ():
        for parameter in group["params"]:
            table = by_id.get(id(parameter))
            if table is not None:
                yield table, group


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for table, group in _tables_of(optimizer):
        grad = table.weight.grad
        why = why_refused(optimizer, group, grad.is_sparse) if grad is not None else None
        if why is not None:
            raise UsageError(f"table {table.plan.table!r}: {why}")


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    constrained = kwargs.get("constrain") or {}
    for table, group in _tables_of(optimizer):
        table.after_step(not moves_touched_rows_only(optimizer, group), table.weight in constrained)


# torch's own messages name neither the table nor a way out
register_optimizer_step_pre_hook(_before_step)
# each optimizer's step tells the tables: post_parameter_update alone cannot know whether rows were
# updated before it
register_optimizer_step_post_hook(_after_step)
