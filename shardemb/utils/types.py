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

from collections.abc import Callable
from typing import Literal

import torch

#: Maps rows ``(n, *shape)`` to rows of the same shape, each row by itself.
RowFunction = Callable[[torch.Tensor], torch.Tensor]

#: Fills (or returns) rows ``(n, *shape)``; complex numbers come as a last dimension of 2.
Initializer = Callable[[torch.Tensor], torch.Tensor]

#: Where a table's rows live: each on one rank, or all of them on every rank.
Placement = Literal["row_wise", "replicated"]

#: How the gradients of several ranks for one row are combined.
GradientReduction = Literal["mean", "sum"]


def normalize_name(name: str) -> str:
    """Remove case, underscores, dashes and spaces: "xavier_uniform" equals "XavierUniform"."""
    return name.lower().replace("_", "").replace("-", "").replace(" ", "")


def few(ids: list[int]) -> str:
    """Name the five smallest of some ids, for messages."""
    return ", ".join(map(str, sorted(ids)[:5])) + ", ..." * (len(ids) > 5)
