"""Modules of torch.distributed around a model with sharded tables.

DistributedDataParallel copies rank 0's parameters and buffers over those of all ranks, and FSDP
shards them again: both would mix up the rows of different ranks.
"""

from typing import TypeVar

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from shardemb.exceptions import InputTypeError, UsageError
from shardemb.sharding.table import Table

Model = TypeVar("Model", bound=nn.Module)


def exclude_from_ddp(model: Model) -> Model:
    """Leave a model's sharded tables out of what DistributedDataParallel synchronizes.

    Call it before the model is wrapped, also by ``accelerate``, Lightning or Ray Train. The tables
    reduce their own gradients; DistributedDataParallel reduces those of other layers and of
    replicated tables.

    Args:
        model: the module that will be wrapped.

    Returns:
        The same module.

    Raises:
        TypeError: not a module, or wrapped already.
    """
    if not isinstance(model, nn.Module) or isinstance(model, DistributedDataParallel):
        raise InputTypeError(
            f"got {type(model).__name__}, expected the torch.nn.Module that holds the tables,"
            " before DistributedDataParallel wraps it"
        )
    ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    for name, shard in _shards(model):
        ignored |= _names(name, shard)
    # the only interface that torch offers
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(ignored))
    return model


def _shards(model: nn.Module) -> list[tuple[str, Table]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, Table) and module.plan.world_size > 1
    ]


def _names(name: str, shard: Table) -> set[str]:
    prefix = f"{name}." if name else ""
    return {f"{prefix}{key}" for key, _ in (*shard.named_parameters(), *shard.named_buffers())}


def check_wrappers(shard: Table) -> None:
    """Raise UsageError if a wrapper has changed a shard's rows."""
    if shard.plan.world_size == 1:
        return
    shard.check_weight()
    ddp = DistributedDataParallel._active_ddp_module
    if ddp is not None and id(ddp) != shard.checked_wrapper:
        for name, module in _shards(ddp.module):
            if module is shard and not _names(name, shard) <= set(ddp.parameters_to_ignore):
                raise UsageError(
                    f"{shard.plan.where}: DistributedDataParallel has overwritten its rows with"
                    " those of rank 0: make the model anew, and call"
                    " shardemb.exclude_from_ddp(model) before it is wrapped"
                )
        shard.checked_wrapper = id(ddp)
