"""What a checkpoint can do besides: other shapes, dtypes and places; in the background.

In little memory.
"""

import os
import random
import resource
import shutil
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from shardemb import (
    Coordinator,
    Embedding,
    Fused,
    FusedOptimizer,
    RowWiseAdagrad,
    Sharding,
    checkpoint,
)
from shardemb.checkpoint import AsyncSaver, CheckpointError, writer
from shardemb.checkpoint.storage import folder_at


class Two(nn.Module):
    def __init__(self, rows: int = 501, **kwargs) -> None:
        super().__init__()
        common = {"shape": 6, "sharding": Sharding(gradient_reduction="sum"), **kwargs}
        self.user = Embedding(rows, seed=1, name="user", **common)
        self.item = Embedding(71, seed=2, name="item", **common)


def _trained(
    rank: int, world_size: int, model: nn.Module, optimizer: torch.optim.Optimizer, steps: range
) -> None:
    coordinator = Coordinator(model, optimizer)
    for step in steps:
        ids = torch.randint(501, (60,), generator=torch.Generator().manual_seed(step)).chunk(
            world_size
        )[rank]
        (model.user(ids) * model.item(ids % 71)).square().sum().backward()
        coordinator.step()


def _rows(model: Two) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {"user": model.user(None).clone(), "item": model.item(None).clone()}


def _save_two(rank: int, world_size: int, folder: Path, kwargs: dict) -> dict[str, torch.Tensor]:
    writer.FILE_BYTES = 1000  # some files a rank
    model = Two(**kwargs)
    optimizer = RowWiseAdagrad(model.parameters(), lr=0.3) if "kernel" not in kwargs else None
    if optimizer is not None:
        _trained(rank, world_size, model, optimizer, range(3))
    checkpoint.save(folder, 3, model, [optimizer] if optimizer else [], {"epoch": 1})
    return _rows(model)


# --------------------
# growth, dtypes, parts of a model


def _load_grown(rank: int, world_size: int, path: Path, rows: int) -> dict[str, torch.Tensor]:
    model = Two(rows)
    before = _rows(model)
    optimizer = RowWiseAdagrad(model.parameters(), lr=0.1)
    with pytest.raises(
        CheckpointError, match=r"table 'user': .*grow=True lets a table have more rows"
    ):
        checkpoint.load(path, model, [optimizer])
    assert all(torch.equal(value, before[name]) for name, value in _rows(model).items())
    assert checkpoint.load(path, model, [optimizer], grow=True) == {"epoch": 1}
    state = torch.zeros(rows)
    state[model.user.plan.local_ids()] = optimizer.state[model.user._embeddings.weight]["sum"]
    if world_size > 1:
        dist.all_reduce(state)
    got = _rows(model)
    assert torch.equal(got["user"][501:], before["user"][501:])  # as initialized
    assert not state[501:].any()
    return {**got, "state": state[:501]}


@pytest.mark.parametrize(("origin", "to"), [(1, 1), (1, 3), (3, 2), (2, 1)])
def test_a_grown_vocabulary(run_ranks, tmp_path: Path, origin: int, to: int) -> None:
    expected, *_ = run_ranks(_save_two, origin, tmp_path, {})
    path = checkpoint.checkpoints(tmp_path)[0]
    same, *_ = run_ranks(_load_same, to, path)
    for got in run_ranks(_load_grown, to, path, 640):
        assert torch.equal(got["user"][:501], expected["user"])
        assert torch.equal(got["item"], expected["item"])
        assert torch.equal(got["state"], same["state"])
        assert got["state"].any()


def _load_same(rank: int, world_size: int, path: Path) -> dict[str, torch.Tensor]:
    model = Two()
    optimizer = RowWiseAdagrad(model.parameters(), lr=0.1)
    checkpoint.load(path, model, [optimizer])
    assert optimizer.param_groups[0]["lr"] == 0.3  # of the run that goes on
    state = torch.zeros(501)
    state[model.user.plan.local_ids()] = optimizer.state[model.user._embeddings.weight]["sum"]
    if world_size > 1:
        dist.all_reduce(state)
    return {"state": state, **_rows(model)}


def test_fewer_rows_are_refused(run_ranks, tmp_path: Path) -> None:
    run_ranks(_save_two, 1, tmp_path, {})
    with pytest.raises(
        CheckpointError,
        match=r"'user.weight' has rows, columns and dtype \(501, 6, 'float32'\), expected \(400",
    ):
        checkpoint.load(checkpoint.checkpoints(tmp_path)[0], Two(400), grow=True)


@pytest.mark.parametrize(("dtype", "origin"), [(torch.float64, 2), (torch.bfloat16, 1)])
def test_another_dtype_only_when_asked(
    run_ranks, tmp_path: Path, dtype: torch.dtype, origin: int
) -> None:
    expected, *_ = run_ranks(_save_two, origin, tmp_path, {})
    path = checkpoint.checkpoints(tmp_path)[0]
    model = Two(dtype=dtype)
    with pytest.raises(CheckpointError, match="cast=True converts"):
        checkpoint.load(path, model)
    checkpoint.load(path, model, cast=True)
    for name, value in _rows(model).items():
        assert torch.equal(value, expected[name].to(dtype))


def _load_one(rank: int, world_size: int, path: Path) -> dict[str, torch.Tensor]:
    model = nn.Module()
    model.customer = Embedding(501, shape=6, name="customer", seed=9)
    model.other = Embedding(5, shape=2, name="other", seed=9)
    before = model.other(None).detach().clone()
    with pytest.raises(CheckpointError, match="got table 'customer' to load from 'customer'"):
        checkpoint.load(path, model)
    with pytest.raises(
        CheckpointError,
        match=r"'customer' to load from 'usr', expected one of .* one of \{'item': .*, 'us",
    ):
        checkpoint.load(path, model, tables={"customer": "usr"})
    optimizer = RowWiseAdagrad(model.parameters(), lr=0.1)
    checkpoint.load(path, model, [optimizer], tables={"customer": "user"})
    assert torch.equal(model.other(None), before)
    assert optimizer.state[model.customer._embeddings.weight]["sum"].any()
    assert model.other._embeddings.weight not in optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.1  # which is of all tables
    alone = Embedding(71, shape=6, name="alone")
    checkpoint.load(path, alone, tables={"": "item"})
    partly = nn.Module()
    partly.item = Embedding(71, shape=6, name="item")
    with pytest.raises(
        CheckpointError,
        match=r"holds \['user.weight'\], which the model does not have: name the tables",
    ):
        checkpoint.load(path, partly)
    checkpoint.load(path, partly, tables=["item"])
    with torch.no_grad():
        assert torch.equal(alone(None), partly.item(None))
        return {"user": model.customer(None).clone(), "item": alone(None).clone()}


@pytest.mark.parametrize(("origin", "to"), [(1, 2), (3, 1)])
def test_one_table_out_of_many(run_ranks, tmp_path: Path, origin: int, to: int) -> None:
    expected, *_ = run_ranks(_save_two, origin, tmp_path, {})
    for got in run_ranks(_load_one, to, checkpoint.checkpoints(tmp_path)[0]):
        assert all(torch.equal(value, expected[name]) for name, value in got.items())


def test_the_state_of_a_fused_optimizer_is_not_dropped_silently(run_ranks, tmp_path: Path) -> None:
    fused = {"kernel": Fused(FusedOptimizer("rowwise_adagrad", lr=0.1))}
    expected, *_ = run_ranks(_save_two, 2, tmp_path, fused)
    path = checkpoint.checkpoints(tmp_path)[0]
    for kwargs in ({}, {"kernel": Fused(FusedOptimizer("sgd"))}):
        model = Two(**kwargs)
        with pytest.raises(
            CheckpointError,
            match=r"fused optimizer \{'name': 'rowwise_adagrad'.*optimizer_state=False",
        ):
            checkpoint.load(path, model)
        checkpoint.load(path, model, optimizer_state=False)
        assert all(torch.equal(value, expected[name]) for name, value in _rows(model).items())
    model = Two(kernel=Fused(FusedOptimizer("rowwise_adagrad", lr=5.0)))
    checkpoint.load(path, model)
    assert model.user._fused_hyperparameters()["lr"] == 0.1


# --------------------
# going on exactly


def _go_on(rank: int, world_size: int, folder: Path, resume: bool) -> dict[str, torch.Tensor]:
    """SGD with dropout, a scheduler, and draws from all generators."""
    torch.manual_seed(rank), random.seed(rank), np.random.seed(rank)
    model = Two(dropout=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    first, drawn = 0, []
    if resume:
        first = checkpoint.load(
            folder / "step-0000000003", model, [optimizer], schedulers=[scheduler]
        )["step"]
    for step in range(first, 6):
        _trained(rank, world_size, model, optimizer, range(step, step + 1))
        scheduler.step()
        drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        if step == 2 and not resume:
            checkpoint.save(folder, 3, model, [optimizer], {"step": 3}, schedulers=[scheduler])
    return {
        **_rows(model),
        "drawn": torch.tensor(drawn),
        "lr": torch.tensor(optimizer.param_groups[0]["lr"]),
    }


@pytest.mark.parametrize("ranks", [1, 2])
def test_schedulers_and_random_generators_go_on(run_ranks, tmp_path: Path, ranks: int) -> None:
    whole, resumed = (
        run_ranks(_go_on, ranks, tmp_path, False),
        run_ranks(_go_on, ranks, tmp_path, True),
    )
    for expected, got in zip(whole, resumed, strict=True):
        for name, value in expected.items():
            assert torch.equal(got[name], value), name


def test_other_schedulers_and_fingerprints_are_refused(tmp_path: Path) -> None:
    table = Embedding(5, shape=2)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    path = checkpoint.save(
        tmp_path,
        1,
        table,
        [optimizer],
        schedulers=[scheduler],
        fingerprints={"vocabulary": "abc"},
        seed=3,
    )
    other = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    with pytest.raises(
        CheckpointError, match=r"saved with schedulers \['StepLR'\], expected \['ExponentialLR'\]"
    ):
        checkpoint.load(path, table, [optimizer], schedulers=[other])
    with pytest.raises(CheckpointError, match="got vocabulary of fingerprint abc, expected xyz"):
        checkpoint.load(path, table, fingerprints={"vocabulary": "xyz"})
    checkpoint.load(path, table, fingerprints={"vocabulary": "abc", "another": "is not compared"})
    values = checkpoint.verify(path).values
    assert (values["seed"], values["fingerprints"], values["optimizers"][0]["groups"][0]["lr"]) == (
        3,
        {"vocabulary": "abc"},
        0.1,
    )


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    table = Embedding(5, shape=2)
    with pytest.raises(CheckpointError, match=r"manifest.fingerprints.x: got 5, expected str"):
        checkpoint.save(tmp_path, 1, table, fingerprints={"x": 5})
    with pytest.raises(
        ValueError, match=r"SGD has a parameter of shape \(3, 4\) that is not the model's"
    ):
        checkpoint.save(tmp_path, 1, table, [torch.optim.SGD([nn.Parameter(torch.zeros(3, 4))])])
    with pytest.raises(ValueError, match="got step=-1, keep=2"):
        checkpoint.save(tmp_path, -1, table)
    assert not list(tmp_path.iterdir())


def _save_nan(rank: int, world_size: int, folder: Path) -> list[str]:
    table = Embedding(501, shape=3, seed=1, name="people")
    with torch.no_grad():
        ids = table.plan.local_ids()
        table._embeddings.weight[ids == 3] = torch.nan
        table._embeddings.weight[ids == 407, 1] = torch.inf
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(folder, 1, table)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        checkpoint.save(folder, 2, table, nonfinite="warn")
    checkpoint.save(folder, 3, table, nonfinite="ignore")
    return [str(caught.value), *(str(w.message) for w in told)]


@pytest.mark.parametrize("ranks", [1, 3])
def test_rows_that_are_no_numbers_are_named(run_ranks, tmp_path: Path, ranks: int) -> None:
    texts = run_ranks(_save_nan, ranks, tmp_path)
    for text, *_ in texts:
        for row in (3, 407):
            assert str(row) in text.replace("407", "407,").split("values in", 1)[1]
        assert "table 'people', rank" in text
    assert sum(len(told) for _, *told in texts) >= 1
    assert [Path(p).name for p in checkpoint.checkpoints(tmp_path)] == [
        "step-0000000002",
        "step-0000000003",
    ]


def _other_steps(rank: int, world_size: int, folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(folder, 5 + rank, Embedding(5, shape=2, seed=1))
    return str(caught.value)


def test_ranks_that_save_other_steps_are_told(run_ranks, tmp_path: Path) -> None:
    for text in run_ranks(_other_steps, 2, tmp_path):
        assert "ranks save different steps: ranks disagree in step: got step 5 on rank 0" in text
    assert not checkpoint.checkpoints(tmp_path)


def _other_places(rank: int, world_size: int, folder: Path) -> str:
    table = Embedding(5, shape=2, seed=1)
    paths = [checkpoint.save(folder, step, table) for step in (1, 2)]
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(paths[rank], table)
    return str(caught.value)


def test_ranks_that_load_other_checkpoints_are_told(run_ranks, tmp_path: Path) -> None:
    for text in run_ranks(_other_places, 2, tmp_path):
        assert "ranks see different checkpoints" in text


# --------------------
# in the background


def _save_in_background(rank: int, world_size: int, folder: Path) -> dict[str, torch.Tensor]:
    model = Two()
    optimizer = RowWiseAdagrad(model.parameters(), lr=0.3)
    saver = AsyncSaver(folder, keep=3)
    expected = {}
    for step in range(6):
        _trained(rank, world_size, model, optimizer, range(step, step + 1))
        saver.check()
        if step % 2:
            saver.save(step, model, [optimizer], {"step": step})
            expected[f"step-{step:010d}"] = _rows(model)  # training goes on while it is written
    saver.wait()
    for path in checkpoint.checkpoints(folder):
        other = Two()
        assert checkpoint.load(path, other, [RowWiseAdagrad(other.parameters())]) == {
            "step": int(path.name[5:])
        }
        for name, value in _rows(other).items():
            assert torch.equal(value, expected[path.name][name])
    return {"count": torch.tensor(len(checkpoint.checkpoints(folder)))}


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_background_save_holds_the_rows_of_its_step(
    run_ranks, tmp_path: Path, ranks: int
) -> None:
    assert [int(got["count"]) for got in run_ranks(_save_in_background, ranks, tmp_path)] == [
        3
    ] * ranks


def _fail_in_background(rank: int, world_size: int, folder: Path) -> list[str]:
    model, texts = Embedding(501, shape=6, seed=1), []
    saver = AsyncSaver(folder)
    saver.save(1, model)
    saver.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for surfaces in ("save", "check"):
        if rank == world_size - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        saver.save(2, model)
        if surfaces == "check":
            futures.wait([saver._saving])  # which a training loop does not wait for
        with pytest.raises(CheckpointError) as caught:
            saver.save(3, model) if surfaces == "save" else saver.check()
        texts.append(str(caught.value))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    saver.save(4, model)  # once there is room again
    saver.wait()
    return texts


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_failure_in_the_background_surfaces(run_ranks, tmp_path: Path, ranks: int) -> None:
    for texts in run_ranks(_fail_in_background, ranks, tmp_path):
        for text in texts:
            assert (
                f"checkpoint of step 2 was not saved, earlier ones are untouched: rank {ranks - 1}:"
                " OSError: [Errno 27]" in text
            )
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == [
        "step-0000000001",
        "step-0000000004",
    ]
    assert not list(tmp_path.glob("*.tmp"))


def _connect_late(rank: int, world_size: int, folder: Path) -> bool:
    new_group = dist.new_group

    def late(*args, **kwargs):
        group = new_group(*args, **kwargs)
        time.sleep(0.3)
        (folder / str(rank)).touch()
        return group

    dist.new_group = late if rank == 0 else new_group
    try:
        AsyncSaver(folder)
        return (folder / "0").exists()
    finally:
        dist.new_group = new_group


def test_a_saver_stands_only_when_all_ranks_are_connected(run_ranks, tmp_path: Path) -> None:
    """A rank that has nothing to do and ends would break the connections of those that are still
    being made."""
    assert run_ranks(_connect_late, 3, tmp_path) == [True] * 3


def test_where_there_is_no_memory_for_a_copy_it_is_saved_at_once(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(writer, "free_bytes", lambda device: 100)
    saver = AsyncSaver(tmp_path)
    with pytest.warns(
        UserWarning, match="needs 12,024 bytes more, 100 are free: saving in the foreground"
    ):
        saver.save(1, Embedding(501, shape=6))
    assert len(checkpoint.checkpoints(tmp_path)) == 1
    saver = AsyncSaver(tmp_path, background=False)  # as asked for: no warning
    saver.save(2, Embedding(501, shape=6))
    assert len(checkpoint.checkpoints(tmp_path)) == 2
    assert not saver._buffers


MEMORY = """
import sys, torch
from shardemb import Embedding, checkpoint
from shardemb.checkpoint import writer

def peak():  # of this process, in bytes
    lines = open("/proc/self/status")
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024

writer.FILE_BYTES = 64 << 20
table = Embedding(4_000_000, shape=32, seed=1, initialize=True)  # 512 MB
checkpoint.save(sys.argv[1], 1, Embedding(10, shape=2))  # so that all code is in memory
open("/proc/self/clear_refs", "w").write("5")  # forget the peak
before = peak()
path = checkpoint.save(sys.argv[1], 2, table)
saved = peak()
open("/proc/self/clear_refs", "w").write("5")
checkpoint.load(path, table)
print(before, saved - before, peak() - before)
"""


def test_saving_and_loading_need_no_second_copy(tmp_path: Path) -> None:
    out = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    before, saving, loading = map(int, out.split())
    assert before > 500e6
    assert saving < 100e6
    assert loading < 100e6


# --------------------
# folders, disks, stores


def _full_disk(folder: Path) -> str:
    """In a mount namespace of its own: a file system of 1 MiB."""
    code = f"""
import torch
from pathlib import Path
from shardemb import Embedding, checkpoint
from shardemb.checkpoint import writer
folder, free = Path({str(folder)!r}), writer.Folder.free_bytes
small, large = Embedding(1000, shape=64, seed=1), Embedding(4000, shape=64, seed=1)
checkpoint.save(folder, 1, small)
for step, known in ((2, True), (3, False)):  # it is known before, or found out in mid-save
    if not known:
        writer.check_space = lambda root, needed: None
    try:
        checkpoint.save(folder, step, large)
    except checkpoint.CheckpointError as error:
        print(error)
newest = checkpoint.checkpoints(folder)[-1]
checkpoint.load(checkpoint.verify(newest).path, Embedding(1000, shape=64))
checkpoint.save(folder, 4, small)
print(sorted(p.name for p in folder.iterdir()))
"""
    command = f"mount -t tmpfs -o size=1m x {folder} && {sys.executable} -c '{code}'".replace(
        "'/", '"/'
    ).replace("')", '")')
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True, check=False
    ).stdout


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("this machine gives no mount namespace")
    first, second, names = _full_disk(tmp_path).splitlines()
    assert "the disk is too full: got" in first
    assert (
        "step 3 was not saved, earlier ones are untouched: rank 0: OSError: [Errno 28] No space"
        " left on device" in second
    )
    assert names == "['step-0000000001', 'step-0000000004']"


def test_a_folder_that_cannot_hold_the_checkpoints_is_told_before_training(
    tmp_path: Path, monkeypatch
) -> None:
    table = Embedding(501, shape=6)
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CheckpointError, match=r"file: cannot hold the checkpoints: FileExistsError"
    ):
        checkpoint.require_space(tmp_path / "file", table)
    with pytest.raises(CheckpointError, match="cannot hold the checkpoints: NotADirectoryError"):
        checkpoint.require_space(tmp_path / "file" / "below", table)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=40_000))
    checkpoint.require_space(tmp_path / "here", table)
    with pytest.raises(
        CheckpointError, match=r"got 40,000 free bytes, expected 42,084"
    ):  # 3 times rows and sums
        checkpoint.require_space(tmp_path / "here", table, [RowWiseAdagrad(table.parameters())])
    assert not list((tmp_path / "here").iterdir())


def test_a_vanished_folder_is_named(tmp_path: Path) -> None:
    saver = AsyncSaver(tmp_path / "run")
    saver.save(1, Embedding(5, shape=2))
    saver.wait()
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("a file in its place")
    saver.save(2, Embedding(5, shape=2))
    with pytest.raises(
        CheckpointError, match=r"step 2 was not saved.*(NotADirectory|FileExists)Error.*run"
    ):
        saver.wait()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The URI of a bucket of a real S3 server, moto's, on this machine."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(
        ip_address="127.0.0.1", port=0, verbose=False
    )
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    server.start()
    _, port = server.get_host_and_port()
    urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT"))
    yield f"s3://bucket/{{}}?scheme=http&endpoint_override=127.0.0.1:{port}&region=us-east-1"
    server.stop()


def _s3(rank: int, world_size: int, uri: str) -> list:
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    writer.FILE_BYTES = 1000
    model, other = Two(), Two()
    for table in other.children():
        nn.init.zeros_(table._embeddings.weight)
    for step in (1, 2, 3):
        path = checkpoint.save(uri, step, model, state={"step": step})
    found = checkpoint.checkpoints(uri)
    assert found[-1] == path
    assert checkpoint.load(path, other) == {"step": 3}
    assert all(torch.equal(value, _rows(model)[name]) for name, value in _rows(other).items())
    with pytest.raises(CheckpointError, match="never written again"):
        checkpoint.save(uri, 3, model)
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_object_store(run_ranks, s3: str, ranks: int) -> None:
    uri = s3.format(f"run-{ranks}")
    found = run_ranks(_s3, ranks, uri)
    assert [[path.partition("?")[0] for path in paths] for paths in found] == [
        [f"s3://bucket/run-{ranks}/step-000000000{step}" for step in (2, 3)]
    ] * ranks
    # without a manifest, which is written last, there is no checkpoint
    folder = folder_at(found[0][1])
    manifest = folder.read("manifest.json")
    assert len(folder.names()) > 3
    folder.remove("manifest.json")
    assert checkpoint.checkpoints(uri) == found[0][:1]
    # an attempt that was given up leaves nothing that the next one takes for its own
    assert ranks > 1 or checkpoint.save(uri, 3, Two()) == found[0][1]
    assert ranks > 1 or (
        folder.read("manifest.json") != manifest
        and checkpoint.verify(found[0][1]).values["step"] == 3
    )
    name = (
        next(name for name in folder.names() if name.endswith("safetensors"))
        if ranks == 1
        else None
    )
    if name is not None:
        content = bytearray(folder.read(name))
        content[-1] ^= 1
        with folder.create(name) as file:
            file.write(bytes(content))
        with pytest.raises(CheckpointError, match=f"{name}.* is damaged"):
            checkpoint.load(found[0][1], Two())


def test_a_store_that_is_not_known() -> None:
    with pytest.raises(
        ValueError, match=r"got location 'nope://x/y', expected a local path or a URI"
    ):
        checkpoint.save("nope://x/y", 1, Embedding(5, shape=2))


def test_file_uris_are_local_paths(tmp_path: Path) -> None:
    assert (
        checkpoint.save(f"file://{tmp_path}", 1, Embedding(5, shape=2))
        == tmp_path / "step-0000000001"
    )


def test_an_optimizer_forgets_what_it_had_after_the_checkpoint(tmp_path: Path) -> None:
    table = Embedding(5, shape=2, seed=1)
    optimizer = RowWiseAdagrad(table.parameters(), lr=0.1)
    path = checkpoint.save(tmp_path, 1, table, [optimizer])
    table(torch.arange(3)).sum().backward()
    optimizer.step()
    assert optimizer.state
    checkpoint.load(path, table, [optimizer])
    assert not optimizer.state
