from pathlib import Path

import pytest
import torch
from torch import nn

from shardemb import Coordinator, Embedding, Sharding, clip_grad_norm_, optim


class Model(nn.Module):
    """A sharded table, a replicated one, and an ordinary layer.

    In float64, since their gradients blow rounding errors up.
    """

    def __init__(self, reduction: str) -> None:
        super().__init__()
        common = {"shape": 6, "dtype": torch.float64}
        sharded, replicated = (
            Sharding(placement, gradient_reduction=reduction)
            for placement in ("row_wise", "replicated")
        )
        self.entity = Embedding(501, seed=1, name="entity", sharding=sharded, **common)
        self.relation = Embedding(
            5, seed=2, constrainer="normalize", name="relation", sharding=replicated, **common
        )
        self.layer = nn.Linear(6, 1, dtype=torch.float64)

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
def test_a_step_means_the_same_on_any_number_of_ranks(
    run_ranks, world_size: int, reduction: str
) -> None:
    (expected,) = run_ranks(_step, 1, reduction)
    for got in run_ranks(_step, world_size, reduction):
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9)


def _replicas(rank: int, world_size: int) -> list[torch.Tensor]:
    """Each rank touches another row of tables that all hold whole.

    A layer that no rank uses must not move.
    """
    model = nn.ModuleDict(
        {
            "table": Embedding(
                500, shape=4, constrainer="normalize", seed=1, name="table", sharding="replicated"
            ),
            "adam": Embedding(
                500,
                shape=4,
                seed=2,
                name="adam",
                sharding=Sharding(placement="replicated", gradient_reduction="sum"),
            ),
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
    return [
        x.detach().clone()
        for x in (model["table"](None), model["adam"](None), unused, model["frozen"].weight)
    ]


def test_replicas_stay_equal(run_ranks) -> None:
    first, *others = run_ranks(_replicas, 3)
    for other in others:
        for got, expected in zip(other, first, strict=True):
            assert torch.equal(got, expected)


def _own_group(rank: int, world_size: int, folder: str) -> None:
    import torch.distributed as dist

    from shardemb import checkpoint

    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    table = Embedding(7, shape=2, seed=0, sharding=Sharding(process_group=groups[rank // 2]))
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
    with pytest.raises(
        ValueError, match=r"table 'people': SGD with momentum=0.9 moves rows .* kernel='dense'"
    ):
        Coordinator(table, optimizer)
    with pytest.raises(
        ValueError,
        match=r"table 'people': Adam takes no sparse gradients: use shardemb.optim.LazyAdam",
    ):
        Coordinator(table, torch.optim.Adam(table.parameters()))
    replicated = Embedding(
        10, shape=2, constrainer="normalize", sharding="replicated"
    )  # all of whose rows are constrained
    Coordinator(replicated, torch.optim.SGD(replicated.parameters(), lr=0.1, momentum=0.9))
    for function in (Coordinator, clip_grad_norm_):
        with pytest.raises(TypeError, match=r"got generator, expected the torch.nn.Module"):
            function(table.parameters(), 1.0)
    Coordinator(table, optim.LazyAdam(table.parameters(), weight_decay=0.1))
    dense = Embedding(10, shape=2, constrainer="normalize", kernel="dense")
    Coordinator(dense, torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.9))


def _counts(rank: int, world_size: int) -> tuple[list[int], list[int], int]:
    """Count, step by step, the rows that this rank constrains.

    In the optimizer's pass, and in one of its own.
    """
    seen: list[int] = []

    def unit(rows: torch.Tensor) -> torch.Tensor:
        seen.append(len(rows))
        return torch.nn.functional.normalize(rows)

    table = Embedding(501, shape=6, constrainer=unit, seed=1)
    own: list[int] = []
    constrain = table._embeddings.constrain_
    table._embeddings.constrain_ = lambda *args: own.append(constrain(*args)) or own[-1]  # type: ignore[method-assign]
    coordinator = Coordinator(table, optim.RowWiseAdagrad(table.parameters(), lr=0.1))
    seen.clear()
    totals = []
    for _ in range(3):
        table(torch.tensor([0, 500, 0])).square().sum().backward()
        coordinator.step()
        totals.append(sum(seen))
        seen.clear()
        assert table.local_rows().norm(dim=1).allclose(torch.tensor(1.0))
    # an ordinary step in between, and rows that are loaded, are not forgotten
    table(torch.tensor([1])).sum().backward()
    optim.RowWiseAdagrad(table.parameters(), lr=0.1).step()
    table.zero_grad()
    table(torch.tensor([0])).square().sum().backward()
    coordinator.step()
    assert table.local_rows().norm(dim=1).allclose(torch.tensor(1.0))
    return totals, own[:3], table.plan.num_local


def test_rows_are_constrained_while_they_are_updated(run_ranks, world_size: int) -> None:
    """The first step's pass takes all rows.

    Later ones nothing is left to do after the optimizer.
    """
    touched = 0
    for totals, own, local in run_ranks(_counts, world_size):
        assert own == [local, 0, 0]
        assert totals[1] == totals[2] <= 2
        touched += totals[1]
    assert touched == 2


def _told(
    rank: int, world_size: int, replicated: bool
) -> tuple[list[float], list[float], torch.Tensor]:
    """Two steps, of which the second is left out; flags travel with the gradients."""
    placement = "replicated" if replicated else "row_wise"
    table = Embedding(
        7,
        shape=2,
        seed=1,
        initialize=True,
        dtype=torch.float64,
        sharding=Sharding(placement=placement, gradient_reduction="sum"),
    )
    coordinator = Coordinator(table, optim.SparseSGD(table.parameters(), lr=1.0))
    found = []
    for step in range(2):
        table(torch.tensor([rank, 5])).sum().backward()
        found.append(coordinator.reduce([rank, step, 1]))
        coordinator.step() if step == 0 else coordinator.forget()
    assert (coordinator.steps, coordinator.skipped) == (2, 1)
    with torch.no_grad():
        return *found, table(None).clone()


@pytest.mark.parametrize("replicated", [True, False])
def test_numbers_travel_with_the_gradients_and_a_step_can_be_forgotten(
    run_ranks, world_size: int, replicated: bool
) -> None:
    expected = Embedding(7, shape=2, seed=1, initialize=True, dtype=torch.float64)(None).detach()
    for rank in range(world_size):
        expected[rank] -= 1
        expected[5] -= 1
    total = world_size * (world_size - 1) / 2
    for first, second, rows in run_ranks(_told, world_size, replicated):
        assert first == [total, 0, world_size]
        assert second == [total, world_size, world_size]
        torch.testing.assert_close(rows, expected)


def _clip(
    rank: int, world_size: int, norm_type: float, max_norm: float
) -> tuple[float, dict[str, torch.Tensor]]:
    model = nn.ModuleDict(
        {
            "sparse": Embedding(
                501, shape=6, seed=1, name="sparse", sharding=Sharding(gradient_reduction="sum")
            ),
            "dense": Embedding(
                101,
                shape=6,
                seed=2,
                kernel="dense",
                name="dense",
                sharding=Sharding(gradient_reduction="sum"),
            ),
            "relation": Embedding(
                5,
                shape=6,
                seed=3,
                name="relation",
                sharding=Sharding(gradient_reduction="sum", placement="replicated"),
            ),
        }
    )
    ids = torch.arange(60).repeat(2).chunk(world_size)[rank]  # duplicates on different ranks
    (
        model["sparse"](ids) * model["dense"](ids) * model["relation"](ids % 5)
    ).square().sum().backward()
    Coordinator(model).reduce()
    total = clip_grad_norm_(model, max_norm, norm_type)
    grads = {}
    for name, table in model.items():
        grad = table._embeddings.weight.grad.to_dense()
        grads[name] = torch.zeros(table.max_id, 6).index_add_(0, table.plan.local_ids(), grad)
    return total.item(), grads


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_clipping_by_the_norm_over_tables_and_ranks(
    run_ranks, world_size: int, norm_type: float, max_norm: float
) -> None:
    tables = [
        Embedding(rows, shape=6, seed=seed)(None).detach()
        for rows, seed in ((501, 1), (101, 2), (5, 3))
    ]
    weights = [nn.Parameter(rows) for rows in tables]
    ids = torch.arange(60).repeat(2)
    (weights[0][ids] * weights[1][ids] * weights[2][ids % 5]).square().sum().backward()
    expected = nn.utils.clip_grad_norm_(weights, max_norm, norm_type)
    results = run_ranks(_clip, world_size, norm_type, max_norm)
    for number, name in enumerate(("sparse", "dense", "relation")):
        parts = [grads[name] for _, grads in results]
        whole = parts[0] if name == "relation" else sum(parts)
        torch.testing.assert_close(whole, weights[number].grad, rtol=1e-5, atol=1e-7)
    assert [total for total, _ in results] == pytest.approx(
        [expected.item()] * world_size, rel=1e-5
    )


def test_clipping_what_cannot_be_clipped() -> None:
    table = Embedding(10, shape=2, name="people")
    for arguments in ((0.0,), (float("nan"),), (1.0, 0.0)):
        with pytest.raises(ValueError, match="gradient clipping: got max_norm"):
            clip_grad_norm_(table, *arguments)
    assert clip_grad_norm_(table, 1.0).item() == 0  # no gradient yet
    fused = Embedding(10, shape=4, kernel="fused", name="people")
    with pytest.raises(
        ValueError, match=r"table 'people': kernel='fused' updates rows in backward.*RowWiseAdagrad"
    ):
        Coordinator(fused, max_grad_norm=1.0)
    complex_layer = nn.Linear(2, 2, dtype=torch.complex64)
    complex_layer(torch.ones(2, dtype=torch.complex64)).abs().sum().backward()
    empty = Embedding(4, shape=0)
    empty(torch.tensor([1])).sum().backward()
    assert clip_grad_norm_(nn.ModuleList([complex_layer, empty]), 0.5).item() > 0.5
    assert nn.utils.get_total_norm(
        [p.grad for p in complex_layer.parameters()]
    ).item() == pytest.approx(0.5, rel=1e-4)


def _zero_gradients(rank: int, world_size: int, placement: str) -> list[torch.Tensor]:
    """A gradient of exactly 0 (a hinge loss has many) touches a row.

    Adam moves it on, decay shrinks it.
    """
    rows = []
    for cls, options in (
        (optim.LazyAdam, {"lr": 0.1}),
        (optim.SparseSGD, {"lr": 0.1, "weight_decay": 1.0}),
        (optim.RowWiseAdagrad, {"lr": 0.1, "weight_decay": 1.0}),
    ):
        table = Embedding(
            4, shape=2, seed=0, initializer="ones", sharding=Sharding(placement=placement)
        )
        table.reset_parameters()
        coordinator = Coordinator(table, cls(table.parameters(), **options))
        coordinator.step()  # no rank has a gradient: no step
        for scale in (1.0, 0.0):
            (table(torch.tensor([1])) * scale).sum().backward()
            coordinator.step()
        rows.append(table.full_state_dict("torch")["weight"].clone())
    return rows


@pytest.mark.parametrize("placement", ["row_wise", "replicated"])
def test_rows_whose_gradient_is_zero_are_touched(run_ranks, placement: str) -> None:
    (expected,) = run_ranks(_zero_gradients, 1, "row_wise")
    assert expected[0][1, 0].item() < 0.85
    for got in run_ranks(_zero_gradients, 2, placement):
        torch.testing.assert_close(got, expected)


class Delegating(nn.Module):
    """As PyKEEN's models: hands post_parameter_update on to its parts."""

    def __init__(self, table: Embedding) -> None:
        super().__init__()
        self.table = table
        self.calls = 0

    def post_parameter_update(self) -> None:
        self.calls += 1
        self.table.post_parameter_update()


def test_a_table_is_constrained_once_a_step() -> None:
    table = Embedding(4, shape=2, initializer="ones", constrainer=lambda x: x / 2, kernel="dense")
    table.reset_parameters()
    model = Delegating(Delegating(table))  # type: ignore[arg-type]
    Coordinator(model, torch.optim.SGD(model.parameters(), lr=0.0)).step()
    assert torch.equal(table(None), torch.full((4, 2), 0.5))
    assert model.calls == 1
    model.post_parameter_update()
    table.post_parameter_update()  # outside of a step each call counts
    assert torch.equal(table(None), torch.full((4, 2), 0.125))
