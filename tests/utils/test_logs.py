"""What the package logs, with which rank; and that it configures nothing that is not its own."""

import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ring_graph import SAMPLING, graph

from shardemb import Coordinator, Embedding, RowWiseAdagrad, checkpoint
from shardemb.comm import collectives
from shardemb.kge import ModelConfig, TrainingConfig, train

ROOT = Path(__file__).parents[2]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "shardemb")
    return caplog


def _run(code: str, **environment: str) -> str:
    """Run code in a process of its own; return what it wrote to stderr."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, env=variables, timeout=120, check=True
    )
    return done.stderr


def test_saving_and_loading(tmp_path: Path, lines: pytest.LogCaptureFixture) -> None:
    path = checkpoint.save(tmp_path, 1, Embedding(5, shape=2))
    checkpoint.load(path, Embedding(5, shape=2))
    texts = [(r.name, r.levelname, r.rank, r.getMessage()) for r in lines.records]
    for (name, level, rank, text), (module, verb) in zip(
        texts, [("writer", "saved"), ("reader", "loaded")], strict=True
    ):
        assert (name, level, rank) == (f"shardemb.checkpoint.{module}", "INFO", 0)
        assert re.fullmatch(rf"{verb} {path}: 40 bytes in \d+\.\d\d s", text)


def test_a_checkpoint_that_is_passed_over(tmp_path: Path, lines: pytest.LogCaptureFixture) -> None:
    def run(resume: bool) -> None:
        config = TrainingConfig(epochs=2, checkpoint_every=1)
        options = {"sampling": SAMPLING, "training": config, "progress": False}
        train(graph(), ModelConfig(dim=4), output=tmp_path, resume=resume, **options)

    run(False)
    newest = Path(checkpoint.checkpoints(tmp_path / "checkpoints")[-1])
    next(newest.glob("*.safetensors")).write_bytes(b"x")
    with pytest.warns(UserWarning, match="going back to"):
        run(True)
    (line,) = [r for r in lines.records if r.name == "shardemb.kge.trainer"]
    assert line.levelname == "INFO"  # the warning is printed by default
    assert re.search(r"got 1 bytes, expected .*; going back to step-", line.getMessage())


def test_a_constrainer_over_all_rows(lines: pytest.LogCaptureFixture) -> None:
    for options, expected in (({"kernel": "dense"}, 1), ({}, 0)):
        lines.clear()
        table = Embedding(
            50,
            shape=2,
            name="t",
            constrainer="normalize",
            constrainer_kwargs={"dim": -1},
            **options,
        )
        coordinator = Coordinator(table, RowWiseAdagrad(table.parameters()) if not options else [])
        for _ in range(4):
            table(torch.arange(3)).sum().backward()
            coordinator.step()
        texts = [r.getMessage() for r in lines.records if r.name == "shardemb.sharding.table"]
        assert texts == ["table 't': constrains all 50 rows again"] * expected


def _shared_memory(rank: int, world_size: int, wanted: str) -> list[str]:
    os.environ["SHARDEMB_SHARED_MEMORY"] = wanted
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(f"rank {record.rank}: {record.getMessage()}")
    log = logging.getLogger("shardemb.comm.shared_memory")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    collectives.all_reduce(torch.ones(3), operation="a test")
    collectives.all_reduce(torch.ones(3), operation="a test")
    return texts


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ("1", "shared memory is on: 2 ranks of one machine"),
        ("0", "shared memory is off for 2 ranks: rank 0: SHARDEMB_SHARED_MEMORY is 0; rank 1: "),
    ],
)
def test_shared_memory(run_ranks, wanted: str, text: str) -> None:
    for rank, texts in enumerate(run_ranks(_shared_memory, 2, wanted)):
        assert len(texts) == 1
        assert texts[0].startswith(f"rank {rank}: {text}")


KERNELS = "from shardemb import kernels; kernels.why_not()"


def test_c_kernels() -> None:
    on = _run(KERNELS, SHARDEMB_LOG="INFO")
    assert "rank 0 INFO shardemb.kernels.rows: C kernels are on" in on or shutil.which("cc") is None
    off = _run(KERNELS, SHARDEMB_LOG="kernels.rows=INFO", SHARDEMB_NATIVE="0")
    assert "rank 0 INFO shardemb.kernels.rows: C kernels are off: SHARDEMB_NATIVE is 0" in off


def test_without_being_asked_nothing_is_printed_and_no_root_logger_is_touched() -> None:
    code = (
        f"{KERNELS}\nimport logging, shardemb.kge, shardemb.cli\nassert not logging.root.handlers"
    )
    assert _run(code, SHARDEMB_LOG="") == ""
    assert "C kernels" in _run(code, SHARDEMB_LOG="DEBUG")


@pytest.mark.parametrize("text", ["LOUD", "checkpoint=LOUD", "INFO,=,x"])
def test_an_unknown_level_is_named(text: str) -> None:
    code = "import shardemb.utils.logs"
    with pytest.raises(subprocess.CalledProcessError) as caught:
        _run(code, SHARDEMB_LOG=text)
    assert "SHARDEMB_LOG: got '" in caught.value.stderr
    assert "expected a level (DEBUG, INFO" in caught.value.stderr


def test_verbose_reaches_the_ranks(tmp_path: Path) -> None:
    code = f"""if True:
        from shardemb.utils import logs
        from shardemb.launch.local import run_local
        from test_logs import save
        if __name__ == "__main__":
            logs.verbose()
            run_local(save, 2, {str(tmp_path)!r})
    """
    text = _run(code, SHARDEMB_LOG="", PYTHONPATH=f"{ROOT}:{ROOT}/tests:{ROOT}/tests/utils")
    for rank in (0, 1):
        assert re.search(rf"rank {rank} INFO shardemb.checkpoint.writer: saved {tmp_path}", text)
    help_text = subprocess.run(
        [sys.executable, "-m", "shardemb", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "--verbose" in help_text


def save(folder: str) -> None:
    checkpoint.save(folder, 1, Embedding(5, shape=2, seed=1))


RESTARTS = """
import os, sys, torch.distributed as dist
from shardemb.launch.torchrun import run_under_torchrun

def work():
    dist.barrier()
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        sys.exit(1)

run_under_torchrun(work)
"""


def test_a_restart_by_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "restarts.py"
    script.write_text(RESTARTS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "SHARDEMB_LOG": "INFO"}
    variables |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--nproc-per-node=2", str(script)],
        capture_output=True,
        text=True,
        env=variables,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("restart 1 by torchrun, with 2 ranks") == 1


def test_the_command_line_names_a_wrong_setting() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shardemb", "top", "nowhere"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SHARDEMB_LOG": "LOUD"},
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("shardemb: error: SHARDEMB_LOG: got 'LOUD', expected a level")
