"""The update rules, against torch.optim, formulas and FBGEMM's (tests/sharding/test_table.py)."""

import copy

import pytest
import torch
from torch.nn import functional as F

from shardemb import FusedOptimizer, optim

ROWS = 5001  # more than two chunks
ALL = {
    "SparseSGD": optim.SparseSGD,
    "SparseAdagrad": optim.SparseAdagrad,
    "RowWiseAdagrad": optim.RowWiseAdagrad,
    "LazyAdam": optim.LazyAdam,
    "RowWiseAdam": optim.RowWiseAdam,
}


def steps(table: torch.nn.Embedding, optimizer: torch.optim.Optimizer, number: int = 4) -> None:
    """Train with duplicates, within a lookup and between two."""
    generator = torch.Generator().manual_seed(0)
    for step in range(number):
        ids = torch.randint(ROWS, (4000,), generator=generator)
        factors = torch.randn(4000, 6, generator=generator)
        optimizer.zero_grad()
        ((table(ids) * factors).sum() + (table(ids[:7]) * 2).sum()).backward()
        assert optimizer.step(lambda s=step: s) == step


def embedding(sparse: bool = True) -> torch.nn.Embedding:
    rows = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(1))
    return torch.nn.Embedding(ROWS, 6, _weight=rows, sparse=sparse)


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (optim.SparseSGD, torch.optim.SGD, {"lr": 0.3}),
        (optim.SparseAdagrad, torch.optim.Adagrad, {"lr": 0.3, "eps": 1e-6}),
        (optim.LazyAdam, torch.optim.SparseAdam, {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}),
    ],
)
def test_the_same_as_torchs(ours: type, theirs: type, options: dict) -> None:
    tables = []
    for cls in (ours, theirs):
        table = embedding()
        steps(table, cls(table.parameters(), **options))
        tables.append(table.weight)
    torch.testing.assert_close(*tables, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sparse", [False, True])
def test_rowwise_adagrad_is_its_formula(sparse: bool) -> None:
    table = embedding(sparse)
    weight, total = table.weight.detach().double(), torch.zeros(ROWS, dtype=torch.double)
    optimizer = optim.RowWiseAdagrad(table.parameters(), lr=0.3)
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        ids = torch.randint(ROWS, (4000,), generator=generator)
        factors = torch.randn(4000, 6, generator=generator)
        grad = torch.zeros(ROWS, 6).index_add_(0, ids, factors).double()
        total += grad.square().mean(1)
        weight -= 0.3 * grad / (total.sqrt() + 1e-10)[:, None]
        optimizer.zero_grad()
        (table(ids) * factors).sum().backward()
        optimizer.step()
    torch.testing.assert_close(table.weight.detach(), weight.float(), rtol=1e-5, atol=1e-6)


def test_rowwise_adam_has_one_second_moment_a_row() -> None:
    """A gradient of equal numbers makes it Adam."""
    weights = []
    for cls in (optim.RowWiseAdam, optim.LazyAdam):
        table = embedding()
        optimizer = cls(table.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            table(torch.tensor([1, 2, 2])).sum().backward()
            optimizer.step()
        weights.append(table.weight.detach())
    torch.testing.assert_close(*weights)
    table = embedding()
    optimizer = optim.RowWiseAdam(table.parameters())
    steps(table, optimizer, 1)
    assert optimizer.state[table.weight]["exp_avg_sq"].shape == (ROWS,)
    assert optimizer.state[table.weight]["exp_avg"].shape == (ROWS, 6)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_untouched_rows_stay_and_touched_ones_decay(name: str, decay: float) -> None:
    table = embedding()
    before = table.weight.detach().clone()
    optimizer = ALL[name](table.parameters(), lr=0.5, weight_decay=decay)
    for _ in range(3):
        optimizer.zero_grad()
        (table(torch.tensor([4000, 3])) * 0).sum().backward()
        optimizer.step()
    moved = torch.tensor([3, 4000])
    torch.testing.assert_close(table.weight.detach()[moved], before[moved] * (1 - 0.5 * decay) ** 3)
    before[moved] = table.weight.detach()[moved]
    assert torch.equal(table.weight, before)


@pytest.mark.parametrize("name", ALL)
def test_sparse_and_dense_gradients_of_all_rows_give_the_same(name: str) -> None:
    weights = []
    for sparse in (False, True):
        table = embedding(sparse)
        optimizer = ALL[name](table.parameters(), lr=0.1, weight_decay=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            (table(torch.arange(ROWS)).sin() * torch.arange(6)).sum().backward()
            optimizer.step()
        weights.append(table.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("sparse", [False, True])
def test_constrained_in_the_same_pass(name: str, sparse: bool) -> None:
    """As a constrainer on all rows after the step; only the updated ones are looked at."""
    seen = 0

    def unit(rows: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += len(rows)
        return F.normalize(rows)

    weights = []
    for together in (True, False):
        table = embedding(sparse)
        table.weight.data = F.normalize(table.weight.data)
        optimizer = ALL[name](table.parameters(), lr=0.1)
        for ids in (torch.arange(3000), torch.tensor([5, 5, 4999])):
            optimizer.zero_grad()
            (table(ids) * torch.arange(6)).sum().backward()
            optimizer.step(constrain={table.weight: unit} if together else None)
            if not together:
                table.weight.data = F.normalize(table.weight.data)
        weights.append(table.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-6)
    assert seen == (3002 if sparse else 2 * ROWS)


@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (4, 0), (2, 3, 4)])
@pytest.mark.parametrize("name", ALL)
def test_parameters_of_any_shape(name: str, shape: tuple) -> None:
    weight = torch.nn.Parameter(torch.ones(shape))
    optimizer = ALL[name]([weight], lr=0.1)
    weight.grad = torch.ones(shape)
    optimizer.step()
    assert weight.shape == shape
    assert torch.all(weight < 1)


@pytest.mark.parametrize("name", ALL)
def test_state_survives_and_schedulers_work(name: str) -> None:
    tables = [embedding(), embedding()]
    optimizers = [ALL[name](table.parameters(), lr=0.1) for table in tables]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizers[0], 1, gamma=0.5)
    steps(tables[0], optimizers[0], 2)
    scheduler.step()
    assert optimizers[0].param_groups[0]["lr"] == 0.05
    tables[1].load_state_dict(tables[0].state_dict())
    optimizers[1].load_state_dict(
        copy.deepcopy(optimizers[0].state_dict())
    )  # torch shares the tensors
    for table, optimizer in zip(tables, optimizers, strict=True):
        steps(table, optimizer, 2)
    assert torch.equal(tables[0].weight, tables[1].weight)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_state_in_float32(name: str, dtype: torch.dtype) -> None:
    """In float16 an eps of 1e-10 is 0.

    And the update of a row with a gradient of 0 would be NaN.
    """
    tables = [embedding(), embedding()]
    tables[0].weight.data = tables[0].weight.data.to(dtype)
    optimizers = [ALL[name](table.parameters(), lr=0.1) for table in tables]
    for table, optimizer in zip(tables, optimizers, strict=True):
        for scale in (1e-3, 0.0, 1.0):
            optimizer.zero_grad()
            (table(torch.tensor([1, 2, 2])).float() * scale).sum().backward()
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        for key in ALL[name].state_per_row:
            assert optimizer.state[table.weight][key].dtype == torch.float32
    torch.testing.assert_close(tables[0].weight.float(), tables[1].weight, rtol=2e-2, atol=2e-2)


def test_state_of_other_optimizers() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 3))
    weight.grad = torch.ones(4, 3).to_sparse(1)
    old, new = torch.optim.SparseAdam([weight], lr=0.1), optim.LazyAdam([weight])
    old.step()
    new.load_state_dict(copy.deepcopy(old.state_dict()))  # has no weight_decay
    before = weight.detach().clone()
    new.step()
    ours = weight.detach().clone()
    weight.data.copy_(before)
    old.step()
    torch.testing.assert_close(weight.detach(), ours)
    earlier = optim.RowWiseAdagrad([weight], lr=0.1)
    earlier.state[weight]["sum"] = torch.zeros(4)  # as an earlier version saved it, without a step
    earlier.step()
    wrong = optim.RowWiseAdagrad([weight], lr=0.1)
    wrong.state[weight]["sum"] = torch.zeros(4, 3)
    with pytest.raises(
        ValueError,
        match=r"got 'sum' of shape \(4, 3\) .* expected \(4,\): was the state saved by another",
    ):
        wrong.step()


@pytest.mark.parametrize("name", ALL)
def test_parameters_that_are_not_contiguous(name: str) -> None:
    layers = [torch.nn.Conv2d(2, 3, 3) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    layers[1].to(memory_format=torch.channels_last)
    for layer in layers:
        optimizer = ALL[name](layer.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            layer(torch.ones(1, 2, 5, 5)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(layers[0].weight, layers[1].weight, rtol=1e-4, atol=1e-5)


def test_errors() -> None:
    weight = [torch.nn.Parameter(torch.ones(1, 1))]
    for key in ("lr", "eps", "weight_decay"):
        for value in (-1, float("nan"), float("inf")):
            with pytest.raises(
                ValueError,
                match=f"RowWiseAdagrad: got {key}={value}, expected a finite number, at least 0",
            ):
                optim.RowWiseAdagrad(weight, **{key: value})
    with pytest.raises(ValueError, match="SparseSGD: got a complex parameter"):
        optim.SparseSGD([torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="SparseSGD: got lr=-1"):
        optim.SparseSGD(weight).add_param_group(
            {"params": [torch.nn.Parameter(torch.ones(2))], "lr": -1}
        )
    weight[0].grad = torch.ones(1, 1).to_sparse(2)
    with pytest.raises(ValueError, match="2 sparse dimensions, expected 1"):
        optim.SparseAdagrad(weight).step()
    with pytest.raises(ValueError, match=r"LazyAdam: got betas=\(0.9, 1.0\)"):
        optim.LazyAdam(weight, betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="FusedOptimizer: got lr=-1"):
        FusedOptimizer(lr=-1)
    with pytest.raises(ValueError, match="use kernel='sparse'"):
        FusedOptimizer("adam")
    with pytest.raises(
        ValueError, match=r"weight_decay=0.1 .* FBGEMM would silently ignore: use kernel='sparse'"
    ):
        FusedOptimizer(weight_decay=0.1)


def test_which_optimizers_leave_untouched_rows_alone() -> None:
    weight = [torch.nn.Parameter(torch.ones(2, 1))]
    for optimizer, expected in (
        (torch.optim.SGD(weight, lr=1), True),
        (torch.optim.SGD(weight, lr=1, momentum=0.9), False),
        (torch.optim.SparseAdam(weight), True),
        (torch.optim.Adagrad(weight, weight_decay=0.1), False),
        (torch.optim.ASGD(weight), False),  # not known to
        (optim.LazyAdam(weight, weight_decay=0.1), True),
    ):
        assert optim.moves_touched_rows_only(optimizer, optimizer.param_groups[0]) is expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("sparse", [False, True])
def test_the_same_on_cuda(name: str, sparse: bool) -> None:
    weights = []
    for device in ("cpu", "cuda"):
        table = embedding(sparse).to(device)
        optimizer = ALL[name](table.parameters(), lr=0.1, weight_decay=0.1)
        for ids in (torch.arange(3000), torch.tensor([5, 5, 4999])):
            optimizer.zero_grad()
            (table(ids.to(device)) * torch.arange(6, device=device)).sum().backward()
            optimizer.step(constrain={table.weight: F.normalize})
        weights.append(table.weight.detach().cpu())
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)
