"""Ray's workers on nodes that go and come, and clusters that nobody has asked for."""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from test_ray import _records, _train, whole  # noqa: F401  # a fixture

from shardemb.launch import ray as ray_launcher
from shardemb.launch.ray import RayOptions, run_on_ray
from shardemb.utils import run_metrics

pytestmark = pytest.mark.ray


class _Slow:
    """A listener that lets the test take part.

    Rank 0 tells where it is, and waits there for another number of ranks.
    """

    def __init__(self, output: Path) -> None:
        self.output, self.ranks = output, dist.get_world_size()
        if dist.get_rank() == 0:
            with (output / "ranks").open("a") as file:
                file.write(f"{self.ranks}\n")

    def __call__(self, kind: str, step: int, figures: dict[str, Any]) -> None:
        attempts = len((self.output / "ranks").read_text().splitlines())
        if attempts < 3 and figures["epoch"] >= 2 * attempts:
            (self.output / f"waits-{attempts}").touch()
            time.sleep(120)  # until Ray Train ends this process


def test_a_cluster_that_is_not_there_is_missed_at_once() -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{one.getsockname()[1]}"  # nobody listens
    start = time.monotonic()
    with (
        pytest.raises(ConnectionError, match=f"Ray at '{address}': .*refused: is the cluster up"),
        ray_launcher.connected(address),
    ):
        pass
    assert time.monotonic() - start < 30  # Ray tries for minutes


def _train_slowly(output: Path) -> dict[str, float]:
    run_metrics.listen(_Slow(output))
    return _train(output)


def _into(done: list, call: Callable[[], Any]) -> None:
    try:
        done.append(call())
    except BaseException as error:
        done.append(error)


def _wait_for(path: Path, thread: threading.Thread, done: list, seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert thread.is_alive(), f"the job has ended: {done}"
        assert time.monotonic() < deadline, f"no {path.name} after {seconds} s"
        time.sleep(0.1)


def _look_often(ray: Any) -> None:
    """Start the actor by which Ray Train learns what nodes there are, before Ray Train does.

    It looks every 20 s.
    """
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        _AutoscalingCoordinatorActor,
    )

    class Often(_AutoscalingCoordinatorActor):
        TICK_INTERVAL_S = 1

    name, head = "AutoscalingCoordinator", {"node:__internal_head__": 0.001}
    ray.remote(num_cpus=0)(Often).options(
        name=name, namespace=name, resources=head, lifetime="detached"
    ).remote()


def test_a_job_goes_on_with_fewer_nodes_and_with_more(
    whole: tuple[Path, dict],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two raylets, one of them is lost, and another one comes.

    The rows go from 2 ranks to 1 and back.
    """
    from ray.cluster_utils import Cluster

    monkeypatch.setenv(
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "6"
    )  # for which ranks wait for a node that is lost
    monkeypatch.setenv("RAY_health_check_period_ms", "500")  # by which a lost node is missed
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(sys.path)
    )  # for the nodes' workers to find this module
    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    try:
        second, done = nodes.add_node(num_cpus=1), []
        with ray_launcher.connected(nodes.address, log_to_driver=False) as ray:
            _look_often(ray)
            elastic = RayOptions(address=None, resize_seconds=1.0)
            options = {"options": elastic, "storage": tmp_path / "storage", "timeout_s": 20}
            call = partial(run_on_ray, _train_slowly, (1, 2), tmp_path, **options)
            thread = threading.Thread(target=_into, args=(done, call), daemon=True)
            thread.start()
            _wait_for(tmp_path / "waits-1", thread, done)
            nodes.remove_node(second, allow_graceful=False)
            _wait_for(tmp_path / "waits-2", thread, done)
            nodes.add_node(num_cpus=1)  # which works in the main thread alone
            thread.join(100)
            assert not thread.is_alive()
        monkeypatch.setenv("RAY_ADDRESS", nodes.address)
        with ray_launcher.connected("local", cpus=1) as own:  # it is not taken by accident
            assert own.get_runtime_context().gcs_address != nodes.address
    finally:
        nodes.shutdown()
    assert (tmp_path / "ranks").read_text().split() == ["2", "1", "2"]
    assert done[0] == pytest.approx(whole[1], abs=1e-4)
    assert [record["step"] for record in _records(tmp_path)] == [
        record["step"] for record in _records(whole[0])
    ]
