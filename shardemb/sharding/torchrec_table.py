"""The second backend.

One table as TorchRec's ShardedEmbeddingCollection, placed by TorchRec's planner.

TorchRec exchanges ids and rows; what it gets wrong by itself is put right here: it sees checked ids
only, rows are padded to equal blocks (it trains wrong rows with others), and its division of
gradients, a global of the process, is undone or done so that the table's own reduction holds. The
update is FBGEMM's, as in :class:`~shardemb.sharding.fused_table.FusedTable`.

With several replicas (2D parallelism) each group of ranks holds all rows and trains on its own
batches, and :meth:`TorchRecTable.synchronize_replicas` averages the rows that moved, and their
optimizer state.

A program that uses PyKEEN too imports it first: PyKEEN collects all classes of optimizers by name
when it is imported, and fails on two of TorchRec's that have the same one.
"""

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from shardemb import kernels
from shardemb.comm import collectives, watchdog
from shardemb.exceptions import InputError, OutOfMemoryError, UsageError
from shardemb.kernels import Merged
from shardemb.sharding.exchange import Exchange
from shardemb.sharding.fused_table import FusedTable
from shardemb.sharding.placement import RowPlan
from shardemb.sharding.table import _RowSet
from shardemb.utils.memory import free_bytes
from shardemb.utils.types import GradientReduction

_KERNELS = ("fused", "fused_uvm", "fused_uvm_caching")
#: Name of the table's one feature.
_IDS = "ids"
#: Rows that replicas average at a time.
_SYNC_ROWS = 65536


@dataclass(frozen=True)
class TorchRecOptions:
    """What TorchRec does with a table, with ``Embedding(backend="torchrec", torchrec=...)``."""

    #: "fused": rows on the device; on CUDA also "fused_uvm": rows in host memory that the device
    #: reads, and "fused_uvm_caching": the same with a cache on the device, which every constrainer
    #: step and every read writes back
    compute_kernel: str = "fused"
    #: part of the rows that fit the cache, with "fused_uvm_caching"; None for TorchRec's 0.2
    cache_load_factor: float | None = None
    #: bytes a rank that the planner may use for the rows and their optimizer state, where they lie;
    #: None for what is free
    memory_bytes: int | None = None
    #: ranks that share the rows; the others hold replicas of them (2D parallelism); None for all
    #: ranks
    sharding_group_size: int | None = None

    def __post_init__(self) -> None:
        if self.compute_kernel not in _KERNELS:
            raise InputError(
                f"TorchRecOptions: got compute_kernel={self.compute_kernel!r}, expected one of"
                f" {_KERNELS}"
            )
        if self.cache_load_factor is not None:
            if not 0 < self.cache_load_factor <= 1:
                raise InputError(
                    f"TorchRecOptions: got cache_load_factor={self.cache_load_factor}, expected 0 <"
                    " x <= 1"
                )
            if self.compute_kernel != "fused_uvm_caching":
                raise InputError(
                    f"TorchRecOptions: got cache_load_factor={self.cache_load_factor} with"
                    f" compute_kernel={self.compute_kernel!r}, which has no cache: use"
                    " 'fused_uvm_caching'"
                )
        if self.memory_bytes is not None and self.memory_bytes <= 0:
            raise InputError(
                f"TorchRecOptions: got memory_bytes={self.memory_bytes}, expected a number above 0"
            )
        if self.sharding_group_size is not None and self.sharding_group_size < 1:
            raise InputError(
                f"TorchRecOptions: got sharding_group_size={self.sharding_group_size}, expected at"
                " least 1"
            )


@dataclass(frozen=True)
class Groups:
    """The process groups of one table."""

    #: all ranks that use the table
    everyone: Any
    #: this rank and those that hold the other rows; ``everyone`` without replicas
    shard: Any
    #: this rank and those that hold the same rows; None without replicas
    replica: Any = None
    #: the device mesh of both, for TorchRec
    mesh: Any = None

    @property
    def num_replicas(self) -> int:
        """How many ranks hold each row."""
        return 1 if self.replica is None else dist.get_world_size(self.replica)

    @property
    def holds_first_copy(self) -> bool:
        """Whether this rank is the first of those that hold its rows."""
        return self.replica is None or dist.get_rank(self.replica) == 0


def make_groups(table: str, group: Any, options: TorchRecOptions, device: torch.device) -> Groups:
    """Make the groups of a table over ``group`` (None: the default group).

    A collective of all ranks with replicas.

    Raises:
        RuntimeError: no process group.
        ValueError: a sharding group size that does not divide the number of ranks, or that comes
            with a group of one's own.
    """
    if not dist.is_initialized():
        raise UsageError(
            f"table {table!r}: backend='torchrec' needs a process group, got none: call"
            " torch.distributed.init_process_group first (also with one process), or use"
            " backend='fbgemm'"
        )
    everyone: Any = dist.group.WORLD if group is None else group
    size, world_size = options.sharding_group_size, dist.get_world_size(everyone)
    if size is None or size == world_size:
        return Groups(everyone, everyone)
    if group is not None or world_size % size:
        raise InputError(
            f"table {table!r}: got sharding_group_size={size} over {world_size} ranks of"
            f" {'the default group' if group is None else 'a process group of its own'}, expected a"
            " divisor of the number of ranks, and the default group"
        )
    from torch.distributed.device_mesh import DeviceMesh

    # the layout of TorchRec's DMPCollection: replicas lie side by side, so that they tend to share
    # a machine
    ranks = torch.arange(world_size).reshape(size, world_size // size).T.contiguous()
    mesh = DeviceMesh(device.type, ranks, mesh_dim_names=("replicate", "shard"))
    groups = Groups(everyone, mesh.get_group("shard"), mesh.get_group("replicate"), mesh)
    timeout = everyone._get_backend(
        device
    ).options._timeout  # a mesh's groups would wait for 30 minutes
    for made in (groups.shard, groups.replica):
        dist.distributed_c10d._set_pg_timeout(timeout, made)
    return groups


@dataclass(frozen=True)
class Sent:
    """A lookup on its way to the owners of its rows."""

    #: TorchRec's context of the lookup
    context: Any
    #: TorchRec's awaitable of the ids that all ranks ask of this one
    features: Any
    #: the duplicates among the ids, if each was sent once
    merged: Merged | None


class TorchRecTable(FusedTable):
    """A shard inside TorchRec's collection.

    :meth:`send_ids` and :meth:`fetch` take the place of exchange and lookup.

    Args:
        plan: which rows these are, within the ranks of ``groups.shard``.
        groups: of the table.
        options: for TorchRec.
        reduction: of the gradients that several ranks have for one row.
        deduplicate: send each id of a batch once, with more than one rank; TorchRec's own has no
            kernel for CPUs.
        kwargs: of :class:`~shardemb.sharding.fused_table.FusedTable`.
    """

    #: TorchRec's ShardedEmbeddingCollection, for TorchRec's own tools; its one table is named as
    #: this one
    torchrec_module: Any
    #: the ParameterSharding that TorchRec's planner made
    torchrec_plan: Any

    def __init__(
        self,
        plan: RowPlan,
        *,
        groups: Groups,
        options: TorchRecOptions,
        reduction: GradientReduction,
        deduplicate: bool,
        **kwargs: Any,
    ) -> None:
        device = kwargs["device"]
        if options.compute_kernel != "fused" and device.type != "cuda":
            raise InputError(
                f"table {plan.table!r}: got compute_kernel={options.compute_kernel!r} on {device},"
                " which TorchRec would silently take for 'fused': use a CUDA device, or"
                " compute_kernel='fused'"
            )
        self._groups, self._options, self._device = groups, options, device
        self._deduplicate = deduplicate and plan.world_size > 1
        ranks = replace(
            plan,
            world_size=dist.get_world_size(groups.everyone),
            rank=dist.get_rank(groups.everyone),
        )
        self._ids = Exchange(ranks, groups.everyone, reduction)
        # averaging replicas divides a sum by their number, and makes a mean over a group a mean
        # over all
        self._scale = 1.0 / plan.world_size if reduction == "mean" else float(groups.num_replicas)
        self._moved = _RowSet(plan.num_local)
        self._cached, self._stale = options.compute_kernel == "fused_uvm_caching", False
        super().__init__(plan, **kwargs)
        self._one_lookup |= (
            self._cached
        )  # a second one may evict what the first one's backward writes to
        self._constrained = self._track
        self._track |= groups.num_replicas > 1

    @property
    def device(self) -> torch.device:
        """Where the rows are; without writing a cache back."""
        return self._device

    def _make_tbe(self, columns: int, dtype: torch.dtype, device: torch.device) -> Any:
        from torchrec import EmbeddingCollection, EmbeddingConfig
        from torchrec.distributed.embedding import EmbeddingCollectionSharder
        from torchrec.distributed.types import ShardingEnv, ShardingEnv2D
        from torchrec.types import DataType

        plan, groups = self.plan, self._groups
        config = EmbeddingConfig(
            name=plan.table,
            num_embeddings=plan.block
            * plan.world_size,  # equal blocks: TorchRec's input distribution knows no others
            embedding_dim=columns,
            feature_names=[_IDS],
            data_type=DataType.FP32 if dtype == torch.float32 else DataType.FP16,
        )
        collection = EmbeddingCollection(tables=[config], device=torch.device("meta"))
        sharder = EmbeddingCollectionSharder(fused_params=self._engine_options(dtype))
        sharding = self._planned(collection, sharder, columns, dtype)
        if groups.mesh is not None:
            env = ShardingEnv2D(groups.shard, groups.replica, groups.everyone, groups.mesh)
        else:
            # ShardingEnv.from_process_group would make a device mesh of ranks 0, 1, ..., whatever
            # ranks the group has
            env = ShardingEnv(plan.world_size, plan.rank)
            env.process_group = groups.shard
        module = sharder.shard(collection, {plan.table: sharding}, env, device)
        self.__dict__.update(
            torchrec_module=module, torchrec_plan=sharding
        )  # no submodule, as its _tbe
        return module._lookups[0]._emb_modules[0].emb_module

    def _planned(self, collection: Any, sharder: Any, columns: int, dtype: torch.dtype) -> Any:
        """Return the planner's ParameterSharding. A collective.

        The ranks agree on what is free, and refuse together.

        Raises:
            MemoryError: the plan does not fit.
        """
        from torch.distributed.remote_device import _remote_device
        from torchrec.distributed.planner import ParameterConstraints
        from torchrec.distributed.planner.types import PlannerError, TrainerConfig
        from torchrec.distributed.types import CacheParams

        plan, options, name = self.plan, self._options, self.optimizer.name
        on_host = self.device.type == "cpu" or options.compute_kernel != "fused"
        device_bytes, host_bytes = (
            self._least_free(self.device),
            self._least_free(torch.device("cpu")),
        )
        allowed = options.memory_bytes or (host_bytes if on_host else device_bytes)
        state = self.optimizer.state_columns
        need = plan.block * (columns * dtype.itemsize + 4 * (columns if state is None else state))
        refusal = OutOfMemoryError(
            f"table {plan.table!r}, rank {plan.rank} of {plan.world_size}: TorchRec's planner needs"
            f" {need:,} bytes a rank for {plan.block:,} rows x {columns} columns and their"
            f" optimizer state, {allowed:,} are allowed: use more ranks, fewer columns, a smaller"
            " dtype, more memory_bytes, or compute_kernel='fused_uvm_caching' on CUDA"
        )
        if (
            need > allowed
        ):  # the planner takes the state of half precision rows for half precision too
            raise refusal
        (parameter,) = collection.parameters()
        parameter._optimizer_classes = [
            _optimizer_classes()[name]
        ]  # so that the planner counts the state
        local = int(os.environ.get("LOCAL_WORLD_SIZE", plan.world_size))
        constraints = ParameterConstraints(
            sharding_types=["row_wise"],
            compute_kernels=[options.compute_kernel],
            cache_params=(
                CacheParams(load_factor=options.cache_load_factor)
                if options.cache_load_factor
                else None
            ),
        )
        trainer = TrainerConfig(
            world_size=plan.world_size,
            local_world_size=local if plan.world_size % local == 0 else plan.world_size,
            hbm_cap_bytes=device_bytes if on_host else allowed,
            ddr_cap_bytes=allowed if on_host else host_bytes,
        )
        # rows and state decide, not a batch that nobody knows
        planner = _planner(self.device.type, trainer, {plan.table: constraints}, batch_size=1)
        try:
            sharding = planner.plan(collection, [sharder]).plan[""][plan.table]
        except PlannerError as error:
            raise refusal from error
        sharding.ranks = [
            dist.get_global_rank(self._groups.shard, rank) for rank in range(plan.world_size)
        ]
        for rank, shard in zip(sharding.ranks, sharding.sharding_spec.shards, strict=True):
            place = "cpu" if self.device.type == "cpu" else f"cuda:{rank % local}"
            shard.placement = _remote_device(f"rank:{rank}/{place}")
        return sharding

    def _least_free(self, device: torch.device) -> int:
        free = free_bytes(device)
        least = torch.tensor(2**50 if free is None else free, device=self.device)
        operation = f"table {self.plan.table!r}: free memory"
        collectives.all_reduce(
            least, collectives.MIN, group=self._groups.everyone, operation=operation
        )
        return int(least)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self._stale:  # the newest rows are in the device's cache
            self._tbe.flush()
            if not self._waits_for_backward:  # which writes to the cache
                self._stale = False
                self._tbe.reset_cache_states()
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        raise UsageError(
            f"table {self.plan.table!r}: backend='torchrec' holds process groups, so it cannot be"
            " copied or pickled: use shardemb.checkpoint, or its state_dict"
        )

    def _save_to_state_dict(self, *args: Any) -> None:
        _ = self.weight  # written back
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        _ = self.weight  # written back, or it would later write over what is loaded
        super()._load_from_state_dict(*args)

    def send_ids(self, ids: Any, device: torch.device) -> Sent:
        """Check flat ids ``(n,)`` and start TorchRec's input distribution. A collective.

        Raises:
            IndexError, IdTypeError, AttributeError: as
                :meth:`shardemb.sharding.exchange.Exchange.send_ids`, on all ranks.
        """
        from torchrec import KeyedJaggedTensor

        self._ids.check_everywhere(ids, device)
        values = self.plan.slots(ids.to(device, torch.int64)).contiguous()
        merged = kernels.merge(values, self.plan.num_rows) if self._deduplicate else None
        values = values if merged is None else merged.unique
        lengths = torch.tensor(
            [len(values)], device=device
        )  # one bag, of 0 ids too: a batch of 0 bags breaks the peers
        features = KeyedJaggedTensor(keys=[_IDS], values=values, lengths=lengths)
        context = self.torchrec_module.create_context()
        with watchdog.guarded(self._groups.shard, f"table {self.plan.table!r}: ids"):
            return Sent(context, self.torchrec_module.input_dist(context, features), merged)

    def fetch(self, sent: Sent) -> Tensor:
        """Return the rows ``(n, D)`` in the order of the ids.

        Backward updates them on their owners. A collective.
        """
        with watchdog.guarded(self._groups.shard, f"table {self.plan.table!r}: ids"):
            owned = sent.features.wait().wait()  # as row numbers of this shard
        (sharding,) = sent.context.sharding_contexts
        sharding.lengths_after_input_dist = owned[0].lengths().view(-1, owned[0].stride())
        rows = owned[0].values()
        trained = self.trainable and torch.is_grad_enabled()
        if trained:
            rows = self._trained(rows, lambda: self.torchrec_module.compute(sent.context, owned)[0])
            self._stale |= self._cached
            rows = _Reduce.apply(rows, self._scale, self.plan.world_size)
        else:
            rows = self.lookup(rows)
        if not self.plan.dim:  # TorchRec sends at least a column
            rows = F.pad(rows, (0, 1))
        with watchdog.guarded(self._groups.shard, f"table {self.plan.table!r}: rows"):
            back = self.torchrec_module.output_dist(sent.context, [rows])[_IDS].values()
        back = back[:, : self.plan.dim].contiguous()
        if sent.merged is not None:
            back = back.index_select(0, sent.merged.inverse)
        # not what the owner looked up: TorchRec's requests keep the graph of a lookup that was
        # given up until gc finds it
        return self._await_backward(back) if trained else back

    def _got_gradient(self, rows: Tensor) -> None:
        if self._constrained:
            super()._got_gradient(rows)
        if self._groups.replica is not None:
            self._moved.add(rows)

    @torch.no_grad()
    def synchronize_replicas(self) -> int:
        """Average what moved since the last call, rows and optimizer state.

        Over the ranks that hold it. A collective.

        Returns:
            The number of rows that were averaged; 0 without replicas.
        """
        group, count = self._groups.replica, self._groups.num_replicas
        if group is None:
            return 0
        mine = self._moved.take()
        length = torch.tensor([-1 if mine is None else len(mine)], device=self.device)
        lengths = [torch.empty_like(length) for _ in range(count)]
        operation = f"table {self.plan.table!r}: averaging replicas"
        collectives.all_gather(lengths, length, group=group, operation=operation)
        sizes = [int(n) for n in lengths]
        if min(sizes) < 0 or mine is None:
            rows = torch.arange(self.plan.num_local, device=self.device)
        else:
            padded = [length.new_empty(max(sizes)) for _ in range(count)]
            longest = F.pad(mine.to(self.device), (0, max(sizes) - len(mine)))
            collectives.all_gather(padded, longest, group=group, operation=operation)
            rows = torch.cat(
                [part[:size] for part, size in zip(padded, sizes, strict=True)]
            ).unique()
        state = [] if self.optimizer.name == "sgd" else self._tbe.split_optimizer_states()[0]
        for tensor in (self.weight, *state):
            for chunk in rows.split(_SYNC_ROWS) if len(rows) else ():
                values = tensor.index_select(0, chunk).float()
                collectives.all_reduce(values, group=group, operation=operation)
                tensor.index_copy_(0, chunk, values.div_(count).to(tensor.dtype))
        if self._constrained:
            self._changed.add(rows)
        return len(rows)


class _Reduce(torch.autograd.Function):
    """Scales the gradient that TorchRec's exchange gives.

    Which it has divided by the number of ranks or not.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, scale: float, world_size: int) -> Tensor:
        from torchrec.distributed.comm_ops import get_gradient_division, get_use_sync_collectives

        ctx.scale, ctx.world_size = scale, world_size
        # synchronous collectives fix it in forward, others read it in backward, just before this
        # class does
        ctx.divided = get_gradient_division() if get_use_sync_collectives() else None
        return rows.view_as(rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        from torchrec.distributed.comm_ops import get_gradient_division

        divided = get_gradient_division() if ctx.divided is None else ctx.divided
        scale = ctx.scale * (ctx.world_size if divided else 1)
        return (grad if scale == 1 else grad * scale), None, None


def _optimizer_classes() -> dict[str, Any]:
    import torchrec

    return {
        "sgd": torch.optim.SGD,
        "adagrad": torch.optim.Adagrad,
        "adam": torch.optim.Adam,
        "rowwise_adagrad": torchrec.optim.RowWiseAdagrad,
    }


def _planner(device: str, trainer: Any, constraints: dict[str, Any], batch_size: int) -> Any:
    """Return TorchRec's planner, silent, for ranks that keep no memory back."""
    from torchrec.distributed.planner import EmbeddingShardingPlanner
    from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
    from torchrec.distributed.planner.types import KernelConfig, TopologyFactory

    return EmbeddingShardingPlanner(
        topology=TopologyFactory.create_topology(
            trainer, None, KernelConfig(compute_device=device)
        ),
        batch_size=batch_size,
        storage_reservation=FixedPercentageStorageReservation(0.0),
        constraints=constraints,
        stats=[],
        debug=False,
    )
