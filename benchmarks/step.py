"""What a training step costs against its peers and against the memory.

Contestants in turn in one process, round by round.

``python benchmarks/step.py [--only A,B] [--rounds 9] [--quick] [--output FILE]``

A step is lookup, backward, update, constrainer, forgetting the gradient, on one thread. Its ids
come from a pool that is drawn beforehand, another batch each time; its gradient is one random
tensor, the same for all. Every batch is seen once before timing starts. Figures are medians over
rounds of process CPU time in ms; a ratio is the median of each round's, to the baseline's time;
bars are upper bounds. The functions below say what a section compares. All of them take a few
minutes and 16 GB; the JSON goes to benchmarks/results unless ``--quick``, which tries everything on
small tables and judges nothing.

glibc hands blocks of 32 MiB back to the kernel, so at 65536 x 128 FBGEMM's lookup pays for 8192
page faults, half of its step and more. ``MALLOC_MMAP_THRESHOLD_=4294967296
MALLOC_TRIM_THRESHOLD_=8589934592`` before the command keeps them.
"""

import argparse
import functools
import gc
import inspect
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import (
    Step,
    Times,
    cuda_ms,
    draw_ids,
    in_processes,
    in_turn,
    pool_of,
    proc_bytes,
    process_group,
)
from report import write
from torch import Tensor

import shardemb

KINDS = ("uniform", "zipf")
GRADIENTS = ("sparse", "fused")
FBGEMM, TORCHREC, DMP = (
    "FBGEMM",
    "TorchRec ShardedEmbeddingCollection",
    "TorchRec DistributedModelParallel",
)
TORCH_ADAM, PYKEEN_ADAM, PYKEEN_PASS = (
    "torch SparseAdam",
    "PyKEEN and Adam, dense",
    "PyKEEN, normalize on all rows",
)
JUDGED = {True: ": met", False: ": MISSED", None: ""}


# --- contestants ---


def ours(rows: int, dim: int, gradient: str, rule: str = "RowWiseAdagrad", **options: Any) -> Step:
    """Make a shardemb.Embedding under the coordinator."""
    table = shardemb.Embedding(rows, shape=dim, kernel=gradient, seed=0, **options)
    optimizers = [] if gradient == "fused" else [getattr(shardemb.optim, rule)(table.parameters())]
    coordinator = shardemb.Coordinator(table, optimizers)

    def step(ids: Tensor, grad: Tensor) -> None:
        table(ids).backward(grad)
        coordinator.step()

    return step


def apart(rows: int, dim: int, gradient: str) -> tuple[Step, Step]:
    """Make a step without the coordinator.

    And the constrainer's pass over the rows that it touched, which follows it.
    """
    table = shardemb.Embedding(rows, shape=dim, kernel=gradient, constrainer="normalize", seed=0)
    optimizer = None if gradient == "fused" else shardemb.optim.RowWiseAdagrad(table.parameters())

    def update(ids: Tensor, grad: Tensor) -> None:
        table(ids).backward(grad)
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return update, lambda ids, grad: table.post_parameter_update()


def fbgemm(rows: int, dim: int, cuda: bool = False) -> Step:
    """Make FBGEMM's table, as fast as it goes: on a CPU bags of one id each, on a GPU no bags."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
        BoundsCheckMode,
        EmbeddingLocation,
        PoolingMode,
    )
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    place = (
        (EmbeddingLocation.DEVICE, ComputeDevice.CUDA)
        if cuda
        else (EmbeddingLocation.HOST, ComputeDevice.CPU)
    )
    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, *place)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.1,
        eps=1e-10,
        pooling_mode=PoolingMode.NONE if cuda else PoolingMode.SUM,
        bounds_check_mode=BoundsCheckMode.NONE,
        stochastic_rounding=False,
    )
    table.init_embedding_weights_uniform(-1.0, 1.0)

    @functools.cache
    def offsets(number: int) -> Tensor:
        return torch.tensor([0, number], device="cuda") if cuda else torch.arange(number + 1)

    return lambda ids, grad: table(ids, offsets(len(ids))).backward(grad)


def torchrec(rows: int, dim: int, parallel: bool) -> Step:
    """Make TorchRec's sharded collection, alone or within its DistributedModelParallel.

    Needs a process group.
    """
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
    from torchrec.distributed.types import ShardingEnv, ShardingPlan

    config = EmbeddingConfig(
        num_embeddings=rows, embedding_dim=dim, name="table", feature_names=["id"]
    )
    collection = EmbeddingCollection(tables=[config], device=torch.device("meta"))
    fused = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.1, "eps": 1e-10}
    sharder, device, ranks = (
        EmbeddingCollectionSharder(fused_params=fused),
        torch.device("cpu"),
        dist.get_world_size(),
    )
    placement = {"table": row_wise(compute_kernel="fused")}
    plan = construct_module_sharding_plan(
        collection, placement, sharder, local_size=ranks, world_size=ranks, device_type=device.type
    )
    if parallel:
        model = DistributedModelParallel(
            collection, device=device, plan=ShardingPlan({"": plan}), sharders=[sharder]
        )
    else:
        model = sharder.shard(
            collection, plan, ShardingEnv.from_process_group(dist.group.WORLD), device
        )

    def step(ids: Tensor, grad: Tensor) -> None:
        one_bag = KeyedJaggedTensor(keys=["id"], values=ids, lengths=torch.tensor([len(ids)]))
        model(one_bag)["id"].values().backward(grad)

    return step


def single(table: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """Make a step of a table in one process and torch's optimizer."""

    def step(ids: Tensor, grad: Tensor) -> None:
        table(ids).backward(grad)
        optimizer.step()
        optimizer.zero_grad()

    return step


# --- the memory, and the result ---


@functools.cache
def row_limit(
    rows: int, dim: int, number: int, kind: str, repetitions: int
) -> dict[str, Any] | None:
    """Compile and run row_limit.c; None without a compiler."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        program, ids, source = (
            Path(folder, "row_limit"),
            Path(folder, "ids"),
            Path(__file__).with_name("row_limit.c"),
        )
        subprocess.run(
            [compiler, "-O3", "-march=native", source, "-o", program], check=True, timeout=60
        )
        draw_ids(kind, rows, number * repetitions).numpy().tofile(ids)
        command = [program, *map(str, (rows, dim, number, repetitions)), ids]
        return json.loads(
            subprocess.run(command, check=True, timeout=120, capture_output=True).stdout
        )


class Run:
    """Sizes, and what was measured so far."""

    def __init__(self, rounds: int, quick: bool) -> None:
        self.rounds, self.quick = rounds, quick
        self.rows, self.dim = (100_000, 128) if quick else (1_000_000, 128)
        self.few, self.many = (128, 2048) if quick else (4096, 65536)
        self.growth = (100_000, 1_000_000) if quick else (1_000_000, 10_000_000, 100_000_000)
        self.sections: dict[str, list[dict[str, Any]]] = {}

    def add(
        self, name: str, ratio: float | None, baseline: str | None, bar: float | None, **facts: Any
    ) -> None:
        """Keep one figure of the latest section, and print it.

        A bar is judged unless sizes are small.
        """
        met = None if bar is None or ratio is None or self.quick else ratio <= bar
        record = {
            "name": name,
            **facts,
            "ratio": ratio,
            "baseline": baseline,
            "bar": bar,
            "met": met,
        }
        record = {
            key: float(f"{value:.4g}") if isinstance(value, float) else value
            for key, value in record.items()
        }
        section, records = list(self.sections.items())[-1]
        records.append(record)
        print(_line(section, record), flush=True)

    def compare(
        self,
        times: Times,
        baseline: str,
        bars: Mapping[str, float | None],
        limit_ms: float | None = None,
        **facts: Any,
    ) -> None:
        """Add the baseline and each contestant that ``bars`` names.

        ``limit_ms`` is what memory allows.
        """
        for name in [baseline, *bars]:
            ms = statistics.median(times[name])
            ratio = statistics.median(
                a / b for a, b in zip(times[name], times[baseline], strict=True)
            )
            extra = {} if limit_ms is None else {"x_limit": ms / limit_ms}
            against = (None, None) if name == baseline else (ratio, baseline)
            self.add(name, *against, bars.get(name), **facts, cpu_ms=ms, **extra)

    def sizes(
        self, numbers: Sequence[int], rows: int, dim: int
    ) -> Iterator[tuple[dict[str, Any], Tensor, int]]:
        """Yield, for each number and kind of ids, what a record says about them, a gradient.

        And steps per measurement.
        """
        for number in numbers:
            grad = torch.randn(number, dim, generator=torch.Generator().manual_seed(0))
            for kind in KINDS:
                repeat = 1 if self.quick or number > self.few else 50 if number == 1 else 4
                yield {"ids": number, "kind": kind, "rows": rows, "dim": dim}, grad, repeat


def _line(section: str, record: Mapping[str, Any]) -> str:
    parts = [f"{section} {record.get('ids', ''):>7} {record.get('kind', ''):8}"]
    parts += [
        f"{record['rows']:>11,} x {record['dim']:<3}" if "rows" in record else " " * 17,
        f"{record['name']:45}",
    ]
    parts += [f"{record['cpu_ms']:9.3f} ms" if "cpu_ms" in record else " " * 12]
    parts += [f"{record['x_limit']:5.1f} x limit" if "x_limit" in record else " " * 13]
    if record["ratio"] is not None:
        parts += [f"{record['ratio']:8.4g} x {record['baseline']}"]
    if record["bar"] is not None:
        parts += [f"(bar {record['bar']}{JUDGED[record['met']]})"]
    return " ".join(parts).rstrip()


# --- sections ---


def world_one(run: Run) -> None:
    """One process, row-wise Adagrad, against raw FBGEMM (CPU, PoolingMode.SUM, no bounds check).

    TorchRec; dense PyKEEN.

    Ratios are a contestant's time over its baseline's. x_limit is a time over what memory allows
    for as many ids (section F).
    """
    # before TorchRec, after which it cannot be imported: two optimizers there have the same name
    import pykeen.nn

    size = run.rows, run.dim
    bars: dict[str, float | None] = {}
    steps = {FBGEMM: fbgemm(*size)}
    for constrainer, bar in ((None, 1.15), ("normalize", 1.35)):
        for gradient in GRADIENTS:
            name = f"shardemb {gradient}" + (f", {constrainer}" if constrainer else "")
            steps[name], bars[name] = ours(*size, gradient, constrainer=constrainer), bar
    with tempfile.TemporaryDirectory() as folder, process_group(0, 1, folder):
        with_torchrec = steps | {TORCHREC: torchrec(*size, parallel=False)}
        for facts, grad, repeat in run.sizes((run.few, run.many), *size):
            both = facts["ids"] == run.many and facts["kind"] == "uniform"
            pool = pool_of(facts["kind"], run.rows, facts["ids"])
            times = in_turn(with_torchrec if both else steps, pool, grad, run.rounds, repeat)
            limit = row_limit(*size, facts["ids"], facts["kind"], 4 * run.rounds)
            run.compare(
                times, FBGEMM, bars, limit and 1e-6 * limit["step_ns"] * facts["ids"], **facts
            )
            if both:
                run.compare(
                    times,
                    TORCHREC,
                    {f"shardemb {gradient}": 0.25 for gradient in GRADIENTS},
                    **facts,
                )
        del with_torchrec
    table = pykeen.nn.Embedding(run.rows, shape=run.dim)
    steps = {PYKEEN_ADAM: single(table, torch.optim.Adam(table.parameters()))}
    steps |= {f"shardemb {gradient}": ours(*size, gradient) for gradient in GRADIENTS}
    steps["shardemb LazyAdam"] = ours(*size, "sparse", "LazyAdam")
    grad = torch.randn(run.few, run.dim)
    times = in_turn(steps, pool_of("uniform", run.rows, run.few)[:4], grad, run.rounds)
    bars = dict.fromkeys(list(steps)[1:], 0.01)
    run.compare(times, PYKEEN_ADAM, bars, ids=run.few, kind="uniform", rows=run.rows, dim=run.dim)


def _variants() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the options of shardemb.Embedding that concern several ranks, the default first."""
    yield "", {}
    if "deduplicate" in inspect.signature(shardemb.Embedding).parameters:
        yield ", deduplicate", {"deduplicate": True}
        yield ", no deduplicate", {"deduplicate": False}


def _on_rank(run: Run) -> list[Times]:
    size = run.rows, run.dim
    steps = {DMP: torchrec(*size, parallel=True)}
    for name, options in _variants():
        steps |= {
            f"shardemb {gradient}{name}": ours(*size, gradient, **options) for gradient in GRADIENTS
        }
    results = []
    for facts, grad, repeat in run.sizes((1, run.few, run.many), *size):
        pool = pool_of(facts["kind"], run.rows, facts["ids"], seed=dist.get_rank())
        results.append(in_turn(steps, pool, grad, run.rounds, repeat, before=dist.barrier))
    return results


def world_two(run: Run) -> None:
    """Two gloo processes of one thread each, row-wise Adagrad, ids per rank.

    Against TorchRec's DistributedModelParallel.

    Times are those of the rank that needs more, round by round; mean_ms is of the mean of both. A
    barrier before each step is not timed.
    """
    by_rank = in_processes(2, _on_rank, run)
    for (facts, *_), *of_ranks in zip(
        run.sizes((1, run.few, run.many), run.rows, run.dim), *by_rank, strict=True
    ):
        bar = {1: 0.5, run.many: 0.35}.get(facts["ids"])
        slower = {
            name: [max(ms) for ms in zip(*(times[name] for times in of_ranks), strict=True)]
            for name in of_ranks[0]
        }
        bars = {
            f"shardemb {gradient}{name}": None if name else bar
            for name, _ in _variants()
            for gradient in GRADIENTS
        }
        run.compare(slower, DMP, bars, **facts)
        for record in run.sections["B"][-len(slower) :]:
            per_round = zip(*(times[record["name"]] for times in of_ranks), strict=True)
            record["mean_ms"] = round(statistics.median(map(statistics.mean, per_round)), 4)


def adam(run: Run) -> None:
    """LazyAdam's step over that of torch.nn.Embedding(sparse=True) with SparseAdam.

    Which has the same rule.
    """
    table = torch.nn.Embedding(run.rows, run.dim, sparse=True)
    steps = {TORCH_ADAM: single(table, torch.optim.SparseAdam(table.parameters()))}
    steps["shardemb LazyAdam"] = ours(run.rows, run.dim, "sparse", "LazyAdam")
    for facts, grad, repeat in run.sizes((run.many,), run.rows, run.dim):
        times = in_turn(steps, pool_of(facts["kind"], run.rows, run.many), grad, run.rounds, repeat)
        run.compare(times, TORCH_ADAM, {"shardemb LazyAdam": 0.5}, **facts)


def _grow(run: Run, rows: int, gradient: str, dim: int) -> dict[str, Any]:
    """Construct a small and a large table, time them in turn.

    And see what the large one's construction took.
    """
    status, grad = "/proc/self/status", torch.randn(run.many, dim)
    small, pools = (
        ours(run.growth[0], dim, gradient),
        [pool_of("uniform", n, run.many) for n in (run.growth[0], rows)],
    )
    small(pools[0][0], grad)  # loads whatever is loaded late
    before, start = proc_bytes(status, "VmHWM"), time.perf_counter()
    large = ours(rows, dim, gradient)
    seconds, peak = time.perf_counter() - start, proc_bytes(status, "VmHWM") - before
    # a batch is (2, n): ids of the small table, and of the large one
    pairs = [torch.stack(pair) for pair in zip(*pools, strict=True)]
    steps = {
        "small": lambda ids, grad: small(ids[0], grad),
        "large": lambda ids, grad: large(ids[1], grad),
    }
    times = in_turn(steps, pairs, grad, run.rounds)
    return {
        "times": times,
        "seconds": seconds,
        "peak": peak,
        "peak_after": proc_bytes(status, "VmHWM") - before,
    }


def growth(run: Run) -> None:
    """A step at 10 and 100 times the rows over one at 1,000,000 (ids uniform, row-wise Adagrad).

    And what construction takes.

    The peak is the process' VmHWM beyond that before the construction, over the bytes of rows and
    state; with the steps in ratio_with_steps, since an optimizer makes its state in its first step.
    A small table lies in part in the cache, so the memory's limit (section F) grows too.
    """
    dim = 32
    limits = {
        rows: row_limit(rows, dim, run.many, "uniform", 4 * run.rounds) for rows in run.growth
    }
    for rows, limit in limits.items():
        least = limits[run.growth[0]]
        if limit is not None and least is not None and limit is not least:
            facts = {"ids": run.many, "kind": "uniform", "rows": rows, "dim": dim}
            grown, ms = limit["step_ns"] / least["step_ns"], 1e-6 * limit["step_ns"] * run.many
            run.add(
                "the memory's limit", grown, f"{run.growth[0]:,} rows", None, **facts, cpu_ms=ms
            )
    for gradient in GRADIENTS:
        for rows in run.growth[1:]:
            facts = {"ids": run.many, "kind": "uniform", "rows": rows, "dim": dim}
            expected, free = rows * (dim + 1) * 4, proc_bytes("/proc/meminfo", "MemAvailable")
            if free < 1.15 * expected + 2**30:
                print(f"D {rows:,} x {dim}: skipped, {free:,} bytes are free")
                continue
            (seen,) = in_processes(1, _grow, run, rows, gradient, dim)
            times = {
                f"shardemb {gradient}": seen["times"]["large"],
                f"{run.growth[0]:,} rows": seen["times"]["small"],
            }
            run.compare(times, f"{run.growth[0]:,} rows", {f"shardemb {gradient}": 1.3}, **facts)
            memory = {
                "seconds": seen["seconds"],
                "peak_bytes": seen["peak"],
                "ratio_with_steps": seen["peak_after"] / expected,
            }
            bar = 1.1 if rows == run.growth[-1] else None
            run.add(
                f"shardemb {gradient}, construction",
                seen["peak"] / expected,
                "bytes",
                bar,
                **facts,
                **memory,
            )


def constraint(run: Run) -> None:
    """What normalizing the touched rows adds to a step (in the step.

    Or as a pass of its own) over PyKEEN's pass over all rows.

    cpu_ms is the median over rounds of the step with less the step without; where noise_ms, the
    median absolute deviation, is larger, the ratio is that of the noise.
    """
    import pykeen.nn

    size, everything = (
        (run.rows, run.dim),
        pykeen.nn.Embedding(run.rows, shape=run.dim, constrainer="normalize"),
    )
    steps: dict[str, Step] = {}
    for gradient in GRADIENTS:
        steps[gradient], steps[f"{gradient}, normalize"] = (
            ours(*size, gradient),
            ours(*size, gradient, constrainer="normalize"),
        )
    # it empties the caches, so that neither of two steps that are compared may follow it
    steps[PYKEEN_PASS] = lambda ids, grad: everything.post_parameter_update()
    for gradient in GRADIENTS:
        steps[f"{gradient}, update"], steps[f"shardemb {gradient}, a pass of its own"] = apart(
            *size, gradient
        )
    facts = {"ids": run.few, "kind": "uniform", "rows": run.rows, "dim": run.dim}
    grad = torch.randn(run.few, run.dim)
    times = in_turn(steps, pool_of("uniform", run.rows, run.few), grad, 3 * run.rounds)
    run.compare(
        times,
        PYKEEN_PASS,
        {f"shardemb {gradient}, a pass of its own": 0.02 for gradient in GRADIENTS},
        **facts,
    )
    for gradient in GRADIENTS:
        added = [
            a - b for a, b in zip(times[f"{gradient}, normalize"], times[gradient], strict=True)
        ]
        cost, all_rows = statistics.median(added), statistics.median(times[PYKEEN_PASS])
        noise = statistics.median(abs(ms - cost) for ms in added)
        ratio = max(cost, noise) / all_rows
        run.add(
            f"shardemb {gradient}, in the step",
            ratio,
            PYKEEN_PASS,
            0.02,
            **facts,
            cpu_ms=cost,
            noise_ms=noise,
        )


def memory_limit(run: Run) -> None:
    """What memory allows: rows copied, then updated, by row_limit.c with prefetching.

    The better of two sizes of pages.
    """
    for facts, *_ in run.sizes((run.few, run.many), run.rows, run.dim):
        limit = row_limit(run.rows, run.dim, facts["ids"], facts["kind"], 4 * run.rounds)
        if limit is None:
            print("F: no C compiler: skipped")
            return
        pages = {key: limit[key] for key in ("small_pages", "huge_pages", "step_ns")}
        run.add(
            "copy and update",
            None,
            None,
            None,
            **facts,
            cpu_ms=1e-6 * limit["step_ns"] * facts["ids"],
            **pages,
        )


def hot_rows(run: Run) -> None:
    """The share of the shard that gets most of a batch's Zipf ids over the mean.

    Every id counted, or each row once.

    Rows are in order of popularity, or shuffled.
    """
    for kind in ("zipf in id order", "zipf"):
        ids = draw_ids(kind, run.rows, run.many)
        for shards in (2, 4, 8):
            plan = shardemb.RowPlan("table", run.rows, run.dim, shards, 0)
            for what, these in (("ids", ids), ("rows", ids.unique())):
                owners = plan.owner_of(these) if hasattr(plan, "owner_of") else these // plan.block
                ratio = owners.bincount(minlength=shards).max().item() * shards / len(these)
                order = "in id order" if kind != "zipf" else "shuffled"
                facts = {"ids": run.many, "kind": "zipf", "rows": run.rows, "dim": run.dim}
                run.add(
                    f"{what} of the busiest of {shards} shards, {order}",
                    ratio,
                    "mean",
                    1.1,
                    **facts,
                )


def gpu(run: Run) -> None:
    """One GPU, fused row-wise Adagrad and normalize, over raw FBGEMM without it (PoolingMode.NONE).

    Ms are of CUDA events.

    bandwidth is that of the bytes that a step cannot avoid, as a share of a device-to-device
    copy's: n rows read and written by the lookup, n gradients read, the distinct rows read and
    written by the update and by normalize.
    """
    if not torch.cuda.is_available():
        print("H: no CUDA device: skipped")
        return
    rows, number = (100_000, 10_000) if run.quick else (10_000_000, 1_000_000)
    name, grad = "shardemb fused, normalize", torch.randn(number, run.dim, device="cuda")
    pool = [ids.cuda() for ids in draw_ids("zipf", rows, 4 * number).chunk(4)]
    steps = {
        FBGEMM: fbgemm(rows, run.dim, cuda=True),
        name: ours(rows, run.dim, "fused", constrainer="normalize", device="cuda"),
    }
    source, target = torch.empty(2, 2**28, device="cuda")
    steps["copy"] = lambda ids, grad: target.copy_(source)
    times = in_turn(steps, pool, grad, run.rounds, clock=cuda_ms)
    moved = 4 * run.dim * (3 * number + 4 * statistics.median(len(ids.unique()) for ids in pool))
    copied = 2 * source.nbytes / statistics.median(times["copy"])
    share = moved / statistics.median(times[name]) / copied
    facts = {"ids": number, "kind": "zipf", "rows": rows, "dim": run.dim, "bandwidth": share}
    run.compare(times, FBGEMM, {name: 1.1}, **facts, device=torch.cuda.get_device_name())


SECTIONS = dict(
    zip(
        "ABCDEFGH",
        (world_one, world_two, adam, growth, constraint, memory_limit, hot_rows, gpu),
        strict=True,
    )
)


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--rounds", type=int, help="9, or 3 with --quick")
    parser.add_argument("--quick", action="store_true", help="small tables, no bar is judged")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    chosen = arguments.only.upper().split(",")
    if not set(chosen) <= set(SECTIONS) or (arguments.rounds is not None and arguments.rounds < 1):
        parser.error(f"expected sections among {','.join(SECTIONS)} and at least one round")
    torch.set_num_threads(1)
    run = Run(arguments.rounds or (3 if arguments.quick else 9), arguments.quick)
    for section in chosen:
        print(f"\n{section}: {inspect.getdoc(SECTIONS[section])}", flush=True)
        run.sections[section] = []
        SECTIONS[section](run)
        gc.collect()
    judged = [
        (section, record)
        for section, records in run.sections.items()
        for record in records
        if record["met"] is not None
    ]
    missed = [_line(section, record) for section, record in judged if not record["met"]]
    print(
        "\n".join(
            [
                f"\n{len(judged) - len(missed)} of {len(judged)} bars met; missed:",
                *(missed or ["none"]),
            ]
        )
    )
    if arguments.output is not None or not arguments.quick:
        notes = {
            section: " ".join((inspect.getdoc(SECTIONS[section]) or "").split())
            for section in run.sections
        }
        name = "step" if chosen == list(SECTIONS) else f"step_{''.join(chosen)}"
        body = {
            "rounds": run.rounds,
            "quick": run.quick,
            "threads": 1,
            "notes": notes,
            "sections": run.sections,
        }
        write(name, body, arguments.output)


if __name__ == "__main__":
    main()
