"""The interface.

PyKEEN's ``Representation`` and ``Embedding``, over a table whose rows lie on several ranks.
"""

import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardemb import kernels
from shardemb.comm import collectives
from shardemb.exceptions import InputError, InputTypeError, UsageError
from shardemb.initializers import PretrainedInitializer, fill_rows, resolve_initializer
from shardemb.optim import FusedOptimizer
from shardemb.regularizers import resolve_regularizer
from shardemb.sharding.exchange import Exchange, Route, RowsUnderWay
from shardemb.sharding.fused_table import FusedTable
from shardemb.sharding.placement import RowPlan
from shardemb.sharding.table import ParameterTable, Table
from shardemb.sharding.torchrec_table import (
    Groups,
    Sent,
    TorchRecOptions,
    TorchRecTable,
    make_groups,
)
from shardemb.transforms import (
    is_plain_normalize,
    probe_constrainer,
    resolve_constrainer,
    resolve_normalizer,
)
from shardemb.utils.types import (
    Backend,
    Gradient,
    GradientReduction,
    Initializer,
    Placement,
    RowFunction,
)


class Representation(nn.Module, ABC):
    """Maps ids of any shape ``s`` to tensors ``(*s, *shape)``.

    All of it is a tensor ``(max_id, *shape)``.

    Args:
        max_id: ids are 0 to ``max_id - 1``.
        shape: of one representation.
        normalizer: applied to what was looked up, in every forward: a name, a callable or None.
        normalizer_kwargs: its keyword arguments.
        regularizer: collects a term of the loss from every forward: a name, a class, an instance or
            None.
        regularizer_kwargs: its keyword arguments.
        dropout: probability; each looked-up id has its own mask.
        unique: look each id of a batch up once, and repeat it after normalizing.
    """

    def __init__(
        self,
        max_id: int,
        shape: int | Sequence[int] = 64,
        normalizer: Any = None,
        normalizer_kwargs: Mapping[str, Any] | None = None,
        regularizer: Any = None,
        regularizer_kwargs: Mapping[str, Any] | None = None,
        dropout: float | None = None,
        unique: bool | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not super(): the bridge's next class is PyKEEN's Representation
        self.max_id = max_id
        self.shape = _as_shape(shape)
        self.normalizer: RowFunction | None = resolve_normalizer(normalizer, normalizer_kwargs)
        self.regularizer: Any = resolve_regularizer(regularizer, regularizer_kwargs)
        self.dropout = None if dropout is None else nn.Dropout(dropout)
        self.unique = (
            (not isinstance(self, Embedding) and not dropout) if unique is None else unique
        )

    @abstractmethod
    def _plain_forward(self, indices: Tensor | None = None) -> Tensor:
        """Look ids up, and nothing else."""

    def forward(self, indices: Tensor | None = None) -> Tensor:
        """Look ids up, normalize, repeat (with ``unique``), regularize, drop out; in this order.

        Args:
            indices: integers of any shape ``s``; None stands for ``torch.arange(max_id)``.

        Returns:
            ``(*s, *shape)``, contiguous.
        """
        indices, inverse = self._unique(indices)
        x = self._plain_forward(indices)
        if self.normalizer is not None:
            x = self.normalizer(x)
        if inverse is not None:
            x = x[inverse]
        if self.regularizer is not None:
            self.regularizer.update(x)
        return x if self.dropout is None else self.dropout(x)

    def _unique(self, indices: Any) -> tuple[Any, Tensor | None]:
        """With ``unique``.

        Return each index once, and where each of the given ones stands among them.
        """
        return (
            indices.unique(return_inverse=True)
            if self.unique and isinstance(indices, Tensor)
            else (indices, None)
        )

    def reset_parameters(self) -> None:
        """Start anew."""

    def post_parameter_update(self) -> None:
        """Do what shall follow an optimizer step, outside of the gradient."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter([*self.parameters(), *self.buffers()])).device

    def extra_repr(self) -> str:
        """Show what makes this representation what it is."""
        parts = [f"max_id={self.max_id}", f"shape={self.shape}", f"unique={self.unique}"]
        return ", ".join(
            parts + ([f"normalizer={self.normalizer}"] if self.normalizer is not None else [])
        )


@dataclass(frozen=True)
class Prefetched:
    """Ids on their way, see :meth:`Embedding.prefetch`; give it to the table in their place."""

    table: "Embedding"
    #: of the ids, or of the unique ones
    shape: tuple[int, ...]
    #: with ``unique``, where each id stands among the unique ones
    inverse: Tensor | None
    route: Route | Sent
    #: None unless the rows were looked up too
    rows: Tensor | RowsUnderWay | None


class Embedding(Representation):
    """A trainable table, row-sharded over the ranks of a process group.

    PyKEEN's arguments mean what they mean there.

    Without an initialized ``torch.distributed`` it is one shard in this process. Within a group of
    several ranks the constructor, :meth:`forward`, its backward and :meth:`reset_parameters` are
    collectives: every rank calls them, in the same order, each with its own ids (an empty tensor if
    it has none). As in PyKEEN, rows are N(0, 1) until :meth:`reset_parameters` runs the
    initializer. ``forward(None)`` aliases the rows in one process under ``torch.no_grad``;
    otherwise it is a copy, of all ranks' rows.

    A ``state_dict`` (and a pickle) holds this rank's rows, and says which; the fused optimizer's
    state is only in a pickle. ``load_state_dict`` takes it back, or the state dict of a whole
    table, pykeen.nn.Embedding's or torch.nn.Embedding's, of which each rank keeps its part;
    :meth:`full_state_dict` is the way back. To save and load a job use :mod:`shardemb.checkpoint`.

    Args:
        max_id: ids are 0 to ``max_id - 1``.
        num_embeddings: older name of ``max_id``.
        embedding_dim: one-dimensional ``shape``.
        shape: of one row; give it or ``embedding_dim``.
        initializer: fills rows ``(n, *shape)`` (complex ones as real ``(n, *shape, 2)``): a name, a
            callable, :class:`~shardemb.initializers.PretrainedInitializer` or None for normal. It
            is called for fixed blocks of global rows with a seeded generator, so the table is the
            same at every number of ranks.
        initializer_kwargs: its keyword arguments.
        constrainer: row-wise function that :meth:`post_parameter_update` applies to the rows that
            changed: a name, a callable or None.
        constrainer_kwargs: its keyword arguments.
        trainable: whether rows get gradients.
        dtype: of the rows, complex ones included; torch's default.
        normalizer: see :class:`Representation`, as the following ones.
        normalizer_kwargs: its keyword arguments.
        regularizer: term of the loss.
        regularizer_kwargs: its keyword arguments.
        dropout: probability.
        unique: look each id of a batch up once.
        gradient: "sparse": a COO gradient on the shard's Parameter, for torch.optim.SGD, Adagrad,
            SparseAdam or :class:`~shardemb.RowWiseAdagrad`; a step costs what it touches. "dense":
            an ordinary gradient for any optimizer; every step costs all rows. "fused": FBGEMM
            updates the rows in backward as ``optimizer`` says; one lookup a step, no gradient is
            kept.
        optimizer: of the fused gradient, :class:`~shardemb.FusedOptimizer`.
        backend: of the fused gradient: "fbgemm", this package's exchange around FBGEMM's tables, or
            "torchrec", TorchRec's ShardedEmbeddingCollection, with the same results; it needs a
            process group, also with one rank.
        torchrec: what TorchRec does with ``backend="torchrec"``,
            :class:`~shardemb.TorchRecOptions`.
        placement: "row_wise": each row on one rank; "replicated": all rows on every rank, whose
            lookups are local and whose gradients :class:`~shardemb.Coordinator` reduces. For small
            tables. (A bad id in a replicated table raises on its own rank only.)
        gradient_reduction: "mean" over ranks, as DistributedDataParallel does, or "sum".
        deduplicate: on several ranks, send each id of a batch once, and the sum of its gradients
            back. Sums are then made in another order than in one process: False keeps it, so that
            SGD on summed gradients is the same bit by bit.
        wire_dtype: torch.float16 or torch.bfloat16, in which rows and gradients travel between
            ranks; None for the table's own. A value is off by at most 2^-11 (float16) or 2^-8
            (bfloat16) of itself. float16 ends at 65504, above which values become infinite, and has
            fewer digits below 6e-5: keep gradients above, by the loss's scale, or take bfloat16.
        initialize: run the initializer in the constructor, instead of filling rows with N(0, 1)
            that :meth:`reset_parameters` overwrites: half the time for a large table.
        process_group: default: the default group, if there is one.
        seed: of the initial rows; None draws one from torch's generator (rank 0's, for all ranks).
        device: of the rows.
        name: of the table, for errors and checkpoints.

    Raises:
        ValueError: missing or contradictory sizes, options that do not go together, a constrainer
            that is not row-wise, ranks that disagree.
        TypeError: a shape that is neither an int nor a sequence of ints, a function that is none.
        KeyError: an unknown name of a function.
        MemoryError: the shard does not fit the free memory.
    """

    def __init__(
        self,
        max_id: int | None = None,
        num_embeddings: int | None = None,
        embedding_dim: int | None = None,
        shape: int | Sequence[int] | None = None,
        initializer: Any = None,
        initializer_kwargs: Mapping[str, Any] | None = None,
        constrainer: Any = None,
        constrainer_kwargs: Mapping[str, Any] | None = None,
        trainable: bool = True,
        dtype: torch.dtype | None = None,
        *,
        gradient: Gradient = "sparse",
        optimizer: FusedOptimizer | None = None,
        backend: Backend = "fbgemm",
        torchrec: TorchRecOptions | None = None,
        placement: Placement = "row_wise",
        gradient_reduction: GradientReduction = "mean",
        deduplicate: bool = True,
        wire_dtype: torch.dtype | None = None,
        initialize: bool = False,
        process_group: Any = None,
        seed: int | None = None,
        device: torch.device | str = "cpu",
        name: str = "embedding",
        **kwargs: Any,
    ) -> None:
        max_id = _one_max_id(max_id, num_embeddings)
        shape = _one_shape(embedding_dim, shape)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        super().__init__(max_id=max_id, shape=shape, **kwargs)
        for key, value, allowed in (
            ("gradient", gradient, ("dense", "sparse", "fused")),
            ("backend", backend, ("fbgemm", "torchrec")),
            ("placement", placement, ("row_wise", "replicated")),
            ("gradient_reduction", gradient_reduction, ("mean", "sum")),
        ):
            if value not in allowed:
                raise InputError(f"table {name!r}: got {key}={value!r}, expected one of {allowed}")
        if optimizer is not None and not isinstance(optimizer, FusedOptimizer):
            raise InputTypeError(
                f"table {name!r}: got optimizer={optimizer!r}, expected a shardemb.FusedOptimizer"
            )
        if optimizer is not None and gradient != "fused":
            raise InputError(
                f"table {name!r}: optimizer={optimizer} needs gradient='fused', got"
                f" gradient={gradient!r}"
            )
        if backend == "torchrec" and wire_dtype is not None:
            raise InputError(
                f"table {name!r}: wire_dtype={wire_dtype} is for backend='fbgemm', got"
                " backend='torchrec'"
            )
        if backend == "torchrec" and (gradient != "fused" or placement != "row_wise"):
            raise InputError(
                f"table {name!r}: backend='torchrec' is for gradient='fused' and"
                f" placement='row_wise', got gradient={gradient!r} and placement={placement!r}:"
                " change them, or use backend='fbgemm'"
            )
        if torchrec is not None and not isinstance(torchrec, TorchRecOptions):
            raise InputTypeError(
                f"table {name!r}: got torchrec={torchrec!r}, expected a shardemb.TorchRecOptions"
            )
        if torchrec is not None and backend != "torchrec":
            raise InputError(
                f"table {name!r}: torchrec={torchrec} needs backend='torchrec', got"
                f" backend={backend!r}"
            )
        if placement == "replicated" and gradient == "fused":
            raise InputError(
                f"table {name!r}: placement='replicated' with gradient='fused' would update each"
                " rank's copy by its own gradients alone: use gradient='sparse' or 'dense'"
            )
        if wire_dtype not in (None, torch.float16, torch.bfloat16):
            raise InputError(
                f"table {name!r}: got wire_dtype={wire_dtype}, expected torch.float16,"
                " torch.bfloat16 or None"
            )
        if max_id < 0 or any(size < 0 for size in shape):
            raise UsageError(
                f"table {name!r}: got max_id={max_id} and shape={shape}, expected no negative size"
            )
        if seed is not None and not (isinstance(seed, int) and 0 <= seed < 2**63):
            raise InputError(
                f"table {name!r}: got seed={seed!r}, expected an int, at least 0 and below 2**63,"
                " or None"
            )
        self.name = name
        self.gradient: Gradient = gradient
        self.placement: Placement = placement
        self.gradient_reduction: GradientReduction = gradient_reduction
        self.is_complex = dtype.is_complex
        self._shape = (*self.shape[:-1], self.shape[-1], 2) if self.is_complex else self.shape
        stored = torch.empty(0, dtype=dtype).real.dtype if self.is_complex else dtype
        self.initializer: Initializer = resolve_initializer(initializer, initializer_kwargs)
        self.constrainer: RowFunction | None = resolve_constrainer(constrainer, constrainer_kwargs)
        if not (dtype.is_floating_point or dtype.is_complex):
            raise UsageError(
                f"table {name!r}: got dtype {dtype}, expected a floating point or complex one"
            )
        # replicas also get the rows that other ranks changed, which this one has not seen
        self._changed_only = gradient != "dense" and placement == "row_wise"
        if self.constrainer is not None:
            self._changed_only &= probe_constrainer(self.constrainer, self.shape, dtype, name)

        self._due: bool | None = None
        self._group = (
            process_group
            if dist.is_initialized() and process_group is not dist.group.WORLD
            else None
        )
        ranks = (
            (dist.get_world_size(self._group), dist.get_rank(self._group))
            if dist.is_initialized()
            else (1, 0)
        )
        self._world_size = ranks[0]
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            warnings.warn(
                f"table {name!r}: WORLD_SIZE is {os.environ['WORLD_SIZE']}, but torch.distributed"
                " is not initialized, so each process makes a whole table of its own: call"
                " torch.distributed.init_process_group first",
                stacklevel=2,
            )
        self._seed = seed
        drawn = self._agree(
            f"{max_id} x {self.shape} {dtype} {gradient} {placement} {gradient_reduction}"
            f" {optimizer} {backend} {torchrec} seed {seed} deduplicate {deduplicate} wire"
            f" {wire_dtype} initialize {initialize} trainable {trainable} unique {self.unique}"
            f" initializer {_describe(self.initializer)} constrainer {_describe(self.constrainer)}"
            f" normalizer {_describe(self.normalizer)} regularizer"
            f" {type(self.regularizer).__name__}"
        )
        device = torch.device(device)
        self._groups: Groups | None = None
        if backend == "torchrec":
            self._groups = make_groups(name, self._group, torchrec or TorchRecOptions(), device)
            ranks = (dist.get_world_size(self._groups.shard), dist.get_rank(self._groups.shard))
        #: of the ranks that share the rows
        self._row_group = self._group if self._groups is None else self._groups.shard
        self.plan = RowPlan(
            name, max_id, math.prod(self._shape), *(ranks if placement == "row_wise" else (1, 0))
        )
        self._exchange = Exchange(
            self.plan, self._row_group, gradient_reduction, deduplicate, wire_dtype
        )
        track = self.constrains_changed_rows_only
        self._embeddings: Table
        if gradient == "fused":
            common: dict[str, Any] = {
                "optimizer": optimizer or FusedOptimizer(),
                "trainable": trainable,
            }
            common |= {"dtype": stored, "device": device, "track": track}
            if self._groups is None:
                self._embeddings = FusedTable(self.plan, **common)
            else:
                self._embeddings = TorchRecTable(
                    self.plan,
                    groups=self._groups,
                    options=torchrec or TorchRecOptions(),
                    reduction=gradient_reduction,
                    deduplicate=deduplicate,
                    **common,
                )
        else:
            self._embeddings = ParameterTable(
                self.plan,
                sparse=gradient == "sparse",
                trainable=trainable,
                dtype=stored,
                device=device,
                track=track,
            )
        self._fill(self.initializer if initialize else nn.init.normal_, drawn)

    @classmethod
    def from_pretrained(cls, tensor: Any, *, trainable: bool = False, **kwargs: Any) -> Self:
        """Make a table for a tensor ``(max_id, *shape)``.

        Or a pretrained initializer that holds one.

        As in PyKEEN, :meth:`reset_parameters` puts the tensor into the table, and the table is
        frozen unless ``trainable``.
        """
        initializer = PretrainedInitializer(tensor) if isinstance(tensor, Tensor) else tensor
        max_id, *shape = initializer.tensor.shape
        return cls(
            max_id=max_id, shape=shape, initializer=initializer, trainable=trainable, **kwargs
        )

    def _agree(self, what: str) -> int:
        """Return a seed that all ranks share. A collective.

        Raises on all ranks if they make different tables.
        """
        drawn = int(torch.randint(2**62, ())) if self._seed is None else self._seed
        if self._world_size == 1:
            return drawn
        told = collectives.gather(
            (self.name, what, drawn),
            group=self._group,
            operation=f"table {self.name!r}: construction",
        )
        for rank, (name, other, _) in enumerate(told):
            if [name, other] != told[0][:2]:
                raise InputError(
                    f"ranks make different tables: rank 0 {told[0][0]!r} ({told[0][1]}), rank"
                    f" {rank} {name!r} ({other}): construct tables in the same order with the same"
                    " arguments on every rank"
                )
        return told[0][2]

    @torch.no_grad()
    def _fill(self, initializer: Initializer, seed: int) -> None:
        weight = self._embeddings.weight.detach()
        fill_rows(weight, initializer, self._shape, self.plan, seed)
        self._embeddings.reset_optimizer_state()
        self._embeddings.touch_all()

    def reset_parameters(self) -> None:
        """Run the initializer, and forget the fused optimizer's state. A collective.

        With a ``seed`` the same rows come each time, otherwise new ones.
        """
        self._fill(self.initializer, self._agree("reset_parameters"))

    def post_parameter_update(self) -> None:
        """Constrain this rank's rows in place; call it after each optimizer step.

        Local to the rank.

        The first call constrains all rows. Later ones take the rows that got a gradient since the
        last call; for a constrainer that is not idempotent, and with dense gradients, all rows
        again.
        """
        if self.constrainer is not None and self._due is not False:
            if self._due:
                self._due = False
            self._embeddings.constrain_(self._row_constrainer, self._changed_only)

    def update_once(self, on: bool) -> None:
        """Let only the next :meth:`post_parameter_update` count until switched off.

        The table's model may call it too.
        """
        self._due = True if on else None

    @property
    def constrains_changed_rows_only(self) -> bool:
        """Whether :meth:`post_parameter_update` relies on knowing which rows changed."""
        return self.constrainer is not None and self._changed_only

    @property
    def _row_constrainer(self) -> RowFunction:
        """The constrainer as a function of stored rows ``(n, D)``."""
        if len(self._shape) == 1 and is_plain_normalize(self.constrainer):
            return kernels.unit_rows
        return self._constrain_stored

    def _constrain_stored(self, rows: Tensor) -> Tensor:
        assert self.constrainer is not None
        x = self.constrainer(self._as_seen(rows, (len(rows),)))
        return (torch.view_as_real(x) if x.is_complex() else x).reshape(rows.shape)

    def _as_seen(self, stored: Tensor, prefix: tuple[int, ...]) -> Tensor:
        """View stored rows ``(n, D)`` as ``(*prefix, *shape)``."""
        x = stored.reshape(*prefix, *self._shape)
        return torch.view_as_complex(x) if self.is_complex else x

    def forward(self, indices: "Tensor | Prefetched | None" = None) -> Tensor:
        """As :meth:`Representation.forward`, of ids that may have been prefetched.

        A collective on several ranks.
        """
        return super().forward(indices)  # type: ignore[arg-type]

    def _unique(self, indices: Any) -> tuple[Any, Tensor | None]:
        return (
            (indices, indices.inverse)
            if isinstance(indices, Prefetched)
            else super()._unique(indices)
        )

    def prefetch(self, indices: Tensor, stale_rows: bool = False) -> Prefetched:
        """Send the ids of a later lookup to the owners of their rows now. A collective.

        ``table(table.prefetch(ids))`` is ``table(ids)``: call this once the ids are known, say
        before the backward of the step before, and give the result to the table when the rows are
        wanted. On one rank there is nothing to send.

        Args:
            indices: integers of any shape.
            stale_rows: look the rows up now, so that they travel meanwhile too. They lack what an
                optimizer does to them between this call and the lookup; their gradients go to the
                rows all the same. (A fused Adagrad refuses it while another lookup is pending.)

        Raises:
            IndexError: ids out of range, on all ranks; and as forward.
        """
        indices, inverse = self._unique(indices)
        route = self._send(indices, wait=False)
        return Prefetched(
            self,
            tuple(indices.shape),
            inverse,
            route,
            self._start(route, wait=False) if stale_rows else None,
        )

    def _send(self, indices: Any, wait: bool = True) -> Route | Sent:
        flat = indices.reshape(-1) if isinstance(indices, Tensor) else indices
        table = self._embeddings
        if isinstance(table, TorchRecTable):
            return table.send_ids(flat, table.device)
        return self._exchange.send_ids(flat, table.device, wait)

    def _start(self, route: Route | Sent, wait: bool = True) -> Tensor | RowsUnderWay:
        """Look up what all ranks ask of this one, and let it travel back. A collective."""
        table = self._embeddings
        if isinstance(route, Sent):
            assert isinstance(table, TorchRecTable)
            return table.fetch(route)
        rows = table.lookup(route.wait().rows)
        return rows if route.permutation is None else self._exchange.return_rows(rows, route, wait)

    def _plain_forward(self, indices: "Tensor | Prefetched | None" = None) -> Tensor:
        if isinstance(indices, Prefetched):
            if indices.table is not self:
                raise InputError(
                    f"table {self.name!r}: got ids that were prefetched by table"
                    f" {indices.table.name!r}"
                )
            route, way = indices.route, indices.rows
        else:
            if indices is None:
                if self.plan.world_size == 1 and not torch.is_grad_enabled():
                    return self._as_seen(self._embeddings.weight.contiguous(), (self.max_id,))
                indices = torch.arange(self.max_id, device=self._embeddings.device)
            route, way = self._send(indices), None
        if way is None:
            way = self._start(route)
        rows = way if isinstance(way, Tensor) else self._exchange.arrive(way)
        return self._as_seen(rows, tuple(indices.shape))

    @property
    def torchrec_table(self) -> TorchRecTable:
        """TorchRec's side of the table: its ``torchrec_module`` and ``torchrec_plan``.

        RuntimeError for other backends.
        """
        if not isinstance(self._embeddings, TorchRecTable):
            raise UsageError(
                f"table {self.name!r} is not TorchRec's: make it with gradient='fused',"
                " backend='torchrec'"
            )
        return self._embeddings

    def synchronize_replicas(self) -> None:
        """Average the rows that moved, and their optimizer state, over replicas.

        :class:`~shardemb.Coordinator` does it.

        For ``TorchRecOptions(sharding_group_size=...)``, once a step or less often, before
        :meth:`post_parameter_update`, and before saving. A collective; other tables do nothing.
        """
        if isinstance(self._embeddings, TorchRecTable):
            self._embeddings.synchronize_replicas()

    @property
    def holds_first_copy(self) -> bool:
        """Whether this rank's rows are no replica of those of an earlier rank."""
        return self._groups is None or self._groups.holds_first_copy

    def constrainer_in_step(self) -> dict[Tensor, RowFunction]:
        """Return, by Parameter, what a row-wise optimizer may apply to the rows ``(n.

        D)`` that it updates.

        Empty if there is no constrainer, or if :meth:`post_parameter_update` has other rows to look
        at too.
        """
        if (
            self.gradient != "sparse"
            or not self.constrains_changed_rows_only
            or self._embeddings.any_changed
        ):
            return {}
        return {self._embeddings.weight: self._row_constrainer}

    def full_state_dict(self, layout: Literal["pykeen", "torch"] = "pykeen") -> dict[str, Any]:
        """Return the state of the whole table, on every rank. A collective.

        Needs memory for all rows.

        Args:
            layout: "pykeen" for ``pykeen.nn.Embedding.load_state_dict``, "torch" for
                ``torch.nn.Embedding.load_state_dict`` (the weight alone, ``(V, D)``, complex rows
                as pairs of real numbers). This class's own loads both, at any number of ranks.

        Raises:
            ValueError: another layout.
        """
        if layout not in ("pykeen", "torch"):
            raise InputError(
                f"table {self.name!r}: got layout={layout!r}, expected 'pykeen' or 'torch'"
            )
        weight = self._embeddings.weight.detach()
        if self.plan.world_size > 1:
            blocks = weight.new_empty(self.plan.world_size * self.plan.block, self.plan.dim)
            mine = weight.new_zeros(self.plan.block, self.plan.dim)
            mine[: len(weight)] = weight
            parts = list(blocks.split(self.plan.block))
            collectives.all_gather(
                parts, mine, group=self._row_group, operation=f"table {self.name!r}: all rows"
            )
            weight = kernels.take(
                blocks, self.plan.slots(torch.arange(self.max_id, device=blocks.device))
            )
        if layout == "torch":
            return {"weight": weight}
        mine_only = "_embeddings.rows"
        state = {key: value for key, value in self.state_dict().items() if key != mine_only}
        return state | {"_embeddings.weight": weight}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if f"{prefix}weight" in state_dict:  # torch.nn.Embedding's name
            state_dict[f"{prefix}_embeddings.weight"] = state_dict.pop(f"{prefix}weight")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        if self._group is not None:
            raise UsageError(
                f"table {self.name!r} lies on a process group of its own, so it cannot be copied or"
                " pickled"
            )
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        here = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        saved = (self.plan.world_size, self.plan.rank)
        if self.placement == "row_wise" and saved != here:
            raise UsageError(
                f"table {self.name!r}: got the rows of rank {saved[1]} of {saved[0]}, this is rank"
                f" {here[1]} of {here[0]}: a pickle holds one rank's rows; to load at another"
                " number of ranks use shardemb.checkpoint or full_state_dict"
            )

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freeze the table, or let it train again."""
        super().requires_grad_(requires_grad)
        if isinstance(self._embeddings, FusedTable):
            self._embeddings.trainable = requires_grad
        return self

    def require_default_group(self, who: str) -> None:
        """Raise ValueError if the rows lie on another group than the default one.

        Which is all that ``who`` takes.
        """
        if self._group is not None:
            raise InputError(
                f"table {self.name!r} lies on a process group of its own, {who} takes the default"
                " group only"
            )

    @property
    def exchanged_bytes(self) -> int:
        """What this rank has sent to others in lookups and their backward so far.

        TorchRec's own exchange is not counted.
        """
        return self._exchange.sent_bytes

    def local_rows(self, trainable: bool = False) -> Tensor:
        """Return this rank's rows ``(R, *shape)``, normalized as forward does.

        ``plan.local_ids()`` are their ids.

        Args:
            trainable: with a gradient, for a loss over all rows; on several ranks it is this rank's
                alone, not reduced.

        Raises:
            ValueError: ``trainable`` rows of a table whose gradient is not dense.
        """
        if trainable and self.gradient != "dense":
            raise InputError(
                f"table {self.name!r}: got gradient={self.gradient!r}, expected 'dense' for"
                " trainable rows: all of them get one"
            )
        with torch.set_grad_enabled(trainable and torch.is_grad_enabled()):
            weight = self._embeddings.weight
            x = self._as_seen(weight if trainable else weight.detach(), (self.plan.num_local,))
            return x if self.normalizer is None else self.normalizer(x)

    def set_learning_rate(self, lr: float) -> None:
        """Change the learning rate of the fused optimizer; RuntimeError for other gradients."""
        self._embeddings.set_learning_rate(lr)

    def stored_rows(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps of this rank's rows.

        "weight" ``(R, D)`` and the fused optimizer's state.
        """
        return {"weight": self._embeddings.weight.detach(), **self._embeddings.optimizer_state()}

    @torch.no_grad()
    def load_stored_rows(self, rows: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`stored_rows` gave, for this rank's rows.

        The weight alone leaves the optimizer's state.
        """
        weight, state = (
            self._embeddings.weight.detach(),
            {key: value for key, value in rows.items() if key != "weight"},
        )
        if rows["weight"].data_ptr() != weight.data_ptr():  # otherwise it was filled in place
            weight.copy_(rows["weight"])
        if state:
            self._embeddings.load_optimizer_state(state)
        self._embeddings.touch_all()

    def fused_hyperparameters(self) -> dict[str, Any] | None:
        """Return name, learning rate and eps of the fused optimizer; None for other gradients."""
        table = self._embeddings
        return (
            {**asdict(table.optimizer), "lr": table.learning_rate}
            if isinstance(table, FusedTable)
            else None
        )

    def extra_repr(self) -> str:
        """Show the interface's part and this rank's share."""
        share = f"{self.plan.num_local} rows on rank {self.plan.rank} of {self.plan.world_size}"
        return f"{super().extra_repr()}, name={self.name!r}, gradient={self.gradient!r}, {share}"


def _describe(function: Any) -> str:
    """Name a function so that all ranks name it alike: no addresses."""
    if isinstance(function, partial):
        simple = {
            key: value
            for key, value in function.keywords.items()
            if isinstance(value, int | float | str | tuple)
        }
        return f"{_describe(function.func)}({simple})"
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _as_shape(shape: Any) -> tuple[int, ...]:
    if isinstance(shape, int):
        return (shape,)
    if (
        isinstance(shape, Sequence)
        and not isinstance(shape, str)
        and all(isinstance(n, int) for n in shape)
    ):
        return tuple(shape)
    raise InputTypeError(
        f"Invalid type for shape: ({type(shape)}) {shape}: expected an int or a sequence of ints"
    )


def _one_max_id(max_id: int | None, num_embeddings: int | None) -> int:
    if max_id is not None and num_embeddings is not None and max_id != num_embeddings:
        raise InputError(
            f"Cannot provide both, 'max_id' over 'num_embeddings': got {max_id} and"
            f" {num_embeddings}; the size of a row is embedding_dim= or shape="
        )
    if max_id is not None:
        return max_id
    if num_embeddings is None:
        raise InputError("Must provide max_id")
    warnings.warn("prefer using 'max_id' over 'num_embeddings'", DeprecationWarning, stacklevel=3)
    return num_embeddings


def _one_shape(embedding_dim: int | None, shape: int | Sequence[int] | None) -> tuple[int, ...]:
    if shape is None and embedding_dim is None:
        raise InputError("Missing both, shape and embedding_dim")
    if shape is not None and embedding_dim is not None:
        raise InputError("Provided both, shape and embedding_dim")
    return _as_shape(embedding_dim if shape is None else shape)
