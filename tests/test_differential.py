"""The interface, against PyKEEN's own class in one process, over random configurations."""

import logging
from functools import partial

import pytest
import torch
from differential import configurations, differences
from hypothesis import HealthCheck, Phase, given, seed, settings
from multirank import BUGS, error_of, jobs, oracle, planted, train

from shardemb import Embedding

pykeen_nn = pytest.importorskip("pykeen.nn")

dense = partial(Embedding, gradient="dense")
logging.getLogger("pykeen").setLevel(logging.WARNING)


def check(config: dict) -> None:
    found = differences(config, dense, pykeen_nn.Embedding)
    assert not found, "\n".join([str(config), *found])


common = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


@seed(20261122)
@settings(common, max_examples=500)
@given(configurations())
def test_no_difference_to_pykeen(config: dict) -> None:
    check(config)


def check_job(job: dict, rank_pool, plant: str | None = None) -> None:
    expected = oracle(job, pykeen_nn.Embedding)
    alone = train(0, 1, job)
    for got in rank_pool(train, job["world_size"], job, plant):
        assert got.shape == expected.shape
        assert error_of(got, expected) <= 1e-6, f"{job}\ngot {got}\nexpected {expected}"
        # what torch itself computes on a rank's part (a norm, sinh) may differ in the last bit from the same on the whole batch
        ours_alone = job["normalizer"][0] is None and job["reduction"] == "sum" and job["clip"] is None
        if "sgd" in job["optimizer"].lower() and ours_alone:
            assert torch.equal(got, alone), f"{job}\nnot bitwise what one process gives"


@seed(20261122)
@settings(common, max_examples=150)
@given(job=jobs())
def test_no_difference_between_numbers_of_ranks(rank_pool, job: dict) -> None:
    check_job(job, rank_pool)


def found_by(test, bug: str) -> None:
    """Run a hypothesis test without shrinking; the planted bug must make it fail."""
    with planted(bug), pytest.raises(AssertionError):
        settings(common, max_examples=100, phases=[Phase.generate])(seed(1)(test))()


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found_in_one_process(bug: str) -> None:
    found_by(given(configurations())(lambda config: check(config)), bug)


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
        "coordinated": True,
        "clip": None,
        "steps": [[[9, 0, 5]], [[4, 4, 4]]],
        "seed": 3,
    }
    check_job(job, rank_pool)
    with pytest.raises(AssertionError, match="expected"):
        check_job(job, rank_pool, bug)
