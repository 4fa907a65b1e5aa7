"""safetensors files (https://github.com/huggingface/safetensors), written and read in slices.

Its own library holds a whole file in memory to write it. Here a file is hashed while it is written,
straight from the tensors, and read straight into them, so that neither needs memory of its own.
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

#: bytes that are on their way at a time
CHUNK_BYTES = 1 << 24

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL", torch.complex64: "C64",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True)
class Layout:
    """Where a tensor lies in a file."""

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
    return (
        memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
        if tensor.numel()
        else memoryview(b"")
    )


def row_chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Go over the rows of a tensor in contiguous CPU chunks.

    A contiguous CPU tensor is not copied.
    """
    rows = tensor.detach() if tensor.dim() else tensor.detach().reshape(1)
    step = max(1, CHUNK_BYTES // max(1, rows.itemsize * math.prod(rows.shape[1:])))
    for start in range(0, len(rows), step):
        yield rows[start : start + step].cpu().contiguous()


class Writer:
    """Writes to a file and hashes on the way, at the speed of the slower of both."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        #: bytes written
        self.size = 0

    def write(self, chunks: Iterable[Any]) -> None:
        """Write buffers."""
        with ThreadPoolExecutor(1) as hasher:
            hashed = None
            for chunk in chunks:
                pending = hasher.submit(self._sha256.update, chunk)
                self._file.write(chunk)
                self.size += len(chunk)
                if hashed is not None:
                    hashed.result()
                hashed = pending

    def sha256(self) -> str:
        """Return the hash of all that was written."""
        return self._sha256.hexdigest()


def header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """Return the beginning of a file that holds tensors of these dtypes and shapes.

    In this order.
    """
    entries, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write(file: BinaryIO, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write tensors; return size and sha256 of the file."""
    # tensors of larger elements first, so that each is aligned
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))
    writer = Writer(file)
    writer.write([header({name: (t.dtype, tuple(t.shape)) for name, t in ordered.items()})])
    writer.write(as_bytes(chunk) for tensor in ordered.values() for chunk in row_chunks(tensor))
    return writer.size, writer.sha256()


def layouts(file: BinaryIO) -> dict[str, Layout]:
    """Read the header of a file; ValueError if it is none."""
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= size - 8:
        raise InputError(f"got a header of {length} bytes in a file of {size}")
    found = {}
    try:
        for name, entry in json.loads(file.read(length)).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                layout = Layout(_DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + begin)
                if (
                    end - begin != layout.dtype.itemsize * math.prod(layout.shape)
                    or not 0 <= begin <= end <= size - 8 - length
                ):
                    raise InputError(f"tensor {name!r} does not lie within the file")
                found[name] = layout
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"got a header that is not one of safetensors ({error!r})") from error
    return found


def read_into(file: BinaryIO, place: int, out: Tensor) -> None:
    """Fill a contiguous CPU tensor with the bytes from ``place`` on.

    EOFError if there are too few.
    """
    view, done = as_bytes(out), 0
    file.seek(place)
    while done < len(view):
        got = file.readinto(view[done : done + (1 << 30)])  # type: ignore[attr-defined]
        if not got:
            raise EOFError(f"got {done} bytes from {place} on, expected {len(view)}")
        done += got


def read_rows(file: BinaryIO, layout: Layout, start: int, out: Tensor) -> None:
    """Fill ``out`` ``(n, ...)`` with rows ``[start, start + n)``.

    Cast and moved to its device if need be.
    """
    place = layout.start + start * layout.row_bytes
    if out.device.type == "cpu" and out.dtype == layout.dtype and out.is_contiguous():
        read_into(file, place, out)
        return
    rows = out if out.dim() else out.reshape(1)
    step = max(1, CHUNK_BYTES // max(1, layout.row_bytes))
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        buffer = torch.empty(part.shape, dtype=layout.dtype)
        read_into(file, place + first * layout.row_bytes, buffer)
        part.copy_(buffer)


def sha256_of(file: BinaryIO) -> str:
    """Return the sha256 of all of a file."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 22))
    file.seek(0)
    while got := file.readinto(buffer):  # type: ignore[attr-defined]
        digest.update(buffer[:got])
    return digest.hexdigest()
