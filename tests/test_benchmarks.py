"""The benchmarks run, on small tables; no time is judged."""

import importlib
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

sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))
import figures

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
                f"{ROOT / 'configs' / 'codex-s-complex.toml'} --data {{tmp_path}} --set"
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
            f"--work {{tmp_path}} --source {ROOT}/shardemb/kge/data/wordnet --memory 1GiB",
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
    (tmp_path / "codex-s").symlink_to(ROOT / "shardemb" / "kge" / "data" / "wordnet")
    done = _run(script, *arguments.format(tmp_path=tmp_path).split(), "--output", path)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(path.read_text())
    assert {"command", "date", "machine", "versions"} | keys <= set(document)
    assert all(math.isfinite(number) for number in _numbers(document))


def test_a_set_runs_and_draws(tmp_path: Path) -> None:
    done = _run("run", "--only", "checkpoint", "--output", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"checkpoint.json", "checkpoint.png"} == {path.name for path in tmp_path.iterdir()}
    assert str(tmp_path / "checkpoint.png") in done.stdout
    done = _run("run", "--only", "rank,speed", "--output", tmp_path, timeout=60)
    assert done.returncode == 2
    assert "got speed, expected scripts among step,train,rank,checkpoint,scaling" in done.stderr


def test_a_set_whose_script_fails_says_so(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()  # no folder can be made there
    done = _run("run", "--only", "checkpoint", "--output", tmp_path / "taken")
    assert done.returncode == 1
    assert "FAILED" in done.stdout


RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize("name", ["step", "train", "rank", "checkpoint", "scaling"])
def test_results_are_drawn_with_labelled_axes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    plots = importlib.import_module("plots")
    found = figures.result(name)
    drawings = plots.DRAWINGS[name](found)
    assert drawings
    for figure in drawings.values():
        assert str(found["date"]) in figure.get_suptitle()
        for axes in figure.axes:
            assert axes.get_xlabel()
            assert axes.get_ylabel() or axes.get_yticklabels()
            assert axes.lines or axes.patches


def test_every_result_is_shown_in_a_table_or_picture() -> None:
    shown = {path for name in figures.TABLES for path in _results_in(figures.TABLES[name]())}
    assert shown == {path.name for path in figures.RESULTS.glob("*.json")}


def _results_in(table: str) -> list[str]:
    return re.findall(r"benchmarks/results/([\w-]+\.json)", table)


def test_each_command_beside_a_table_is_that_of_a_script() -> None:
    for name, table in figures.TABLES.items():
        text = table()
        scripts = re.findall(r"benchmarks/(\w+\.py)", text)
        assert scripts, name
        for script in scripts:
            assert (ROOT / "benchmarks" / script).is_file(), f"{name}: {script}"


def _tripled(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with three times its figures; sizes that name a case stay."""
    cases = {"ids", "rows", "ranks", "workers", "seed", "dim", "negatives", "cores"}
    return {
        key: 3 * value if isinstance(value, int | float) and key not in cases else value
        for key, value in entry.items()
    }


def test_a_table_of_other_results_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures come from the files, not from the code."""
    for path in figures.RESULTS.glob("*.json"):
        values = json.loads(path.read_text(), object_hook=_tripled)
        (tmp_path / path.name).write_text(json.dumps(values))
    before = {name: table() for name, table in figures.TABLES.items()}
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    same = [name for name, table in figures.TABLES.items() if table() == before[name]]
    assert same == []


def test_the_readme_has_the_newest_figures_and_ten_at_most() -> None:
    readme = (ROOT / "README.md").read_text()
    assert figures.with_headline(readme) == readme, "run python docs/figures.py"
    rows = figures.headline().splitlines()[2:]
    assert len(rows) <= 10
    for row in rows:  # one figure in the second column
        assert len(re.findall(r"\d[\d,.]*", row.split("|")[2])) == 1, row
    assert len(readme.splitlines()) <= 130


def test_every_table_is_on_a_page_and_every_mark_is_a_table() -> None:
    pages = [path.read_text() for path in (ROOT / "docs").glob("*.md")]
    marks = [name for page in pages for name in figures.MARK.findall(page)]
    assert sorted({*marks, "headline"}) == sorted(figures.TABLES)
