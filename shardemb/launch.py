"""Starts one process a rank, on this machine or on a Ray cluster, and ends all of them when one fails.

:func:`run` calls the same function on every rank, whoever has started it: this module, torchrun, or Ray.
"""

import math
import multiprocessing
import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any

from shardemb import cluster
from shardemb.settings import at_least, one_of

LAUNCHERS = ("local", "torchrun", "ray")


@dataclass(frozen=True)
class LaunchConfig:
    """Where a job's ranks run; nothing but ``ray_data`` changes what the job computes."""

    #: who starts the ranks: "local", this process on its machine; "torchrun", which has started this one; "ray"
    launcher: str = "local"
    #: ranks; with "torchrun" what that has started counts
    workers: int = 1
    #: Ray: take up to so many where the cluster has room for them, and go on with fewer; 0 for ``workers``, always
    max_workers: int = 0
    #: of the Ray cluster: "local", one of our own on this machine; "auto", that of this node; or HOST:PORT of its head
    address: str = "local"
    #: Ray: logical CPUs of a rank, which also has as many threads
    cpus_per_worker: float = 1.0
    #: Ray: other resources of a rank, by name
    resources_per_worker: dict[str, float] = field(default_factory=dict)
    #: Ray: "PACK" ranks on few nodes, "SPREAD" them, or one of these "STRICT_"
    placement: str = "PACK"
    #: Ray: seconds between two looks whether there is room for more ranks, up to ``max_workers``
    resize_seconds: float = 60.0
    #: Ray: start again from the newest checkpoint after so many failures of workers or nodes
    max_failures: int = 3
    #: Ray: Parquet of training triples instead of the dataset's: columns head, relation and tail, of labels that it has too.
    #: Each rank gets a share of them through Ray Data, so that batches depend on the number of ranks; "" for none
    ray_data: str = ""
    #: Ray: seconds to wait until the cluster has room for the ranks
    wait_seconds: float = 60.0

    def __post_init__(self) -> None:
        one_of("launch", self, {"launcher": LAUNCHERS, "placement": cluster.PLACEMENTS})
        cluster.check_address(self.address)
        at_least("launch", self, workers=1, max_workers=0, max_failures=0, wait_seconds=0, resize_seconds=0)
        if 0 < self.max_workers < self.workers:
            raise ValueError(f"launch.max_workers: got {self.max_workers}, expected 0 or at least workers = {self.workers}")
        if not self.cpus_per_worker > 0 or any(not amount > 0 for amount in self.resources_per_worker.values()):
            raise ValueError(
                f"launch.cpus_per_worker: got {self.cpus_per_worker}, others {self.resources_per_worker}: expected above 0"
            )
        for name in ("max_workers", "ray_data"):
            if getattr(self, name) and self.launcher != "ray":
                got = f"{getattr(self, name)!r} with launcher {self.launcher!r}"
                raise ValueError(f"launch.{name}: got {got}, expected launcher 'ray'")


class WorkerError(RuntimeError):
    """A rank failed; the others were ended.

    Attributes:
        rank: the first rank that failed.
        error: name of its exception's class, or "died".
        message: of its exception.
        trace: its traceback, or "".
    """

    def __init__(self, rank: int, error: str, message: str, trace: str = "") -> None:
        super().__init__(f"rank {rank}: {error}: {message}")
        self.rank, self.error, self.message, self.trace = rank, error, message, trace


def run(
    fn: Callable[..., Any],
    config: LaunchConfig,
    *args: Any,
    gpus: bool = False,
    timeout_s: float = 300,
    storage: Path | None = None,
) -> Any:
    """Run ``fn(*args)`` on every rank, as configured; see :func:`run_local`, :func:`run_under_torchrun`, :func:`run_on_ray`."""
    if config.launcher == "local":
        return run_local(fn, config.workers, *args, timeout_s=timeout_s, backend="nccl" if gpus else "gloo")
    if config.launcher == "torchrun":
        return run_under_torchrun(fn, *args, timeout_s=timeout_s, backend="nccl" if gpus else "gloo")
    workers = (config.workers, config.max_workers) if config.max_workers else config.workers
    return run_on_ray(
        fn,
        workers,
        *args,
        address=config.address,
        use_gpu=gpus,
        cpus_per_worker=config.cpus_per_worker,
        resources_per_worker=config.resources_per_worker,
        placement=config.placement,
        max_failures=config.max_failures,
        wait_s=config.wait_seconds,
        resize_s=config.resize_seconds,
        parquet=config.ray_data,
        timeout_s=timeout_s,
        storage=storage,
    )


def run_under_torchrun(fn: Callable[..., Any], *args: Any, timeout_s: float = 300, backend: str = "gloo") -> Any:
    """Run ``fn(*args)`` on this rank of those that torchrun has started: all of them call this.

    Args:
        fn: finds its rank with ``torch.distributed``.
        args: of the function.
        timeout_s: seconds after which a collective gives up on a rank that does not come.
        backend: of the group.

    Returns:
        What ``fn`` returned here.

    Raises:
        ValueError: torchrun has not started this process; or the function's own exception.
    """
    import torch
    import torch.distributed as dist

    from shardemb import faults

    if "TORCHELASTIC_RUN_ID" not in os.environ:
        raise ValueError(
            "got launcher 'torchrun' in a process that torchrun has not started, expected "
            "torchrun --nproc-per-node 2 -m shardemb train ..."
        )
    faults.set_timeout(timeout_s)
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    limit = timedelta(seconds=timeout_s + 10)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
    # torchrun's store keeps the addresses of an attempt that failed
    attempt = dist.PrefixStore(f"shardemb-attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=attempt, rank=rank, world_size=world_size, timeout=limit)
    try:
        result = faults.attend(fn, *args)
    except BaseException as error:
        faults.report(error)
        raise
    dist.destroy_process_group()
    return result


def run_on_ray(
    fn: Callable[..., Any],
    workers: int | tuple[int, int],
    *args: Any,
    address: str | None = "local",
    use_gpu: bool = False,
    cpus_per_worker: float = 1.0,
    resources_per_worker: Mapping[str, float] | None = None,
    placement: str = "PACK",
    max_failures: int = 3,
    wait_s: float = 60.0,
    resize_s: float = 60.0,
    parquet: str = "",
    timeout_s: float = 300,
    storage: Path | None = None,
) -> Any:
    """Run ``fn(*args)`` on every rank of a process group of a Ray cluster's workers, by Ray Train's TorchTrainer.

    When a worker or its node dies, all ranks start again, in fresh processes and a fresh process group: ``fn`` goes on from
    its newest checkpoint, or from the beginning. An error that would come again (ValueError, TypeError, FileNotFoundError,
    FloatingPointError and the like) ends the job at once.

    Args:
        fn: picklable; it finds its rank with ``torch.distributed``.
        workers: number of ranks; or the least and the most, of which Ray takes as many as the cluster has room for. When it
            gets room for more, all ranks start again.
        args: picklable.
        address: see :func:`shardemb.cluster.connected`.
        use_gpu: give each rank a GPU, and the group NCCL instead of gloo.
        cpus_per_worker: logical CPUs of a rank; torch takes as many threads, one at least.
        resources_per_worker: others, by name ("memory" in bytes).
        placement: "PACK", "SPREAD", "STRICT_PACK" or "STRICT_SPREAD".
        max_failures: how often ranks may start again.
        wait_s: seconds to wait until the cluster has room for the ranks.
        resize_s: seconds between two looks whether there is room for more ranks.
        parquet: what ranks get shares of, see :func:`shardemb.cluster.share`; "" for nothing.
        timeout_s: seconds after which a collective gives up on a rank that does not come.
        storage: folder for Ray Train's own records, that all nodes see; None for ``~/ray_results``.

    Returns:
        What rank 0 returned (picklable).

    Raises:
        WorkerError: a rank raised what would come again, or workers have failed too often.
        ValueError: the cluster has no room for the ranks.
        ModuleNotFoundError, ConnectionError: see :func:`shardemb.cluster.connected`.
    """
    least, most = (workers, workers) if isinstance(workers, int) else workers
    if not 1 <= least <= most:
        raise ValueError(f"got {workers} workers, expected at least 1, or (least, most)")
    resources = {**(resources_per_worker or {}), "CPU": cpus_per_worker, **({"GPU": 1.0} if use_gpu else {})}
    logical = math.ceil(most * cpus_per_worker) if address == "local" else None
    with cluster.connected(address, cpus=logical):
        cluster.require_room(least, resources, placement, wait_s)
        outcome = cluster.fit(
            cluster.Work(fn, args, timeout_s, math.floor(cpus_per_worker), address == "local", parquet),
            workers,
            resources,
            placement,
            resize_s,
            max_failures,
            storage,
        )
    if isinstance(outcome, cluster.Failure):
        raise WorkerError(outcome.rank, outcome.error, outcome.message, outcome.trace)
    return outcome


def run_local(fn: Callable[..., Any], workers: int, *args: Any, timeout_s: float = 300, backend: str = "gloo") -> Any:
    """Run ``fn(*args)`` on every rank of a process group of this machine's processes.

    The processes are spawned: a script that calls this needs ``if __name__ == "__main__":``.

    Args:
        fn: a module-level function; it finds its rank with ``torch.distributed``.
        workers: number of ranks; with 1, ``fn`` runs in this process, without a group.
        args: picklable.
        timeout_s: seconds after which a collective gives up on a rank that does not come.
        backend: of the group: "gloo", or "nccl" for ranks with a GPU each.

    Returns:
        What rank 0 returned (picklable).

    Raises:
        WorkerError: a rank raised, died or stopped: the one that did so first, not those that missed it. With 1 worker its
            exception comes as it is.
        ValueError: less than one worker.
    """
    if workers < 1:
        raise ValueError(f"got {workers} workers, expected at least 1")
    if workers == 1:
        return fn(*args)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="shardemb-") as folder:
        channels: list[Connection] = []
        ranks: list[Any] = []
        try:
            for rank in range(workers):
                here, there = context.Pipe(duplex=False)
                # the store is a file of this user's: a TCP store would listen on all interfaces
                call = (there, rank, workers, f"{folder}/store", timeout_s, backend, fn, args)
                process = context.Process(target=_rank_main, args=call, daemon=True, name=f"shardemb-rank-{rank}")
                process.start()
                there.close()
                channels.append(here)
                ranks.append(process)
            with _forwarding_sigterm(ranks):
                return _collect(channels, ranks)
        finally:
            for process in ranks:
                process.kill()
            for process in ranks:
                process.join()


@contextmanager
def _forwarding_sigterm(ranks: list[Any]) -> Iterator[None]:
    """Let SIGTERM reach the ranks, which may save before they end."""
    if threading.current_thread() is not threading.main_thread():  # Python allows no other to take signals
        yield
        return

    def forward(number: int, frame: FrameType | None) -> None:
        for process in ranks:
            process.terminate()

    before = signal.signal(signal.SIGTERM, forward)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _collect(channels: list[Connection], ranks: list[Any]) -> Any:
    results: dict[int, Any] = {}
    failures: list[WorkerError] = []
    while len(results) < len(channels):
        waiting = [channel for rank, channel in enumerate(channels) if rank not in results]
        ready = wait(waiting, 1.0 if failures else None)
        if not ready:
            break
        for channel in ready:
            rank = channels.index(channel)  # type: ignore[arg-type]
            try:
                ok, value = channels[rank].recv()
            except EOFError:
                ranks[rank].join(10)
                ok, value = False, ("died", f"the process ended with exit code {ranks[rank].exitcode}")
            results[rank] = value
            if not ok:
                failures.append(WorkerError(rank, *value))
    if failures:
        raise min(failures, key=lambda failure: cluster.CAUSES.get(failure.error, 1))
    return results[0]


def _rank_main(
    channel: Connection,
    rank: int,
    workers: int,
    store: str,
    timeout_s: float,
    backend: str,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    _end_with_parent()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(workers), LOCAL_WORLD_SIZE=str(workers))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # nobody outside of this machine has a part in it
    try:
        import torch
        import torch.distributed as dist

        from shardemb import faults

        faults.set_timeout(timeout_s)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))
        # the watch is first to give up, and says why
        limit = timedelta(seconds=timeout_s + 10)
        if backend == "nccl" and not torch.cuda.is_available():
            raise ValueError("got backend 'nccl', but torch finds no GPU: use 'gloo', or install torch's CUDA build")
        if backend == "nccl":  # which binds a rank to the current GPU
            torch.cuda.set_device(rank % torch.cuda.device_count())
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=workers, timeout=limit)
        result = faults.attend(fn, *args)
        dist.destroy_process_group()
        channel.send((True, result if rank == 0 else None))
    except KeyboardInterrupt:
        pass  # the parent has it too, and ends the job
    except BaseException as error:
        if "faults" in locals():
            faults.report(error)
        channel.send((False, (type(error).__name__, str(error), traceback.format_exc())))


def _end_with_parent() -> None:
    """End this process when its parent is gone, however that happened."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
