"""Collectives between ranks that share one machine's memory.

Between two processes that are at work, gloo takes over a millisecond for a message of half a
megabyte: a thread of its own must be woken on both sides. Here a rank copies its message into
memory that all of them have mapped, and raises a flag.

Each rank has a file in ``/dev/shm``, unlinked as soon as all have opened it, with room for two
messages. A rank writes the message of its next collective but one over this one's only when all
others have raised their flags for the next, and so have read this one's. It holds a lock on a
second file, which ends with the process: so others learn of its end. (A process loses its lock on a
file as soon as it closes any descriptor of it, and a mapping that goes closes one.)
"""

import fcntl
import mmap
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import reduce
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardemb import kernels

#: bytes that a message has room for at first, and at most; larger ones go the ordinary way
FIRST_BYTES, MOST_BYTES = 1 << 20, 64 << 20
_HEAD_BYTES = 8192
#: 64-bit numbers before the headers: two flags, each in a cache line of its own
_FLAGS = 16
#: 64-bit numbers of a header before the ends: bytes of the message (-1: there was no room), where
#: it begins in the file
_HEAD = 2
#: as many ranks' ends as two headers have room for
MOST_RANKS = (_HEAD_BYTES // 8 - _FLAGS) // 2 - _HEAD - 1
_FOLDER = Path("/dev/shm")
#: seconds in which one question for the flags is repeated, with Python's lock released
_AWAKE = 0.0001

_REDUCE: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    dist.ReduceOp.SUM: torch.add,
    dist.ReduceOp.MAX: torch.maximum,
    dist.ReduceOp.MIN: torch.minimum,
}


class _Memory:
    """One rank's file: flags, headers, and room for messages."""

    def __init__(self, file: IO[bytes], lock: IO[bytes], world_size: int) -> None:
        self._file, self._lock = file, lock
        self._map()
        numbers = self._bytes[:_HEAD_BYTES].view(torch.int64)
        self.flags = [kernels.Flag(numbers[0:1]), kernels.Flag(numbers[8:9])]
        #: ``(2, ...)``: bytes, begin, where the part for each rank begins, and the last one ends
        self.heads = (
            numbers[_FLAGS : _FLAGS + 2 * (_HEAD + world_size + 1)].view(2, -1).numpy()
        )  # a number in 0.1 us
        #: of each of two messages, in the owner's process
        self._begins, self._room = [_HEAD_BYTES, _HEAD_BYTES + FIRST_BYTES], FIRST_BYTES

    def _map(self) -> None:
        descriptor = self._file.fileno()
        self._bytes = torch.frombuffer(
            mmap.mmap(descriptor, os.fstat(descriptor).st_size), dtype=torch.uint8
        )

    def make_room(self, half: int, size: int) -> Tensor | None:
        """Return memory ``(size,)`` for a message, and say in its header where it lies.

        Without room None, and -1 there.
        """
        head = self.heads[half]
        if self._room < size <= MOST_BYTES:
            room, end = max(2 * self._room, size), len(self._bytes)
            with suppress(OSError):
                _reserve(self._file, end + 2 * room)
                self._map()
                self._begins, self._room = [end, end + room], room
        head[0], head[1] = size if size <= self._room else -1, self._begins[half]
        return self._bytes[self._begins[half] :][:size] if size <= self._room else None

    def message(self, half: int) -> Tensor:
        """Return a message ``(bytes,)`` of this rank."""
        size, begin = self.heads[half, :_HEAD].tolist()
        if begin + size > len(self._bytes):  # its owner has made more room
            self._map()
        return self._bytes[begin : begin + size]

    def is_alive(self) -> bool:
        """Return whether the owner, another process, still holds its lock."""
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        fcntl.lockf(self._lock, fcntl.LOCK_UN)
        return False


class HostRanks:
    """The ranks of a process group that share this machine's memory.

    Args:
        rank: this one.
        files: of all ranks, open: memory and lock.
    """

    def __init__(self, rank: int, files: Sequence[tuple[IO[bytes], IO[bytes]]]) -> None:
        self.rank, self.world_size = rank, len(files)
        self.memories = [_Memory(file, lock, self.world_size) for file, lock in files]
        self.others = [other for other in range(self.world_size) if other != rank]
        self.flags = [
            kernels.Flags([self.memories[other].flags[half] for other in self.others])
            for half in (0, 1)
        ]
        self._number = 0

    def send(self, tensor: Tensor, sent: Sequence[int] | None = None) -> "Message":
        """Give all ranks a contiguous tensor on the CPU, or ``sent`` of its rows to each.

        And return what to wait for.
        """
        self._number += 1
        half, mine = self._number % 2, self.memories[self.rank]
        size = tensor.numel() * tensor.itemsize
        room = mine.make_room(half, size)
        ends = [0, size]
        if room is not None:
            data = tensor.reshape(-1).view(torch.uint8)
            if sent is None:
                room.copy_(data)
            else:
                row = size // max(1, len(tensor))
                ends = [0]
                for rank, count in enumerate(sent):
                    begin, end = ends[-1], ends[-1] + count * row
                    if rank != self.rank and end > begin:
                        room[begin:end].copy_(data[begin:end])
                    ends.append(end)
            mine.heads[half, _HEAD : _HEAD + len(ends)] = ends
        mine.flags[half].raise_to(self._number)
        return Message(self, self._number, tensor)


class Message:
    """The messages of all ranks in one collective; waited for as torch's works are."""

    def __init__(self, neighbours: HostRanks, number: int, tensor: Tensor) -> None:
        self._near, self._number, self._half, self._mine = neighbours, number, number % 2, tensor
        self._over = False

    def is_completed(self) -> bool:
        """Return whether all messages are there, or will not come any more."""
        return self._over or self._reached(_AWAKE, _AWAKE) == len(self._near.others)

    def _reached(self, awake: float, limit: float) -> int:
        return self._near.flags[self._half].reached(self._number, awake, limit)

    def wait(self, limit: timedelta = timedelta()) -> None:
        """Return when all are there.

        Raises:
            RuntimeError: they are not after the time; or a rank's process has ended.
        """
        reached = self._reached(0.0, limit.total_seconds())
        if reached == len(self._near.others):
            return
        other = self._near.others[reached]
        if self._near.memories[other].is_alive():
            raise RuntimeError(f"no message of rank {other}")
        if self._reached(0.0, 0.0) < len(self._near.others):  # it may have written before it ended
            self._over = True
            raise RuntimeError(f"the process of rank {other} of this group has ended")

    def fits(self) -> bool:
        """Return whether there was room for all ranks' messages, so that they can be read."""
        return all(memory.heads[self._half, 0] >= 0 for memory in self._near.memories)

    def scatter(self, out: Tensor, received: Sequence[int]) -> None:
        """Put the rows that each rank has sent to this one into ``out``.

        RuntimeError if they are not as many as expected.
        """
        row = out.numel() * out.itemsize // max(1, len(out))
        arriving, at, me = out.view(-1).view(torch.uint8), 0, self._near.rank
        for other, (memory, count) in enumerate(zip(self._near.memories, received, strict=True)):
            begin, end = memory.heads[self._half, _HEAD + me : _HEAD + me + 2].tolist()
            if count and end - begin != count * row:
                raise RuntimeError(
                    f"rank {other} of this group sent {end - begin} bytes, expected {count * row}"
                )
            if count:
                data = (
                    self._mine.reshape(-1).view(torch.uint8)
                    if other == me
                    else memory.message(self._half)
                )
                arriving[at : at + count * row].copy_(data[begin:end])
                at += count * row

    def reduce(self, tensor: Tensor, op: Any) -> None:
        """Put the reduction of all ranks' tensors, in the order of the ranks, into ``tensor``.

        RuntimeError for other sizes.
        """
        size, parts = tensor.numel() * tensor.itemsize, []
        for other, memory in enumerate(self._near.memories):
            parts.append(memory.message(self._half))
            if len(parts[-1]) != size:
                raise RuntimeError(
                    f"rank {other} of this group sent {len(parts[-1])} bytes, expected {size}"
                )
        tensor.copy_(
            reduce(_REDUCE[op], [part.view(tensor.dtype).view(tensor.shape) for part in parts])
        )


def reduces(op: Any) -> bool:
    """Return whether :meth:`Message.reduce` knows an operation."""
    return op in _REDUCE


def meet(rank: int, world_size: int, gather: Callable[[Any], list[Any]]) -> HostRanks | None:
    """Return the neighbours, or None on all ranks if they do not share memory. A collective.

    They do not on several machines, or in containers that have each a ``/dev/shm`` of their own or
    too little room in it; without a C compiler; and if ``SHARDEMB_SHARED_MEMORY`` is 0.

    Args:
        rank: of this process in its group.
        world_size: of the group.
        gather: brings a value of each rank to all.
    """
    path = _FOLDER / f"shardemb-{secrets.token_hex(16)}"
    files: list[tuple[IO[bytes], IO[bytes]]] = []
    try:
        mine = _make(path) if _is_usable(world_size) else None
        names = gather(None if mine is None else path.name)
        if mine is not None and None not in names:
            with suppress(OSError):
                files.extend(
                    mine if other == rank else _open(_FOLDER / names[other])
                    for other in range(world_size)
                )
        met = all(gather(len(files) == world_size))
    finally:
        path.unlink(missing_ok=True)
        _lock_of(path).unlink(missing_ok=True)
    return HostRanks(rank, files) if met else None


def _is_usable(world_size: int) -> bool:
    wanted = os.environ.get("SHARDEMB_SHARED_MEMORY", "1") != "0"
    return wanted and kernels.why_not() is None and _FOLDER.is_dir() and world_size <= MOST_RANKS


def _lock_of(path: Path) -> Path:
    return path.with_suffix(".lock")


def _open(path: Path) -> tuple[IO[bytes], IO[bytes]]:
    return path.open("r+b"), _lock_of(path).open("r+b")


def _make(path: Path) -> tuple[IO[bytes], IO[bytes]] | None:
    """Make this rank's files, and lock the second; None where there is no room."""
    try:
        for each in (path, _lock_of(path)):
            each.touch(0o600, exist_ok=False)
        file, lock = _open(path)
        _reserve(file, _HEAD_BYTES + 2 * FIRST_BYTES)
        fcntl.lockf(lock, fcntl.LOCK_EX)
    except OSError:
        return None
    return file, lock


def _reserve(file: IO[bytes], size: int) -> None:
    """Let a file have memory for so many bytes, OSError if there is none.

    A write beyond it would end the process.
    """
    os.posix_fallocate(file.fileno(), 0, size)
