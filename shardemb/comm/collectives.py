"""torch.distributed's collectives, each with the name of what it is for.

They end in time, and say who is missing.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from shardemb import exceptions
from shardemb.comm import shared_memory
from shardemb.comm.shared_memory import HostRanks, Message, meet
from shardemb.comm.watchdog import PeerWatchdog, watch
from shardemb.exceptions import RanksDisagreeError, ShardembError

MAX, MIN, SUM = dist.ReduceOp.MAX, dist.ReduceOp.MIN, dist.ReduceOp.SUM


@dataclass(frozen=True)
class Pending:
    """A collective that is under way."""

    work: Any
    watch: PeerWatchdog
    operation: str

    def wait(self) -> None:
        """Return when it is done; raises PeerFailureError, as all functions of this module."""
        self.watch.wait(self.work, self.operation)


_near: WeakKeyDictionary[PeerWatchdog, HostRanks | None] = WeakKeyDictionary()


def _through_memory(
    group: Any,
    here: PeerWatchdog,
    tensor: Tensor,
    operation: str,
    sent: Sequence[int] | None = None,
) -> Message | None:
    """Exchange contiguous tensors through shared memory.

    Return all ranks' messages, or on all ranks None if they cannot.
    """
    if tensor.device.type != "cpu" or not here.slices:
        return None
    if here not in _near:
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        _near[here] = meet(
            rank,
            world_size,
            lambda value: gather(value, group=group, operation="do ranks share memory?"),
        )
    near = _near[here]
    if near is None:
        return None
    message = near.send(tensor, sent)
    here.wait(message, operation)
    return message if message.fits() else None


def all_to_all(
    out: Tensor,
    tensor: Tensor,
    received: Sequence[int] | None = None,
    sent: Sequence[int] | None = None,
    *,
    group: Any,
    operation: str,
    wait: bool = True,
) -> Pending | None:
    """Send each rank its part of ``tensor``, equal ones or ``sent``, and put theirs into ``out``.

    Returns:
        With ``wait`` None, and it is done; otherwise what to wait for.
    """
    here = watch(group)
    equal = [len(tensor) // len(here.ranks)] * len(here.ranks)
    message = _through_memory(group, here, tensor, operation, sent or equal) if wait else None
    if message is not None:
        message.scatter(out, received or equal)
        return None
    work = dist.all_to_all_single(out, tensor, received, sent, group=group, async_op=True)
    if not wait:
        return Pending(work, here, operation)
    here.wait(work, operation)
    return None


def all_reduce(tensor: Tensor, op: Any = SUM, *, group: Any = None, operation: str) -> None:
    """Reduce a tensor over the ranks, in place; one rank's is reduced already."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    here = watch(group)
    message = (
        _through_memory(group, here, tensor.contiguous(), operation)
        if shared_memory.reduces(op)
        else None
    )
    if message is not None:
        message.reduce(tensor, op)
        return
    here.wait(dist.all_reduce(tensor, op, group=group, async_op=True), operation)


def all_gather(out: list[Tensor], tensor: Tensor, *, group: Any = None, operation: str) -> None:
    """Put each rank's tensor into ``out``."""
    here = watch(group)
    here.wait(dist.all_gather(out, tensor, group=group, async_op=True), operation)


def rank_and_size() -> tuple[int, int]:
    """Return this process's rank and the number of ranks of the default group.

    0 and 1 without one.
    """
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def broadcast(tensor: Tensor, *, group: Any = None, operation: str) -> None:
    """Copy rank 0's tensor to all ranks, in place."""
    here = watch(group)
    here.wait(dist.broadcast(tensor, 0, group=group, async_op=True), operation)


def all_gather_rows(tensor: Tensor, *, group: Any = None, operation: str) -> Tensor:
    """Return the rows ``(n, ...)`` of all ranks, in the order of the ranks, on the tensor's device.

    N may differ.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return tensor
    sizes = gather(len(tensor), group=group, operation=operation)
    padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]), device=_device(group, tensor.device))
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    all_gather(parts, padded, group=group, operation=operation)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).to(
        tensor.device
    )


def _device(group: Any, device: torch.device) -> torch.device:
    """Return where a group's collectives take a tensor of a device from."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if dist.get_backend(group) == "nccl"
        else device
    )


def gather(value: Any, *, group: Any = None, operation: str) -> list[Any]:
    """Return what each rank has given, in the order of the ranks.

    Anything that JSON can hold, tuples as lists.

    In a process without a process group that is its own value alone.
    """
    if not dist.is_initialized():
        return [value]
    world_size = dist.get_world_size(group)
    device = _device(group, torch.device("cpu"))
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    size = torch.tensor([len(mine)], device=device)
    sizes = [torch.empty_like(size) for _ in range(world_size)]
    all_gather(sizes, size, group=group, operation=operation)
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(mine)] = mine
    texts = [torch.empty_like(padded) for _ in range(world_size)]
    all_gather(texts, padded, group=group, operation=operation)
    return [
        json.loads(text[: int(size)].cpu().numpy().tobytes())
        for text, size in zip(texts, sizes, strict=True)
    ]


def raise_together(error: ShardembError | None, *, group: Any = None, operation: str) -> None:
    """Raise on all ranks the error that any rank has; return if none has one. A collective.

    Args:
        error: of this rank. Its class is one of :mod:`shardemb.exceptions`.
        group: process group; None for the default one.
        operation: for errors.

    Raises:
        ShardembError: of the class of the first rank's error, with the messages of all.
    """
    entry = None if error is None else (type(error).__name__, str(error))
    entries = [e for e in gather(entry, group=group, operation=operation) if e is not None]
    if entries:
        texts = dict.fromkeys(text for _, text in entries)
        raise getattr(exceptions, entries[0][0])("; ".join(texts))


def agree(what: str, values: Mapping[str, Any], *, group: Any = None, share: Any = None) -> Any:
    """Check that all ranks have the same values; JSON must be able to hold them. A collective.

    Args:
        what: the ranks make, for errors.
        values: by the name that the user knows them by.
        group: process group; None for the default one.
        share: a value of this rank.

    Returns:
        ``share`` of rank 0.

    Raises:
        RanksDisagreeError: they differ, on all ranks; names the keys, and both ranks' values.
    """
    entries = gather((dict(values), share), group=group, operation=f"{what}: do all ranks agree?")
    first = entries[0][0]
    for rank, (other, _) in enumerate(entries):
        differ = [key for key in {**first, **other} if first.get(key) != other.get(key)]
        if differ:
            key = differ[0]
            raise RanksDisagreeError(
                f"{what}: ranks disagree in {', '.join(differ)}: got {key} {first.get(key)!r} on"
                f" rank 0 and {other.get(key)!r} on rank {rank}, expected the same: pass the same"
                " arguments on every rank"
            )
    return entries[0][1]
