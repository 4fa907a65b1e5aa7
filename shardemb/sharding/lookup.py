"""How ids become rows: one class for each way in which ids reach the ranks that own their rows."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from shardemb.sharding.exchange import Exchange, Route, id_error
from shardemb.sharding.placement import RowPlan
from shardemb.sharding.table import Table
from shardemb.sharding.torchrec_table import Sent, TorchRecTable


class Lookup(ABC):
    """Looks rows up in two parts, so that ids can travel while something else is computed."""

    @abstractmethod
    def send(self, ids: Any, wait: bool = True) -> Any:
        """Check flat ids ``(n,)`` and send them to the owners of their rows.

        Returns:
            A request for :meth:`rows`. Without ``wait``, ids may still be on their way.

        Raises:
            IndexError, IdTypeError, AttributeError: bad ids, on all ranks.
        """

    @abstractmethod
    def rows(self, request: Any) -> Tensor:
        """Return the rows ``(n, D)`` of a request in the order of its ids, with a gradient."""

    @property
    def sent_bytes(self) -> int:
        """Bytes that this rank has sent to others."""
        return 0


class LocalLookup(Lookup):
    """All rows lie on this rank: one process, or a replicated table."""

    def __init__(self, plan: RowPlan, table: Table) -> None:
        self._plan, self._table = plan, table

    def send(self, ids: Any, wait: bool = True) -> Tensor:
        """See :class:`Lookup`; sends nothing."""
        error = id_error(self._plan, ids)
        if error is not None:
            raise error
        # FBGEMM would read a strided tensor as if it were dense
        rows = ids.to(self._table.device, torch.int64).contiguous()
        # the caller may fill its tensor with the next ids before these are looked up
        return rows if wait else rows.clone()

    def rows(self, request: Tensor) -> Tensor:
        """See :class:`Lookup`."""
        return self._table.lookup(request)


class ExchangeLookup(Lookup):
    """Rows lie on several ranks; this package's exchange moves ids and rows."""

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
        """Bytes of ids, rows and gradients that this rank has sent to others."""
        return self._exchange.sent_bytes


class TorchRecLookup(Lookup):
    """TorchRec moves ids and rows; its bytes are not counted."""

    def __init__(self, table: TorchRecTable) -> None:
        self._table = table

    def send(self, ids: Any, wait: bool = True) -> Sent:
        """See :class:`Lookup`. A collective."""
        return self._table.send_ids(ids)

    def rows(self, request: Sent) -> Tensor:
        """See :class:`Lookup`. A collective, also in backward."""
        return self._table.fetch(request)
