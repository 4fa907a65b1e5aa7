"""A table inside TorchRec's ShardedEmbeddingCollection, placed by TorchRec's planner.

TorchRec exchanges ids and rows, FBGEMM updates them. This module works around TorchRec's limits: it
passes checked ids only, pads shards to equal blocks (TorchRec trains wrong rows in others), and
compensates its global division of gradients. With replicas (2D parallelism), each group of ranks
holds all rows and trains on its own batches; :meth:`TorchRecTable.synchronize_replicas` averages
the moved rows.

Import PyKEEN before this module: it collects all optimizer classes by name at import, and two of
TorchRec's have the same name.
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
from shardemb.exceptions import InputError, OutOfMemoryError, ShardembError, UsageError
from shardemb.kernels import Merged
from shardemb.optim import FusedOptimizer
from shardemb.sharding.fused_table import FusedTable
from shardemb.sharding.lookup import Lookup, id_error
from shardemb.sharding.options import Sharding, TorchRec
from shardemb.sharding.placement import RowPlan
from shardemb.sharding.table import RowOptions, RowSet
from shardemb.utils.memory import free_bytes

#: name of the table's only feature
_IDS = "ids"
#: rows that replicas average at a time
_SYNC_ROWS = 65536


@dataclass(frozen=True)
class Groups:
    """The process groups of one table."""

    #: all ranks of the table
    everyone: Any
    #: this rank and those with the other rows; ``everyone`` without replicas
    shard: Any
    #: this rank and those with the same rows; None without replicas
    replica: Any = None
    #: TorchRec's device mesh of both
    mesh: Any = None

    @property
    def num_replicas(self) -> int:
        """Number of ranks with each row."""
        return 1 if self.replica is None else dist.get_world_size(self.replica)

    @property
    def holds_first_copy(self) -> bool:
        """Whether this rank is the first with its rows."""
        return self.replica is None or dist.get_rank(self.replica) == 0


def make_groups(table: str, group: Any, engine: TorchRec, device: torch.device) -> Groups:
    """Make a table's process groups over ``group``; None is the default one. A collective.

    Raises:
        RuntimeError: no process group.
        ValueError: an invalid sharding group size, or ``group`` is not the default one.
    """
    if not dist.is_initialized():
        raise UsageError(
            f"table {table!r}: engine=TorchRec() needs a process group, got none: call"
            " torch.distributed.init_process_group first (also with one process), or use"
            " engine='fbgemm'"
        )
    everyone: Any = dist.group.WORLD if group is None else group
    size, world_size = engine.sharding_group_size, dist.get_world_size(everyone)
    if size is None or size == world_size:
        return Groups(everyone, everyone)
    if group is not None or world_size % size:
        over = "the default group" if group is None else "a process group of its own"
        raise InputError(
            f"table {table!r}: got sharding_group_size={size} over {world_size} ranks of {over},"
            " expected a divisor of the number of ranks, and the default group"
        )
    from torch.distributed.device_mesh import DeviceMesh

    # TorchRec's DMPCollection's layout: adjacent replicas, mostly on one machine
    ranks = torch.arange(world_size).reshape(size, world_size // size).T.contiguous()
    mesh = DeviceMesh(device.type, ranks, mesh_dim_names=("replicate", "shard"))
    groups = Groups(everyone, mesh.get_group("shard"), mesh.get_group("replicate"), mesh)
    # a mesh's groups would have a timeout of 30 minutes
    timeout = everyone._get_backend(device).options._timeout
    for subgroup in (groups.shard, groups.replica):
        dist.distributed_c10d._set_pg_timeout(timeout, subgroup)
    return groups


@dataclass(frozen=True)
class Sent:
    """A lookup whose ids are on their way to the rows' owners."""

    #: TorchRec's context of the lookup
    context: Any
    #: TorchRec's awaitable of the ids that all ranks send to this one
    features: Any
    #: the duplicates, if each id was sent once
    merged: Merged | None
    #: of the lookup
    number: int


class TorchRecTable(FusedTable):
    """A shard inside TorchRec's collection; its plan is that of ``groups.shard``."""

    #: the ShardedEmbeddingCollection, for TorchRec's tools; its only table has this table's name
    torchrec_module: Any
    #: ParameterSharding of TorchRec's planner
    torchrec_plan: Any

    def __init__(
        self,
        plan: RowPlan,
        options: RowOptions,
        optimizer: FusedOptimizer,
        engine: TorchRec,
        groups: Groups,
        sharding: Sharding,
    ) -> None:
        device, kernel = options.device, engine.compute_kernel
        if kernel != "fused" and device.type != "cuda":
            raise InputError(
                f"table {plan.table!r}: got compute_kernel={kernel!r} on {device},"
                " where TorchRec would silently use 'fused': use a CUDA device, or"
                " compute_kernel='fused'"
            )
        self._groups, self._engine, self._device = groups, engine, device
        # TorchRec's deduplication has no CPU kernel
        self._deduplicate = sharding.deduplicate and plan.world_size > 1
        world_size = dist.get_world_size(groups.everyone)
        #: for errors: ranks of all replicas
        self._id_plan = replace(plan, world_size=world_size, rank=dist.get_rank(groups.everyone))
        # averaging replicas divides a sum by their number, and a group's mean becomes a global one
        mean = sharding.gradient_reduction == "mean"
        self._scale = 1.0 / plan.world_size if mean else float(groups.num_replicas)
        self._moved, self._lookups = RowSet(plan.num_local), 0
        self._cached, self._stale = kernel == "fused_uvm_caching", False
        super().__init__(plan, options, optimizer)
        self._one_lookup |= self._cached  # a second lookup may evict rows that backward writes
        self._constrained = self._track
        self._track |= groups.num_replicas > 1

    @property
    def device(self) -> torch.device:
        """The rows' device; does not write the cache back."""
        return self._device

    def _make_tbe(self, columns: int, dtype: torch.dtype, device: torch.device) -> Any:
        from torchrec import EmbeddingCollection, EmbeddingConfig
        from torchrec.distributed.embedding import EmbeddingCollectionSharder
        from torchrec.distributed.types import ShardingEnv, ShardingEnv2D
        from torchrec.types import DataType

        plan, groups = self.plan, self._groups
        config = EmbeddingConfig(
            name=plan.table,
            num_embeddings=plan.block * plan.world_size,  # equal blocks, see the module
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
            # from_process_group would always take ranks 0, 1, ...
            env = ShardingEnv(plan.world_size, plan.rank)
            env.process_group = groups.shard
        module = sharder.shard(collection, {plan.table: sharding}, env, device)
        # not a submodule, like _tbe
        self.__dict__.update(torchrec_module=module, torchrec_plan=sharding)
        return module._lookups[0]._emb_modules[0].emb_module

    def _planned(self, collection: Any, sharder: Any, columns: int, dtype: torch.dtype) -> Any:
        """MemoryError, on all ranks, if the plan exceeds any rank's free memory. A collective."""
        from torch.distributed.remote_device import _remote_device
        from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
        from torchrec.distributed.planner.storage_reservations import (
            FixedPercentageStorageReservation,
        )
        from torchrec.distributed.planner.types import (
            KernelConfig,
            PlannerError,
            TopologyFactory,
            TrainerConfig,
        )
        from torchrec.distributed.types import CacheParams
        from torchrec.optim import RowWiseAdagrad

        plan, engine = self.plan, self._engine
        on_host = self.device.type == "cpu" or engine.compute_kernel != "fused"
        device_bytes = self._least_free(self.device)
        host_bytes = self._least_free(torch.device("cpu"))
        allowed = engine.memory_bytes or (host_bytes if on_host else device_bytes)
        row_bytes = columns * dtype.itemsize + 4 * self.optimizer.state_columns(columns)
        need = plan.block * row_bytes
        refusal = OutOfMemoryError(
            f"{plan.where}: TorchRec's planner needs {need:,} bytes a rank for {plan.block:,} rows"
            f" x {columns} columns and their optimizer state, {allowed:,} are allowed: use more"
            " ranks, fewer columns, a smaller dtype, more memory_bytes, or"
            " compute_kernel='fused_uvm_caching' on CUDA"
        )
        if need > allowed:  # the planner underestimates the state of half-precision rows
            raise refusal
        (parameter,) = collection.parameters()
        # makes the planner count the state
        classes: dict[str, Any] = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}
        parameter._optimizer_classes = [classes.get(self.optimizer.name, RowWiseAdagrad)]
        local = int(os.environ.get("LOCAL_WORLD_SIZE", plan.world_size))
        factor = engine.cache_load_factor
        constraints = ParameterConstraints(
            sharding_types=["row_wise"],
            compute_kernels=[engine.compute_kernel],
            cache_params=CacheParams(load_factor=factor) if factor else None,
        )
        trainer = TrainerConfig(
            world_size=plan.world_size,
            local_world_size=local if plan.world_size % local == 0 else plan.world_size,
            hbm_cap_bytes=device_bytes if on_host else allowed,
            ddr_cap_bytes=allowed if on_host else host_bytes,
        )
        planner = EmbeddingShardingPlanner(
            topology=TopologyFactory.create_topology(
                trainer, None, KernelConfig(compute_device=self.device.type)
            ),
            batch_size=1,  # unknown; rows and state dominate
            storage_reservation=FixedPercentageStorageReservation(0.0),
            constraints={plan.table: constraints},
            stats=[],
            debug=False,
        )
        try:
            sharding = planner.plan(collection, [sharder]).plan[""][plan.table]
        except PlannerError as error:
            raise refusal from error
        ranks = range(plan.world_size)
        sharding.ranks = [dist.get_global_rank(self._groups.shard, rank) for rank in ranks]
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
        if name == "weight" and self._stale:  # the device's cache has the newest rows
            self._tbe.flush()
            if not self._waits_for_backward:  # backward writes to the cache
                self._stale = False
                self._tbe.reset_cache_states()
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        raise UsageError(
            f"table {self.plan.table!r}: TorchRec holds process groups, so it cannot be"
            " copied or pickled: use shardemb.checkpoint, or its state_dict"
        )

    def _save_to_state_dict(self, *args: Any) -> None:
        _ = self.weight  # writes the cache back
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        _ = self.weight  # writes the cache back now, not over the loaded rows
        super()._load_from_state_dict(*args)

    def send_ids(self, ids: Any) -> Sent:
        """Check flat ids ``(n,)`` and start TorchRec's input distribution. A collective."""
        from torchrec import KeyedJaggedTensor

        self._lookups += 1
        self._check(id_error(self._id_plan, ids))
        values = self.plan.order.slots(ids.to(self.device, torch.int64)).contiguous()
        merged = kernels.merge(values, self.plan.num_rows) if self._deduplicate else None
        values = values if merged is None else merged.unique
        # one bag, even of 0 ids: a batch of 0 bags breaks the peers
        lengths = torch.tensor([len(values)], device=self.device)
        features = KeyedJaggedTensor(keys=[_IDS], values=values, lengths=lengths)
        context = self.torchrec_module.create_context()
        with watchdog.guarded(self._groups.shard, self._operation("ids")):
            features = self.torchrec_module.input_dist(context, features)
        return Sent(context, features, merged, self._lookups)

    def _check(self, error: ShardembError | None) -> None:
        """Raise an error of any rank's ids on all ranks. A collective."""
        group = self._groups.everyone
        operation = self._operation(f"lookup {self._lookups}: are all ids valid?")
        bad = torch.tensor(int(error is not None), device=self.device)
        collectives.all_reduce(bad, collectives.MAX, group=group, operation=operation)
        if bad:
            collectives.gather_or_raise(None, error, group=group, operation=operation)

    def _operation(self, what: str) -> str:
        return f"table {self.plan.table!r}: {what}"

    def fetch(self, sent: Sent) -> Tensor:
        """Return rows ``(n, D)`` in the order of the ids; backward updates them. A collective."""
        with watchdog.guarded(self._groups.shard, self._operation("ids")):
            owned = sent.features.wait().wait()  # row numbers of this shard
        (sharding,) = sent.context.sharding_contexts
        sharding.lengths_after_input_dist = owned[0].lengths().view(-1, owned[0].stride())
        rows = owned[0].values()
        trained = self._updates
        if trained:
            rows = self._trained(rows, lambda: self.torchrec_module.compute(sent.context, owned)[0])
            self._stale |= self._cached
            rows = _Reduce.apply(rows, self._scale, self.plan.world_size)
        else:
            rows = self.lookup(rows)
        if not self.plan.dim:  # TorchRec sends at least one column
            rows = F.pad(rows, (0, 1))
        with watchdog.guarded(self._groups.shard, self._operation("rows")):
            back = self.torchrec_module.output_dist(sent.context, [rows])[_IDS].values()
        back = back[:, : self.plan.dim].contiguous()
        if sent.merged is not None:
            back = back.index_select(0, sent.merged.inverse)
        if not trained:
            return back
        operation = self._operation(f"lookup {sent.number}: gradients")
        back.register_hook(lambda grad: collectives.check(self._groups.everyone, operation))
        # not the owner's lookup: TorchRec keeps an abandoned graph until gc runs
        return self._await_backward(back)

    def _got_gradient(self, rows: Tensor) -> None:
        if self._constrained:
            super()._got_gradient(rows)
        if self._groups.replica is not None:
            self._moved.add(rows)

    @torch.no_grad()
    def synchronize_replicas(self) -> None:
        """Average the rows moved since the last call, and their optimizer state. A collective."""
        group, count = self._groups.replica, self._groups.num_replicas
        if group is None:
            return
        operation = self._operation("averaging replicas")
        moved = self._moved.take()
        rows = torch.tensor([-1]) if moved is None else moved  # -1: all rows
        gathered = collectives.all_gather_rows(
            rows.to(self.device), group=group, operation=operation
        )
        rows = gathered.unique()
        if len(rows) and rows[0] < 0:
            rows = torch.arange(self.plan.num_local, device=self.device)
        state = [] if self.optimizer.name == "sgd" else self._tbe.split_optimizer_states()[0]
        for tensor in (self.weight, *state):
            for chunk in rows.split(_SYNC_ROWS) if len(rows) else ():
                values = tensor.index_select(0, chunk).float()
                collectives.all_reduce(values, group=group, operation=operation)
                tensor.index_copy_(0, chunk, values.div_(count).to(tensor.dtype))
        if self._constrained:
            self._changed.add(rows)


class _Reduce(torch.autograd.Function):
    """Scales gradients; TorchRec may have divided them by the number of ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, scale: float, world_size: int) -> Tensor:
        from torchrec.distributed.comm_ops import get_gradient_division, get_use_sync_collectives

        ctx.scale, ctx.world_size = scale, world_size
        # synchronous collectives divide by forward's setting, others by that of backward, just
        # before
        ctx.divided = get_gradient_division() if get_use_sync_collectives() else None
        return rows.view_as(rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        from torchrec.distributed.comm_ops import get_gradient_division

        divided = get_gradient_division() if ctx.divided is None else ctx.divided
        scale = ctx.scale * (ctx.world_size if divided else 1)
        return (grad if scale == 1 else grad * scale), None, None


class TorchRecLookup(Lookup):
    """Rows on several ranks, moved by TorchRec."""

    def __init__(self, table: TorchRecTable) -> None:
        self._table = table

    def send(self, ids: Any, wait: bool = True) -> Sent:
        """See :class:`Lookup`. A collective."""
        return self._table.send_ids(ids)

    def rows(self, request: Sent) -> Tensor:
        """See :class:`Lookup`. A collective, also in backward."""
        return self._table.fetch(request)
