import pytest
import torch
import torch.distributed as dist

import shardemb
from shardemb.sharding.placement import RowOrder, RowPlan
from shardemb.utils.memory import free_bytes


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 8, 501])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_every_row_has_one_owner(rows: int, ranks: int) -> None:
    plans = [RowPlan("t", rows, 6, ranks, rank) for rank in range(ranks)]
    owned = [row for plan in plans for row in range(plan.first, plan.first + plan.num_local)]
    assert owned == list(range(rows))
    ids = torch.arange(rows)
    assert torch.cat([plan.local_ids() for plan in plans]).sort().values.equal(ids)
    for plan in plans:
        for row in range(plan.first, plan.first + plan.num_local):
            assert row // plan.block == plan.rank
            assert (
                row % plan.block == row - plan.first
            )  # what FBGEMM's bucketizing takes for granted
        assert (plan.owner_of(plan.local_ids()) == plan.rank).all()
        assert plan.order.slots(plan.local_ids()).equal(
            torch.arange(plan.first, plan.first + plan.num_local)
        )
        assert plan.local_ids(1, 3).equal(plan.local_ids()[1:3]) or plan.num_local < 3


@pytest.mark.parametrize(
    "rows", [*range(70), 501, 4096, 10**6, 2**31 - 1, 2**31 + 11, 3 * 10**9, 2**40]
)
def test_slots_are_a_permutation_of_ids(rows: int) -> None:
    order = RowOrder(rows, permuted=True)
    ids = torch.arange(rows) if rows <= 4096 else torch.randint(rows, (1000,))
    slots = order.slots(ids)
    assert slots.tolist() == [(i * order.multiplier + order.offset) % rows for i in ids.tolist()]
    assert order.ids(slots).equal(ids)
    assert len(slots.unique()) == len(ids.unique())
    with pytest.raises(ValueError, match="at most 2\\^40"):
        RowOrder(2**40 + 1, permuted=True)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize(
    ("order", "each_once"),
    [("popularity", False), ("popularity", True), ("shuffled", True), ("eighth", True)],
)
def test_popular_ids_order_over_the_ranks(ranks: int, order: str, each_once: bool) -> None:
    """What each shard is asked for, with ids of Zipf's law of exponent 0.8, stays near the mean.

    In random order the most popular rows may meet on one shard by chance, so there it takes the
    exchange that sends each once.
    """
    rows, batch = 10**6, 65536
    share = torch.arange(1, rows + 1, dtype=torch.float64).pow(-0.8)
    if order == "shuffled":
        share = share[torch.randperm(rows, generator=torch.Generator().manual_seed(0))]
    if order == "eighth":  # only every eighth id is in use
        share = torch.zeros_like(share).scatter_(0, torch.arange(0, rows, 8), share[: rows // 8])
    share /= share.sum()
    asked = 1 - (1 - share) ** batch if each_once else share
    load = torch.zeros(ranks, dtype=torch.float64)
    load.index_add_(0, RowPlan("t", rows, 6, ranks).owner_of(torch.arange(rows)), asked)
    assert load.max() / load.mean() < 1.1


def test_bytes_and_refusal_before_allocation() -> None:
    plan = RowPlan("people", 1001, 6, 2, 1)
    assert plan.local_bytes(4, 8) == 500 * (6 * 4 + 8)
    plan.check_fits(4, torch.device("cpu"))
    assert free_bytes(torch.device("cpu")) > 0
    with pytest.raises(
        MemoryError,
        match=r"table 'people', rank 0 of 2: 500,000,000,000 rows .* need .* bytes .* free",
    ):
        RowPlan("people", 10**12, 128, 2, 0).check_fits(4, torch.device("cpu"))
    for gradient in ("sparse", "fused"):
        with pytest.raises(MemoryError, match="table 'people'"):
            shardemb.Embedding(10**12, shape=128, kernel=gradient, name="people")


@pytest.mark.parametrize("arguments", [(-1, 4), (4, -1), (4, 4, 2, 2), (4, 4, 0, 0)])
def test_nonsense_is_refused(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="table 't'"):
        RowPlan("t", *arguments)


def _torchrec(rank: int, world_size: int, rows: int) -> float:
    """Look ids up in TorchRec's sharded collection under our plan, with our rows in it."""
    from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.embedding_types import EmbeddingComputeKernel
    from torchrec.distributed.types import (
        EnumerableShardingSpec,
        ParameterSharding,
        ShardingEnv,
        ShardingType,
        ShardMetadata,
    )

    ours = shardemb.Embedding(rows, shape=8, seed=3)
    collection = EmbeddingCollection(
        tables=[
            EmbeddingConfig(num_embeddings=rows, embedding_dim=8, name="t", feature_names=["f"])
        ],
        device=torch.device("meta"),
    )
    environment = ShardingEnv.from_process_group(dist.group.WORLD)
    blocks = [(rank, ours.plan.range_of(rank)) for rank in range(world_size)]
    shards = [
        ShardMetadata([first, 0], [last - first, 8], f"rank:{rank}/cpu")
        for rank, (first, last) in blocks
    ]
    sharding = {
        "t": ParameterSharding(
            sharding_type=ShardingType.ROW_WISE.value,
            compute_kernel=EmbeddingComputeKernel.FUSED.value,
            ranks=list(range(world_size)),
            sharding_spec=EnumerableShardingSpec(shards),
        )
    }
    theirs = EmbeddingCollectionSharder().shard(
        collection, sharding, environment, torch.device("cpu")
    )
    first, rows_here = ours.plan.first, ours.local_rows()
    (shard,) = theirs.state_dict()["embeddings.t.weight"].local_shards()
    assert shard.metadata.shard_offsets == [first, 0]
    shard.tensor.detach().copy_(rows_here)
    ids = torch.arange(rank, rows, 2)
    jagged = KeyedJaggedTensor(
        keys=["f"], values=ours.plan.order.slots(ids), lengths=torch.tensor([len(ids)])
    )
    return (theirs(jagged)["f"].values() - ours(ids)).abs().max().item()


@pytest.mark.filterwarnings("ignore")
def test_torchrec_understands_the_plan(run_ranks) -> None:
    assert run_ranks(_torchrec, 2, 501) == [0, 0]
