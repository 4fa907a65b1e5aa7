import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
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
from shardemb.checkpoint import CheckpointError, writer


class Model(nn.Module):
    """Every kind of table, and an ordinary layer."""

    def __init__(self, rows: int = 501, dim: int = 6) -> None:
        super().__init__()
        fused = FusedOptimizer("rowwise_adagrad", lr=0.1)
        self.fused = Embedding(
            rows,
            shape=dim,
            kernel=Fused(fused),
            seed=1,
            name="fused",
            sharding=Sharding(gradient_reduction="sum"),
        )
        self.sparse = Embedding(
            rows, shape=dim, seed=2, name="sparse", sharding=Sharding(gradient_reduction="sum")
        )
        self.few = Embedding(
            1, shape=dim, seed=3, name="few", sharding=Sharding(gradient_reduction="sum")
        )
        self.copied = Embedding(
            5,
            shape=dim,
            kernel="dense",
            seed=4,
            sharding=Sharding(placement="replicated", gradient_reduction="sum"),
        )
        self.layer = nn.Linear(dim, 1)
        nn.init.ones_(self.layer.weight), nn.init.zeros_(self.layer.bias)
        self.register_buffer("count", torch.tensor(7))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.fused(ids) + self.sparse(ids) + self.few(ids * 0) + self.copied(ids % 5)
        return self.layer(x).squeeze(1)


class Job:
    def __init__(self, rank: int, world_size: int, dim: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.model = Model(dim=dim)
        named = dict(self.model.named_parameters())
        layer = [p for name, p in named.items() if name.startswith("layer")]
        tables = [p for name, p in named.items() if not name.startswith(("layer", "few"))]
        few = [p for name, p in named.items() if name.startswith("few")]
        self.optimizers = [
            RowWiseAdagrad(tables, lr=0.1),
            torch.optim.Adam(layer, lr=0.01),
            torch.optim.SparseAdam(few, lr=0.1),  # keeps its step as a number, not as a tensor
        ]
        self.coordinator = Coordinator(self.model, self.optimizers)

    def step(self, number: int) -> None:
        ids = torch.randint(501, (60,), generator=torch.Generator().manual_seed(number))
        mine = ids.chunk(self.world_size)[self.rank]
        self.model(mine).square().sum().backward()
        for parameter in self.model.layer.parameters():
            parameter.grad *= self.world_size
        self.coordinator.step()

    def tables(self) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            rows = {
                name: getattr(self.model, name)(None).clone()
                for name in ("fused", "sparse", "few", "copied")
            }
        return {
            **rows,
            "layer": self.model.layer.weight.detach().clone(),
            "count": self.model.count,
        }


def _save(rank: int, world_size: int, folder: Path, dim: int) -> dict[str, torch.Tensor]:
    writer.FILE_BYTES = 3000  # several files a rank, tables cut between rows
    job = Job(rank, world_size, dim)
    for number in range(3):
        job.step(number)
    checkpoint.save(folder, 3, job.model, job.optimizers, {"epoch": 1})
    for number in range(3, 6):
        job.step(number)
    return job.tables()


def _resume(rank: int, world_size: int, folder: Path, dim: int) -> dict[str, torch.Tensor]:
    job = Job(rank, world_size, dim)
    with torch.no_grad():
        job.model.count.fill_(0)
    (path,) = checkpoint.checkpoints(folder)
    assert checkpoint.load(path, job.model, job.optimizers) == {"epoch": 1}
    for number in range(3, 6):
        job.step(number)
    return job.tables()


@pytest.mark.parametrize("to", [1, 2, 3, 4])
@pytest.mark.parametrize("origin", [1, 2, 3, 4])
def test_a_resumed_run_equals_one_that_went_on(
    run_ranks, tmp_path: Path, origin: int, to: int
) -> None:
    """At any number of ranks, with every kind of table and optimizer state.

    More ranks than rows included.
    """
    dim = (
        8 if origin == to else 6
    )  # the state of padded rows is scaled for the file, which may cost the last bit
    expected, *_ = run_ranks(_save, origin, tmp_path, dim)
    for got in run_ranks(_resume, to, tmp_path, dim):
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)
            if origin == to:
                assert torch.equal(got[name], value), name


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = Embedding(101, shape=4, seed=0, name="people")
    return checkpoint.save(tmp_path, 1, model, state={"epoch": 1})


def load(path: Path, **kwargs) -> None:
    table = Embedding(**{"max_id": 101, "shape": 4, **kwargs})
    before = table(None).detach().clone()
    try:
        checkpoint.load(path, table)
    finally:
        assert torch.equal(table(None), before)  # nothing of it was used


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a flipped bit": (
        lambda p: flip(p / "rank-00000-of-00001-00000.safetensors", -5),
        "is damaged .* it holds weight",
    ),
    "a flipped bit in the header": (
        lambda p: flip(p / "rank-00000-of-00001-00000.safetensors", 20),
        "is damaged",
    ),
    "a short file": (
        lambda p: (p / "rank-00000-of-00001-00000.safetensors").write_bytes(b"x"),
        "got 1 bytes, expected .* it holds weight",
    ),
    "a missing file": (
        lambda p: (p / "rank-00000-of-00001-00000.safetensors").unlink(),
        "missing; it holds weight",
    ),
    "a missing manifest": (lambda p: (p / "manifest.json").unlink(), "no complete checkpoint"),
    "a cut manifest": (lambda p: (p / "manifest.json").write_text("{"), "not a manifest"),
    "an edited manifest": (
        lambda p: (p / "manifest.json").write_text(
            (p / "manifest.json").read_text().replace('"step": 1', '"step": 2')
        ),
        "was changed after it was written",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_nothing_is_loaded(saved: Path, damage: str) -> None:
    spoil, text = DAMAGE[damage]
    spoil(saved)
    with pytest.raises(CheckpointError, match=text) as caught:
        load(saved)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize("kwargs", [{"max_id": 100}, {"shape": 5}, {"dtype": torch.float64}])
def test_another_table_is_refused(saved: Path, kwargs: dict) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"'weight' has rows, columns and dtype \(101, 4, 'float32'\), expected",
    ):
        load(saved, **kwargs)


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    table = Embedding(10, shape=2)
    path = checkpoint.save(tmp_path, 1, table, [torch.optim.Adagrad(table.parameters())])
    with pytest.raises(
        CheckpointError, match=r"saved with optimizers \['Adagrad'\], expected \['RowWiseAdagrad'\]"
    ):
        checkpoint.load(path, table, [RowWiseAdagrad(table.parameters())])
    assert checkpoint.load(path, table) == {}  # the rows alone


def test_a_file_name_cannot_leave_the_folder(saved: Path) -> None:
    import hashlib

    document = json.loads((saved / "manifest.json").read_text())
    document["manifest"]["files"][0]["file"] = (
        "../step-0000000001/rank-00000-of-00001-00000.safetensors"
    )
    body = json.dumps(document["manifest"], sort_keys=True)
    document["sha256"] = hashlib.sha256(body.encode()).hexdigest()
    (saved / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"files\[0\]\.file: got '\.\./step"):
        load(saved)


def test_the_newest_are_kept_and_a_torn_one_is_invisible(tmp_path: Path) -> None:
    table = Embedding(10, shape=2)
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, table, keep=2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [
        "step-0000000002",
        "step-0000000003",
    ]
    with pytest.raises(CheckpointError, match="never written again"):
        checkpoint.save(tmp_path, 3, table)
    shutil.copytree(tmp_path / "step-0000000003", tmp_path / "step-0000000004.tmp")
    checkpoint.save(tmp_path, 1, table, keep=1)  # a run that goes on from an earlier step
    assert [path.name[-1] for path in checkpoint.checkpoints(tmp_path)] == ["1", "2", "3"]
    assert checkpoint.checkpoints(tmp_path)[-1].name == "step-0000000003"


def _one_cannot_write(rank: int, world_size: int, folder: Path) -> str:
    table = Embedding(10, shape=2, seed=0)
    checkpoint.save(folder, 1, table)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(folder, 2, table)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return str(caught.value)


def test_a_rank_that_cannot_write_is_named_on_all(run_ranks, tmp_path: Path) -> None:
    for text in run_ranks(_one_cannot_write, 3, tmp_path):
        assert (
            "checkpoint of step 2 was not saved, earlier ones are untouched: rank 1: OSError:"
            " [Errno 27]" in text
        )
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-0000000001"]
