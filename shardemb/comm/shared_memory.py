"""Collectives between ranks of one machine, through shared memory.

gloo takes over a millisecond for half a megabyte between two busy processes, because it wakes a
thread on both sides. This module copies messages into mapped memory, and raises a flag.

Each rank has a file in ``/dev/shm``, unlinked as soon as all have opened it, with two message
buffers. A rank reuses the buffer of message n for message n + 2 after all others have raised their
flags for message n + 1, and so have read message n. A lock on a second file ends with the process,
which shows its end. The file is separate, because closing any descriptor of a file, as unmapping
does, releases the process's lock on it.
"""

import fcntl
import mmap
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from shardemb import kernels
from shardemb.utils import logs

#: initial and largest bytes of a message buffer; larger messages go through gloo
FIRST_BYTES, MOST_BYTES = 1 << 20, 64 << 20
_HEAD_BYTES = 8192
#: 64-bit numbers before the headers: two flags, one per cache line
_FLAGS = 16
#: 64-bit numbers of a header before the ends: the message's bytes (-1: too large), offset and mark
_HEAD = 3
#: ranks whose ends fit two headers
MOST_RANKS = (_HEAD_BYTES // 8 - _FLAGS) // 2 - _HEAD - 1
_FOLDER = Path("/dev/shm")
#: seconds of one poll of the flags, with Python's lock released
_AWAKE = 0.0001

_log = logs.logger(__name__)


class _Memory:
    def __init__(self, file: IO[bytes], lock: IO[bytes], world_size: int) -> None:
        self._file, self._lock = file, lock
        self._map()
        numbers = self._bytes[:_HEAD_BYTES].view(torch.int64)
        self.flags = [kernels.Flag(numbers[0:1]), kernels.Flag(numbers[8:9])]
        heads = numbers[_FLAGS : _FLAGS + 2 * (_HEAD + world_size + 1)].view(2, -1)
        #: ``(2, ...)``: bytes, offset, and the bounds of the rows for each rank
        self.heads = heads.numpy()  # reads a number in 0.1 us
        #: offsets of the two buffers; valid in the owner's process
        self._begins, self._capacity = [_HEAD_BYTES, _HEAD_BYTES + FIRST_BYTES], FIRST_BYTES

    def _map(self) -> None:
        descriptor = self._file.fileno()
        mapped = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
        self._bytes = torch.frombuffer(mapped, dtype=torch.uint8)

    def reserve(self, half: int, size: int) -> Tensor | None:
        """Return a buffer ``(size,)`` and fill its header; None if too large."""
        if self._capacity < size <= MOST_BYTES:
            capacity, end = max(2 * self._capacity, -(-size // 64) * 64), len(self._bytes)
            with suppress(OSError):
                _reserve(self._file, end + 2 * capacity)
                self._map()
                self._begins, self._capacity = [end, end + capacity], capacity
        fits, begin = size <= self._capacity, self._begins[half]
        self.heads[half, :2] = size if fits else -1, begin
        return self._bytes[begin : begin + size] if fits else None

    def read(self, begin: int, end: int) -> Tensor:
        """Return bytes of the file, which its owner may have enlarged."""
        if end > len(self._bytes):
            self._map()
        return self._bytes[begin:end]

    def is_alive(self) -> bool:
        """Whether the owner, another process, still holds its lock."""
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        fcntl.lockf(self._lock, fcntl.LOCK_UN)
        return False


class HostRanks:
    """The ranks of a process group that share this machine's memory."""

    def __init__(self, rank: int, files: Sequence[tuple[IO[bytes], IO[bytes]]]) -> None:
        self.rank, self.world_size = rank, len(files)
        self.memories = [_Memory(file, lock, self.world_size) for file, lock in files]
        self.others = [other for other in range(self.world_size) if other != rank]
        self.flags = [
            kernels.Flags([self.memories[other].flags[half] for other in self.others])
            for half in (0, 1)
        ]
        self._number = 0

    def send(self, data: Tensor, sizes: Sequence[int] | None, mark: int) -> "Message":
        """Send all ranks the bytes ``data``, or each the next ``sizes`` of them."""
        self._number += 1
        half, memory = self._number % 2, self.memories[self.rank]
        ends = [0, *accumulate([len(data)] if sizes is None else sizes)]
        buffer = memory.reserve(half, len(data))
        if buffer is not None and sizes is None:
            buffer.copy_(data)
        elif buffer is not None:
            for other in self.others:
                begin, end = ends[other], ends[other + 1]
                if end > begin:
                    buffer[begin:end].copy_(data[begin:end])
        memory.heads[half, 2 : _HEAD + len(ends)] = [mark, *ends]
        memory.flags[half].raise_to(self._number)
        return Message(self, self._number, data, sizes is None)


class Message:
    """The messages of all ranks in one collective, with the interface of torch's Work."""

    #: of each rank; set by :meth:`read`, as ``sizes``, bytes for this rank
    marks: list[int]
    sizes: list[int]
    #: whether all messages fitted their buffers
    fits: bool

    def __init__(self, host_ranks: HostRanks, number: int, data: Tensor, whole: bool) -> None:
        self._ranks, self._number, self._half, self._own = host_ranks, number, number % 2, data
        self._first = _HEAD if whole else _HEAD + host_ranks.rank
        self._failed = False

    def is_completed(self) -> bool:
        """Whether all messages have arrived, or one never will."""
        return self._failed or self._reached(_AWAKE, _AWAKE) == len(self._ranks.others)

    def _reached(self, awake: float, limit: float) -> int:
        return self._ranks.flags[self._half].reached(self._number, awake, limit)

    def wait(self, limit: timedelta = timedelta()) -> None:
        """Wait for all messages; RuntimeError after the limit, or if a process has ended."""
        reached = self._reached(0.0, limit.total_seconds())
        if reached == len(self._ranks.others):
            return
        other = self._ranks.others[reached]
        if self._ranks.memories[other].is_alive():
            raise RuntimeError(f"no message of rank {other}")
        # it may have written before it ended
        if self._reached(0.0, 0.0) < len(self._ranks.others):
            self._failed = True
            raise RuntimeError(f"the process of rank {other} of this group has ended")

    def read(self) -> "Message":
        """Read the headers, once all messages have arrived."""
        heads = [memory.heads[self._half].tolist() for memory in self._ranks.memories]
        self.fits = all(head[0] >= 0 for head in heads)
        self.marks = [head[2] for head in heads]
        self._begins = [head[self._first] for head in heads]
        self._offsets = [head[1] for head in heads]
        self.sizes = [head[self._first + 1] - head[self._first] for head in heads]
        return self

    def part(self, rank: int) -> Tensor:
        """Return the bytes from a rank for this one, until the next message."""
        begin, end = self._begins[rank], self._begins[rank] + self.sizes[rank]
        if rank == self._ranks.rank:
            return self._own[begin:end]
        offset = self._offsets[rank]
        return self._ranks.memories[rank].read(offset + begin, offset + end)

    def adapt(self) -> None:
        """See Frame; buffers grow by themselves."""


def meet(rank: int, world_size: int, gather: Callable[[Any], list[Any]]) -> HostRanks | None:
    """Return the ranks of this machine, or None on all ranks if any cannot share its memory.

    A collective. Not shared: several machines, containers without a common and large enough
    ``/dev/shm``, no C compiler, ``SHARDEMB_SHARED_MEMORY=0``.
    """
    path = _FOLDER / f"shardemb-{secrets.token_hex(16)}"
    files: list[tuple[IO[bytes], IO[bytes]]] = []
    reason = _why_not(world_size)
    try:
        if reason is None:
            try:
                own = _make(path)
            except OSError as error:
                reason = f"{_FOLDER}: {error}"
        gathered = gather((path.name, reason))
        reasons = [f"rank {other}: {why}" for other, (_, why) in enumerate(gathered) if why]
        if not reasons:
            with suppress(OSError):  # files of another machine
                files.extend(
                    own if other == rank else _open(_FOLDER / name)
                    for other, (name, _) in enumerate(gathered)
                )
            if not all(gather(len(files) == world_size)):
                reasons = ["the ranks do not see each other's files: several machines?"]
    finally:
        path.unlink(missing_ok=True)
        _lock_of(path).unlink(missing_ok=True)
    if reasons:
        _log.info("shared memory is off for %d ranks: %s", world_size, "; ".join(reasons))
        return None
    _log.info("shared memory is on: %d ranks of one machine", world_size)
    return HostRanks(rank, files)


def _why_not(world_size: int) -> str | None:
    if os.environ.get("SHARDEMB_SHARED_MEMORY", "1") == "0":
        return "SHARDEMB_SHARED_MEMORY is 0"
    if kernels.why_not() is not None:
        return f"it needs the C kernels: {kernels.why_not()}"
    if not _FOLDER.is_dir():
        return f"there is no {_FOLDER}"
    return f"{world_size} ranks, at most {MOST_RANKS} fit" if world_size > MOST_RANKS else None


def _lock_of(path: Path) -> Path:
    return path.with_suffix(".lock")


def _open(path: Path) -> tuple[IO[bytes], IO[bytes]]:
    return path.open("r+b"), _lock_of(path).open("r+b")


def _make(path: Path) -> tuple[IO[bytes], IO[bytes]]:
    for new in (path, _lock_of(path)):
        new.touch(0o600, exist_ok=False)
    file, lock = _open(path)
    _reserve(file, _HEAD_BYTES + 2 * FIRST_BYTES)
    fcntl.lockf(lock, fcntl.LOCK_EX)
    return file, lock


def _reserve(file: IO[bytes], size: int) -> None:
    """Allocate a file's memory, or raise OSError; otherwise a write could kill the process."""
    os.posix_fallocate(file.fileno(), 0, size)
