"""Measures this machine's rates for :mod:`shardemb.planning.cost_model`.

Matrix products, random rows and messages are measured alone, the other costs in training steps in
which one prevails: almost no work, many ids, wide queries, many scores.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from itertools import cycle
from typing import Any

import torch

from shardemb import kernels
from shardemb.comm import collectives
from shardemb.exceptions import InputError
from shardemb.kge.config import TrainingConfig
from shardemb.kge.data.triples import Triples
from shardemb.kge.job import train
from shardemb.kge.model import ModelConfig
from shardemb.kge.optimizers import OptimizerConfig
from shardemb.kge.sampling import SamplingConfig
from shardemb.kge.trainer import LOG_STEPS
from shardemb.launch.local import run_local
from shardemb.planning.cost_model import Job, Machine, estimate
from shardemb.utils import memory, run_metrics
from shardemb.vocabulary import Vocabulary

_RELATIONS = 50
#: by Machine's field: columns, triples of a rank and negatives of a step dominated by it
_SHAPES = {
    "overhead_seconds": (8, 16, 16),
    "id_seconds": (8, 8192, 16),
    "query_seconds": (256, 2048, 16),
    "score_seconds": (8, 1024, 1024),
}


@dataclass(frozen=True)
class Effort:
    """Size of the measurement; the defaults take 15 seconds."""

    #: of the table for random rows
    table_bytes: int = 1 << 30
    #: rows of the training loop's table
    entities: int = 100_000
    #: windows of LOG_STEPS training steps; ten times as many with almost no work
    windows: int = 5
    #: repetitions of all else
    repeat: int = 200
    #: of a large message between two ranks
    message_bytes: int = 2 << 20


def calibrate(device: str = "cpu", threads: int = 1, effort: Effort | None = None) -> Machine:
    """Measure the rates of a rank on this machine, which should be idle; starts 2 processes.

    Args:
        device: "cpu" or "cuda"; with several GPUs, exchange is between the first two.
        threads: of a rank.
        effort: size of the measurement.

    Raises:
        ValueError: no such device, or more threads than cores.
    """
    cores = len(os.sched_getaffinity(0))
    if not 1 <= threads <= cores:
        raise InputError(
            f"calibrate: got {threads} threads for a rank, expected 1 to {cores}, this machine's"
            " cores"
        )
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise InputError(
            f"calibrate: got device {device!r}, expected 'cpu', or 'cuda' where torch finds a GPU"
        )
    effort, gpu = effort or Effort(), device == "cuda"
    ranks = torch.cuda.device_count() if gpu else max(1, cores // threads)
    alone = _alone(device, threads, effort)
    several, pair = ranks > 1, {}
    if several:
        backend = "nccl" if gpu else "gloo"
        pair = run_local(_pair, 2, device, threads, effort, backend=backend)
    processor = torch.cuda.get_device_name() if gpu else memory.cpu_name()
    unknown: Any = dict.fromkeys(_SHAPES, 0.0)
    host, today = platform.node() or "this machine", date.today().isoformat()
    machine = Machine(
        name=f"{processor}, {threads} thread(s) a rank",
        source=f"measured on {host}, {today}, torch {torch.__version__}",
        memory_bytes=torch.cuda.mem_get_info()[1] if gpu else memory.total_bytes(),
        ranks_per_host=ranks,
        cores=ranks,
        gpu=gpu,
        matmul_flops=alone["matmul"],
        row_bandwidth=alone["rows"],
        contention=max(1.0, alone["matmul"] / pair["matmul"]) if several else 1.0,
        exchange_overhead_seconds=0.0,
        **unknown,
        latency_seconds=pair.get("latency_seconds", 0.0),
        exchange_bandwidth=pair.get("exchange", 0.0),
        network_bandwidth=0.0,
        process_bytes=alone["process_bytes"],
    )
    # every shape has some of the other costs: Gauss-Seidel iteration
    for name in [*_SHAPES] * 5:
        job = _job(name, 1, effort)
        queries = job.sides * job.rank_triples
        units = {
            "id_seconds": sum(job.draws),
            "query_seconds": queries * job.dim,
            "score_seconds": queries * job.negatives,
        }
        without = replace(machine, **{name: 0.0})  # type: ignore[arg-type]
        left = alone[name] - (estimate(job, without).step_seconds or 0.0)
        machine = replace(machine, **{name: max(0.0, left) / units.get(name, 1)})
    if several:
        job = _job("overhead_seconds", 2, effort)
        left = pair["step"] - (estimate(job, machine).step_seconds or 0.0)
        machine = replace(machine, exchange_overhead_seconds=max(0.0, left))
    return machine


def _job(cost: str, workers: int, effort: Effort) -> Job:
    dim, triples, negatives = _SHAPES[cost]
    return Job(
        entities=effort.entities,
        relations=_RELATIONS,
        dim=dim,
        workers=workers,
        batch_size=triples * workers,
        chunk_size=triples,
        negatives=negatives,
        zipf=0.0,
    )


def _alone(device: str, threads: int, effort: Effort) -> dict[str, Any]:
    with _threads(threads):
        measured: dict[str, Any] = {}
        for name in _SHAPES:
            measured[name] = _step(name, device, effort)
            # after the first shape, which has almost no rows
            measured.setdefault("process_bytes", _process_bytes(device))
        return measured | {"matmul": _matmul(device, effort), "rows": _rows(device, effort)}


def _process_bytes(device: str) -> int:
    if device == "cpu":
        return memory.resident_bytes()
    free, total = torch.cuda.mem_get_info()  # of a GPU without other users
    return total - free - torch.cuda.memory_reserved()


def _pair(device: str, threads: int, effort: Effort) -> dict[str, Any]:
    with _threads(threads):
        small = torch.zeros(2, dtype=torch.int64, device=device)
        large = torch.zeros(2, effort.message_bytes // 8, dtype=torch.int64, device=device)
        matmul = _matmul(device, effort)

        def send(message: torch.Tensor) -> Callable[[], object]:
            return lambda: collectives.all_to_all(
                message, [1, 1], [1, 1], group=None, operation="calibration", continues=True
            )

        latency = _median(send(small), device, 5 * effort.repeat)
        seconds = _median(send(large), device, effort.repeat)
        return {
            "matmul": matmul,
            "latency_seconds": latency,
            "exchange": effort.message_bytes / max(1e-9, seconds - latency),
            "step": _step("overhead_seconds", device, effort),
        }


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _median(call: Callable[[], object], device: str, repeat: int) -> float:
    spent = []
    for _ in range(repeat + 2):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent[2:])


def _matmul(device: str, effort: Effort) -> float:
    """Return operations a second of a chunk's matrix product, forward and backward."""
    queries, candidates = (torch.randn(2, size, 128, device=device) for size in (1024, 512))
    scores = queries @ candidates.mT

    def products() -> None:
        torch.matmul(queries, candidates.mT)
        torch.matmul(scores, candidates)
        torch.matmul(scores.mT, queries)

    return 3 * 2 * 2 * 1024 * 512 * 128 / _median(products, device, effort.repeat)


def _rows(device: str, effort: Effort) -> float:
    """Return bytes a second of random rows of 512 bytes."""
    table = kernels.empty((max(1, effort.table_bytes // 512), 128), torch.float32, device).zero_()
    pool = cycle(torch.randint(len(table), (64, 8192), device=device))
    taken = _median(lambda: kernels.take(table, next(pool)), device, effort.repeat)
    return 8192 * 512 / taken


def _step(cost: str, device: str, effort: Effort) -> float:
    """Return seconds of a training step on random triples. A collective."""
    job = _job(cost, collectives.rank_and_size()[1], effort)
    steps = LOG_STEPS * (effort.windows * (10 if cost == "overhead_seconds" else 1) + 1)
    generator, sizes = torch.Generator().manual_seed(0), (job.entities, _RELATIONS, job.entities)
    columns = [torch.randint(n, (job.batch_size * steps,), generator=generator) for n in sizes]
    entities, relations = (Vocabulary(map(str, range(size))) for size in sizes[:2])
    none = torch.empty(0, 3, dtype=torch.int32)
    train_triples = torch.stack(columns, dim=1).int()
    data = Triples("calibration", train_triples, none, none, entities, relations)
    seconds: list[float] = []
    with run_metrics.listening(lambda kind, step, figures: seconds.append(figures["step_seconds"])):
        train(
            data,
            ModelConfig(dim=job.dim, reciprocal=False, n3=0.0),
            sampling=SamplingConfig(
                batch_size=job.batch_size, chunk_size=job.chunk_size, num_negatives=job.negatives
            ),
            optimizer=OptimizerConfig(schedule="constant"),
            training=TrainingConfig(epochs=1, validate_every=0, device=device),
            progress=False,
        )
    return statistics.median(seconds[1:])
