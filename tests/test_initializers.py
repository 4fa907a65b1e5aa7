import pytest
import torch

from shardemb.initializers import BLOCK_ROWS, PretrainedInitializer, fill_rows, resolve_initializer

NAMES = {
    "constant": {"val": 0.5},
    "init_phases": {},
    "kaiming_normal": {},
    "kaiming_uniform": {},
    "normal": {"std": 2.0},
    "normal_norm": {},
    "ones": {},
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


def table(initializer, world_size: int, shape=(3, 2), seed: int = 5, rows: int = ROWS, dtype=torch.float32) -> torch.Tensor:
    block, shards, dim = -(-rows // world_size), [], torch.Size(shape).numel()
    for rank in range(world_size):
        first, last = min(rank * block, rows), min((rank + 1) * block, rows)
        shard = torch.full((last - first, dim), torch.nan, dtype=dtype)
        fill_rows(shard, initializer, shape, first, rows, seed)
        shards.append(shard)
    return torch.cat(shards)


@pytest.mark.parametrize("name", NAMES)
def test_named_tables_are_bitwise_equal_at_any_world_size(name: str) -> None:
    initializer = resolve_initializer(name, NAMES[name])
    whole = table(initializer, 1)
    assert torch.isfinite(whole).all()
    for world_size in (2, 3, 4, 7):
        assert torch.equal(table(initializer, world_size), whole)


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


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"normal_norm", "xavier_normal_norm", "xavieruniformnorm"}))
def test_same_distribution_as_pykeen(name: str) -> None:
    """Mean and spread of PyKEEN's initializer of the same name."""
    pykeen_init = pytest.importorskip("pykeen.nn.init")
    theirs = pykeen_init.initializer_resolver.make(name, NAMES[name])(torch.empty(ROWS, 3, 2)).view(ROWS, -1)
    ours = table(resolve_initializer(name, NAMES[name]), 1)
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.03, abs=1e-6)
    assert ours.mean().item() == pytest.approx(theirs.mean().item(), rel=0.03, abs=0.03)
    assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.3)


def test_pretrained_rows_go_to_their_shard() -> None:
    wanted = torch.randn(501, 6)
    initializer = PretrainedInitializer(wanted.view(501, 3, 2))
    assert torch.equal(table(initializer, 4, rows=501), wanted)
    with pytest.raises(ValueError, match=r"expected \(500, 3, 2\) but got \(501, 3, 2\)"):
        table(initializer, 4, rows=500)


def test_errors() -> None:
    with pytest.raises(KeyError, match=r"nope is an invalid. Try one of: \['constant'"):
        resolve_initializer("nope", None)
    with pytest.raises(ValueError, match="depend on the whole table"):
        resolve_initializer("orthogonal", None)
    with pytest.raises(TypeError, match="Invalid function: <class 'int'> - 3"):
        resolve_initializer(3, None)
    with pytest.raises(ValueError, match="returned shape"):
        table(lambda x: x[:, :1], 1)
