"""Reads and writes safetensors files (https://github.com/huggingface/safetensors) in slices.

Unlike the ``safetensors`` package, it needs no memory for a whole file, and hashes while writing.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from shardemb.exceptions import InputError

#: bytes copied or converted at a time
CHUNK_BYTES = 1 << 24

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL", torch.complex64: "C64",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
#: dtypes that a file can hold, by torch's names
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _NAMES}


@dataclass(frozen=True)
class Layout:
    """Position of a tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    #: first byte
    start: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, or of a scalar."""
        return self.dtype.itemsize * math.prod(self.shape[1:])


def as_bytes(tensor: Tensor) -> memoryview:
    """View a contiguous CPU tensor's memory."""
    if not tensor.numel():
        return memoryview(b"")
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)


def row_chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Iterate over rows in contiguous CPU chunks, without a copy if possible."""
    rows = tensor.detach() if tensor.dim() else tensor.detach().reshape(1)
    step = max(1, CHUNK_BYTES // max(1, rows.itemsize * math.prod(rows.shape[1:])))
    for start in range(0, len(rows), step):
        yield rows[start : start + step].cpu().contiguous()


class Writer:
    """Writes and hashes a file in parallel."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        #: bytes written
        self.size = 0

    def write(self, chunks: Iterable[Any]) -> None:
        """Write buffers."""
        with ThreadPoolExecutor(1) as hasher:
            previous = None
            for chunk in chunks:
                pending = hasher.submit(self._sha256.update, chunk)
                self._file.write(chunk)
                self.size += len(chunk)
                if previous is not None:
                    previous.result()
                previous = pending

    def sha256(self) -> str:
        """Return the hash of all written bytes."""
        return self._sha256.hexdigest()


def header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """Return the header of a file with these tensors, in this order."""
    entries, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write(file: BinaryIO, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write tensors; returns the file's size and sha256."""
    # larger elements first keeps all tensors aligned
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))
    writer = Writer(file)
    writer.write([header({name: (t.dtype, tuple(t.shape)) for name, t in ordered.items()})])
    writer.write(as_bytes(chunk) for tensor in ordered.values() for chunk in row_chunks(tensor))
    return writer.size, writer.sha256()


def parse_json(text: bytes) -> Any:
    """Parse untrusted JSON; ValueError if it is malformed, too deep or repeats a key."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            raise InputError(f"a key occurs twice among {[key for key, _ in pairs][:10]}")
        return entries

    try:
        return json.loads(text.decode(), object_pairs_hook=unique)
    except RecursionError:
        raise InputError("lists and objects are nested too deeply") from None


def layouts(file: BinaryIO) -> dict[str, Layout]:
    """Read a file's header; ValueError if it is malformed, or its tensors leave gaps."""
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= size - 8:
        raise InputError(f"got a header of {length} bytes in a file of {size}")
    entries = parse_json(file.read(length))
    if not isinstance(entries, dict):
        raise InputError("got a header that is not one of safetensors: expected an object")
    entries.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in entries.items():
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
                known = dtype in _DTYPES and all(type(n) is int and 0 <= n < 1 << 48 for n in shape)
            case _:
                known = False
        if not known:
            raise InputError(
                f"got a header that is not one of safetensors: tensor {name!r} is {str(entry)[:80]}"
            )
        if end - begin != _DTYPES[dtype].itemsize * math.prod(shape):
            raise InputError(f"tensor {name!r} of shape {shape} has {end - begin} bytes")
        tensors[name] = Layout(_DTYPES[dtype], tuple(shape), 8 + length + begin)
        spans.append((begin, end, name))
    place = 0
    for begin, end, name in sorted(spans):
        if begin != place or end > size - 8 - length:
            raise InputError(f"tensor {name!r} does not lie within the file, after those before it")
        place = end
    return tensors


def read_into(file: BinaryIO, place: int, out: Tensor) -> None:
    """Fill a contiguous CPU tensor with the bytes from ``place`` on, or raise EOFError."""
    view, done = as_bytes(out), 0
    file.seek(place)
    while done < len(view):
        size = file.readinto(view[done : done + (1 << 30)])  # type: ignore[attr-defined]
        if not size:
            raise EOFError(f"got {done} bytes from {place} on, expected {len(view)}")
        done += size


def read_rows(file: BinaryIO, layout: Layout, start: int, out: Tensor) -> None:
    """Read rows ``[start, start + n)`` into ``out`` ``(n, ...)``, in its dtype and device."""
    place = layout.start + start * layout.row_bytes
    if out.device.type == "cpu" and out.dtype == layout.dtype and out.is_contiguous():
        read_into(file, place, out)
        return
    rows = out if out.dim() else out.reshape(1)
    step = max(1, CHUNK_BYTES // max(1, layout.row_bytes))
    for first in range(0, len(rows), step):
        chunk = rows[first : first + step]
        buffer = torch.empty(chunk.shape, dtype=layout.dtype)
        read_into(file, place + first * layout.row_bytes, buffer)
        chunk.copy_(buffer)
