import pytest
import torch
import torch.distributed as dist

import shardemb
from shardemb.metrics import free_bytes
from shardemb.plan import RowPlan


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 8, 501])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_every_row_has_one_owner(rows: int, ranks: int) -> None:
    plans = [RowPlan("t", rows, 6, ranks, rank) for rank in range(ranks)]
    owned = [row for plan in plans for row in range(plan.first, plan.first + plan.num_local)]
    assert owned == list(range(rows))
    for plan in plans:
        for row in range(plan.first, plan.first + plan.num_local):
            assert row // plan.block == plan.rank
            assert row % plan.block == row - plan.first  # what FBGEMM's bucketizing takes for granted


def test_bytes_and_refusal_before_allocation() -> None:
    plan = RowPlan("people", 1001, 6, 2, 1)
    assert plan.local_bytes(4, 8) == 500 * (6 * 4 + 8)
    plan.check_fits(4, torch.device("cpu"))
    assert free_bytes(torch.device("cpu")) > 0
    with pytest.raises(MemoryError, match=r"table 'people', rank 0 of 2: 500,000,000,000 rows .* need .* bytes .* free"):
        RowPlan("people", 10**12, 128, 2, 0).check_fits(4, torch.device("cpu"))
    for gradient in ("sparse", "fused"):
        with pytest.raises(MemoryError, match="table 'people'"):
            shardemb.Embedding(10**12, shape=128, gradient=gradient, name="people")


@pytest.mark.parametrize("arguments", [(-1, 4), (4, -1), (4, 4, 2, 2), (4, 4, 0, 0)])
def test_nonsense_is_refused(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="table 't'"):
        RowPlan("t", *arguments)


def _torchrec(rank: int, world_size: int, rows: int) -> float:
    """Look ids up in TorchRec's sharded collection under our plan, with our rows in it."""
    from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.types import ShardingEnv

    ours = shardemb.Embedding(rows, shape=8, seed=3)
    collection = EmbeddingCollection(
        tables=[EmbeddingConfig(num_embeddings=rows, embedding_dim=8, name="t", feature_names=["f"])],
        device=torch.device("meta"),
    )
    environment = ShardingEnv.from_process_group(dist.group.WORLD)
    sharding = {"t": ours.plan.parameter_sharding()}
    theirs = EmbeddingCollectionSharder().shard(collection, sharding, environment, torch.device("cpu"))
    first, mine = ours.local_rows()
    (shard,) = theirs.state_dict()["embeddings.t.weight"].local_shards()
    assert shard.metadata.shard_offsets == [first, 0]
    shard.tensor.detach().copy_(mine)
    ids = torch.arange(rank, rows, 2)
    jagged = KeyedJaggedTensor(keys=["f"], values=ids, lengths=torch.tensor([len(ids)]))
    return (theirs(jagged)["f"].values() - ours(ids)).abs().max().item()


@pytest.mark.filterwarnings("ignore")
def test_torchrec_understands_the_plan(run_ranks) -> None:
    assert run_ranks(_torchrec, 2, 501) == [0, 0]
