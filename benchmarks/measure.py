"""How the benchmarks measure: ids drawn beforehand, contestants in turn, several processes."""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

Step = Callable[
    [Tensor, Tensor], object
]  # of ids (n,) and the gradient of what they look up (n, D)
Times = dict[str, list[float]]  # ms of one step, round by round


def draw_ids(kind: str, rows: int, number: int, seed: int = 0) -> Tensor:
    """Draw ids ``(number,)``: "uniform", or "zipf" with exponent 0.8.

    The seed draws other ids, the popular stay the same.

    Popular ids are spread over the table; those of "zipf in id order" are the first ones.
    """
    generator = np.random.default_rng(seed)
    if kind == "uniform":
        return torch.from_numpy(generator.integers(rows, size=number))
    shares = np.cumsum(np.arange(1, rows + 1) ** -0.8)
    ids = np.minimum(np.searchsorted(shares / shares[-1], generator.random(number)), rows - 1)
    return torch.from_numpy(
        ids if kind == "zipf in id order" else np.random.default_rng(0).permutation(rows)[ids]
    )


def cpu_ms(step: Step, ids: Tensor, grad: Tensor) -> float:
    """Return the process' CPU time."""
    start = time.process_time()
    step(ids, grad)
    return 1e3 * (time.process_time() - start)


def cuda_ms(step: Step, ids: Tensor, grad: Tensor) -> float:
    """Return the GPU's time."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step(ids, grad)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def pool_of(kind: str, rows: int, number: int, seed: int = 0) -> Sequence[Tensor]:
    """Draw the batches that take turns.

    More small ones, so that they do not stay in cache either.
    """
    batches = 4 if number > 10_000 else 16
    return draw_ids(kind, rows, batches * number, seed).chunk(batches)


def in_turn(
    steps: Mapping[str, Step],
    pool: Sequence[Tensor],
    grad: Tensor,
    rounds: int,
    repeat: int = 1,
    before: Callable[[], object] = lambda: None,
    clock: Callable[[Step, Tensor, Tensor], float] = cpu_ms,
) -> Times:
    """Time each step once a round, after two rounds at least, and the whole pool.

    Have warmed it up.

    Args:
        steps: contestants by name.
        pool: batches of ids ``(n,)``.
        grad: ``(n, D)``.
        rounds: how many are timed.
        repeat: steps of a contestant that make up one measurement.
        before: called before each step, not timed.
        clock: times one step.
    """
    times: Times = {name: [] for name in steps}
    warmup = max(2, -(-len(pool) // repeat))
    for number in range(warmup + rounds):
        for name, step in steps.items():
            spent = 0.0
            for batch in range(number * repeat, (number + 1) * repeat):
                before()
                spent += clock(step, pool[batch % len(pool)], grad)
            if number >= warmup:
                times[name].append(spent / repeat)
    return times


@contextmanager
def process_group(rank: int, world_size: int, folder: str) -> Iterator[None]:
    """Be a rank of a gloo group that listens on this machine's loopback alone."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        GLOO_SOCKET_IFNAME="lo",
    )
    where = {"init_method": f"file://{folder}/store", "rank": rank, "world_size": world_size}
    dist.init_process_group("gloo", **where, timeout=timedelta(minutes=2))
    try:
        yield
    finally:
        dist.destroy_process_group()


def _process_main(
    rank: int, count: int, folder: str, function: Callable[..., Any], arguments: Any
) -> Any:
    torch.set_num_threads(1)
    if count == 1:
        return function(*arguments)
    with process_group(rank, count, folder):
        result = function(*arguments)
        dist.barrier()
        return result


def in_processes(
    count: int, function: Callable[..., Any], *arguments: Any, timeout: float = 1800.0
) -> list[Any]:
    """Return what the function returns in each of several fresh processes.

    One gloo group if they are more than one.
    """
    # forked from one that has imported these, and done nothing else
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(["torch._dynamo", "shardemb.kge"])
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(count, forkserver) as executor,
    ):
        futures = [
            executor.submit(_process_main, rank, count, folder, function, arguments)
            for rank in range(count)
        ]
        try:
            return [future.result(timeout) for future in futures]
        except BaseException:
            for process in multiprocessing.active_children():
                process.kill()
            raise


def proc_bytes(path: str, key: str) -> int:
    """Return one of Linux's figures in kB, as bytes."""
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])
