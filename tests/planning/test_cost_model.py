"""Estimates against what is counted: drawn rows, memory of real tables, exchange of real ranks.

And their limits.
"""

import dataclasses
import json
import math
import re
import shlex
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from shardemb.cli import main
from shardemb.kge import (
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainingConfig,
    Triples,
    train,
)
from shardemb.kge.model import KnowledgeGraphModel
from shardemb.kge.optimizers import OPTIMIZERS
from shardemb.planning import calibrate, report
from shardemb.planning.cost_model import (
    DATA_SHEETS,
    Job,
    Machine,
    distinct_rows,
    estimate,
    fewest_workers,
)
from shardemb.sharding.placement import RowPlan
from shardemb.utils import run_metrics
from shardemb.vocabulary import Vocabulary

H100 = DATA_SHEETS["h100"]


@pytest.mark.parametrize("rows", [1, 7, 4096, 4097, 300_000])
@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.5])
def test_distinct_rows_are_the_sum_over_rows(rows: int, exponent: float) -> None:
    shares = np.arange(1, rows + 1) ** -exponent
    shares = np.minimum(shares / shares.sum(), 1 - 1e-15)
    for zipf, uniform in ((0, 0), (1, 0), (0, 1000), (2000, 256), (10**7, 10**6)):
        missed = zipf * np.log1p(-shares) + uniform * np.log1p(-min(1 / rows, 1 - 1e-15))
        expected = -np.expm1(missed).sum()
        assert distinct_rows(rows, zipf, uniform, exponent) == pytest.approx(
            expected, rel=2e-3, abs=1e-9
        )


def test_distinct_rows_of_tables_that_nobody_could_sum() -> None:
    found = [distinct_rows(10**10, 10**6, 10**6, exponent) for exponent in (0.0, 0.8, 1.0, 1.2)]
    assert found[0] == pytest.approx(2e6, rel=1e-3)
    assert found == sorted(found, reverse=True)
    assert found[-1] > 1e6  # the uniform ones


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_state_is_what_the_optimizer_keeps(name: str) -> None:
    model = KnowledgeGraphModel(50, 3, ModelConfig(dim=8, n3=0.0), seed=0)
    optimizer = OptimizerConfig(name=name).make(model)
    for table in (model.entity, model.relation):
        table(torch.arange(3)).sum().backward()
    optimizer.step()
    state = optimizer.state[next(model.entity.parameters())]
    kept = sum(
        value.numel() * value.itemsize
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    assert kept == 50 * Job(entities=50, dim=8, optimizer=name).state_bytes
    found = estimate(Job(entities=50, relations=6, dim=8, optimizer=name))
    assert found.memory["rows"] == 50 * 8 * 4
    assert found.memory["optimizer state"] == kept


def _zipf_triples(entities: int, relations: int, number: int, exponent: float) -> Triples:
    shares = np.cumsum(np.arange(1, entities + 1) ** -exponent)
    generator = np.random.default_rng(0)
    ids = np.random.default_rng(1).permutation(entities)[
        np.minimum(
            np.searchsorted(shares / shares[-1], generator.random((number, 2))), entities - 1
        )
    ]
    columns = np.stack([ids[:, 0], generator.integers(relations, size=number), ids[:, 1]], axis=1)
    names = (
        Vocabulary([f"{letter}{i}" for i in range(size)])
        for size, letter in ((entities, "e"), (relations, "r"))
    )
    none = torch.empty(0, 3, dtype=torch.int32)
    return Triples("zipf", torch.from_numpy(columns).int(), none, none, *names)


def _counted(rank: int, world_size: int, chunk: int, negatives: int, chunks: int) -> list[dict]:
    records = []
    with run_metrics.listening(lambda kind, step, figures: records.append(figures)):
        train(
            _zipf_triples(50_001, 20, 40 * chunk * chunks * world_size, 0.8),
            ModelConfig(dim=16, n3=0.0),
            sampling=SamplingConfig(
                batch_size=chunk * chunks * world_size, chunk_size=chunk, num_negatives=negatives
            ),
            training=TrainingConfig(epochs=1, validate_every=0),
            progress=False,
        )
    return records


@pytest.mark.parametrize(
    ("ranks", "chunk", "negatives", "chunks"), [(1, 500, 64, 1), (2, 700, 300, 2), (3, 8000, 50, 1)]
)
def test_exchange_and_touched_rows_are_those_counted(
    run_ranks, ranks: int, chunk: int, negatives: int, chunks: int
) -> None:
    records = run_ranks(_counted, ranks, chunk, negatives, chunks)[0][
        1:
    ]  # the first messages have room for few ids
    job = Job(
        entities=50_001,
        relations=40,
        dim=16,
        workers=ranks,
        batch_size=chunk * chunks * ranks,
        chunk_size=chunk,
        negatives=negatives,
        zipf=0.8,
    )
    found = estimate(job)
    for record in records:
        assert found.touched == pytest.approx(record["touched_rows"], rel=0.02)
        entities = sum(
            size for name, size in found.exchange.items() if name != "relation gradients"
        )
        assert ranks * entities == pytest.approx(record["exchange_bytes"], rel=0.03)


def test_a_rank_without_a_chunk_is_told() -> None:
    found = report.plan(report.JobConfig(), None, entities=1000, workers=4, batch_size=1024)
    assert any(
        "some of 4 ranks have none: raise the batch size to 2048" in line for line in found.assumed
    )


@pytest.mark.parametrize("entities", [10**8, 10**9, 10**10])
def test_fewest_workers_fit_and_one_less_do_not(entities: int) -> None:
    job = Job(entities=entities, dim=256)
    fewest = fewest_workers(job, H100)
    assert fewest is not None

    def fits(workers: int) -> bool | None:
        return estimate(
            dataclasses.replace(job, workers=workers, batch_size=1000 * workers), H100
        ).fits

    assert fits(fewest)
    assert fewest == 1 or not fits(fewest - 1)
    assert fewest_workers(dataclasses.replace(job, dim=10**8), H100) is None


def test_a_batch_that_is_given_is_shared_by_more_ranks(capsys) -> None:
    command = "plan --entities 1e6 --device h100 --dim 256 --chunk-size 512"
    for options in ("--batch-size 1e7", "--set sampling.batch_size=10000000"):
        assert main([*command.split(), *options.split()]) == 0
        said = capsys.readouterr().out
        assert "a step: 10,000,000 triples" in said
        fewest = int(re.search(r"the fewest ranks that fit: (\d+), ", said)[1])
        assert 1 < fewest < 16
        for workers, verdict in ((fewest, ": fits;"), (fewest - 1, ": does not fit;")):
            assert main([*command.split(), *options.split(), "--workers", str(workers)]) == 0
            assert verdict in capsys.readouterr().out


def test_what_is_not_counted_is_told(capsys) -> None:
    options = ["--set", "model.scorer=transe", "--set", "training.precision=bfloat16"]
    assert main(["plan", "--entities", "1e6", *options]) == 0
    said = capsys.readouterr().out
    assert (
        "not counted: model.scorer = 'transe', training.precision = 'bfloat16'; as if it were"
        " 'complex', 'float32'" in said
    )


def test_more_ranks_share_a_host_of_cpus() -> None:
    host = dataclasses.replace(H100, gpu=False, ranks_per_host=4, memory_bytes=64 << 30)
    job = Job(entities=10**8, dim=64)
    for workers, sharing in ((1, 1), (4, 4), (8, 4)):
        found = estimate(dataclasses.replace(job, workers=workers), host)
        assert found.usable_bytes == int(0.9 * (64 << 30) / sharing)
        assert found.memory["copy for a checkpoint"] == RowPlan(
            "e", 10**8, 64, workers
        ).local_bytes(4, 4)
        assert found.host_bytes == 0
    assert estimate(job, H100).host_bytes == 10**8 * (64 * 4 + 4)


def test_time_is_the_sum_of_its_parts_and_grows_with_the_work() -> None:
    job = Job(entities=10**9, dim=256, workers=64, batch_size=64_000)
    found = estimate(job, H100)
    assert found.seconds is not None
    assert found.step_seconds == pytest.approx(sum(found.seconds.values()))
    assert found.triples_per_second == pytest.approx(64_000 / found.step_seconds)
    for more, part in (  # what there is more of, and which part it shows in
        ({"negatives": 1000}, "scores"),
        ({"dim": 512}, "matrix products"),
        ({"batch_size": 128_000}, "exchange"),
    ):
        other = estimate(dataclasses.replace(job, **more), H100).seconds
        assert other is not None
        assert other[part] > found.seconds[part]
    turns = estimate(job, dataclasses.replace(H100, cores=4))
    assert turns.seconds is not None
    assert turns.seconds["scores"] == pytest.approx(2 * found.seconds["scores"])
    assert estimate(job, dataclasses.replace(H100, exchange_bandwidth=0.0)).seconds is None
    slower = estimate(
        job, dataclasses.replace(H100, network_bandwidth=H100.network_bandwidth / 2)
    ).seconds
    near = estimate(job, dataclasses.replace(H100, network_bandwidth=0.0)).seconds
    assert slower is not None
    assert near is not None
    assert slower["exchange"] > found.seconds["exchange"] > near["exchange"]
    assert near["exchange"] == pytest.approx(sum(found.exchange.values()) / H100.exchange_bandwidth)
    assert estimate(job).step_seconds is None


def test_time_worked_out_by_hand() -> None:
    machine = Machine(
        name="by hand",
        source="a test",
        memory_bytes=1 << 30,
        ranks_per_host=2,
        cores=1,
        gpu=False,
        matmul_flops=1e9,
        row_bandwidth=1e6,
        contention=1.5,
        overhead_seconds=0.25,
        exchange_overhead_seconds=0.125,
        query_seconds=1e-3,
        score_seconds=1e-2,
        id_seconds=1e-1,
        latency_seconds=0.5,
        exchange_bandwidth=1e6,
        network_bandwidth=1e5,
        process_bytes=0,
    )
    job = Job(
        entities=10**9,
        relations=3,
        dim=10,
        workers=4,
        batch_size=40,
        chunk_size=10,
        negatives=7,
        optimizer="sgd",
        zipf=0.0,
    )
    found = estimate(job, machine)
    ids, queries, several = (
        2 * 10 + 2 * 7,
        2 * 10,
        2 * 1.5,
    )  # two ranks take turns on a core, and get in each other's way
    assert (found.ids, found.distinct, found.touched) == (ids, ids, 4 * ids)
    rows = ids * 3 / 4 * 40
    asked = ids * 3 / 4 * 8
    ring = 2 * 3 / 4 * 3 * 10 * 4
    assert found.exchange == pytest.approx(
        {"ids": asked, "rows": rows, "gradients": rows, "relation gradients": ring}
    )
    expected = {
        "overhead": several * 0.25,
        "ids": several * 0.1 * ids,
        "matrix products": several * 3 * 2 * queries * 7 * 10 / 1e9,
        "queries": several * 1e-3 * queries * 10,
        "scores": several * 1e-2 * queries * 7,
        "rows": several * (6 * ids * 40 + 2 * ids * 40 + 6 * 3 * 40) / 1e6,
        "exchange overhead": 2 * 0.125,
        "exchange": (
            2 * ((asked + 2 * rows) * (1 / 3 / 1e6 + 2 / 3 / 1e5) + ring / 1e5)
        ),  # one of three others is near
        "latency": 4 * 0.5 * (2 - 1),
    }
    assert found.seconds == pytest.approx(expected, rel=1e-6)


SMALL = calibrate.Effort(
    table_bytes=1 << 20, entities=500, windows=1, repeat=3, message_bytes=1 << 16
)


def test_calibration_gives_a_machine_that_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibrate, "_SHAPES", dict.fromkeys(calibrate._SHAPES, (8, 32, 16)))
    threads = torch.get_num_threads()
    monkeypatch.setattr(calibrate, "calibrate", partial(calibrate.calibrate, effort=SMALL))
    assert main(["bench", "calibrate"]) == 0
    assert torch.get_num_threads() == threads
    assert str(report.calibrated()) in capsys.readouterr().out
    machine = report.machine_of("cpu")
    assert machine == Machine.load(report.calibrated())
    assert machine is not None
    # what is measured depends on how busy this machine is; the next test has a machine that is
    # known
    assert machine.overhead_seconds >= 0
    assert machine.matmul_flops > 0
    assert not machine.gpu
    assert machine.cores < 2 or machine.exchange_bandwidth > 0
    assert main(["plan", "--entities", "1e6", "--dim", "8", "--workers", "2"]) == 0
    said = capsys.readouterr().out
    assert f"{machine.name}: {machine.source}" in said


def test_calibration_finds_the_machine_that_its_times_come_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = dataclasses.replace(
        H100, gpu=False, cores=2, ranks_per_host=2, contention=1.25, network_bandwidth=0.0
    )
    effort = calibrate.Effort()
    times = {
        name: estimate(calibrate._job(name, 1, effort), known).step_seconds
        for name in calibrate._SHAPES
    }
    alone = {
        "matmul": known.matmul_flops,
        "rows": known.row_bandwidth,
        "process_bytes": known.process_bytes,
        **times,
    }
    pair = {
        "matmul": known.matmul_flops / 1.25,
        "latency_seconds": known.latency_seconds,
        "exchange": known.exchange_bandwidth,
        "step": estimate(calibrate._job("overhead_seconds", 2, effort), known).step_seconds,
    }
    monkeypatch.setattr(calibrate, "_alone", lambda *_: alone)
    monkeypatch.setattr(calibrate, "run_local", lambda *_, **__: pair)
    monkeypatch.setattr(calibrate.os, "sched_getaffinity", lambda _: {0, 1})
    found = calibrate.calibrate()
    for field in dataclasses.fields(Machine):
        if field.name not in ("name", "source", "memory_bytes"):
            told = getattr(found, field.name)
            assert told == pytest.approx(getattr(known, field.name), rel=1e-3), field.name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_calibration_of_a_gpu() -> None:
    machine = calibrate.calibrate("cuda", effort=SMALL)
    assert machine.gpu
    assert machine.matmul_flops > 1e9


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "got no figures of a machine"),
        ("{}", "got no figures of a machine ('machine')"),
        ('{"machine": {"name": "x"}}', "missing"),
        (
            json.dumps({"machine": dataclasses.asdict(H100) | {"row_bandwidth": -1}}),
            "row_bandwidth: got -1, expected",
        ),
        (
            json.dumps({"machine": dataclasses.asdict(H100) | {"row_bandwidth": "fast"}}),
            "row_bandwidth: got 'fast', expected",
        ),
    ],
)
def test_a_file_that_holds_no_machine_is_refused(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "machine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"machine\.json: got no figures") as raised:
        Machine.load(path)
    assert told in str(raised.value)


def test_the_issues_command(tmp_path: Path, capsys) -> None:
    command = (
        "plan --entities 1e9 --dim 256 --optimizer rowwise_adagrad --workers 64 --device h200"
        " --triples 3e9 --json"
    )
    path = tmp_path / "plan.json"
    assert main([*command.split(), str(path)]) == 0
    said = capsys.readouterr().out
    told = json.loads(path.read_text())
    assert told["memory"]["rows"] == math.ceil(10**9 / 64) * 1024
    assert told["memory"]["optimizer state"] == math.ceil(10**9 / 64) * 4
    assert told["job"]["batch_size"] == 64 * 512
    assert told["fewest_workers"] == 9
    for text in (
        "14.90 GiB",
        "the fewest ranks that fit: 9, 2 host(s) of 8",
        "60 file(s) a rank",
        "not measured",
        "assumed",
        "Zipf's law",
        "an epoch",
    ):
        assert text in said, text


def test_the_page_shows_what_the_command_prints(capsys) -> None:
    page = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
    command, shown = re.search(
        r"```bash\nshardemb (plan .*)\n```\n\n```text\n(.*?)```", page, re.DOTALL
    ).groups()
    assert main(shlex.split(command)) == 0
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            "--entities 1e9 --device tpu",
            "got --device 'tpu', expected cpu, h100, h200 or a FILE.json",
        ),
        ("--entities 1e9 --device nothing.json", "nothing.json"),
        ("--entities 1e9 --set sampling.scheme=1vsall", "got sampling.scheme '1vsall'"),
        ("--entities 1e9 --set sampling.schema=1vsall", "unknown key 'sampling.schema'"),
        ("--entities 1e9 --dim 3", "model.dim: got 3, expected a multiple of 2"),
        ("--entities 0", "plan.entities: got 0, expected at least 1"),
        ("--entities 1e9 --workers 1e6", "plan.workers: got 1000000, expected 1 to 65536"),
        ("--entities 1e12 --dim 4096 --device h100 --memory 1GiB", "do not fit 65,536 ranks"),
        (
            "--entities 1e9 --device h100 --memory much",
            "--memory: got 'much', expected a number of bytes above 0",
        ),
        (f"--entities 1e9 --device h100 --network {'9' * 400}", "--network: got '999"),
        ("--entities 1e9 --device h100 --memory 4iB", "--memory: got '4iB', expected"),
        ("--entities 1e9 --device h100 --workers 0", "plan.workers: got 0, expected at least 1"),
        (
            "--entities 1e9 --device h100 --batch-size 0",
            "plan.batch_size: got 0, expected at least 1",
        ),
        ("--entities 1e9 --zipf -1", "plan.zipf: got -1.0, expected 0 to 4"),
        ("--entities 1e6 --memory 8GiB", "--memory, --ranks-per-host and --network need --device"),
    ],
)
def test_bad_plans_get_one_clear_line(
    tmp_path: Path, monkeypatch, capsys, arguments: str, told: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["plan", *arguments.split()]) == 1
    said = capsys.readouterr()
    assert told in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("option", ["--entities", "--dim"])
@pytest.mark.parametrize("text", ["many", "1.5", "1e400", "nan"])
def test_a_number_that_is_none_is_bad_usage(capsys, option: str, text: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "--entities", "1000", option, text])
    assert "expected a whole number such as 1000000 or 1e6" in capsys.readouterr().err


def test_calibration_refuses_what_it_cannot_do(capsys) -> None:
    assert main(["bench", "calibrate", "--threads", "0"]) == 1
    assert "got 0 threads for a rank, expected 1 to" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["bench", "calibrate", "--device", "cuda"]) == 1
        assert "expected 'cpu', or 'cuda' where torch finds a GPU" in capsys.readouterr().err
