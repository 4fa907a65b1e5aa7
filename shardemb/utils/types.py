"""Type names of the whole package.

Shape legend, used in every docstring:

=====  ==============================================================
``B``  queries in a batch
``N``  candidates, or negatives
``D``  columns of a stored row: real numbers, ``prod(shape)``, twice that for complex shapes
``V``  rows of the whole table (``max_id``)
``R``  rows of the table on this rank
``W``  ranks in the process group
=====  ==============================================================
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

#: maps rows ``(n, *shape)`` to rows of the same shape, each by itself
RowFunction = Callable[[torch.Tensor], torch.Tensor]

#: fills or returns rows ``(n, *shape)``; complex numbers have a last dimension of 2
Initializer = Callable[[torch.Tensor], torch.Tensor]

#: each row on one rank, or all rows on every rank
Placement = Literal["row_wise", "replicated"]

#: how the gradients of several ranks are combined
GradientReduction = Literal["mean", "sum"]


def normalize_name(name: str) -> str:
    """Remove case, underscores, dashes and spaces: "xavier_uniform" equals "XavierUniform"."""
    return name.lower().replace("_", "").replace("-", "").replace(" ", "")


def few(ids: Sequence[Any]) -> str:
    """List the five smallest ids, or names, for messages."""
    return ", ".join(map(str, sorted(ids)[:5])) + ", ..." * (len(ids) > 5)
