"""Manifests and headers that a stranger has written: refused, without harm, with one error."""

import hashlib
import json
import random
import resource
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardemb
from shardemb import Embedding, Fused, FusedOptimizer, RowWiseAdagrad, checkpoint
from shardemb.checkpoint import CheckpointError, manifest, writer

#: what takes the place of a value: other types, sizes, names, paths, nesting
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 1.5, -0.0, float("nan"), float("inf"), 1e308),
    *(2**31, 2**40, 2**44, 2**63, -(2**63), 2**64, 10**30, 10**400),
    *("", "load", "float99", "float32", "int64", "bool", "complex64", "float64", "step", "sum"),
    *("../rank-00000-of-00001-00000.safetensors", "/etc/passwd", "rank-\u0660-of-00001-00000"),
    *("normalize", "softmax", "MT19937", "\ud800", "\x00", "A" * 5000, "AAAA", "0" * 64),
    *([], {}, [[]], [{}], {"": {}}, [0], [2**44, 2**44], [2**40], [0, 2**44], [-1, 6], ["6"]),
    *({"name": "softmax", "kwargs": {"dim": 9}, "function": "f"}, {"optimizer": 5, "step": 1}),
    *({"name": "normalize", "kwargs": {"p": "x"}, "function": "f"}, [None] * 3, [3, [1], None]),
]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        options = {"normalizer": "normalize", "normalizer_kwargs": {"dim": -1}}
        self.entity = Embedding(101, shape=6, seed=1, name="entity", **options)
        self.fused = Embedding(31, shape=4, seed=2, kernel=Fused(FusedOptimizer("rowwise_adagrad")))
        self.complex = Embedding(7, shape=2, seed=3, dtype=torch.complex64)
        self.layer = nn.Linear(3, 1)


def _job() -> tuple[Model, list[torch.optim.Optimizer], list[Any]]:
    model = Model()
    adam = torch.optim.Adam(model.layer.parameters(), lr=0.1)
    rows = [*model.entity.parameters(), *model.complex.parameters()]
    rates = torch.optim.lr_scheduler.ReduceLROnPlateau(adam)
    steps = torch.optim.lr_scheduler.OneCycleLR(adam, 0.1, 100)
    return model, [RowWiseAdagrad(rows, lr=0.1), adam], [rates, steps]


def _save(rank: int, world_size: int, folder: Path) -> None:
    writer.FILE_BYTES = 1500  # several files
    model, optimizers, schedulers = _job()
    ids = torch.arange(5)
    loss = model.entity(ids).sum() + model.fused(ids).sum() + model.complex(ids).abs().sum()
    (loss + model.layer(torch.ones(2, 3)).sum()).backward()
    for optimizer in optimizers:
        optimizer.step()
    fingerprints = {"data": "abc"}
    checkpoint.save(
        folder, 3, model, optimizers, {"epoch": 1}, schedulers=schedulers, fingerprints=fingerprints
    )


def _write(path: Path, values: Any) -> None:
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({"manifest": values, "sha256": digest}))


def _somewhere(node: Any, draw: random.Random) -> tuple[Any, Any]:
    """Return a list or object within JSON, and one of its keys."""
    if draw.random() < 0.1 and "rng" in node:  # its thousand numbers would seldom be met
        node = node["rng"]
    while True:
        key = draw.choice(sorted(node)) if isinstance(node, dict) else draw.randrange(len(node))
        if not isinstance(node[key], dict | list) or not node[key] or draw.random() < 0.15:
            return node, key
        node = node[key]


def _mutate(values: Any, draw: random.Random) -> str:
    node, key = _somewhere(values, draw)
    how = draw.choice(["value"] * 6 + ["missing", "name", "extra", "twice", "swap", "nested"])
    if how == "value":
        node[key] = draw.choice(VALUES)
    elif how == "nested":
        node[key] = [node[key]] if draw.random() < 0.5 else {"x": node[key]}
    elif how == "swap":
        other, place = _somewhere(values, draw)
        node[key], other[place] = json.loads(json.dumps([other[place], node[key]]))
    elif how == "twice" and isinstance(node, list):
        node.insert(draw.randrange(len(node) + 1), node[key])
    elif isinstance(node, list):
        del node[key]
    elif how == "extra":
        node[draw.choice(["x", "", "weight", "entity.weight"])] = draw.choice(VALUES)
    else:
        value = node.pop(key)
        if how in ("name", "twice"):
            node[draw.choice([f"{key}x", "", "..", "optimizer.0.x.sum", "entity.weight"])] = value
            node |= {key: value} if how == "twice" else {}
    return f"{how} of {key}"


def _mutate_header(path: Path, draw: random.Random) -> str:
    """Change a file's header, and let the manifest agree with the file that comes of it."""
    file = draw.choice(sorted(path.glob("*.safetensors")))
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    text, data = content[8 : 8 + length], content[8 + length :]
    if draw.random() < 0.2:
        length, what = draw.choice([0, 1, length + 8, length - 8, 2**31, 2**63 - 1]), "its length"
    elif draw.random() < 0.2:
        text, what = draw.choice([b"[" * 100000, b'{"a":1,"a":2}', b"\xff\xfe", b"7"]), "its text"
        length = len(text)
    else:
        header = json.loads(text)
        what = _mutate(header, draw)
        text = json.dumps(header).encode()
        length = len(text)
    file.write_bytes(length.to_bytes(8, "little") + text + data)
    values = json.loads((path / "manifest.json").read_text())["manifest"]
    for entry in values["files"]:
        if entry["file"] == file.name:
            entry["size"] = file.stat().st_size
            entry["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    _write(path, values)
    return f"header of {file.name}: {what}"


#: the job that the next load is tried on; one that has loaded something is not used again
_jobs: list[tuple[Model, list[torch.optim.Optimizer], list[Any]]] = []


def _use(path: Path, call: str) -> None:
    if call == "load":
        if not _jobs:
            _jobs.append(_job())
        model, optimizers, schedulers = _jobs[0]
        fingerprints = {"data": "abc"}
        checkpoint.load(
            path, model, optimizers, schedulers=schedulers, fingerprints=fingerprints, grow=True
        )
        _jobs.clear()
    elif call == "open":
        store = shardemb.open_store(path)
        for table in store.tables.values():
            table.lookup(list(range(min(table.max_id, 3))))
    else:
        checkpoint.verify(path)


def _forge(
    rank: int, world_size: int, folder: Path, count: int, seed: int, schema: bool
) -> tuple[Counter, list[str]]:
    """Forge a checkpoint so often; return the outcomes, and what should not have happened."""
    if not schema:
        manifest._check = lambda value, schema, where: None
    (whole,) = (Path(path) for path in checkpoint.checkpoints(folder))
    original = {file.name: file.read_bytes() for file in whole.iterdir()}
    path, draw = folder / "forged" / whole.name, random.Random(seed)
    outcomes, faults = Counter(), []
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    _use(whole, "load")  # what it imports and maps
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + (1 << 30)  # threads reserve some
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for number in range(count):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        for name, content in original.items():
            (path / name).write_bytes(content)
        if number % 4 == 3:
            what = _mutate_header(path, draw)
        else:
            values = json.loads(original["manifest.json"])["manifest"]
            what = "; ".join(_mutate(values, draw) for _ in range(draw.choice([1, 1, 1, 2])))
            _write(path, values)
        for call in ("load", "open", "verify"):
            opened.clear()
            try:
                _use(path, call)
                outcomes[call, "taken"] += 1
            except CheckpointError as error:
                outcomes[call, "refused"] += 1
                if "alloca" in str(error) or "memory" in str(error):
                    faults.append(f"{number}, {what}: {call}: {error}")
            except Exception as error:
                faults.append(f"{number}, {what}: {call}: {type(error).__name__}: {error}"[:300])
            outside = [name for name in opened if str(folder) in name and str(path) not in name]
            faults += [f"{number}, {what}: {call} opened {name}" for name in outside]
    return outcomes, faults


@pytest.mark.parametrize("ranks", [1, 3])
def test_forged_checkpoints_are_refused(run_ranks, tmp_path: Path, ranks: int) -> None:
    run_ranks(_save, ranks, tmp_path)
    ((outcomes, faults),) = run_ranks(_forge, 1, tmp_path, 270, ranks, True)
    assert faults == []
    for call in ("load", "open", "verify"):
        assert outcomes[call, "refused"] > 100
        assert outcomes[call, "refused"] + outcomes[call, "taken"] == 270


def test_they_are_refused_only_because_of_the_schema(run_ranks, tmp_path: Path) -> None:
    run_ranks(_save, 1, tmp_path)
    ((_, faults),) = run_ranks(_forge, 1, tmp_path, 100, 1, False)
    assert len(faults) > 10


@pytest.mark.parametrize("dtype", ["load", "float99", "float8_e4m3fn", None, 7])
def test_a_forged_dtype_is_named(tmp_path: Path, dtype: Any) -> None:
    path = Path(checkpoint.save(tmp_path, 1, Embedding(5, shape=2)))
    values = json.loads((path / "manifest.json").read_text())["manifest"]
    values["files"][0]["tensors"]["weight"]["dtype"] = dtype
    _write(path, values)
    text = r"files\[0\]\.tensors\.weight\.dtype: got .*, expected float64\|float32"
    for call in (shardemb.open_store, checkpoint.verify):
        with pytest.raises(CheckpointError, match=text):
            call(path)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = Path(checkpoint.save(tmp_path, 1, Embedding(5, shape=2)))
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"step": 1', '"step": 1, "step": 1'))
    with pytest.raises(CheckpointError, match="a key occurs twice"):
        checkpoint.verify(path)
