"""Batches of ranks that do not have equally many."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from shardemb.comm import collectives


def join_batches(batches: Iterable[Any], empty: Any) -> Iterator[Any]:
    """Yield this rank's batches, then ``empty`` until no rank has a batch. A collective.

    Every rank takes part in every lookup, so a rank that is out of data goes on with empty batches,
    as under torch.distributed.algorithms.join. With ``gradient_reduction="mean"`` it counts as a
    rank whose gradient is 0.

    Args:
        batches: of this rank, any number.
        empty: what a rank without data gets, such as ``torch.empty(0, dtype=torch.int64)``; its
            loss must be a sum, or 0, because the mean of no numbers is NaN.
    """
    if collectives.rank_and_size()[1] == 1:
        yield from batches
        return
    own = iter(batches)
    nothing = object()
    while True:
        batch = next(own, nothing)
        ranks_with_data = torch.tensor(int(batch is not nothing))
        collectives.all_reduce(ranks_with_data, operation="is there another batch?")
        if not ranks_with_data:
            return
        yield empty if batch is nothing else batch
