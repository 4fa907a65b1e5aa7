"""torch.distributed's collectives, with a timeout and an error that names the missing rank.

``operation`` describes a collective in that error.
"""

import builtins
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from shardemb import exceptions
from shardemb.comm import shared_memory
from shardemb.comm.shared_memory import HostRanks, Message, meet
from shardemb.comm.watchdog import PeerWatchdog, watch
from shardemb.exceptions import RanksDisagreeError

MAX, MIN, SUM = dist.ReduceOp.MAX, dist.ReduceOp.MIN, dist.ReduceOp.SUM


_host_ranks: WeakKeyDictionary[PeerWatchdog, HostRanks | None] = WeakKeyDictionary()


def _through_memory(
    group: Any, tensor: Tensor, operation: str, sent: Sequence[int] | None = None
) -> Message | None:
    """Exchange contiguous tensors through shared memory; None on all ranks if impossible."""
    watchdog = watch(group)
    if tensor.device.type != "cpu" or not watchdog.slices:
        return None
    if watchdog not in _host_ranks:
        ask = partial(gather, group=group, operation="do ranks share memory?")
        _host_ranks[watchdog] = meet(*rank_and_size(group), ask)
    host_ranks = _host_ranks[watchdog]
    if host_ranks is None:
        return None
    message = host_ranks.send(tensor, sent)
    watchdog.wait(message, operation)
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
) -> Callable[[], None]:
    """Send each rank its rows of ``tensor``, equally many or ``sent``; receive into ``out``.

    Without ``wait``, the returned function waits.
    """
    watchdog = watch(group)
    if wait:
        equal = [len(tensor) // len(watchdog.ranks)] * len(watchdog.ranks)
        message = _through_memory(group, tensor, operation, sent or equal)
        if message is not None:
            message.scatter(out, received or equal)
            return already_done
    work = dist.all_to_all_single(out, tensor, received, sent, group=group, async_op=True)
    if not wait:
        return partial(watchdog.wait, work, operation)
    watchdog.wait(work, operation)
    return already_done


def already_done() -> None:
    """Wait for nothing."""


def all_reduce(tensor: Tensor, op: Any = SUM, *, group: Any = None, operation: str) -> None:
    """Reduce a tensor in place; does nothing on one rank."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    if op in shared_memory.REDUCE:
        message = _through_memory(group, tensor.contiguous(), operation)
        if message is not None:
            message.reduce(tensor, op)
            return
    watch(group).wait(dist.all_reduce(tensor, op, group=group, async_op=True), operation)


def all_gather(out: list[Tensor], tensor: Tensor, *, group: Any = None, operation: str) -> None:
    """Gather each rank's tensor into ``out``."""
    watch(group).wait(dist.all_gather(out, tensor, group=group, async_op=True), operation)


def rank_and_size(group: Any = None) -> tuple[int, int]:
    """Return rank and world size; 0 and 1 without a process group."""
    return (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)


def broadcast(tensor: Tensor, *, group: Any = None, operation: str) -> None:
    """Copy rank 0's tensor to all ranks, in place."""
    watch(group).wait(dist.broadcast(tensor, 0, group=group, async_op=True), operation)


def all_gather_rows(tensor: Tensor, *, group: Any = None, operation: str) -> Tensor:
    """Return all ranks' rows ``(n, ...)``, in the order of ranks; ``n`` may differ."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return tensor
    return torch.cat(_gather_rows(tensor, group, operation)).to(tensor.device)


def _gather_rows(tensor: Tensor, group: Any, operation: str) -> list[Tensor]:
    if dist.get_backend(group) == "nccl":
        tensor = tensor.cuda()
    size = torch.tensor([len(tensor)], device=tensor.device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
    all_gather(sizes, size, group=group, operation=operation)
    counts = [int(size) for size in sizes]
    padded = tensor.new_zeros((max(counts), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in counts]
    all_gather(parts, padded, group=group, operation=operation)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


def gather(value: Any, *, group: Any = None, operation: str) -> list[Any]:
    """Return each rank's JSON value, in the order of ranks; tuples become lists."""
    if not dist.is_initialized():
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    texts = _gather_rows(text, group, operation)
    return [json.loads(text.cpu().numpy().tobytes()) for text in texts]


def gather_or_raise(
    value: Any, error: Exception | None, *, group: Any = None, operation: str
) -> list[Any]:
    """Return each rank's JSON value; if any rank has an error, raise it on all ranks.

    The class is the first failed rank's (of :mod:`shardemb.exceptions` or built in), the message
    all distinct ones.
    """
    entry = None if error is None else (type(error).__name__, str(error))
    gathered = gather((value, entry), group=group, operation=operation)
    failures = [entry for _, entry in gathered if entry is not None]
    if error is not None and len(failures) == 1:
        raise error
    if failures:
        name = failures[0][0]
        kind: Any = getattr(exceptions, name, None) or getattr(builtins, name, RuntimeError)
        raise kind("; ".join(dict.fromkeys(text for _, text in failures))) from error
    return [value for value, _ in gathered]


def agree(
    what: str,
    values: Mapping[str, Any],
    *,
    group: Any = None,
    share: Any = None,
    raises: type[Exception] = RanksDisagreeError,
) -> Any:
    """Raise unless all ranks have the same JSON values; return rank 0's ``share``.

    The error, on all ranks, names the differing keys and two values of the first.
    """
    gathered = gather((dict(values), share), group=group, operation=f"{what}: do all ranks agree?")
    first = gathered[0][0]
    for rank, (other, _) in enumerate(gathered):
        differ = [key for key in {**first, **other} if first.get(key) != other.get(key)]
        if differ:
            key = differ[0]
            raise raises(
                f"{what}: ranks disagree in {', '.join(differ)}: got {key} {first.get(key)!r} on"
                f" rank 0 and {other.get(key)!r} on rank {rank}, expected the same: pass the same"
                " arguments on every rank"
            )
    return gathered[0][1]
