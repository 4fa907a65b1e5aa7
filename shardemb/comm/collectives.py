"""Collectives of torch.distributed that say what they are for.

Every message starts with a mark of its ``operation``. Ranks that are in different operations all
get :class:`~shardemb.exceptions.RanksDisagreeError`, which names them, instead of each other's
data. Ranks of one machine exchange through shared memory. Others first exchange frames of equal
size, which carry the marks and small messages; larger messages follow by the backend's collective.
A rank that dies, stops or raises is named by the watchdog.

NCCL's all-reduces and broadcasts carry no marks: reading one would wait for the device.
"""

import builtins
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from math import prod
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from shardemb import exceptions, kernels
from shardemb.comm.shared_memory import HostRanks, Message, meet
from shardemb.comm.watchdog import PeerWatchdog, step, watch
from shardemb.exceptions import RanksDisagreeError

MAX, MIN, SUM = dist.ReduceOp.MAX, dist.ReduceOp.MIN, dist.ReduceOp.SUM
_REDUCE: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    SUM: torch.add,
    MAX: torch.maximum,
    MIN: torch.minimum,
}
#: fewest and most bytes after a frame's head: 512 bytes are as fast as 8, and padding costs bytes
_FEWEST_BYTES, _MOST_BYTES = 488, 32768
#: 64-bit numbers of a frame's head: mark, bytes for this rank, most bytes for any rank
_HEAD = 3


class _Capacity:
    """Bytes of a group's frames. Changes only by values that all ranks have received."""

    def __init__(self) -> None:
        self.bytes, self._small = _FEWEST_BYTES, 0

    def adapt(self, most: int) -> None:
        """Grow to 9/8 of a lookup's ids; shrink after 16 lookups of less than half."""
        self._small = self._small + 1 if most < self.bytes // 2 else 0
        if self.bytes < most <= _MOST_BYTES or self._small > 16:
            self.bytes, self._small = max(_FEWEST_BYTES, (most + most // 8) // 8 * 8), 0


_capacities: WeakKeyDictionary[PeerWatchdog, _Capacity] = WeakKeyDictionary()
_host_ranks: WeakKeyDictionary[PeerWatchdog, HostRanks | None] = WeakKeyDictionary()


class Frame:
    """The messages of all ranks in one collective of the backend; used as :class:`Message`."""

    def __init__(
        self, group: Any, data: Tensor, sizes: Sequence[int] | None, mark: int, operation: str
    ) -> None:
        watchdog = watch(group)
        self._capacity = _capacities.setdefault(watchdog, _Capacity())
        data = data if _is_nccl(group) else data.cpu()
        own_sizes = [len(data) for _ in watchdog.ranks] if sizes is None else sizes
        most, head_bytes = max(own_sizes), 8 * _HEAD
        frames = data.new_zeros(len(own_sizes), head_bytes + self._capacity.bytes)
        heads = torch.tensor([[mark, size, most] for size in own_sizes])
        frames[:, :head_bytes] = heads.view(torch.uint8).to(data.device)
        if most <= self._capacity.bytes:
            begin = 0
            for frame, size in zip(frames, own_sizes, strict=True):
                frame[head_bytes : head_bytes + size] = data[begin : begin + size]
                begin += size if sizes else 0
        arrived = torch.empty_like(frames)
        work = dist.all_to_all_single(arrived, frames, group=group, async_op=True)
        watchdog.wait(work, operation)
        heads = arrived[:, :head_bytes].contiguous().view(torch.int64)
        #: of each rank
        self.marks, self.sizes, largest = zip(*heads.tolist(), strict=True)
        self._most = max(largest)
        self.fits = self._most <= self._capacity.bytes
        self._payload = arrived[:, head_bytes:]

    def part(self, rank: int) -> Tensor:
        """Return the bytes from a rank for this one."""
        return self._payload[rank, : self.sizes[rank]]

    def adapt(self) -> None:
        """Let the next frames carry as much as this one should have."""
        self._capacity.adapt(self._most)


def _is_nccl(group: Any) -> bool:
    return dist.get_backend(group) == "nccl"


def _memory(group: Any, tensor: Tensor) -> HostRanks | None:
    """Return the ranks of this machine if they can exchange the tensor through its memory."""
    watchdog = watch(group)
    if tensor.device.type != "cpu" or not watchdog.slices:
        return None
    if watchdog not in _host_ranks:

        def gather_by_frames(value: Any) -> list[Any]:
            text, operation = _as_bytes(json.dumps(value)), "do ranks share memory?"
            return _values(
                _gathered(Frame(group, text, None, 0, operation), text, group, operation)
            )

        _host_ranks[watchdog] = meet(*rank_and_size(group), gather_by_frames)
    return _host_ranks[watchdog]


def _send(
    group: Any, tensor: Tensor, operation: str, sent: Sequence[int] | None = None, mark: int = 0
) -> Message | Frame:
    """Send all ranks a tensor, or ``sent`` of its rows to each; return their messages."""
    data, host_ranks = tensor.contiguous().reshape(-1).view(torch.uint8), _memory(group, tensor)
    sizes = None if sent is None else [count * _row_bytes(tensor) for count in sent]
    if host_ranks is None:
        return Frame(group, data, sizes, mark, operation)
    message = host_ranks.send(data, sizes, mark)
    watch(group).wait(message, operation)
    return message.read()


def _exchange(
    group: Any,
    tensor: Tensor,
    operation: str,
    sent: Sequence[int] | None = None,
    failed: bool = False,
) -> Message | Frame:
    """Send marked messages; RanksDisagreeError unless all ranks are in the same operation.

    ``failed`` is the lowest bit of the mark.
    """
    mark = zlib.crc32(operation.encode()) << 1
    message = _send(group, tensor, operation, sent, mark | failed)
    if any(other >> 1 != mark >> 1 for other in message.marks):
        text = _as_bytes(f"in step {step()}, {operation}"[: _FEWEST_BYTES // 4])
        texts = _send(group, text, operation)
        places = [f"rank {rank} {_text(texts.part(rank))}" for rank in range(len(message.marks))]
        raise RanksDisagreeError(
            f"ranks are in different operations: {'; '.join(places)}: every rank must make the same"
            " lookups, backward passes, steps and saves in the same order"
        )
    return message


def _as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _text(data: Tensor) -> str:
    return data.cpu().numpy().tobytes().decode(errors="replace")


def _values(texts: Sequence[Tensor]) -> list[Any]:
    return [json.loads(_text(text)) for text in texts]


def _row_bytes(tensor: Tensor) -> int:
    return tensor.itemsize * prod(tensor.shape[1:])


def _require_sizes(got: Sequence[int], expected: Sequence[int]) -> None:
    for rank, (size, wanted) in enumerate(zip(got, expected, strict=False)):
        if size != wanted:
            raise RuntimeError(f"rank {rank} of this group sent {size} bytes, expected {wanted}")


def check(group: Any, operation: str) -> None:
    """Raise RanksDisagreeError unless all ranks call this with the same ``operation``."""
    if not _is_nccl(group):
        _exchange(group, torch.empty(0), operation)


@dataclass(frozen=True)
class Arrived:
    """The rows that an all-to-all brings."""

    #: (M, ...), in the order of ranks
    rows: Tensor
    #: rows from each rank
    counts: list[int]
    #: whether a rank has failed
    failed: bool = False
    #: waits until :attr:`rows` are there
    wait: Callable[[], None] = lambda: None


def all_to_all(
    tensor: Tensor,
    sent: Sequence[int],
    received: Sequence[int] | None = None,
    *,
    group: Any,
    operation: str,
    failed: bool = False,
    continues: bool = False,
    wait: bool = True,
) -> Arrived:
    """Send each rank ``sent`` rows of ``tensor`` ``(n, ...)``.

    Args:
        tensor: rows in the order of ranks.
        sent: rows for each rank.
        received: rows from each rank; None if unknown.
        group: None for the default one.
        operation: for errors; the same on all ranks.
        failed: tell all ranks that this one has an error; nothing else is sent.
        continues: ranks are in the same operation for sure, as another all-to-all of it has ended.
        wait: until all rows are there.

    Raises:
        RanksDisagreeError: on all ranks, if they are in different operations.
        RuntimeError: a rank sent another number of rows than ``received``.
    """
    row_bytes = _row_bytes(tensor)
    known = received is not None and (continues or _is_nccl(group))
    if not known or _memory(group, tensor) is not None:
        message = _exchange(group, tensor, operation, sent, failed)
        _require_sizes(message.sizes, [count * row_bytes for count in received or ()])
        if received is None:
            message.adapt()
            received = [size // row_bytes for size in message.sizes]
        if failed := any(mark & 1 for mark in message.marks):
            return Arrived(tensor[:0], list(received), failed)
    else:
        message = None
    assert received is not None
    rows = kernels.empty((sum(received), *tensor.shape[1:]), tensor.dtype, tensor.device)
    arrived = Arrived(rows, list(received))
    if message is not None and message.fits:
        begin, data = 0, rows.view(-1).view(torch.uint8)
        for rank, size in enumerate(message.sizes):
            if size:
                data[begin : begin + size] = message.part(rank)
                begin += size
        return arrived
    work = dist.all_to_all_single(rows, tensor, received, sent, group=group, async_op=True)
    arrives = partial(watch(group).wait, work, operation)
    if not wait:
        return replace(arrived, wait=arrives)
    arrives()
    return arrived


def all_reduce(tensor: Tensor, op: Any = SUM, *, group: Any = None, operation: str) -> None:
    """Reduce a tensor in place, in the order of ranks; does nothing on one rank."""
    if rank_and_size(group)[1] == 1:
        return
    whole = tensor.contiguous()
    if not _is_nccl(group):
        message = _exchange(group, whole, operation)
        _require_sizes(message.sizes, [whole.nbytes] * len(message.sizes))
        if message.fits and op in _REDUCE:
            parts = [message.part(rank).view(whole.dtype) for rank in range(len(message.sizes))]
            tensor.copy_(reduce(_REDUCE[op], parts).view(whole.shape))
            return
    watch(group).wait(dist.all_reduce(whole, op, group=group, async_op=True), operation)
    if whole is not tensor:
        tensor.copy_(whole)


def rank_and_size(group: Any = None) -> tuple[int, int]:
    """Return rank and world size; 0 and 1 without a process group."""
    return (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)


def broadcast(tensor: Tensor, *, group: Any = None, operation: str) -> None:
    """Copy rank 0's tensor to all ranks, in place."""
    if not _is_nccl(group):
        rank = dist.get_rank(group)
        message = _exchange(group, tensor if rank == 0 else tensor.new_empty(0), operation)
        _require_sizes(message.sizes, [tensor.nbytes])
        if message.fits:
            if rank:
                tensor.copy_(message.part(0).view(tensor.dtype).view(tensor.shape))
            return
    watch(group).wait(dist.broadcast(tensor, 0, group=group, async_op=True), operation)


def all_gather_rows(tensor: Tensor, *, group: Any = None, operation: str) -> Tensor:
    """Return all ranks' rows ``(n, ...)``, in the order of ranks; ``n`` may differ."""
    if rank_and_size(group)[1] == 1:
        return tensor
    if not _row_bytes(tensor):  # bytes tell no number of rows
        rows = sum(gather(len(tensor), group=group, operation=operation))
        return tensor.new_empty(rows, *tensor.shape[1:])
    sent = tensor.cuda() if _is_nccl(group) else tensor
    return torch.cat(_gathered(_exchange(group, sent, operation), sent, group, operation)).to(
        tensor.device
    )


def _gathered(message: Message | Frame, tensor: Tensor, group: Any, operation: str) -> list[Tensor]:
    """Return the rows of all ranks, until the next message."""
    shape = tensor.shape[1:]
    if message.fits:
        parts = [message.part(rank) for rank in range(len(message.sizes))]
        return [part.view(tensor.dtype).view(-1, *shape) for part in parts]
    counts = [size // _row_bytes(tensor) for size in message.sizes]
    padded = tensor.new_zeros((max(counts), *shape))
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in counts]
    watch(group).wait(dist.all_gather(parts, padded, group=group, async_op=True), operation)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


def gather(value: Any, *, group: Any = None, operation: str) -> list[Any]:
    """Return each rank's JSON value, in the order of ranks; tuples become lists."""
    if not dist.is_initialized():
        return [value]
    text = _as_bytes(json.dumps(value))
    text = text.cuda() if _is_nccl(group) else text
    return _values(_gathered(_exchange(group, text, operation), text, group, operation))


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
