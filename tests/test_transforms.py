from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from shardemb import Embedding
from shardemb.regularizers import resolve_regularizer
from shardemb.transforms import (
    is_plain_normalize,
    probe_constrainer,
    resolve_constrainer,
    resolve_normalizer,
)

pykeen_representation = pytest.importorskip("pykeen.nn.representation")
pykeen_regularizers = pytest.importorskip("pykeen.regularizers")


@pytest.mark.parametrize(
    ("name", "kwargs", "dtype"),
    [
        ("normalize", None, torch.float32),
        ("normalize", {"p": 1, "dim": -1}, torch.complex64),
        ("complex_normalize", None, torch.complex64),
        ("clamp", {"min": -0.5, "max": 0.25}, torch.float64),
        ("clamp_norm", {"maxnorm": 1.0, "dim": -1}, torch.float32),
        ("ClampNorm", {"maxnorm": 0.1, "p": 1, "dim": -1}, torch.float32),
    ],
)
def test_constrainers_equal_pykeens(name: str, kwargs: dict | None, dtype: torch.dtype) -> None:
    rows = torch.randn(501, 7, dtype=dtype)
    ours = resolve_constrainer(name, kwargs)
    theirs = pykeen_representation.constrainer_resolver.make(name, kwargs)
    torch.testing.assert_close(ours(rows.clone()), theirs(rows.clone()), rtol=1e-6, atol=1e-7)
    assert probe_constrainer(ours, (7,), dtype, "t")


@pytest.mark.parametrize(
    "bad",
    [
        resolve_constrainer("clamp_norm", {"maxnorm": 1.0}),  # a norm over the whole table
        resolve_constrainer("clamp_norm", {"maxnorm": 1e9}),  # which no probe would reach
        lambda x: x - x.mean(),
        lambda x: F.normalize(x, dim=0),
        lambda x: x.flip(0),
        lambda x: x[:, :2],
    ],
)
def test_constrainers_that_are_not_row_wise_are_refused(bad) -> None:
    with pytest.raises(ValueError, match=r"table 'people': constrainer .*"):
        probe_constrainer(bad, (3,), torch.float32, "people")


def test_a_constrainer_that_is_not_idempotent_is_seen() -> None:
    assert not probe_constrainer(lambda x: x * 0.9, (3,), torch.float32, "t")
    assert not probe_constrainer(
        lambda x: torch.where(x > 100, x / 2, x), (3,), torch.float32, "t"
    )  # at large values only
    assert probe_constrainer(torch.abs, (3,), torch.float32, "t")


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("lp", {"p": 2.0, "weight": 0.3}),
        ("LpRegularizer", {"p": 1.0, "normalize": True}),
        ("lp", {"p": 3.0, "normalize": True}),
        ("power_sum", {"p": 3.0}),
        ("powersum", {"p": 2.0, "normalize": True}),
        ("norm_limit", {"max_norm": 0.5}),
        ("normlimit", {"max_norm": 1.5, "power_norm": False}),
        ("no", {}),
    ],
)
def test_regularizers_equal_pykeens(name: str, kwargs: dict) -> None:
    ours = resolve_regularizer(name, kwargs)
    theirs = pykeen_regularizers.regularizer_resolver.make(name, kwargs)
    x = torch.randn(5, 4, 7)
    for regularizer in (ours, theirs):
        regularizer.update(x, 2 * x)
        with torch.no_grad():
            regularizer.update(x)
    torch.testing.assert_close(ours.pop_regularization_term(), theirs.pop_regularization_term())
    assert ours.pop_regularization_term().item() == 0


def test_combined_and_orthogonality_equal_pykeens() -> None:
    x, y = torch.randn(5, 4, 7), torch.randn(5, 4, 7)
    terms = []
    for resolve in (resolve_regularizer, pykeen_regularizers.regularizer_resolver.make):
        parts = [resolve("lp", {"weight": 0.5}), resolve("power_sum", {"weight": 2.0, "p": 3.0})]
        combined = resolve("combined", {"regularizers": parts, "total_weight": 0.3})
        combined.update(x)
        orthogonal = resolve("orthogonality", {"epsilon": 0.05, "weight": 2.0})
        orthogonal.update(x, y)
        orthogonal.update(y, x)  # counts once
        with pytest.raises(ValueError, match="exactly two"):
            orthogonal.update(x)
        with pytest.raises(NotImplementedError):
            orthogonal(x)
        tracking = resolve("lp", {"parameters": [torch.nn.Parameter(y)]})
        terms.append([r.pop_regularization_term() for r in (combined, orthogonal, tracking)])
        assert resolve("no", {})(x).item() == 0
        with pytest.raises(TypeError, match="no-op"):
            resolve("combined", {"regularizers": [resolve("no", {})]})
    torch.testing.assert_close(*terms)


def test_a_regularization_term_that_nobody_took_warns() -> None:
    regularizer = resolve_regularizer("lp", {"apply_only_once": True})
    regularizer.update(torch.ones(2, 3))
    once = regularizer.regularization_term.item()
    regularizer.update(torch.ones(2, 3))
    assert regularizer.regularization_term.item() == once
    with pytest.warns(UserWarning, match="without using it"):
        regularizer.post_parameter_update()


def test_a_constrainer_that_fails_says_where() -> None:
    with pytest.raises(RuntimeError) as caught:
        probe_constrainer(
            resolve_constrainer("complex_normalize", None), (3,), torch.float32, "people"
        )
    assert "table 'people': constrainer" in caught.value.__notes__[0]


def test_names() -> None:
    assert resolve_normalizer(None, None) is None
    assert torch.allclose(
        resolve_normalizer("softmax", {"dim": -1})(torch.zeros(2, 4)), torch.tensor(0.25)
    )
    for resolve in (resolve_constrainer, resolve_normalizer):
        with pytest.raises(KeyError, match="nope is an invalid"):
            resolve("nope", None)
        with pytest.raises(TypeError, match="Invalid function"):
            resolve(3, None)
    with pytest.raises(KeyError, match="Invalid Regularizer name: nope"):
        resolve_regularizer("nope", None)
    with pytest.raises(TypeError, match="Invalid regularizer"):
        resolve_regularizer(3, None)


def test_which_normalize_is_the_plain_one() -> None:
    for kwargs in (None, {}, {"dim": -1}, {"p": 2.0, "dim": 1, "eps": 1e-12}):
        assert is_plain_normalize(resolve_constrainer("normalize", kwargs))
    for kwargs in ({"p": 1}, {"dim": 0}, {"eps": 1e-6}, {"out": None}):
        assert not is_plain_normalize(resolve_constrainer("normalize", kwargs))
    for function in (
        None,
        torch.tanh,
        partial(F.normalize, p=2.0),
        partial(F.normalize, torch.ones(1, 1)),
    ):
        assert is_plain_normalize(function) == (getattr(function, "keywords", None) == {"p": 2.0})


def _beyond(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[1000:] = torch.nn.functional.normalize(x[1000:], dim=-1)
    return x


def _mean_free(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(0)


@pytest.mark.parametrize("function", [_beyond, _mean_free])
def test_a_constrainer_that_mixes_rows_takes_the_whole_table_of_one_process(function: Any) -> None:
    for kernel in ("sparse", "fused"):
        with pytest.raises(ValueError, match=r"or on its position.*use kernel='dense' in one"):
            Embedding(5000, shape=4, constrainer=function, kernel=kernel)
    table = Embedding(5000, shape=4, constrainer=function, kernel="dense")
    before = table(None).detach().clone()
    table.post_parameter_update()
    assert torch.equal(table(None).detach(), function(before))


def _refused_on_ranks(rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match="cannot run on shards"):
        Embedding(5000, shape=4, constrainer=_beyond, kernel="dense")


def test_a_constrainer_that_mixes_rows_is_refused_on_ranks(run_ranks) -> None:
    run_ranks(_refused_on_ranks, 2)
