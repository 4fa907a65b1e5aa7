from functools import partial
from typing import Any

import pytest
import torch

from shardemb import Embedding
from shardemb.initializers import (
    BLOCK_ROWS,
    PretrainedInitializer,
    fill_rows,
    resolve_initializer,
    row_wise,
)
from shardemb.sharding.placement import RowPlan
from shardemb.utils.types import normalize_name

NAMES = {
    "constant": {"val": 0.5},
    "dirac": {},
    "eye": {},
    "init_phases": {},
    "init_quaternions": {},
    "kaiming_normal": {},
    "kaiming_uniform": {"mode": "fan_out"},
    "normal": {"std": 2.0},
    "normal_norm": {},
    "ones": {},
    "orthogonal": {"gain": 2.0},
    "sparse": {"sparsity": 0.25},
    "trunc_normal": {},
    "uniform": {"a": -1.0},
    "uniform_norm": {},
    "xavier_normal": {},
    "XavierUniform": {"gain": 2.0},
    "xavier_normal_norm": {},
    "xavieruniformnorm": {},
    "zeros": {},
}
ROWS = 2 * BLOCK_ROWS + 501
#: where it is not (3, 2): torch's sparse and eye take one number after the rows, quaternions are
#: four
SHAPES = {"eye": (6,), "sparse": (6,), "init_quaternions": (3, 4), "dirac": (3, 2)}


def table(
    initializer, world_size: int, shape=(3, 2), seed: int = 5, rows: int = ROWS, dtype=torch.float32
) -> torch.Tensor:
    whole = torch.full((rows, torch.Size(shape).numel()), torch.nan, dtype=dtype)
    for rank in range(world_size):
        plan = RowPlan("t", rows, whole.shape[1], world_size, rank)
        shard = torch.full((plan.num_local, plan.dim), torch.nan, dtype=dtype)
        fill_rows(shard, initializer, shape, plan, seed)
        whole[plan.local_ids()] = shard
    return whole


@pytest.mark.parametrize("name", NAMES)
def test_named_tables_are_bitwise_equal_at_any_world_size(name: str) -> None:
    initializer, shape = resolve_initializer(name, NAMES[name]), SHAPES.get(name, (3, 2))
    whole = table(initializer, 1, shape)
    assert torch.isfinite(whole).all()
    for world_size in (2, 3, 4, 7):
        assert torch.equal(table(initializer, world_size, shape), whole)


def test_callables_too_and_the_global_generator_is_left_alone() -> None:
    def noise(x: torch.Tensor) -> torch.Tensor:
        return torch.rand(x.shape) + torch.randn(x.shape)

    torch.manual_seed(1)
    before = torch.get_rng_state()
    whole = table(noise, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(table(noise, 3), whole)
    assert not torch.equal(table(noise, 1, seed=6), whole)
    assert len(whole.unique()) > 0.9 * whole.numel()  # blocks do not repeat each other


def test_every_name_of_pykeens_is_here() -> None:
    pykeen_init = pytest.importorskip("pykeen.nn.init")
    assert set(pykeen_init.initializer_resolver.lookup_dict) == {
        normalize_name(name) for name in NAMES
    }


@pytest.mark.parametrize(
    "name", sorted(set(NAMES) - {"normal_norm", "xavier_normal_norm", "xavieruniformnorm"})
)
@pytest.mark.parametrize("as_callable", [False, True])
def test_same_distribution_as_pykeen(name: str, as_callable: bool) -> None:
    """Mean and spread of PyKEEN's initializer of the same name.

    Also where they depend on the number of rows.
    """
    pykeen_init = pytest.importorskip("pykeen.nn.init")
    shape = SHAPES.get(name, (3, 2))
    make = pykeen_init.initializer_resolver.lookup(name)
    theirs = partial(make, **NAMES[name])(torch.empty(ROWS, *shape)).view(ROWS, -1)
    ours = table(resolve_initializer(make if as_callable else name, NAMES[name]), 1, shape)
    if name in ("constant", "dirac", "eye", "ones", "zeros"):
        assert torch.equal(ours, theirs)
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.03, abs=1e-6)
    assert ours.mean().item() == pytest.approx(theirs.mean().item(), rel=0.03, abs=0.03)
    assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.3)


@pytest.mark.parametrize("name", ["xavier_uniform_", "xavier_normal_"])
def test_torchs_own_glorot_keeps_its_scale(name: str) -> None:
    """It counts the rows: a block alone would be sqrt(2) too large here."""
    function = getattr(torch.nn.init, name)
    assert table(function, 2).std().item() == pytest.approx(
        function(torch.empty(ROWS, 3, 2)).std().item(), rel=0.03
    )


def test_orthogonal_columns_and_zeros_of_the_whole_table() -> None:
    whole = table(resolve_initializer("orthogonal", None), 3)
    torch.testing.assert_close(whole.T @ whole, torch.eye(6), rtol=0, atol=1e-4)
    assert (table(resolve_initializer("sparse", {"sparsity": 0.25}), 3, (6,)) == 0).sum(
        0
    ).tolist() == [-(-ROWS // 4)] * 6


def test_a_whole_table_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardemb.initializers.free_bytes", lambda device: 1000)
    with pytest.raises(
        MemoryError, match=r"makes the whole table at once, \(8693, 3, 2\): about .*load_state_dict"
    ):
        table(resolve_initializer("orthogonal", None), 3)


def test_a_rank_without_rows_refuses_what_the_others_do() -> None:
    empty = RowPlan("t", 5, 6, 4, 3)
    assert empty.num_local == 0
    with pytest.raises(ValueError, match="Only tensors with 2 dimensions"):
        fill_rows(torch.empty(0, 6), resolve_initializer("eye", None), (3, 2), empty, 0)
    with pytest.raises(ValueError, match="returned shape"):
        fill_rows(torch.empty(0, 6), lambda x: x[:, :1], (3, 2), empty, 0)


def test_pretrained_rows_go_to_their_shard() -> None:
    wanted = torch.randn(501, 6)
    initializer = PretrainedInitializer(wanted.view(501, 3, 2))
    assert torch.equal(table(initializer, 4, rows=501), wanted)
    with pytest.raises(ValueError, match=r"expected \(500, 3, 2\) but got \(501, 3, 2\)"):
        table(initializer, 4, rows=500)


@pytest.mark.parametrize("rows", [BLOCK_ROWS, BLOCK_ROWS + 1])
def test_a_function_may_return_the_table(world_size: int, rows: int) -> None:
    """As in PyKEEN."""
    wanted = torch.arange(rows * 6.0).view(rows, 3, 2)
    assert torch.equal(table(lambda x: wanted, world_size, rows=rows), wanted.view(rows, 6))
    with pytest.raises(ValueError, match="returned shape"):
        table(lambda x: torch.ones(rows + 1, 3, 2), world_size, rows=rows)


def test_errors() -> None:
    with pytest.raises(KeyError, match=r"nope is an invalid. Try one of: \['constant'"):
        resolve_initializer("nope", None)
    with pytest.raises(TypeError, match="Invalid function: <class 'int'> - 3"):
        resolve_initializer(3, None)
    with pytest.raises(ValueError, match="returned shape"):
        table(lambda x: x[:, :1], 1)


# --------------------
# people's own initializers, of tables of several blocks

_KNOWN = torch.randn(10_007, 4, generator=torch.Generator().manual_seed(1))


def _seeded(x: torch.Tensor) -> torch.Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def _first_rows(x: torch.Tensor) -> torch.Tensor:
    torch.nn.init.ones_(x)
    x[:100] = _KNOWN[:100]
    return x


class _Normalized(PretrainedInitializer):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(super().__call__(x), dim=-1)


class _Calibrated:
    """Has a tensor, of another shape, and is no PretrainedInitializer."""

    tensor = 3 * torch.ones(7)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.init.constant_(x, float(self.tensor.mean()))


def _orthogonal(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.init.orthogonal_(x)


#: initializer, and the whole table that it makes
OWN: dict[str, tuple[Any, torch.Tensor | None]] = {
    "seeded": (_seeded, _seeded(torch.empty(10_007, 4))),
    "the first rows": (_first_rows, _first_rows(torch.empty(10_007, 4))),
    "a pretrained one, normalized": (
        _Normalized(_KNOWN),
        torch.nn.functional.normalize(_KNOWN, dim=-1),
    ),
    "calibrated": (_Calibrated(), 3 * torch.ones(10_007, 4)),
    "orthogonal": (_orthogonal, None),
}


def _own(rank: int, world_size: int, name: str) -> torch.Tensor:
    table = Embedding(10_007, shape=4, initializer=OWN[name][0], seed=0, initialize=True)
    return table.full_state_dict("torch")["weight"]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("name", OWN)
def test_an_initializer_of_ones_own_makes_the_whole_table(rank_pool, name: str, ranks: int) -> None:
    for rows in rank_pool(_own, ranks, name):
        if OWN[name][1] is not None:
            assert torch.equal(rows, OWN[name][1])
        else:
            assert torch.allclose(rows.T @ rows, torch.eye(4), atol=1e-4)


def test_a_marked_initializer_makes_blocks() -> None:
    seen = []

    @row_wise
    def own(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return torch.nn.init.normal_(x)

    rows = Embedding(10_007, shape=4, initializer=own, seed=0, initialize=True)(None)
    assert seen == [4096, 4096, 1815]
    assert torch.equal(rows, Embedding(10_007, shape=4, seed=0, initialize=True)(None))
