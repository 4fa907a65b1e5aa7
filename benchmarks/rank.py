"""What ranking among all entities costs.

Against the product in it, on two workers, with drawn candidates, against PyKEEN.

``python benchmarks/rank.py [--rows 1000000] [--dim 128] [--rounds 7] [--queries 512] [--output
FILE]``

Contestants take turns, round by round, one thread each; figures are medians over rounds, ratios are
medians of each round's. "one worker" compares CPU time with the limit, the same tiles' product
alone; "two workers" compares wall time: the process of one and the two of the other wait for each
other. Rounds in which each of the three had 90 % of a core are told apart, as others may work on
the machine. Memory is what the process had at most, above what it had before.
"""

import argparse
import ctypes
import gc
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from measure import draw_ids, in_processes, proc_bytes
from report import write
from torch import Tensor

from shardemb.kge import KnowledgeGraphModel, ModelConfig
from shardemb.kge.evaluation import EvaluationConfig, evaluate
from shardemb.kge.known_answers import KnownAnswers
from shardemb.kge.ranking import _BATCH, _TILE, with_all, with_drawn
from shardemb.kge.scorers import SCORERS

RELATIONS = 50
#: true triples, by Zipf's law, of which some are asked for
TRUE = 1_000_000


def make_model(scorer: str, rows: int, dim: int) -> KnowledgeGraphModel:
    """Make a model as a trained one is: rows of length about 1."""
    config = ModelConfig(scorer=scorer, dim=dim, init_std=dim**-0.5, reciprocal=False)
    return KnowledgeGraphModel(rows, RELATIONS, config, seed=0).eval()


def make_triples(rows: int, number: int) -> Tensor:
    """Draw triples ``(n, 3)``."""
    return torch.stack(
        [draw_ids("zipf", size, number, seed) for seed, size in enumerate((rows, RELATIONS, rows))],
        dim=1,
    )


def limit(rows: Tensor, query: Tensor) -> None:
    """Do the product of all tiles, into the same memory."""
    width = _TILE // _BATCH
    out = torch.empty(_BATCH, width)
    for tile in rows.split(width):
        for part in query.split(_BATCH):
            (
                torch.mm(part, tile.mT, out=out[: len(part)])
                if len(tile) == width
                else torch.mm(part, tile.mT)
            )


def in_rounds(contestants: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each, round by round; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            start = time.process_time()
            run()
            if number:
                times[name].append(time.process_time() - start)
    return times


def peak_bytes(run: Any) -> int:
    """Return how much more memory the process had while it ran than before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is no part of it
    before = proc_bytes("/proc/self/status", "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run()
    return proc_bytes("/proc/self/status", "VmHWM") - before


def ratio(times: dict[str, list[float]], name: str, to: str) -> float:
    """Return the median of each round's ratio."""
    return round(statistics.median(a / b for a, b in zip(times[name], times[to], strict=True)), 3)


def one_worker(
    scorers: list[str], rows: int, dim: int, queries: int, rounds: int
) -> list[dict[str, Any]]:
    """Tails of triples among all entities, raw and filtered, against the product alone."""
    true, found = make_triples(rows, TRUE), []
    asked = true[:queries]
    known = KnownAnswers([true], RELATIONS, only=asked)
    for scorer in scorers:
        model = make_model(scorer, rows, dim)
        table, query = model.entity.local_rows(), torch.randn(queries, dim)
        contestants = {
            "product": lambda table=table, query=query: limit(table, query),
            "raw": lambda model=model: with_all(model, "tail", asked, None),
            "filtered": lambda model=model: with_all(model, "tail", asked, known),
        }
        times = in_rounds(contestants, rounds)
        for name in ("raw", "filtered"):
            seconds = statistics.median(times[name])
            found.append(
                {
                    "scorer": scorer,
                    "ranks": name,
                    "queries_per_cpu_second": round(queries / seconds, 1),
                    "share_of_the_product": ratio(times, "product", name),
                    "gigaflops": round(2e-9 * queries * rows * dim / seconds, 1),
                    "peak_megabytes": round(peak_bytes(contestants[name]) / 1e6, 1),
                }
            )
            print(found[-1], flush=True)
        del model, table, contestants
    return found


def _team(
    scorer: str, rows: int, dim: int, queries: int, rounds: int, workers: int, turn: Any
) -> dict[str, list[float]]:
    asked = make_triples(rows, queries)
    model, times = make_model(scorer, rows, dim), {"wall": [], "cpu": []}
    for number in range(rounds + 1):
        for whose in (1, 2):
            turn.wait(600)
            if whose == workers:
                wall, cpu = time.perf_counter(), time.process_time()
                with_all(model, "tail", asked, None)
                if number:
                    times["wall"].append(time.perf_counter() - wall)
                    times["cpu"].append(time.process_time() - cpu)
    turn.wait(600)
    return times


def two_workers(
    scorers: list[str], rows: int, dim: int, queries: int, rounds: int
) -> list[dict[str, Any]]:
    """The same on one worker and on two, in turn."""
    found = []
    for scorer in scorers:
        with get_context("forkserver").Manager() as manager, ThreadPoolExecutor(2) as threads:
            turn = manager.Barrier(3)
            jobs = [
                threads.submit(in_processes, n, _team, scorer, rows, dim, queries, rounds, n, turn)
                for n in (1, 2)
            ]
            (one,), two = (job.result() for job in jobs)
        cpu = [
            alone / max(both)
            for alone, *both in zip(one["cpu"], *(rank["cpu"] for rank in two), strict=True)
        ]
        rounds_of_wall = list(zip(one["wall"], *(rank["wall"] for rank in two), strict=True))
        shares = [
            [c / w for c, w in zip(team["cpu"], team["wall"], strict=True)] for team in (one, *two)
        ]
        quiet = [min(each) > 0.9 for each in zip(*shares, strict=True)]
        wall = [alone / max(both) for alone, *both in rounds_of_wall]
        undisturbed = [speedup for speedup, alone in zip(wall, quiet, strict=True) if alone]
        found.append(
            {
                "scorer": scorer,
                "one_worker_wall_s": round(statistics.median(one["wall"]), 3),
                "two_workers_wall_s": round(
                    statistics.median(max(both) for _, *both in rounds_of_wall), 3
                ),
                "speedup": round(statistics.median(wall), 3),
                "speedup_by_cpu_time": round(statistics.median(cpu), 3),
                "undisturbed_rounds": len(undisturbed),
                "speedup_in_undisturbed_rounds": (
                    round(statistics.median(undisturbed), 3) if undisturbed else None
                ),
            }
        )
        print(found[-1], flush=True)
    return found


def drawn(rows: int, dim: int, number: int, queries: int, rounds: int) -> dict[str, Any]:
    """Drawn candidates of a large table."""
    model, true = make_model("complex", rows, dim), make_triples(rows, TRUE)
    known = KnownAnswers([true], RELATIONS, only=true[:queries])

    def run() -> None:
        with_drawn(model, "tail", true[:queries], known, number, 0)

    seconds = statistics.median(in_rounds({"drawn": run}, rounds)["drawn"])
    found = {
        "rows": rows,
        "dim": dim,
        "candidates": number,
        "queries_per_cpu_second": round(queries / seconds, 1),
    }
    found["peak_megabytes"] = round(peak_bytes(run) / 1e6, 1)
    print(found, flush=True)
    return found


def against_pykeen(rows: int, dim: int, queries: int, rounds: int) -> dict[str, Any]:
    """Both sides, filtered, of a smaller table, against PyKEEN's evaluator with the same rows."""
    from pykeen.evaluation import RankBasedEvaluator
    from pykeen.models import DistMult
    from pykeen.triples import CoreTriplesFactory

    true = make_triples(rows, 10 * queries)
    factory = CoreTriplesFactory(true, num_entities=rows, num_relations=RELATIONS)
    ours = make_model("distmult", rows, dim)
    theirs = DistMult(triples_factory=factory, embedding_dim=dim, random_seed=0)
    for table, of in (
        (theirs.entity_representations[0], ours.entity),
        (theirs.relation_representations[0], ours.relation),
    ):
        table._embeddings.weight.data.copy_(of.full_state_dict("torch")["weight"])
    asked, figures = true[:queries], {}

    def pykeen() -> None:
        evaluator = RankBasedEvaluator(metrics=["mrr"], add_defaults=False)
        options = {"batch_size": 256, "additional_filter_triples": true, "use_tqdm": False}
        figures["pykeen"] = evaluator.evaluate(theirs, asked, **options).get_metric(
            "both.realistic.mrr"
        )

    def shardemb() -> None:
        figures["shardemb"] = evaluate(ours, asked, [true], EvaluationConfig())["mrr"]

    times = in_rounds({"pykeen": pykeen, "shardemb": shardemb}, rounds)
    assert abs(figures["pykeen"] - figures["shardemb"]) < 1e-5, figures
    found = {
        "rows": rows,
        "dim": dim,
        "triples": queries,
        "pykeen_over_shardemb_cpu_time": ratio(times, "pykeen", "shardemb"),
    }
    found |= {
        f"{name}_cpu_s": round(statistics.median(values), 3) for name, values in times.items()
    }
    print(found, flush=True)
    return found


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--drawn-rows", type=int, default=10_000_000)
    parser.add_argument("--drawn-dim", type=int, default=64)
    parser.add_argument("--pykeen-rows", type=int, default=40_000)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    scorers, common = ["distmult", "complex"], (options.dim, options.queries, options.rounds)
    body = {
        "rows": options.rows,
        "dim": options.dim,
        "queries": options.queries,
        "rounds": options.rounds,
        "one worker": one_worker(scorers, options.rows, *common),
        # short rounds, so that some are undisturbed
        "two workers": two_workers(
            scorers, options.rows, options.dim, max(1, options.queries // 4), 6 * options.rounds
        ),
        "all scorers": one_worker(
            sorted(SCORERS), options.rows // 10, options.dim, _BATCH, max(1, options.rounds // 2)
        ),
        "drawn": drawn(
            options.drawn_rows, options.drawn_dim, 1000, options.queries, options.rounds
        ),
        "against PyKEEN": against_pykeen(options.pykeen_rows, *common),
    }
    write("rank", body, options.output)


if __name__ == "__main__":
    main()
