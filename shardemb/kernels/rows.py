"""Loops over rows on the CPU in C, or else torch's operators.

The C compiler (``cc``, or ``$CC``) builds ``rows.c`` once, in under a second, into
``$XDG_CACHE_HOME/shardemb``. Without it, or with ``SHARDEMB_NATIVE=0``, torch's operators do the
same, more slowly. Callers check row numbers.
"""

import ctypes
import hashlib
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shardemb.exceptions import IdRangeError, OutOfMemoryError
from shardemb.utils import logs
from shardemb.utils.files import cache_folder
from shardemb.utils.types import RowFunction

_FLAGS = ("-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-shared", "-fPIC", "-lm")
#: smaller tensors come from memory that the C library holds
_HUGE_BYTES = 1 << 22
#: fewest rows for a thread
_ROWS_PER_THREAD = 2048
#: fewest rows of scores for a thread
_SCORES_PER_THREAD = 64
#: rows updated or constrained at a time: 512 to 2048 stay in cache, which halves the time
CHUNK_ROWS = 2048
#: madvise's MADV_HUGEPAGE
_MADV_HUGEPAGE = 14
#: the update rules' numbers in rows.c
RULES = {"sgd": 0, "adagrad": 1, "rowwise_adagrad": 2, "adam": 3, "rowwise_adam": 4}

#: result and arguments of the functions in rows.c: pointer, (64-bit) number, float, int
_SIGNATURES = {
    "gather": ("", "pnpnnp"),
    "scatter": ("", "pnpnnp"),
    "merge": ("n", "pnnpppp"),
    "sum_rows": ("", "pnppnnp"),
    "raise_flag": ("", "pn"),
    "flags_raised": ("n", "pnnnn"),
    "make_units": ("", "pnpnn"),
    "count_better": ("", "pnnpnnnp"),
    "distances": ("", "ppnninnp"),
    "update": ("", "ipppnppppnnfffffipp"),
}

_log = logs.logger(__name__)


@cache
def keep_freed_blocks() -> None:
    """Make glibc keep freed blocks of up to 32 MiB; once a process.

    By default it maps large blocks anew (mallopt(3), M_MMAP_THRESHOLD), and page faults are half of
    the time of a step of 4096 x 128.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Return an uninitialized tensor; a large CPU tensor has pages of 2 MiB, if Linux has them.

    With small pages, each random row costs a walk through the page table, and a new buffer of 32
    MiB spends most of its time on 8192 page faults.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    size = tensor.numel() * tensor.itemsize
    if size >= _HUGE_BYTES and tensor.device.type == "cpu":
        page = os.sysconf("SC_PAGESIZE")
        start = -(-tensor.data_ptr() // page) * page
        length = (tensor.data_ptr() + size - start) // page * page
        # only advice: small pages work too
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    return tensor


def contiguous(tensor: Tensor) -> Tensor:
    """Return the tensor, or a contiguous copy from :func:`empty`."""
    if tensor.is_contiguous():
        return tensor
    return empty(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


@cache
def _library() -> ctypes.CDLL | str:
    library = _load_library()
    _log.info("C kernels are %s", f"off: {library}" if isinstance(library, str) else "on")
    return library


def _load_library() -> ctypes.CDLL | str:
    if os.environ.get("SHARDEMB_NATIVE", "1") == "0":
        return "SHARDEMB_NATIVE is 0"
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return "no C compiler: install one (gcc, clang), or name it in CC"
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        text = getattr(error, "stderr", None) or str(error)
        _log.warning(
            "shardemb works without its C loops, several times slower: %s did not compile them: %s",
            compiler,
            text,
        )
        return f"{compiler} did not compile rows.c: {text}"
    kinds = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float, "i": ctypes.c_int}
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype = kinds.get(result)
        function.argtypes = [kinds[kind] for kind in arguments]
    return library


def _compiled(compiler: str) -> Path:
    source = Path(__file__).with_name("rows.c")
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    flags = next((line for line in lines if line.startswith("flags")), "")
    text = "\0".join([source.read_text(), compiler, *_FLAGS, flags])
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_uid != os.getuid() or not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} is not this user's")
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="shardemb-"))
    path = folder / f"rows-{key}.so"
    if not path.exists():
        # concurrent ranks each replace a whole file
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / path.name
            command = [compiler, str(source), "-o", str(made), *_FLAGS]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            made.replace(path)
    return path


def why_not() -> str | None:
    """Return why the C loops are not used; None if they are."""
    library = _library()
    return library if isinstance(library, str) else None


def _loops(*tensors: Tensor) -> ctypes.CDLL | None:
    library = _library()
    if isinstance(library, str):
        return None
    fits = all(tensor.is_cpu and tensor.is_contiguous() for tensor in tensors)
    return library if fits else None


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="shardemb")


# a child process has no threads of the parent
os.register_at_fork(after_in_child=_threads.cache_clear)


def _in_parts(call: Callable[[int, int], object], n: int, least: int = _ROWS_PER_THREAD) -> None:
    """Call with ranges that make up ``[0, n)``, on torch's number of threads."""
    parts = min(torch.get_num_threads(), n // least)
    if parts < 2:
        call(0, n)
    else:
        bounds = [part * n // parts for part in range(parts + 1)]
        for _ in _threads().map(call, bounds, bounds[1:]):
            pass


def take(table: Tensor, rows: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``table[rows]``, ``(n, D)``, for int64 rows ``(n,)``; without gradient."""
    n, dim = rows.shape[0], table.shape[1]  # len() of a tensor takes a microsecond
    if out is None:
        out = empty((n, dim), table.dtype, table.device)
    loops, size = _loops(table, rows, out), dim * table.itemsize
    if loops is None:
        return torch.index_select(table, 0, rows, out=out)
    _in_parts(
        lambda a, b: loops.gather(table.data_ptr(), size, rows.data_ptr(), a, b, out.data_ptr()), n
    )
    return out


def put(table: Tensor, rows: Tensor, values: Tensor) -> None:
    """Set ``table[rows] = values`` for distinct int64 rows ``(n,)``, and values ``(n, D)``."""
    loops, size = _loops(table, rows, values), table.shape[1] * table.itemsize
    if loops is None or table.dtype != values.dtype:
        table.index_copy_(0, rows, values)
    else:
        _in_parts(
            lambda a, b: loops.scatter(
                table.data_ptr(), size, rows.data_ptr(), a, b, values.data_ptr()
            ),
            len(rows),
        )


def unit_rows(rows: Tensor) -> Tensor:
    """Return rows ``(n, D)`` of unit 2-norm; :func:`constrain` and :func:`update` do it in C."""
    return F.normalize(rows)


def constrain(table: Tensor, rows: Tensor, function: RowFunction) -> None:
    """Set ``table[rows] = function(table[rows])`` for distinct rows ``(n,)``, in chunks."""
    loops = _loops(table, rows)
    if function is unit_rows and loops is not None and table.dtype == torch.float32:
        _in_parts(
            lambda a, b: loops.make_units(table.data_ptr(), table.shape[1], rows.data_ptr(), a, b),
            len(rows),
        )
        return
    buffer = empty((min(len(rows), CHUNK_ROWS), table.shape[1]), table.dtype, table.device)
    for chunk in rows.split(CHUNK_ROWS) if len(rows) else ():
        put(table, chunk, function(take(table, chunk, buffer[: len(chunk)])).contiguous())


@dataclass(frozen=True)
class Merged:
    """Rows ``(n,)`` with merged duplicates."""

    #: (u,) distinct rows, ascending
    unique: Tensor
    #: (n,) index of each row in ``unique``
    inverse: Tensor
    #: (n,) indices that sort the rows, stably; empty without the C loops
    order: Tensor
    #: (u + 1,) bounds of each unique row in ``order``; empty without the C loops
    starts: Tensor

    def sum(self, values: Tensor) -> Tensor:
        """Sum the values ``(n, D)`` of each row: ``(u, D)``; half precision in float32."""
        if values.itemsize < 4:
            return self.sum(values.float()).to(values.dtype)
        out = empty((len(self.unique), values.shape[1]), values.dtype, values.device)
        loops = _loops(values) if len(self.starts) and values.dtype == torch.float32 else None
        if loops is None:
            return out.zero_().index_add_(0, self.inverse, values)
        pointers = values.data_ptr(), values.shape[1], self.order.data_ptr(), self.starts.data_ptr()
        _in_parts(lambda a, b: loops.sum_rows(*pointers, a, b, out.data_ptr()), len(out))
        return out


def merge(rows: Tensor, num_rows: int) -> Merged:
    """Merge duplicates of int64 rows ``(n,)``; IndexError (in C) outside ``[0, num_rows)``."""
    loops, n = _loops(rows), rows.shape[0]
    if loops is None:
        each_once, places = rows.unique(return_inverse=True)
        return Merged(each_once, places, rows[:0], rows[:0])
    results = [torch.empty(size, dtype=torch.int64) for size in (n, n, n + 1, n)]
    pointers = (result.data_ptr() for result in results)
    found = loops.merge(rows.data_ptr(), n, num_rows, *pointers)
    if found == -2:
        raise IdRangeError(
            f"got rows {int(rows.min())} to {int(rows.max())}, expected 0 <= row < {num_rows}"
        )
    if found < 0:
        raise OutOfMemoryError(f"no memory to merge {n} rows")
    order, unique, starts, inverse = results
    return Merged(unique[:found], inverse, order, starts[: found + 1])


def update(
    rule: str,
    weight: Tensor,
    grad: Tensor,
    merged: Merged,
    state: list[Tensor],
    lr: float,
    decay: float = 0.0,
    eps: float = 0.0,
    betas: tuple[float, float] = (0.0, 0.0),
    constrain: RowFunction | None = None,
) -> bool:
    """Sum each row's gradients and update the row, in one pass, in C.

    Return False, without a change, if the C loops do not take these tensors.

    Args:
        rule: one of :data:`RULES`.
        weight: ``(R, D)`` float32.
        grad: ``(n, D)`` float32, one for each merged row.
        merged: the rows.
        state: float32 ``(R,)`` or ``(R, D)``, in the rule's order.
        lr: learning rate, with bias correction.
        decay: rows are first scaled by ``1 - decay``.
        eps: added to the root.
        betas: decay of Adam's moments.
        constrain: function of rows ``(m, D)``, applied in cache; :func:`unit_rows` in C.
    """
    tensors, dim = [weight, grad, *state], weight.shape[1]
    loops = _loops(*tensors) if all(t.dtype == torch.float32 for t in tensors) else None
    if loops is None or not merged.starts.shape[0]:
        return False
    first, second = [*(tensor.data_ptr() for tensor in state), None, None][:2]
    matrices = (weight.data_ptr(), first, second, dim, grad.data_ptr())
    places = (merged.order.data_ptr(), merged.unique.data_ptr(), merged.starts.data_ptr())
    numbers = (lr, eps, 1 - decay, 1 - betas[0], 1 - betas[1])

    unit = constrain is unit_rows

    def part(start: int, rows: Tensor | None, a: int, b: int) -> None:
        sums, copy = torch.empty(dim), None if rows is None else rows[a:].data_ptr()
        span = (start + a, start + b)
        loops.update(RULES[rule], *matrices, *places, *span, *numbers, unit, sums.data_ptr(), copy)

    total = merged.unique.shape[0]
    if constrain is None or unit:
        _in_parts(partial(part, 0, None), total)
        return True
    chunk = CHUNK_ROWS * torch.get_num_threads()
    buffer = empty((min(chunk, total), dim), weight.dtype)
    for start in range(0, total, chunk):
        rows = buffer[: total - start]
        _in_parts(partial(part, start, rows), len(rows))
        put(weight, merged.unique[start : start + len(rows)], constrain(rows).contiguous())
    return True


def count_better(scores: Tensor, truth: Tensor, n: int, out: Tensor) -> None:
    """Count scores ``(B, N)`` above ``truth`` ``(B,)``, equal to it, and finite, by row.

    Adds the counts of the first ``n`` columns, below 2^31, to ``out`` ``(3, B)`` int64. In C for
    float32.
    """
    loops = _loops(scores, truth, out) if scores.dtype == torch.float32 else None
    if loops is not None:
        tensors = scores.data_ptr(), scores.shape[1], n, truth.data_ptr(), len(scores)
        _in_parts(
            lambda a, b: loops.count_better(*tensors, a, b, out.data_ptr()),
            len(scores),
            _SCORES_PER_THREAD,
        )
        return
    scores, truth = scores[:, :n], truth.unsqueeze(1)
    for line, mask in enumerate((scores > truth, scores == truth, torch.isfinite(scores))):
        if mask.is_cuda:
            out[line] += mask.sum(1)
        else:  # numpy's count takes a fifth of torch's sum over bools
            out[line] += torch.from_numpy(np.count_nonzero(mask.numpy(), axis=1))


def distances(queries: Tensor, rows: Tensor, p: float) -> Tensor:
    """Return p-norm distances of ``(..., B, D)`` to ``(..., N, D)``: ``(..., B, N)``.

    Computed from differences; in C for p 1 or 2, two dimensions, float32 and no gradient.
    """
    loops = _loops(queries, rows) if queries.dim() == rows.dim() == 2 and p in (1, 2) else None
    fits = queries.dtype == rows.dtype == torch.float32
    graded = torch.is_grad_enabled() and (queries.requires_grad or rows.requires_grad)
    if loops is None or not fits or graded:
        return torch.cdist(queries, rows, p=p, compute_mode="donot_use_mm_for_euclid_dist")
    out = torch.empty(len(queries), len(rows))
    tensors = queries.data_ptr(), rows.data_ptr(), queries.shape[1], len(rows), p == 1
    _in_parts(
        lambda a, b: loops.distances(*tensors, a, b, out.data_ptr()),
        len(queries),
        _SCORES_PER_THREAD,
    )
    return out


def nonfinite_rows(values: Tensor) -> Tensor:
    """Return the int64 rows of ``(n, ...)`` with NaN or infinite values; a scalar is row 0."""
    real = torch.view_as_real(values) if values.is_complex() else values
    # NaN is the minimum and the maximum
    if not real.numel() or all(math.isfinite(extreme.item()) for extreme in torch.aminmax(real)):
        return torch.empty(0, dtype=torch.int64, device=values.device)
    rows = (~torch.isfinite(values)).reshape(len(values) if values.dim() else 1, -1)
    return rows.any(1).nonzero().squeeze(1)


class Flag:
    """A number in the first 8 bytes of memory shared with other processes; needs the C loops."""

    def __init__(self, memory: Tensor) -> None:
        self.memory, self.pointer = memory, memory.data_ptr()
        library: Any = _library()
        self._raise = library.raise_flag

    def raise_to(self, value: int) -> None:
        """Set the flag; readers of it also see all earlier writes."""
        self._raise(self.pointer, value)


class Flags:
    """Flags of other processes, to wait for."""

    def __init__(self, flags: Sequence[Flag]) -> None:
        self._flags = flags
        self._pointers = (ctypes.c_void_p * len(flags))(*(flag.pointer for flag in flags))
        library: Any = _library()
        self._raised = library.flags_raised

    def reached(self, value: int, awake: float = 0.0, limit: float = 0.0) -> int:
        """Wait ``limit`` s (``awake`` without sleep) for ``value``; return how many have it."""
        return self._raised(
            self._pointers, len(self._flags), value, int(awake * 1e9), int(limit * 1e9)
        )
