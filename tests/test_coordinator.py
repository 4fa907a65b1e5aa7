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


def test_optimizers_that_move_untouched_rows_are_refused() -> None:
    table = Embedding(10, shape=2, constrainer="normalize", name="people")
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=r"table 'people': SGD with momentum=0.9 moves rows .* gradient='dense'"):
        Coordinator(table, optimizer)
    dense = Embedding(10, shape=2, constrainer="normalize", gradient="dense")
    Coordinator(dense, torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.9))
