"""Public objects can be inspected and copied, whatever state they are in."""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardemb
from shardemb import Embedding, checkpoint, kge, serving
from shardemb.checkpoint.shards import local_shards
from shardemb.checkpoint.storage import folder_at
from shardemb.serving.ray_service import Client, Info, ServedTable, Service, ShardHealth, TableInfo
from shardemb.sharding.placement import RowOrder
from shardemb.utils.run_metrics import MetricsFile
from shardemb.vocabulary import Vocabulary


def _saved(folder: Path) -> Path:
    table = Embedding(5, shape=2, name="t", normalizer=lambda x: x)  # which no file can name
    return Path(checkpoint.save(folder / "run", 1, table))


def _without_tables(folder: Path) -> shardemb.Store:
    return shardemb.open_store(Path(checkpoint.save(folder, 1, nn.Linear(2, 1))))


def _saver(folder: Path) -> checkpoint.AsyncSaver:
    saver = checkpoint.AsyncSaver(folder)
    saver.save(1, Embedding(5, shape=2))
    saver.close()
    return saver


def _vocabulary(folder: Path) -> Vocabulary:
    Vocabulary(["a", "b"]).save(folder / "labels.arrow")
    return Vocabulary.load(folder / "labels.arrow")


def _client(folder: Path) -> Client:
    table = TableInfo("t", 5, (2,), torch.float32, RowOrder(5, True), False)
    return Client(Info("service", folder, "0" * 64, 1, 2, {"t": table}))


class Constant(shardemb.Representation):
    """A representation without parameters."""

    def _plain_forward(self, indices: torch.Tensor | None = None) -> torch.Tensor:
        return torch.zeros(self.max_id, *self.shape)[indices]


def _in_a_group(folder: Path) -> Embedding:
    table = Embedding(5, shape=2)
    table._group = object()  # which no pickle could hold
    return table


MAKE: dict[str, Callable[[Path], Any]] = {
    "Store": lambda folder: shardemb.open_store(_saved(folder)),
    "Store without tables": _without_tables,
    "StoredTable": lambda folder: shardemb.open_store(_saved(folder)).table,
    "Manifest": lambda folder: checkpoint.verify(_saved(folder)),
    "SavedShard": lambda folder: checkpoint.Manifest(_saved(folder)).shards["weight"][0],
    "LocalShard": lambda folder: local_shards(Embedding(5, shape=2))[0]["weight"],
    "AsyncSaver": _saver,
    "Folder": folder_at,
    "Vocabulary": lambda folder: Vocabulary(["a", "b"]),
    "Vocabulary in a file": _vocabulary,
    "Client": _client,
    "ServedTable": lambda folder: ServedTable(_client(folder), "t"),
    "Service": lambda folder: Service(_client(folder).info, []),
    "ShardHealth": lambda folder: ShardHealth(0, True, {}, None),
    "Nearest": lambda folder: shardemb.open_store(_saved(folder), {"": None}).nearest(0, 1),
    "checkpoint": lambda folder: checkpoint,
    "serving": lambda folder: serving,
    "MetricsFile": lambda folder: MetricsFile(folder / "metrics.jsonl"),
    **{
        f"Embedding, {kernel}": lambda folder, kernel=kernel: Embedding(5, shape=4, kernel=kernel)
        for kernel in ("sparse", "dense", "fused")
    },
    "Embedding in a group of its own": _in_a_group,
    "Representation": lambda folder: Constant(3, shape=2),
    "Prefetched": lambda folder: Embedding(5, shape=2).prefetch(torch.tensor([1])),
    "RowWiseAdagrad": lambda folder: shardemb.RowWiseAdagrad(Embedding(5, shape=2).parameters()),
    "Coordinator": lambda folder: shardemb.Coordinator(Embedding(5, shape=2)),
    "RowPlan": lambda folder: shardemb.RowPlan("t", 5, 2, 2, 1),
    "Sharding": lambda folder: shardemb.Sharding(),
    "Fused": lambda folder: shardemb.Fused(engine=shardemb.TorchRec()),
    "KnowledgeGraphModel": lambda folder: kge.KnowledgeGraphModel(5, 2, kge.ModelConfig(dim=4), 0),
    "shardemb": lambda folder: shardemb,
    "kge": lambda folder: kge,
}


@pytest.mark.parametrize("name", MAKE)
def test_objects_are_inspected_and_copied(tmp_path: Path, name: str) -> None:
    thing = MAKE[name](tmp_path)
    assert not hasattr(thing, "no_such_attribute")
    names = dir(thing)
    assert names
    for attribute in names:
        hasattr(thing, attribute)
    assert inspect.getmembers(thing)
    if not inspect.ismodule(thing):
        assert type(copy.copy(thing)) is type(thing)
        if not isinstance(thing, torch.optim.Optimizer):  # torch's copies lack private attributes
            assert dir(copy.copy(thing)) == dir(thing)
    if hasattr(thing, "close"):
        thing.close()
