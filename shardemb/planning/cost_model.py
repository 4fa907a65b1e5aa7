"""Memory, exchange and time of a training job, and the fewest ranks that hold it.

Memory and exchange are counted from allocations and messages, with the expected number of distinct
rows of a batch under Zipf's law. Time is a roofline (Williams et al. 2009) without overlap: each
part of a step is its work over a rate of a :class:`Machine`, measured by
:mod:`shardemb.planning.calibrate` or from a data sheet.
"""

import dataclasses
import json
import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shardemb.checkpoint.writer import FILE_BYTES
from shardemb.exceptions import InputError
from shardemb.kge.optimizers import OPTIMIZERS
from shardemb.sharding.exchange import message_bytes
from shardemb.sharding.placement import RowPlan
from shardemb.utils.files import read_text, write_json
from shardemb.utils.validation import at_least, one_of, within

#: passes over (query, column) and (query, negative) in ComplEx's forward and backward, and over
#: (row, column) in lookup and update; for machines known by data sheet only
_QUERY_PASSES, _SCORE_PASSES, _ROW_PASSES = 40, 16, 6
#: live tensors in a step: of (query, column), (query, negative) and (row, column)
_QUERY_TENSORS, _SCORE_TENSORS, _ROW_TENSORS = 12, 4, 4
#: collectives in a step: counts, rows, gradients, and the coordinator's
COLLECTIVES = 4
#: usable share of a rank's memory
FULL = 0.9
MOST_WORKERS = 1 << 16
_GIB = 1 << 30


@dataclass(frozen=True)
class Machine:
    """Rates of one rank, and its host's resources; in bytes, seconds and float32 operations."""

    #: name on the command line
    name: str
    #: origin of the figures
    source: str
    #: of a rank's GPU, or of a host shared by its ranks
    memory_bytes: int
    #: ranks that share a host
    ranks_per_host: int
    #: ranks of a host that compute at once; others take turns
    cores: int
    #: rows are on a GPU, and a checkpoint's copy in the host's memory
    gpu: bool
    #: operations a second of matrix products
    matmul_flops: float
    #: bytes a second of random rows of a large table
    row_bandwidth: float
    #: slowdown of a rank when the host's other ranks work too
    contention: float
    #: of a step without work
    overhead_seconds: float
    #: added to it on several ranks
    exchange_overhead_seconds: float
    #: of a number in a query's columns, forward and backward, without matrix products
    query_seconds: float
    #: of a score, likewise
    score_seconds: float
    #: of drawing, sorting and merging an id
    id_seconds: float
    #: of a collective of a few bytes
    latency_seconds: float
    #: bytes a second that a rank sends in an all-to-all within a host; 0 if unknown
    exchange_bandwidth: float
    #: the same between hosts; 0 if unknown, then as within a host
    network_bandwidth: float
    #: memory of a process without rows
    process_bytes: int

    def __post_init__(self) -> None:
        where = f"machine {self.name!r}"
        numbers = [field.name for field in dataclasses.fields(self) if field.type in (int, float)]
        at_least(where, self, **dict.fromkeys(numbers, 0.0))
        at_least(where, self, memory_bytes=1, ranks_per_host=1, cores=1)
        at_least(where, self, matmul_flops=1, row_bandwidth=1, contention=1)

    @property
    def between_hosts(self) -> float:
        """Bytes a second between hosts; if unknown, within a host."""
        return self.network_bandwidth or self.exchange_bandwidth

    @classmethod
    def load(cls, path: Path) -> "Machine":
        """Read a file of ``shardemb bench calibrate``; ValueError for other content."""
        text = read_text(path)
        try:
            values: dict[str, Any] = json.loads(text)["machine"]
            return cls(**values)
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{path}: got no figures of a machine ({error}), expected what shardemb bench"
                " calibrate writes: run it again"
            ) from error

    def save(self, path: Path, **more: Any) -> None:
        """Write the figures, and ``more``, as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**more, "machine": dataclasses.asdict(self)})


def _from_data_sheet(name: str, memory: int, bandwidth: float) -> Machine:
    reached = 0.6  # share of the data sheet's rates that well-made kernels reach
    return Machine(
        name=name,
        source=(
            "NVIDIA's data sheet (SXM, 8 GPUs a host, NVLink 450 GB/s, 50 GB/s of network a GPU) at"
            f" {reached:.0%}; latencies and overheads assumed; not measured"
        ),
        memory_bytes=memory,
        ranks_per_host=8,
        cores=8,
        gpu=True,
        matmul_flops=reached * 67e12,
        row_bandwidth=reached * bandwidth,
        contention=1.0,
        overhead_seconds=3e-3,
        exchange_overhead_seconds=1e-3,
        query_seconds=4 * _QUERY_PASSES / (reached * bandwidth),
        score_seconds=4 * _SCORE_PASSES / (reached * bandwidth),
        id_seconds=1e-9,
        latency_seconds=2e-5,
        exchange_bandwidth=reached * 450e9,
        network_bandwidth=reached * 50e9,
        process_bytes=2 * _GIB,
    )


#: by name
DATA_SHEETS = {
    "h100": _from_data_sheet("h100", 80_000_000_000, 3.35e12),
    "h200": _from_data_sheet("h200", 141_000_000_000, 4.8e12),
}


@dataclass(frozen=True)
class Job:
    """The size of a job on one row-sharded table of entities."""

    #: rows of the sharded table
    entities: int
    #: rows of the replicated table, with reciprocal relations
    relations: int = 1000
    #: of an epoch; 0 if unknown
    triples: int = 0
    #: float32 columns
    dim: int = 128
    #: one of :data:`shardemb.kge.optimizers.OPTIMIZERS`
    optimizer: str = "rowwise_adagrad"
    #: ranks
    workers: int = 1
    #: triples of a step, of all ranks
    batch_size: int = 1000
    #: triples that share negatives; a rank takes whole chunks
    chunk_size: int = 1000
    #: of a chunk and a side
    negatives: int = 128
    #: corrupted sides of a triple
    sides: int = 2
    #: whether a chunk's other answers are negatives too
    in_batch: bool = False
    #: Zipf's exponent of heads and tails; negatives are uniform
    zipf: float = 0.8
    #: whether checkpoints are written from a copy of the rows
    background_saves: bool = True
    #: finished checkpoints to keep
    keep: int = 2

    def __post_init__(self) -> None:
        one_of("plan", self, {"optimizer": sorted(OPTIMIZERS)})
        at_least("plan", self, entities=1, relations=1, triples=0, dim=1, workers=1)
        at_least("plan", self, batch_size=1, chunk_size=1, keep=1)
        at_least("plan", self, negatives=0 if self.in_batch else 1)
        within("plan", self, zipf=(0, 4), workers=(1, MOST_WORKERS))
        within("plan", self, sides=(1, 2), entities=(1, 1 << 40))

    @property
    def chunks(self) -> int:
        """Chunks in a step of the busiest rank."""
        return -(-math.ceil(self.batch_size / self.chunk_size) // self.workers)

    @property
    def rank_triples(self) -> int:
        """Triples in a step of the busiest rank."""
        return min(self.batch_size, self.chunks * self.chunk_size)

    @property
    def state_bytes(self) -> int:
        """The optimizer's state for a row."""
        per_row = OPTIMIZERS[self.optimizer].state_per_row  # type: ignore[attr-defined]
        return sum(4 * (1 if one_number else self.dim) for one_number in per_row.values())

    @property
    def draws(self) -> tuple[int, int]:
        """Ids in a step of the busiest rank: heads and tails, and negatives."""
        return 2 * self.rank_triples, self.chunks * self.sides * self.negatives


@dataclass(frozen=True)
class Estimate:
    """The result of :func:`estimate`, for the busiest rank."""

    job: Job
    machine: Machine | None
    #: bytes of the rows' device, by purpose
    memory: dict[str, int]
    #: bytes of the host's memory, if that is separate
    host_bytes: int
    #: a step's ids, its distinct ids, and rows touched by all ranks
    ids: int
    distinct: int
    touched: int
    #: bytes that the rank sends in a step, by purpose
    exchange: dict[str, int]
    #: of all tables and their state, and files of a rank
    checkpoint_bytes: int
    pieces: int
    #: of a step, by part; None without a machine or its rate of exchange
    seconds: dict[str, float] | None

    @property
    def memory_bytes(self) -> int:
        """Bytes of the rank."""
        return sum(self.memory.values())

    @property
    def usable_bytes(self) -> int | None:
        """Bytes that a rank may use; None without a machine."""
        if self.machine is None:
            return None
        sharing = 1 if self.machine.gpu else min(self.job.workers, self.machine.ranks_per_host)
        return int(FULL * self.machine.memory_bytes / sharing)

    @property
    def fits(self) -> bool | None:
        """Whether the memory is enough; None without a machine."""
        return None if self.usable_bytes is None else self.memory_bytes <= self.usable_bytes

    @property
    def step_seconds(self) -> float | None:
        """Seconds of a step."""
        return None if self.seconds is None else sum(self.seconds.values())

    @property
    def triples_per_second(self) -> float | None:
        """Triples a second of all ranks."""
        return None if self.step_seconds is None else self.job.batch_size / self.step_seconds

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON."""
        names = ("fits", "memory_bytes", "step_seconds", "triples_per_second")
        derived = {name: getattr(self, name) for name in names}
        exchange = sum(self.exchange.values())
        return {**dataclasses.asdict(self), **derived, "exchange_bytes": exchange}


def distinct_rows(rows: int, zipf_draws: float, uniform_draws: float, exponent: float) -> float:
    """Return the expected number of distinct rows among independent draws.

    Row ``i`` of ``rows`` is drawn with probability ``i^-exponent`` over its sum, or uniformly:
    ``sum_i 1 - (1 - p_i)^n (1 - 1/V)^m`` for ``n`` Zipf draws and ``m`` uniform ones. The first
    4096 rows are summed exactly, the others in growing steps.
    """
    edges = [np.arange(1, min(rows, 4096) + 2, dtype=np.float64)]
    if rows > 4096:
        edges.append(np.geomspace(edges[0][-1], rows + 1, 4096)[1:])
    bounds = np.concatenate(edges)
    width, middle = np.diff(bounds), np.sqrt(bounds[:-1] * bounds[1:])
    middle[: len(edges[0]) - 1] = bounds[: len(edges[0]) - 1]
    shares = middle**-exponent
    shares /= (shares * width).sum()
    sure = 1 - 2.0**-53  # a certain row's logarithm would be infinite
    missed = zipf_draws * np.log1p(-np.minimum(shares, sure))
    missed += uniform_draws * math.log1p(-min(1 / rows, sure))
    return float((width * -np.expm1(missed)).sum())


def estimate(job: Job, machine: Machine | None = None) -> Estimate:
    """Estimate a job's memory, exchange and, with a machine, time."""
    rank = RowPlan("entity", job.entities, job.dim, job.workers)
    width, state = 4 * job.dim, job.state_bytes
    zipf, uniform = job.draws
    queries = job.sides * job.rank_triples
    negatives = job.negatives + job.in_batch * min(job.chunk_size, job.rank_triples)
    distinct = distinct_rows(job.entities, zipf, uniform, job.zipf)
    touched = distinct_rows(job.entities, zipf * job.workers, uniform * job.workers, job.zipf)
    several = job.workers > 1
    saved = rank.local_bytes(4, state)
    tensors = 4 * queries * (_QUERY_TENSORS * job.dim + _SCORE_TENSORS * negatives)
    tensors += width * _ROW_TENSORS * (zipf + uniform + several * round(distinct))
    memory = {
        "rows": rank.num_local * width,
        "optimizer state": rank.num_local * state,
        # with gradients and reduced values
        "relations": job.relations * (width * (5 if several else 2) + state),
        "a step's tensors": tensors,
        "process": 0 if machine is None else machine.process_bytes,
    }
    gpu, copy = machine is not None and machine.gpu, saved if job.background_saves else 0
    if not gpu:
        memory["copy for a checkpoint"] = copy
    sent = distinct * (job.workers - 1) / job.workers if several else 0.0
    ring = 2 * (job.workers - 1) / job.workers * 4 * job.relations * job.dim
    exchange = {
        "ids": round(message_bytes(job.workers, distinct)) if several else 0,
        "rows": round(sent * width),
        "gradients": round(sent * width),
        "relation gradients": round(ring),
    }
    whole = (job.entities + job.relations) * (width + state)
    result = Estimate(
        job=job,
        machine=machine,
        memory=memory,
        host_bytes=copy if gpu else 0,
        ids=zipf + uniform,
        distinct=round(distinct),
        touched=round(touched),
        exchange=exchange,
        checkpoint_bytes=whole,
        pieces=-(-saved // FILE_BYTES),
        seconds=None,
    )
    if machine is None or (several and not machine.exchange_bandwidth):
        return result
    seconds = _seconds(result, machine, queries, negatives, state)
    return dataclasses.replace(result, seconds=seconds)


def _seconds(
    result: Estimate, machine: Machine, queries: int, negatives: int, state: int
) -> dict[str, float]:
    job, width = result.job, 4 * result.job.dim
    ranks = min(job.workers, machine.ranks_per_host)
    turns = max(1.0, ranks / machine.cores)
    moved = _ROW_PASSES * width * result.ids + 2 * (result.touched / job.workers) * (width + state)
    moved += _ROW_PASSES * job.relations * (width + state)  # a dense gradient
    work = {
        "overhead": machine.overhead_seconds,
        "ids": machine.id_seconds * result.ids,
        # forward, and the gradients of both factors
        "matrix products": 6 * queries * negatives * job.dim / machine.matmul_flops,
        "queries": machine.query_seconds * queries * job.dim,
        "scores": machine.score_seconds * queries * negatives,
        "rows": moved / machine.row_bandwidth,
    }
    factor = turns * (machine.contention if ranks > 1 else 1.0)
    parts = {name: factor * value for name, value in work.items()}
    if job.workers > 1:
        near, far = machine.exchange_bandwidth, machine.between_hosts
        inside, ring = (ranks - 1) / (job.workers - 1), result.exchange["relation gradients"]
        seconds = (sum(result.exchange.values()) - ring) * (inside / near + (1 - inside) / far)
        seconds += ring / (near if inside == 1 else min(near, far))  # as fast as its slowest link
        parts |= {
            "exchange overhead": turns * machine.exchange_overhead_seconds,
            "exchange": turns * seconds,
        }
    if job.workers > 2:  # the overhead includes that of two ranks
        parts["latency"] = COLLECTIVES * machine.latency_seconds * (math.log2(job.workers) - 1)
    return parts


def fewest_workers(job: Job, machine: Machine, batch_grows: bool = True) -> int | None:
    """Return the fewest ranks that hold a job; None if MOST_WORKERS are too few.

    ``batch_grows`` keeps each rank's chunks, instead of the batch.
    """
    chunks = job.chunks

    def fits(workers: int) -> bool:
        batch = chunks * workers * job.chunk_size if batch_grows else job.batch_size
        resized = dataclasses.replace(job, workers=workers, batch_size=batch)
        return bool(estimate(resized, machine).fits)

    high = 1
    while not fits(high):
        high *= 2
        if high > MOST_WORKERS:
            return None
    low = high // 2 + 1
    return low + bisect_left(range(low, high), True, key=fits)


def assumptions(result: Estimate, notes: Mapping[str, str]) -> list[str]:
    """Return an estimate's assumptions, after ``notes`` on settings."""
    job, machine = result.job, result.machine
    lines = [f"{name}: {value}" for name, value in notes.items()]
    lines += [
        f"entities are heads or tails by Zipf's law with exponent {job.zipf:g}; negatives are"
        " uniform",
        "rows, gradients and scores in float32; ids of a batch travel once; popular rows spread"
        " over all ranks",
        "of the dataset nothing: triples and labels are mapped from the disk",
    ]
    chunks = -(-job.batch_size // job.chunk_size)
    if chunks < job.workers:
        lines.append(
            f"a step has {chunks} chunk(s) of {job.chunk_size} triples, so that some of"
            f" {job.workers} ranks have none: raise the batch size to"
            f" {job.workers * job.chunk_size}"
        )
    if machine is None:
        return lines
    lines += [
        f"{machine.name}: {machine.source}",
        f"{machine.ranks_per_host} ranks a host, {FULL:.0%} of the memory in use",
        "time: no overlap; latency grows with the logarithm of the number of ranks, which is the"
        " least that it can do",
    ]
    if result.host_bytes:
        lines.append("the host's memory is not checked: copies for checkpoints must fit there")
    if job.workers > machine.ranks_per_host and not machine.network_bandwidth:
        lines.append(
            "between hosts, exchange as fast as within one: nothing was measured there; give"
            " --network"
        )
    if job.workers > machine.cores and machine.cores < machine.ranks_per_host:
        lines.append(f"{machine.cores} ranks of a host compute at once, others take turns")
    return lines
