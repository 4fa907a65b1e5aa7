"""People's own training loops: right, or an error that names the way out.

What one rank does alone is in comm/test_watchdog.py.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import shardemb
from shardemb import Coordinator, Embedding, Fused, FusedOptimizer
from shardemb.exceptions import UsageError


def _whole(table: Embedding) -> torch.Tensor:
    return table.full_state_dict("torch")["weight"].clone()


def _head(seed: int = 5) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(4, 1)


def _model(**options: Any) -> nn.ModuleDict:
    table = Embedding(13, shape=4, seed=0, initialize=True, name="t", **options)
    small = Embedding(3, shape=4, seed=3, initialize=True, name="r", sharding="replicated")
    return nn.ModuleDict({"t": table, "r": small, "h": _head()})


def _loss(model: nn.ModuleDict, rank: int, scale: float = 1.0) -> torch.Tensor:
    x = model["t"](torch.arange(4) + 3 * rank) * model["r"](torch.tensor([rank % 3]))
    return model["h"](x).sum() * scale * (1 + rank)


# --------------------
# more than the coordinator knows


def _optimizer_over_more(rank: int, world_size: int) -> None:
    model = _model()
    optimizer = torch.optim.SGD([*model["t"].parameters(), *model["h"].parameters()], lr=0.1)
    with pytest.raises(ValueError, match=r"SGD has 2 parameter.*not in its model, of shapes"):
        Coordinator(model["t"], optimizer)
    coordinator = Coordinator(model, optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    _loss(model, rank).backward()
    with pytest.raises(ValueError, match=r"SGD has 1 parameter.*of shapes \(2,\)"):
        coordinator.step()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_optimizer_over_more_than_the_model(run_ranks, ranks: int) -> None:
    run_ranks(_optimizer_over_more, ranks)


def _changed_later(rank: int, world_size: int, what: str) -> list[torch.Tensor]:
    """Two steps before and two after a change; return what all ranks hold whole."""
    model = _model()
    if what in ("h", "r"):
        model[what].requires_grad_(False)
    groups = [p for name in "tr" for p in model[name].parameters()]
    optimizer = torch.optim.SGD(groups if what == "group" else model.parameters(), lr=0.5)
    coordinator = Coordinator(model, optimizer)
    for step in range(4):
        if step == 2 and what in ("h", "r"):
            model[what].requires_grad_(True)
        if step == 2 and what == "group":
            optimizer.add_param_group({"params": model["h"].parameters()})
        _loss(model, rank, 0.1).backward()
        coordinator.step()
    return [*model["h"].parameters(), *model["r"].parameters(), _whole(model["t"])]


def _oracle(world_size: int, what: str) -> list[torch.Tensor]:
    """The same with torch alone, over the ranks' mean loss."""
    first = _model()
    model = nn.ModuleDict({"h": _head()})
    for name in "tr":
        model[name] = nn.Embedding.from_pretrained(_whole(first[name]), freeze=False)
    if what in ("h", "r"):
        model[what].requires_grad_(False)
    groups = [p for name in "tr" for p in model[name].parameters()]
    optimizer = torch.optim.SGD(groups if what == "group" else model.parameters(), lr=0.5)
    for step in range(4):
        if step == 2 and what in ("h", "r"):
            model[what].requires_grad_(True)
        if step == 2 and what == "group":
            optimizer.add_param_group({"params": model["h"].parameters()})
        model.zero_grad()
        sum(_loss(model, rank, 0.1) / world_size for rank in range(world_size)).backward()
        optimizer.step()
    return [*model["h"].parameters(), *model["r"].parameters(), *model["t"].parameters()]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("what", ["h", "r", "group"])
def test_what_is_unfrozen_later_is_reduced(run_ranks, what: str, ranks: int) -> None:
    expected = _oracle(ranks, what)
    for got in run_ranks(_changed_later, ranks, what):
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def _added_later(rank: int, world_size: int, what: str) -> None:
    model = _model()
    coordinator = Coordinator(model, torch.optim.SGD(model.parameters(), lr=0.1))
    added = Embedding(3, shape=4, name="new") if what == "table" else nn.Linear(4, 1)
    model["new"] = added
    _loss(model, rank).backward()
    with pytest.raises(UsageError, match=r"other parameters.*: new\..*Coordinator\(model, opt"):
        coordinator.step()


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("what", ["layer", "table"])
def test_what_is_added_later_is_refused(run_ranks, what: str, ranks: int) -> None:
    run_ranks(_added_later, ranks, what)


# --------------------
# a table made before its process group


def _made_before(rank: int, world_size: int, folder: str, kernel: str) -> None:
    dist.destroy_process_group()
    model = _model(kernel=kernel)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    table, ids = model["t"], torch.arange(4)
    optimizers = [] if kernel == "fused" else torch.optim.SGD(model.parameters(), lr=0.1)
    uses: dict[str, Callable[[], Any]] = {
        "lookup": lambda: table(ids),
        "all rows": lambda: table(None),
        "without gradient": lambda: torch.no_grad()(table)(None),
        "prefetch": lambda: table.prefetch(ids),
        "whole state": table.full_state_dict,
        "coordinator": lambda: Coordinator(model, optimizers),
        "save": lambda: shardemb.checkpoint.save(folder, 1, model),
        "load": lambda: shardemb.checkpoint.load(folder, model),
        "clip": lambda: shardemb.clip_grad_norm_(model, 1.0),
        "reset": table.reset_parameters,
    }
    for name, use in uses.items():
        with pytest.raises(RuntimeError) as caught:
            use()
        text = f"table 't': it was made for 1 rank(s), its process group has {world_size} now"
        assert text in str(caught.value), name


@pytest.mark.parametrize("kernel", ["sparse", "dense", "fused"])
def test_a_table_made_before_its_process_group(run_ranks, tmp_path, kernel: str) -> None:
    run_ranks(_made_before, 2, str(tmp_path), kernel)


# --------------------
# wrappers


class _Wrapped(nn.Module):
    def __init__(self, kernel: Any, rows: int = 13) -> None:
        super().__init__()
        self.table = Embedding(rows, shape=4, seed=0, initialize=True, kernel=kernel)
        self.head = _head()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids)).sum()


def _in_ddp(rank: int, world_size: int, kernel: str, prepared: bool) -> list[torch.Tensor]:
    options: Any = Fused(FusedOptimizer("sgd", lr=0.5)) if kernel == "fused" else kernel
    model = _Wrapped(options, 13 if prepared else 12)  # torch itself refuses shards of other sizes
    before = _whole(model.table)
    if prepared:
        assert shardemb.exclude_from_ddp(model) is model
    wrapped = DistributedDataParallel(model)
    if not prepared:
        with pytest.raises(UsageError, match=r"exclude_from_ddp\(model\) before it is wrapped"):
            wrapped(torch.arange(3))
        return []
    with pytest.raises(TypeError, match="before DistributedDataParallel wraps it"):
        shardemb.exclude_from_ddp(wrapped)
    assert torch.equal(_whole(model.table), before)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.5)
    for step in range(3):
        optimizer.zero_grad()
        (wrapped(torch.arange(3) + 2 * rank + step) * (1 + rank)).backward()
        optimizer.step()
        model.table.post_parameter_update()
    return [_whole(model.table), *model.head.parameters()]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("kernel", ["sparse", "dense", "fused"])
def test_tables_in_ddp(run_ranks, kernel: str, ranks: int) -> None:
    run_ranks(_in_ddp, ranks, kernel, False)
    table = nn.Embedding.from_pretrained(_whole(_Wrapped("sparse").table), freeze=False)
    head = _head()
    optimizer = torch.optim.SGD([*table.parameters(), *head.parameters()], lr=0.5)
    for step in range(3):
        optimizer.zero_grad()
        losses = [
            head(table(torch.arange(3) + 2 * rank + step)).sum() * (1 + rank) / ranks
            for rank in range(ranks)
        ]
        sum(losses).backward()
        optimizer.step()
    for got in run_ranks(_in_ddp, ranks, kernel, True):
        expected = [*table.parameters(), *head.parameters()]
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def _in_fsdp(rank: int, world_size: int, kernel: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = _Wrapped(kernel)
    before = _whole(model.table)
    mesh = init_device_mesh("cpu", (world_size,))
    ignored = set(model.table.parameters())
    wrapped = fully_shard(model, mesh=mesh, ignored_params=ignored)
    assert torch.equal(_whole(model.table), before)
    wrapped(torch.arange(3)).backward()
    for rows in (12, 13):
        with pytest.raises(UsageError, match=r"no longer the Parameter.*ignored_params"):
            fully_shard(_Wrapped(kernel, rows), mesh=mesh)


@pytest.mark.parametrize("kernel", ["sparse", "dense"])
def test_tables_in_fsdp(run_ranks, kernel: str) -> None:
    run_ranks(_in_fsdp, 2, kernel)


# --------------------
# names


def _default_names(rank: int, world_size: int) -> list[str]:
    tables = [Embedding(9, shape=2) for _ in range(3)]
    for number in range(3) if rank else reversed(range(3)):
        if number == 1:
            tables[number](torch.arange(3))
    with pytest.raises(ValueError, match=r"lookup 1 of table 'embedding(-3)?'"):
        tables[2 if rank else 0](torch.arange(3))
    return [table.name for table in tables]


@pytest.mark.parametrize("ranks", [2, 3])
def test_default_names_differ(run_ranks, ranks: int) -> None:
    names = ["embedding", "embedding-2", "embedding-3"]
    assert run_ranks(_default_names, ranks) == [names] * ranks
    assert Embedding(9, shape=2).name == Embedding(9, shape=2).name == "embedding"


def _one_name(rank: int, world_size: int) -> None:
    def make(seed: int) -> Embedding:
        return Embedding(9, shape=2, seed=seed, initialize=True, name="same")

    first, second, ids = make(0), make(1), torch.arange(4)
    model = nn.ModuleList([first, second])
    with pytest.raises(ValueError, match="several tables named same"):
        Coordinator(model, torch.optim.SGD(model.parameters(), lr=0.1))
    loss = first(ids).sum()
    with pytest.raises(ValueError, match=r"another table of this name.*awaits its backward"):
        second(ids)
    loss.backward()
    # one after the other, as a model and the one that loads its checkpoint
    second(ids).sum().backward()
    with torch.no_grad():
        rows = _whole(second)[ids]
        assert torch.equal(second(ids), rows)
        with pytest.raises(
            ValueError, match=r"table 'same': ids; .*'same' \(number 2 of this name\)"
        ):
            (second if rank else first)(ids)


@pytest.mark.parametrize("ranks", [2, 3])
def test_two_tables_of_one_name(run_ranks, ranks: int) -> None:
    run_ranks(_one_name, ranks)


# --------------------
# frozen means frozen


def _freeze(model: nn.Module, how: str) -> None:
    if how == "table.requires_grad_":
        model["t"].requires_grad_(False)
    elif how == "model.requires_grad_":
        model.requires_grad_(False)
    elif how == "a loop over parameters":
        for parameter in model.parameters():
            parameter.requires_grad = False
    elif how == "eval":
        model.eval()


FREEZING = ["table.requires_grad_", "model.requires_grad_", "a loop over parameters", "eval"]


def _frozen(rank: int, world_size: int, how: str, kernel: Any) -> tuple[bool, bool]:
    if world_size == 1:
        os.environ.update(MASTER_ADDR="127.0.0.1")
    model = nn.ModuleDict({"t": Embedding(13, shape=4, seed=0, kernel=kernel), "h": _head()})
    table = model["t"]
    before = _whole(table)
    _freeze(model, how)
    _head(1)(table(torch.arange(4))).sum().backward()
    frozen = torch.equal(_whole(table), before)
    model.train()
    model.requires_grad_(True)
    _head(1)(table(torch.arange(4))).sum().backward()
    return frozen, torch.equal(_whole(table), before)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("how", FREEZING)
def test_a_frozen_fused_table_stays(run_ranks, how: str, ranks: int) -> None:
    kernel = Fused(FusedOptimizer("adagrad", lr=0.5))
    assert run_ranks(_frozen, ranks, how, kernel) == [(True, False)] * ranks


@pytest.mark.parametrize("how", FREEZING)
def test_a_frozen_torchrec_table_stays(run_ranks, how: str) -> None:
    kernel = Fused(FusedOptimizer("adagrad", lr=0.5), engine=shardemb.TorchRec())
    assert run_ranks(_frozen, 2, how, kernel) == [(True, False)] * 2


def test_the_state_of_a_fused_table_is_its_rows() -> None:
    table = Embedding(13, shape=4, kernel="fused", trainable=False)
    assert list(table.state_dict()) == ["_embeddings.weight"]
    assert sum(parameter.numel() for parameter in table.parameters()) == 0
    other = Embedding(13, shape=4, kernel="fused")
    other.load_state_dict(table.state_dict())
    assert torch.equal(_whole(other), _whole(table))
    assert not any(parameter.requires_grad for parameter in table.parameters())
    assert all(parameter.requires_grad for parameter in other.parameters())


def _updated_twice(rank: int, world_size: int, name: str) -> None:
    optimizer = FusedOptimizer(name, lr=0.5)
    table = Embedding(13, shape=4, seed=0, initialize=True, kernel=Fused(optimizer), name="t")
    loss = table(torch.arange(4)).sum()
    loss.backward(retain_graph=True)
    rows = _whole(table)
    if name == "sgd":  # linear in the gradient: twice is twice
        loss.backward()
        table(torch.arange(4)).sum().backward()
        return
    with pytest.raises(UsageError, match="a second backward of one lookup would make two"):
        loss.backward()
    with pytest.raises(UsageError, match=r"a second backward in one step.*Coordinator.step\(\)"):
        table(torch.arange(4))
    assert torch.equal(_whole(table), rows)
    with torch.no_grad():
        table(torch.arange(4))
    table.post_parameter_update()
    table(torch.arange(4)).sum().backward()
    coordinator = Coordinator(table)
    coordinator.step()
    for _ in range(3):
        table(torch.arange(4)).sum().backward()
        coordinator.step()
    assert not torch.equal(_whole(table), rows)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["sgd", "adagrad", "rowwise_adagrad"])
def test_two_fused_updates_in_a_step_are_refused(run_ranks, name: str, ranks: int) -> None:
    run_ranks(_updated_twice, ranks, name)


# --------------------
# mixed precision, clipping, buffers, averages, compilation


def _overflow(rank: int, world_size: int, how: str, kernel: str) -> tuple[list[float], bool]:
    """Each rank trains its own rows; the loss overflows on rank 0 in the second of four steps."""
    sharding = shardemb.Sharding(gradient_reduction="sum")
    table = Embedding(12, shape=4, seed=0, initialize=True, kernel=kernel, sharding=sharding)
    model = nn.ModuleDict({"t": table, "h": _head()})
    before, optimizer = _whole(table), torch.optim.SGD(model.parameters(), lr=1.0)
    coordinator = Coordinator(model, optimizer)
    scaler = shardemb.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    if how == "torch":
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scales, ids = [], table.plan.local_ids()
    for step in range(4):
        loss = table(ids).sum()
        if step == 1 and rank == 0:
            loss = loss * 1e38
        scaler.scale(loss).backward()
        if how == "coordinator":
            coordinator.step(scaler)
        elif how == "torch":
            with pytest.raises(UsageError, match=r"use shardemb\.GradScaler"):
                scaler.step(optimizer)
            with pytest.raises(ValueError, match=r"expected shardemb\.GradScaler"):
                coordinator.step(scaler)
            return [], True
        else:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return scales, torch.allclose(before - _whole(table), torch.tensor(3.0))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("kernel", ["sparse", "dense"])
@pytest.mark.parametrize("how", ["coordinator", "loop"])
def test_an_overflow_on_one_rank_is_seen_by_all(
    run_ranks, how: str, kernel: str, ranks: int
) -> None:
    for scales, moved in run_ranks(_overflow, ranks, how, kernel):
        assert scales == [1024.0, 512.0, 512.0, 1024.0]
        assert moved


@pytest.mark.parametrize("kernel", ["sparse", "dense"])
def test_a_scaler_that_sees_one_rank_is_refused(run_ranks, kernel: str) -> None:
    run_ranks(_overflow, 2, "torch", kernel)


def _scaled_fused(rank: int, world_size: int) -> None:
    table = Embedding(12, shape=4, kernel="fused")
    coordinator, scaler = Coordinator(table), shardemb.GradScaler("cpu")
    with pytest.raises(ValueError, match=r"fused tables \['embedding'\]"):
        coordinator.step(scaler)


def test_a_scaler_with_a_fused_table_is_refused(run_ranks) -> None:
    run_ranks(_scaled_fused, 1)


def _clipped_by_torch(rank: int, world_size: int, kernel: str) -> None:
    table = Embedding(13, shape=4, seed=0, initialize=True, kernel=kernel)
    before = _whole(table)
    optimizer = torch.optim.SGD(table.parameters(), lr=1.0)
    (table(torch.arange(13)) * (1 + torch.arange(13.0))[:, None]).sum().backward()
    if world_size > 1:
        with pytest.raises((RuntimeError, NotImplementedError)) as caught:
            nn.utils.clip_grad_norm_(table.parameters(), 1.0)
        assert kernel == "sparse" or "use shardemb.clip_grad_norm_" in str(caught.value)
    norm = shardemb.clip_grad_norm_(table, 1.0)
    if kernel == "dense":
        nn.utils.clip_grad_value_(table.parameters(), 10.0)  # by element, so right on a shard
    optimizer.step()
    expected = (1 + torch.arange(13.0)).square().sum().mul(4).sqrt()
    torch.testing.assert_close(norm.float(), expected)
    torch.testing.assert_close((before - _whole(table)).norm(), torch.tensor(1.0))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("kernel", ["sparse", "dense"])
def test_torchs_clipping_is_refused(run_ranks, kernel: str, ranks: int) -> None:
    run_ranks(_clipped_by_torch, ranks, kernel)


def _batch_norm(rank: int, world_size: int) -> list[torch.Tensor]:
    model = nn.ModuleDict({"t": Embedding(13, shape=4, seed=0), "n": nn.BatchNorm1d(4)})
    model.register_buffer("constant", torch.ones(3))
    coordinator = Coordinator(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(3):
        model["n"](model["t"](torch.arange(4) + 3 * rank)).square().mean().backward()
        coordinator.step()
    return [buffer.clone() for buffer in model["n"].buffers()]


@pytest.mark.parametrize("ranks", [2, 3])
def test_buffers_follow_rank_0(run_ranks, ranks: int) -> None:
    first, *others = run_ranks(_batch_norm, ranks)
    assert not torch.equal(first[0], torch.zeros(4))
    for other in others:
        assert all(map(torch.equal, first, other))


def _averaged(rank: int, world_size: int, kernel: str, use_buffers: bool) -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = nn.ModuleDict({"t": Embedding(13, shape=4, seed=0, kernel=kernel, name="t")})
    coordinator = Coordinator(model, torch.optim.SGD(model.parameters(), lr=0.3))
    average = get_ema_multi_avg_fn(0.9)
    ema = AveragedModel(model, multi_avg_fn=average, use_buffers=use_buffers)
    expected = None
    for step in range(4):
        model["t"](torch.arange(4) + 3 * rank + step).sum().backward()
        coordinator.step()
        ema.update_parameters(model)
        rows = _whole(model["t"])
        expected = rows if expected is None else 0.9 * expected + 0.1 * rows
    torch.testing.assert_close(_whole(ema.module["t"]), expected)
    ids = torch.arange(13)
    torch.testing.assert_close(ema.module["t"](ids).detach(), expected)
    other = nn.ModuleDict({"t": Embedding(13, shape=4, seed=5, kernel=kernel, name="u")})
    other.load_state_dict(ema.module.state_dict())
    torch.testing.assert_close(_whole(other["t"]), expected)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("kernel", ["sparse", "dense"])
def test_moving_averages(run_ranks, kernel: str, use_buffers: bool, ranks: int) -> None:
    run_ranks(_averaged, ranks, kernel, use_buffers)


def _compiled(rank: int, world_size: int, backend: str) -> tuple[int, torch.Tensor]:
    from torch._dynamo.utils import counters

    model = _Wrapped("sparse")
    coordinator = Coordinator(model, torch.optim.SGD(model.parameters(), lr=0.1))
    run: Any = model if backend == "none" else torch.compile(model, backend=backend)
    for step in range(6):
        run(torch.arange(5) + rank + step).backward()
        coordinator.step()
    return counters["stats"]["unique_graphs"], _whole(model.table)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_has_one_graph(run_ranks, backend: str, ranks: int) -> None:
    """The lookup stays outside of it."""
    for (_, expected), (graphs, rows) in zip(
        run_ranks(_compiled, ranks, "none"), run_ranks(_compiled, ranks, backend), strict=True
    ):
        assert graphs == 1
        torch.testing.assert_close(rows, expected)


# --------------------
# other people's savers


def _savers(rank: int, world_size: int, folder: str, kernel: str) -> None:
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import save_model
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    def make(seed: int) -> nn.ModuleDict:
        table = Embedding(13, shape=4, seed=seed, initialize=True, kernel=kernel, name="t")
        return nn.ModuleDict({"t": table, "h": _head()})

    model, other = make(0), make(5)
    rows, text = _whole(model["t"]), "would keep the rows of one rank alone"
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    savers: list[Callable[[], Any]] = [
        lambda: dcp.save({"model": model.state_dict()}, checkpoint_id=f"{folder}/a"),
        lambda: dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=f"{folder}/b"),
        lambda: get_model_state_dict(model, options=full),
        lambda: save_model(model, f"{folder}/{rank}.safetensors"),
    ]
    for save in savers if world_size > 1 else ():
        with pytest.raises(BaseException, match=text):  # the planner wraps it
            save()
    # each rank's own file, which torch.load reads without running code
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    state = torch.load(f"{folder}/{rank}.pt", weights_only=True)
    assert type(state["t._embeddings.weight"]) is torch.Tensor
    for assign in (False, True):
        for saved in (state, model.state_dict()):
            other = make(5)
            other.load_state_dict(saved, assign=assign)
            assert torch.equal(_whole(other["t"]), rows)
            other["t"](torch.arange(4)).sum().backward()
    if world_size > 1:
        dist.barrier()
        strange = torch.load(f"{folder}/{(rank + 1) % world_size}.pt")
        with pytest.raises(RuntimeError, match="to load at another number of ranks use"):
            make(5).load_state_dict(strange)
    whole = model["t"].full_state_dict()
    dcp.save({"t": whole}, checkpoint_id=f"{folder}/c")
    dcp.load({"t": (state := make(5)["t"].full_state_dict())}, checkpoint_id=f"{folder}/c")
    other = make(6)
    other["t"].load_state_dict(state)
    assert torch.equal(_whole(other["t"]), rows)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("kernel", ["sparse", "dense", "fused"])
def test_savers_that_would_keep_one_ranks_rows(
    run_ranks, tmp_path, kernel: str, ranks: int
) -> None:
    run_ranks(_savers, ranks, str(tmp_path), kernel)


@pytest.mark.parametrize("how", ["parametrize", "prune", "weight_norm"])
def test_other_tables_train_on_beside_a_reparametrized_one(how: str) -> None:
    from torch.nn.utils import parametrizations, prune

    strange = Embedding(5, shape=4, kernel="dense")
    if how == "prune":
        prune.l1_unstructured(strange._embeddings, "weight", amount=0.5)
    elif how == "weight_norm":
        parametrizations.weight_norm(strange._embeddings, "weight")
    else:
        nn.utils.parametrize.register_parametrization(strange._embeddings, "weight", nn.Tanh())
    table = Embedding(5, shape=4, seed=0)
    before = _whole(table)
    optimizer = torch.optim.SGD([*table.parameters(), *strange.parameters()], lr=0.1)
    (table(torch.arange(3)).sum() + strange(torch.arange(3)).sum()).backward()
    optimizer.step()
    assert torch.allclose((before - _whole(table))[:3], torch.tensor(0.1))
