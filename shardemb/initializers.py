"""Initial rows that depend on the seed and the id, not on the number of ranks.

A table is filled in blocks of :data:`BLOCK_ROWS` slots (see :mod:`shardemb.sharding.placement`),
each with its own random stream; a smaller table is one block of all ids. A rank makes whole blocks
and keeps its rows. This needs an initializer that fills each row by itself: those of this module,
most of torch.nn.init and PyKEEN, and functions that :func:`row_wise` marks. Where the scale depends
on the number of rows (Glorot, Kaiming, quaternions), it is corrected. With any other initializer
every rank makes the whole table, once, and keeps its rows.
"""

import math
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import init

from shardemb import kernels
from shardemb.exceptions import InputError, InputTypeError, OutOfMemoryError
from shardemb.sharding.placement import RowOrder, RowPlan
from shardemb.transforms import parts_of, resolve
from shardemb.utils.memory import free_bytes
from shardemb.utils.progress import progress
from shardemb.utils.types import Initializer

#: Rows per random stream. Part of the format: another value changes the initial tables.
BLOCK_ROWS = 4096


def xavier_uniform_(tensor: Tensor, gain: float = 1.0) -> Tensor:
    """Fill rows ``(n, *shape)`` from U(-a, a), a = gain sqrt(6 / prod(shape)), as PyKEEN."""
    bound = gain * math.sqrt(6.0 / math.prod(tensor.shape[1:]))
    return init.uniform_(tensor, -bound, bound)


def xavier_normal_(tensor: Tensor, gain: float = 1.0) -> Tensor:
    """Fill rows ``(n, *shape)`` from N(0, s^2), s = gain sqrt(2 / prod(shape)), as PyKEEN."""
    return init.normal_(tensor, std=gain * math.sqrt(2.0 / math.prod(tensor.shape[1:])))


def xavier_uniform_norm_(tensor: Tensor) -> Tensor:
    """Draw uniform rows of unit length; Glorot's scale cancels."""
    _require_rows_of_numbers(tensor)
    return F.normalize(init.uniform_(tensor, -1.0, 1.0))


def xavier_normal_norm_(tensor: Tensor) -> Tensor:
    """Draw normal rows of unit length; Glorot's scale cancels."""
    _require_rows_of_numbers(tensor)
    return F.normalize(init.normal_(tensor))


def _require_rows_of_numbers(tensor: Tensor) -> None:
    if tensor.dim() < 2:  # torch's message
        text = "Fan in and fan out can not be computed for tensor with fewer than 2 dimensions"
        raise InputError(text)


def normal_norm_(tensor: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Draw normal rows, then scale each to unit length (along dimension 1, as PyKEEN)."""
    return F.normalize(init.normal_(tensor, mean, std))


def uniform_norm_(tensor: Tensor, a: float = 0.0, b: float = 1.0) -> Tensor:
    """Draw uniform rows, then scale each to unit length (along dimension 1, as PyKEEN)."""
    return F.normalize(init.uniform_(tensor, a, b))


def init_phases(tensor: Tensor) -> Tensor:
    """Fill a real view ``(..., 2)`` of complex rows with modulus 1 and uniform phase."""
    pairs = tensor if tensor.shape[-1] == 2 else tensor.view(*tensor.shape[:-1], -1, 2)
    phases = 2 * math.pi * torch.rand(pairs.shape[:-1], dtype=tensor.dtype, device=tensor.device)
    return torch.stack([phases.cos(), phases.sin()], dim=-1)


def init_quaternions(tensor: Tensor) -> Tensor:
    """Fill ``(n, *, d, 4)`` with quaternions of modulus in [-s, s] and uniform phase.

    PyKEEN's s = 1 / sqrt(2 n prod(*)). ValueError if the last dimension is not 4.
    """
    if tensor.dim() < 2 or tensor.shape[-1] != 4:
        raise InputError(f"shape must be (..., 4) but is {tensor.shape}.")
    scale = 1 / math.sqrt(2 * math.prod(tensor.shape[:-2]))
    modulus = scale * (2 * torch.rand(tensor.shape[:-1]) - 1)
    phase = 2 * math.pi * torch.rand(tensor.shape[:-1])
    direction = F.normalize(torch.rand(*tensor.shape[:-1], 3), dim=-1)
    imaginary = direction * (modulus * phase.sin()).unsqueeze(-1)
    return torch.cat([(modulus * phase.cos()).unsqueeze(-1), imaginary], dim=-1)


class PretrainedInitializer:
    """Rows of a tensor ``(V, *shape)``, as PyKEEN's PretrainedInitializer."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return the tensor in ``x``'s dtype and device; their shapes must be equal."""
        if x.shape != self.tensor.shape:
            raise InputError(
                f"shape does not match: expected {self.tensor.shape} but got {x.shape}"
            )
        return self.tensor.to(device=x.device, dtype=x.dtype)


_BY_NAME: dict[str, Initializer] = {
    "constant": init.constant_,  # type: ignore[dict-item]  # its value comes as initializer_kwargs
    "dirac": init.dirac_,
    "eye": init.eye_,
    "initphases": init_phases,
    "initquaternions": init_quaternions,
    "kaimingnormal": init.kaiming_normal_,
    "kaiminguniform": init.kaiming_uniform_,
    "normal": init.normal_,
    "normalnorm": normal_norm_,
    "ones": init.ones_,
    "orthogonal": init.orthogonal_,
    "sparse": init.sparse_,  # type: ignore[dict-item]  # its sparsity comes as initializer_kwargs
    "truncnormal": init.trunc_normal_,
    "uniform": init.uniform_,
    "uniformnorm": uniform_norm_,
    "xaviernormal": xavier_normal_,
    "xaviernormalnorm": xavier_normal_norm_,
    "xavieruniform": xavier_uniform_,
    "xavieruniformnorm": xavier_uniform_norm_,
    "zeros": init.zeros_,
}
#: rows depend on other rows
_WHOLE_TABLE = {init.dirac_, init.eye_, init.orthogonal_, init.sparse_}
#: fill each row by itself, from the generator alone
_ROW_WISE = {*_BY_NAME.values(), init.xavier_uniform_, init.xavier_normal_} - _WHOLE_TABLE
#: of pykeen.nn.init, which this module does not import
_ROW_WISE_IN_PYKEEN = {function.__name__ for function in (
    init_phases, normal_norm_, uniform_norm_, xavier_normal_, xavier_normal_norm_,
    xavier_uniform_, xavier_uniform_norm_,
)}  # fmt: skip


def row_wise(initializer: Initializer) -> Initializer:
    """Mark a function that fills each row by itself, from torch's default generator alone.

    It is then called for blocks of rows, in any order, and a rank makes its own rows only. A
    function that knows positions, or seeds a generator of its own, must not be marked.
    """
    initializer.fills_each_row = True  # type: ignore[attr-defined]
    return initializer


def _is_row_wise(function: Any) -> bool:
    module, name = getattr(function, "__module__", ""), getattr(function, "__name__", "")
    return (
        getattr(function, "fills_each_row", False)
        or (isinstance(function, Hashable) and function in _ROW_WISE)
        or (module == "pykeen.nn.init" and name in _ROW_WISE_IN_PYKEEN)
    )


def _pretrained(initializer: Any) -> Tensor | None:
    """Return the tensor of a PretrainedInitializer, ours or PyKEEN's, that is called as it is."""
    call = type(initializer).__call__
    theirs = getattr(call, "__module__", ""), getattr(call, "__qualname__", "")
    if call is PretrainedInitializer.__call__ or theirs == (
        "pykeen.nn.init",
        "PretrainedInitializer.__call__",
    ):
        tensor: Tensor = initializer.tensor
        return tensor
    return None


def _row_count_scale(
    function: Any, kwargs: Mapping[str, Any], rows: int, total: int, shape: tuple[int, ...]
) -> float:
    if rows == total:
        return 1.0
    field = math.prod(shape[1:])  # torch: fan_in = shape[0] * field, fan_out = rows * field
    if function in (init.xavier_uniform_, init.xavier_normal_):
        return math.sqrt((shape[0] + rows) / (shape[0] + total)) if shape and field else 1.0
    kaiming = function in (init.kaiming_uniform_, init.kaiming_normal_)
    by_rows = kaiming and kwargs.get("mode") == "fan_out"
    by_rows |= function is init_quaternions and len(shape) > 1
    return math.sqrt(rows / total) if by_rows else 1.0


def resolve_initializer(initializer: Any, kwargs: Mapping[str, Any] | None) -> Initializer:
    """Resolve a name (KeyError if unknown), a callable or None (normal); TypeError for others."""
    if isinstance(initializer, Tensor):
        raise InputTypeError(
            "Invalid function: a tensor: use Embedding.from_pretrained, or"
            " shardemb.initializers.PretrainedInitializer"
        )
    where = getattr(initializer, "__module__", None), getattr(initializer, "__name__", None)
    if where == ("pykeen.nn.init", "init_quaternions"):  # the same rule, with a known scale
        initializer = init_quaternions
    return resolve(_BY_NAME, init.normal_ if initializer is None else initializer, kwargs)


@torch.no_grad()
def fill_rows(
    out: Tensor, initializer: Initializer, shape: tuple[int, ...], plan: RowPlan, seed: int
) -> None:
    """Fill a shard in place, block by block; needs memory for two blocks.

    Args:
        out: ``(R, D)``, this rank's rows.
        initializer: gets ``(n, *shape)`` on the CPU, in the table's dtype.
        shape: of one real row, ``prod(shape) == D``.
        plan: the shard's rows.
        seed: of the table.

    Raises:
        ValueError: the initializer's result, or a pretrained tensor, has another shape.
        MemoryError: the initializer needs the whole table, which does not fit.
    """
    total = plan.num_rows
    pretrained = _pretrained(initializer)
    if pretrained is not None:  # rows by id
        real = torch.view_as_real(pretrained) if pretrained.is_complex() else pretrained
        if tuple(real.shape) != (total, *shape):
            got = tuple(real.shape)
            raise InputError(f"shape does not match: expected {(total, *shape)} but got {got}")
        _cut(out, real.reshape(total, out.shape[1]), plan)
        return
    first, last = plan.first, plan.first + len(out)
    function, _, kwargs = parts_of(initializer)
    whole = not _is_row_wise(function)
    by_id = whole or total <= BLOCK_ROWS  # rows of one block may depend on each other, as in PyKEEN
    size = max(1, total) if by_id else BLOCK_ROWS
    # without rows, make an empty block: all ranks raise the same errors
    blocks = range(0, 1) if by_id or last == first else range(first // size, -(-last // size))
    what, unit = f"filling table {plan.table!r}", len(out) / max(1, len(blocks))
    with torch.random.fork_rng(devices=[]):
        for block in progress(blocks, what, unit, plan.rank == 0):
            start, stop = block * size, min((block + 1) * size, total)
            stream = np.random.SeedSequence([seed, block]).generate_state(1, np.uint64)
            torch.default_generator.manual_seed(int(stream[0]))
            rows = _make(initializer, torch.zeros(stop - start, *shape, dtype=out.dtype), whole)
            scale = _row_count_scale(function, kwargs, stop - start, total, shape)
            rows = rows if scale == 1 else rows * scale
            if by_id:
                _cut(out, rows, plan)
                continue
            low, high = max(start, first), min(stop, last)
            part = rows[low - start : high - start]
            if plan.order.permuted:
                out[low - first : high - first] = part
            else:  # the block's slots, by id
                ids = RowOrder(total, permuted=True).ids(torch.arange(low, high))
                kernels.put(out, ids.to(out.device), part.to(out.device, out.dtype))


def _cut(out: Tensor, rows: Tensor, plan: RowPlan) -> None:
    for start in range(0, len(out), BLOCK_ROWS):
        ids = plan.local_ids(start, min(start + BLOCK_ROWS, len(out)))
        out[start : start + BLOCK_ROWS] = rows[ids.to(rows.device)]


def _make(initializer: Initializer, empty: Tensor, whole: bool) -> Tensor:
    threads = torch.get_num_threads()
    if whole:
        need = 3 * empty.numel() * empty.itemsize  # orthogonal: input, copy, factor
        free = free_bytes(empty.device)
        if free is not None and need > free:
            raise OutOfMemoryError(
                f"initializer {initializer} makes the whole table at once, {tuple(empty.shape)}:"
                f" about {need:,} bytes, {free:,} are free: if it fills each row by itself, mark it"
                " with shardemb.initializers.row_wise; or save the rows, and load them with"
                " Embedding.load_state_dict"
            )
        torch.set_num_threads(1)  # the last bits of a factorization depend on the number of threads
    try:
        rows = initializer(empty)
    finally:
        if whole:
            torch.set_num_threads(threads)
    if rows.numel() != empty.numel():
        raise InputError(
            f"initializer {initializer} returned shape {tuple(rows.shape)} for {tuple(empty.shape)}"
        )
    return rows.reshape(len(empty), math.prod(empty.shape[1:]))
