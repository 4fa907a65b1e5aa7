import pytest
import torch

from shardemb import FusedOptimizer, RowWiseAdagrad


def reference(weight: torch.Tensor, grads: list[torch.Tensor], lr: float, eps: float) -> torch.Tensor:
    weight, total = weight.double(), torch.zeros(len(weight), dtype=torch.double)
    for grad in grads:
        total += grad.double().square().mean(1)
        weight = weight - lr * grad / (total.sqrt() + eps)[:, None]
    return weight.float()


@pytest.mark.parametrize("sparse", [False, True])
def test_rowwise_adagrad_is_its_formula(sparse: bool) -> None:
    torch.manual_seed(0)
    table = torch.nn.Embedding(5001, 6, sparse=sparse)
    start, grads = table.weight.detach().clone(), []
    optimizer = RowWiseAdagrad(table.parameters(), lr=0.3)
    for step in range(4):
        ids = torch.randint(5001, (4000,))  # with duplicates, and more rows than a chunk
        factors = torch.randn(4000, 6)
        grads.append(torch.zeros(5001, 6).index_add_(0, ids, factors))
        optimizer.zero_grad()
        (table(ids) * factors).sum().backward()
        assert optimizer.step(lambda s=step: s) == step
    torch.testing.assert_close(table.weight.detach(), reference(start, grads, 0.3, 1e-10), rtol=1e-5, atol=1e-6)


def test_state_survives_and_schedulers_work() -> None:
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = RowWiseAdagrad([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    weight.grad = torch.ones(3, 2)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    other = RowWiseAdagrad([weight], lr=1.0)
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.state[weight]["sum"], torch.ones(3))


def test_errors() -> None:
    for arguments in ({"lr": -1}, {"eps": -1}):
        with pytest.raises(ValueError, match="at least 0"):
            RowWiseAdagrad([torch.nn.Parameter(torch.ones(1, 1))], **arguments)
        with pytest.raises(ValueError, match="at least 0"):
            FusedOptimizer(**arguments)
    with pytest.raises(ValueError, match="use gradient='sparse'"):
        FusedOptimizer("adam")
