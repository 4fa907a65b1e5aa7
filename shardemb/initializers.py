"""Initial rows that depend on the seed and the global row id, never on the shard or the number of ranks.

A table is filled in fixed blocks of :data:`BLOCK_ROWS` global rows. Each block has its own random stream, and a rank
makes every block that it holds a row of, whole, and keeps its part. So any initializer works, also a user's callable,
as long as a row's value does not depend on how many rows the table has.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import init

from shardemb.types import Initializer, normalize_name

#: Rows that share one random stream. A constant of the format: another value gives other initial tables.
BLOCK_ROWS = 4096


def xavier_uniform_(tensor: Tensor, gain: float = 1.0) -> Tensor:
    """Fill rows ``(n, *shape)`` from U(-a, a), a = gain * sqrt(6 / prod(shape)): PyKEEN's form of Glorot's rule."""
    bound = gain * math.sqrt(6.0 / math.prod(tensor.shape[1:]))
    return init.uniform_(tensor, -bound, bound)


def xavier_normal_(tensor: Tensor, gain: float = 1.0) -> Tensor:
    """Fill rows ``(n, *shape)`` from N(0, s^2), s = gain * sqrt(2 / prod(shape)): PyKEEN's form of Glorot's rule."""
    return init.normal_(tensor, std=gain * math.sqrt(2.0 / math.prod(tensor.shape[1:])))


def xavier_uniform_norm_(tensor: Tensor) -> Tensor:
    """Unit vectors of uniform direction cosines; the scale of Glorot's rule, which uses the row count, cancels."""
    return F.normalize(init.uniform_(tensor, -1.0, 1.0))


def normal_norm_(tensor: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Draw normal rows, then scale each to unit length (along dimension 1, as PyKEEN does)."""
    return F.normalize(init.normal_(tensor, mean, std))


def uniform_norm_(tensor: Tensor, a: float = 0.0, b: float = 1.0) -> Tensor:
    """Draw uniform rows, then scale each to unit length (along dimension 1, as PyKEEN does)."""
    return F.normalize(init.uniform_(tensor, a, b))


def init_phases(tensor: Tensor) -> Tensor:
    """Complex numbers of modulus 1 and uniform phase, for a real view ``(..., 2)`` of complex rows."""
    pairs = tensor if tensor.shape[-1] == 2 else tensor.view(*tensor.shape[:-1], -1, 2)
    phases = 2 * math.pi * torch.rand(pairs.shape[:-1], dtype=tensor.dtype, device=tensor.device)
    return torch.stack([phases.cos(), phases.sin()], dim=-1)


class PretrainedInitializer:
    """Rows from a given tensor ``(V, *shape)``, as PyKEEN's class of the same name."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return the tensor in ``x``'s dtype and place; its shape must be ``x``'s."""
        if x.shape != self.tensor.shape:
            raise ValueError(f"shape does not match: expected {self.tensor.shape} but got {x.shape}")
        return self.tensor.to(device=x.device, dtype=x.dtype)


_BY_NAME: dict[str, Initializer] = {
    "constant": init.constant_,  # type: ignore[dict-item]  # its value comes as initializer_kwargs
    "initphases": init_phases,
    "kaimingnormal": init.kaiming_normal_,
    "kaiminguniform": init.kaiming_uniform_,
    "normal": init.normal_,
    "normalnorm": normal_norm_,
    "ones": init.ones_,
    "truncnormal": init.trunc_normal_,
    "uniform": init.uniform_,
    "uniformnorm": uniform_norm_,
    "xaviernormal": xavier_normal_,
    "xaviernormalnorm": normal_norm_,
    "xavieruniform": xavier_uniform_,
    "xavieruniformnorm": xavier_uniform_norm_,
    "zeros": init.zeros_,
}
#: Values that depend on the number of rows, or on which rows stand together.
_NOT_ROW_LOCAL = {"dirac", "eye", "initquaternions", "orthogonal", "sparse"}


def resolve_initializer(initializer: Any, kwargs: Mapping[str, Any] | None) -> Initializer:
    """Turn a name, a callable, a tensor wrapper or None (normal) into an initializer.

    Raises:
        KeyError: an unknown name.
        ValueError: a known one whose rows depend on the number of rows, so that no shard can make its own.
        TypeError: neither a name nor a callable.
    """
    if initializer is None:
        function: Any = init.normal_
    elif callable(initializer):
        function = initializer
    elif isinstance(initializer, str):
        key = normalize_name(initializer)
        if key in _NOT_ROW_LOCAL:
            raise ValueError(
                f"initializer {initializer!r} makes rows that depend on the whole table, so shards cannot make their "
                f"own: make the tensor once and pass it with Embedding.from_pretrained"
            )
        if key not in _BY_NAME:
            raise KeyError(f"{initializer} is an invalid. Try one of: {sorted(_BY_NAME)}")
        function = _BY_NAME[key]
    else:
        raise TypeError(f"Invalid function: {type(initializer)} - {initializer}")
    return partial(function, **kwargs) if kwargs else function


@torch.no_grad()
def fill_rows(out: Tensor, initializer: Initializer, shape: tuple[int, ...], first: int, total: int, seed: int) -> None:
    """Fill a shard in place, block by block; at most two blocks of memory besides it.

    Args:
        out: ``(R, D)`` the rows ``first`` to ``first + R`` of the table.
        initializer: gets ``(n, *shape)`` on the CPU, in the table's dtype.
        shape: of one real row, ``prod(shape) == D``.
        first: global id of the shard's first row.
        total: ``V``, rows of the whole table.
        seed: of the table.

    Raises:
        ValueError: the initializer returned another shape, or a pretrained tensor does not fit the table.
    """
    pretrained = getattr(initializer, "tensor", None)
    if isinstance(pretrained, Tensor):  # PyKEEN's PretrainedInitializer and its subclasses: rows by id
        real = torch.view_as_real(pretrained) if pretrained.is_complex() else pretrained
        if tuple(real.shape) != (total, *shape):
            raise ValueError(f"shape does not match: expected {(total, *shape)} but got {tuple(real.shape)}")
        out.copy_(real[first : first + len(out)].reshape(out.shape))
        return
    last = first + len(out)
    with torch.random.fork_rng(devices=[]):
        for block in range(first // BLOCK_ROWS, -(-last // BLOCK_ROWS)):
            start, stop = block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, total)
            torch.default_generator.manual_seed(int(np.random.SeedSequence([seed, block]).generate_state(1, np.uint64)[0]))
            empty = torch.zeros(stop - start, *shape, dtype=out.dtype)
            rows = initializer(empty)
            if rows.numel() != empty.numel():
                raise ValueError(f"initializer {initializer} returned shape {tuple(rows.shape)} for {tuple(empty.shape)}")
            low, high = max(start, first), min(stop, last)
            out[low - first : high - first] = rows.reshape(stop - start, -1)[low - start : high - start]
