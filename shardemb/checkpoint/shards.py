"""What a rank has of a model's tables, parameters and optimizer state.

Named tensors, with the global rows that they hold.
"""

import base64
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shardemb.embedding import Embedding
from shardemb.exceptions import InputError
from shardemb.sharding.placement import RowOrder


@dataclass(frozen=True)
class LocalShard:
    """What a rank holds of a tensor.

    Rows ``[first, first + len(tensor))`` of ``total``, or, not sharded, all of it.

    A sharded tensor's rows are in the order of their slots (:mod:`shardemb.sharding.placement`),
    others in that of ids.
    """

    tensor: Tensor
    first: int
    total: int
    sharded: bool
    #: whether an earlier rank holds the same rows, and writes them
    copy: bool = False
    #: the table that it belongs to, for errors
    table: str = ""

    def like(self, tensor: Tensor, by_row: bool) -> "LocalShard":
        """Return the piece for a tensor that has a value for each of these rows.

        Or one that every rank holds whole.
        """
        if by_row:
            return replace(self, tensor=tensor)
        return LocalShard(tensor, 0, length_of(tensor), False, table=self.table)

    def rows(self, start: int, stop: int) -> "LocalShard":
        """Return a part of it."""
        return replace(self, tensor=self.tensor[start:stop], first=self.first + start)

    def places(self, ids: Tensor) -> Tensor:
        """Return where rows of these ids ``(n,)`` are in the tensor, if they are."""
        return (RowOrder(self.total, self.sharded).slots(ids)) - self.first

    def ids(self, places: Tensor) -> Tensor:
        """Return the ids of rows of the tensor."""
        return RowOrder(self.total, self.sharded).ids(places + self.first)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.tensor.numel() * self.tensor.itemsize


def length_of(tensor: Tensor) -> int:
    """Return a tensor's rows, or 1 for a scalar."""
    return len(tensor) if tensor.dim() else 1


def tables_of(model: nn.Module) -> dict[str, Embedding]:
    """Return a model's tables by their names in it; an Embedding on its own is ""."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Embedding)}


def dotted(prefix: str, name: str) -> str:
    """Join two names."""
    return f"{prefix}.{name}" if prefix else name


def model_pieces(
    model: nn.Module,
) -> tuple[dict[str, LocalShard], dict[Tensor, str], dict[str, dict[str, Tensor]]]:
    """Name the model's tables, other parameters and buffers.

    Returns:
        The pieces; their names by parameter; and what each table stores, by the table's name in the
        model.
    """
    pieces: dict[str, LocalShard] = {}
    names: dict[Tensor, str] = {}
    inside: set[Tensor] = set()
    stored: dict[str, dict[str, Tensor]] = {}
    for prefix, table in tables_of(model).items():
        stored[prefix] = table._stored_rows()
        for key, tensor in stored[prefix].items():
            sharded, copy = table.plan.world_size > 1, not table._holds_first_copy
            pieces[dotted(prefix, key)] = LocalShard(
                tensor, table.plan.first, table.max_id, sharded, copy, table.name
            )
        for parameter in table.parameters():
            names[parameter] = dotted(prefix, "weight")
        inside |= {*table.parameters(), *table.buffers()}
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor not in inside:
            pieces[key] = LocalShard(tensor.detach(), 0, length_of(tensor), False, table=key)
            names[tensor] = key
    return pieces, names, stored


def optimizer_pieces(
    optimizers: Iterable[torch.optim.Optimizer],
    pieces: Mapping[str, LocalShard],
    names: Mapping[Tensor, str],
) -> dict[str, LocalShard]:
    """Name the tensors that optimizers keep for the model's parameters."""
    found = {}
    for number, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state.items():
            check_known(optimizer, parameter, names)
            for part, tensor in state.items():
                if isinstance(tensor, Tensor):
                    by_row = tensor.dim() > 0 and len(tensor) == len(parameter)
                    name = names[parameter]
                    found[f"optimizer.{number}.{name}.{part}"] = pieces[name].like(tensor, by_row)
    return found


def check_known(
    optimizer: torch.optim.Optimizer, parameter: Tensor, names: Mapping[Tensor, str]
) -> None:
    """Raise ValueError if an optimizer's parameter is not the model's."""
    if parameter not in names:
        raise InputError(
            f"{type(optimizer).__name__} has a parameter of shape {tuple(parameter.shape)} that is"
            " not the model's: give the model that holds all parameters of the optimizers"
        )


def rng_state() -> dict[str, Any]:
    """Return what the random generators of torch, Python and numpy will go on with, for JSON."""

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
    """Let the random generators go on where :func:`rng_state` was taken."""

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
