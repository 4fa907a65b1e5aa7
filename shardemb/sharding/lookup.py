"""How ids become rows: one class for each way to the rows' owners."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from shardemb.sharding.exchange import Exchange, Route, id_error
from shardemb.sharding.placement import RowPlan
from shardemb.sharding.table import Table
from shardemb.sharding.torchrec_table import Sent, TorchRecTable


class Lookup(ABC):
    """A lookup in two parts, so that ids can travel during other computation."""

    @abstractmethod
    def send(self, ids: Any, wait: bool = True) -> Any:
        """Check flat ids ``(n,)`` and send them to their rows' owners; return a request for rows.

        Without ``wait``, ids may still be in transit. IndexError, IdTypeError or AttributeError, on
        all ranks, for bad ids.
        """

    @abstractmethod
    def rows(self, request: Any) -> Tensor:
        """Return a request's rows ``(n, D)`` in the order of ids, with a gradient."""

    @property
    def sent_bytes(self) -> int:
        """Bytes sent to other ranks."""
        return 0


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


class ExchangeLookup(Lookup):
    """Rows on several ranks, moved by this package's exchange."""

    def __init__(self, exchange: Exchange, table: Table) -> None:
        self._exchange, self._table = exchange, table

    def send(self, ids: Any, wait: bool = True) -> Route:
        """See :class:`Lookup`. A collective."""
        return self._exchange.send_ids(ids, self._table.device, wait)

    def rows(self, request: Route) -> Tensor:
        """See :class:`Lookup`. A collective, also in backward."""
        return self._exchange.return_rows(self._table.lookup(request.wait().rows), request)

    @property
    def sent_bytes(self) -> int:
        """Bytes of ids, rows and gradients sent to other ranks."""
        return self._exchange.sent_bytes


class TorchRecLookup(Lookup):
    """Rows on several ranks, moved by TorchRec; its bytes are not counted."""

    def __init__(self, table: TorchRecTable) -> None:
        self._table = table

    def send(self, ids: Any, wait: bool = True) -> Sent:
        """See :class:`Lookup`. A collective."""
        return self._table.send_ids(ids)

    def rows(self, request: Sent) -> Tensor:
        """See :class:`Lookup`. A collective, also in backward."""
        return self._table.fetch(request)
