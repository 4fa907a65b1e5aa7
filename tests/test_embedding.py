"""The interface on 1 to 4 ranks, against torch.nn.Embedding with torch.optim in one process."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

from shardemb import Coordinator, Embedding, Fused, FusedOptimizer, RowWiseAdagrad, Sharding

ROWS, STEPS = 501, 5
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.3),
    "sparse_adam": lambda p: torch.optim.SparseAdam(p, lr=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "rowwise_adagrad": lambda p: RowWiseAdagrad(p, lr=0.3),
}
#: gradient and optimizer that go together
KERNELS = [
    ("sparse", "sgd"),
    ("sparse", "adagrad"),
    ("sparse", "sparse_adam"),
    ("sparse", "rowwise_adagrad"),
    ("dense", "sgd"),
    ("dense", "adam"),
    ("fused", "sgd"),
    ("fused", "adagrad"),
    ("fused", "rowwise_adagrad"),
]


def step_ids(step: int, parts: int, part: int) -> torch.Tensor:
    """Return one rank's ids of a step: duplicates within and between ranks; sizes differ.

    Some parts are empty.
    """
    ids = torch.randint(ROWS, (60,), generator=torch.Generator().manual_seed(step))
    ids[:20] = ids[0]
    sizes = [0, 60 - 7 * (parts - 2), *[7] * parts][:parts] if parts > 1 else [60]
    return ids.split(sizes)[part]


def factors(ids: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.sin(torch.arange(dim) + ids[:, None] * 0.1)


def _train(
    rank: int, world_size: int, dim: int, gradient: str, optimizer: str, constrainer: str | None
) -> torch.Tensor:
    """Train on this rank's part of each batch; the loss is a sum over the batch.

    Returns the whole table.
    """
    kernel = gradient
    if gradient == "fused":
        kernel = Fused(FusedOptimizer(optimizer, lr={"sgd": 0.5}.get(optimizer, 0.3)))
    table = Embedding(
        ROWS,
        shape=dim,
        constrainer=constrainer,
        kernel=kernel,
        seed=4,
        sharding=Sharding(gradient_reduction="sum"),
    )
    outer = OPTIMIZERS[optimizer](table.parameters()) if gradient != "fused" else None
    for step in range(STEPS):
        ids = step_ids(step, world_size, rank)
        if gradient == "fused":
            loss = (table(ids) * factors(ids, dim)).square().sum()
        else:  # two lookups of one table make one update
            half = len(ids) // 2
            loss = sum(
                (table(part) * factors(part, dim)).square().sum()
                for part in (ids[:half], ids[half:])
            )
        if outer is not None:
            outer.zero_grad()
        loss.backward()
        if outer is not None:
            outer.step()
        table.post_parameter_update()
    with torch.no_grad():
        return table(None).clone()


def oracle(dim: int, optimizer: str, constrainer: str | None, sparse: bool) -> torch.Tensor:
    """The same in one process with torch.nn.Embedding, torch.optim.

    And a pass over all rows after each step.
    """
    start = Embedding(ROWS, shape=dim, seed=4)(None).detach()
    table = torch.nn.Embedding(ROWS, dim, _weight=start.clone(), sparse=sparse)
    outer = OPTIMIZERS[optimizer](table.parameters())
    for step in range(STEPS):
        ids = step_ids(step, 1, 0)
        outer.zero_grad()
        (table(ids) * factors(ids, dim)).square().sum().backward()
        outer.step()
        if constrainer is not None:
            table.weight.data = F.normalize(table.weight.data)
    return table.weight.detach()


@pytest.mark.parametrize("constrainer", [None, "normalize"])
@pytest.mark.parametrize(("gradient", "optimizer"), KERNELS)
def test_training_equals_one_process(
    run_ranks, world_size: int, gradient: str, optimizer: str, constrainer: str | None
) -> None:
    dim = 7 if gradient == "fused" else 6
    expected = oracle(dim, optimizer, constrainer, sparse=gradient != "dense")
    for got in run_ranks(_train, world_size, dim, gradient, optimizer, constrainer):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def _mean(rank: int, world_size: int) -> torch.Tensor:
    table = Embedding(10, shape=2, initializer="zeros", seed=0)
    table.reset_parameters()
    optimizer = torch.optim.SGD(table.parameters(), lr=1.0)
    table(torch.tensor([3, rank])).sum().backward()
    optimizer.step()
    return table(None).detach()


def test_gradients_are_averaged_over_ranks_by_default(run_ranks, world_size: int) -> None:
    expected = torch.zeros(10, 2)
    for rank in range(world_size):
        expected[[3]] -= 1 / world_size
        expected[[rank]] -= 1 / world_size
    for got in run_ranks(_mean, world_size):
        torch.testing.assert_close(got, expected)


def _initial(
    rank: int, world_size: int, shape: tuple, dtype: torch.dtype, seed: int | None
) -> torch.Tensor:
    torch.manual_seed(rank)  # ranks that draw their own seeds take rank 0's
    table = Embedding(9000, shape=shape, dtype=dtype, initializer="uniform_norm", seed=seed)
    fresh = table(None).detach()
    table.reset_parameters()
    again = table(None).detach()
    table.reset_parameters()
    assert torch.equal(table(None), again) == (seed is not None)
    assert not torch.equal(fresh, again)
    return again


@pytest.mark.parametrize("seed", [None, 11])
@pytest.mark.parametrize(("shape", "dtype"), [((3, 2), torch.float64), ((5,), torch.complex64)])
def test_initial_tables_are_bitwise_equal(
    run_ranks, world_size: int, shape: tuple, dtype: torch.dtype, seed: int | None
) -> None:
    (expected,) = run_ranks(_initial, 1, shape, dtype, seed)
    for got in run_ranks(_initial, world_size, shape, dtype, seed):
        assert torch.equal(got, expected)


def _touched(rank: int, world_size: int) -> tuple[list[int], int, int]:
    """Count the rows that the constrainer sees on this rank, call by call."""
    seen: list[int] = []

    def unit(rows: torch.Tensor) -> torch.Tensor:
        seen.append(len(rows))
        return F.normalize(rows)

    table = Embedding(ROWS, shape=6, constrainer=unit, seed=1)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    seen.clear()  # the probe's
    coordinator = Coordinator(table, optimizer)
    counts = []
    for _ in range(2):
        table(torch.tensor([0, 0, ROWS - 1])).sum().backward()
        coordinator.step()
        counts.append(sum(seen))
        seen.clear()
    assert table.local_rows().norm(dim=1).allclose(torch.tensor(1.0))
    return counts, table.plan.num_local, table.plan.local_ids().tolist()


def test_only_this_ranks_touched_rows_are_constrained(run_ranks, world_size: int) -> None:
    for counts, local, ids in run_ranks(_touched, world_size):
        owned = len({0, ROWS - 1} & set(ids))
        assert counts == [local, owned]


def test_from_pretrained() -> None:
    tensor = torch.randn(5, 3, 2)
    table = Embedding.from_pretrained(tensor)
    assert not torch.equal(table(None), tensor)
    table.reset_parameters()
    assert torch.equal(table(None), tensor)
    assert not table(None).requires_grad
    assert Embedding.from_pretrained(tensor, trainable=True)(None).requires_grad


def test_monte_carlo_dropout() -> None:
    """As in PyKEEN's documentation: in training mode one triple scores differently each time."""
    torch.manual_seed(0)
    entity, relation = Embedding(5, shape=32, dropout=0.5), Embedding(2, shape=32)

    def score() -> float:
        h, r, t = entity(torch.tensor(1)), relation(torch.tensor(0)), entity(torch.tensor(2))
        return (h * r * t).sum().item()

    assert len({score() for _ in range(10)}) == 10
    entity.eval()
    assert len({score() for _ in range(10)}) == 1


@pytest.mark.parametrize("gradient", ["dense", "sparse", "fused"])
def test_inference_mode_strided_and_int32_ids(gradient: str) -> None:
    table = Embedding(20, shape=6, kernel=gradient)
    ids = torch.randint(20, (7, 3))
    with torch.inference_mode():
        assert torch.equal(table(ids[:, 0]), table(ids)[:, 0])
    with torch.no_grad():
        assert torch.equal(table(ids[:, 0]), table(ids[:, 0].contiguous().int()))


@pytest.mark.parametrize("gradient", ["sparse", "fused"])
def test_int32_ids_train_and_rows_are_contiguous(gradient: str) -> None:
    table = Embedding(20, shape=6, kernel=gradient, constrainer="normalize")
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1) if gradient == "sparse" else None
    for _ in range(2):
        out = table(torch.randint(20, (3, 2), dtype=torch.int32)[:, 0])
        assert out.is_contiguous()
        out.sum().backward()
        if optimizer is not None:
            optimizer.step()
        table.post_parameter_update()
    table.requires_grad_(False)
    assert not table(torch.tensor([1])).requires_grad


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rows_whose_update_comes_late_are_constrained(momentum: float) -> None:
    """post_parameter_update between backward and step (accumulation, Lightning), and momentum.

    Which moves other rows too.
    """
    table, other = (
        Embedding(50, shape=4, constrainer="normalize", seed=1, kernel=g)
        for g in ("sparse", "dense")
    )
    optimizers = [
        torch.optim.SGD(t.parameters(), lr=1.0, momentum=momentum) for t in (table, other)
    ]
    for row in range(0, 8, 2):
        for module, optimizer in zip((table, other), optimizers, strict=True):
            module(torch.tensor([row])).square().sum().backward()
            module.post_parameter_update()
            module(torch.tensor([row + 1])).square().sum().backward()
            optimizer.step()
            module.post_parameter_update()
            optimizer.zero_grad()
    torch.testing.assert_close(table(None), other(None), rtol=1e-5, atol=1e-6)


def test_a_loop_without_an_optimizer_is_constrained_too() -> None:
    table = Embedding(50, shape=4, constrainer="normalize")
    for row in range(3):
        table(torch.tensor([row])).square().sum().backward()
        with torch.no_grad():
            table._embeddings.weight -= 0.2 * table._embeddings.weight.grad.to_dense()
        table.post_parameter_update()
        assert table(None).norm(dim=1).sub(1).abs().max() < 1e-6


def test_a_forgotten_process_group_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(
        UserWarning, match="WORLD_SIZE is 2, but torch.distributed is not initialized"
    ):
        Embedding(3, shape=2)


def test_own_options_are_checked() -> None:
    with pytest.raises(ValueError, match="would update each rank's copy by its own"):
        Embedding(3, shape=2, kernel="fused", sharding="replicated")
    with pytest.raises(ValueError, match=r"table 'people': got kernel='nope', expected one of"):
        Embedding(3, shape=2, name="people", kernel="nope")
    with pytest.raises(TypeError, match=r"table 'people': got kernel=3, expected one of"):
        Embedding(3, shape=2, name="people", kernel=3)
    with pytest.raises(TypeError, match=r"table 'people': got sharding=3, expected Sharding"):
        Embedding(3, shape=2, name="people", sharding=3)
    for key in ("placement", "gradient_reduction", "wire_dtype"):
        with pytest.raises(ValueError, match=f"Sharding.{key}: got 'nope', expected one of"):
            Sharding(**{key: "nope"})
    with pytest.raises(TypeError, match="unexpected keyword argument 'gradient'"):
        Embedding(3, shape=2, gradient="sparse")
    with pytest.raises(RuntimeError, match="not fused"):
        Embedding(3, shape=2).set_learning_rate(0.1)
    assert "3 rows on rank 0 of 1" in repr(Embedding(3, shape=2))


def _states(rank: int, world_size: int, gradient: str) -> dict[str, torch.Tensor]:
    """Save and load this rank's rows; load a whole table; give the whole table back."""
    table = Embedding(501, shape=6, kernel=gradient, constrainer="normalize", seed=1, name="people")
    other = Embedding(501, shape=6, kernel=gradient, constrainer="normalize", seed=2, name="people")
    other.post_parameter_update()
    state = table.state_dict()
    assert ("_embeddings.rows" in state) == (world_size > 1)
    other.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(other(None), table(None))
    other.post_parameter_update()
    assert other.local_rows().norm(dim=1).allclose(torch.tensor(1.0))
    whole = {key: value.clone() for key, value in table.full_state_dict().items()}
    for change in (
        whole,
        {"weight": 2 * whole["_embeddings.weight"]},
        table.full_state_dict("torch"),
    ):
        other.load_state_dict(change)
        (wanted,) = change.values()
        with torch.no_grad():
            assert torch.equal(other(None), wanted)
    if world_size > 1:
        moved = dict(state)
        moved["_embeddings.rows"] = moved["_embeddings.rows"] + 1
        with pytest.raises(
            RuntimeError,
            match=rf"table 'people', rank {rank} of {world_size}: got rows .* shardemb.checkpoint",
        ):
            other.load_state_dict(moved)
        with pytest.raises(
            RuntimeError, match=r"got a whole table of shape \(500, 6\), expected \(501, 6\)"
        ):
            other.load_state_dict({"weight": torch.zeros(500, 6)})
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    assert get_model_state_dict(table).keys() == state.keys()
    return whole


@pytest.mark.parametrize("gradient", ["sparse", "fused"])
def test_state_dicts_of_shards_and_of_whole_tables(
    run_ranks, world_size: int, gradient: str
) -> None:
    for whole in run_ranks(_states, world_size, gradient):
        theirs = torch.nn.Embedding(501, 6)
        theirs.load_state_dict({"weight": whole["_embeddings.weight"]})
        alone = Embedding(501, shape=6)
        alone.load_state_dict(theirs.state_dict())
        assert torch.equal(alone(None), theirs.weight)
        theirs.load_state_dict(alone.full_state_dict("torch"))
    shard = {
        "_embeddings.weight": torch.zeros(251, 6),
        "_embeddings.rows": torch.tensor([0, 251, 501]),
    }
    with pytest.raises(RuntimeError, match=r"got rows 0 to 251 of 501, expected 0 to 501 of 501"):
        alone.load_state_dict(shard)
    with pytest.raises(RuntimeError, match="size mismatch"):
        alone.load_state_dict({"weight": torch.zeros(500, 6)})


def test_fbgemms_rows_are_copied_into_also_when_they_shall_be_assigned() -> None:
    table, other = (
        Embedding(5, shape=6, kernel=Fused(FusedOptimizer("sgd", lr=1.0))) for _ in range(2)
    )
    other.load_state_dict(table.state_dict(), assign=True)
    other(torch.tensor([3])).sum().backward()
    with torch.no_grad():
        assert torch.equal(
            other(None)[3], table(None)[3] - 1
        )  # trained the rows that it shows, and not the other's


@pytest.mark.parametrize("kind", ["dense", "sparse", "fused"])
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda table: pickle.loads(pickle.dumps(table))],
    ids=["deepcopy", "pickle"],
)
def test_copies_train_on_their_own(kind: str, copied) -> None:
    """And as the original would.

    With its optimizer state, if that is the table's, and its constrainer.
    """
    table = Embedding(50, shape=6, kernel=kind, constrainer="normalize", dropout=0.0, seed=1)
    if kind == "fused":
        table.set_learning_rate(0.7)

    def step(module: Embedding) -> None:
        (module(torch.tensor([3, 3, 7])) * torch.arange(6)).square().sum().backward()
        for parameter in module.parameters():
            torch.optim.SGD([parameter], lr=0.1).step()
            parameter.grad = None
        module.post_parameter_update()

    step(table)
    before = table(None).detach().clone()
    other = copied(table)
    step(other)
    assert torch.equal(table(None), before)
    step(table)
    assert torch.equal(table(None), other(None))
    assert not torch.equal(table(None), before)
    assert other(None).norm(dim=1).sub(1).abs().max() < 1e-6
    assert repr(other) == repr(table)


def _pickled(rank: int, world_size: int) -> bytes:
    import torch.distributed as dist

    own = Embedding(
        7, shape=2, seed=0, name="people", sharding=Sharding(process_group=dist.new_group([0, 1]))
    )
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(
            RuntimeError, match="process group of its own, so it cannot be copied or pickled"
        ):
            copied(own)
    table = Embedding(7, shape=2, seed=0, name="people")
    assert torch.equal(copy.deepcopy(table)(None), table(None))
    return pickle.dumps(table)


def test_a_shard_is_not_unpickled_as_if_it_were_the_table(run_ranks) -> None:
    with pytest.raises(
        RuntimeError,
        match=r"table 'people': got the rows of rank 1 of 2, this is rank 0 of 1: .*checkpoint",
    ):
        pickle.loads(run_ranks(_pickled, 2)[1])


def test_all_rows_alias_the_weight_only_without_gradients() -> None:
    """With them.

    Post_parameter_update between forward and backward (Lightning) must not change what was looked
    up.
    """
    dense, sparse = (
        Embedding(5, shape=(2, 3), kernel="dense", constrainer="normalize"),
        Embedding(5, shape=(2, 3)),
    )
    assert sparse(None).data_ptr() != sparse._embeddings.weight.data_ptr()
    out = dense(None)
    before = out.detach().clone()
    loss = out.square().sum()
    dense.post_parameter_update()
    loss.backward()
    assert torch.equal(dense._embeddings.weight.grad, 2 * before.flatten(1))
    with torch.no_grad():
        assert sparse(None).data_ptr() == sparse._embeddings.weight.data_ptr()
    sparse(None).sum().backward()
    assert sparse._embeddings.weight.grad.is_sparse
    fused = Embedding(5, shape=3, kernel="fused")  # padded to 4 columns
    with torch.no_grad():
        assert fused(None).is_contiguous()


def test_a_dense_gradient_of_a_sparse_table_is_not_overlooked() -> None:
    """A loss on the weight itself moves rows that no lookup asked for."""
    table = Embedding(50, shape=4, constrainer="normalize")
    table.post_parameter_update()
    table._embeddings.weight.square().sum().backward()
    torch.optim.SGD(table.parameters(), lr=0.1).step()
    table.post_parameter_update()
    assert table(None).norm(dim=1).sub(1).abs().max() < 1e-6


def test_dtypes_that_cannot_be_trained() -> None:
    with pytest.raises(
        RuntimeError, match=r"table 'people': got dtype torch.int64, expected a floating"
    ):
        Embedding(5, shape=2, dtype=torch.int64, name="people")


@pytest.mark.parametrize("optimizer", ["sgd", "sparse_adam", "rowwise_adagrad"])
def test_rows_of_a_gradient_that_outlives_its_step_are_constrained(optimizer: str) -> None:
    """No zero_grad between steps, a second optimizer, a gradient set by hand: legal torch."""
    table = Embedding(50, shape=4, constrainer="normalize", seed=0)
    table.post_parameter_update()
    outer = OPTIMIZERS[optimizer](table.parameters())
    for ids in ([1, 2], [3, 4], [5]):
        (table(torch.tensor(ids)) * torch.arange(4)).sum().backward()
        outer.step()
        table.post_parameter_update()
        assert table(None).norm(dim=1).sub(1).abs().max() < 1e-6
    second = OPTIMIZERS["sgd"](table.parameters())
    Coordinator(table, [RowWiseAdagrad(table.parameters()), second]).step()
    assert table(None).norm(dim=1).sub(1).abs().max() < 1e-6
    table._embeddings.weight.grad = torch.sparse_coo_tensor([[7, 9]], torch.ones(2, 4), (50, 4))
    second.step()
    table.post_parameter_update()
    assert table(None).norm(dim=1).sub(1).abs().max() < 1e-6


def test_torch_optimizers_that_cannot_say_so_with_a_way_out() -> None:
    sparse, dense = (
        Embedding(5, shape=2, name="people"),
        Embedding(5, shape=2, kernel="dense", name="people"),
    )
    for table, optimizer, message in (
        (
            sparse,
            torch.optim.Adam(sparse.parameters()),
            "Adam takes no sparse gradients: use shardemb.optim.LazyAdam",
        ),
        (
            sparse,
            torch.optim.RMSprop(sparse.parameters()),
            "RMSprop takes no sparse gradients: use one of shardemb.optim",
        ),
        (
            sparse,
            torch.optim.Adagrad(sparse.parameters(), weight_decay=0.1),
            "whose weight_decay is of touched rows",
        ),
        (
            dense,
            torch.optim.SparseAdam(dense.parameters()),
            "use shardemb.optim.LazyAdam, which takes both",
        ),
    ):
        table(torch.tensor([1])).sum().backward()
        with pytest.raises(RuntimeError, match=f"table 'people': .*{message}"):
            optimizer.step()


def _disagree(rank: int, world_size: int, options: list[dict]) -> None:
    with pytest.raises(ValueError, match=r"table 'embedding[-0-9]*': ranks disagree in "):
        Embedding(6, shape=3, seed=0, **options[rank])
    agreed = Embedding(
        6,
        shape=3,
        seed=0,
        constrainer=lambda x: x.clamp(-1, 1),
        normalizer="softmax",
        normalizer_kwargs={"dim": -1},
    )
    assert agreed(torch.tensor([rank])).shape == (1, 3)


@pytest.mark.parametrize(
    "options",
    [
        [{"constrainer": "normalize"}, {}],
        [{"initializer": "zeros"}, {"initializer": "ones"}],
        [
            {"constrainer": "clamp", "constrainer_kwargs": {"max": 1.0}},
            {"constrainer": "clamp", "constrainer_kwargs": {"max": 2.0}},
        ],
        [{"trainable": False}, {}],
        [{"regularizer": "lp"}, {}],
    ],
)
def test_ranks_that_disagree_are_told(rank_pool, options: list[dict]) -> None:
    rank_pool(_disagree, 2, options)


def test_mistakes_that_are_easily_made() -> None:
    with pytest.raises(ValueError, match="the size of a row is embedding_dim= or shape="):
        Embedding(100, 8)
    with pytest.raises(TypeError, match=r"expected a shardemb.FusedOptimizer"):
        Embedding(5, shape=2, kernel=Fused("adagrad"))
    with pytest.raises(TypeError, match=r"use Embedding.from_pretrained"):
        Embedding(5, shape=2, initializer=torch.ones(5, 2))
    with pytest.raises(ValueError, match="expected 'pykeen' or 'torch'"):
        Embedding(5, shape=2).full_state_dict("tensorflow")
    for seed in (-1, 0.5):
        with pytest.raises(ValueError, match=f"table 'people': got seed={seed}"):
            Embedding(5, shape=2, seed=seed, name="people")
    for sizes in ({"max_id": -1, "shape": 2}, {"max_id": 2, "shape": (2, -1)}):
        with pytest.raises(RuntimeError, match="expected no negative size"):
            Embedding(**sizes)


#: of the rows of ids 0, 1, 4097 and 9000: the format of initial tables, which other versions and
#: sizes must give too
SUMS = [3.798292636871338, 2.9902029037475586, 3.568427085876465, 2.947432041168213]


def _initialized(rank: int, world_size: int, gradient: str) -> None:
    options = {"max_id": 9001, "shape": 6, "initializer": "uniform", "seed": 3, "kernel": gradient}
    at_once, later = Embedding(**options, initialize=True), Embedding(**options)
    assert not at_once.local_rows().equal(later.local_rows())
    later.reset_parameters()
    assert at_once.local_rows().equal(later.local_rows())
    with (
        torch.no_grad()
    ):  # rows are where their ids are looked up, and the same on any number of ranks
        assert at_once(at_once.plan.local_ids()).equal(at_once.local_rows())
        ids = torch.tensor([0, 1, 4097, 9000])
        torch.testing.assert_close(at_once(ids).sum(1), torch.tensor(SUMS), rtol=0, atol=1e-6)


def test_the_initializer_may_run_in_the_constructor(run_ranks, world_size: int) -> None:
    for gradient in ("sparse", "fused"):
        run_ranks(_initialized, world_size, gradient)
