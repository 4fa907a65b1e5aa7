"""Sums, means and maxima of the rows of bags of ids."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from shardemb.embedding import Embedding
from shardemb.exceptions import InputError


def embedding_bag(
    table: Embedding,
    ids: Tensor,
    offsets: Tensor | None = None,
    mode: Literal["sum", "mean", "max"] = "mean",
    *,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Look up bags of ids, and pool the rows of each, as torch.nn.functional.embedding_bag.

    A collective, with a rank's own number of bags and ids. Each id is looked up once a batch.

    Args:
        table: of real rows; its normalizer and regularizer see the rows before they are pooled.
        ids: ``(B, L)``, or ``(n,)`` with ``offsets``.
        offsets: ``(B,)`` first place of each bag among ``ids``; the bags may be empty.
        mode: how rows are pooled; an empty bag gives zeros.
        per_sample_weights: shape of ``ids``; factors of the rows, for "sum".
        include_last_offset: ``offsets`` are ``(B + 1,)``, the last one is ``n``.
        padding_idx: an id that is not looked up, and counts as if it were not there.

    Returns:
        ``(B, *table.shape)``.

    Raises:
        ValueError: offsets that do not fit the ids, weights with another mode than "sum", or
            complex rows.
    """
    where = f"embedding_bag of table {table.name!r}"
    if (ids.dim() == 1) != (offsets is not None) or ids.dim() not in (1, 2):
        raise InputError(
            f"{where}: got ids of shape {tuple(ids.shape)} and"
            f" {'no ' if offsets is None else ''}offsets, expected ids (B, L), or (n,) with offsets"
        )
    if table.is_complex:
        raise InputError(f"{where}: got complex rows, expected real ones: pool their view_as_real")
    if per_sample_weights is not None and (mode != "sum" or per_sample_weights.shape != ids.shape):
        raise InputError(
            f"{where}: got per_sample_weights of shape {tuple(per_sample_weights.shape)} with"
            f" mode={mode!r}, expected {tuple(ids.shape)} with mode='sum'"
        )
    if offsets is None:
        ends = torch.arange(len(ids) + 1, device=ids.device) * ids.shape[1]
    elif include_last_offset:
        ends = offsets
    else:
        ends = torch.cat([offsets, offsets.new_tensor([ids.numel()])])
    flat = ids.reshape(-1)
    if not len(ends) or ends[0] != 0 or ends[-1] != len(flat) or (ends.diff() < 0).any():
        raise InputError(
            f"{where}: got offsets from {ends[:1].tolist()} to {ends[-1:].tolist()} for"
            f" {len(flat)} ids, expected rising ones from 0 to at most the number of ids"
        )
    weights = None if per_sample_weights is None else per_sample_weights.reshape(-1)
    if padding_idx is not None:
        kept = flat != padding_idx
        before = torch.cat([ends.new_zeros(1), kept.cumsum(0).to(ends.dtype)])
        flat, ends = flat[kept], before[ends]
        weights = None if weights is None else weights[kept]
    rows = table(flat)
    pooled = F.embedding_bag(
        torch.arange(len(flat), device=rows.device),
        rows.reshape(len(flat), math.prod(table.shape)),
        ends.to(rows.device, torch.int64),
        mode=mode,
        per_sample_weights=weights,
        include_last_offset=True,
    )
    return pooled.reshape(len(ends) - 1, *table.shape)
