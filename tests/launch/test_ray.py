"""The same function on Ray's workers.

Real clusters on this machine, workers that are killed or stopped, nodes that go.
"""

import atexit
import os
import shutil
import signal
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ring_graph import SAMPLING, graph

from shardemb.exceptions import WorkerError
from shardemb.kge import ModelConfig, TrainingConfig, train
from shardemb.launch import ray as ray_launcher
from shardemb.launch.config import LaunchConfig, run
from shardemb.launch.local import run_local
from shardemb.launch.ray import RayOptions, run_on_ray
from shardemb.utils import run_metrics

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One Ray of this module's own."""
    with ray_launcher.connected("local", cpus=4) as module:
        yield module


EPOCHS = 6
#: the Ray that this process is connected to
HERE = RayOptions(address=None)


@cache
def _whole() -> tuple[Path, dict[str, float]]:
    folder = Path(tempfile.mkdtemp(prefix="shardemb-whole-"))
    atexit.register(shutil.rmtree, folder)
    return folder, run_local(_train, 2, folder)


@pytest.fixture(scope="module")
def whole() -> tuple[Path, dict[str, float]]:
    """The run folder and the result of local ranks that nothing happened to."""
    return _whole()


def _records(run: Path) -> list[dict[str, Any]]:
    return run_metrics.read_metrics(run / "metrics.jsonl")


def _train(output: Path, trouble: str = "") -> dict[str, float]:
    """Train a small graph; rank 1 meets trouble once, in its 7th step."""
    if trouble:
        run_metrics.listen(_Trouble(output / "trouble", trouble))
    _, result = train(
        graph(),
        ModelConfig(dim=12, init_std=0.1),
        sampling=SAMPLING,
        training=TrainingConfig(epochs=EPOCHS, validate_every=2),
        output=output,
        resume=True,
        progress=False,
    )
    return result


class _Trouble:
    """A listener that signals its own process after the second epoch, if nobody has before."""

    def __init__(self, marker: Path, number: str) -> None:
        self.marker, self.number = marker, signal.Signals[number]

    def __call__(self, kind: str, step: int, figures: dict[str, Any]) -> None:
        if dist.get_rank() == 1 and figures["epoch"] >= 2 and not self.marker.exists():
            self.marker.write_text(str(time.time()))
            os.kill(os.getpid(), self.number)


def test_the_same_job_on_ray_and_on_local_ranks(
    ray: Any, whole: tuple[Path, dict], tmp_path: Path
) -> None:
    """Its figures reach Ray Train and Prometheus too."""
    got = run_on_ray(_train, 2, tmp_path / "ray", options=HERE, storage=tmp_path / "storage")
    assert got == pytest.approx(whole[1], abs=1e-6)
    assert [record["kind"] for record in _records(tmp_path / "ray")] == [
        record["kind"] for record in _records(whole[0])
    ]
    (node,) = ray.nodes()
    url, text, deadline = f"http://127.0.0.1:{node['MetricsExportPort']}", "", time.monotonic() + 30
    while "ray_shardemb_test_mrr" not in text and time.monotonic() < deadline:
        with urllib.request.urlopen(url, timeout=5) as answer:
            text = answer.read().decode()
        time.sleep(0.5)
    for name in (
        "triples_per_second",
        "step_seconds",
        "exchange_bytes",
        "touched_rows",
        "imbalance",
        "memory_bytes",
        "valid_mrr",
    ):
        assert f"ray_shardemb_{name}{{" in text
    assert 'rank="1"' in text


def _raise(kind: str, folder: Path) -> None:
    with (folder / f"attempts-{dist.get_rank()}").open("a") as file:
        file.write("x")
    if dist.get_rank() == 1:
        raise {"ValueError": ValueError, "OSError": OSError}[kind]("bad luck")
    dist.barrier()


def test_what_would_come_again_ends_the_job_at_once(ray: Any, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="rank 1: ValueError: bad luck") as caught:
        run_on_ray(
            _raise,
            2,
            "ValueError",
            tmp_path,
            options=HERE,
            storage=tmp_path / "storage",
            timeout_s=20,
        )
    assert (caught.value.rank, caught.value.error) == (1, "ValueError")
    assert (tmp_path / "attempts-1").read_text() == "x"


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_job_goes_on_without_loss_when_a_worker_is_killed_or_stops(
    ray: Any, whole: tuple[Path, dict], tmp_path: Path, how: str
) -> None:
    got = run_on_ray(
        _train, 2, tmp_path / "run", how, options=HERE, storage=tmp_path / "storage", timeout_s=5
    )
    assert (tmp_path / "run/trouble").exists()
    assert got == pytest.approx(whole[1], abs=1e-6)
    records, expected = _records(tmp_path / "run"), _records(whole[0])
    assert [record["step"] for record in records] == [record["step"] for record in expected]
    assert [record.get("loss") for record in records] == pytest.approx(
        [record.get("loss") for record in expected], abs=1e-5
    )


def _die() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_a_worker_that_dies_too_often_ends_the_job(ray: Any, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="rank 1: died: ") as caught:
        run_on_ray(
            _die,
            2,
            options=replace(HERE, max_failures=0),
            storage=tmp_path / "storage",
            timeout_s=20,
        )
    assert (caught.value.rank, caught.value.error) == (1, "died")


def test_a_cluster_without_room_is_said_so(ray: Any) -> None:
    start, impatient = time.monotonic(), replace(HERE, wait_seconds=0)
    with pytest.raises(
        ValueError,
        match=r"got 5 workers of 1 CPU each \(PACK\), expected at most 4: .* 1 nodes have 4 CPU",
    ):
        run_on_ray(_train, 5, options=impatient)
    with pytest.raises(ValueError, match="got 1 workers of 1 CPU, 1 GPU each"):
        run_on_ray(_train, 1, options=impatient, gpus=True)
    with pytest.raises(ValueError, match="got 1 workers of 2 gold, 1 CPU each"):
        run_on_ray(_train, (1, 3), options=replace(impatient, resources_per_worker={"gold": 2}))
    assert time.monotonic() - start < 20


def test_nobody_attaches_to_a_strange_cluster(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(ValueError, match="this process is connected to Ray already"),
        ray_launcher.connected("local"),
    ):
        pass
    for address in ("ray://127.0.0.1:10001", "head", "", "127.0.0.1:x"):
        with pytest.raises(ValueError, match="expected 'local', 'auto' on a node"):
            LaunchConfig(address=address)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_rank_with_a_gpu(tmp_path: Path) -> None:
    """NCCL, one rank; a Ray of its own, which knows of GPUs."""
    assert run(_backend, LaunchConfig(launcher="ray"), gpus=True, storage=tmp_path) == [
        "nccl",
        "cuda:0",
    ]


def _backend() -> list[str]:
    return [dist.get_backend(), str(torch.zeros(1, device="cuda").device)]
