"""Starts one process a rank on this machine, and ends all when one fails."""

import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from shardemb.exceptions import InputError, WorkerError
from shardemb.utils.signals import on_sigterm


def run_local(
    fn: Callable[..., Any], workers: int, *args: Any, timeout_s: float = 300, backend: str = "gloo"
) -> Any:
    """Run ``fn(*args)`` on every rank of a process group of this machine's processes.

    Processes are spawned, so scripts need ``if __name__ == "__main__":``.

    Args:
        fn: a module-level function; ``torch.distributed`` gives its rank.
        workers: number of ranks; with 1, ``fn`` runs in this process, without a group.
        args: picklable.
        timeout_s: seconds that a collective waits for a missing rank.
        backend: "gloo", or "nccl" with a GPU for each rank.

    Returns:
        Rank 0's result (picklable).

    Raises:
        WorkerError: the first rank that raised, died or stopped; a single worker raises its own
            exception.
        ValueError: less than one worker.
    """
    if workers < 1:
        raise InputError(f"got {workers} workers, expected at least 1")
    if workers == 1:
        return fn(*args)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="shardemb-") as folder:
        channels: list[Connection] = []
        ranks: list[Any] = []
        # a file of this user only: a TCP store would listen on all interfaces
        common = workers, f"{folder}/store", timeout_s, backend, fn, args
        try:
            for rank in range(workers):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank_main,
                    args=(sender, rank, *common),
                    daemon=True,
                    name=f"shardemb-rank-{rank}",
                )
                process.start()
                sender.close()
                channels.append(receiver)
                ranks.append(process)
            # the ranks may save before they end
            with on_sigterm(lambda: [process.terminate() for process in ranks]):
                return _collect(channels, ranks)
        finally:
            for process in ranks:
                process.kill()
            for process in ranks:
                process.join()


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
                text = f"the process ended with exit code {ranks[rank].exitcode}"
                ok, value = False, WorkerError(rank, "died", text)
            results[rank] = value
            if not ok:
                failures.append(value)
    if failures:
        raise min(failures, key=lambda failure: failure.order)
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
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": workers, "LOCAL_WORLD_SIZE": workers}
    os.environ.update({name: str(number) for name, number in numbers.items()})
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # other machines cannot connect
    try:
        import torch
        import torch.distributed as dist

        from shardemb.comm import watchdog
        from shardemb.utils.devices import take_gpu

        watchdog.set_timeout(timeout_s)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))
        if backend == "nccl":
            take_gpu("got backend 'nccl'", otherwise="gloo")
        dist.init_process_group(
            backend,
            init_method=f"file://{store}",
            rank=rank,
            world_size=workers,
            timeout=timedelta(seconds=timeout_s + 10),  # after the watchdog, which names the rank
        )
        result = watchdog.attend(fn, *args)
        dist.destroy_process_group()
        channel.send((True, result if rank == 0 else None))
    except KeyboardInterrupt:
        pass  # the parent gets it too, and ends the job
    except BaseException as error:
        if "watchdog" in locals():
            watchdog.report(error)
        channel.send((False, WorkerError.of(rank, error)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
