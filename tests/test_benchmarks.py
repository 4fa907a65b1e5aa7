"""The benchmarks run, on small tables; no time is judged."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _numbers(part)
    elif isinstance(value, int | float):
        yield value


def test_step_measures_every_section(tmp_path: Path) -> None:
    pytest.importorskip("pykeen")
    path = tmp_path / "step.json"
    command = [sys.executable, ROOT / "benchmarks" / "step.py", "--quick", "--rounds", "1", "--output", path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(path.read_text())
    assert {"command", "date", "machine", "versions", "rounds", "notes", "sections"} <= set(document)
    assert set(document["sections"]) == set(document["notes"]) == set("ABCDEFGH")
    for section, records in document["sections"].items():
        assert records or f"{section}: no " in done.stdout, section  # no compiler, no CUDA device
        for record in records:
            assert {"name", "ids", "kind", "rows", "dim", "ratio", "baseline", "bar", "met"} <= set(record)
            assert record["met"] is None
            assert record["name"] in done.stdout
    assert all(math.isfinite(number) for number in _numbers(document["sections"]))


def test_an_unknown_section_is_refused() -> None:
    command = [sys.executable, ROOT / "benchmarks" / "step.py", "--only", "Z"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
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
            "--rows 3000 --dim 16 --queries 40 --rounds 1 --drawn-rows 3000 --drawn-dim 8 --pykeen-rows 500",
            {"one worker", "two workers", "all scorers", "drawn", "against PyKEEN"},
        ),
        (
            "quality",
            f"{ROOT / 'configs' / 'codex-s-complex.toml'} --set dataset=wordnet --set training.epochs=1 --set model.dim=4 "
            f"--set sampling.scheme=negatives --set sampling.num_negatives=2 --set training.validation_triples=100",
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
            {"entities", "triples", "input_bytes", "seconds", "cpu_seconds", "peak_rss_mib", "open"},
        ),
        pytest.param("serving", "--rows 1000 --dim 8 --ids 64 --rounds 3", {"lookup", "ray"}, marks=pytest.mark.ray),
    ],
)
def test_a_benchmark_runs_and_says_how(tmp_path: Path, script: str, arguments: str, keys: set[str]) -> None:
    path = tmp_path / "result.json"
    command = [
        sys.executable,
        ROOT / "benchmarks" / f"{script}.py",
        *arguments.format(tmp_path=tmp_path).split(),
        "--output",
        path,
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(path.read_text())
    assert {"command", "date", "machine", "versions"} | keys <= set(document)
    assert all(math.isfinite(number) for number in _numbers(document))


def test_the_readme_tells_what_the_results_say() -> None:
    readme = (ROOT / "README.md").read_text()
    results = ROOT / "benchmarks" / "results"
    (reliability,) = (json.loads(path.read_text()) for path in results.glob("reliability_*.json") if path.name in readme)
    crashes, corruption = reliability["crashes"], reliability["corruption"]
    assert crashes["kills"] >= 300
    assert corruption["mutations"] >= 1000
    assert f"| {crashes['kills']} SIGKILLs of one rank or all, {crashes['kills_within_a_save']} of them" in readme
    assert f"| {corruption['mutations']} random mutations" in readme
    assert f"| {crashes['lost_or_torn']} checkpoints lost or torn" in readme
    assert f"| {corruption['silent_or_unclear']} silent" in readme
    (files,) = (json.loads(path.read_text()) for path in results.glob("checkpoint_*.json") if path.name in readme)
    assert f"{files['files']['speed_relative_to_the_disk']['load, sha256']} of the disk's sequential reading" in readme
    (training,) = (json.loads(path.read_text()) for path in results.glob("train_*.json") if path.name in readme)
    for name, found in training["synthetic"].items():
        rate = found["triples_per_s"]
        assert f"| {round(rate, -3) if rate > 1000 else rate:,} |" in readme, name
    assert f"{round(training['large']['large_over_small'], 2)} of what the graph" in readme
    (quality,) = (json.loads(path.read_text()) for path in results.glob("quality_*.json") if path.name in readme)
    for name, found in quality.items():
        if isinstance(found, dict) and "runs" in found:
            assert f"{found['runs'][0]['test']['mrr']:.4f}" in readme, name
    (recovery,) = (json.loads(path.read_text()) for path in results.glob("ray_recovery_*.json") if path.name in readme)
    seconds, count = recovery["seconds"], len(recovery["kills"])
    assert f"within {seconds['median']} s (median of {count}; {seconds['most']} at most)" in readme
    assert recovery["last_loss"]["killed"] == recovery["last_loss"]["whole"]
