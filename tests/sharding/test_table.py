import pytest
import torch

from shardemb.optim import FusedOptimizer, RowWiseAdagrad
from shardemb.sharding.fused_table import FusedTable
from shardemb.sharding.placement import RowPlan
from shardemb.sharding.table import ParameterTable, RowOptions

CPU = torch.device("cpu")


def fused(
    rows: int,
    dim: int,
    optimizer: FusedOptimizer,
    dtype: torch.dtype = torch.float32,
    track: bool = False,
) -> FusedTable:
    options = RowOptions(trainable=True, dtype=dtype, device=CPU, track=track)
    table = FusedTable(RowPlan("t", rows, dim), options, optimizer)
    with torch.no_grad():
        table.weight.normal_(generator=torch.Generator().manual_seed(0))
    return table


ORACLES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.2),
    "rowwise_adagrad": lambda p: RowWiseAdagrad(p, lr=0.2),
}


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("dim", [1, 6, 7, 8, 128])
def test_fused_updates_equal_torch_optim(name: str, dim: int) -> None:
    """Also for columns that FBGEMM pads, whose row-wise mean would otherwise be too small."""
    table = fused(501, dim, FusedOptimizer(name, lr=0.2))
    oracle = torch.nn.Embedding(501, dim, _weight=table.weight.clone(), sparse=True)
    optimizer = ORACLES[name](oracle.parameters())
    for step in range(5):
        rows = torch.randint(501, (0 if step == 2 else 300,))
        factors = torch.randn(len(rows), dim)
        (table.lookup(rows) * factors).sum().backward()
        table.end_step()
        optimizer.zero_grad()
        (oracle(rows) * factors).sum().backward()
        optimizer.step()
    torch.testing.assert_close(table.weight, oracle.weight.detach(), rtol=1e-5, atol=1e-5)
    if name != "sgd":
        ours, theirs = table.optimizer_state()["sum"], optimizer.state[oracle.weight]["sum"]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        table.load_optimizer_state({"sum": torch.ones_like(ours)})
        torch.testing.assert_close(table.optimizer_state()["sum"], torch.ones_like(ours))


def test_learning_rate_can_change() -> None:
    table = fused(10, 7, FusedOptimizer("sgd", lr=1.0))
    before = table.weight.clone()
    table.set_learning_rate(0.25)
    table.lookup(torch.tensor([4])).sum().backward()
    assert torch.allclose(before[4] - table.weight[4], torch.tensor(0.25))


def test_a_second_pending_lookup_is_refused_only_when_it_would_be_wrong() -> None:
    table = fused(10, 8, FusedOptimizer("adagrad"))
    first = table.lookup(torch.tensor([1]))
    with pytest.raises(
        RuntimeError, match=r"table 't': a second lookup before the backward .*torch.cat"
    ):
        table.lookup(torch.tensor([2]))
    first.sum().backward()
    table.end_step()
    second = table.lookup(torch.tensor([2]))  # after backward
    del second
    third = table.lookup(torch.tensor([2]))  # after a lookup that was given up
    with torch.no_grad():
        table.lookup(torch.tensor([3]))  # a read is no part of a step
    third.sum().backward()
    sgd = fused(10, 8, FusedOptimizer("sgd", lr=1.0))
    before = sgd.weight.clone()
    (sgd.lookup(torch.tensor([1])) + sgd.lookup(torch.tensor([1]))).sum().backward()
    assert torch.allclose(before[1] - sgd.weight[1], torch.tensor(2.0))


def test_half_precision_and_what_fbgemm_cannot_do() -> None:
    table = fused(10, 6, FusedOptimizer("sgd", lr=1.0), torch.float16)
    out = table.lookup(torch.tensor([1, 2]))
    assert out.dtype == torch.float16
    out.sum().backward()
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(ValueError, match="float32 and float16"):
            fused(10, 6, FusedOptimizer(), dtype)
    with pytest.raises(RuntimeError, match="cannot be moved or converted"):
        fused(10, 6, FusedOptimizer()).double()


@pytest.mark.parametrize("kind", ["sparse", "fused"])
def test_only_rows_that_got_a_gradient_are_constrained(kind: str) -> None:
    plan = RowPlan("t", 101, 6)
    if kind == "sparse":
        table = ParameterTable(plan, RowOptions(True, torch.float32, CPU, track=True), sparse=True)
        torch.nn.init.normal_(table.weight)
    else:
        table = fused(101, 6, FusedOptimizer(), track=True)
    seen: list[int] = []

    def count(rows: torch.Tensor) -> torch.Tensor:
        seen.append(len(rows))
        return rows.clamp(-0.5, 0.5)

    assert table.constrain_(count, changed_only=True) == 101  # the first pass takes all
    assert table.constrain_(count, changed_only=True) == 0
    table.lookup(torch.tensor([90]))  # a lookup without backward changes nothing
    table.lookup(torch.tensor([3, 5, 3])).sum().backward()
    if kind == "sparse":
        table.lookup(torch.tensor([5, 7])).sum().backward()
    before = table.weight.detach().clone()
    with torch.no_grad():
        table.weight[50] = 9.0  # changed behind its back, and not looked at
    done = table.constrain_(count, changed_only=True)
    assert done == seen[-1] == (3 if kind == "sparse" else 2)
    assert torch.all(table.weight[50] == 9)
    assert torch.equal(table.weight.detach()[[0, 90]], before[[0, 90]])
    table.end_step()
    table.lookup(torch.arange(101).repeat(2)).sum().backward()
    assert table.constrain_(count, changed_only=True) == 101
    assert table.weight.abs().max() <= 0.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("dim", [6, 128])
def test_fused_updates_on_cuda(name: str, dim: int) -> None:
    cuda = torch.device("cuda")
    plan = RowPlan("t", 501, dim)
    optimizer = FusedOptimizer(name, lr=0.2)
    table = FusedTable(plan, RowOptions(True, torch.float32, cuda, track=True), optimizer)
    other = fused(501, dim, FusedOptimizer(name, lr=0.2), track=True)
    table.weight.copy_(other.weight)
    for _ in range(3):
        rows, factors = torch.randint(501, (300,)), torch.randn(300, dim)
        (table.lookup(rows.to(cuda)) * factors.to(cuda)).sum().backward()
        (other.lookup(rows) * factors).sum().backward()
        for shard in (table, other):
            shard.constrain_(torch.nn.functional.normalize, changed_only=True)
    torch.testing.assert_close(table.weight.cpu(), other.weight, rtol=1e-5, atol=1e-5)
