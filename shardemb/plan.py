"""Who owns which row, and whether it fits.

Rows lie in contiguous blocks of ``ceil(V / W)``, the only layout that TorchRec's row-wise input distribution knows
(with any other it trains the wrong rows). The last ranks may own fewer rows, or none. Ids are expected to be spread:
the vocabulary shuffles them, so that the popular ones do not share a block.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from shardemb.metrics import free_bytes

if TYPE_CHECKING:
    from torchrec.distributed.types import ParameterSharding


@dataclass(frozen=True)
class RowPlan:
    """Placement of one table's rows over the ranks of a process group."""

    #: name of the table, for errors
    table: str
    #: ``V``, rows of the whole table
    num_rows: int
    #: ``D``, stored columns of a row
    dim: int
    #: ``W``, ranks that share the rows
    world_size: int = 1
    #: this rank
    rank: int = 0

    def __post_init__(self) -> None:
        if self.num_rows < 0 or self.dim < 0:
            raise ValueError(f"table {self.table!r}: got {self.num_rows} rows of {self.dim} columns, expected none below 0")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"table {self.table!r}: got rank {self.rank} of {self.world_size}")

    @property
    def block(self) -> int:
        """Rows of every rank but the last ones."""
        return max(1, -(-self.num_rows // self.world_size))

    def range_of(self, rank: int) -> tuple[int, int]:
        """Return the global ids ``[first, last)`` that ``rank`` owns; empty past the end of the table."""
        return min(rank * self.block, self.num_rows), min((rank + 1) * self.block, self.num_rows)

    @property
    def first(self) -> int:
        """Global id of this rank's first row."""
        return self.range_of(self.rank)[0]

    @property
    def num_local(self) -> int:
        """``R``, rows that this rank owns."""
        first, last = self.range_of(self.rank)
        return last - first

    def local_bytes(self, itemsize: int, state_bytes_per_row: int = 0) -> int:
        """Bytes of this rank's rows and of their optimizer state."""
        return self.num_local * (self.dim * itemsize + state_bytes_per_row)

    def check_fits(self, itemsize: int, device: torch.device, state_bytes_per_row: int = 0) -> None:
        """Refuse a shard larger than the memory that is free now, before anything is allocated.

        Raises:
            MemoryError: naming table, rank, the bytes needed and those that are free.
        """
        need, free = self.local_bytes(itemsize, state_bytes_per_row), free_bytes(device)
        if free is not None and need > free:
            raise MemoryError(
                f"table {self.table!r}, rank {self.rank} of {self.world_size}: {self.num_local:,} rows x {self.dim} columns "
                f"need {need:,} bytes on {device}, {free:,} are free: use more ranks, fewer columns or a smaller dtype"
            )

    def parameter_sharding(self, device: str = "cpu") -> "ParameterSharding":
        """Describe this placement to TorchRec: its row-wise sharding, one ShardMetadata a rank."""
        from torchrec.distributed.embedding_types import EmbeddingComputeKernel
        from torchrec.distributed.types import EnumerableShardingSpec, ParameterSharding, ShardingType, ShardMetadata

        shards = []
        for rank in range(self.world_size):
            first, last = self.range_of(rank)
            shards.append(ShardMetadata([first, 0], [last - first, self.dim], f"rank:{rank}/{device}"))
        return ParameterSharding(
            sharding_type=ShardingType.ROW_WISE.value,
            compute_kernel=EmbeddingComputeKernel.FUSED.value,
            ranks=list(range(self.world_size)),
            sharding_spec=EnumerableShardingSpec(shards),
        )
