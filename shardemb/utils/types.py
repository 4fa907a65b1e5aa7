"""Names that every room shares.

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

#: Maps rows ``(n, *shape)`` to rows of the same shape, each output row depending on its own input
#: row alone.
RowFunction = Callable[[torch.Tensor], torch.Tensor]

#: Fills (or returns) rows ``(n, *shape)``; complex shapes come as real ones with a last dimension
#: of 2.
Initializer = Callable[[torch.Tensor], torch.Tensor]

#: Where a table's rows live: each on one rank, or all of them on every rank.
Placement = Literal["row_wise", "replicated"]

#: What becomes of the gradients that several ranks have for one row.
GradientReduction = Literal["mean", "sum"]


def normalize_name(name: str) -> str:
    """Fold case, underscores, dashes and spaces, so that "xavier_uniform".

    "XavierUniform" are one name.
    """
    return name.lower().replace("_", "").replace("-", "").replace(" ", "")


def few(ids: list[int]) -> str:
    """Name the five least of some ids, for messages."""
    return ", ".join(map(str, sorted(ids)[:5])) + ", ..." * (len(ids) > 5)
