"""TorchRec's backend against FBGEMM's, and against one process of torch.nn.Embedding.

On real ranks.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from shardemb import (
    Coordinator,
    Embedding,
    Fused,
    FusedOptimizer,
    RowWiseAdagrad,
    Sharding,
    TorchRec,
    checkpoint,
)
from shardemb.exceptions import IdTypeError

#: what TorchRec says of itself
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")

STEPS = 4
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.3),
    "rowwise_adagrad": lambda p: RowWiseAdagrad(p, lr=0.3),
}
#: rows (fewer than ranks too), columns, optimizer, constrainer
JOBS = [
    (501, 7, "sgd", "normalize"),
    (501, 6, "adagrad", "normalize"),
    (501, 128, "adagrad", None),
    (501, 1, "rowwise_adagrad", None),
    (501, 6, "rowwise_adagrad", "normalize"),
    (2, 7, "rowwise_adagrad", "normalize"),
    (1, 6, "adagrad", None),
]


@contextmanager
def group_of_one(world_size: int) -> Iterator[None]:
    """TorchRec wants a process group also at one rank."""
    if world_size > 1:
        yield
        return
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def make(
    rows: int, dim: int, optimizer: str, backend: str = "torchrec", **kwargs: Any
) -> Embedding:
    rule = FusedOptimizer(optimizer, lr=0.05 if optimizer == "sgd" else 0.3)
    engine = kwargs.pop("torchrec", TorchRec()) if backend == "torchrec" else "fbgemm"
    names = ("process_group", "gradient_reduction", "deduplicate")
    sharding = Sharding(**{name: kwargs.pop(name) for name in names if name in kwargs})
    options = {"seed": 4, "sharding": sharding, **kwargs}
    return Embedding(rows, shape=dim, kernel=Fused(rule, engine), **options)


def ids_of(step: int, rows: int, parts: int, part: int) -> torch.Tensor:
    """Ids with duplicates; sizes differ; the first rank has none in step 1, and no rank in step 2.

    A strided tensor.
    """
    ids = torch.randint(rows, (60, 3), generator=torch.Generator().manual_seed(step))[:, 0]
    ids[:20] = ids[0].clone()
    sizes = [60 // parts] * (parts - 1)
    sizes = [*sizes, 60 - sum(sizes)]
    if step == 1 and parts > 1:
        sizes = [0, sizes[0] + sizes[1], *sizes[2:]]
    return ids[: 0 if step == 2 else 60].split([0] * parts if step == 2 else sizes)[part]


def loss_of(out: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return (out * torch.sin(torch.arange(out.shape[-1]) + ids[..., None] * 0.1 + 1)).square().sum()


def train(table: Embedding, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Train with Coordinator's step; return the whole table, and this rank's optimizer state."""
    coordinator = Coordinator(table)
    for step in range(STEPS):
        ids = ids_of(step, table.max_id, world_size, rank)
        out = table(ids)
        assert out.shape == (len(ids), *table.shape)
        assert out.is_contiguous()
        loss_of(out, ids).backward()
        coordinator.step()
    state = table._stored_rows().get("sum", torch.empty(0)).clone()
    return {"weight": table.full_state_dict("torch")["weight"].clone(), "sum": state}


def oracle(
    rows: int, dim: int, optimizer: str, constrainer: str | None, scale: float
) -> torch.Tensor:
    table = torch.nn.Embedding(
        rows, dim, _weight=make(rows, dim, optimizer, "fbgemm")(None).detach().clone(), sparse=True
    )
    outer = OPTIMIZERS[optimizer](table.parameters())
    for step in range(STEPS):
        ids = ids_of(step, rows, 1, 0)
        outer.zero_grad()
        (loss_of(table(ids), ids) * scale).backward()
        outer.step()
        if constrainer is not None:
            table.weight.data = F.normalize(table.weight.data)
    return table.weight.detach()


def _compare(rank: int, world_size: int) -> list[tuple[dict, dict, dict]]:
    """Train each job with both backends.

    And with both reductions and settings of TorchRec's global.
    """
    from torchrec.distributed.comm_ops import set_gradient_division

    results = []
    with group_of_one(world_size):
        for number, (rows, dim, optimizer, constrainer) in enumerate(JOBS):
            reduction = ("sum", "mean")[number % 2]
            kwargs: dict[str, Any] = {"constrainer": constrainer, "gradient_reduction": reduction}
            theirs = train(make(rows, dim, optimizer, "fbgemm", **kwargs), rank, world_size)
            by_global = []
            for division in (False, True):
                try:
                    set_gradient_division(division)
                    by_global.append(train(make(rows, dim, optimizer, **kwargs), rank, world_size))
                finally:
                    set_gradient_division(True)
            results.append((theirs, *by_global))
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_training_equals_fbgemm_and_one_process(rank_pool, world_size: int) -> None:
    """Whatever TorchRec's global says of gradients.

    Ranks' mean or sum is the table's own affair.
    """
    for results in rank_pool(_compare, world_size):
        for number, (theirs, *ours) in enumerate(results):
            rows, dim, optimizer, constrainer = JOBS[number]
            scale = 1 / world_size if number % 2 else 1.0
            expected = oracle(rows, dim, optimizer, constrainer, scale)
            for got in ours:
                for name, tensor in theirs.items():
                    torch.testing.assert_close(got[name], tensor, rtol=3e-6, atol=1e-6)
                torch.testing.assert_close(got["weight"], expected, rtol=1e-5, atol=1e-5)


def _reads(rank: int, world_size: int) -> None:
    """What trains nothing, and which rows are constrained."""
    from torchrec import KeyedJaggedTensor

    with group_of_one(world_size):
        table = make(501, 6, "rowwise_adagrad", constrainer="normalize")
        whole = table.full_state_dict("torch")["weight"].clone()
        ids = ids_of(0, 501, world_size, rank)
        with torch.no_grad():
            assert torch.equal(table(ids), whole[ids])
            assert torch.equal(table(ids.int()), whole[ids])
        with torch.inference_mode():
            assert torch.equal(table(ids), whole[ids])
            assert torch.equal(table(None), whole)
        assert torch.equal(table(ids.reshape(-1, 1)), whole[ids][:, None])
        frozen = make(501, 6, "adagrad", trainable=False)
        assert not frozen(ids).requires_grad
        frozen.requires_grad_(True)
        assert frozen(ids).requires_grad
        with pytest.raises(
            RuntimeError, match=r"table 'embedding[-0-9]*': a second lookup before the backward"
        ):
            _twice(make(501, 6, "adagrad", gradient_reduction="sum"), ids)
        _twice(make(501, 6, "sgd"), ids)

        table.post_parameter_update()  # takes all rows once
        shard = table._embeddings
        seen: list[int] = []
        constrainer = table.constrainer
        table.constrainer = lambda x: (seen.append(len(x)), constrainer(x))[1]
        planted = 7 if shard.plan.first == 0 else 0
        with torch.no_grad():
            shard.weight[planted] = 9.0  # changed behind its back, and not looked at
        table(torch.tensor([499]))  # a lookup without backward changes nothing
        table(torch.tensor([3, 500, 3])).sin().sum().backward()
        table.post_parameter_update()
        owned = [row for row in (3, 500) if 0 <= row - shard.plan.first < shard.plan.num_local]
        assert sum(seen) == len(owned)
        assert torch.all(shard.weight[planted] == 9)
        for row in owned:
            assert abs(shard.weight[row - shard.plan.first].norm() - 1) < 1e-6

        table.set_learning_rate(0.0)
        before = shard.weight.clone()
        table(ids).sum().backward()
        assert torch.equal(shard.weight, before)
        half = make(7, 6, "sgd", dtype=torch.float16, gradient_reduction="sum", initializer="zeros")
        half.reset_parameters()
        out = half(torch.tensor([1, 5, 1]))
        assert out.dtype == torch.float16
        out.sum().backward()
        expected = torch.zeros(7, 6)
        expected[1], expected[5] = -0.1 * world_size, -0.05 * world_size
        assert torch.allclose(half.full_state_dict("torch")["weight"].float(), expected, atol=1e-3)
        few = make(1, 8, "sgd")  # one rank's shard is padding, which TorchRec itself looks up too
        features = KeyedJaggedTensor(
            keys=["ids"], values=torch.zeros(3, dtype=torch.int64), lengths=torch.tensor([3])
        )
        theirs = few.torchrec_table.torchrec_module(features)["ids"].values()
        assert torch.equal(theirs, few(torch.zeros(3, dtype=torch.int64)))
        assert make(5, 0, "sgd")(ids % 5).shape == (len(ids), 0)

        assert table.torchrec_table.torchrec_plan.sharding_type == "row_wise"
        (key,) = table.torchrec_table.torchrec_module.state_dict()
        assert key == f"embeddings.{table.name}.weight"
        assert set(table.state_dict()) == {
            "_embeddings.weight",
            *["_embeddings.rows"] * (world_size > 1),
        }
        assert sum(parameter.numel() for parameter in table.parameters()) == 0
        with pytest.raises(
            RuntimeError,
            match=r"table 'embedding.*': .*cannot be copied or pickled: use shardemb.checkpoint",
        ):
            copy.deepcopy(table)
        assert table.torchrec_table is table._embeddings
        assert make(5, 4, "sgd", "fbgemm").torchrec_table is None


def _twice(table: Embedding, ids: torch.Tensor) -> None:
    (table(ids).sum() + table(ids).sum()).backward()


@pytest.mark.parametrize("world_size", [1, 2])
def test_reads_train_nothing_and_touched_rows_are_constrained(rank_pool, world_size: int) -> None:
    rank_pool(_reads, world_size)


def _bad_ids(rank: int, world_size: int) -> list[str]:
    told = []
    table = make(501, 6, "sgd", name="people")
    before = table._embeddings.weight.clone()
    cases: list[tuple[Any, type[Exception]]] = [
        (torch.tensor([3, 501]), IndexError),
        (torch.tensor([-1]), IndexError),
        (torch.tensor([0.5]), IdTypeError),
        ([1, 2], AttributeError),
    ]
    for bad, error in cases:
        with pytest.raises(error) as caught:
            table._embeddings.send_ids(bad if rank == world_size - 1 else torch.tensor([1]))
        told.append(str(caught.value))
    assert torch.equal(table._embeddings.weight, before)
    table(torch.tensor([rank])).sum().backward()  # it goes on
    return told


def test_bad_ids_raise_alike_on_all_ranks(rank_pool) -> None:
    first, *others = rank_pool(_bad_ids, 3)
    assert all(other == first for other in others)
    assert (
        first[0]
        == "table 'people', rank 2 of 3: index out of range: got id 501 among 2 ids, expected 0 <="
        " id < 501"
    )
    assert "got id -1" in first[1]
    assert "torch.float32" in first[2]


def _prefetch(rank: int, world_size: int) -> None:
    """Prefetched ids, each sent once or as often as they come.

    Train as the default backend does.
    """
    with group_of_one(world_size):
        for deduplicate in (True, False):
            tables = [
                make(501, 6, "sgd", backend, deduplicate=deduplicate)
                for backend in ("torchrec", "fbgemm")
            ]
            batches = [torch.arange(7 + rank).repeat(3) + step for step in range(3)]
            waiting = tables[0].prefetch(batches[0])
            for step, batch in enumerate(batches):
                rows = [tables[0](waiting), tables[1](batch)]
                torch.testing.assert_close(*rows)
                if step + 1 < len(batches):
                    waiting = tables[0].prefetch(batches[step + 1])
                for out in rows:
                    out.cos().sum().backward()
            torch.testing.assert_close(*(table.local_rows() for table in tables))


@pytest.mark.parametrize("world_size", [1, 3])
def test_prefetched_ids(rank_pool, world_size: int) -> None:
    rank_pool(_prefetch, world_size)


def _own_groups(rank: int, world_size: int) -> torch.Tensor:
    """Rows on ranks 1 and 2 of three."""
    group = dist.new_group([1, 2])
    if rank == 0:
        return torch.empty(0)
    table = make(501, 6, "adagrad", process_group=group)
    other = make(501, 6, "adagrad", "fbgemm", process_group=group)
    for each in (table, other):
        for step in range(STEPS):
            ids = ids_of(step, 501, 2, rank - 1)
            loss_of(each(ids), ids).backward()
            each.post_parameter_update()
    with pytest.raises(
        ValueError,
        match=(
            r"table 'embedding.*': got sharding_group_size=1 over 2 ranks of a process group of"
            r" its own"
        ),
    ):
        make(5, 4, "sgd", process_group=group, torchrec=TorchRec(sharding_group_size=1))
    return table(None).detach() - other(None).detach()


def test_a_process_group_of_its_own(run_ranks) -> None:
    for difference in run_ranks(_own_groups, 3):
        assert difference.abs().sum() < 1e-4


def _two_dimensional(rank: int, world_size: int, optimizer: str, folder: Path) -> dict[str, Any]:
    """Rows over two ranks each, two replicas: ranks 0 and 2, and 1 and 3."""
    options = TorchRec(sharding_group_size=2)
    table = make(
        501, 6, optimizer, torchrec=options, constrainer="normalize", gradient_reduction="sum"
    )
    assert table.plan.world_size == 2
    assert table.plan.rank == rank // 2
    timeout = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout
    assert (
        table._groups.shard._get_backend(torch.device("cpu")).options._timeout == timeout
    )  # not 30 minutes
    with pytest.raises(IndexError, match=r"rank 3 of 4: index out of range: got id 501"):
        table(torch.tensor([501 if rank == 3 else 0]))
    result = train(table, rank, world_size)
    path = checkpoint.save(folder, 1, table)
    with pytest.raises(ValueError, match="sharding_group_size=3 over 4 ranks of the default group"):
        make(5, 4, "sgd", torchrec=TorchRec(sharding_group_size=3))
    again = make(501, 6, optimizer, "fbgemm", seed=9)
    checkpoint.load(path, again)
    replicated = make(501, 6, optimizer, torchrec=options, gradient_reduction="sum", seed=8)
    checkpoint.load(path, replicated)  # each rank its rows, those that another one has written too
    assert replicated.local_rows().equal(table.local_rows())
    before = table.local_rows().clone()
    table._embeddings.synchronize_replicas()
    moved = int((table.local_rows() != before).sum())
    return {**result, "loaded": again.full_state_dict("torch")["weight"], "rest": moved}


def replicas(optimizer: str) -> torch.Tensor:
    """Two replicas in one process, that train on the ids of ranks 0 and 2, and 1 and 3.

    And are averaged each step.
    """
    start = make(501, 6, optimizer, "fbgemm")(None).detach()
    tables = [torch.nn.Embedding(501, 6, _weight=start.clone(), sparse=True) for _ in range(2)]
    outer = [OPTIMIZERS[optimizer](table.parameters()) for table in tables]
    for step in range(STEPS):
        for replica, (table, each) in enumerate(zip(tables, outer, strict=True)):
            each.zero_grad()
            ids = torch.cat([ids_of(step, 501, 4, rank) for rank in (replica, replica + 2)])
            (loss_of(table(ids), ids) * 2).backward()  # the mean of two sums over half of the ranks
            each.step()
        states = [list(each.state.values()) for each in outer]
        shared = (
            [[state[0]["sum"] for state in states]] if optimizer != "sgd" and all(states) else []
        )
        for group in ([table.weight.data for table in tables], *shared):
            mean = sum(group) / 2
            for tensor in group:
                tensor.copy_(mean)
        for table in tables:
            table.weight.data = F.normalize(table.weight.data)
    return tables[0].weight.detach()


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad"])
def test_replicas_are_averaged(rank_pool, tmp_path: Path, optimizer: str) -> None:
    """With SGD that is one table over all ranks."""
    expected = (
        oracle(501, 6, optimizer, "normalize", 1.0) if optimizer == "sgd" else replicas(optimizer)
    )
    for got in rank_pool(_two_dimensional, 4, optimizer, tmp_path):
        torch.testing.assert_close(got["weight"], expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(got["loaded"], got["weight"])
        assert got["rest"] == 0  # nothing moved since the last step


def _save(
    rank: int, world_size: int, folder: Path, optimizer: str, backend: str
) -> dict[str, torch.Tensor]:
    table = make(501, 6, optimizer, backend)
    train(table, rank, world_size)
    checkpoint.save(folder, 1, table)
    return table._stored_rows()


def _load(
    rank: int, world_size: int, folder: Path, optimizer: str, backend: str
) -> dict[str, torch.Tensor]:
    table = make(501, 6, optimizer, backend, seed=8)
    checkpoint.load(checkpoint.checkpoints(folder)[-1], table)
    return {key: value.clone() for key, value in table._stored_rows().items()}


@pytest.mark.parametrize(("origin", "to"), [("torchrec", "fbgemm"), ("fbgemm", "torchrec")])
def test_checkpoints_cross_backends_and_numbers_of_ranks(
    rank_pool, tmp_path: Path, origin: str, to: str
) -> None:
    saved = rank_pool(_save, 2, tmp_path, "adagrad", origin)
    loaded = rank_pool(_load, 3, tmp_path, "adagrad", to)
    for key in ("weight", "sum"):
        assert torch.equal(
            torch.cat([part[key] for part in saved]), torch.cat([part[key] for part in loaded])
        )
        assert saved[0][key].abs().sum() > 0


def _no_plan(*args: Any) -> None:
    from torchrec.distributed.planner.types import PlannerError

    raise PlannerError("nothing fits")


def _refused(rank: int, world_size: int) -> None:
    import resource

    need = 251 * (8 * 4 + 4)
    text = (
        rf"table 'people', rank {rank} of 2: TorchRec's planner needs {need:,} bytes a rank for 251"
        r" rows x 8 columns and their "
        rf"optimizer state, ([\d,]+) are allowed: use more ranks,"
        rf" .*compute_kernel='fused_uvm_caching' on CUDA"
    )
    make(501, 6, "rowwise_adagrad", torchrec=TorchRec(memory_bytes=need + 4096))
    for allowed in (need - 1, 100):
        with pytest.raises(MemoryError, match=text):
            make(501, 6, "rowwise_adagrad", name="people", torchrec=TorchRec(memory_bytes=allowed))
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patch:  # ranks where different amounts are free refuse together
        patch.setattr(
            "shardemb.sharding.torchrec_table.free_bytes",
            lambda device: need - 1 if rank == 1 else 2**40,
        )
        with pytest.raises(MemoryError, match=text):
            make(501, 6, "rowwise_adagrad", name="people")
    with monkeypatch.context() as patch:  # the planner's own refusal
        patch.setattr("torchrec.distributed.planner.EmbeddingShardingPlanner.plan", _no_plan)
        with pytest.raises(MemoryError, match=text):
            make(501, 6, "rowwise_adagrad", name="people")
    with pytest.raises(MemoryError, match=r"table 'embedding[-0-9]*', rank"):
        make(10**12, 128, "sgd")
    for kernel in ("fused_uvm", "fused_uvm_caching"):
        with pytest.raises(
            ValueError, match=f"got compute_kernel='{kernel}' on cpu.*use a CUDA device"
        ):
            make(5, 4, "sgd", torchrec=TorchRec(compute_kernel=kernel))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    make(2 * 10**6, 32, "rowwise_adagrad")  # 128 MB of rows on each rank, 256 MB unsharded
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 1.5 * 10**6 * (32 * 4 + 4), f"{grown:,} bytes"


def test_what_does_not_fit_is_refused_before_allocation(run_ranks) -> None:
    run_ranks(_refused, 2)


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        (
            {"kernel": Fused(engine=TorchRec()), "sharding": "replicated"},
            ValueError,
            "placement='replicated' with a fused kernel would update",
        ),
        (
            {"kernel": Fused(engine=TorchRec())},
            RuntimeError,
            "needs a process group, got none: call torch.distributed.init_process_group",
        ),
        (
            {"kernel": Fused(engine=TorchRec()), "sharding": Sharding(wire_dtype=torch.float16)},
            ValueError,
            "got wire_dtype=torch.float16 with TorchRec",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    kwargs: dict, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=f"table 'people': .*{text}|table 'people': {text}"):
        Embedding(10, shape=4, name="people", **kwargs)


def test_only_an_engine_is_an_engine() -> None:
    for engine in ("nope", {}, "torchrec"):
        with pytest.raises(TypeError, match=r"expected 'fbgemm' or TorchRec\(...\)"):
            Fused(engine=engine)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"compute_kernel": "dense"},
        {"cache_load_factor": 0.5},
        {"compute_kernel": "fused_uvm_caching", "cache_load_factor": 1.5},
        {"memory_bytes": 0},
        {"sharding_group_size": 0},
    ],
)
def test_nonsense_options_are_refused(kwargs: dict) -> None:
    name, value = list(kwargs.items())[-1]
    with pytest.raises(ValueError, match=f"TorchRec.{name}: got {value!r}"):
        TorchRec(**kwargs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernel", ["fused", "fused_uvm", "fused_uvm_caching"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_kernels_on_cuda(kernel: str, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of a tenth of the rows gives what one without a cache gives, constrained.

    Read and written in between.
    """
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        load = 0.1 if kernel == "fused_uvm_caching" else None
        options = TorchRec(compute_kernel=kernel, cache_load_factor=load)
        table = make(501, 6, optimizer, device="cuda", constrainer="normalize", torchrec=options)
        for step in range(STEPS):
            ids = ids_of(step, 501, 1, 0)
            out = table(ids.cuda())
            loss_of(out.cpu(), ids).backward()
            with torch.no_grad():
                assert torch.equal(table(ids.cuda()), table._embeddings.weight[ids.cuda()])
            table.post_parameter_update()
        expected = oracle(501, 6, optimizer, "normalize", 1.0)
        torch.testing.assert_close(
            table.state_dict()["_embeddings.weight"].cpu(), expected, rtol=1e-5, atol=1e-5
        )
    finally:
        dist.destroy_process_group()
