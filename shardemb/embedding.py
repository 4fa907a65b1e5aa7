"""The interface: PyKEEN's ``Representation`` and ``Embedding``, over rows on several ranks."""

import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import index
from typing import Any, Literal, Self, SupportsIndex

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardemb import kernels
from shardemb.comm import collectives
from shardemb.exceptions import InputError, InputTypeError, NotRowWiseError, UsageError
from shardemb.initializers import PretrainedInitializer, fill_rows, resolve_initializer
from shardemb.regularizers import resolve_regularizer
from shardemb.sharding.exchange import Exchange, default_name
from shardemb.sharding.fused_table import FusedTable
from shardemb.sharding.lookup import LocalLookup, Lookup
from shardemb.sharding.options import Fused, Sharding, resolve_options
from shardemb.sharding.placement import RowPlan
from shardemb.sharding.table import ParameterTable, RowOptions, Table
from shardemb.sharding.torchrec_table import TorchRecLookup, TorchRecTable, make_groups
from shardemb.sharding.wrappers import check_wrappers
from shardemb.transforms import (
    is_plain_normalize,
    probe_constrainer,
    resolve_constrainer,
    resolve_normalizer,
)
from shardemb.utils.compiling import not_compiled
from shardemb.utils.types import Initializer, RowFunction


class Representation(nn.Module, ABC):
    """Maps ids of any shape ``s`` to tensors ``(*s, *shape)``.

    Args:
        max_id: ids are 0 to ``max_id - 1``.
        shape: of one representation.
        normalizer: name or callable, applied to the looked-up rows in every forward.
        normalizer_kwargs: its keyword arguments.
        regularizer: name, class or instance; adds a term of the loss in every forward.
        regularizer_kwargs: its keyword arguments.
        dropout: probability; each looked-up id has its own mask.
        unique: look up each id of a batch once, and repeat it after normalizing.
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
        nn.Module.__init__(self)  # not super(): in the bridge, that is PyKEEN's Representation
        self.max_id = max_id
        self.shape = _as_shape(shape)
        self.normalizer: RowFunction | None = resolve_normalizer(normalizer, normalizer_kwargs)
        self.regularizer: Any = resolve_regularizer(regularizer, regularizer_kwargs)
        self.dropout = None if dropout is None else nn.Dropout(dropout)
        by_default = not isinstance(self, Embedding) and not dropout
        self.unique = by_default if unique is None else unique

    @abstractmethod
    def _plain_forward(self, indices: Tensor | None = None) -> Tensor:
        """Look ids up, and nothing else."""

    def forward(self, indices: Tensor | None = None) -> Tensor:
        """Look ids up, normalize, repeat (with ``unique``), regularize, drop out; in this order.

        Args:
            indices: integers of any shape ``s``; None means all ids.

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
        if self.unique and isinstance(indices, Tensor):
            return indices.unique(return_inverse=True)
        return indices, None

    def reset_parameters(self) -> None:
        """Initialize the parameters anew."""

    def post_parameter_update(self) -> None:
        """Do what must follow an optimizer step, outside of the gradient."""

    @property
    def device(self) -> torch.device:
        """The parameters' device; the CPU without parameters."""
        tensors = [*self.parameters(), *self.buffers()]
        return tensors[0].device if tensors else torch.device("cpu")

    def extra_repr(self) -> str:
        """Show max_id, shape, unique and normalizer."""
        text = f"max_id={self.max_id}, shape={self.shape}, unique={self.unique}"
        return text if self.normalizer is None else f"{text}, normalizer={self.normalizer}"


@dataclass(frozen=True)
class Prefetched:
    """Ids sent by :meth:`Embedding.prefetch`; pass it to the table instead of the ids."""

    table: "Embedding"
    #: of the ids, unique ones if configured
    shape: tuple[int, ...]
    #: with ``unique``: the position of each id among the unique ones
    inverse: Tensor | None
    #: of the table's lookup
    request: Any


class Embedding(Representation):
    """A trainable table, row-sharded over the ranks of a process group, with PyKEEN's arguments.

    Without an initialized ``torch.distributed`` it is one shard in this process. On several ranks
    the constructor, :meth:`forward`, its backward and :meth:`reset_parameters` are collectives:
    every rank calls them in the same order, each with its own ids (or an empty tensor). As in
    PyKEEN, rows are N(0, 1) until :meth:`reset_parameters` runs the initializer. In one process
    under ``torch.no_grad``, ``forward(None)`` aliases the rows; otherwise it copies all ranks'
    rows.

    A ``state_dict`` or pickle holds this rank's rows and their ids; only the pickle holds a fused
    optimizer's state. ``load_state_dict`` takes it, or the state dict of a whole table, a
    pykeen.nn.Embedding or a torch.nn.Embedding, of which each rank keeps its part.
    :meth:`full_state_dict` returns a whole table. :mod:`shardemb.checkpoint` saves and loads a job.

    Args:
        max_id: ids are 0 to ``max_id - 1``.
        num_embeddings: older name of ``max_id``.
        embedding_dim: one-dimensional ``shape``.
        shape: of one row; alternative to ``embedding_dim``.
        initializer: name, callable or :class:`~shardemb.initializers.PretrainedInitializer` that
            fills rows ``(n, *shape)`` (complex ones as real ``(n, *shape, 2)``); None for normal.
            It gets fixed blocks of rows with a seeded generator, so every number of ranks gives the
            same table.
        initializer_kwargs: its keyword arguments.
        constrainer: row-wise function, name or callable, that :meth:`post_parameter_update` applies
            to changed rows.
        constrainer_kwargs: its keyword arguments.
        trainable: whether rows get gradients.
        dtype: of the rows, real or complex; None for torch's default.
        kernel: "sparse": a COO gradient on the shard's Parameter, for :mod:`shardemb.optim`,
            torch.optim.SGD, Adagrad or SparseAdam; a step costs the rows that it touches. "dense":
            an ordinary gradient for any optimizer; a step costs all rows. "fused", or
            :class:`~shardemb.Fused` with options: FBGEMM updates the rows in backward, without a
            gradient; one lookup a step.
        sharding: :class:`~shardemb.Sharding`, or "replicated" for
            ``Sharding(placement="replicated")``; None shards rows over the default group.
        seed: of the initial rows; None draws one from torch's generator on rank 0.
        initialize: run the initializer now instead of filling rows with N(0, 1); halves the time
            for a large table.
        device: of the rows.
        name: for errors, checkpoints and messages between ranks; by default "embedding", and then
            "embedding-2", ... on several ranks.
        kwargs: of :class:`Representation`: ``normalizer``, ``regularizer``, ``dropout``,
            ``unique``, ...

    Raises:
        ValueError: missing or contradictory sizes, options that would train incorrectly together, a
            constrainer that is not row-wise, or ranks that disagree.
        TypeError: a shape or an option of a wrong type.
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
        kernel: Literal["dense", "sparse", "fused"] | Fused = "sparse",
        sharding: Sharding | Literal["row_wise", "replicated"] | None = None,
        seed: int | None = None,
        initialize: bool = False,
        device: torch.device | str = "cpu",
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        max_id = _one_max_id(max_id, num_embeddings)
        shape = _one_shape(embedding_dim, shape)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        super().__init__(max_id=max_id, shape=shape, **kwargs)
        group = sharding.process_group if isinstance(sharding, Sharding) else None
        self._group = None if not dist.is_initialized() or group is dist.group.WORLD else group
        self.name = name = default_name(self._group) if name is None else name
        self.kernel, fused, self.sharding = resolve_options(name, kernel, sharding)
        self._check_numbers(max_id, dtype, seed)
        self.is_complex, self._seed = dtype.is_complex, seed
        self._shape = (*self.shape, 2) if self.is_complex else self.shape
        self.initializer: Initializer = resolve_initializer(initializer, initializer_kwargs)
        self.constrainer: RowFunction | None = resolve_constrainer(constrainer, constrainer_kwargs)
        #: whether constraining changed rows is enough; replicas also change on other ranks
        self._constrains_changed_only, self._constrains_rows_alone = False, True
        self._updates_deferred = False
        rank, self._world_size = collectives.rank_and_size(self._group)
        self._warn_without_group()
        self._probe_constrainer(dtype)
        options = {
            **{"max_id": max_id, "shape": str(self.shape), "dtype": str(dtype), "seed": seed},
            **{"trainable": trainable, "unique": self.unique, "initialize": initialize},
            "kernel": str(fused or self.kernel),
            "sharding": str(replace(self.sharding, process_group=None)),
            "initializer": _describe(self.initializer),
            "constrainer": _describe(self.constrainer),
            "normalizer": _describe(self.normalizer),
            "regularizer": type(self.regularizer).__name__,
        }
        drawn = self._shared_seed(options)
        device = torch.device(device)
        world_size, self._groups = self._world_size, None
        if fused is not None and fused.engine != "fbgemm":
            self._groups = make_groups(name, self._group, fused.engine, device)
            rank, world_size = collectives.rank_and_size(self._groups.shard)
        if self.sharding.placement == "replicated":
            rank, world_size = 0, 1
        self.plan = RowPlan(name, max_id, math.prod(self._shape), world_size, rank)
        stored = torch.empty(0, dtype=dtype).real.dtype if self.is_complex else dtype
        rows = RowOptions(trainable, stored, device, track=self._constrains_changed_only)
        self._embeddings = self._make_table(fused, rows)
        self._lookup = self._make_lookup()
        self._fill(self.initializer if initialize else nn.init.normal_, drawn)

    def _probe_constrainer(self, dtype: torch.dtype) -> None:
        if self.constrainer is None:
            return
        try:
            skips = probe_constrainer(self.constrainer, self.shape, dtype, self.name, self.max_id)
        except NotRowWiseError:
            if self._world_size > 1 or self.kernel != "dense":
                raise
            self._constrains_rows_alone = False  # as in PyKEEN: it gets the whole table
            return
        self._constrains_changed_only = (
            skips and self.kernel != "dense" and self.sharding.placement == "row_wise"
        )

    def _check_numbers(self, max_id: int, dtype: torch.dtype, seed: Any) -> None:
        if max_id < 0 or any(size < 0 for size in self.shape):
            raise UsageError(
                f"table {self.name!r}: got max_id={max_id} and shape={self.shape}, expected no"
                " negative size"
            )
        if not (dtype.is_floating_point or dtype.is_complex):
            raise UsageError(
                f"table {self.name!r}: got dtype {dtype}, expected a floating point or complex one"
            )
        if seed is not None and not (isinstance(seed, int) and 0 <= seed < 2**63):
            raise InputError(
                f"table {self.name!r}: got seed={seed!r}, expected an int, at least 0 and below"
                " 2**63, or None"
            )

    def _warn_without_group(self) -> None:
        world_size = os.environ.get("WORLD_SIZE", "1")
        if not dist.is_initialized() and int(world_size) > 1:
            warnings.warn(
                f"table {self.name!r}: WORLD_SIZE is {world_size}, but torch.distributed is not"
                " initialized, so each process makes a whole table of its own: call"
                " torch.distributed.init_process_group first",
                stacklevel=3,
            )

    def _make_table(self, fused: Fused | None, rows: RowOptions) -> Table:
        if fused is None:
            return ParameterTable(self.plan, rows, sparse=self.kernel == "sparse")
        if fused.engine == "fbgemm":
            return FusedTable(self.plan, rows, fused.optimizer)
        assert self._groups is not None
        options = (fused.optimizer, fused.engine, self._groups, self.sharding)
        return TorchRecTable(self.plan, rows, *options)

    def _make_lookup(self) -> Lookup:
        if isinstance(self._embeddings, TorchRecTable):
            return TorchRecLookup(self._embeddings)
        if self.plan.world_size == 1:
            return LocalLookup(self.plan, self._embeddings)
        return Exchange(self.plan, self._group, self.sharding, self._embeddings)

    @classmethod
    def from_pretrained(cls, tensor: Any, *, trainable: bool = False, **kwargs: Any) -> Self:
        """Make a table for a tensor ``(max_id, *shape)`` or a pretrained initializer.

        As in PyKEEN, :meth:`reset_parameters` copies the tensor into the table, and the table is
        frozen unless ``trainable``.
        """
        initializer = PretrainedInitializer(tensor) if isinstance(tensor, Tensor) else tensor
        max_id, *shape = initializer.tensor.shape
        return cls(
            max_id=max_id, shape=shape, initializer=initializer, trainable=trainable, **kwargs
        )

    def _shared_seed(self, options: Mapping[str, Any]) -> int:
        drawn = int(torch.randint(2**62, ())) if self._seed is None else self._seed
        if self._world_size == 1:
            return drawn
        values = {"name": self.name, **options}
        return collectives.agree(f"table {self.name!r}", values, group=self._group, share=drawn)

    @torch.no_grad()
    def _fill(self, initializer: Initializer, seed: int) -> None:
        weight = self._embeddings.weight.detach()
        fill_rows(weight, initializer, self._shape, self.plan, seed)
        self._embeddings.reset_optimizer_state()
        self._embeddings.touch_all()

    def reset_parameters(self) -> None:
        """Run the initializer, and zero the fused optimizer's state. A collective.

        With a ``seed`` the rows are the same each time.
        """
        self._check_placement()
        self._fill(self.initializer, self._shared_seed({"call": "reset_parameters"}))

    def post_parameter_update(self) -> None:
        """Constrain this rank's rows in place; call it after each optimizer step.

        The first call constrains all rows, later ones those with a gradient since the last call.
        Dense gradients, and constrainers that are not idempotent, need all rows each time.
        """
        if self._updates_deferred:
            return
        if self.constrainer is not None and not self._constrains_rows_alone:
            with torch.no_grad():
                weight = self._embeddings.weight.detach()
                weight.copy_(self._constrain_stored(weight))
        elif self.constrainer is not None:
            self._embeddings.constrain_(self._row_constrainer, self._constrains_changed_only)
        self._embeddings.end_step()

    @property
    def _row_constrainer(self) -> RowFunction:
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

    @not_compiled
    def forward(self, indices: "Tensor | Prefetched | None" = None) -> Tensor:
        """Look rows up as :meth:`Representation.forward`. A collective on several ranks.

        Args:
            indices: ids of any shape, a result of :meth:`prefetch`, or None for all ids.

        Raises:
            IndexError: ids out of range, on all ranks.
            IdTypeError: ids that are not int32 or int64, on all ranks.
        """
        return super().forward(indices)  # type: ignore[arg-type]

    def _unique(self, indices: Any) -> tuple[Any, Tensor | None]:
        if isinstance(indices, Prefetched):
            return indices, indices.inverse
        return super()._unique(indices)

    def _send(self, ids: Any, wait: bool = True) -> Any:
        self._check_placement()
        return self._lookup.send(ids, wait)

    def prefetch(self, indices: Tensor) -> Prefetched:
        """Send the ids of a later lookup to their rows' owners. A collective.

        ``table(table.prefetch(ids))`` equals ``table(ids)``. Called before the backward of the
        previous step, it lets the ids travel meanwhile. On one rank it sends nothing.

        Args:
            indices: integers of any shape.

        Raises:
            IndexError, IdTypeError: as :meth:`forward`.
        """
        indices, inverse = self._unique(indices)
        request = self._send(indices.reshape(-1), wait=False)
        return Prefetched(self, tuple(indices.shape), inverse, request)

    def _plain_forward(self, indices: "Tensor | Prefetched | None" = None) -> Tensor:
        if isinstance(indices, Prefetched):
            if indices.table is not self:
                raise InputError(
                    f"table {self.name!r}: got ids that were prefetched by table"
                    f" {indices.table.name!r}"
                )
            return self._as_seen(self._lookup.rows(indices.request), indices.shape)
        if indices is None:
            if self.plan.world_size == 1 and not torch.is_grad_enabled():
                self._check_placement()
                return self._as_seen(self._embeddings.weight.contiguous(), (self.max_id,))
            indices = torch.arange(self.max_id, device=self._embeddings.device)
        ids = indices.reshape(-1) if isinstance(indices, Tensor) else indices
        rows = self._lookup.rows(self._send(ids))
        return self._as_seen(rows, tuple(indices.shape))

    @property
    def torchrec_table(self) -> TorchRecTable | None:
        """The table with ``torchrec_module`` and ``torchrec_plan``; None without TorchRec."""
        return self._embeddings if isinstance(self._embeddings, TorchRecTable) else None

    @property
    def _holds_first_copy(self) -> bool:
        return self._groups is None or self._groups.holds_first_copy

    def _constrainer_in_step(self) -> dict[Tensor, RowFunction]:
        """Empty if :meth:`post_parameter_update` has other rows to constrain."""
        in_step = self.kernel == "sparse" and self._constrains_changed_only
        if not in_step or self._embeddings.any_changed:
            return {}
        return {self._embeddings.weight: self._row_constrainer}

    def full_state_dict(self, layout: Literal["pykeen", "torch"] = "pykeen") -> dict[str, Any]:
        """Return the state of the whole table on every rank. A collective.

        Every rank needs memory for all rows.

        Args:
            layout: "pykeen" for ``pykeen.nn.Embedding.load_state_dict``, "torch" for
                ``torch.nn.Embedding`` (only the weight ``(V, D)``, complex rows as pairs of real
                numbers). This class loads both, at any number of ranks.

        Raises:
            ValueError: another layout.
        """
        if layout not in ("pykeen", "torch"):
            raise InputError(
                f"table {self.name!r}: got layout={layout!r}, expected 'pykeen' or 'torch'"
            )
        self._check_placement()
        weight, plan = self._embeddings.weight.detach(), self.plan
        if plan.world_size > 1:
            group = self._group if self._groups is None else self._groups.shard
            operation = f"table {self.name!r}: all rows"
            all_rows = collectives.all_gather_rows(weight, group=group, operation=operation)
            ids = torch.arange(self.max_id, device=all_rows.device)
            weight = kernels.take(all_rows, plan.order.slots(ids))
        if layout == "torch":
            return {"weight": weight}
        state = self.state_dict()
        state.pop("_embeddings.rows", None)  # this rank's rows
        return state | {"_embeddings.weight": weight}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if f"{prefix}weight" in state_dict:  # torch.nn.Embedding's name
            state_dict[f"{prefix}_embeddings.weight"] = state_dict.pop(f"{prefix}weight")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __copy__(self) -> Self:
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        if self._group is not None:
            raise UsageError(
                f"table {self.name!r} lies on a process group of its own, so it cannot be copied or"
                " pickled"
            )
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        plan, here = self.plan, collectives.rank_and_size()
        if self.sharding.placement == "row_wise" and here != (plan.rank, plan.world_size):
            raise UsageError(
                f"table {self.name!r}: got the rows of rank {plan.rank} of {plan.world_size}, this"
                f" is rank {here[0]} of {here[1]}: a pickle holds one rank's rows; to load at"
                " another number of ranks use shardemb.checkpoint or full_state_dict"
            )

    def _check_placement(self) -> None:
        """Raise unless the rows are as the table has made them, for the ranks that there are."""
        if self.sharding.placement == "replicated":
            return
        check_wrappers(self._embeddings)
        world_size = collectives.rank_and_size(self._group)[1]
        if world_size != self._world_size:
            raise UsageError(
                f"table {self.name!r}: it was made for {self._world_size} rank(s), its process"
                f" group has {world_size} now: make tables after"
                " torch.distributed.init_process_group, under Lightning in configure_model()"
            )

    def _require_default_group(self, who: str) -> None:
        self._check_placement()
        if self._group is not None:
            raise InputError(
                f"table {self.name!r} lies on a process group of its own, {who} takes the default"
                " group only"
            )

    @property
    def exchanged_bytes(self) -> int:
        """Bytes that this rank has sent in lookups and backward; excludes TorchRec's."""
        return self._lookup.sent_bytes

    def local_rows(self, trainable: bool = False) -> Tensor:
        """Return this rank's rows ``(R, *shape)``, normalized as forward does.

        Their ids are ``plan.local_ids()``.

        Args:
            trainable: with a gradient, for a loss over all rows; it is not reduced over ranks.

        Raises:
            ValueError: ``trainable`` without dense gradients.
        """
        if trainable and self.kernel != "dense":
            raise InputError(
                f"table {self.name!r}: got kernel={self.kernel!r}, expected 'dense' for trainable"
                " rows: all of them get a gradient"
            )
        with torch.set_grad_enabled(trainable and torch.is_grad_enabled()):
            weight = self._embeddings.weight
            x = self._as_seen(weight if trainable else weight.detach(), (self.plan.num_local,))
            return x if self.normalizer is None else self.normalizer(x)

    def set_learning_rate(self, lr: float) -> None:
        """Change the learning rate of the fused optimizer; RuntimeError for other kernels."""
        self._embeddings.set_learning_rate(lr)

    def _stored_rows(self) -> dict[str, Tensor]:
        return {"weight": self._embeddings.weight.detach(), **self._embeddings.optimizer_state()}

    @torch.no_grad()
    def _load_stored_rows(self, rows: Mapping[str, Tensor]) -> None:
        """Load what :meth:`_stored_rows` returned; "weight" alone keeps the optimizer state."""
        weight = self._embeddings.weight.detach()
        state = {key: value for key, value in rows.items() if key != "weight"}
        if rows["weight"].data_ptr() != weight.data_ptr():  # otherwise filled in place
            weight.copy_(rows["weight"])
        if state:
            self._embeddings.load_optimizer_state(state)
        self._embeddings.touch_all()

    def _fused_hyperparameters(self) -> dict[str, Any] | None:
        table = self._embeddings
        if not isinstance(table, FusedTable):
            return None
        return {**asdict(table.optimizer), "lr": table.learning_rate}

    def extra_repr(self) -> str:
        """Add name, kernel and this rank's share."""
        share = f"{self.plan.num_local} rows on rank {self.plan.rank} of {self.plan.world_size}"
        return f"{super().extra_repr()}, name={self.name!r}, kernel={self.kernel!r}, {share}"


@contextmanager
def deferred_updates(tables: Sequence[Embedding]) -> Iterator[None]:
    """Disable the tables' ``post_parameter_update``; the coordinator calls it itself."""
    for table in tables:
        table._updates_deferred = True
    try:
        yield
    finally:
        for table in tables:
            table._updates_deferred = False


def _describe(function: Any) -> str:
    """Name a function without addresses, so that all ranks give the same name."""
    if isinstance(function, partial):
        kwargs = function.keywords
        simple = {k: v for k, v in kwargs.items() if isinstance(v, int | float | str | tuple)}
        return f"{_describe(function.func)}({simple})"
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _as_shape(shape: Any) -> tuple[int, ...]:
    if isinstance(shape, int):
        return (shape,)
    if (
        isinstance(shape, Sequence)
        and not isinstance(shape, str)
        and all(isinstance(n, SupportsIndex) for n in shape)
    ):
        return tuple(map(index, shape))
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
        return index(max_id)
    if num_embeddings is None:
        raise InputError("Must provide max_id")
    warnings.warn("prefer using 'max_id' over 'num_embeddings'", DeprecationWarning, stacklevel=3)
    return index(num_embeddings)


def _one_shape(embedding_dim: int | None, shape: int | Sequence[int] | None) -> tuple[int, ...]:
    if shape is None and embedding_dim is None:
        raise InputError("Missing both, shape and embedding_dim")
    if shape is not None and embedding_dim is not None:
        raise InputError("Provided both, shape and embedding_dim")
    # as in PyKEEN, numpy's integers are a dimension, but no shape by themselves
    one = [embedding_dim] if isinstance(embedding_dim, SupportsIndex) else embedding_dim
    return _as_shape(one if shape is None else shape)
