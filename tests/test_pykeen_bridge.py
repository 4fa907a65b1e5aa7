"""Inside PyKEEN.

Its models, loops, evaluators and files with our tables, against the same with its own.
"""

import copy
import gc
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pykeen")
logging.getLogger("pykeen").setLevel(logging.ERROR)
logging.getLogger("torch_max_mem").setLevel(logging.ERROR)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

#: the models of PyKEEN whose tables may be exchanged, without the slowest (ConvKB, NTN, TuckER:
#: half a minute each)
MODELS = """AutoSF BoxE ComplEx ConvE CP CrossE
DistMA DistMult ERMLP ERMLPE HolE KG2E MuRE PairRE ProjE QuatE
RESCAL RotatE SE SimplE TorusE TransD TransE TransF TransH TransR"""


@pytest.fixture(scope="module", autouse=True)
def no_garbage() -> Iterator[None]:
    """PyKEEN collects garbage after each epoch.

    It need not look through all that is imported (0.2 s).
    """
    import pykeen.pipeline  # noqa: F401
    import torch._dynamo  # noqa: F401  # which torch.optim imports

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def tables(model: Any) -> list[Any]:
    return [*model.entity_representations, *model.relation_representations]


def build(name: str, table: Any) -> tuple[Any, Any]:
    """Nations, and a model on one class of tables; None for PyKEEN's own."""
    from pykeen.datasets import Nations
    from pykeen.models import model_resolver

    data = Nations()
    chosen = (
        {"entity_representations": table, "relation_representations": table}
        if table is not None
        else {}
    )
    return data, model_resolver.make(name, triples_factory=data.training, random_seed=1, **chosen)


def train(
    data: Any, model: Any, loop: str, optimizer: Any, start: dict[str, Any] | None = None
) -> list[float]:
    """Train two epochs, from a state if it is given; return the losses."""
    from pykeen.training import training_loop_resolver

    trainer = training_loop_resolver.make(
        loop,
        model=model,
        triples_factory=data.training,
        optimizer=optimizer,
        automatic_memory_optimization=False,
    )
    reset = model.reset_parameters_

    def reset_then_load() -> Any:
        reset()  # draws other random numbers for torch.nn.Embedding than for ours
        model.load_state_dict(start or model.state_dict())
        torch.manual_seed(3)
        return model

    model.reset_parameters_ = reset_then_load
    try:
        return trainer.train(
            triples_factory=data.training, num_epochs=2, batch_size=512, use_tqdm=False
        )
    finally:
        del model.reset_parameters_


def evaluate(data: Any, model: Any) -> dict[str, float]:
    from pykeen.evaluation import RankBasedEvaluator

    results = RankBasedEvaluator().evaluate(
        model,
        data.testing.mapped_triples,
        additional_filter_triples=[data.training.mapped_triples],
        batch_size=64,
        use_tqdm=False,
    )
    return results.to_flat_dict()


def options(**more: Any) -> Any:
    from shardemb.pykeen import ShardedEmbedding

    return ShardedEmbedding.with_options(seed=0, **more)


@pytest.mark.parametrize("name", MODELS.split())
def test_every_model_trains_bit_by_bit_as_with_its_own_tables(name: str) -> None:
    from torch.optim import Adam

    outcomes = []
    start = copy.deepcopy(build(name, options())[1].reset_parameters_().state_dict())
    for table in (options(), None):
        data, model = build(name, table)
        loop = "lcwa" if name in ("DistMult", "RotatE") else "slcwa"
        losses = train(data, model, loop, Adam(model.parameters(), lr=0.01), start)
        outcomes.append((losses, model.state_dict(), evaluate(data, model)))
    (losses, state, metrics), (expected_losses, expected_state, expected_metrics) = outcomes
    assert losses == expected_losses
    assert list(state) == list(expected_state)
    for key, value in expected_state.items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=0, equal_nan=True)
    assert metrics == expected_metrics


@pytest.mark.parametrize(
    ("loop", "optimizer"), [("slcwa", "SGD"), ("slcwa", "Adagrad"), ("lcwa", "SGD")]
)
def test_sparse_gradients_train_the_same(optimizer: str, loop: str) -> None:
    """TransE constrains its entities: touched rows alone must do."""
    weights = []
    start = copy.deepcopy(build("TransE", options())[1].reset_parameters_().state_dict())
    for table in (options(kernel="sparse"), None):
        data, model = build("TransE", table)
        train(
            data, model, loop, getattr(torch.optim, optimizer)(model.parameters(), lr=0.05), start
        )
        weights.append([part._embeddings.weight.detach() for part in tables(model)])
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dataset", ["umls", "kinships"])
def test_pipeline_with_early_stopping(dataset: str) -> None:
    from pykeen.datasets import get_dataset
    from pykeen.pipeline import pipeline

    def seeded(
        x: torch.Tensor,
    ) -> torch.Tensor:  # its PretrainedInitializer's tensor is overwritten by the second reset
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(0))

    data = get_dataset(dataset=dataset)
    start = {"entity_initializer": seeded, "relation_initializer": seeded}
    outcomes = []
    for table in (options(), None):
        chosen = (
            {"entity_representations": table, "relation_representations": table}
            if table is not None
            else {}
        )
        result = pipeline(
            dataset=data,
            model="ComplEx",
            model_kwargs={"embedding_dim": 16, **start, **chosen},
            training_loop="lcwa",
            optimizer="SGD",
            optimizer_kwargs={"lr": 20.0},
            training_kwargs={"num_epochs": 12, "batch_size": 10_000, "use_tqdm": False},
            stopper="early",
            stopper_kwargs={
                "frequency": 1,
                "patience": 1,
                "relative_delta": 0.05,
                "evaluation_batch_size": 256,
            },
            evaluation_kwargs={"use_tqdm": False, "batch_size": 256},
            random_seed=5,
            device="cpu",
        )
        assert result.stopper.results  # it has looked
        outcomes.append(
            (result.losses, result.stopper.results, result.metric_results.get_metric("mrr"))
        )
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-5)  # one batch, in another order


def test_batch_size_search_changes_nothing() -> None:
    """Automatic memory optimization runs forward and backward without a step."""
    from pykeen.training import SLCWATrainingLoop

    data, model = build("TransE", options(kernel="sparse"))
    model.reset_parameters_()
    before = copy.deepcopy(model.state_dict())
    loop = SLCWATrainingLoop(
        model=model,
        triples_factory=data.training,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
    )
    loop.train(
        triples_factory=data.training,
        num_epochs=1,
        batch_size=64,
        only_size_probing=True,
        use_tqdm=False,
    )
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("gradient", ["dense", "sparse"])
def test_copies_pickles_and_files(gradient: str, tmp_path: Path) -> None:
    from pykeen.nn import Embedding

    from shardemb.pykeen import ShardedEmbedding

    data, model = build("TransE", options(kernel=gradient))
    train(data, model, "slcwa", torch.optim.SGD(model.parameters(), lr=0.1))
    batch = data.testing.mapped_triples
    expected = model.predict_hrt(batch)
    model.save_state(tmp_path / "model.pkl")
    loaded = build("TransE", options(kernel=gradient))[1]
    loaded.load_state(tmp_path / "model.pkl")
    theirs = build("TransE", Embedding)[1]
    theirs.load_state(tmp_path / "model.pkl")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded, theirs):
        assert torch.equal(other.predict_hrt(batch), expected)
    other = pickle.loads(pickle.dumps(model))
    assert type(other.entity_representations[0]) is ShardedEmbedding
    train(data, other, "slcwa", torch.optim.SGD(other.parameters(), lr=0.1))
    assert torch.equal(model.predict_hrt(batch), expected)
    norms = other.entity_representations[0](None).norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))  # the copy constrains its own rows


def test_by_name_with_an_optimizer_of_ours_and_a_regularizer() -> None:
    from pykeen.pipeline import pipeline

    import shardemb.pykeen  # noqa: F401  # registers the name

    result = pipeline(
        dataset="nations",
        model="DistMult",
        model_kwargs={
            "entity_representations": options(kernel="sparse", sharding="replicated"),
            "relation_representations": "ShardedEmbedding",
            "regularizer": "lp",
            "regularizer_kwargs": {"weight": 0.1},
        },
        optimizer="RowWiseAdagrad",
        training_kwargs={"num_epochs": 3, "use_tqdm": False, "use_tqdm_batch": False},
        evaluation_kwargs={"use_tqdm": False},
        random_seed=0,
        device="cpu",
    )
    assert result.losses[-1] < result.losses[0]
    regularizer = result.model.relation_representations[0].regularizer
    assert type(regularizer).__module__ == "pykeen.regularizers"
    assert not regularizer.updated  # the model took the term


def test_an_er_model_with_monte_carlo_dropout() -> None:
    """PyKEEN's documentation of Embedding.

    In training mode one triple gets another score each time.
    """
    from pykeen.datasets import Nations
    from pykeen.models import ERModel

    from shardemb.pykeen import ShardedEmbedding

    model = ERModel(
        triples_factory=Nations().training,
        interaction="distmult",
        entity_representations=ShardedEmbedding,
        entity_representations_kwargs={"shape": 32, "dropout": 0.1},
        relation_representations="sharded_embedding",
        relation_representations_kwargs={"shape": 32},
    )
    triple = torch.tensor([[3, 1, 2]])
    model.train()
    assert len({model.score_hrt(triple).item() for _ in range(10)}) == 10
    model.eval()
    assert len({model.score_hrt(triple).item() for _ in range(10)}) == 1


def test_our_checkpoints_take_the_model(tmp_path: Path) -> None:
    from shardemb import checkpoint

    data, model = build("ComplEx", options(kernel="sparse"))
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    train(data, model, "slcwa", optimizer)
    path = checkpoint.save(tmp_path, 1, model)
    other = build("ComplEx", options(kernel="sparse"))[1]
    checkpoint.load(path, other)
    batch = data.testing.mapped_triples
    assert torch.equal(other.predict_hrt(batch), model.predict_hrt(batch))


def test_pykeen_finds_our_optimizers_and_can_still_be_imported() -> None:
    """Its class_resolver takes every subclass of Optimizer by name.

    And fails on two of one name.
    """
    import subprocess
    import sys

    for first in ("shardemb.optim", "pykeen.optimizers"):
        code = (
            f"import {first}, shardemb.pykeen, pykeen.optimizers as o;"
            " print(o.optimizer_resolver.lookup('RowWiseAdagrad'))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert "shardemb.optim.RowWiseAdagrad" in done.stdout, done.stderr


def test_options() -> None:
    from shardemb.pykeen import ShardedEmbedding

    chosen = ShardedEmbedding.with_options(kernel="sparse", name="people").with_options(
        name="entity"
    )
    assert issubclass(chosen, ShardedEmbedding)
    table = chosen(max_id=5, shape=3)
    assert type(table) is ShardedEmbedding
    assert (table.kernel, table.name, table.unique) == ("sparse", "entity", False)
    assert chosen(max_id=5, shape=3, name="given").name == "given"
    mine = type("Mine", (chosen,), {"twice": lambda self, ids: 2 * self(ids)})(max_id=5, shape=3)
    assert (mine.kernel, mine.twice(torch.tensor([1])).shape) == (
        "sparse",
        (1, 3),
    )  # a subclass stays one
    frozen = chosen.from_pretrained(torch.ones(5, 3))
    assert (frozen.kernel, frozen.max_id) == ("sparse", 5)
    assert ShardedEmbedding(max_id=5, shape=3).kernel == "dense"
    with pytest.raises(TypeError, match="unexpected keyword argument 'gradients'"):
        ShardedEmbedding.with_options(gradients="sparse")
    with pytest.raises(ValueError, match="use kernel='sparse' with"):
        ShardedEmbedding(max_id=5, shape=3, kernel="fused")
