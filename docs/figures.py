"""Tables of measured figures, made from ``benchmarks/results`` when the documentation is built.

A page says ``<!-- figures: NAME -->`` where the table NAME belongs. README.md holds the table
"headline" itself; ``python docs/figures.py`` writes it there anew.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARK = re.compile(r"<!-- figures: (\w+) -->")
HEADLINE = re.compile(r"(<!-- headline -->\n).*?(?=<!-- /headline -->)", re.DOTALL)

KINDS = (("4096 uniform", 4096, "uniform"), ("4096 Zipf", 4096, "zipf"))
KINDS += (("65536 uniform", 65536, "uniform"), ("65536 Zipf", 65536, "zipf"))


def result(name: str) -> dict[str, Any]:
    """Return the newest result of a benchmark."""
    paths = sorted(RESULTS.glob(f"{name}_*.json"))
    return json.loads(paths[-1].read_text())


def source(name: str) -> str:
    """Link a result's command to its file."""
    path = sorted(RESULTS.glob(f"{name}_*.json"))[-1]
    found = result(name)
    cpu, cores = found["machine"]["cpu"], found["machine"]["cores"]
    environment = "".join(f"{key}={value} " for key, value in found["environment"].items())
    return (
        f"(`{environment}{found['command']}`, {cores}-core {cpu}, torch"
        f" {found['versions']['torch']}, [{found['date']}](../benchmarks/results/{path.name}))"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]], name: str) -> str:
    """Return a Markdown table with its source below."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{source(name)}"


def pick(entries: Iterable[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """Return the one entry with these values."""
    (found,) = [e for e in entries if all(e.get(k) == v for k, v in wanted.items())]
    return found


def _step(name: str) -> str:
    entries = result(name)["sections"]["A"]
    rows = []
    for label, ids, kind in KINDS:
        fbgemm = pick(entries, name="FBGEMM", ids=ids, kind=kind)
        row = [label, f"{fbgemm['cpu_ms']:.3g} ms, {fbgemm['x_limit']:.1f}"]
        for contestant in ("sparse", "sparse, normalize", "fused", "fused, normalize"):
            entry = pick(
                entries, name=f"shardemb {contestant}", ids=ids, kind=kind, baseline="FBGEMM"
            )
            row.append(f"{entry['ratio']:.2f}, {entry['x_limit']:.1f}")
        rows.append(row)
    header = [
        "ids",
        "FBGEMM",
        "`sparse`",
        "`sparse`, `normalize`",
        "`fused`",
        "`fused`, `normalize`",
    ]
    return table(header, rows, name)


def step() -> str:
    """A step against FBGEMM's own table."""
    return _step("step")


def step_memory_kept() -> str:
    """The same where the allocator keeps freed blocks."""
    return _step("kept_memory")


def step_peers() -> str:
    """A sparse step against other systems."""
    a, b, c = (result("step")["sections"][section] for section in "ABC")
    dmp = "TorchRec DistributedModelParallel"
    rows = []
    for against, entries, ids, kind, name in (
        ("TorchRec ShardedEmbeddingCollection", a, 65536, "uniform", "shardemb sparse"),
        ("PyKEEN and Adam, dense", a, 4096, "uniform", "shardemb sparse"),
        ("torch SparseAdam", c, 65536, "uniform", "shardemb LazyAdam"),
        (dmp, b, 65536, "uniform", "shardemb sparse"),
        (dmp, b, 65536, "zipf", "shardemb sparse"),
        (dmp, b, 1, "uniform", "shardemb sparse"),
    ):
        entry = pick(entries, name=name, ids=ids, kind=kind, baseline=against)
        ranks = "two ranks, per rank" if against == dmp else "one process"
        rows.append([name, against, f"{ids} {kind}", ranks, f"{entry['ratio']:.2g}"])
    return table(["contestant", "against", "ids", "ranks", "share of its CPU time"], rows, "step")


def step_growth() -> str:
    """A step at more rows over one at 1e6."""
    entries = result("step")["sections"]["D"]
    rows = []
    for name in ("shardemb sparse", "shardemb fused", "the memory's limit"):
        ratios = [
            pick(entries, name=name, rows=size, baseline="1,000,000 rows")["ratio"]
            for size in (10**7, 10**8)
        ]
        rows.append([name, *(f"{ratio:.2f}" for ratio in ratios)])
    return table(["65536 uniform ids, 32 columns", "1e7 rows", "1e8 rows"], rows, "step")


def optimizers() -> str:
    """Steps of the row-wise optimizers against torch's, and what a constrainer adds."""
    entries = result("optimizers")["results"]
    names = ("shardemb SGD", "shardemb Adagrad", "shardemb Adam")
    names += ("Adagrad, normalize in the same pass", "Adagrad, normalize in a pass of its own")
    names += ("torch Adagrad, normalize on all rows",)
    rows = [
        [label, *(f"{pick(entries, step=n, ids=ids, kind=kind)['ratio']:.3g}" for n in names)]
        for label, ids, kind in KINDS
    ]
    header = ["ids", "`SparseSGD` / torch's SGD", "`SparseAdagrad` / torch's"]
    header += ["`LazyAdam` / SparseAdam", "`normalize` in the same pass", "in a pass of its own"]
    return table([*header, "on all rows, as PyKEEN"], rows, "optimizers")


def main_job() -> str:
    """The README's first command, on one worker and on two."""
    rows = []
    for run in result("main_job_wordnet")["runs"]:
        test, threads = run["test"], "two threads" if run["workers"] == 1 else "one thread each"
        hits = [f"{test[f'hits_at_{k}']:.3f}" for k in (1, 3, 10)]
        speed = f"{run['median_triples_per_s']:,}"
        rows.append(
            [
                f"{run['workers']} ({threads})",
                f"{test['mrr']:.4f}",
                *hits,
                speed,
                f"{run['wall_s']:.0f} s",
            ]
        )
    header = ["workers", "MRR", "Hits@1", "Hits@3", "Hits@10", "triples/s in training", "all, wall"]
    return table(header, rows, "main_job_wordnet")


def training() -> str:
    """Triples a second of whole jobs."""
    found = result("train")
    rows = [[name, f"{entry['triples_per_s']:,}"] for name, entry in found["synthetic"].items()]
    large = found["large"]
    rows.append([f"{large['entities']:,} entities, 64 floats a row", f"{large['triples_per_s']:,}"])
    return table(["", "triples/s"], rows, "train")


def _scaling(cases: dict[str, Any]) -> str:
    rows = []
    for name, case in cases.items():
        ranks = f"{name} rank{'s' * (name != '1')}" if name.isdigit() else "2 independent processes"
        sent = case.get("sent_bytes_per_rank") or 0
        ratio = case.get("sent_over_predicted")
        rows.append(
            [
                f"{ranks}, {case['negatives']} negatives"
                + ", oversubscribed" * case["oversubscribed"],
                f"{case['triples_per_s']:,}",
                f"{case['speedup']:.2f}",
                f"{case['cpu_efficiency']:.2f}",
                f"{sent / 1e6:.2f} MB" + (f", {ratio:.3f}" if ratio else "") if sent else "-",
                f"{case['step_ms']:.1f} ms"
                + (
                    f", {case['predicted_over_measured']:.2f}"
                    if "predicted_over_measured" in case
                    else ""
                ),
            ]
        )
    header = ["", "triples/s", "over 1 rank", "CPU efficiency", "sent, over plan"]
    return table([*header, "step, plan over it"], rows, "scaling")


def weak_scaling() -> str:
    """As many rows and triples a rank."""
    weak = result("scaling")["weak"]
    return "\n\n".join(_scaling(cases) for cases in weak.values())


def strong_scaling() -> str:
    """As many rows and triples in all."""
    return _scaling(result("scaling")["strong"])


def growth() -> str:
    """More rows on one rank."""
    rows = []
    for case in result("scaling")["growth"].values():
        size = case["rows"] * case["rows_and_state_bytes_per_row"]
        memory = f"{case['resident_bytes'] / 1e6:,.0f} MB", f"{size / 1e6:,.0f} MB"
        step_ms, construct = f"{case['step_ms']:.2f} ms", f"{case['construct_s']:.1f} s"
        rows.append([f"{case['rows']:,}", step_ms, *memory, construct])
    header = ["rows", "step", "resident, beyond the bare process", "rows and state", "construction"]
    return table(header, rows, "scaling")


def constrainers() -> str:
    """CPU time of training with a constrainer over that without."""
    found = result("scaling")["constraint"]
    rows = [
        [f"`{name}`", *(f"{found[ranks][name]['over_none']:.2f}" for ranks in "12")]
        for name in ("normalize", "clamp_norm")
    ]
    return table(["", "1 rank", "2 ranks"], rows, "scaling")


def peers_training() -> str:
    """The same training with another table for the entities."""
    rows = [
        [name, f"{entry['triples_per_s']:,}"]
        for name, entry in result("scaling")["peers"]["training"].items()
    ]
    return table(["entities in", "triples/s"], rows, "scaling")


def peers_lookup() -> str:
    """A lookup, its backward and update, against TorchRec."""
    lookups = result("scaling")["peers"]["lookups"]
    rows = [[name, f"{entry['ms']:.1f} ms"] for name, entry in lookups.items()]
    return table(["", "wall time"], rows, "scaling")


def modelled() -> str:
    """What the plan says of machines that are not here."""
    rows = [
        [
            machine,
            f"{case['rows']:.0e}",
            f"{case['ranks']}",
            f"{case['gib_per_rank']:.1f} GiB",
            f"{case['step_ms']:.1f} ms",
            f"{case['triples_per_s'] / 1e6:.1f}",
        ]
        for machine, entry in result("scaling")["modelled"].items()
        for case in entry["found"]
        if case["fits"] and case["ranks"] in (8, 64, 128, 512)
    ]
    header = ["machine", "rows", "ranks", "memory a rank", "step", "million triples/s"]
    return table(header, rows, "scaling")


def ranking() -> str:
    """Exact ranking, as a share of the matrix product in it."""
    found = result("rank")
    rows = []
    for scorer in ("distmult", "complex"):
        shares = [
            pick(found["one worker"], scorer=scorer, ranks=ranks)["share_of_the_product"]
            for ranks in ("raw", "filtered")
        ]
        speedup = pick(found["two workers"], scorer=scorer)["speedup"]
        rows.append([scorer, *(f"{share:.2f}" for share in shares), f"{speedup:.2f}"])
    return table(["", "raw", "filtered", "two workers over one, wall"], rows, "rank")


def quality() -> str:
    """Filtered metrics of the published graphs."""
    found = result("quality")
    rows = []
    for name in ("codex-s-complex", "wn18rr-complex"):
        (run,) = found[name]["runs"]
        test = run["test"]
        hits = [f"{test[f'hits_at_{k}']:.3f}" for k in (1, 3, 10)]
        rows.append([f"configs/{name}.toml", f"{test['mrr']:.4f}", *hits, f"{run['wall_s']:.0f} s"])
    header = ["", "MRR", "Hits@1", "Hits@3", "Hits@10", "time, 2 threads"]
    return table(header, rows, "quality")


def ingest() -> str:
    """A graph that does not fit into memory."""
    found = result("ingest_debian")
    row = [f"{found['entities']:,}", f"{sum(found['triples'].values()) / 1e6:.1f} million"]
    row += [f"{found['input_bytes'] / 1e9:.1f} GB", f"{found['seconds']:.0f} s"]
    row += [f"{found['peak_rss_mib'] / 1024:.1f} GiB", f"{1000 * found['open']['seconds']:.0f} ms"]
    header = ["entities", "triples", "text", "time, 2 cores", "memory", "opens in"]
    return table(header, [row], "ingest_debian")


def checkpoints() -> str:
    """Saving, loading and opening."""
    found = result("checkpoint")
    background, speed = found["background"], found["files"]["gigabytes_per_s"]
    share, opened = found["files"]["speed_relative_to_the_disk"], found["open"]
    rows = [
        [
            "steps lost to a background save every 60 s",
            f"{100 * background['cost_every_60_s']:.1f} %",
        ],
        ["longest stop of training by its copy", f"{max(background['copy_s']):.2f} s"],
        ["loading with all hashes", f"{speed['load, sha256']:.2f} GB/s"],
        ["the same, as a share of the disk's reading", f"{share['load, sha256']:.2f}"],
        ['loading with verify="size"', f"{share['load, size']:.2f}"],
        [f"opening {opened['bytes'] / 1e9:.1f} GB", f"{opened['open_s']:.2f} s"],
        ["the first 1000 rows from the disk", f"{opened['first_1000_rows_s']:.1f} s"],
    ]
    return table(["", "measured"], rows, "checkpoint")


def reliability() -> str:
    """Kills, damage and dead ranks."""
    found = result("reliability")
    crashes, damage, ends = found["crashes"], found["corruption"], found["ends"]
    slowest, within = ends["slowest_s"], crashes["kills_within_a_save"]
    planted = crashes["planted_overwriting_saver_caught_after_kills"]
    results = {
        f"{crashes['kills']} SIGKILLs, {within} of them within a save": (
            f"{crashes['lost_or_torn']} checkpoints lost or torn"
        ),
        "the same with a saver that overwrites in place": f"caught after {planted} kills",
        f"{damage['mutations']} random mutations of files and manifests": (
            f"{damage['silent_or_unclear']} silent"
        ),
        "a rank is killed: the others raise after": f"{slowest['die']:.2f} s",
        "a rank raises": f"{slowest['raise']:.2f} s",
        "a rank ends too early": f"{slowest['end']:.2f} s",
        "a rank stops": f"the timeout + {slowest['stop'] - ends['timeout_s']:.2f} s",
    }
    rows = [list(entry) for entry in results.items()]
    return table(["fault", "result"], rows, "reliability")


def recovery() -> str:
    """Steps again after a kill on Ray."""
    found = result("ray_recovery")["seconds"]
    rows = [["median", f"{found['median']:.1f} s"], ["slowest", f"{found['most']:.1f} s"]]
    return table(["from kill -9 to the next step", ""], rows, "ray_recovery")


def serving() -> str:
    """Rows a second of a served table."""
    rows = [
        [name, f"{entry['rows_per_s'] / 1e6:.2f}"]
        for name, entry in result("serving")["lookup"].items()
    ]
    return table(["", "million rows/s"], rows, "serving")


def startup() -> str:
    """What a process costs before it trains."""
    rows = [
        [name, f"{entry['cpu_seconds']:.2f} s", f"{entry['resident_megabytes']:.0f} MB"]
        for name, entry in result("startup")["results"].items()
    ]
    return table(["", "CPU a process", "resident"], rows, "startup")


def headline() -> str:
    """The README's table."""

    def line(what: str, figure: str, conditions: str, name: str) -> list[str]:
        path = sorted(RESULTS.glob(f"{name}_*.json"))[-1].name
        script = result(name)["command"].split()[1]
        return [what, figure, conditions, f"[`{script}`](benchmarks/results/{path})"]

    steps, train, scaling = result("step")["sections"], result("train"), result("scaling")
    against = {"ids": 65536, "kind": "uniform"}
    fbgemm = pick(steps["A"], name="shardemb sparse", baseline="FBGEMM", **against)
    dmp = pick(
        steps["B"], name="shardemb sparse", baseline="TorchRec DistributedModelParallel", **against
    )
    weak = scaling["weak"]["1000 negatives"]["2"]
    share = pick(result("rank")["one worker"], scorer="complex", ranks="filtered")
    crashes, damage = result("reliability")["crashes"], result("reliability")["corruption"]
    debian = result("ingest_debian")
    mrr = result("quality")["wn18rr-complex"]["runs"][0]["test"]["mrr"]
    table_of = "65536 ids of 1,000,000 x 128, row-wise Adagrad, glibc's allocator as it is"
    one = train["synthetic"]["ComplEx, 1 process"]["triples_per_s"]
    two = train["synthetic"]["ComplEx, 2 workers, 1000 triples each a step"]["triples_per_s"]
    settings = "ComplEx, 128 floats a row, 128 shared negatives a side"
    rows = [
        line("step over FBGEMM's", f"{fbgemm['ratio']:.2f} of its CPU time", table_of, "step"),
        line(
            "step over TorchRec's",
            f"{dmp['ratio']:.2f} of its CPU time",
            f"{table_of}, 2 ranks",
            "step",
        ),
        line("training, 1 process", f"{one:,} triples/s", settings, "train"),
        line("training, 2 workers", f"{two:,} triples/s", settings, "train"),
        line(
            "2 ranks over 1",
            f"{weak['speedup']:.2f} times the triples/s",
            "weak scaling, 1000 negatives a side",
            "scaling",
        ),
        line(
            "exact filtered ranking",
            f"{share['share_of_the_product']:.2f} of the matrix product's speed",
            "1,000,000 x 128, 1 thread",
            "rank",
        ),
        line("WN18RR", f"MRR {mrr:.4f}", "ComplEx, 40 epochs, filtered test ranks", "quality"),
        line(
            f"ingest of {debian['entities']:,} entities",
            f"{debian['seconds']:.0f} s",
            f"{sum(debian['triples'].values()) / 1e6:.1f} million triples, in 4 GiB of memory",
            "ingest_debian",
        ),
        line(
            f"{crashes['kills']} SIGKILLs",
            f"{crashes['lost_or_torn']} checkpoints lost or torn",
            "1 to 3 ranks, in training and within saves",
            "reliability",
        ),
        line(
            f"{damage['mutations']} damaged checkpoints",
            f"{damage['silent_or_unclear']} loaded without an error",
            "bits, truncation, missing and swapped files, edited manifests",
            "reliability",
        ),
    ]
    lines = [["", "measured", "conditions", "by"], ["---"] * 4, *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        *(step, step_memory_kept, step_peers, step_growth, optimizers, main_job, training),
        *(weak_scaling, strong_scaling, growth, constrainers, peers_training, peers_lookup),
        *(modelled, ranking, quality, ingest, checkpoints, reliability, recovery, serving),
        *(startup, headline),
    )
}


def with_figures(markdown: str) -> str:
    """Replace each ``<!-- figures: NAME -->`` by its table; KeyError for an unknown name."""
    return MARK.sub(lambda found: TABLES[found[1]](), markdown)


def with_headline(readme: str) -> str:
    """Return the README with its table made anew."""
    return HEADLINE.sub(lambda found: f"{found[1]}{headline()}\n", readme)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_headline(path.read_text()))
