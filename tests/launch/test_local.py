import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from shardemb.exceptions import WorkerError
from shardemb.launch.local import run_local


def total(value: int) -> tuple[int, int]:
    tensor = torch.tensor(value + dist.get_rank())
    dist.all_reduce(tensor)
    return dist.get_rank(), int(tensor)


def test_ranks_work_together() -> None:
    assert run_local(total, 3, 10) == (0, 33)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nccl_needs_a_gpu() -> None:
    with pytest.raises(WorkerError, match="got backend 'nccl', but torch finds no GPU"):
        run_local(total, 2, 1, backend="nccl")


def alone() -> bool:
    return dist.is_initialized()


def test_one_worker_needs_no_group() -> None:
    assert run_local(alone, 1) is False
    with pytest.raises(ValueError, match="got 0 workers"):
        run_local(alone, 0)


def fail(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "raise":
            raise ValueError("bad luck")
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    time.sleep(600)


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("raise", "rank 1: ValueError: bad luck"),
        ("die", "rank 1: died: the process ended with exit code -9"),
    ],
)
def test_a_rank_that_fails_ends_the_others(how: str, text: str) -> None:
    start = time.monotonic()
    with pytest.raises(WorkerError, match=text):
        run_local(fail, 2, how, timeout_s=120)
    assert time.monotonic() - start < 60  # not the time-out of the rank that waits
