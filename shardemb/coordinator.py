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

    The constructor is a collective too: it copies rank 0's values of the parameters and buffers that every rank holds
    whole to all ranks, as DistributedDataParallel does.

    Args:
        model: module that holds the tables.
        optimizers: over the model's parameters; none for fused tables alone.

    Raises:
        ValueError: an optimizer that moves rows which got no gradient (momentum, weight decay) over a sparse table with a
            constrainer, so that touched rows alone would not do; a table on a process group of its own.
    """

    def __init__(self, model: nn.Module, optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] = ()) -> None:
        self.model = model
        self.optimizers = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
        self.tables = [module for module in model.modules() if isinstance(module, Embedding)]
        sharded: set[torch.Tensor] = set()
        by_sum, sparse, watched = set(), set(), {}
        for table in self.tables:
            table.require_default_group("the coordinator")
            if table.placement == "row_wise":
                sharded |= {*table.parameters(), *table.buffers()}
            for parameter in table.parameters():
                if table.gradient_reduction == "sum":
                    by_sum.add(parameter)
                if table.gradient == "sparse":
                    sparse.add(parameter)
                    if table.constrainer is not None:
                        watched[parameter] = table.name
        self._replicated = [p for p in model.parameters() if p.requires_grad and p not in sharded]
        self._by_sum, self._sparse = by_sum, sparse
        if dist.is_initialized() and dist.get_world_size() > 1:
            with torch.no_grad():
                for tensor in [*model.parameters(), *model.buffers()]:
                    if tensor not in sharded:
                        dist.broadcast(tensor, 0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                moving = [key for key in ("momentum", "weight_decay") if group.get(key)]
                named = [watched[p] for p in group["params"] if p in watched]
                if moving and named:
                    raise ValueError(
                        f"table {named[0]!r}: {type(optimizer).__name__} with {moving[0]}={group[moving[0]]} moves rows that "
                        f"got no gradient, so every step would constrain all rows: set it to 0, or use gradient='dense'"
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
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        for dtype in sorted({p.dtype for p in self._replicated}, key=str):
            parameters = [p for p in self._replicated if p.dtype == dtype]
            # every rank sends every gradient, zeros where it has none, and whether it has one
            has = torch.tensor([p.grad is not None for p in parameters], dtype=dtype, device=parameters[0].device)
            grads = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in parameters]
            flat = torch.cat([has, *(grad.reshape(-1) for grad in grads)])
            dist.all_reduce(flat)
            any_has, *parts = flat.split([len(parameters), *(p.numel() for p in parameters)])
            for parameter, part, some in zip(parameters, parts, any_has.tolist(), strict=True):
                grad = part.reshape(parameter.shape) / (1 if parameter in self._by_sum else dist.get_world_size())
                if some:
                    parameter.grad = grad.to_sparse(1) if parameter in self._sparse else grad
