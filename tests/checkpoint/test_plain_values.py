"""State comes back as it was: plain values, every scheduler of torch, dense layers in part."""

import json
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

import shardemb
from shardemb import checkpoint
from shardemb.checkpoint.plain_values import from_json, to_json
from shardemb.exceptions import CheckpointError

_LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
_KEYS = _LEAVES | st.tuples(_LEAVES, _LEAVES) | st.frozensets(_LEAVES, max_size=2)
_VALUES = st.recursive(
    _LEAVES | st.sampled_from(["__dict__", "__tuple__"]),
    lambda values: (
        st.lists(values, max_size=3)
        | st.dictionaries(_KEYS | st.sampled_from(["__dict__", "__set__"]), values, max_size=3)
        | st.lists(values, max_size=3).map(tuple)
        | st.sets(_KEYS, max_size=3)
        | st.dictionaries(_KEYS, st.integers(), max_size=3).map(Counter)
    ),
    max_leaves=8,
)


def _same(one: Any, other: Any) -> bool:
    """Equality that tells 1, 1.0 and True apart."""
    if type(one) is not type(other) or one != other:
        return False
    if isinstance(one, dict):
        return all(map(_same, one.items(), other.items()))
    return not isinstance(one, list | tuple) or all(map(_same, one, other))


@settings(max_examples=300, deadline=None)
@given(_VALUES)
def test_values_come_back_as_they_were(value: Any) -> None:
    assert _same(from_json(json.loads(json.dumps(to_json(value, "x"))), "x"), value)


@pytest.mark.parametrize(
    "value", [np.float32(1), np.int64(1), np.zeros(2), torch.tensor(1.0), Path("x"), object(), len]
)
def test_other_values_are_refused_by_name(tmp_path: Path, value: Any) -> None:
    table = shardemb.Embedding(3, shape=2)
    with pytest.raises(ValueError, match=rf"state\['seen'\]\[1\]: got .*{type(value).__name__}"):
        checkpoint.save(tmp_path, 1, table, state={"seen": [0, value]})


@pytest.mark.parametrize(
    "text", ['{"__set__": [[1]]}', '{"__dict__": [1]}', '{"__tuple__": 3}', '{"__dict__": [[1]]}']
)
def test_forged_values_are_errors(text: str) -> None:
    with pytest.raises(CheckpointError, match="file: got a __"):
        from_json(json.loads(text), "file")


class _WarmUp:
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, step: int) -> float:
        return min(1.0, (step + 1) / self.steps)


def _sequential(optimizer: torch.optim.Optimizer) -> Any:
    warm_up = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    steps = lr_scheduler.MultiStepLR(optimizer, [3, 6])
    return lr_scheduler.SequentialLR(optimizer, [warm_up, steps], milestones=[3])


def _chained(optimizer: torch.optim.Optimizer) -> Any:
    constant = lr_scheduler.ConstantLR(optimizer, 0.1, total_iters=8)
    steps = lr_scheduler.MultiStepLR(optimizer, [4, 8])
    return lr_scheduler.ChainedScheduler([constant, steps])


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [4, 8], gamma=0.1),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "LambdaLR of an object": lambda o: lr_scheduler.LambdaLR(o, _WarmUp(8)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=12, cycle_momentum=False),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 1.0, 3, cycle_momentum=False),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=8),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.1, total_iters=8),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 10),
    "SequentialLR": _sequential,
    "ChainedScheduler": _chained,
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_rates_after_a_resume(tmp_path: Path, name: str) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model = nn.ModuleDict({"t": shardemb.Embedding(10, shape=4, seed=0)})
        optimizer = shardemb.RowWiseAdagrad(model.parameters(), lr=0.5)
        return model, optimizer, SCHEDULERS[name](optimizer)

    def run(model: nn.Module, optimizer: Any, scheduler: Any, steps: int) -> list[float]:
        rates = []
        for _ in range(steps):
            model["t"](torch.tensor([1, 2])).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
            scheduler.step(torch.tensor(1.0)) if plateau else scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own: schedulers before the first step
        whole = run(*make(), 12)
        first, second = make(), make()
        rates = run(*first, 5)
        path = checkpoint.save(tmp_path, 1, first[0], [first[1]], schedulers=[first[2]])
        checkpoint.load(path, second[0], [second[1]], schedulers=[second[2]])
        assert rates + run(*second, 7) == whole


def test_every_scheduler_of_torch_is_tried() -> None:
    kinds = {name for name, kind in vars(lr_scheduler).items() if name.endswith("LR")}
    kinds |= {"CosineAnnealingWarmRestarts", "ReduceLROnPlateau", "ChainedScheduler"}
    assert {name.split(" ")[0] for name in SCHEDULERS} >= kinds - {"SWALR", "LRScheduler"}


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.tensor])
def test_rates_that_json_does_not_know(tmp_path: Path, kind: Any) -> None:
    model = shardemb.Embedding(10, shape=4, seed=0)
    optimizer = shardemb.RowWiseAdagrad(model.parameters(), lr=kind(0.125))
    path = checkpoint.save(tmp_path, 1, model, [optimizer])
    other = shardemb.RowWiseAdagrad(model.parameters(), lr=0.5)
    checkpoint.load(path, model, [other])
    assert other.param_groups[0]["lr"] == 0.125


def _in_part(rank: int, world_size: int, folder: str) -> None:
    def make(seed: int, head: str) -> nn.ModuleDict:
        torch.manual_seed(seed)
        table = shardemb.Embedding(13, shape=4, seed=seed, name="t")
        return nn.ModuleDict({"t": table, "body": nn.Linear(4, 4), head: nn.Linear(4, 2)})

    saved, model = make(0, "old"), make(1, "new")
    new = model["new"].weight.clone()
    path = checkpoint.save(folder, 1, saved)
    with pytest.raises(CheckpointError, match=r"has no 'new.bias'"):
        checkpoint.load(path, model)
    text = r"not loaded: \['old.bias', 'old.weight'\].*kept: \['new.bias', 'new.weight'\]"
    with pytest.warns(UserWarning, match=text):
        checkpoint.load(path, model, strict=False)
    assert torch.equal(model["body"].weight, saved["body"].weight)
    assert torch.equal(model["new"].weight, new)
    rows = model["t"].full_state_dict("torch")["weight"]
    assert torch.equal(rows, saved["t"].full_state_dict("torch")["weight"])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_checkpoint_is_loaded_in_part(run_ranks, tmp_path: Path, ranks: int) -> None:
    run_ranks(_in_part, ranks, str(tmp_path))
