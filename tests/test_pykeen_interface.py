"""The interface, against PyKEEN's own classes in one process."""

import inspect
import warnings

import numpy as np
import pytest
import torch
from differential import built_in

import shardemb.regularizers
from shardemb import Embedding

pykeen_nn = pytest.importorskip("pykeen.nn")


def pair(**kwargs):
    """Make PyKEEN's table and ours with the same rows."""
    theirs = pykeen_nn.Embedding(**kwargs)
    ours = Embedding(kernel="dense", **kwargs)
    theirs.reset_parameters()
    ours._load_stored_rows({"weight": theirs._embeddings.weight.detach()})
    return ours, theirs


def test_state_dicts_go_both_ways_and_loaded_rows_are_constrained() -> None:
    kwargs = {"max_id": 11, "shape": 4, "constrainer": "normalize"}
    ours, theirs = Embedding(**kwargs), pykeen_nn.Embedding(**kwargs)
    ours.post_parameter_update()
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(None), theirs(None))
    ours.post_parameter_update(), theirs.post_parameter_update()
    torch.testing.assert_close(ours(None), theirs(None), rtol=1e-6, atol=1e-7)
    theirs.load_state_dict(ours.state_dict())


def test_regularizers_by_class_and_instance() -> None:
    from pykeen.regularizers import LpRegularizer

    terms = []
    for regularizer in (
        LpRegularizer,
        LpRegularizer(weight=1.0),
        shardemb.regularizers.LpRegularizer,
        "lp",
    ):
        ours = Embedding(11, shape=4, regularizer=regularizer)
        ours.load_state_dict({"weight": torch.arange(44.0).view(11, 4)}, strict=False)
        ours(torch.tensor([1, 2]))
        terms.append(ours.regularizer.pop_regularization_term())
    torch.testing.assert_close(terms, [terms[0]] * 4)


@pytest.mark.parametrize("cls", [shardemb.Representation, pykeen_nn.Representation])
def test_a_representation_of_ones_own(cls: type) -> None:
    class Squares(cls):
        def _plain_forward(self, indices: torch.Tensor | None = None) -> torch.Tensor:
            calls.append(indices)
            ids = torch.arange(self.max_id) if indices is None else indices
            return ids.unsqueeze(-1).square().float()

    calls: list = []
    squares = Squares(4, shape=1, normalizer=torch.sqrt)
    assert squares.unique  # each id is computed once
    assert squares(torch.tensor([[3, 3], [1, 3]])).squeeze(-1).tolist() == [[3, 3], [1, 3]]
    assert calls[0].tolist() == [1, 3]
    assert squares(None).shape == (4, 1)
    with pytest.raises(TypeError, match="abstract"):
        cls(4)


def test_signatures() -> None:
    """Every argument of PyKEEN's, in its order, with its default.

    Ours come after, by keyword only.
    """
    for ours, theirs in (
        (Embedding, pykeen_nn.Embedding),
        (shardemb.Representation, pykeen_nn.Representation),
    ):
        mine = inspect.signature(ours.__init__).parameters
        for name, parameter in inspect.signature(theirs.__init__).parameters.items():
            assert mine[name].default == parameter.default
            assert mine[name].kind == parameter.kind
        extra = [
            p for p in mine.values() if p.name not in inspect.signature(theirs.__init__).parameters
        ]
        assert all(p.kind == p.KEYWORD_ONLY for p in extra)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"shape": 6},
        {"embedding_dim": 1},
        {"shape": (3, 2), "constrainer": "clamp", "constrainer_kwargs": {"min": -0.3, "max": 0.3}},
        {"shape": 5, "dtype": torch.complex64, "constrainer": "complex_normalize"},
        {
            "shape": 5,
            "dtype": torch.float64,
            "normalizer": "normalize",
            "normalizer_kwargs": {"dim": -1},
        },
        {"shape": 5, "normalizer": "normalize"},  # along dimension 1 of what was looked up
        {"shape": 5, "normalizer": "normalize", "unique": True},
        {
            "shape": 4,
            "regularizer": "lp",
            "regularizer_kwargs": {"weight": 0.1, "p": 2.0},
            "unique": True,
        },
        {
            "shape": 4,
            "constrainer": "normalize",
            "initializer": "xavier_uniform",
            "trainable": False,
        },
        {"shape": 4, "dropout": 0.5},
        {"shape": ()},
    ],
)
@pytest.mark.parametrize("size", [(7,), (4, 3), (0,), (2, 1, 3)])
def test_no_difference_to_pykeen(kwargs: dict, size: tuple) -> None:
    ours, theirs = pair(max_id=11, **kwargs)
    optimizers = [
        torch.optim.Adam(list(m.parameters()) or [torch.zeros(1)], lr=0.1) for m in (ours, theirs)
    ]
    for step in range(3):
        ids = torch.randint(11, size, generator=torch.Generator().manual_seed(step))
        results = []
        for module, optimizer in zip((ours, theirs), optimizers, strict=True):
            torch.manual_seed(step)
            out = module(ids)
            loss = out.abs().square().sum() + (
                0 if module.regularizer is None else module.regularizer.pop_regularization_term()
            )
            optimizer.zero_grad()
            if loss.requires_grad:
                loss.sum().backward()
                optimizer.step()
            module.post_parameter_update()
            results.append((out, loss))
        assert results[0][0].shape == (*size, *theirs.shape)
        assert results[0][0].is_contiguous() == results[1][0].is_contiguous()
        torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7, equal_nan=True)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(None), theirs(None), rtol=1e-6, atol=1e-7)
    assert ours.max_id == theirs.max_id
    assert ours.shape == theirs.shape
    assert ours.device == theirs.device


@pytest.mark.parametrize(
    "kwargs",
    [
        {"shape": 3},
        {"max_id": 3, "num_embeddings": 4, "shape": 3},
        {"max_id": 3, "num_embeddings": 3, "shape": 3},
        {"num_embeddings": 3, "shape": 3},
        {"max_id": 3},
        {"max_id": 3, "shape": 3, "embedding_dim": 3},
        {"max_id": 3, "shape": 3.0},
        {"max_id": 3, "shape": np.int64(3)},
        {"max_id": 3, "shape": np.array([3])},
        {"max_id": np.int64(3), "shape": (np.int64(3), 2)},
        {"max_id": 3, "embedding_dim": np.int64(3)},
        {"max_id": 3, "shape": 3, "initializer": "nope"},
        {"max_id": 3, "shape": 3, "initializer": 3},
        {"max_id": 3, "shape": 3, "constrainer": "nope"},
        {"max_id": 3, "shape": 3, "normalizer": "nope"},
        {"max_id": 3, "shape": 3, "regularizer": "nope"},
        {"max_id": 3, "shape": 3, "dropout": 1.5},
        {"max_id": 3, "shape": 3, "nope": 1},
        {"max_id": 0, "shape": 3},
        {"max_id": 3, "shape": 0},
    ],
)
def test_errors_and_warnings_are_pykeens(kwargs: dict) -> None:
    outcomes = []
    for make in (Embedding, pykeen_nn.Embedding):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                make(**kwargs)
                error = None
            except Exception as raised:
                error = built_in(type(raised))
        outcomes.append((error, {w.category for w in caught if "max_id" in str(w.message)}))
    assert outcomes[0] == outcomes[1]
