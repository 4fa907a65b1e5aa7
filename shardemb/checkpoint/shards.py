"""This rank's share of a model's tables, parameters and optimizer state, by name."""

import base64
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shardemb.comm import collectives
from shardemb.embedding import Embedding
from shardemb.exceptions import CheckpointError, InputError
from shardemb.sharding.placement import RowOrder


@dataclass(frozen=True)
class LocalShard:
    """This rank's rows of a tensor: slots ``[first, first + len(tensor))``."""

    tensor: Tensor
    first: int
    #: permuted if ranks share the rows; otherwise every rank holds all of them
    order: RowOrder
    #: whether an earlier rank holds and writes the same rows
    copy: bool = False
    #: its table, for errors
    table: str = ""

    def like(self, tensor: Tensor, by_row: bool) -> "LocalShard":
        """Return the shard of a tensor with a value for each row, or of a whole tensor."""
        if by_row:
            return replace(self, tensor=tensor)
        return whole(tensor, self.table)

    def rows(self, start: int, stop: int) -> "LocalShard":
        """Return the shard of rows ``[start, stop)``."""
        return replace(self, tensor=self.tensor[start:stop], first=self.first + start)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.tensor.numel() * self.tensor.itemsize


def whole(tensor: Tensor, name: str) -> LocalShard:
    """Return the shard of a tensor that every rank holds whole."""
    return LocalShard(tensor, 0, RowOrder(length_of(tensor), permuted=False), table=name)


def length_of(tensor: Tensor) -> int:
    """Return the number of rows; 1 for a scalar."""
    return len(tensor) if tensor.dim() else 1


def tables_of(model: nn.Module) -> dict[str, Embedding]:
    """Return a model's tables by name; "" for an Embedding on its own."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Embedding)}


def dotted(prefix: str, name: str) -> str:
    """Join two names."""
    return f"{prefix}.{name}" if prefix else name


def local_shards(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()
) -> tuple[dict[str, LocalShard], dict[Tensor, str], dict[str, dict[str, Tensor]]]:
    """Return shards by name, names by parameter, and each table's stored tensors.

    The shards are those of the model and of the optimizers' state.
    """
    shards: dict[str, LocalShard] = {}
    names: dict[Tensor, str] = {}
    in_tables: set[Tensor] = set()
    stored: dict[str, dict[str, Tensor]] = {}
    for prefix, table in tables_of(model).items():
        stored[prefix] = table._stored_rows()
        plan, copy = table.plan, not table._holds_first_copy
        for key, tensor in stored[prefix].items():
            shards[dotted(prefix, key)] = LocalShard(
                tensor, plan.first, plan.order, copy, table.name
            )
        names |= dict.fromkeys(table.parameters(), dotted(prefix, "weight"))
        in_tables |= {*table.parameters(), *table.buffers()}
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor not in in_tables:
            shards[key] = whole(tensor.detach(), key)
            names[tensor] = key
    for number, optimizer in enumerate(optimizers):
        for parameter in known_parameters(optimizer, names):
            name = names[parameter]
            for key, tensor in optimizer.state.get(parameter, {}).items():
                if isinstance(tensor, Tensor):
                    by_row = tensor.dim() > 0 and len(tensor) == len(parameter)
                    shard = shards[name].like(tensor, by_row)
                    shards[f"optimizer.{number}.{name}.{key}"] = shard
    return shards, names, stored


def known_parameters(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> list[Tensor]:
    """Return an optimizer's parameters; ValueError if one is not the model's."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        if parameter not in names:
            raise InputError(
                f"{type(optimizer).__name__} has a parameter of shape {tuple(parameter.shape)} that"
                " is not the model's: give the model that holds all parameters of the optimizers"
            )
    return parameters


def vote(
    stage: Callable[[], Any],
    where: str,
    wrapped: type[Exception] | tuple[type[Exception], ...],
    group: Any = None,
) -> list[Any]:
    """Run a stage on all ranks and return its results; all raise if one fails. A collective.

    ``where`` begins the message of a CheckpointError for ``wrapped`` exceptions.
    """
    value, failure = None, None
    try:
        value = stage()
    except wrapped as error:
        failure = CheckpointError(f"{where}: {type(error).__name__}: {error}")
    except CheckpointError as error:
        failure = error
    return collectives.gather_or_raise(value, failure, group=group, operation="a checkpoint's vote")


def rng_state() -> dict[str, Any]:
    """Return the state of torch's, Python's and numpy's random generators, for JSON."""

    def text(state: Tensor) -> str:
        return base64.b64encode(state.numpy().tobytes()).decode()

    state = np.random.get_state(legacy=False)
    assert isinstance(state, dict)
    words = {**state, "state": {**state["state"], "key": state["state"]["key"].tolist()}}
    version, internal, gauss = random.getstate()
    cuda = [text(s) for s in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else []
    python = [version, list(internal), gauss]
    return {"torch": text(torch.get_rng_state()), "cuda": cuda, "python": python, "numpy": words}


def set_rng_state(saved: Mapping[str, Any]) -> None:
    """Restore the random generators."""

    def state(text: str) -> Tensor:
        return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.uint8).copy())

    torch.set_rng_state(state(saved["torch"]))
    if len(saved["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state(text) for text in saved["cuda"]])
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    words = saved["numpy"]
    key = np.array(words["state"]["key"], dtype=np.uint32)
    np.random.set_state({**words, "state": {**words["state"], "key": key}})
