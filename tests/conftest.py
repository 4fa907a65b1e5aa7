"""Runs a function on several real gloo ranks of this machine."""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest

# Children are forked from one server that has imported the slow packages already: the first test of a session pays
# their import (torch.optim imports torch._dynamo when it is first used), later ones start ranks in milliseconds.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["pytest", "shardemb.kge.trainer", "fbgemm_gpu", "torch._dynamo"])


def _rank_main(channel: Connection, rank: int, world_size: int, store: str, fn: Callable[..., Any], args: tuple) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), GLOO_SOCKET_IFNAME="lo")
    try:
        if world_size > 1:
            timeout = timedelta(seconds=30)
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timeout)
        channel.send_bytes(pickle.dumps((True, fn(rank, world_size, *args))))
        if world_size > 1:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        channel.send_bytes(pickle.dumps((False, traceback.format_exc())))


def _run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Run ``fn(rank, world_size, *args)`` on every rank; return the results in rank order.

    With one rank there is no process group. The first rank that fails ends the others at once, so that a failure does
    not hide behind the time-out of the ranks that wait for it.
    """
    with tempfile.TemporaryDirectory() as folder:
        channels, ranks = [], []
        for rank in range(world_size):
            here, there = _context.Pipe(duplex=False)
            process = _context.Process(target=_rank_main, args=(there, rank, world_size, f"{folder}/store", fn, args))
            process.start()
            there.close()
            channels.append(here)
            ranks.append(process)
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        try:
            while len(results) < world_size:
                ready = wait([c for r, c in enumerate(channels) if r not in results], max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise TimeoutError(f"ranks {sorted(set(range(world_size)) - set(results))} gave no result in {timeout} s")
                for channel in ready:
                    rank = channels.index(channel)
                    try:
                        # plain bytes: tensors as torch sends them would need the rank to live until they are read
                        ok, value = pickle.loads(channel.recv_bytes())
                    except EOFError:
                        ok, value = False, f"died with exit code {ranks[rank].exitcode}"
                    if not ok:
                        raise AssertionError(f"rank {rank} of {world_size}:\n{value}")
                    results[rank] = value
            for process in ranks:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
    return [results[rank] for rank in range(world_size)]


@pytest.fixture
def run_ranks() -> Callable[..., list[Any]]:
    return _run_ranks


@pytest.fixture(params=[1, 2, 3, 4], ids="world_size={}".format)
def world_size(request: pytest.FixtureRequest) -> int:
    return request.param
