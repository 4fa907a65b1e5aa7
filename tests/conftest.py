"""Runs a function on several real gloo ranks of this machine."""

import gc
import multiprocessing
import os
import pickle
import secrets
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

# Ray reads these when it is imported: a token of the session's own, none in the home folder; no
# worker is killed when the machine is full of something else
os.environ.update(
    RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(16), RAY_USAGE_STATS_ENABLED="0"
)
os.environ["RAY_memory_monitor_refresh_ms"] = "0"  # noqa: SIM112
# a report waits for the one, the end of a worker that has stopped for the other
os.environ.update(
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.1", TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S="1"
)

# Children are forked from one server that has imported the slow packages already: the first test of
# a session pays their import (torch.optim imports torch._dynamo when it is first used), later ones
# start ranks in milliseconds.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        *("pytest", "shardemb.kge.job", "fbgemm_gpu", "torch._dynamo"),
        "matplotlib.backends.backend_agg",  # for a run folder's figures
        "pandas",  # which pyarrow imports when it is given lists
    ]
)


def _rank_main(channel: Connection, rank: int, world_size: int, store: str) -> None:
    """Run what comes down the channel until it is closed."""
    import torch
    import torch.distributed as dist

    gc.freeze()  # what is imported is no garbage
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), GLOO_SOCKET_IFNAME="lo")
    try:
        if world_size > 1:
            timeout = timedelta(seconds=30)
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world_size,
                timeout=timeout,
            )
        while True:
            try:
                fn, args = pickle.loads(channel.recv_bytes())
            except EOFError:
                break
            channel.send_bytes(pickle.dumps((True, fn(rank, world_size, *args))))
        if world_size > 1:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        channel.send_bytes(pickle.dumps((False, traceback.format_exc())))


class Ranks:
    """Processes that are one process group; with one rank there is none."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._folder = tempfile.TemporaryDirectory()
        self._channels, self._processes = [], []
        for rank in range(world_size):
            here, there = _context.Pipe()
            process = _context.Process(
                target=_rank_main, args=(there, rank, world_size, f"{self._folder.name}/store")
            )
            process.start()
            there.close()
            self._channels.append(here)
            self._processes.append(process)

    def call(self, fn: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        """Run ``fn(rank, world_size, *args)`` on every rank; return the results in rank order.

        The first rank that fails ends the call at once, so that a failure does not hide behind the
        time-out of the ranks that wait for it.
        """
        for channel in self._channels:
            channel.send_bytes(pickle.dumps((fn, args)))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(results) < self.world_size:
            waiting = [
                channel for rank, channel in enumerate(self._channels) if rank not in results
            ]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                missing = sorted(set(range(self.world_size)) - set(results))
                raise TimeoutError(f"ranks {missing} gave no result in {timeout} s")
            for channel in ready:
                rank = self._channels.index(channel)
                try:
                    # plain bytes: tensors as torch sends them would need the rank to live until
                    # they are read
                    ok, value = pickle.loads(channel.recv_bytes())
                except EOFError:
                    ok, value = False, f"died with exit code {self._processes[rank].exitcode}"
                if not ok:
                    raise AssertionError(f"rank {rank} of {self.world_size}:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(self.world_size)]

    def close(self, timeout: float = 30.0) -> None:
        """Let the ranks end; kill those that do not."""
        for channel in self._channels:
            channel.close()
        deadline = time.monotonic() + timeout
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
            process.join()
        self._folder.cleanup()


def _run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0
) -> list[Any]:
    """Run ``fn(rank, world_size, *args)`` in fresh processes."""
    ranks, grace = Ranks(world_size), 0.0
    try:
        results = ranks.call(fn, *args, timeout=timeout)
        grace = 30.0
        return results
    finally:
        ranks.close(grace)


#: their tests run in one process, one Ray at a time
_START_RAY = (
    *("tests/launch/", "tests/serving/test_ray_service.py", "tests/test_deploy.py"),
    *("tests/test_benchmarks.py", "tests/test_docs.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that take longest."""
    items.sort(key=lambda item: not item.nodeid.startswith(_START_RAY))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run the tests of a file in one process."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "Ray" if nodeid.startswith(_START_RAY) else nodeid.split("::")[0]

    return ByFile(config, log)


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A folder, and a test that no longer is root, whom permission bits would not bind."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            os.seteuid(user)


@pytest.fixture
def run_ranks() -> Callable[..., list[Any]]:
    return _run_ranks


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[Callable[..., list[Any]]]:
    """As ``run_ranks``, in processes that stay for the session.

    For many small cases that leave no traces.
    """
    pool: dict[int, Ranks] = {}

    def call(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
        if world_size not in pool:
            pool[world_size] = Ranks(world_size)
        try:
            return pool[world_size].call(fn, *args)
        except BaseException:
            pool.pop(world_size).close(0.0)
            raise

    yield call
    for ranks in pool.values():
        ranks.close()


@pytest.fixture(params=[1, 2, 3, 4], ids="world_size={}".format)
def world_size(request: pytest.FixtureRequest) -> int:
    return request.param
