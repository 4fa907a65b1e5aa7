"""The rows of one table on this rank: memory, gradient, and which rows changed.

Lookups take row numbers of this shard; other modules handle other ranks.
"""

import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
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


class RowSet:
    """Row numbers of a shard, added in batches.

    More numbers than rows count as all rows, because a pass over all is then faster.
    """

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self.clear()

    def clear(self) -> None:
        """Remove all rows."""
        self._batches: list[Tensor] | None = []
        self._count = 0

    def add(self, rows: Tensor) -> None:
        """Add rows ``(n,)``."""
        self._count += rows.shape[0]
        if self._count > self._num_rows:
            self._batches = None
        elif self._batches is not None:
            self._batches.append(rows)

    def add_all(self) -> None:
        """Add every row of the shard."""
        self._batches, self._count = None, self._num_rows

    def __bool__(self) -> bool:
        return self._count > 0

    def merge(self, other: "RowSet") -> None:
        """Add the rows of another set."""
        if other._batches is None:
            self.add_all()
        else:
            for rows in other._batches:
                self.add(rows)

    def take(self) -> Tensor | None:
        """Clear the set; return its distinct rows ``(n,)``, or None for all."""
        batches = self._batches
        self.clear()
        if batches is None:
            return None
        if not batches:
            return torch.empty(0, dtype=torch.int64)
        rows = batches[0] if len(batches) == 1 else torch.cat(batches)
        return kernels.merge(rows, self._num_rows).unique


@dataclass(frozen=True)
class RowOptions:
    """How a shard holds its rows."""

    trainable: bool
    dtype: torch.dtype
    device: torch.device
    #: remember rows with a gradient, for :meth:`Table.constrain_`
    track: bool


class PendingBackward:
    """Lives as long as a lookup's graph, and records whether its backward has run."""

    def __init__(self, owner: Any) -> None:
        self.owner, self.done = owner, False


class Table(nn.Module):
    """A shard: ``weight`` ``(R, D)``, a differentiable lookup, and the changed rows."""

    weight: Tensor

    def __init__(self, plan: RowPlan, options: RowOptions) -> None:
        super().__init__()
        kernels.keep_freed_blocks()
        self.plan = plan
        self._track = options.track
        self._changed = RowSet(plan.num_local)
        self._passes_over_all = 0
        #: identity of the DistributedDataParallel that is known to leave the rows alone
        self.checked_wrapper = 0
        self.touch_all()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight":  # FSDP assigns its own tensors
            self.check_weight()

    def check_weight(self) -> None:
        """Raise UsageError if a wrapper has replaced the rows of one of several ranks."""
        weight = self._buffers.get("weight", self._parameters.get("weight"))
        if self.plan.world_size > 1 and type(weight) not in (nn.Parameter, Tensor):
            raise UsageError(
                f"{self.plan.where}: its rows are no longer the Parameter that it has made, but"
                f" {type(weight).__name__}: leave its parameters out of FSDP (ignored_params=),"
                " tensor parallelism and parametrizations"
            )

    @property
    def device(self) -> torch.device:
        """The rows' device."""
        return self.weight.device

    @property
    def rows(self) -> Tensor:
        """:meth:`_row_range`, for state dicts, whose readers look their keys up here."""
        return torch.tensor(self._row_range())

    def _row_range(self) -> tuple[int, ...]:
        plan = self.plan
        last = plan.first + plan.num_local
        return (plan.first, last, plan.num_rows, *plan.order.parameters)

    def lookup(self, rows: Tensor) -> Tensor:
        """Return ``(n, D)`` for checked row numbers ``(n,)`` of this shard."""
        raise NotImplementedError

    def set_learning_rate(self, lr: float) -> None:
        """Change the learning rate of backward's updates."""
        raise UsageError(
            f"table {self.plan.table!r} is not fused: set the learning rate in its optimizer"
        )

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return the state of backward's optimizer, ``(R, ...)`` by name."""
        return {}

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Load what :meth:`optimizer_state` returned."""

    def reset_optimizer_state(self) -> None:
        """Zero the state of backward's optimizer, in place."""

    def end_step(self) -> None:
        """Note that the optimizers have made their updates."""

    def synchronize_replicas(self) -> None:
        """Average the moved rows over the ranks with replicas. A collective."""

    @property
    def any_changed(self) -> bool:
        """Whether rows changed since the last :meth:`constrain_`."""
        return bool(self._changed)

    def touch_all(self) -> None:
        """Mark every row as changed."""
        self._changed.add_all()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.plan.world_size == 1:
            return
        _refuse_savers_of_whole_models(self.plan)
        key = f"{prefix}weight"
        if not keep_vars and key in destination:
            destination[key] = destination[key].as_subclass(_SavedRows)
        # not a buffer, which would be averaged with the others
        destination[f"{prefix}rows"] = self.rows

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        *_, error_msgs = args
        plan, key, expected = self.plan, f"{prefix}rows", self._row_range()
        weight = state_dict.get(f"{prefix}weight")
        if isinstance(weight, _SavedRows):  # load_state_dict(assign=True) keeps the tensor
            state_dict[f"{prefix}weight"] = weight.as_subclass(Tensor)
        if key in state_dict:
            got = tuple(state_dict[key].tolist())
            if got != expected:
                error_msgs.append(
                    f"{plan.where}: got rows {got[0]} to {got[1]} of {got[2]}, expected"
                    f" {expected[0]} to {expected[1]} of {expected[2]}: to load at another number"
                    " of ranks use shardemb.checkpoint, or save Embedding.full_state_dict()"
                )
                return
        elif isinstance(weight, Tensor) and plan.world_size > 1:
            if weight.dim() != 2 or len(weight) != plan.num_rows:
                error_msgs.append(
                    f"{plan.where}: got a whole table of shape {tuple(weight.shape)}, expected"
                    f" {(plan.num_rows, plan.dim)}"
                )
                return
            state_dict[f"{prefix}weight"] = weight[plan.local_ids().to(weight.device)]
        state_dict.pop(key, None)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.touch_all()

    def _watch(self, out: Tensor, rows: Tensor) -> None:
        """Remember ``rows`` when their gradient arrives; a lookup alone changes nothing."""
        if self._track and out.requires_grad:
            out.register_hook(lambda grad: self._got_gradient(rows))

    def _got_gradient(self, rows: Tensor) -> None:
        self._changed.add(rows)

    @torch.no_grad()
    def constrain_(self, function: RowFunction, changed_only: bool) -> int:
        """Apply ``function`` in place to all or changed rows ``(n, D)``; return their number."""
        weight = self.weight.detach()
        rows = self._take_changed() if changed_only else None
        if rows is not None:
            if rows.shape[0]:
                kernels.constrain(weight, rows.to(weight.device), function)
            return rows.shape[0]
        self._passes_over_all += 1
        if self._passes_over_all == 2:  # the first pass is expected: all rows are new
            _log.info("table %r: constrains all %d rows again", self.plan.table, len(weight))
        for chunk in weight.split(CHUNK_ROWS) if len(weight) else ():
            chunk.copy_(function(chunk))
        return len(weight)

    def _take_changed(self) -> Tensor | None:
        return self._changed.take()


_ONE_RANKS_ROWS = (
    "a state dict holds one rank's rows of a sharded table, and this saver would keep the rows of"
    " one rank alone: use shardemb.checkpoint, or save Embedding.full_state_dict()"
)


class _SavedRows(Tensor):
    """A rank's rows in a state dict, an ordinary tensor but for torch.distributed.checkpoint."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __create_write_items__(self, name: str, value: Any) -> Any:
        """Asked when the planner saves."""
        raise UsageError(f"{name}: {_ONE_RANKS_ROWS}")

    def __create_chunk_list__(self) -> Any:
        """Asked when the planner loads."""
        raise UsageError(_ONE_RANKS_ROWS)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def _refuse_savers_of_whole_models(plan: RowPlan) -> None:
    """Raise UsageError if the state dict is for a file that should hold the whole model."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        info = frame.f_locals.get("info")
        full = module.startswith("torch.distributed.checkpoint") and info is not None
        if (full and getattr(info, "full_state_dict", False)) or module == "safetensors.torch":
            raise UsageError(f"{plan.where}: {_ONE_RANKS_ROWS}")
        frame = frame.f_back


class ParameterTable(Table):
    """A shard whose ``weight`` is an ordinary Parameter with a dense or sparse (COO) gradient."""

    def __init__(self, plan: RowPlan, options: RowOptions, sparse: bool) -> None:
        super().__init__(plan, options)
        plan.check_fits(options.dtype.itemsize, options.device)
        self.sparse = sparse
        weight = kernels.empty((plan.num_local, plan.dim), options.dtype, options.device)
        self.weight = nn.Parameter(weight, requires_grad=options.trainable)
        #: rows with a gradient that no optimizer is known to have applied
        self._waiting = RowSet(plan.num_local)
        self._add_hooks()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._add_hooks()

    def _add_hooks(self) -> None:
        _hook_into_optimizers(self)
        if self.plan.world_size > 1 and not self.sparse:
            self.weight.register_post_accumulate_grad_hook(_mark_as_shard)

    def _got_gradient(self, rows: Tensor) -> None:
        self._waiting.add(rows)

    def after_step(self, moved_others: bool, constrained: bool) -> None:
        """Mark the rows that an optimizer updated as changed.

        ``moved_others``: also rows without a gradient; ``constrained``: the optimizer has
        constrained them.
        """
        if not self._track:
            return
        grad = self.weight.grad
        self._waiting.clear()
        if moved_others or (grad is not None and not grad.is_sparse):  # a loss on the weight itself
            self.touch_all()
        elif grad is not None and not constrained:
            self._changed.add(grad._indices()[0])

    def _take_changed(self) -> Tensor | None:
        # keep waiting rows: their update may come later, or from an optimizer without hooks
        self._changed.merge(self._waiting)
        return super()._take_changed()

    def lookup(self, rows: Tensor) -> Tensor:
        """Return ``(n, D)``; gradients accumulate in ``weight.grad``."""
        if self.sparse:
            out = _SparseLookup.apply(self.weight, rows)
        else:
            out = F.embedding(rows, self.weight)
        self._watch(out, rows)
        return out


class _ShardGradient(Tensor):
    """The dense gradient of one rank's rows: its norm is not that of the table's gradient."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.linalg.vector_norm or function is torch._foreach_norm:
            raise UsageError(
                "got the gradient of one rank's rows of a sharded table, whose norm other ranks do"
                " not share: use shardemb.clip_grad_norm_ instead of torch's, which takes the norm"
                " over all ranks"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


def _mark_as_shard(weight: Tensor) -> None:
    if type(weight.grad) is Tensor:
        weight.grad = weight.grad.as_subclass(_ShardGradient)


class _SparseLookup(torch.autograd.Function):
    """F.embedding with a sparse gradient, for rows of a table too large for any cache."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = weight.shape
        return kernels.take(weight, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        values = kernels.contiguous(grad)
        return torch.sparse_coo_tensor(rows[None], values, ctx.shape, check_invariants=False), None


_tables: weakref.WeakSet[ParameterTable] = weakref.WeakSet()
#: handles of the hooks, while there are tables
_hooks: list[Any] = []


def _hook_into_optimizers(table: ParameterTable) -> None:
    """Reject optimizers that cannot take the table's gradient, and mark the updated rows."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
        _hooks.append(register_optimizer_step_post_hook(_after_step))
    # callbacks run newest first: this one runs after the set has dropped the table
    weakref.finalize(table, _remove_unused_hooks).atexit = False
    _tables.add(table)


def _remove_unused_hooks() -> None:
    while _hooks and not _tables:
        _hooks.pop().remove()


def _tables_of(optimizer: torch.optim.Optimizer) -> Iterator[tuple[ParameterTable, dict[str, Any]]]:
    # parametrizations and pruning replace the Parameter
    by_id = {id(table._parameters.get("weight")): table for table in _tables}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in by_id:
                yield by_id[id(parameter)], group


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    tables = list(_tables_of(optimizer))
    one_rank_scaler = any(t.plan.world_size > 1 for t, _ in tables) and _in_torchs_scaler()
    for table, group in tables:
        grad = table.weight.grad
        why = why_refused(optimizer, group, grad.is_sparse) if grad is not None else None
        if why is None and table.plan.world_size > 1 and one_rank_scaler:
            why = (
                "torch.amp.GradScaler looks for infinite gradients in this rank's rows alone, so"
                " that ranks would skip different steps: use shardemb.GradScaler"
            )
        if why is not None:
            raise UsageError(f"table {table.plan.table!r}: {why}")


def _in_torchs_scaler() -> bool:
    """Whether the optimizer's step was called by a GradScaler that sees one rank only."""
    frame: Any = sys._getframe(2)  # hooks get no reference to it
    for _ in range(6):
        scaler = frame.f_locals.get("self") if frame is not None else None
        if isinstance(scaler, torch.amp.GradScaler):
            return not getattr(scaler, "sees_all_ranks", False)
        frame = frame.f_back if frame is not None else None
    return False


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    constrained = kwargs.get("constrain") or {}
    for table, group in _tables_of(optimizer):
        moved_others = not moves_touched_rows_only(optimizer, group)
        table.after_step(moved_others, table.weight in constrained)
