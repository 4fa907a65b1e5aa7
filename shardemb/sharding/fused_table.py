"""A shard in FBGEMM's table-batched embeddings, which update rows in backward."""

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from shardemb import kernels
from shardemb.exceptions import InputError, UsageError
from shardemb.optim import FusedOptimizer
from shardemb.sharding.placement import RowPlan
from shardemb.sharding.table import PendingBackward, RowOptions, Table


class FusedTable(Table):
    """A shard in FBGEMM's table-batched embeddings, which update rows in backward.

    On CPUs a lookup is a bag of one id under PoolingMode.SUM: the rows and gradients of
    PoolingMode.NONE in 0.1 to 0.7 of its time. FBGEMM requires a multiple of 4 columns; this class
    pads them.
    """

    _tbe: Any

    def __init__(self, plan: RowPlan, options: RowOptions, optimizer: FusedOptimizer) -> None:
        super().__init__(plan, options)
        if options.dtype not in (torch.float32, torch.float16):
            raise InputError(
                f"table {plan.table!r}: got dtype {options.dtype} with kernel='fused', FBGEMM"
                " trains float32 and float16: use one of these, or kernel='sparse'"
            )
        self.optimizer = optimizer
        #: empty: whoever freezes the parameters of a model finds this one, as rows are a buffer
        self.trains = nn.Parameter(
            torch.empty(0, device=options.device), requires_grad=options.trainable
        )
        #: of the next backward
        self.learning_rate = optimizer.lr
        #: two lookups before a backward would not sum their gradients
        self._one_lookup = optimizer.name != "sgd"
        self._build(options.dtype, options.device)

    @property
    def _updates(self) -> bool:
        """Whether the backward of a lookup made now updates rows; not in evaluation mode."""
        return self.trains.requires_grad and self.training and torch.is_grad_enabled()

    def _build(self, dtype: torch.dtype, device: torch.device) -> None:
        plan = self.plan
        columns = max(4, -(-plan.dim // 4) * 4)
        # FBGEMM's row-wise mean includes the padding; a smaller rate and eps correct it
        row_wise = self.optimizer.name == "rowwise_adagrad"
        self._mean_share = plan.dim / columns if row_wise and plan.dim else 1.0
        # not a submodule, to hide its parameters from optimizers and the state dict
        tbe = self.__dict__["_tbe"] = self._make_tbe(columns, dtype, device)
        rows = tbe.split_embedding_weights()[0]
        self.register_buffer("weight", rows[: plan.num_local, : plan.dim])
        self._offsets = torch.arange(1, device=device)
        self._pending: weakref.ref[PendingBackward] | None = None
        #: whether a backward has updated rows in this step
        self._updated = False

    def _engine_options(self, dtype: torch.dtype) -> dict[str, Any]:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode

        return {
            "optimizer": getattr(EmbOptimType, f"EXACT_{self.optimizer.name.upper()}"),
            "learning_rate": self.learning_rate * math.sqrt(self._mean_share),
            "eps": self.optimizer.eps * math.sqrt(self._mean_share),
            "output_dtype": SparseType.from_dtype(dtype),
            "stochastic_rounding": False,
            # the ids are checked; FBGEMM would set bad ones to 0
            "bounds_check_mode": BoundsCheckMode.NONE,
        }

    def _make_tbe(self, columns: int, dtype: torch.dtype, device: torch.device) -> Any:
        from fbgemm_gpu import split_table_batched_embeddings_ops_common as common
        from fbgemm_gpu import split_table_batched_embeddings_ops_training as training
        from fbgemm_gpu.split_embedding_configs import SparseType

        self.plan.check_fits(dtype.itemsize, device, 4 * self.optimizer.state_columns(columns))
        cuda = device.type == "cuda"
        place = common.EmbeddingLocation.DEVICE if cuda else common.EmbeddingLocation.HOST
        compute = training.ComputeDevice.CUDA if cuda else training.ComputeDevice.CPU
        num_rows = max(self.plan.num_local, 1)  # FBGEMM's forward needs a row
        tbe = training.SplitTableBatchedEmbeddingBagsCodegen(
            embedding_specs=[(num_rows, columns, place, compute)],
            weights_precision=SparseType.from_dtype(dtype),
            pooling_mode=common.PoolingMode.NONE if cuda else common.PoolingMode.SUM,
            device=device,
            **self._engine_options(dtype),
        )
        if not cuda:  # free the memory, then allocate it in large pages
            shape = tbe.weights_host.shape
            tbe.weights_host.data = tbe.weights_host.new_empty(0)
            tbe.weights_host.data = kernels.empty(shape, dtype, device).zero_()
        return tbe

    def __getstate__(self) -> dict[str, Any]:
        """Copy rows and optimizer state; :meth:`__setstate__` makes FBGEMM's module anew."""
        state = {k: v for k, v in self.__dict__.items() if k not in ("_tbe", "_pending")}
        state["_buffers"] = {k: v for k, v in self._buffers.items() if k != "weight"}
        rows = self.weight.detach().clone()
        return state | {"_rows": rows, "_optimizer_state": self.optimizer_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        rows, optimizer_state = state.pop("_rows"), state.pop("_optimizer_state")
        super().__setstate__(state)
        self._build(rows.dtype, rows.device)
        with torch.no_grad():
            self.weight.copy_(rows)
        self.load_optimizer_state(optimizer_state)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}trains"]

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any
    ) -> None:
        state_dict[f"{prefix}trains"] = self.trains
        # FBGEMM owns the memory: always copy, even with load_state_dict(assign=True)
        copied = {**local_metadata, "assign_to_params_buffers": False}
        super()._load_from_state_dict(state_dict, prefix, copied, *args)

    def lookup(self, rows: Tensor) -> Tensor:
        """Return ``(n, D)``; backward updates the rows.

        RuntimeError for a second lookup before the first one's backward, except with SGD: their
        gradients would not be summed.
        """
        if not self._updates:
            return kernels.take(self.weight, rows)
        out = self._trained(rows, lambda: self._tbe(rows, self._bag_offsets(len(rows))))
        return self._await_backward(out)

    @property
    def _waits_for_backward(self) -> bool:
        pending = self._pending() if self._pending is not None else None
        return pending is not None and not pending.done

    def end_step(self) -> None:
        """Let the next lookup's backward update rows again; for accumulation is refused."""
        self._updated = False

    def _trained(self, rows: Tensor, engine: Callable[[], Tensor]) -> Tensor:
        if self._one_lookup and self._waits_for_backward:
            raise UsageError(
                f"table {self.plan.table!r}: a second lookup before the backward of the first would"
                f" make two {self.optimizer.name} updates of a row in one step: look all ids up at"
                " once (torch.cat), use kernel='sparse', or look up rows that are not trained under"
                " torch.no_grad()"
            )
        if self._one_lookup and self._updated:
            raise UsageError(
                f"table {self.plan.table!r}: a second backward in one step would make two"
                f" {self.optimizer.name} updates of a row: end each step with Coordinator.step() or"
                " Embedding.post_parameter_update(); to accumulate gradients use kernel='sparse'"
            )
        if len(rows):
            out = engine()
            if out.shape[1] > self.plan.dim:
                out = out[:, : self.plan.dim].contiguous()
        else:
            out = self.weight.new_zeros(0, self.plan.dim, requires_grad=True)
        self._watch(out, rows)
        return out

    def _await_backward(self, out: Tensor) -> Tensor:
        pending = PendingBackward(self)

        def before_backward(grad: Tensor) -> None:
            if pending.done and self._one_lookup:
                raise UsageError(
                    f"table {self.plan.table!r}: a second backward of one lookup would make two"
                    f" {self.optimizer.name} updates: add the losses first, or use kernel='sparse'"
                )
            pending.done = self._updated = True

        out.register_hook(before_backward)
        self._pending = weakref.ref(pending)
        return out

    def _bag_offsets(self, n: int) -> Tensor:
        if self.weight.is_cuda:
            return torch.tensor([0, n], device=self.weight.device)
        if len(self._offsets) <= n:
            self._offsets = torch.arange(2 * n + 1)
        return self._offsets[: n + 1]

    def set_learning_rate(self, lr: float) -> None:
        """Change the learning rate of the next backward's update."""
        self.learning_rate = lr
        self._tbe.set_learning_rate(lr * math.sqrt(self._mean_share))

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return Adagrad's ``sum``: ``(R,)`` row-wise, else ``(R, D)``; nothing for SGD."""
        total = self._accumulator()
        if total is None:
            return {}
        return {"sum": total / self._mean_share if total.dim() == 1 else total[:, : self.plan.dim]}

    @torch.no_grad()
    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Load what :meth:`optimizer_state` returned."""
        total = self._accumulator()
        if total is None:
            return
        if total.dim() == 1:
            torch.mul(state["sum"], self._mean_share, out=total)
        elif total.data_ptr() != state["sum"].data_ptr():  # otherwise filled in place
            total[:, : self.plan.dim] = state["sum"]

    @torch.no_grad()
    def reset_optimizer_state(self) -> None:
        """Zero Adagrad's sums, in place."""
        total = self._accumulator()
        if total is not None:
            total.zero_()

    def _accumulator(self) -> Tensor | None:
        if self.optimizer.name == "sgd":
            return None
        return self._tbe.split_optimizer_states()[0][0][: self.plan.num_local]

    def _apply(self, fn: Any, recurse: bool = True) -> "FusedTable":
        before = self.weight
        super()._apply(fn, recurse)
        if self.weight.data_ptr() != before.data_ptr() or self.weight.dtype != before.dtype:
            self.weight = before
            raise UsageError(
                f"table {self.plan.table!r}: FBGEMM's rows cannot be moved or converted: give"
                " Embedding the device and dtype when you make it"
            )
        return self
