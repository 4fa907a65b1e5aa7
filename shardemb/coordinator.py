"""The order of one training step, over all tables of a job."""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from shardemb import kernels
from shardemb.comm import collectives, watchdog
from shardemb.embedding import Embedding
from shardemb.exceptions import InputError, InputTypeError, NonfiniteError
from shardemb.optim import RowWiseOptimizer, merged_gradient, moves_touched_rows_only, why_refused
from shardemb.utils.types import few


class Coordinator:
    """Ends each training step: reduce, update, constrain, forget.

    After ``loss.backward()``, :meth:`step` does in this order

    1. reduce the gradients of parameters that every rank holds whole (replicated tables, layers of
       a model), by mean, or by sum for a replicated table that says so. A collective, one
       all-reduce for all of them;
    2. with ``max_grad_norm``: clip all gradients by their norm over all tables and ranks. A
       collective, one all-reduce;
    3. ``optimizer.step()`` of each optimizer (fused tables were updated in backward; replicas of
       TorchRec's are averaged, a collective). Those of :mod:`shardemb.optim` constrain the rows of
       sparse tables in the same pass, while they are in cache;
    4. ``post_parameter_update()`` of each module that had one when the coordinator was made: tables
       constrain their own changed rows;
    5. forget the gradients.

    With ``nonfinite`` it first checks the gradients for NaN and infinite values: a pass over them,
    and an all-reduce of one number. :meth:`backward` checks the loss for next to nothing, and is
    all that protects fused tables.

    The constructor is a collective too: it looks whether all ranks have the same parameters,
    optimizers and step, and copies rank 0's values of the parameters and buffers that every rank
    holds whole to all ranks, as DistributedDataParallel does.

    Args:
        model: module that holds the tables.
        optimizers: over the model's parameters; none for fused tables alone.
        max_grad_norm: clip gradients to this 2-norm in each step, see :func:`clip_grad_norm_`; None
            for no clipping.
        nonfinite: what a NaN or infinite loss or gradient does, on all ranks: "error" raises
            FloatingPointError before anything is updated, "warn" tells and goes on, "skip" tells
            and forgets the step's gradients; None does not look.
        steps: that were done before, by the run that this one goes on with.

    Attributes:
        steps: done so far.
        skipped: steps of these that were left out.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: an optimizer of torch's that takes no sparse gradients, over a sparse table; one
            that moves rows which got no gradient (momentum, weight decay) over a sparse table with
            a constrainer, so that touched rows alone would not do; a table on a process group of
            its own; clipping with a fused table.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] = (),
        max_grad_norm: float | None = None,
        nonfinite: Literal["error", "warn", "skip"] | None = None,
        steps: int = 0,
    ) -> None:
        if nonfinite not in (None, "error", "warn", "skip"):
            raise InputError(
                f"got nonfinite={nonfinite!r}, expected 'error', 'warn', 'skip' or None"
            )
        self.tables = _tables_in(model)
        self.model = model
        self._updated: list[Any] = [
            module
            for module in model.modules()
            if callable(getattr(module, "post_parameter_update", None))
        ]
        self.max_grad_norm = max_grad_norm
        self.nonfinite, self.steps, self.skipped = nonfinite, steps, 0
        self._reduced = False
        watchdog.at_step(steps + 1)
        self.optimizers = (
            [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
        )
        sharded: set[torch.Tensor] = set()
        by_sum, sparse, watched, name_of = set(), set(), set(), {}
        for table in self.tables:
            table.require_default_group("the coordinator")
            if table.placement == "row_wise":
                sharded |= {*table.parameters(), *table.buffers()}
            for parameter in table.parameters():
                if table.gradient_reduction == "sum":
                    by_sum.add(parameter)
                name_of[parameter] = table.name
                if table.gradient == "sparse":
                    sparse.add(parameter)
                    if table.constrains_changed_rows_only:
                        watched.add(parameter)
        self._replicated = [p for p in model.parameters() if p.requires_grad and p not in sharded]
        self._by_sum, self._sparse = by_sum, sparse
        collectives.agree("the coordinator", _description(self))
        if dist.is_initialized() and dist.get_world_size() > 1:
            with torch.no_grad():
                for tensor in [*model.parameters(), *model.buffers()]:
                    if tensor not in sharded:
                        collectives.broadcast(tensor, operation="the coordinator: values of rank 0")
        if max_grad_norm is not None:
            _check_clipping(self.tables, max_grad_norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                named = [name_of[p] for p in group["params"] if p in sparse]
                refused = why_refused(optimizer, group, True)
                if named and refused is not None:
                    raise InputError(f"table {named[0]!r}: {refused}")
                named = [name_of[p] for p in group["params"] if p in watched]
                if named and not moves_touched_rows_only(optimizer, group):
                    moving = [
                        f"{key}={group[key]}"
                        for key in ("momentum", "weight_decay")
                        if group.get(key)
                    ]
                    raise InputError(
                        f"table {named[0]!r}: {type(optimizer).__name__} with"
                        f" {' and '.join(moving) or 'sparse gradients'} moves rows that got no"
                        " gradient, so every step would constrain all rows: use one of"
                        " shardemb.optim (their weight_decay is of touched rows), or"
                        " gradient='dense'"
                    )

    def backward(self, loss: torch.Tensor) -> bool:
        """Run ``loss.backward()`` unless the loss of any rank is NaN or infinite.

        What then, ``nonfinite`` says. A collective.

        Args:
            loss: of this rank, a number.

        Returns:
            Whether backward ran; if not, leave :meth:`step` out too.

        Raises:
            FloatingPointError: the loss of a rank is NaN or infinite, and ``nonfinite`` is "error".
        """
        bad = (
            ""
            if self.nonfinite is None or torch.isfinite(loss.detach()).all()
            else f"the loss is {loss.item()}"
        )
        if not self._trains(bad):
            return False
        loss.backward()
        return True

    def _trains(self, bad: str) -> bool:
        """Return whether a step goes on, with what this rank has found to be bad.

        A collective if ``nonfinite`` is set.
        """
        if self.nonfinite is None:
            return True
        several = dist.is_initialized() and dist.get_world_size() > 1
        found = torch.tensor(int(bool(bad)))
        if several:
            found = found.to(next(self.model.parameters(), found).device)
            collectives.all_reduce(found, collectives.MAX, operation="is all of it finite?")
        if not found:
            return True
        told = collectives.gather(bad, operation="what is not finite?") if several else [bad]
        text = "; ".join(f"rank {rank}: {what}" for rank, what in enumerate(told) if what)
        text = f"step {self.steps + 1}: {text}"
        if self.nonfinite == "error":
            raise NonfiniteError(f"{text}: lower the learning rate, or go on with nonfinite='skip'")
        if self.nonfinite == "warn":
            warnings.warn(text, stacklevel=3)
            return True
        self.forget()
        warnings.warn(f"{text}: step left out, {self.skipped} so far", stacklevel=3)
        return False

    def _bad_gradients(self) -> str:
        """Name the tables whose gradients are NaN or infinite, and the first rows of them."""
        found = []
        tables = {parameter: table for table in self.tables for parameter in table.parameters()}
        for name, parameter in self.model.named_parameters():
            grad = parameter.grad
            if grad is None:
                continue
            values = grad._values() if grad.is_sparse else grad
            values = torch.view_as_real(values) if values.is_complex() else values
            rows = kernels.nonfinite_rows(values if values.dim() else values.reshape(1))
            if not len(rows):
                continue
            if parameter not in tables:
                found.append(f"the gradient of {name!r} is NaN or infinite")
                continue
            rows = (grad._indices()[0, rows] if grad.is_sparse else rows).unique().cpu()
            ids = tables[parameter].plan.local_ids()[rows].tolist()
            found.append(
                f"table {tables[parameter].name!r}: the gradient of {len(ids)} rows is NaN or"
                f" infinite: {few(ids)}"
            )
        return "; ".join(found)

    def step(self) -> None:
        """Do all five; see the class.

        Raises:
            FloatingPointError: a gradient is NaN or infinite, on all ranks, if ``nonfinite`` is
                "error".
        """
        if not self._reduced:
            self.reduce()
        if self.nonfinite is not None and not self._trains(self._bad_gradients()):
            return
        if self.max_grad_norm is not None:
            clip_grad_norm_(self.model, self.max_grad_norm)
        for optimizer in self.optimizers:
            if isinstance(optimizer, RowWiseOptimizer):
                optimizer.step(
                    constrain={
                        key: f
                        for table in self.tables
                        for key, f in table.constrainer_in_step().items()
                    }
                )
            else:
                optimizer.step()
        for table in self.tables:
            table.synchronize_replicas()
        constrained = [table for table in self.tables if table.constrainer is not None]
        for table in constrained:
            table.update_once(True)  # PyKEEN's models hand the call on to their tables
        try:
            for module in self._updated:
                module.post_parameter_update()
        finally:
            for table in constrained:
                table.update_once(False)
        self._end_step()

    def forget(self) -> None:
        """Leave a step out, whose gradients are there already."""
        self.skipped += 1
        self._end_step()

    def _end_step(self) -> None:
        self._reduced = False
        self.model.zero_grad()
        self.steps += 1
        watchdog.at_step(self.steps + 1)

    @torch.no_grad()
    def reduce(self, flags: Sequence[float] = ()) -> list[float]:
        """Do the first part of :meth:`step`, which leaves it out then.

        And add numbers up over ranks in the same message.

        So a loop can agree on what to do with the step, to :meth:`forget` it for example, at no
        cost. A collective.

        Args:
            flags: small whole numbers, as many on every rank.

        Returns:
            Their sums over ranks.
        """
        self._reduced = True
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return list(flags)
        told = torch.tensor(flags)
        if not self._replicated and len(flags):
            told = told.to(next(self.model.parameters(), told).device)
            collectives.all_reduce(told, operation="the coordinator: flags")
        for number, dtype in enumerate(sorted({p.dtype for p in self._replicated}, key=str)):
            parameters = [p for p in self._replicated if p.dtype == dtype]
            # every rank sends every gradient, zeros where it has none, and whether it has one; of a
            # sparse one, which rows
            touched = [self._touched(p) for p in parameters]
            grads = [
                torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in parameters
            ]
            extra = told.to(touched[0]) if number == 0 else touched[0][:0]
            flat = torch.cat([part.reshape(-1) for part in (*touched, *grads, extra)])
            collectives.all_reduce(
                flat, operation="the coordinator: gradients of replicated parameters"
            )
            if number == 0:
                told = flat[len(flat) - len(flags) :]
            parts = flat[: len(flat) - len(extra)].split(
                [part.numel() for part in (*touched, *grads)]
            )
            for parameter, mask, part in zip(
                parameters, parts, parts[len(parameters) :], strict=False
            ):
                grad = part.reshape(parameter.shape) / (
                    1 if parameter in self._by_sum else dist.get_world_size()
                )
                if not mask[0]:
                    continue
                if parameter in self._sparse:
                    rows = mask[1:].nonzero().squeeze(1)  # also those whose gradients add up to 0
                    parameter.grad = torch.sparse_coo_tensor(
                        rows[None],
                        grad[rows],
                        grad.shape,
                        is_coalesced=True,
                        check_invariants=False,
                    )
                else:
                    parameter.grad = grad
        return told.tolist()

    def _touched(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return whether there is a gradient.

        And for each row of a sparse table whether it has one: ``(1,)``, ``(1 + R,)``.
        """
        grad, rows = parameter.grad, len(parameter) if parameter in self._sparse else 0
        mask = torch.zeros(1 + rows, dtype=parameter.dtype, device=parameter.device)
        if grad is None:
            return mask
        mask[0] = 1
        if rows:
            mask[1:].index_fill_(0, grad._indices()[0], 1) if grad.is_sparse else mask.fill_(1)
        return mask


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
    """Scale all gradients of a model so that their common norm is at most ``max_norm``.

    As torch.nn.utils.clip_grad_norm_.

    The norm is that of the whole gradient: each row of a sharded table counts on the rank that owns
    it, after duplicates are merged; what every rank holds whole (its gradients already reduced)
    counts once. A collective.

    Args:
        model: module that holds the tables.
        max_norm: above 0.
        norm_type: ``p`` of the norm; ``inf`` for the largest absolute value.

    Returns:
        The norm before clipping, the same on every rank; a NaN or infinite one leaves NaN or 0 in
        the gradients, as in torch.

    Raises:
        ValueError: ``max_norm`` or ``norm_type`` not above 0; a fused table, which has no gradient
            to scale; a table on a process group of its own.
    """
    tables = _tables_in(model)
    _check_clipping(tables, max_norm, norm_type)
    mine = {p for table in tables if table.placement == "row_wise" for p in table.parameters()}
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
            grad = torch.sparse_coo_tensor(
                rows[None], values, grad.shape, is_coalesced=True, check_invariants=False
            )
            parameter.grad = grad
            grad = grad._values()
        if grad.numel():  # a norm of nothing may be none (inf), and this rank alone would raise
            (sharded if parameter in mine else whole).append(grad)
    norms = [
        (
            torch.stack(
                [torch.linalg.vector_norm(g.abs(), norm_type, dtype=torch.float64) for g in grads]
            )
            if grads
            else torch.zeros(1, dtype=torch.float64, device=device)
        )
        for grads in (sharded, whole)
    ]
    infinite = norm_type == math.inf
    parts = [n.max() if infinite else n.pow(norm_type).sum() for n in norms]
    if dist.is_initialized() and dist.get_world_size() > 1:
        how = collectives.MAX if infinite else collectives.SUM
        collectives.all_reduce(parts[0], how, operation="norm of the gradients")
    total = torch.maximum(*parts) if infinite else (parts[0] + parts[1]).pow(1 / norm_type)
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)  # torch's own guard
    for grad in sharded + whole:
        grad.mul_(scale.to(grad.dtype))
    return total


def _description(coordinator: Coordinator) -> dict[str, object]:
    """Return what must be the same on all ranks."""
    model, tables = (
        coordinator.model,
        {p: table for table in coordinator.tables for p in table.parameters()},
    )
    shapes = {
        name: (
            f"{list(p.shape) if p not in tables else [tables[p].max_id, *tables[p].shape]}"
            f" {p.dtype} {p.requires_grad}"
        )
        for name, p in model.named_parameters()
    }
    plain = int | float | str | bool | tuple | None
    optimizers = [
        [
            type(o).__name__,
            [{k: v for k, v in group.items() if isinstance(v, plain)} for group in o.param_groups],
        ]
        for o in coordinator.optimizers
    ]
    options = [coordinator.max_grad_norm, coordinator.nonfinite]
    return {
        "parameters": shapes,
        "optimizers": optimizers,
        "options": options,
        "step": coordinator.steps,
    }


def _tables_in(model: nn.Module) -> list[Embedding]:
    if not isinstance(model, nn.Module):
        raise InputTypeError(
            f"got {type(model).__name__}, expected the torch.nn.Module that holds the tables"
        )
    return [module for module in model.modules() if isinstance(module, Embedding)]


def _check_clipping(tables: list[Embedding], max_norm: float, norm_type: float = 2.0) -> None:
    if not max_norm > 0 or not norm_type > 0:
        raise InputError(
            f"gradient clipping: got max_norm={max_norm}, norm_type={norm_type}, expected both"
            " above 0"
        )
    for table in tables:
        table.require_default_group("gradient clipping")
        if table.gradient == "fused":
            raise InputError(
                f"table {table.name!r}: gradient='fused' updates rows in backward, so there is no"
                " gradient to clip: use gradient='sparse' with shardemb.optim.RowWiseAdagrad, the"
                " same rule"
            )
