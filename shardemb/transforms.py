"""Normalizers (in forward) and constrainers (after a step), as in PyKEEN 1.11.1.

A constrainer runs on a rank's changed rows, so it must treat each row alone;
:func:`probe_constrainer` checks that when the table is made.
"""

import math
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shardemb.exceptions import InputError, InputTypeError, NotRowWiseError, UnknownNameError
from shardemb.utils.types import RowFunction, normalize_name


def complex_normalize(x: Tensor) -> Tensor:
    """Divide complex elements of ``(..., d)`` by their moduli; pairs real ones, with a warning."""
    if torch.is_complex(x):
        return x / x.abs().clamp_min(torch.finfo(x.dtype).eps)
    warnings.warn(
        "Applying complex_normalize on non-complex input: pairs of the last dimension are taken.",
        stacklevel=2,
    )
    pairs = torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(complex_normalize(pairs)).view(x.shape)


def clamp_norm(
    x: Tensor, maxnorm: float, p: str | float = "fro", dim: int | tuple[int, ...] | None = None
) -> Tensor:
    """Scale ``x`` down where its ``p``-norm along ``dim`` (None: of all) exceeds ``maxnorm``."""
    norm = x.norm(p=p, dim=dim, keepdim=True)
    eps = torch.finfo(x.dtype).eps
    return torch.where(norm < maxnorm, x, x / norm.clamp_min(eps) * maxnorm)


#: most numbers that a constrainer of one's own is tried on
_PROBED = 4_000_000
_CONSTRAINERS = {
    "normalize": F.normalize,
    "complexnormalize": complex_normalize,
    "clamp": torch.clamp,
    "clampnorm": clamp_norm,
}
_NORMALIZERS = {"normalize": F.normalize, "softmax": F.softmax}


def resolve(functions: Mapping[str, Any], query: Any, kwargs: Mapping[str, Any] | None) -> Any:
    """Resolve a name (KeyError if unknown), a callable or None; TypeError for others."""
    if query is None:
        return None
    if isinstance(query, str):
        if normalize_name(query) not in functions:
            raise UnknownNameError(f"{query} is an invalid. Try one of: {sorted(functions)}")
        query = functions[normalize_name(query)]
    if not callable(query):
        raise InputTypeError(f"Invalid function: {type(query)} - {query}")
    return partial(query, **kwargs) if kwargs else query


resolve_constrainer = partial(resolve, _CONSTRAINERS)
resolve_normalizer = partial(resolve, _NORMALIZERS)


def to_json(function: RowFunction | None) -> dict[str, Any] | None:
    """Describe a function by name (None if unknown) and arguments."""
    if function is None:
        return None
    plain, args, kwargs = parts_of(function)
    names = {value: name for name, value in [*_CONSTRAINERS.items(), *_NORMALIZERS.items()]}
    simple = all(isinstance(value, int | float | str | None) for value in kwargs.values())
    known = names.get(plain) if simple and not args else None
    return {
        "name": known,
        "kwargs": kwargs if known else {},
        "function": getattr(plain, "__qualname__", type(plain).__qualname__),
    }


def is_plain_normalize(function: RowFunction | None) -> bool:
    """Whether a function divides rows ``(n, d)`` by their 2-norm, as F.normalize by default."""
    plain, args, kwargs = parts_of(function)
    known = {"p": (2,), "dim": (1, -1), "eps": (1e-12,)}
    default = all(value in known.get(key, ()) for key, value in kwargs.items())
    return plain is F.normalize and not args and default


def parts_of(function: Any) -> tuple[Any, tuple[Any, ...], Mapping[str, Any]]:
    """Return a function without its preset arguments, and these."""
    if isinstance(function, partial):
        return function.func, function.args, function.keywords
    return function, (), {}


@torch.no_grad()
def probe_constrainer(
    constrainer: RowFunction,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    table: str,
    num_rows: int = 8,
) -> bool:
    """Check on random rows that a constrainer treats each row alone, and not by its position.

    Args:
        constrainer: function of rows ``(n, *shape)`` of ``dtype``.
        shape: of one row.
        dtype: of the rows.
        table: name for errors.
        num_rows: of the table; a function of one's own is tried on as many, up to 4 million
            numbers.

    Returns:
        Whether it is idempotent (to 1e-5), so that unchanged rows may be skipped.

    Raises:
        ValueError: a row's result depends on other rows, or has another shape.
    """
    plain, _, kwargs = parts_of(constrainer)
    if plain is clamp_norm and kwargs and kwargs.get("dim") is None:
        raise NotRowWiseError(
            f"table {table!r}: constrainer clamp_norm without dim is a norm over the whole table,"
            " which no shard has: pass constrainer_kwargs=dict(maxnorm=..., dim=-1)"
        )
    with warnings.catch_warnings():  # its warnings appear at use
        warnings.simplefilter("ignore")
        try:
            scales = 1e-3, 1.0, 1e3  # some change large rows only
            idempotent = [_probe(constrainer, scale, shape, dtype, table) for scale in scales]
            if plain not in _CONSTRAINERS.values():
                most = _PROBED // max(1, math.prod(shape))
                _probe(constrainer, 1.0, shape, dtype, table, max(8, min(num_rows, most)))
        except Exception as error:
            error.add_note(
                f"table {table!r}: constrainer {constrainer} was tried on rows of shape {shape}"
                f" and {dtype}"
            )
            raise
    return all(idempotent)


def _probe(
    constrainer: RowFunction,
    scale: float,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    table: str,
    num_rows: int = 8,
) -> bool:
    generator = torch.Generator().manual_seed(0)
    rows = scale * torch.randn(num_rows, *shape, dtype=dtype, generator=generator)
    whole = constrainer(rows.clone())
    if whole.shape != rows.shape:
        raise InputError(
            f"table {table!r}: constrainer {constrainer} returned {tuple(whole.shape)} for"
            f" {tuple(rows.shape)}"
        )
    loose: dict[str, Any] = {
        "rtol": max(1e-5, 8 * torch.finfo(dtype).eps),
        "atol": 1e-6,
        "equal_nan": True,
    }
    order = torch.randperm(num_rows, generator=generator)
    parts = torch.cat([constrainer(rows[part]) for part in order.split(max(3, num_rows // 2))])
    if not torch.allclose(whole[order], parts, **loose):
        raise NotRowWiseError(
            f"table {table!r}: constrainer {constrainer} is not row-wise (the result for a row"
            " depends on the other rows, or on its position), so it cannot run on shards; give it a"
            " dimension, e.g. constrainer_kwargs=dict(dim=-1), or use kernel='dense' in one process"
        )
    return torch.allclose(constrainer(whole.clone()), whole, **loose)
