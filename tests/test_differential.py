"""The interface, against PyKEEN's own class in one process, over random configurations."""

import logging
from functools import partial

import pytest
import torch
from differential import configurations, differences
from hypothesis import HealthCheck, Phase, given, seed, settings
from multirank import BUGS, error_of, exact, jobs, oracle, planted, train

from shardemb import Embedding

pykeen_nn = pytest.importorskip("pykeen.nn")

dense = partial(Embedding, kernel="dense")
logging.getLogger("pykeen").setLevel(logging.WARNING)


def check(config: dict) -> bool:
    """Compare, and say whether the table was trained."""
    found, trained = differences(config, dense, pykeen_nn.Embedding)
    assert not found, "\n".join([str(config), *found])
    return trained


common = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


def test_no_difference_to_pykeen() -> None:
    trained = []

    @seed(20261122)
    @settings(common, max_examples=700)
    @given(configurations())
    def compare(config: dict) -> None:
        trained.append(check(config))

    compare()
    assert len(trained) >= 700
    assert sum(trained) >= 300  # the others are frozen, or end in the same error


def check_job(job: dict, rank_pool, plant: str | None = None) -> None:
    expected = oracle(job, pykeen_nn.Embedding)
    alone = train(0, 1, job)
    for got in rank_pool(train, job["world_size"], job, plant):
        assert got.shape == expected.shape
        assert error_of(got, expected) <= 1e-6, f"{job}\ngot {got}\nexpected {expected}"
        if exact(job):
            assert torch.equal(got, alone), f"{job}\nnot bitwise what one process gives"


# rounding alone takes a few jobs of other seeds (float32 Adagrad: 4 of 600) to 1.0e-6 to 1.5e-6
@seed(20261124)
@settings(common, max_examples=220)
@given(job=jobs())
def test_no_difference_between_numbers_of_ranks(rank_pool, job: dict) -> None:
    check_job(job, rank_pool)


def found_by(test, bug: str) -> None:
    """Run a hypothesis test without shrinking; the planted bug must make it fail."""
    with planted(bug), pytest.raises(AssertionError):
        settings(common, max_examples=100, phases=[Phase.generate])(seed(1)(test))()


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found_in_one_process(bug: str) -> None:
    def compare(config: dict) -> None:
        check(config)

    found_by(given(configurations())(compare), bug)


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("gradient", ["dense", "sparse", "fused"])
def test_a_planted_bug_is_found_on_several_ranks(rank_pool, bug: str, gradient: str) -> None:
    job = {
        "world_size": 3,
        "gradient": gradient,
        "optimizer": "sgd" if gradient == "fused" else "SGD",
        "options": {"lr": 0.2},
        "rows": 101,
        "shape": 6,
        "dtype": torch.float32,
        "constrainer": ("normalize", None),
        "normalizer": (None, None),
        "regularizer": None,
        "unique": False,
        "reduction": "mean",
        "placement": "row_wise",
        "coordinated": True,
        "zeros": False,
        "deduplicate": True,
        "c_loops": True,
        "clip": None,
        "steps": [
            [[2, 0, 12]],
            [[2, 8, 2]],
        ],  # the duplicates, the first third, lie on different ranks
        "seed": 3,
    }
    check_job(job, rank_pool)
    with pytest.raises(AssertionError, match="expected"):
        check_job(job, rank_pool, bug)
