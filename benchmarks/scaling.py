"""How training grows with ranks and rows.

Weak and strong scaling, exchange, memory, constraint, and what the plan predicts.

    .venv/bin/python benchmarks/scaling.py [--only weak,growth] [--rounds 5] [--quick] [--output
    FILE]

A step is the trainer's: chunks drawn, one lookup, ComplEx's softmax loss on both sides, backward,
reduce, row-wise Adagrad. Heads and tails follow Zipf's law with exponent 0.8, negatives are
uniform. A rank is a process with one thread; more ranks than cores ("oversubscribed") tell what
waiting costs, not how a machine scales. CPU seconds and wall time are medians over windows of 10
steps, mean over ranks, then the median over rounds, in which contestants take turns. "2 alone" are
two processes at once that know nothing of each other: what the machine itself gives, since its
cores share memory and clock. ``shardemb bench calibrate`` runs first, and what the plan predicts by
it is compared with what was measured.

Sections: weak (rows and triples a rank stay), strong (the whole stays), growth (rows, one rank),
memory (bytes a row), constraint, peers (torch.nn.Embedding and TorchRec at the same work), modelled
(1e9 and 1e10 rows on machines that are not here: no measurement). All of them take 25 minutes and
16 GB; the JSON, and the pictures beside it, go to benchmarks/results unless ``--quick``, which
tries everything on small tables. Bars: weak scaling to 2 ranks, 0.8 of the CPU time a triple and
1.6 times the triples a second; 1.02 of the bytes of rows and state at 1e7 rows.
"""

import argparse
import dataclasses
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from measure import in_processes, process_group
from report import write
from step import ours, torchrec

from shardemb import Coordinator
from shardemb.comm.collectives import rank_and_size
from shardemb.kge.model import KnowledgeGraphModel, ModelConfig
from shardemb.kge.optimizers import OptimizerConfig
from shardemb.kge.sampling import Sampler, SamplingConfig
from shardemb.planning.calibrate import Effort, calibrate
from shardemb.planning.cost_model import DATA_SHEETS, Job, Machine, estimate
from shardemb.utils.memory import resident_bytes

RELATIONS, ZIPF, WINDOW = 50, 0.8, 10
SECTIONS = ("weak", "strong", "growth", "memory", "constraint", "peers", "modelled")


@dataclasses.dataclass(frozen=True)
class Work:
    """What a rank trains."""

    #: of the whole table
    rows: int
    #: of a rank and step, in chunks of ``chunk``
    triples: int
    dim: int = 128
    chunk: int = 512
    negatives: int = 1000
    constrainer: str = ""
    windows: int = 10

    def job(self, ranks: int) -> Job:
        """Return it as the plan takes it."""
        return Job(
            entities=self.rows,
            relations=RELATIONS,
            dim=self.dim,
            workers=ranks,
            batch_size=self.triples * ranks,
            chunk_size=self.chunk,
            negatives=self.negatives,
            zipf=ZIPF,
            background_saves=False,
        )


# --- what a rank does ---


def zipf_triples(rows: int, number: int) -> torch.Tensor:
    """Draw triples ``(number, 3)``; popular entities are spread over the ids."""
    generator = np.random.default_rng(0)
    # the inverse of the integral of x^-0.8, which is near the sum beyond the first rows, and needs
    # no table of 1e8 shares
    share = generator.random((number, 2))
    power = 1 - ZIPF
    ranks = (
        np.floor(((rows + 1.0) ** power * share + (1 - share)) ** (1 / power))
        .astype(np.int64)
        .clip(1, rows)
        - 1
    )
    ids = (ranks * 2_654_435_761 + 12_345) % rows  # a prime
    relations = generator.integers(RELATIONS, size=number)
    return torch.from_numpy(np.stack([ids[:, 0], relations, ids[:, 1]], axis=1)).int()


def _steps(work: Work, model: KnowledgeGraphModel, end: Callable[[], object]) -> Iterator[None]:
    rank, ranks = rank_and_size()
    sampling = SamplingConfig(
        batch_size=work.triples * ranks, chunk_size=work.chunk, num_negatives=work.negatives
    )
    count = (work.windows + 2) * WINDOW
    sampler = Sampler(
        zipf_triples(work.rows, work.triples * ranks * count),
        work.rows,
        RELATIONS,
        sampling,
        0,
        rank,
        ranks,
    )
    for step in range(count):
        loss, _ = model.loss(sampler.batches(0, step))
        (loss / (2 * work.triples * ranks)).backward()
        end()
        yield


def train(work: Work) -> dict[str, float]:
    """Train on this rank of the default group, or alone; return the medians of its windows."""
    before = resident_bytes()
    options = {"maxnorm": 1.0, "dim": -1} if work.constrainer == "clamp_norm" else {}
    config = ModelConfig(
        dim=work.dim,
        reciprocal=False,
        n3=0.0,
        constrainer=work.constrainer,
        constrainer_kwargs=options,
    )
    start = time.perf_counter()
    model = KnowledgeGraphModel(work.rows, RELATIONS, config, seed=0)
    constructed = time.perf_counter() - start
    optimizer = OptimizerConfig(entity_lr=0.1, schedule="constant").make(model)
    coordinator = Coordinator(model, optimizer)

    def end() -> None:
        coordinator.reduce([0.0, 0.0, 0.0])  # the trainer's flags
        coordinator.step()

    told = _windows(_steps(work, model, end), lambda: model.entity.exchanged_bytes)
    weight = next(model.entity.parameters())
    told["touched_rows"] = optimizer.rows_updated[weight] / ((work.windows + 2) * WINDOW)
    return told | {"resident_bytes": resident_bytes() - before, "construct_s": constructed}


class _Plain(torch.nn.Embedding):
    """torch.nn.Embedding where the model expects a table."""

    dropout = None

    @property
    def device(self) -> torch.device:
        return self.weight.device


def train_plain(work: Work, sparse: bool) -> dict[str, float]:
    """Train the same with torch.nn.Embedding for the entities, and torch's Adagrad.

    In one process.
    """
    model = KnowledgeGraphModel(
        2, RELATIONS, ModelConfig(dim=work.dim, reciprocal=False, n3=0.0), seed=0
    )
    model.entity = _Plain(work.rows, work.dim, sparse=sparse)
    torch.nn.init.normal_(model.entity.weight, std=0.1)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)

    def end() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return _windows(_steps(work, model, end), lambda: 0)


def _windows(steps: Iterator[None], sent: Callable[[], int]) -> dict[str, float]:
    marks = []
    for number, _ in enumerate(steps, 1):
        if number % WINDOW == 0:
            marks.append((time.perf_counter(), time.process_time(), sent()))
    spent = (
        np.diff(np.array(marks[1:], dtype=np.float64), axis=0) / WINDOW
    )  # the first two windows warm up
    wall, cpu, exchanged = np.median(spent, axis=0).tolist()
    return {"step_s": wall, "cpu_s": cpu, "sent_bytes": exchanged}


def lookup_step(rows: int, dim: int, number: int, whose: str, rounds: int) -> dict[str, float]:
    """Time a lookup, backward and update of as many ids, ours or TorchRec's, on this rank."""
    if not dist.is_initialized():  # TorchRec wants a group of one, too
        with tempfile.TemporaryDirectory() as folder, process_group(0, 1, folder):
            return lookup_step(rows, dim, number, whose, rounds)
    step = ours(rows, dim, "sparse") if whose == "shardemb" else torchrec(rows, dim, parallel=True)
    rank, _ = rank_and_size()
    triples = zipf_triples(rows, number * 8 * (rank + 1)).long()[-number * 8 :]
    pool, grad = triples[:, [0, 2]].reshape(-1).split(number), torch.randn(number, dim)
    marks = []
    for round_number in range(rounds + 4):
        marks.append((time.perf_counter(), time.process_time()))
        step(pool[round_number % len(pool)].contiguous(), grad)
    wall, cpu = np.median(np.diff(np.array(marks[4:]), axis=0), axis=0).tolist()
    return {"step_s": wall, "cpu_s": cpu}


# --- the sections ---


def turns(contestants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """Call each contestant once a round."""
    found: dict[str, list[Any]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name, contestant in contestants.items():
            found[name].append(contestant())
            print(number, name, found[name][-1], flush=True)
    return found


def at_once(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what processes return that run at once, and are no group."""
    with ThreadPoolExecutor(count) as executor:
        running = [executor.submit(in_processes, 1, function, *arguments) for _ in range(count)]
        return [future.result()[0] for future in running]


def of_ranks(results: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean over ranks."""
    return {key: statistics.mean(one[key] for one in results) for key in results[0]}


def over_rounds(found: list[dict[str, float]]) -> dict[str, float]:
    """Return the median over rounds."""
    return {key: statistics.median(one[key] for one in found) for key in found[0]}


def scaling(
    machine: Machine, works: Mapping[str, tuple[int, int, Work]], rounds: int
) -> dict[str, Any]:
    """Measure contestants ``name: (ranks, groups, work)``, and compare with what the plan predicts.

    The first is the base.
    """

    def contestant(ranks: int, groups: int, work: Work) -> dict[str, float]:
        return of_ranks(
            in_processes(ranks, train, work) if groups == 1 else at_once(groups, train, work)
        )

    found = turns(
        {name: functools.partial(contestant, *case) for name, case in works.items()}, rounds
    )
    told: dict[str, Any] = {}
    base_name = next(iter(works))
    for name, (ranks, groups, work) in works.items():
        got, triples = over_rounds(found[name]), work.triples * ranks * groups
        rate = triples / got["step_s"]
        cpu = 1e6 * got["cpu_s"] * ranks * groups / triples
        base = told.get(base_name, {"triples_per_s": rate, "cpu_us_per_triple": cpu})
        told[name] = {
            "ranks": ranks * groups,
            "rows": work.rows,
            "triples_per_rank": work.triples,
            "negatives": work.negatives,
            "dim": work.dim,
            "oversubscribed": ranks * groups > (os.cpu_count() or 1),
            "step_ms": round(1e3 * got["step_s"], 3),
            "triples_per_s": round(rate),
            "speedup": round(rate / base["triples_per_s"], 3),
            "cpu_us_per_triple": round(cpu, 3),
            "cpu_efficiency": round(base["cpu_us_per_triple"] / cpu, 3),
            "touched_rows": round(got["touched_rows"] * ranks),
            "sent_bytes_per_rank": round(got["sent_bytes"]),
        }
        if groups == 1:
            told[name] |= predicted(machine, work, ranks, told[name])
        told[name]["rounds"] = found[name]
    return told


def predicted(
    machine: Machine, work: Work, ranks: int, measured: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what the plan says of it, and how far off that is."""
    here = dataclasses.replace(
        machine, ranks_per_host=max(ranks, machine.ranks_per_host)
    )  # all on this host
    said = estimate(work.job(ranks), here)
    sent = sum(
        size for name, size in said.exchange.items() if name != "relation gradients"
    )  # which no table counts
    step_ms, counted = 1e3 * (said.step_seconds or 0.0), measured["sent_bytes_per_rank"]
    return {
        "predicted_step_ms": round(step_ms, 3),
        "predicted_over_measured": round(step_ms / measured["step_ms"], 3),
        "predicted_touched_rows": said.touched,
        "predicted_sent_bytes_per_rank": sent,
        "sent_over_predicted": round(counted / sent, 4) if sent else None,
    }


def weak(machine: Machine, rounds: int, quick: bool) -> dict[str, Any]:
    """Rows and triples of a rank stay the same."""
    rows, told = 20_000 if quick else 1_000_000, {}
    for negatives in (1000, 128):
        work = Work(
            rows, 1024, negatives=negatives, windows=4 if quick else 20 if negatives > 500 else 60
        )
        works = {
            "1": (1, 1, work),
            "2 alone": (1, 2, work),
            "2": (2, 1, dataclasses.replace(work, rows=2 * rows)),
            "4": (4, 1, dataclasses.replace(work, rows=4 * rows)),
        }
        told[f"{negatives} negatives"] = scaling(machine, works, rounds)
    return told


def strong(machine: Machine, rounds: int, quick: bool) -> dict[str, Any]:
    """Rows and triples of the whole stay the same."""
    work = Work(20_000 if quick else 2_000_000, 2048, windows=4 if quick else 15)
    return scaling(
        machine,
        {str(n): (n, 1, dataclasses.replace(work, triples=2048 // n)) for n in (1, 2, 4)},
        rounds,
    )


def growth(machine: Machine, rounds: int, quick: bool) -> dict[str, Any]:
    """Train tables of more and more rows on one rank."""
    sizes = [10**power for power in ((3, 4, 5) if quick else (4, 5, 6, 7, 8))]
    works = {
        f"{rows:.0e}": Work(rows, 1024, dim=32, negatives=128, windows=4 if quick else 40)
        for rows in sizes
    }
    found = turns(
        {name: lambda w=w: in_processes(1, train, w)[0] for name, w in works.items()},
        max(1, rounds // 2),
    )
    told: dict[str, Any] = {}
    for name, work in works.items():
        got = over_rounds(found[name])
        measured = {"step_ms": round(1e3 * got["step_s"], 3), "sent_bytes_per_rank": 0}
        told[name] = {
            "rows": work.rows,
            "dim": work.dim,
            **measured,
            "triples_per_s": round(work.triples / got["step_s"]),
            "construct_s": round(got["construct_s"], 2),
            "resident_bytes": round(got["resident_bytes"]),
            "rows_and_state_bytes_per_row": 4 * work.dim + 4,
            **predicted(machine, work, 1, measured),
        }
    return told


def memory(machine: Machine, rounds: int, quick: bool) -> dict[str, Any]:
    """Compare what a row adds to the ranks' resident memory, after steps.

    With the row and its state.
    """
    told: dict[str, Any] = {}
    for ranks in (1, 2):
        sizes = (1_000, 100_000) if quick else (10_000, 10_000_000)
        few, many = (Work(rows, 1024, dim=128, negatives=128, windows=3) for rows in sizes)
        least, most = (
            sum(one["resident_bytes"] for one in in_processes(ranks, train, work))
            for work in (few, many)
        )
        added, limit = (most - least) / (many.rows - few.rows), 4 * many.dim + 4
        told[str(ranks)] = {
            "ranks": ranks,
            "rows": many.rows,
            "dim": many.dim,
            "resident_bytes": most,
            "resident_bytes_with_few_rows": least,
            "bytes_per_row": round(added, 2),
            "rows_and_state_bytes_per_row": limit,
            "over_limit": round(added / limit, 4),
        }
        print("memory", told[str(ranks)], flush=True)
    return told


def constraint(machine: Machine, rounds: int, quick: bool) -> dict[str, Any]:
    """Train with and without constrainers."""
    rows, told = 20_000 if quick else 1_000_000, {}
    for ranks in (1, 2):
        works = {
            name or "none": Work(
                rows * ranks, 1024, negatives=128, constrainer=name, windows=4 if quick else 30
            )
            for name in ("", "normalize", "clamp_norm")
        }
        contestants = {
            name: lambda w=w, n=ranks: of_ranks(in_processes(n, train, w))
            for name, w in works.items()
        }
        found = turns(contestants, rounds)
        ratios = {
            name: statistics.median(
                a["cpu_s"] / b["cpu_s"] for a, b in zip(found[name], found["none"], strict=True)
            )
            for name in works
        }
        told[str(ranks)] = {
            name: {
                "cpu_ms": round(1e3 * over_rounds(found[name])["cpu_s"], 3),
                "over_none": round(ratios[name], 3),
            }
            for name in works
        }
    return told


def peers(machine: Machine, rounds: int, quick: bool) -> dict[str, Any]:
    """Compare with torch.nn.Embedding at the same training.

    And with TorchRec at the same lookups.
    """
    rows, windows = (5_000, 2) if quick else (1_000_000, 6)
    work = Work(rows, 1024, negatives=128, windows=windows)
    small = dataclasses.replace(work, rows=rows // 10)
    training = turns(
        {
            "shardemb": lambda: in_processes(1, train, work)[0],
            "torch.nn.Embedding, sparse, Adagrad": lambda: in_processes(1, train_plain, work, True)[
                0
            ],
            "torch.nn.Embedding, dense, Adagrad": lambda: in_processes(1, train_plain, work, False)[
                0
            ],
            "shardemb, a tenth of the rows": lambda: in_processes(1, train, small)[0],
            "torch.nn.Embedding, dense, Adagrad, a tenth of the rows": lambda: in_processes(
                1, train_plain, small, False
            )[0],
        },
        max(1, rounds // 2),
    )
    number, repeat = (512, 6) if quick else (16384, 40)
    lookups = turns(
        {
            f"{whose}, {ranks} rank(s)": lambda w=whose, n=ranks: of_ranks(
                in_processes(n, lookup_step, rows * n, 128, number, w, repeat)
            )
            for whose in ("shardemb", "TorchRec DistributedModelParallel")
            for ranks in (1, 2)
        },
        rounds,
    )
    told: dict[str, Any] = {"training": {}, "lookups": {}}
    for name, found in training.items():
        told["training"][name] = {
            "triples_per_s": round(work.triples / over_rounds(found)["step_s"])
        }
    for name, found in lookups.items():
        got = over_rounds(found)
        told["lookups"][name] = {
            "ids": number,
            "cpu_ms": round(1e3 * got["cpu_s"], 3),
            "ms": round(1e3 * got["step_s"], 3),
        }
    return told


def modelled(machine: Machine, rounds: int, quick: bool) -> dict[str, Any]:
    """Estimate machines that are not here; nothing of this is measured."""
    hosts = dataclasses.replace(
        machine,
        name=f"hosts of {machine.cores} cores like this one",
        source=f"{machine.source}; 3.1 GB/s of network a host (25 Gbit/s Ethernet) assumed",
        network_bandwidth=3.1e9 / machine.cores,
        latency_seconds=max(machine.latency_seconds, 5e-5),
        exchange_bandwidth=machine.exchange_bandwidth or machine.row_bandwidth,
    )
    told: dict[str, Any] = {}
    for kind in (DATA_SHEETS["h100"], DATA_SHEETS["h200"], hosts):
        found = []
        for rows in (10**9, 10**10):
            for ranks in (8, 16, 32, 64, 128, 256, 512):
                job = Work(rows, 4096, dim=128, chunk=1024).job(ranks)
                said = estimate(job, kind)
                found.append(
                    {
                        "rows": rows,
                        "ranks": ranks,
                        "fits": said.fits,
                        "gib_per_rank": round(said.memory_bytes / 2**30, 2),
                        "sent_bytes_per_rank": sum(said.exchange.values()),
                        "step_ms": round(1e3 * (said.step_seconds or 0.0), 3),
                        "triples_per_s": round(said.triples_per_second or 0.0),
                    }
                )
        told[kind.name] = {"source": kind.source, "modelled": True, "found": found}
    return told


def judged(body: Mapping[str, Any]) -> dict[str, Any]:
    """Compare with the bars what was measured."""
    bars: dict[str, Any] = {}
    for name, found in body.get("weak", {}).items():
        bars[f"weak scaling to 2 ranks, {name}"] = {
            "cpu_efficiency": found["2"]["cpu_efficiency"],
            "cpu_efficiency_bar": 0.8,
            "speedup": found["2"]["speedup"],
            "speedup_bar": 1.6,
            "met": found["2"]["cpu_efficiency"] >= 0.8 and found["2"]["speedup"] >= 1.6,
        }
    for found in body.get("memory", {}).values():
        met = found["over_limit"] <= 1.02
        bars[f"memory a row, {found['ranks']} rank(s)"] = {
            "over_limit": found["over_limit"],
            "bar": 1.02,
            "met": met,
        }
    return bars


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default=",".join(SECTIONS), help="sections, with commas between them"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small tables, nothing judged")
    parser.add_argument("--output", type=Path, help="another file for the result")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(
            f"--only: got {', '.join(sorted(unknown))}, expected sections among"
            f" {','.join(SECTIONS)}"
        )
    effort = Effort(table_bytes=1 << 28, windows=2, repeat=11) if arguments.quick else Effort()
    machine = calibrate(effort=effort)
    print(machine, flush=True)
    body: dict[str, Any] = {"calibration": dataclasses.asdict(machine), "quick": arguments.quick}
    for name in chosen:
        start = time.perf_counter()
        body[name] = globals()[name](machine, arguments.rounds, arguments.quick)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    if not arguments.quick:
        body["bars"] = judged(body)
    write("scaling", body, arguments.output)


if __name__ == "__main__":
    main()
