"""SIGTERM, as Slurm, spot machines and Kubernetes send it, and kills in mid-epoch.

What is saved, and what goes on from it.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ring_graph import SAMPLING, graph

from shardemb import checkpoint
from shardemb.checkpoint import CheckpointError
from shardemb.exceptions import TerminatedError
from shardemb.kge import ModelConfig, TrainingConfig, train
from shardemb.utils.run_metrics import read_metrics

COMMAND = [
    sys.executable,
    "-m",
    "shardemb",
    "train",
    "--dataset",
    "wordnet",
    "--set",
    "sampling.num_negatives=10",
]
COMMAND += [
    "--set",
    "model.dim=8",
    "--set",
    "training.epochs=50",
    "--set",
    "training.validate_every=0",
]


def _train(
    rank: int,
    world_size: int,
    output: Path,
    terminate_at: int | None,
    resume: bool,
    seconds: float = 0.0,
) -> dict:
    config = TrainingConfig(epochs=4, seed=1, validate_every=2, checkpoint_seconds=seconds)
    if (
        terminate_at is not None and rank == world_size - 1
    ):  # one rank gets the signal, all of them end
        step = checkpoint.AsyncSaver.check
        count = 0

        def counting(self) -> None:
            nonlocal count
            count += 1
            if count == terminate_at:
                os.kill(os.getpid(), signal.SIGTERM)
            step(self)

        checkpoint.AsyncSaver.check = counting
    before = signal.getsignal(signal.SIGTERM)
    try:
        model, result = train(
            graph(),
            ModelConfig(dim=12, init_std=0.1, n3=0.01),
            sampling=SAMPLING,
            training=config,
            output=output,
            resume=resume,
            progress=False,
        )
    except TerminatedError as error:
        return {"error": str(error)}
    finally:
        assert signal.getsignal(signal.SIGTERM) == before
    with torch.no_grad():
        return {
            **result,
            "entity": model.entity(None).clone(),
            "relation": model.relation(None).clone(),
        }


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("at", [2, 3, 9])
def test_sigterm_saves_and_the_run_goes_on_exactly(
    run_ranks, tmp_path: Path, ranks: int, at: int
) -> None:
    """There are 4 steps an epoch: within the first one, at its end, within the third."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    expected, *_ = run_ranks(_train, ranks, whole, None, False)
    for told in run_ranks(_train, ranks, parts, at, False):
        match = re.fullmatch(r"SIGTERM came in step (\d+): saved as step-(\d+)", told["error"])
        assert match
        step = at + 1
        assert int(match[1]) == int(match[2]) == step
    assert (
        checkpoint.verify(checkpoint.checkpoints(parts / "checkpoints")[-1]).values["step"] == step
    )
    got, *_ = run_ranks(_train, ranks, parts, None, True)
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(got[name]), torch.as_tensor(value)), name
    kinds = [
        (r["kind"], r["step"])
        for r in read_metrics(parts / "metrics.jsonl")
        if r["kind"] != "train"
    ]
    assert kinds == [
        (r["kind"], r["step"])
        for r in read_metrics(whole / "metrics.jsonl")
        if r["kind"] != "train"
    ]


def test_without_a_folder_nothing_is_saved(run_ranks) -> None:
    config = TrainingConfig(epochs=4, validate_every=0)
    calls = 0
    original = torch.Tensor.backward

    def backward(self, *args, **kwargs) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, *args, **kwargs)

    torch.Tensor.backward = backward
    try:
        with pytest.raises(
            TerminatedError, match="SIGTERM came in step 3: nothing is saved without an output"
        ):
            train(graph(), ModelConfig(dim=4), sampling=SAMPLING, training=config, progress=False)
    finally:
        torch.Tensor.backward = original


@pytest.mark.parametrize("ranks", [1, 2])
def test_checkpoints_within_an_epoch(run_ranks, tmp_path: Path, ranks: int) -> None:
    """A checkpoint after each step, since it takes longer than this many seconds."""
    expected, *_ = run_ranks(_train, ranks, tmp_path, None, False, 1e-9)
    newest = checkpoint.checkpoints(tmp_path / "checkpoints")
    assert [path.name for path in newest] == ["step-0000000015", "step-0000000016"]
    newest[-1].rename(tmp_path / "lost")
    got, *_ = run_ranks(_train, ranks, tmp_path, None, True, 0.0)
    assert torch.equal(got["entity"], expected["entity"])


@pytest.mark.filterwarnings("default")
def test_a_run_goes_back_to_a_checkpoint_that_is_undamaged(run_ranks, tmp_path: Path) -> None:
    expected, *_ = run_ranks(_train, 2, tmp_path, None, False)
    older, newest = checkpoint.checkpoints(tmp_path / "checkpoints")
    for path in (newest, older):
        file = next(path.glob("rank-00001*"))
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        if path == newest:
            got, *_ = run_ranks(_train, 2, tmp_path, None, True)
            assert torch.equal(got["entity"], expected["entity"])
            assert newest.with_suffix(".damaged").is_dir()  # nothing is thrown away
            for file in checkpoint.checkpoints(tmp_path / "checkpoints")[-1].glob("rank-00000*"):
                file.unlink()
    for told in run_ranks(_refused, 2, tmp_path):
        assert "is damaged" in told or "missing" in told


def _refused(rank: int, world_size: int, output: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        _train(rank, world_size, output, None, True)
    return str(caught.value)


def _other(rank: int, world_size: int, output: Path) -> str:
    with pytest.raises(ValueError) as caught:
        train(
            graph(), ModelConfig(dim=4 + rank * 2), sampling=SAMPLING, output=output, progress=False
        )
    return str(caught.value)


def test_ranks_with_other_settings_are_told_before_the_first_step(
    run_ranks, tmp_path: Path
) -> None:
    for text in run_ranks(_other, 2, tmp_path):
        assert "the training job: ranks disagree in settings: got settings" in text


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_command_saves_ends_with_143_and_resumes(tmp_path: Path, workers: str) -> None:
    run = tmp_path / "run"
    command = [*COMMAND, "--workers", workers, "--output", str(run)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 90
        while (
            not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text())
            and time.monotonic() < deadline
        ):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, err
    match = re.search(
        r"SIGTERM came in step (\d+): saved as (step-\d+); --resume goes on from there", err
    )
    assert match, err
    assert "Traceback" not in err
    (path,) = checkpoint.checkpoints(run / "checkpoints")
    assert path.name == match[2]
    checkpoint.verify(path)
