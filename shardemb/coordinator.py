"""One training step over all tables of a model."""

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase as BatchNorm

from shardemb import kernels
from shardemb.amp import GradScaler
from shardemb.comm import collectives, watchdog
from shardemb.embedding import Embedding, deferred_updates
from shardemb.exceptions import InputError, InputTypeError, NonfiniteError, UsageError
from shardemb.optim import RowWiseOptimizer, merged_gradient, moves_touched_rows_only, why_refused
from shardemb.utils.types import few

#: what a NaN or infinite loss or gradient may do
NONFINITE = ("error", "warn", "skip")


class Coordinator:
    """Ends each training step: reduce, update, constrain, clear the gradients.

    After ``loss.backward()``, :meth:`step` does in this order:

    1. reduce the gradients of parameters that every rank holds whole (replicated tables, layers) by
       mean, or by sum for a replicated table with that option, in one all-reduce;
    2. with ``max_grad_norm``: clip all gradients by their norm over all tables and ranks, with one
       all-reduce;
    3. ``optimizer.step()`` of each optimizer. Those of :mod:`shardemb.optim` constrain rows of
       sparse tables in the same pass. Fused tables were updated in backward; TorchRec's replicas
       are averaged now, a collective;
    4. ``post_parameter_update()`` of each module that has one: tables constrain their changed rows;
    5. copy rank 0's buffers that have changed, such as BatchNorm's, and clear the gradients.

    ``nonfinite`` checks the gradients first: a pass over them and an all-reduce of one number.
    Checking the loss instead is almost free: :meth:`backward` does it before fused tables are
    updated, :meth:`reduce` in the gradients' all-reduce.

    The constructor is a collective: it checks that all ranks have the same parameters, optimizers
    and step, and copies rank 0's whole parameters and buffers to all ranks, as
    DistributedDataParallel.

    Args:
        model: module that holds the tables.
        optimizers: over the model's parameters; none for fused tables alone.
        max_grad_norm: clip gradients to this 2-norm, see :func:`clip_grad_norm_`.
        nonfinite: for NaN or infinite losses and gradients, on all ranks: "error" raises
            FloatingPointError before any update, "warn" warns and trains, "skip" warns and skips
            the step; None does not check.
        steps: completed steps of a continued run.

    Attributes:
        steps: completed steps.
        skipped: skipped steps.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: an optimizer with parameters that are not in ``model``, or of a sparse table
            that takes no sparse gradients, or moves rows without a gradient (momentum, weight
            decay) despite a constrainer; a table with its own process group; two tables of one
            name on several ranks; clipping with a fused table.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] = (),
        max_grad_norm: float | None = None,
        nonfinite: Literal["error", "warn", "skip"] | None = None,
        steps: int = 0,
    ) -> None:
        if nonfinite not in (None, *NONFINITE):
            raise InputError(f"got nonfinite={nonfinite!r}, expected one of {NONFINITE} or None")
        self.model, self.tables = model, _tables_in(model)
        self._table_of = {p: table for table in self.tables for p in table.parameters()}
        self.max_grad_norm = max_grad_norm
        self.nonfinite, self.steps, self.skipped = nonfinite, steps, 0
        one = isinstance(optimizers, torch.optim.Optimizer)
        self.optimizers: list[torch.optim.Optimizer] = [optimizers] if one else list(optimizers)  # type: ignore[list-item, arg-type]
        self._constrained = [table for table in self.tables if table.constrainer is not None]
        self._updated: list[Any] = [
            module
            for module in model.modules()
            if callable(getattr(module, "post_parameter_update", None))
            and module not in self.tables
        ]
        self._reduced, self._skips, self._checked = False, False, False
        watchdog.at_step(steps + 1)
        sharded: set[torch.Tensor] = set()
        self._by_sum: set[torch.Tensor] = set()
        self._sparse: set[torch.Tensor] = set()
        for table in self.tables:
            table._require_default_group("the coordinator")
            parameters = set(table.parameters())
            if table.sharding.placement == "row_wise":
                sharded |= {*parameters, *table.buffers()}
            if table.sharding.gradient_reduction == "sum":
                self._by_sum |= parameters
            if table.kernel == "sparse":
                self._sparse |= parameters
        self._sharded = sharded
        self._first_parameters = {*model.parameters()}
        self._note_parameters()
        if max_grad_norm is not None:
            _check_clipping(self.tables, max_grad_norm)
        collectives.agree("the coordinator", _description(self))
        if collectives.rank_and_size()[1] > 1:
            _check_names(self.tables)
            with torch.no_grad():
                for tensor in [*model.parameters(), *model.buffers()]:
                    if tensor not in sharded:
                        operation = "the coordinator: values of rank 0"
                        collectives.broadcast(tensor, operation=operation)
        self._batch_norms: list[Any] = [
            module
            for module in model.modules()
            if isinstance(module, BatchNorm) and module.running_mean is not None
        ]
        #: of each whole buffer, its version in the last step
        known = sharded.union(*([n.running_mean, n.running_var] for n in self._batch_norms))
        self._buffers = {b: b._version for b in model.buffers() if b not in known}

    def _parameters_now(self) -> list[Any]:
        """Describe what freezing, or another parameter or group of an optimizer, would change."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        return [
            *((id(p), p.requires_grad) for p in self.model.parameters()),
            *([id(p) for p in group["params"]] for group in groups),
        ]

    def _note_parameters(self) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                strangers = [p for p in group["params"] if p not in self._first_parameters]
                if strangers:
                    shapes = few([str(tuple(p.shape)) for p in strangers])
                    raise InputError(
                        f"the coordinator: {type(optimizer).__name__} has {len(strangers)}"
                        f" parameter(s) that are not in its model, of shapes {shapes}, so their"
                        " gradients would be neither reduced nor cleared: pass the module that"
                        " holds them all, such as torch.nn.ModuleList([table, layer])"
                    )
                self._check_optimizer(optimizer, group)
        parameters = self.model.parameters()
        self._replicated = [p for p in parameters if p.requires_grad and p not in self._sharded]
        self._known_parameters = self._parameters_now()

    def _take_in_changes(self) -> None:
        """Take in what was frozen or unfrozen since, and groups of the model's parameters."""
        if self._parameters_now() == self._known_parameters:
            return
        named = self.model.named_parameters()
        added = [name for name, p in named if p not in self._first_parameters]
        if added:
            raise UsageError(
                f"the coordinator: its model has got other parameters since it was made:"
                f" {few(added)}: make a new Coordinator(model, optimizers, steps={self.steps})"
            )
        self._note_parameters()

    def _check_optimizer(self, optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
        parameters = set(group["params"])
        for table in self.tables:
            if table.kernel != "sparse" or not parameters & set(table.parameters()):
                continue
            refused = why_refused(optimizer, group, True)
            if refused is not None:
                raise InputError(f"table {table.name!r}: {refused}")
            if table._constrains_changed_only and not moves_touched_rows_only(optimizer, group):
                options = ("momentum", "weight_decay")
                moving = [f"{key}={group[key]}" for key in options if group.get(key)]
                raise InputError(
                    f"table {table.name!r}: {type(optimizer).__name__} with"
                    f" {' and '.join(moving) or 'sparse gradients'} moves rows without a gradient,"
                    " so every step would constrain all rows: use one of shardemb.optim (their"
                    " weight_decay is of touched rows), or kernel='dense'"
                )

    def backward(self, loss: torch.Tensor) -> bool:
        """Run ``loss.backward()`` unless any rank's loss is NaN or infinite. A collective.

        Args:
            loss: this rank's, a scalar.

        Returns:
            Whether backward ran; if not, omit :meth:`step` too.

        Raises:
            FloatingPointError: a rank's loss is bad, and ``nonfinite`` is "error".
        """
        if self.nonfinite is not None and self._must_skip(self._loss_fault(loss)):
            self._end_step(skipped=True)
            return False
        loss.backward()
        return True

    def _sum_flags(self, flags: Sequence[float]) -> list[float]:
        flat = torch.tensor(flags, dtype=torch.float32)
        flat = flat.to(next(self.model.parameters(), flat).device)
        collectives.all_reduce(flat, operation="the coordinator: flags")
        return flat.tolist()

    def _loss_fault(self, loss: torch.Tensor) -> str:
        if torch.isfinite(loss.detach()).all():
            return ""
        faults = [f"the loss is {loss.item()}"]
        for table in self.tables:
            rows = kernels.nonfinite_rows(table.local_rows())
            ids = table.plan.local_ids()[rows.cpu()].tolist()
            if ids:
                what = f"{len(ids)} rows with NaN or infinite values: {few(ids)}"
                faults.append(f"table {table.name!r} has {what}")
        return ", ".join(faults)

    def _gradient_fault(self) -> str:
        faults = []
        for name, parameter in self.model.named_parameters():
            grad = parameter.grad
            if grad is None:
                continue
            rows = kernels.nonfinite_rows(grad._values() if grad.is_sparse else grad)
            if not len(rows):
                continue
            if parameter not in self._table_of:
                faults.append(f"the gradient of {name!r} is NaN or infinite")
                continue
            table = self._table_of[parameter]
            rows = (grad._indices()[0, rows] if grad.is_sparse else rows).unique().cpu()
            ids = table.plan.local_ids()[rows].tolist()
            faults.append(
                f"table {table.name!r}: the gradient of {len(ids)} rows is NaN or infinite:"
                f" {few(ids)}"
            )
        return "; ".join(faults)

    def _must_skip(self, fault: str) -> bool:
        (faulty,) = self._sum_flags([bool(fault)])
        return faulty > 0 and self._on_fault(fault)

    def _on_fault(self, fault: str) -> bool:
        """Raise or warn as ``nonfinite`` says; return whether to skip the step."""
        faults = collectives.gather(fault, operation="what is not finite?")
        text = "; ".join(f"rank {rank}: {what}" for rank, what in enumerate(faults) if what)
        text = f"step {self.steps + 1}: {text}"
        if self.nonfinite == "error":
            raise NonfiniteError(
                f"{text}: lower the learning rate, or continue with nonfinite='skip'"
            )
        skips = self.nonfinite == "skip"
        left_out = f": step left out, {self.skipped + 1} so far" if skips else ""
        warnings.warn(f"{text}{left_out}", stacklevel=4)
        return skips

    def step(self, scaler: GradScaler | None = None) -> bool:
        """Do all five parts; see the class.

        Args:
            scaler: has scaled the loss; unscales the gradients before they are clipped, and is
                updated.

        Returns:
            Whether the parameters were updated; False for a skipped step.

        Raises:
            FloatingPointError: on all ranks, a gradient is bad and ``nonfinite`` is "error".
            ValueError: a scaler with a fused table.
        """
        if not self._reduced:
            self.reduce()
        if scaler is not None:
            self._unscale(scaler)
        elif self.nonfinite is not None and not self._checked:
            self._skips = self._must_skip(self._gradient_fault())
        if self._skips:
            self._end_step(skipped=True)
            return False
        if self.max_grad_norm is not None:
            clip_grad_norm_(self.model, self.max_grad_norm)
        for optimizer in self.optimizers:
            options: dict[str, Any] = {}
            if isinstance(optimizer, RowWiseOptimizer):
                in_step = [table._constrainer_in_step() for table in self._constrained]
                options = {"constrain": {k: f for part in in_step for k, f in part.items()}}
            optimizer.step(**options)
        for table in self.tables:
            table._embeddings.synchronize_replicas()
        with deferred_updates(self._constrained):  # PyKEEN's models call their tables
            for module in self._updated:
                module.post_parameter_update()
        for table in self._constrained:
            table.post_parameter_update()
        self._copy_buffers()
        self._end_step(skipped=False)
        return True

    def _copy_buffers(self) -> None:
        """Copy rank 0's buffers that this step has changed, such as BatchNorm's, to all ranks."""
        if collectives.rank_and_size()[1] == 1:
            return
        for buffer, version in self._buffers.items():
            if buffer._version != version:
                collectives.broadcast(buffer, operation="the coordinator: buffers of rank 0")
                self._buffers[buffer] = buffer._version
        for norm in self._batch_norms:  # their kernels do not count versions
            if norm.training:
                for buffer in (norm.running_mean, norm.running_var):
                    collectives.broadcast(buffer, operation="the coordinator: BatchNorm of rank 0")

    def _unscale(self, scaler: GradScaler) -> None:
        """Unscale all gradients; skip the step if one of any rank is infinite."""
        fused = [table.name for table in self.tables if table.kernel == "fused"]
        if fused or not isinstance(scaler, GradScaler):
            raise InputError(
                f"the coordinator: got {type(scaler).__module__}.{type(scaler).__name__} and fused"
                f" tables {fused}, expected shardemb.GradScaler, which sees all ranks' gradients,"
                " and no table that backward updates with scaled ones: use kernel='sparse'"
            )
        infinite = 0.0
        for optimizer in self.optimizers:
            scaler.unscale_(optimizer)
            infinite += sum(
                flag.item() for flag in scaler._found_inf_per_device(optimizer).values()
            )
        self._skips |= infinite > 0
        scaler.update()

    def forget(self) -> None:
        """Skip a step whose gradients exist already."""
        self._end_step(skipped=True)

    def _end_step(self, skipped: bool) -> None:
        self.skipped += skipped
        self._reduced, self._skips, self._checked = False, False, False
        self.model.zero_grad()
        for table in self.tables:
            table._embeddings.end_step()
        self.steps += 1
        watchdog.at_step(self.steps + 1)

    @torch.no_grad()
    def reduce(self, flags: Sequence[float] = (), loss: torch.Tensor | None = None) -> list[float]:
        """Reduce the gradients now; the next :meth:`step` skips this part. A collective.

        The same all-reduce sums ``flags``, so ranks can agree at no cost, for example to
        :meth:`forget` the step. With ``nonfinite`` it also checks ``loss``, instead of the
        gradients.

        Args:
            flags: small integers, as many on every rank.
            loss: this rank's, a scalar.

        Returns:
            The sums of ``flags`` over ranks.

        Raises:
            FloatingPointError: a rank's loss is bad, and ``nonfinite`` is "error".
        """
        self._take_in_changes()
        self._reduced = True
        if loss is None or self.nonfinite is None:
            return self._reduce(flags)
        fault = self._loss_fault(loss)
        *sums, bad = self._reduce([*flags, bool(fault)])
        self._checked, self._skips = True, bad > 0 and self._on_fault(fault)
        return sums

    def _reduce(self, flags: Sequence[float]) -> list[float]:
        world_size = collectives.rank_and_size()[1]
        if world_size == 1:
            return list(flags)
        if not self._replicated:
            return self._sum_flags(flags) if len(flags) else []
        sums, operation = torch.tensor(flags), "the coordinator: gradients of replicated parameters"
        for dtype in sorted({p.dtype for p in self._replicated}, key=str):
            parameters = [p for p in self._replicated if p.dtype == dtype]
            # every rank sends all gradients (or zeros), whether it has them, and sparse ones' rows
            touched = [self._touched(p) for p in parameters]
            grads = [
                torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in parameters
            ]
            sent = [part.reshape(-1) for part in (*touched, *grads)]
            sent.append(torch.tensor(flags).to(sent[0]))
            flat = torch.cat(sent)
            collectives.all_reduce(flat, operation=operation)
            *parts, sums = flat.split([part.numel() for part in sent])
            masks, reduced = parts[: len(parameters)], parts[len(parameters) :]
            for parameter, mask, part in zip(parameters, masks, reduced, strict=True):
                if not mask[0]:
                    continue
                grad = part.reshape(parameter.shape)
                grad = grad / (1 if parameter in self._by_sum else world_size)
                if parameter in self._sparse:
                    rows = mask[1:].nonzero().squeeze(1)  # also rows whose gradients sum to 0
                    grad = _sparse_gradient(rows, grad[rows], grad.shape)
                parameter.grad = grad
        return sums.tolist()

    def _touched(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return ``(1 + R,)``: whether there is a gradient, and for which rows if sparse."""
        grad, rows = parameter.grad, len(parameter) if parameter in self._sparse else 0
        mask = torch.zeros(1 + rows, dtype=parameter.dtype, device=parameter.device)
        if grad is None:
            return mask
        mask[0] = 1
        if rows:
            mask[1:].index_fill_(0, grad._indices()[0], 1) if grad.is_sparse else mask.fill_(1)
        return mask


def _sparse_gradient(rows: torch.Tensor, values: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return torch.sparse_coo_tensor(
        rows[None], values, shape, is_coalesced=True, check_invariants=False
    )


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
    """Scale all gradients of a model so that their total norm is at most ``max_norm``.

    As torch.nn.utils.clip_grad_norm_, over all ranks: each row of a sharded table counts once,
    after duplicates are summed; whole parameters, already reduced, count once. A collective.

    Args:
        model: module that holds the tables.
        max_norm: above 0.
        norm_type: ``p`` of the norm; ``inf`` for the largest absolute value.

    Returns:
        The norm before clipping, the same on every rank. If it is NaN or infinite, gradients become
        NaN or 0, as in torch.

    Raises:
        ValueError: ``max_norm`` or ``norm_type`` not above 0, a fused table, or a table with its
            own process group.
    """
    tables = _tables_in(model)
    _check_clipping(tables, max_norm, norm_type)
    row_wise = (table for table in tables if table.sharding.placement == "row_wise")
    sharded_parameters = {p for table in row_wise for p in table.parameters()}
    sharded: list[torch.Tensor] = []
    whole: list[torch.Tensor] = []
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    for parameter in model.parameters():
        grad = parameter.grad
        if grad is None:
            continue
        if grad.is_sparse:
            rows, values = merged_gradient(grad)
            values = values.reshape(len(rows), *grad.shape[1:])
            parameter.grad = grad = _sparse_gradient(rows, values, grad.shape)
            grad = grad._values()
        if grad.numel():  # an empty norm may raise (inf), on this rank alone
            (sharded if parameter in sharded_parameters else whole).append(grad)
    infinite = norm_type == math.inf

    def power(grads: list[torch.Tensor]) -> torch.Tensor:
        norms = [torch.linalg.vector_norm(g.abs(), norm_type, dtype=torch.float64) for g in grads]
        stacked = torch.stack([torch.zeros((), dtype=torch.float64, device=device), *norms])
        return stacked.max() if infinite else stacked.pow(norm_type).sum()

    of_shards, of_whole = power(sharded), power(whole)
    operator = collectives.MAX if infinite else collectives.SUM
    collectives.all_reduce(of_shards, operator, operation="norm of the gradients")
    if infinite:
        total = torch.maximum(of_shards, of_whole)
    else:
        total = (of_shards + of_whole).pow(1 / norm_type)
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)  # torch's guard
    for grad in sharded + whole:
        grad.mul_(scale.to(grad.dtype))
    return total


def _description(coordinator: Coordinator) -> dict[str, object]:
    tables, shapes = coordinator._table_of, {}
    for name, p in coordinator.model.named_parameters():
        shape = [tables[p].max_id, *tables[p].shape] if p in tables else list(p.shape)
        shapes[name] = f"{shape} {p.dtype} {p.requires_grad}"
    plain = int | float | str | bool | tuple | None
    optimizers = [
        [
            type(optimizer).__name__,
            [{k: v for k, v in g.items() if isinstance(v, plain)} for g in optimizer.param_groups],
        ]
        for optimizer in coordinator.optimizers
    ]
    return {
        "parameters": shapes,
        "optimizers": optimizers,
        "max_grad_norm": coordinator.max_grad_norm,
        "nonfinite": coordinator.nonfinite,
        "steps": coordinator.steps,
    }


def _tables_in(model: nn.Module) -> list[Embedding]:
    if not isinstance(model, nn.Module):
        raise InputTypeError(
            f"got {type(model).__name__}, expected the torch.nn.Module that holds the tables"
        )
    return [module for module in model.modules() if isinstance(module, Embedding)]


def _check_names(tables: list[Embedding]) -> None:
    twice = [name for name, count in Counter(table.name for table in tables).items() if count > 1]
    if twice:
        raise InputError(
            f"the coordinator: got several tables named {few(twice)}, expected one of each name, by"
            " which ranks and checkpoints tell them apart: pass Embedding(name=...)"
        )


def _check_clipping(tables: list[Embedding], max_norm: float, norm_type: float = 2.0) -> None:
    if not max_norm > 0 or not norm_type > 0:
        raise InputError(
            f"gradient clipping: got max_norm={max_norm}, norm_type={norm_type}, expected both"
            " above 0"
        )
    for table in tables:
        table._require_default_group("gradient clipping")
        if table.kernel == "fused":
            raise InputError(
                f"table {table.name!r}: kernel='fused' updates rows in backward, so there is no"
                " gradient to clip: use kernel='sparse' with shardemb.optim.RowWiseAdagrad, the"
                " same rule"
            )
