"""One lookup's way between ranks.

Ids to the owners of their rows, rows back, gradients by the exact transpose.

With one rank nothing is communicated. With several, a forward makes three collectives and a
backward one:

1. counts, all to all: how many ids each rank asks of each other one; -1 says that the sender's ids
   are bad, so that all ranks raise the same error instead of waiting for each other. So do they if
   the message is of another lookup than their own. A few ids travel in the same message, and so do
   as many as the lookup before had, if they are not too many;
2. ids, all to all, if there are more: as row numbers of the owner's shard, each once unless told
   otherwise;
3. rows, all to all, then a permutation back into the order of the ids. Backward runs 3. the other
   way, and adds up the gradients of an id before they travel.

Every rank takes part in every lookup, with an empty batch if it has no ids, and in every backward.
"""

import math
import zlib
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from shardemb import kernels
from shardemb.comm import collectives, watchdog
from shardemb.exceptions import IdRangeError, IdTypeError, UsageError
from shardemb.kernels import Merged
from shardemb.sharding.placement import RowPlan
from shardemb.utils.types import GradientReduction

#: ids for one rank that fit into the message that says how many there are: a message of 512 bytes,
#: as fast as one of 8
_FEW = 61
#: ids for one rank that the message has room for at most, if the lookup before had so many: padding
#: costs bytes
_MANY = 4096
#: numbers before them: how many ids follow, or -1; the most that the sender asks of any rank; which
#: lookup it is
_HEAD = 3

_ERRORS: dict[str, type[Exception]] = {
    e.__name__: e for e in (IndexError, IdTypeError, AttributeError)
}


class _Room:
    """How many ids for one rank the next message of a group has room for.

    What all ranks have seen alone changes it.
    """

    def __init__(self) -> None:
        self.ids, self._calm = _FEW, 0

    def adapt(self, most: int) -> None:
        """Make room for as many ids as the lookup had at most, and an eighth more.

        Less after 16 lookups of half of it.
        """
        self._calm = self._calm + 1 if most < self.ids // 2 else 0
        if self.ids < most <= _MANY or self._calm > 16:
            self.ids, self._calm = max(_FEW, most + most // 8), 0


#: of a group, not of a table: ranks in lookups of different tables understand each other's messages
_rooms: WeakKeyDictionary[watchdog.PeerWatchdog, _Room] = WeakKeyDictionary()


def _room_of(group: Any) -> _Room:
    return _rooms.setdefault(watchdog.watch(group), _Room())


@dataclass(frozen=True)
class Route:
    """The way of one lookup."""

    #: (M,) rows of this rank's shard that all ranks together ask for, in order of the asking rank
    rows: Tensor
    #: (n,) where the answer to this rank's i-th id stands among the rows that come back; None with
    #: one rank
    permutation: Tensor | None
    #: ids that this rank sent to each rank
    sent: list[int]
    #: ids that each rank sent to this one
    received: list[int]
    #: the duplicates among this rank's ids, if each id was sent once
    merged: Merged | None = None
    #: the transfer of the ids, as long as it may be under way
    pending: list[Any] = field(default_factory=list)

    def wait(self) -> "Route":
        """Return when :attr:`rows` have arrived."""
        if self.pending:
            self.pending[0].wait()
            self.pending.clear()
        return self


#: A line for each rank (_HEAD numbers, then the ids if these are few), and what a Route has: ids
#: per rank, their row numbers ``(n,)``, the way back, the duplicates.
_ToSend = tuple[Tensor, list[int], Tensor, Tensor, Merged | None]


@dataclass(frozen=True)
class RowsUnderWay:
    """Rows that were looked up and are travelling back."""

    route: Route
    #: (M, D) at their owner, differentiable
    looked_up: Tensor
    #: (m, D) where they arrive, as they travel
    arriving: Tensor
    #: None if there is nothing to wait for
    work: Any


class Exchange:
    """Routes ids and rows of one table.

    Args:
        plan: where the rows lie; its world size is the group's.
        group: process group; None with one rank.
        reduction: "mean" divides the gradients that arrive by the number of ranks, as
            DistributedDataParallel does; "sum" leaves them.
        deduplicate: send each id of a batch once, and its summed gradient back.
        wire_dtype: float16 or bfloat16 in which rows and gradients travel; None for their own.
    """

    def __init__(
        self,
        plan: RowPlan,
        group: Any,
        reduction: GradientReduction,
        deduplicate: bool = True,
        wire_dtype: torch.dtype | None = None,
    ) -> None:
        self.plan = plan
        self.group = group
        self.deduplicate = deduplicate
        self.wire_dtype = wire_dtype
        self._bounds: Tensor | None = None
        #: of this table, and the number of the lookup
        self._tag, self._lookup = zlib.crc32(plan.table.encode()) << 30, 0
        #: that this rank has sent to others so far: ids, rows and gradients
        self.sent_bytes = 0
        self._scale = 1.0 / plan.world_size if reduction == "mean" else 1.0

    def check(self, ids: Any) -> Exception | None:
        """Return the error that these ids deserve; it names table, value, range and rank."""
        plan = self.plan
        where = f"table {plan.table!r}, rank {plan.rank} of {plan.world_size}"
        if not isinstance(ids, Tensor):
            return AttributeError(
                f"{where}: got ids of type {type(ids).__name__}, expected a torch.Tensor of"
                " integers"
            )
        if ids.dtype not in (torch.int32, torch.int64):
            return IdTypeError(
                f"{where}: got ids of dtype {ids.dtype}, expected torch.int64 or torch.int32:"
                " convert them"
            )
        if ids.numel():
            least, most = torch.aminmax(ids)
            low, high = least.item(), most.item()
            if low < 0 or high >= plan.num_rows:
                bad = low if low < 0 else high
                return IdRangeError(
                    f"{where}: index out of range: got id {bad} among {ids.numel()} ids, expected 0"
                    f" <= id < {plan.num_rows}"
                )
        return None

    def send_ids(self, ids: Any, device: torch.device, wait: bool = True) -> Route:
        """Check flat ids ``(n,)`` and bring them to the owners of their rows. A collective.

        Args:
            ids: to look up.
            device: of the rows.
            wait: return when they have arrived; otherwise :meth:`Route.wait` does.

        Raises:
            IndexError: an id out of range, on all ranks.
            IdTypeError: ids that are not int32 or int64, on all ranks; it is a TypeError and a
                RuntimeError.
            AttributeError: ids that are not a tensor, on all ranks.
        """
        error = self.check(ids)
        if self.plan.world_size == 1:
            if error is not None:
                raise error
            rows = ids.to(
                device, torch.int64
            ).contiguous()  # FBGEMM would read a strided tensor as if it were dense
            if (
                not wait
            ):  # the caller may fill the same tensor with the next ids before these are looked up
                rows = rows.clone()
            return Route(rows, None, [len(rows)], [len(rows)])
        world_size, room = self.plan.world_size, _room_of(self.group)
        self._lookup += 1
        # for a few ids of a few ranks Python's own numbers take half the time of a tensor's
        # operators
        small = device.type == "cpu" and world_size * _FEW <= 1024
        if error is not None:
            message = torch.full((world_size, _HEAD + room.ids), -1, device=device)
        else:
            slots = self.plan.slots(ids.to(device, torch.int64)).contiguous()
            merge = (
                self._merge_few
                if self.deduplicate and small and len(slots) <= _FEW
                else self._merge_many
            )
            message, sent, local, permutation, merged = merge(slots, room.ids)
        answer = torch.empty_like(message)
        self.sent_bytes += message.numel() * message.itemsize * (world_size - 1) // world_size
        collectives.all_to_all(
            answer, message, group=self.group, operation=self._operation("counts")
        )
        few = small and room.ids == _FEW
        lines = answer.tolist() if few else answer[:, :_HEAD].tolist()
        received = [line[0] for line in lines]
        if error is not None or min(received) < 0:
            self._raise_everywhere(error)
        if any(line[2] != self._mark for line in lines):
            self._raise_astray()
        most = max(line[1] for line in lines)
        fits = most <= room.ids  # on every rank
        room.adapt(most)
        if fits:
            if few:
                rows = torch.tensor(
                    [row for line in lines for row in line[_HEAD : _HEAD + line[0]]],
                    dtype=torch.int64,
                )
            else:
                rows = torch.cat(
                    [
                        line[_HEAD : _HEAD + count]
                        for line, count in zip(answer, received, strict=True)
                    ]
                )
            return Route(rows, permutation, sent, received, merged)
        rows = local.new_empty(sum(received))
        self.sent_bytes += (len(local) - sent[self.plan.rank]) * local.itemsize
        operation = self._operation("ids")
        work = collectives.all_to_all(
            rows, local, received, sent, group=self.group, operation=operation, wait=wait
        )
        return Route(rows, permutation, sent, received, merged, [] if wait else [work])

    def _operation(self, what: str) -> str:
        return f"lookup {self._lookup} of table {self.plan.table!r}: {what}"

    @property
    def _mark(self) -> int:
        return self._tag + self._lookup % (1 << 30)

    def _raise_astray(self) -> None:
        mine = (self.plan.table, self._lookup, watchdog.step())
        told = collectives.gather(mine, group=self.group, operation=self._operation("which one?"))
        each = "; ".join(
            f"rank {rank} lookup {number} of table {name!r} in step {step}"
            for rank, (name, number, step) in enumerate(told)
        )
        raise UsageError(
            f"ranks are in different lookups: {each}: every rank must look up the same tables in"
            " the same order"
        )

    def _merge_few(self, slots: Tensor, room: int) -> _ToSend:
        numbers = slots.tolist()
        unique = sorted(set(numbers))
        lines: list[list[int]] = [[] for _ in range(self.plan.world_size)]
        for slot in unique:
            lines[slot // self.plan.block].append(slot % self.plan.block)
        sent = [len(line) for line in lines]
        message = torch.tensor(
            [
                [len(line), max(sent), self._mark, *line, *[-1] * (_FEW - len(line))]
                for line in lines
            ]
        )
        message = F.pad(message, (0, room - _FEW), value=-1)
        local = torch.tensor([row for line in lines for row in line], dtype=torch.int64)
        places = {slot: place for place, slot in enumerate(unique)}
        inverse = torch.tensor([places[slot] for slot in numbers], dtype=torch.int64)
        none = slots[:0]
        return (
            message,
            sent,
            local,
            inverse,
            Merged(torch.tensor(unique, dtype=torch.int64), inverse, none, none),
        )

    def _merge_many(self, slots: Tensor, room: int) -> _ToSend:
        counts, local, permutation, merged = (
            self._merge(slots) if self.deduplicate else self._bucketize(slots)
        )
        sent = counts.tolist()
        message = torch.full((len(sent), _HEAD + room), -1, device=slots.device)
        message[:, 0], message[:, 1], message[:, 2] = counts, max(sent), self._mark
        if max(sent) <= room:
            first = torch.arange(room, device=slots.device) < counts.unsqueeze(1)
            message[:, _HEAD:].masked_scatter_(first, local)
        return message, sent, local, permutation, merged

    def check_everywhere(self, ids: Any, device: torch.device) -> None:
        """Raise on all ranks what the ids of any rank deserve: :meth:`send_ids` without sending.

        A collective.
        """
        error = self.check(ids)
        if self.plan.world_size > 1:
            bad = torch.tensor(int(error is not None), device=device)
            collectives.all_reduce(
                bad,
                collectives.MAX,
                group=self.group,
                operation=self._operation("are all ids good?"),
            )
            if bad:
                self._raise_everywhere(error)
        elif error is not None:
            raise error

    def _merge(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor, Merged]:
        """As :meth:`_bucketize`, each slot once.

        Ascending slots are in the order of their owners.
        """
        plan = self.plan
        merged = kernels.merge(slots, plan.num_rows)
        if self._bounds is None or self._bounds.device != slots.device:
            self._bounds = torch.arange(plan.world_size + 1, device=slots.device) * plan.block
        counts = torch.searchsorted(merged.unique, self._bounds).diff()
        return counts, merged.unique % plan.block, merged.inverse, merged

    def _bucketize(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return ids per owner ``(W,)``, row numbers within the owner's shard ``(n,)``.

        And their permutation ``(n,)``.
        """
        import fbgemm_gpu  # noqa: F401  # registers the operator

        lengths, local, _, _, permutation = torch.ops.fbgemm.block_bucketize_sparse_features(
            torch.full((1,), len(slots), dtype=torch.int64, device=slots.device),
            slots,
            False,
            True,
            torch.full((1,), self.plan.block, dtype=torch.int64, device=slots.device),
            self.plan.world_size,
        )
        return lengths, local, permutation, None

    def _raise_everywhere(self, error: Exception | None) -> None:
        mine = None if error is None else (type(error).__name__, str(error))
        told = collectives.gather(mine, group=self.group, operation=self._operation("bad ids"))
        bad = [entry for entry in told if entry is not None]
        raise _ERRORS[bad[0][0]]("; ".join(text for _, text in bad))

    def return_rows(self, rows: Tensor, route: Route, wait: bool = True) -> RowsUnderWay:
        """Let the owners' rows ``(M, D)`` travel back to who asked. A collective.

        Args:
            rows: that the route's :attr:`Route.rows` name.
            route: of the lookup.
            wait: return when they have arrived; otherwise :meth:`arrive` waits.
        """
        return RowsUnderWay(
            route, rows, *self._transfer(rows.detach(), route.sent, route.received, "rows", wait)
        )

    def arrive(self, way: RowsUnderWay) -> Tensor:
        """Return the rows ``(n, D)`` in the order of the ids."""
        return _ReturnRows.apply(way.looked_up, way, self)

    def _transfer(
        self, rows: Tensor, received: list[int], sent: list[int], what: str, wait: bool = True
    ) -> tuple[Tensor, Any]:
        """Start an all-to-all of rows ``(sum(sent), D)``.

        Return where they arrive, as they travel, and what to wait for.
        """
        if self.wire_dtype is not None and self.wire_dtype.itemsize < rows.itemsize:
            rows = rows.to(self.wire_dtype).view(torch.uint8)  # which every backend can send
        arriving = kernels.empty((sum(received), rows.shape[1]), rows.dtype, rows.device)
        if not rows.shape[1]:
            return arriving, None
        rows, operation = rows.contiguous(), self._operation(what)
        self.sent_bytes += (len(rows) - sent[self.plan.rank]) * rows.shape[1] * rows.itemsize
        work = collectives.all_to_all(
            arriving, rows, received, sent, group=self.group, operation=operation, wait=wait
        )
        return arriving, work

    def _received(self, arriving: Tensor, work: Any, dtype: torch.dtype) -> Tensor:
        if work is not None:
            work.wait()
        if self.wire_dtype is None or arriving.dtype == dtype:
            return arriving
        return arriving.view(self.wire_dtype).to(dtype)


def message_bytes(world_size: int, ids: float) -> float:
    """Return what a rank sends to others to ask for distinct ids, spread evenly.

    At most so many, where their number varies.
    """
    each = ids / world_size
    most = each + 3 * math.sqrt(each)
    numbers = _HEAD + max(_FEW, most * 9 / 8) if most <= _MANY else _HEAD + _FEW + each
    return 8 * (world_size - 1) * numbers


class _ReturnRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, looked_up: Tensor, way: RowsUnderWay, exchange: Exchange) -> Tensor:
        ctx.route, ctx.exchange = way.route, exchange
        assert way.route.permutation is not None
        return kernels.take(
            exchange._received(way.arriving, way.work, looked_up.dtype), way.route.permutation
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        route, exchange, grad = ctx.route, ctx.exchange, kernels.contiguous(grad)
        if route.merged is not None:
            by_owner = route.merged.sum(grad)
        else:
            by_owner = kernels.empty(grad.shape, grad.dtype, grad.device)
            kernels.put(by_owner, route.permutation, grad)
        rows = exchange._received(
            *exchange._transfer(by_owner, route.received, route.sent, "gradients"), grad.dtype
        )
        return (rows if exchange._scale == 1 else rows.mul_(exchange._scale)), None, None
