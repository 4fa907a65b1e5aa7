"""The exchange of one lookup between ranks: ids to owners, rows back, gradients to owners.

1. the distinct ids of a lookup, as row numbers of their owners' shards. The message also tells each
   owner how many they are, or that the sender's ids are bad, so that all ranks raise;
2. the rows, which are then permuted into the order of the ids. Backward sums the gradients of equal
   ids and sends them the other way.

Every rank takes part in every lookup and backward, with an empty batch if it has no ids.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

from shardemb import kernels
from shardemb.comm import collectives
from shardemb.comm.watchdog import PeerWatchdog, watch
from shardemb.exceptions import InputError
from shardemb.kernels import Merged
from shardemb.sharding.lookup import Lookup, id_error
from shardemb.sharding.options import Sharding
from shardemb.sharding.placement import RowPlan
from shardemb.sharding.table import PendingBackward, Table

#: most ids of a lookup, and most ranks, for which Python's numbers take half the time of operators
_FEW_IDS, _FEW_RANKS = 61, 16


@dataclass(frozen=True)
class Route:
    """The destinations of one lookup's ids."""

    #: (M,) requested rows of this rank's shard, in the order of requesting ranks
    rows: Tensor
    #: (n,) position of each id among the returned rows
    permutation: Tensor
    #: ids sent to each rank
    sent: list[int]
    #: ids received from each rank
    received: list[int]
    #: the duplicates, if each id was sent once
    merged: Merged | None = None
    #: of the lookup
    number: int = 0
    #: whether other collectives may come between the ids and the rows
    prefetched: bool = False
    #: waits until :attr:`rows` have arrived
    wait: Callable[[], None] = lambda: None


#: tables made on a group, by name: every rank makes the same ones in the same order
_tables: WeakKeyDictionary[PeerWatchdog, Counter[str]] = WeakKeyDictionary()


def _number_of(group: Any, name: str) -> int:
    """Count a table, or a default name, of a group."""
    counts = _tables.setdefault(watch(group), Counter())
    counts[name] += 1
    return counts[name]


def default_name(group: Any) -> str:
    """Return "embedding"; on several ranks the next ones are "embedding-2", ..."""
    several = collectives.rank_and_size(group)[1] > 1
    number = _number_of(group, "") if several else 1
    return "embedding" if number == 1 else f"embedding-{number}"


#: by group and name, the last lookup with a gradient
_pending: WeakKeyDictionary[PeerWatchdog, WeakValueDictionary[str, PendingBackward]] = (
    WeakKeyDictionary()
)

#: ids per rank, their row numbers ``(n,)``, the permutation, the duplicates
_ToSend = tuple[list[int], Tensor, Tensor, Merged | None]


class Exchange(Lookup):
    """Routes the ids and rows of one table between the ranks of a group."""

    def __init__(self, plan: RowPlan, group: Any, options: Sharding, table: Table) -> None:
        self.plan, self.group, self._table = plan, group, table
        self.deduplicate, self.wire_dtype = options.deduplicate, options.wire_dtype
        self._scale = 1.0 / plan.world_size if options.gradient_reduction == "mean" else 1.0
        self._bounds: Tensor | None = None
        self._lookups = 0
        number = _number_of(group, plan.table)
        #: tells tables of one name, such as a model's and its successor's, apart
        self._label = f"table {plan.table!r}" + f" (number {number} of this name)" * (number > 1)

    def send(self, ids: Any, wait: bool = True) -> Route:
        """See :class:`Lookup`. A collective; RanksDisagreeError for ranks in other operations."""
        self._lookups += 1
        error, number, device = id_error(self.plan, ids), self._lookups, self._table.device
        if error is None:
            slots = self.plan.order.slots(ids.to(device, torch.int64)).contiguous()
            few = len(slots) <= _FEW_IDS and self.plan.world_size <= _FEW_RANKS
            few = few and self.deduplicate and device.type == "cpu"
            sent, local, permutation, merged = (
                self._prepare_few(slots) if few else self._prepare_many(slots)
            )
        else:
            local = permutation = torch.empty(0, dtype=torch.int64, device=device)
            sent, merged = [0] * self.plan.world_size, None
        failed = error is not None
        arrived = self._transfer(local, sent, None, number, "ids", failed=failed, wait=wait)
        if arrived.failed:
            operation = self._operation(number, "bad ids")
            collectives.gather_or_raise(None, error, group=self.group, operation=operation)
        counts = arrived.counts
        return Route(
            arrived.rows, permutation, sent, counts, merged, number, not wait, arrived.wait
        )

    def _operation(self, number: int, what: str) -> str:
        return f"lookup {number} of {self._label}: {what}"

    def await_backward(self) -> PendingBackward:
        """Note a lookup with a gradient; ValueError if another table of this name awaits its."""
        names = _pending.setdefault(watch(self.group), WeakValueDictionary())
        other = names.get(self.plan.table)
        if other is not None and not other.done and other.owner._label != self._label:
            raise InputError(
                f"{self.plan.where}: another table of this name has been looked up and awaits its"
                " backward: pass Embedding(name=...), by which ranks tell them apart"
            )
        names[self.plan.table] = pending = PendingBackward(self)
        return pending

    def _prepare_few(self, slots: Tensor) -> _ToSend:
        numbers = slots.tolist()
        unique = sorted(set(numbers))
        sent = [0] * self.plan.world_size
        for slot in unique:
            sent[slot // self.plan.block] += 1
        local = torch.tensor([slot % self.plan.block for slot in unique], dtype=torch.int64)
        positions = {slot: position for position, slot in enumerate(unique)}
        inverse = torch.tensor([positions[slot] for slot in numbers], dtype=torch.int64)
        none = slots[:0]
        merged = Merged(torch.tensor(unique, dtype=torch.int64), inverse, none, none)
        return sent, local, inverse, merged

    def _prepare_many(self, slots: Tensor) -> _ToSend:
        bucketize = self._merge if self.deduplicate else self._bucketize
        counts, local, permutation, merged = bucketize(slots)
        return counts.tolist(), local, permutation, merged

    def _merge(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor, Merged]:
        """As :meth:`_bucketize`, each slot once; ascending slots are ordered by owner."""
        plan = self.plan
        merged = kernels.merge(slots, plan.num_rows)
        if self._bounds is None or self._bounds.device != slots.device:
            self._bounds = torch.arange(plan.world_size + 1, device=slots.device) * plan.block
        counts = torch.searchsorted(merged.unique, self._bounds).diff()
        return counts, merged.unique % plan.block, merged.inverse, merged

    def _bucketize(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return ids per owner ``(W,)``, rows of its shard ``(n,)``, and a permutation ``(n,)``."""
        import fbgemm_gpu  # noqa: F401  # registers the operator

        def number(n: int) -> Tensor:
            return torch.full((1,), n, dtype=torch.int64, device=slots.device)

        lengths, local, _, _, permutation = torch.ops.fbgemm.block_bucketize_sparse_features(
            number(len(slots)), slots, False, True, number(self.plan.block), self.plan.world_size
        )
        return lengths, local, permutation, None

    def rows(self, request: Route) -> Tensor:
        """See :class:`Lookup`. A collective, also in backward."""
        request.wait()
        return _ReturnRows.apply(self._table.lookup(request.rows), request, self)

    def _transfer(
        self,
        values: Tensor,
        sent: list[int],
        received: list[int] | None,
        number: int,
        what: str,
        **options: bool,
    ) -> collectives.Arrived:
        row_bytes = values.itemsize * math.prod(values.shape[1:])
        self.sent_bytes += (len(values) - sent[self.plan.rank]) * row_bytes
        operation = self._operation(number, what)
        return collectives.all_to_all(
            values, sent, received, group=self.group, operation=operation, **options
        )

    def _transfer_rows(self, rows: Tensor, route: Route, what: str) -> Tensor:
        """Send rows to those that asked for them; or gradients to the owners."""
        forward, dtype, wire = what == "rows", rows.dtype, self.wire_dtype
        sent, received = route.received, route.sent
        if not forward:
            sent, received = received, sent
        if not rows.shape[1]:
            return rows.new_empty(sum(received), 0)
        if wire is None or wire.itemsize >= dtype.itemsize:
            wire = None
        else:
            rows = rows.to(wire).view(torch.uint8)  # every backend can send bytes
        continues = forward and not route.prefetched
        arrived = self._transfer(
            rows.contiguous(), sent, received, route.number, what, continues=continues
        ).rows
        return arrived if wire is None else arrived.view(wire).to(dtype)


def message_bytes(world_size: int, ids: float) -> float:
    """Return the bytes that a rank sends for ``ids`` distinct ids, spread evenly."""
    return 8 * ids * (world_size - 1) / world_size


class _ReturnRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, looked_up: Tensor, route: Route, exchange: Exchange) -> Tensor:
        ctx.route, ctx.exchange = route, exchange
        if ctx.needs_input_grad[0]:
            ctx.pending = exchange.await_backward()
        rows = exchange._transfer_rows(looked_up, route, "rows")
        return kernels.take(rows, route.permutation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        route, exchange, grad = ctx.route, ctx.exchange, kernels.contiguous(grad)
        ctx.pending.done = True
        if route.merged is not None:
            by_owner = route.merged.sum(grad)
        else:
            by_owner = kernels.empty(grad.shape, grad.dtype, grad.device)
            kernels.put(by_owner, route.permutation, grad)
        rows = exchange._transfer_rows(by_owner, route, "gradients")
        return (rows if exchange._scale == 1 else rows.mul_(exchange._scale)), None, None
