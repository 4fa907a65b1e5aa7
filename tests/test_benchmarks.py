"""The benchmarks run, on small tables; no time is judged."""

import importlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def _run(
    script: str, *arguments: str | Path, timeout: float = 200
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "benchmarks" / f"{script}.py", *arguments]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    }
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=timeout, check=False
    )


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _numbers(part)
    elif isinstance(value, int | float):
        yield value


def test_step_measures_every_section(tmp_path: Path) -> None:
    pytest.importorskip("pykeen")
    path = tmp_path / "step.json"
    done = _run("step", "--quick", "--rounds", "1", "--output", path, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(path.read_text())
    assert {"command", "date", "machine", "versions", "rounds", "notes", "sections"} <= set(
        document
    )
    assert set(document["sections"]) == set(document["notes"]) == set("ABCDEFGH")
    for section, records in document["sections"].items():
        assert records or f"{section}: no " in done.stdout, section  # no compiler, no CUDA device
        for record in records:
            assert {"name", "ids", "kind", "rows", "dim", "ratio", "baseline", "bar", "met"} <= set(
                record
            )
            assert record["met"] is None
            assert record["name"] in done.stdout
    assert all(math.isfinite(number) for number in _numbers(document["sections"]))


def test_an_unknown_section_is_refused() -> None:
    done = _run("step", "--only", "Z", timeout=60)
    assert done.returncode == 2
    assert "expected sections among A,B" in done.stderr


@pytest.mark.parametrize(
    ("script", "arguments", "keys"),
    [
        ("reliability", "--kills 3 --mutations 9 --faults 0", {"corruption", "ends", "crashes"}),
        (
            "checkpoint",
            "--rows 20000 --rounds 1 --seconds 0.3 --windows 1 --open-rows 20000",
            {"files", "background", "open", "rows", "dim"},
        ),
        (
            "rank",
            (
                "--rows 3000 --dim 16 --queries 40 --rounds 1 --drawn-rows 3000 --drawn-dim 8"
                " --pykeen-rows 500"
            ),
            {"one worker", "two workers", "all scorers", "drawn", "against PyKEEN"},
        ),
        (
            "quality",
            (
                f"{ROOT / 'configs' / 'codex-s-complex.toml'} --set dataset=wordnet --set"
                " training.epochs=1 --set model.dim=4 --set sampling.scheme=negatives --set"
                " sampling.num_negatives=2 --set training.validation_triples=100"
            ),
            {"codex-s-complex"},
        ),
        (
            "train",
            "--entities 640 --triples 4000 --rounds 1 --dim 8 --pykeen-steps 1",
            {"synthetic"},
        ),
        (
            "ingest",
            f"--work {{tmp_path}} --source {ROOT / 'shardemb' / 'data' / 'wordnet'} --memory 1GiB",
            {
                "entities",
                "triples",
                "input_bytes",
                "seconds",
                "cpu_seconds",
                "peak_rss_mib",
                "open",
            },
        ),
        (
            "scaling",
            "--quick --rounds 1 --only strong,growth,memory,modelled",
            {"calibration", "strong", "growth", "memory", "modelled"},
        ),
        pytest.param(
            "serving",
            "--rows 1000 --dim 8 --ids 64 --rounds 3",
            {"lookup", "ray"},
            marks=pytest.mark.ray,
        ),
    ],
)
def test_a_benchmark_runs_and_says_how(
    tmp_path: Path, script: str, arguments: str, keys: set[str]
) -> None:
    path = tmp_path / "result.json"
    done = _run(script, *arguments.format(tmp_path=tmp_path).split(), "--output", path)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(path.read_text())
    assert {"command", "date", "machine", "versions"} | keys <= set(document)
    assert all(math.isfinite(number) for number in _numbers(document))


def test_a_set_runs_and_draws(tmp_path: Path) -> None:
    done = _run("run", "--only", "rank", "--output", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"rank.json", "rank.png"} == {path.name for path in tmp_path.iterdir()}
    assert str(tmp_path / "rank.png") in done.stdout
    done = _run("run", "--only", "rank,speed", "--output", tmp_path, timeout=60)
    assert done.returncode == 2
    assert "got speed, expected scripts among step,train,rank,checkpoint,scaling" in done.stderr


def test_a_set_whose_script_fails_says_so(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()  # no folder can be made there
    done = _run("run", "--only", "rank", "--output", tmp_path / "taken")
    assert done.returncode == 1
    assert "FAILED" in done.stdout


RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize("name", ["step", "train", "rank", "checkpoint", "scaling"])
def test_results_are_drawn_with_labelled_axes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    plots = importlib.import_module("plots")
    figures = plots.DRAWINGS[name](result(name))
    assert figures
    for figure in figures.values():
        assert str(result(name)["date"]) in figure.get_suptitle()
        for axes in figure.axes:
            assert axes.get_xlabel()
            assert axes.get_ylabel() or axes.get_yticklabels()
            assert axes.lines or axes.patches


PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
#: README.md and docs/, without the breaks of their lines
TOLD = " ".join("\n".join(PAGES.values()).split())


def result(name: str) -> dict[str, Any]:
    """The one result of a benchmark that the pages name."""
    (found,) = (path for path in RESULTS.glob(f"{name}_*.json") if path.name in TOLD)
    return json.loads(found.read_text())


def told(pattern: str, *expected: object) -> None:
    """Look for a sentence, wherever it stands.

    Each ``#`` is a figure, and all places that have it must have these.
    """
    parts = [re.escape(part) for part in " ".join(pattern.split()).split("#")]
    found = re.findall(r"([\d.,/]*\d)".join(parts), TOLD)
    figures = {each if isinstance(each, tuple) else (each,) for each in found}
    assert figures == {tuple(str(each) for each in expected)}, pattern


def rounded(ratio: float) -> str:
    return f"{ratio:.2f}"


def _step(
    section: str, name: str, ids: int, kind: str = "uniform", run: str = "step", **more: object
) -> dict[str, Any]:
    want = {"name": name, "ids": ids, "kind": kind, **more}
    (record,) = (each for each in result(run)["sections"][section] if want.items() <= each.items())
    return record


def test_the_pages_tell_what_a_step_costs() -> None:
    kinds = {"uniform": "uniform", "zipf": "Zipf"}
    for run, how in (("step", ""), ("kept_memory", ", memory kept")):
        for ids, (kind, shown) in itertools.product((4096, 65536), kinds.items()):
            raw = _step("A", "FBGEMM", ids, kind, run)
            row = [f"{raw['cpu_ms']:.3g}", f"{raw['x_limit']:.1f}"]
            for name in ("sparse", "sparse, normalize", "fused", "fused, normalize"):
                record = _step("A", f"shardemb {name}", ids, kind, run, baseline="FBGEMM")
                row += [rounded(record["ratio"]), f"{record['x_limit']:.1f}"]
            told(f"| {ids} {shown}{how} | # ms, # | #, # | #, # | #, # | #, # |", *row)
    kept = [
        _step("A", "shardemb sparse", 65536, kind, "kept_memory", baseline="FBGEMM")["ratio"]
        for kind in kinds
    ]
    told("| the same where the allocator keeps FBGEMM's blocks too | #, # |", *map(rounded, kept))
    small, dmp = (
        [_step("A", "shardemb sparse", 65536, kind, baseline="FBGEMM") for kind in kinds],
        "TorchRec DistributedModelParallel",
    )
    told("# of the CPU time (uniform), # (Zipf)", *(rounded(each["ratio"]) for each in small))
    told(
        "| against what memory allows | #, # times |", *(f"{each['x_limit']:.1f}" for each in small)
    )
    normalized = [_step("A", "shardemb sparse, normalize", 65536, kind) for kind in kinds]
    told("| the same with `normalize` | #, # |", *(rounded(each["ratio"]) for each in normalized))
    collection = _step(
        "A", "shardemb sparse", 65536, baseline="TorchRec ShardedEmbeddingCollection"
    )["ratio"]
    told("| TorchRec's ShardedEmbeddingCollection | 65536 uniform | 1/# |", round(1 / collection))
    dense = _step("A", "shardemb sparse", 4096, baseline="PyKEEN and Adam, dense")["ratio"]
    told("| PyKEEN's `Embedding` with Adam | 4096 uniform | 1/# |", round(1 / dense))
    lazy = _step("C", "shardemb LazyAdam", 65536)["ratio"]
    told("| torch's SparseAdam, by `LazyAdam` | 65536 uniform | # |", rounded(lazy))
    uniform, zipf, one = (
        _step("B", "shardemb sparse", *which, baseline=dmp)["ratio"]
        for which in ((65536,), (65536, "zipf"), (1,))
    )
    told(
        "two ranks, per rank | 65536 uniform | # | | the same | 65536 Zipf | # | | the same | 1"
        " uniform | # |",
        *map(rounded, (uniform, zipf, one)),
    )
    told(
        "| against TorchRec's DistributedModelParallel on two ranks | #, # |",
        rounded(uniform),
        rounded(zipf),
    )
    for name, shown in (
        ("shardemb sparse", "`sparse`"),
        ("the memory's limit", "the memory's own limit"),
    ):
        more = [_step("D", name, 65536, rows=rows)["ratio"] for rows in (10**7, 10**8)]
        told(f"| {shown} | # | # |", *map(rounded, more))
    fused, sparse = (
        [_step("D", f"shardemb {name}", 65536, rows=rows) for rows in (10**7, 10**8)]
        for name in ("fused", "sparse")
    )
    slower = f"{fused[1]['cpu_ms'] / sparse[1]['cpu_ms']:.1f}"
    told(
        "| `fused`, which takes # times as long at 10<sup>8</sup> | # | # |",
        slower,
        *(rounded(each["ratio"]) for each in fused),
    )
    told("| #; the memory's own limit # |", rounded(sparse[1]["ratio"]), rounded(more[1]))
    built = _step("D", "shardemb sparse, construction", 65536, rows=10**8)
    told("no more memory than rows and state (# of it", rounded(built["ratio_with_steps"]))
    own_pass = _step("E", "shardemb sparse, a pass of its own", 4096)["ratio"]
    told("costs 1/# of PyKEEN's pass over all rows", round(1 / own_pass))
    told(
        "the busiest of 8 shards is asked for # times",
        rounded(_step("G", "rows of the busiest of 8 shards, in id order", 65536, "zipf")["ratio"]),
    )


def test_the_pages_tell_what_the_optimizers_cost() -> None:
    for ids in (4096, 65536):
        for kind, shown in (("uniform", "uniform"), ("zipf", "Zipf")):
            ratios = {
                r["step"]: r["ratio"]
                for r in result("optimizers")["results"]
                if (r["ids"], r["kind"]) == (ids, kind) and "ratio" in r
            }
            names = [
                "shardemb SGD",
                "shardemb Adagrad",
                "shardemb Adam",
                "Adagrad, normalize in the same pass",
            ]
            row = [
                rounded(ratios[name])
                for name in (*names, "Adagrad, normalize in a pass of its own")
            ]
            told(
                f"| {ids} {shown} | # | # | # | # | # | # |",
                *row,
                round(ratios["torch Adagrad, normalize on all rows"]),
            )


def test_the_pages_tell_how_fast_and_how_good_training_is() -> None:
    for run, shown in zip(
        result("main_job")["runs"], ("1 (two threads)", "2 (one thread each)"), strict=True
    ):
        hits = [f"{run['test'][f'hits_at_{k}']:.3f}" for k in (1, 3, 10)]
        speed = f"{round(run['median_triples_per_s'], -2):,}"
        told(
            f"| {shown} | # | # | # | # | # | # s |",
            f"{run['test']['mrr']:.4f}",
            *hits,
            speed,
            f"{run['wall_s'] + 1e-6:.0f}",
        )
    training = result("train")
    rates = {name: found["triples_per_s"] for name, found in training["synthetic"].items()}
    shown = {name: f"{round(rate, -3) if rate > 1000 else rate:,}" for name, rate in rates.items()}
    labels = {"TransE, 1 process": "TransE (L2), 1 process"}
    labels["PyKEEN ComplEx, sLCWA"] = (
        "PyKEEN 1.11.1, ComplEx, sLCWA, 256 own negatives, in the same run"
    )
    for name, rate in shown.items():
        told(f"| {labels.get(name, name)} | # |", rate)
    told("128 shared negatives a side, 1 process | # triples/s", shown["ComplEx, 1 process"])
    told(
        "the same on 2 workers, 1000 triples each a step | # triples/s",
        shown["ComplEx, 2 workers, 1000 triples each a step"],
    )
    large = training["large"]
    told(
        "graph of # million entities trains at # triples/s",
        f"{large['entities'] / 1e6:.1f}",
        f"{round(large['triples_per_s'], -3):,}",
    )
    told("1 process), # of what the graph", rounded(large["large_over_small"]))
    told(
        "in # GB beyond rows and optimizer state",
        f"{large['beyond_table_and_state_bytes'] / 1e9:.1f}",
    )
    told("candidates is # after one epoch and # after two", *map(rounded, large["valid_mrr"]))
    quality = result("quality")
    for name, shown in (
        ("codex-s-complex", "CoDEx-S, ComplEx, 256 complex numbers, against all entities"),
        ("wn18rr-complex", "WN18RR, ComplEx, 256 complex numbers, 1000 shared negatives"),
    ):
        (run,) = quality[name]["runs"]
        hits = [f"{run['test'][f'hits_at_{k}']:.3f}" for k in (1, 3, 10)]
        told(
            f"| {shown} | # | # | # | # | # s |",
            f"{run['test']['mrr']:.4f}",
            *hits,
            round(run["wall_s"]),
        )
    mrr = [
        f"{quality[name]['runs'][0]['test']['mrr']:.4f}"
        for name in ("wn18rr-complex", "codex-s-complex")
    ]
    told("| WN18RR, CoDEx-S with ComplEx | MRR #, # |", *mrr)


def test_the_pages_tell_how_fast_ranking_ingest_and_serving_are() -> None:
    rank = result("rank")
    one = {
        (record["scorer"], record["ranks"]): record["share_of_the_product"]
        for record in rank["one worker"]
    }
    for record, shown in zip(rank["two workers"], ("DistMult", "ComplEx"), strict=True):
        ours = [one[record["scorer"], ranks] for ranks in ("raw", "filtered")]
        told(f"| {shown} | # | # | # |", *map(rounded, (*ours, record["speedup"])))
    told(
        "one thread | # to # of the matrix product",
        rounded(min(one.values())),
        rounded(max(one.values())),
    )
    told(
        "took # times the CPU time", round(rank["against PyKEEN"]["pykeen_over_shardemb_cpu_time"])
    )
    ingest = result("ingest")
    triples = f"{sum(ingest['triples'].values()) / 1e6:.1f}"
    size, memory = f"{ingest['input_bytes'] / 1e9:.1f}", f"{ingest['peak_rss_mib'] / 1024:.1f}"
    entities, seconds, opened = (
        f"{ingest['entities']:,}",
        round(ingest["seconds"]),
        round(ingest["open"]["seconds"] * 1000),
    )
    told(
        "| # | # million | # GB | # s | # GiB | # ms |",
        entities,
        triples,
        size,
        seconds,
        memory,
        opened,
    )
    told(
        "ingest of # entities, # million triples | # s, # GiB |", entities, triples, seconds, memory
    )
    lookups = result("serving")["lookup"]
    for name, shown in (
        ("in process", "in process, `shardemb.open_store`"),
        ("1 shard(s)", "1 shard, `shardemb serve`"),
        ("2 shard(s)", "2 shards"),
    ):
        told(f"| {shown} | # |", rounded(lookups[name]["rows_per_s"] / 1e6))


def test_the_pages_tell_what_was_lost() -> None:
    reliability = result("reliability")
    crashes, corruption, ends = (
        reliability["crashes"],
        reliability["corruption"],
        reliability["ends"],
    )
    assert crashes["kills"] >= 300
    assert corruption["mutations"] >= 1000
    told(
        "| # SIGKILLs of one rank or all, # of them",
        crashes["kills"],
        crashes["kills_within_a_save"],
    )
    told("| # checkpoints lost or torn", crashes["lost_or_torn"])
    told("in place | caught after # kills", crashes["planted_overwriting_saver_caught_after_kills"])
    told("| # random mutations", corruption["mutations"])
    told("| # silent; each", corruption["silent_or_unclear"])
    counts = (
        crashes["kills"],
        corruption["mutations"],
        crashes["lost_or_torn"],
        corruption["silent_or_unclear"],
    )
    told("| # SIGKILLs, # damaged checkpoints | # lost or torn, # silent |", *counts)
    slowest = {kind: f"{seconds:.2f}" for kind, seconds in ends["slowest_s"].items()}
    late = f"{ends['slowest_s']['stop'] - ends['timeout_s']:.2f}"
    told(
        "after at most # / # / # s / timeout + # s",
        slowest["die"],
        slowest["raise"],
        slowest["end"],
        late,
    )
    found = result("checkpoint")
    files, background, opened = found["files"], found["background"], found["open"]
    cost = f"{background['cost_every_60_s'] * 100:.1f}"
    told("costs # % of the steps (median of # pairs", cost, len(background["lost_in_a_window"]))
    told("| a background save every 60 s | # % of the steps", cost)
    told(
        "a save takes # % of 60 s of CPU time",
        f"{background['cpu_of_a_save_in_60_s_of_all_cores'] * 100:.1f}",
    )
    first, *others = background["copy_s"]
    told(
        "stops training for at most # s (the first, which makes its memory, # s)",
        max(others),
        first,
    )
    speeds, relative = files["gigabytes_per_s"], files["speed_relative_to_the_disk"]
    told(
        "| load # GB, files not in memory, all hashes checked | # GB/s, # of the disk's sequential"
        " reading; # with",
        f"{files['bytes'] / 1e9:.1f}",
        rounded(speeds["load, sha256"]),
        relative["load, sha256"],
        relative["load, size"],
    )
    told(
        "| open a checkpoint of # GB | # s, and # s for",
        f"{opened['bytes'] / 1e9:.1f}",
        rounded(opened["open_s"]),
        f"{opened['first_1000_rows_s']:.1f}",
    )
    recovery = result("ray_recovery")
    seconds, count = recovery["seconds"], len(recovery["kills"])
    told("again within # s (median of #; # at most)", seconds["median"], count, seconds["most"])
    told("`kill -9` on Ray | # s (median of #)", seconds["median"], count)
    assert recovery["last_loss"]["killed"] == recovery["last_loss"]["whole"]


def test_each_result_that_is_named_is_there_with_its_command_beside_it() -> None:
    named = set()
    for page, text in PAGES.items():
        for path in re.findall(r"benchmarks/results/([\w-]+\.json)", text):
            script = json.loads((RESULTS / path).read_text())["command"].split()[1]
            assert script in text, f"{page}: {path}"
            named.add(path)
    assert named == {path.name for path in RESULTS.glob("*.json")}  # none that no page tells of


def test_the_pages_tell_how_training_scales() -> None:
    found = result("scaling")
    names = {
        "1": "1 rank",
        "2": "2 ranks",
        "4": "4 ranks, oversubscribed",
        "2 alone": "2 processes that know nothing of each other",
    }
    groups = {**found["weak"], "2048 in all": found["strong"]}
    for group, cases in groups.items():
        for ranks, case in cases.items():
            row = [
                f"{round(case['triples_per_s'], -2):,}",
                rounded(case["speedup"]),
                rounded(case["cpu_efficiency"]),
            ]
            pattern = f"| {names[ranks]}, {group} | # | # | # |"
            if case["sent_bytes_per_rank"]:
                row += [
                    f"{case['sent_bytes_per_rank'] / 1e6:.2f}",
                    f"{case['sent_over_predicted']:.3f}",
                ]
            pattern += " # MB, # |" if case["sent_bytes_per_rank"] else " - |"
            row.append(f"{case['step_ms']:.1f}")
            if "predicted_over_measured" in case:
                row.append(rounded(case["predicted_over_measured"]))
            told(pattern + (" # ms, # |" if "predicted_over_measured" in case else " # ms |"), *row)
    many, few = (found["weak"][f"{number} negatives"]["2"] for number in (1000, 128))
    told(
        "on 2 ranks over 1, 1000 negatives | # times the triples/s, # of",
        rounded(many["speedup"]),
        rounded(many["cpu_efficiency"]),
    )
    told(
        "the same with 128 negatives | #, # |",
        rounded(few["speedup"]),
        rounded(few["cpu_efficiency"]),
    )
    for case in found["growth"].values():
        resident, limit = (
            case["resident_bytes"] / 1e6,
            case["rows"] * case["rows_and_state_bytes_per_row"] / 1e6,
        )
        row = [
            f"{case['step_ms']:.2f}",
            f"{resident:,.0f}",
            f"{limit:,.0f}",
            f"{case['construct_s']:.1f}",
        ]
        told(f"| {case['rows']:,} | # ms | # MB | # MB | # s |", *row)
    ratios = [case["predicted_over_measured"] for case in found["growth"].values()]
    told("The plan says # to # of these times", rounded(min(ratios)), rounded(max(ratios)))
    told(
        "# of a row and its state on one rank, # on two",
        *(f"{found['memory'][ranks]['over_limit']:.3f}" for ranks in "12"),
    )
    for name in ("normalize", "clamp_norm"):
        told(
            f"| `{name}` | # | # |",
            *(rounded(found["constraint"][ranks][name]["over_none"]) for ranks in "12"),
        )
    for whose in ("shardemb", "TorchRec DistributedModelParallel"):
        times = [found["peers"]["lookups"][f"{whose}, {ranks} rank(s)"]["ms"] for ranks in (1, 2)]
        told(f"| {whose} | # ms | # ms |", *(f"{time:.1f}" for time in times))
    training = {name: case["triples_per_s"] for name, case in found["peers"]["training"].items()}
    shown = {
        name: f"{round(rate, -3 if rate > 20000 else -2):,}" for name, rate in training.items()
    }
    ours, dense = "shardemb", "torch.nn.Embedding, dense, Adagrad"
    told("sparse, row-wise Adagrad | # | # |", shown[ours], shown[f"{ours}, a tenth of the rows"])
    told(
        "`torch.nn.Embedding(sparse=True)`, Adagrad | # | |",
        shown["torch.nn.Embedding, sparse, Adagrad"],
    )
    told(
        "`torch.nn.Embedding`, dense, Adagrad | # | # |",
        shown[dense],
        shown[f"{dense}, a tenth of the rows"],
    )
    for kind, said in found["modelled"].items():
        for case in said["found"]:
            row = [
                f"{case['gib_per_rank']:.1f}",
                f"{case['step_ms']:.1f}",
                f"{case['triples_per_s'] / 1e6:.1f}",
            ]
            if case["fits"] and case["ranks"] in (8, 64, 128, 512):
                told(f"| {kind} | {case['rows']:.0e} | {case['ranks']} | # GiB | # ms | # |", *row)
    errors = [
        case["predicted_over_measured"]
        for cases in groups.values()
        for case in cases.values()
        if "predicted_step_ms" in case
    ]
    counted = [
        case["sent_over_predicted"]
        for cases in groups.values()
        for case in cases.values()
        if case.get("sent_over_predicted")
    ]
    off = f"{100 * max(abs(1 - x) for x in counted):.2f}"
    told(
        "bytes are within # % of the plan, the time from # to #",
        off,
        rounded(min(errors)),
        rounded(max(errors)),
    )
    told("and from # to # at 32, where", rounded(min(ratios)), rounded(max(ratios)))
    assert all(0.7 < ratio < 1.3 for ratio in errors)  # the aim
    assert all(bar["met"] for name, bar in found["bars"].items() if "128 negatives" not in name)
