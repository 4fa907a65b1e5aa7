"""How ids become rows: one class for each way to the rows' owners."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from shardemb.exceptions import IdRangeError, IdTypeError, NotATensorError, ShardembError
from shardemb.sharding.placement import RowPlan
from shardemb.sharding.table import Table


class Lookup(ABC):
    """A lookup in two parts, so that ids can travel during other computation."""

    #: bytes of ids, rows and gradients sent to other ranks; TorchRec's are not counted
    sent_bytes = 0

    @abstractmethod
    def send(self, ids: Any, wait: bool = True) -> Any:
        """Check flat ids ``(n,)`` and send them to their rows' owners; return a request for rows.

        Without ``wait``, ids may still be in transit. IndexError, IdTypeError or AttributeError, on
        all ranks, for bad ids.
        """

    @abstractmethod
    def rows(self, request: Any) -> Tensor:
        """Return a request's rows ``(n, D)`` in the order of ids, with a gradient."""


def id_error(plan: RowPlan, ids: Any) -> ShardembError | None:
    """Return the error of bad ids; it names table, value, range and rank."""
    if not isinstance(ids, Tensor):
        return NotATensorError(
            f"{plan.where}: got ids of type {type(ids).__name__}, expected a torch.Tensor of"
            " integers"
        )
    if ids.dtype not in (torch.int32, torch.int64):
        return IdTypeError(
            f"{plan.where}: got ids of dtype {ids.dtype}, expected torch.int64 or torch.int32:"
            " convert them"
        )
    if ids.numel():
        least, most = torch.aminmax(ids)
        low, high = least.item(), most.item()
        if low < 0 or high >= plan.num_rows:
            return IdRangeError(
                f"{plan.where}: index out of range: got id {low if low < 0 else high} among"
                f" {ids.numel()} ids, expected 0 <= id < {plan.num_rows}"
            )
    return None


class LocalLookup(Lookup):
    """All rows are on this rank: one process, or a replicated table."""

    def __init__(self, plan: RowPlan, table: Table) -> None:
        self._plan, self._table = plan, table

    def send(self, ids: Any, wait: bool = True) -> Tensor:
        """See :class:`Lookup`; sends nothing."""
        error = id_error(self._plan, ids)
        if error is not None:
            raise error
        # FBGEMM ignores strides
        rows = ids.to(self._table.device, torch.int64).contiguous()
        # the caller may overwrite its tensor before these are looked up
        return rows if wait else rows.clone()

    def rows(self, request: Tensor) -> Tensor:
        """See :class:`Lookup`."""
        return self._table.lookup(request)
