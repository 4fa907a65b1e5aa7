from pathlib import Path

import pytest
import torch
from torch import nn

from shardemb import Coordinator, Embedding


class Model(nn.Module):
    """A sharded table, a replicated one, and an ordinary layer."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.entity = Embedding(501, shape=6, gradient_reduction=reduction, seed=1, name="entity")
        self.relation = Embedding(
            5, shape=6, placement="replicated", gradient_reduction=reduction, seed=2, constrainer="normalize", name="relation"
        )
        self.layer = nn.Linear(6, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layer(self.entity(ids) * self.relation(ids % 5)).squeeze(1)


def _step(rank: int, world_size: int, reduction: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(100 + rank)  # layers differ until the coordinator copies rank 0's
    model = Model(reduction)
    if world_size == 1:
        torch.manual_seed(100)
        model = Model(reduction)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    coordinator = Coordinator(model, optimizer)
    for step in range(3):
        ids = torch.arange(step, step + 60)
        mine = ids.chunk(world_size)[rank]
        loss = model(mine).square()
        (loss.sum() if reduction == "sum" else loss.mean()).backward()
        if reduction == "sum":  # the layer's gradients are averaged; a sum is what this loss needs
            for parameter in model.layer.parameters():
                parameter.grad *= world_size
        coordinator.step()
        assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        return {
            "entity": model.entity(None).clone(),
            "relation": model.relation(None).clone(),
            "layer": model.layer.weight.detach().clone(),
        }


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_step_means_the_same_on_any_number_of_ranks(run_ranks, world_size: int, reduction: str) -> None:
    (expected,) = run_ranks(_step, 1, reduction)
    for got in run_ranks(_step, world_size, reduction):
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)


def _replicas(rank: int, world_size: int) -> list[torch.Tensor]:
    """Each rank touches another row of tables that all hold whole; a layer that no rank uses must not move."""
    model = nn.ModuleDict(
        {
            "table": Embedding(500, shape=4, placement="replicated", constrainer="normalize", seed=1, name="table"),
            "adam": Embedding(500, shape=4, placement="replicated", gradient_reduction="sum", seed=2, name="adam"),
            "unused": nn.Linear(2, 2).double(),
            "frozen": nn.Linear(2, 2).requires_grad_(False),
        }
    )
    optimizers = [
        torch.optim.SGD(model["table"].parameters(), lr=0.5),
        torch.optim.SparseAdam(model["adam"].parameters(), lr=0.5),
        torch.optim.Adam(model["unused"].parameters(), lr=0.5, weight_decay=0.5),
    ]
    coordinator = Coordinator(model, optimizers)
    unused = model["unused"].weight.detach().clone()
    for _ in range(2):
        ids = torch.tensor([rank])
        (model["table"](ids).square().sum() + model["adam"](ids).sum()).backward()
        coordinator.step()
    assert torch.equal(model["unused"].weight, unused)
    assert model["table"](None).norm(dim=1).sub(1).abs().max() < 1e-6
    return [x.detach().clone() for x in (model["table"](None), model["adam"](None), unused, model["frozen"].weight)]


def test_replicas_stay_equal(run_ranks) -> None:
    first, *others = run_ranks(_replicas, 3)
    for other in others:
        for got, expected in zip(other, first, strict=True):
            assert torch.equal(got, expected)


def _own_group(rank: int, world_size: int, folder: str) -> None:
    import torch.distributed as dist

    from shardemb import checkpoint

    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    table = Embedding(7, shape=2, process_group=groups[rank // 2], seed=0)
    assert table.plan.world_size == (2 if rank < 2 else 1)
    assert table(torch.tensor([6])).shape == (1, 2)
    with pytest.raises(ValueError, match="process group of its own, the coordinator takes"):
        Coordinator(table)
    with pytest.raises(ValueError, match="process group of its own, a checkpoint takes"):
        checkpoint.save(Path(folder), 1, table)


def test_a_group_of_its_own(run_ranks, tmp_path: Path) -> None:
    run_ranks(_own_group, 3, str(tmp_path))


def test_optimizers_that_move_untouched_rows_are_refused() -> None:
    table = Embedding(10, shape=2, constrainer="normalize", name="people")
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=r"table 'people': SGD with momentum=0.9 moves rows .* gradient='dense'"):
        Coordinator(table, optimizer)
    dense = Embedding(10, shape=2, constrainer="normalize", gradient="dense")
    Coordinator(dense, torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.9))
