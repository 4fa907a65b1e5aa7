"""The options of a table; each class checks its values."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from shardemb.exceptions import InputError, InputTypeError
from shardemb.optim import FusedOptimizer
from shardemb.utils.types import GradientReduction, Placement
from shardemb.utils.validation import one_of

#: allowed values
_SHARDING = {
    "placement": get_args(Placement),
    "gradient_reduction": get_args(GradientReduction),
    "wire_dtype": (None, torch.float16, torch.bfloat16),
}
_TORCHREC = {"compute_kernel": ("fused", "fused_uvm", "fused_uvm_caching")}
_KERNELS = ("dense", "sparse", "fused")


@dataclass(frozen=True)
class Sharding:
    """How ranks share a table: ``Embedding(sharding=...)``."""

    #: "row_wise": each row on one rank. "replicated": all rows on every rank, for small tables:
    #: lookups are local, :class:`~shardemb.Coordinator` reduces the gradients, and a bad id raises
    #: on its own rank only
    placement: Placement = "row_wise"
    #: ranks that share the rows; None for the default group
    process_group: Any = None
    #: reduction of gradients over ranks: "mean", as DistributedDataParallel, or "sum"
    gradient_reduction: GradientReduction = "mean"
    #: send each id of a batch once, and its summed gradient back. This changes the order of sums;
    #: with False, SGD on summed gradients is bitwise equal to one process
    deduplicate: bool = True
    #: dtype of rows and gradients on the wire, torch.float16 or torch.bfloat16; None for the
    #: table's. The relative error is at most 2^-11 or 2^-8. float16 overflows above 65504 and loses
    #: digits below 6e-5: scale the loss, or use bfloat16
    wire_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        one_of("Sharding", self, _SHARDING)


@dataclass(frozen=True)
class TorchRec:
    """TorchRec as the engine of a fused table: ``Fused(engine=TorchRec(...))``."""

    #: "fused": rows on the device. On CUDA also "fused_uvm": rows in host memory that the device
    #: reads, and "fused_uvm_caching": the same with a cache on the device, which constrainers and
    #: reads write back
    compute_kernel: str = "fused"
    #: share of the rows in the cache of "fused_uvm_caching"; None for TorchRec's 0.2
    cache_load_factor: float | None = None
    #: bytes a rank for rows and optimizer state; None for the free memory
    memory_bytes: int | None = None
    #: ranks that share the rows, the others hold replicas (2D parallelism); None for all ranks
    sharding_group_size: int | None = None

    def __post_init__(self) -> None:
        one_of("TorchRec", self, _TORCHREC)
        factor = self.cache_load_factor
        if factor is not None and not 0 < factor <= 1:
            raise InputError(f"TorchRec.cache_load_factor: got {factor}, expected 0 < x <= 1")
        if factor is not None and self.compute_kernel != "fused_uvm_caching":
            raise InputError(
                f"TorchRec.cache_load_factor: got {factor} with compute_kernel="
                f"{self.compute_kernel!r}, which has no cache: use 'fused_uvm_caching'"
            )
        for name in ("memory_bytes", "sharding_group_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"TorchRec.{name}: got {value}, expected at least 1")


@dataclass(frozen=True)
class Fused:
    """A kernel that updates rows in backward: ``Embedding(kernel=Fused(...))``."""

    #: the update rule
    optimizer: FusedOptimizer = FusedOptimizer()  # noqa: RUF009  # frozen
    #: "fbgemm": FBGEMM's tables with this package's exchange; :class:`TorchRec`: the same results,
    #: and needs a process group even for one rank
    engine: Literal["fbgemm"] | TorchRec = "fbgemm"

    def __post_init__(self) -> None:
        if not isinstance(self.optimizer, FusedOptimizer):
            raise InputTypeError(
                f"got optimizer={self.optimizer!r}, expected a shardemb.FusedOptimizer"
            )
        if self.engine != "fbgemm" and not isinstance(self.engine, TorchRec):
            raise InputTypeError(f"got engine={self.engine!r}, expected 'fbgemm' or TorchRec(...)")


def resolve_options(table: str, kernel: Any, sharding: Any) -> tuple[str, Fused | None, Sharding]:
    """Return "dense", "sparse" or "fused", the options of "fused", and the sharding.

    ValueError for options that would train incorrectly together, TypeError for other types.
    """
    if isinstance(kernel, Fused):
        kernel, fused = "fused", kernel
    elif kernel in _KERNELS:
        fused = Fused() if kernel == "fused" else None
    else:
        error = InputError if isinstance(kernel, str) else InputTypeError
        raise error(
            f"table {table!r}: got kernel={kernel!r}, expected one of {_KERNELS} or Fused(...)"
        )
    if isinstance(sharding, str):
        sharding = Sharding(placement=sharding)  # type: ignore[arg-type]
    elif sharding is None:
        sharding = Sharding()
    elif not isinstance(sharding, Sharding):
        raise InputTypeError(
            f"table {table!r}: got sharding={sharding!r}, expected Sharding(...), 'row_wise' or"
            " 'replicated'"
        )
    if fused is not None and sharding.placement == "replicated":
        raise InputError(
            f"table {table!r}: placement='replicated' with a fused kernel would update each rank's"
            " copy by its own gradients alone: use kernel='sparse' or 'dense'"
        )
    if fused is not None and fused.engine != "fbgemm" and sharding.wire_dtype is not None:
        raise InputError(
            f"table {table!r}: got wire_dtype={sharding.wire_dtype} with TorchRec, which exchanges"
            " rows in their own dtype: use Fused(engine='fbgemm')"
        )
    return kernel, fused, sharding
