"""The order of one training step, over all tables of a job."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from shardemb.embedding import Embedding


class Coordinator:
    """Ends each training step: reduce, update, constrain, forget.

    After ``loss.backward()``, :meth:`step` does in this order

    1. reduce the gradients of parameters that every rank holds whole (replicated tables, layers of a model), by mean,
       or by sum for a replicated table that says so. A collective, one all-reduce for all of them;
    2. ``optimizer.step()`` of each optimizer (fused tables were updated in backward);
    3. ``post_parameter_update()`` of each module that has one: tables constrain their own changed rows;
    4. forget the gradients.

    The constructor is a collective too: it copies rank 0's values of the parameters that every rank holds whole to all
    ranks, as DistributedDataParallel does.

    Args:
        model: module that holds the tables.
        optimizers: over the model's parameters; none for fused tables alone.

    Raises:
        ValueError: an optimizer that moves rows which got no gradient (momentum, weight decay) over a sparse table with a
            constrainer, whose other rows are not looked at.
    """

    def __init__(self, model: nn.Module, optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] = ()) -> None:
        self.model = model
        self.optimizers = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
        self.tables = [module for module in model.modules() if isinstance(module, Embedding)]
        sharded, by_sum, sparse = set(), set(), {}
        for table in self.tables:
            for parameter in table.parameters():
                if table.placement == "row_wise":
                    sharded.add(parameter)
                elif table.gradient_reduction == "sum":
                    by_sum.add(parameter)
                if table.gradient == "sparse" and table.constrainer is not None:
                    sparse[parameter] = table.name
        self._replicated = [p for p in model.parameters() if p.requires_grad and p not in sharded]
        self._by_sum = by_sum
        if self._replicated and dist.is_initialized() and dist.get_world_size() > 1:
            with torch.no_grad():
                for parameter in self._replicated:
                    dist.broadcast(parameter, 0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                moving = [key for key in ("momentum", "weight_decay") if group.get(key)]
                named = [sparse[p] for p in group["params"] if p in sparse]
                if moving and named:
                    raise ValueError(
                        f"table {named[0]!r}: {type(optimizer).__name__} with {moving[0]}={group[moving[0]]} moves rows that "
                        f"got no gradient, which the constrainer would miss: set it to 0, or use gradient='dense'"
                    )

    def step(self) -> None:
        """Do all four; see the class."""
        self._reduce()
        for optimizer in self.optimizers:
            optimizer.step()
        for module in self.model.modules():
            update = getattr(module, "post_parameter_update", None)
            if callable(update):
                update()
        self.model.zero_grad()

    @torch.no_grad()
    def _reduce(self) -> None:
        if not self._replicated or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        # every rank sends every gradient, zeros where it has none, so that all send the same number of bytes
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in self._replicated]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat)
        for parameter, part in zip(self._replicated, flat.split([p.numel() for p in self._replicated]), strict=True):
            scale = 1 if parameter in self._by_sum else dist.get_world_size()
            parameter.grad = part.reshape(parameter.shape) / scale
