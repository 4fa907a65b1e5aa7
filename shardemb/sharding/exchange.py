"""The exchange of one lookup between ranks: ids to owners, rows back, gradients to owners.

A forward makes two or three all-to-alls, a backward one:

1. a header for each rank: how many ids follow, or -1 if the sender's ids are bad, and the number of
   the lookup, so that all ranks raise on bad ids and on different lookups. It also carries few ids,
   or as many as the last lookup had;
2. if there are more ids, all of them: row numbers of the owner's shard, each once by default;
3. the rows, which are then permuted into the order of the ids. Backward sums the gradients of equal
   ids and sends them the other way.

Every rank takes part in every lookup and backward, with an empty batch if it has no ids.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from shardemb import kernels
from shardemb.comm import collectives, watchdog
from shardemb.exceptions import RanksDisagreeError
from shardemb.kernels import Merged
from shardemb.sharding.lookup import Lookup, id_error
from shardemb.sharding.options import Sharding
from shardemb.sharding.placement import RowPlan
from shardemb.sharding.table import Table

#: fewest ids per rank in a header: a message of 512 bytes is as fast as one of 8
_FEW = 61
#: most ids per rank in a header, because padding costs bytes
_MANY = 4096
#: numbers before the ids: ids that follow (-1: bad), most ids for any rank, number of the lookup
_HEAD = 3


class _HeaderSize:
    """Changes only by values that all ranks have received, so that they agree."""

    def __init__(self) -> None:
        self.ids, self._small_lookups = _FEW, 0

    def adapt(self, most: int) -> None:
        """Grow to 9/8 of the last lookup's ids; shrink after 16 lookups of less than half."""
        self._small_lookups = self._small_lookups + 1 if most < self.ids // 2 else 0
        if self.ids < most <= _MANY or self._small_lookups > 16:
            self.ids, self._small_lookups = max(_FEW, most + most // 8), 0


#: per group, so that ranks in lookups of different tables can read each other's headers
_header_sizes: WeakKeyDictionary[watchdog.PeerWatchdog, _HeaderSize] = WeakKeyDictionary()


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
    #: waits until :attr:`rows` have arrived
    wait: Callable[[], None] = collectives.already_done


#: header lines, ids per rank, their row numbers ``(n,)``, the permutation, the duplicates
_ToSend = tuple[Tensor, list[int], Tensor, Tensor, Merged | None]


class Exchange(Lookup):
    """Routes the ids and rows of one table between the ranks of a group."""

    def __init__(self, plan: RowPlan, group: Any, options: Sharding, table: Table) -> None:
        self.plan, self.group, self._table = plan, group, table
        self.deduplicate, self.wire_dtype = options.deduplicate, options.wire_dtype
        self._scale = 1.0 / plan.world_size if options.gradient_reduction == "mean" else 1.0
        self._bounds: Tensor | None = None
        self._table_mark, self._lookup = zlib.crc32(plan.table.encode()) << 30, 0

    def send(self, ids: Any, wait: bool = True) -> Route:
        """See :class:`Lookup`. A collective; RanksDisagreeError for ranks in different lookups."""
        error = id_error(self.plan, ids)
        world_size, device = self.plan.world_size, self._table.device
        watch = watchdog.watch(self.group)
        size = _header_sizes.setdefault(watch, _HeaderSize())
        capacity = size.ids
        self._lookup += 1
        # for few ids and ranks, Python's numbers take half the time of tensor operators
        small = device.type == "cpu" and world_size * _FEW <= 1024
        if error is not None:
            header = torch.full((world_size, _HEAD + capacity), -1, device=device)
        else:
            slots = self.plan.order.slots(ids.to(device, torch.int64)).contiguous()
            few = self.deduplicate and small and len(slots) <= _FEW
            prepare = self._prepare_few if few else self._prepare_many
            header, sent, local, permutation, merged = prepare(slots, capacity)
        answer = torch.empty_like(header)
        self.sent_bytes += header.numel() * header.itemsize * (world_size - 1) // world_size
        collectives.all_to_all(
            answer, header, group=self.group, operation=self._operation("counts")
        )
        short = small and capacity == _FEW
        lines = answer.tolist() if short else answer[:, :_HEAD].tolist()
        received = [line[0] for line in lines]
        if error is not None or min(received) < 0:
            collectives.gather_or_raise(
                None, error, group=self.group, operation=self._operation("bad ids")
            )
        if any(line[2] != self._mark for line in lines):
            self._raise_different_lookups()
        most = max(line[1] for line in lines)
        size.adapt(most)
        if most <= capacity:  # on every rank
            if short:
                asked = [row for line in lines for row in line[_HEAD : _HEAD + line[0]]]
                rows = torch.tensor(asked, dtype=torch.int64)
            else:
                parts = zip(answer, received, strict=True)
                rows = torch.cat([line[_HEAD : _HEAD + count] for line, count in parts])
            return Route(rows, permutation, sent, received, merged)
        rows, finish = self._transfer(local, received, sent, "ids", wait)
        return Route(rows, permutation, sent, received, merged, finish)

    def _operation(self, what: str) -> str:
        return f"lookup {self._lookup} of table {self.plan.table!r}: {what}"

    @property
    def _mark(self) -> int:
        return self._table_mark + self._lookup % (1 << 30)

    def _raise_different_lookups(self) -> None:
        lookups = collectives.gather(
            (self.plan.table, self._lookup, watchdog.step()),
            group=self.group,
            operation=self._operation("which one?"),
        )
        text = "; ".join(
            f"rank {rank} lookup {number} of table {name!r} in step {step}"
            for rank, (name, number, step) in enumerate(lookups)
        )
        raise RanksDisagreeError(
            f"ranks are in different lookups: {text}: every rank must look up the same tables in"
            " the same order"
        )

    def _prepare_few(self, slots: Tensor, capacity: int) -> _ToSend:
        numbers = slots.tolist()
        unique = sorted(set(numbers))
        lines: list[list[int]] = [[] for _ in range(self.plan.world_size)]
        for slot in unique:
            lines[slot // self.plan.block].append(slot % self.plan.block)
        sent = [len(line) for line in lines]
        most, mark = max(sent), self._mark
        header = torch.tensor(
            [[len(line), most, mark, *line, *[-1] * (_FEW - len(line))] for line in lines]
        )
        header = F.pad(header, (0, capacity - _FEW), value=-1)
        local = torch.tensor([row for line in lines for row in line], dtype=torch.int64)
        positions = {slot: position for position, slot in enumerate(unique)}
        inverse = torch.tensor([positions[slot] for slot in numbers], dtype=torch.int64)
        none = slots[:0]
        merged = Merged(torch.tensor(unique, dtype=torch.int64), inverse, none, none)
        return header, sent, local, inverse, merged

    def _prepare_many(self, slots: Tensor, capacity: int) -> _ToSend:
        bucketize = self._merge if self.deduplicate else self._bucketize
        counts, local, permutation, merged = bucketize(slots)
        sent = counts.tolist()
        header = torch.full((len(sent), _HEAD + capacity), -1, device=slots.device)
        header[:, 0], header[:, 1], header[:, 2] = counts, max(sent), self._mark
        if max(sent) <= capacity:
            used = torch.arange(capacity, device=slots.device) < counts.unsqueeze(1)
            header[:, _HEAD:].masked_scatter_(used, local)
        return header, sent, local, permutation, merged

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
        self, values: Tensor, received: list[int], sent: list[int], what: str, wait: bool = True
    ) -> tuple[Tensor, Callable[[], None]]:
        """Send each rank its rows; return those received, and a function that waits for them."""
        arriving = kernels.empty((sum(received), *values.shape[1:]), values.dtype, values.device)
        row_bytes = values.itemsize * math.prod(values.shape[1:])
        if not row_bytes:
            return arriving, collectives.already_done
        self.sent_bytes += (len(values) - sent[self.plan.rank]) * row_bytes
        operation = self._operation(what)
        finish = collectives.all_to_all(
            arriving, values, received, sent, group=self.group, operation=operation, wait=wait
        )
        return arriving, finish

    def _transfer_rows(
        self, rows: Tensor, received: list[int], sent: list[int], what: str
    ) -> Tensor:
        dtype, wire = rows.dtype, self.wire_dtype
        if wire is None or wire.itemsize >= dtype.itemsize:
            return self._transfer(rows.contiguous(), received, sent, what)[0]
        as_bytes = rows.to(wire).view(torch.uint8).contiguous()  # every backend can send bytes
        return self._transfer(as_bytes, received, sent, what)[0].view(wire).to(dtype)


def message_bytes(world_size: int, ids: float) -> float:
    """Return the bytes that a rank sends for ``ids`` distinct ids, spread evenly."""
    per_rank = ids / world_size
    most = per_rank + 3 * math.sqrt(per_rank)  # counts vary between lookups
    numbers = _HEAD + (max(_FEW, most * 9 / 8) if most <= _MANY else _FEW + per_rank)
    return 8 * (world_size - 1) * numbers


class _ReturnRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, looked_up: Tensor, route: Route, exchange: Exchange) -> Tensor:
        ctx.route, ctx.exchange = route, exchange
        rows = exchange._transfer_rows(looked_up, route.sent, route.received, "rows")
        return kernels.take(rows, route.permutation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        route, exchange, grad = ctx.route, ctx.exchange, kernels.contiguous(grad)
        if route.merged is not None:
            by_owner = route.merged.sum(grad)
        else:
            by_owner = kernels.empty(grad.shape, grad.dtype, grad.device)
            kernels.put(by_owner, route.permutation, grad)
        rows = exchange._transfer_rows(by_owner, route.received, route.sent, "gradients")
        return (rows if exchange._scale == 1 else rows.mul_(exchange._scale)), None, None
