"""Runs made from Python and by the command line are the same runs."""

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from ring_graph import SAMPLING, graph

from shardemb.cli import main
from shardemb.kge import (
    JobConfig,
    ModelConfig,
    TrainingConfig,
    Triples,
    evaluate_run,
    query_run,
    train,
    train_run,
)
from shardemb.kge.run_folder import RunFolder
from shardemb.utils.run_metrics import read_metrics

SECTIONS: dict[str, Any] = {
    "model": ModelConfig(dim=12, n3=0.01),
    "sampling": SAMPLING,
    "training": TrainingConfig(epochs=3, validate_every=0),
}
SETTINGS = [
    *("--set", "model.dim=12", "--set", "model.n3=0.01", "--set", "training.epochs=3"),
    *("--set", "training.validate_every=0", "--set", "sampling.batch_size=60"),
    *("--set", "sampling.chunk_size=20", "--set", "sampling.num_negatives=30"),
]


def write(data: Triples, folder: Path) -> str:
    """Write a graph's triples as files."""
    folder.mkdir()
    for split in ("train", "valid", "test"):
        lines = [
            f"{data.entities.label(h)}\t{data.relations.label(r)}\t{data.entities.label(t)}\n"
            for h, r, t in getattr(data, split).tolist()
        ]
        (folder / f"{split}.tsv").write_text("".join(lines))
    return str(folder)


def evaluated(run: Path, *options: str) -> dict:
    """The figures of ``shardemb evaluate``."""
    path = run.parent / "figures.json"
    assert main(["evaluate", str(run), "--json", str(path), *options]) == 0
    return json.loads(path.read_text())


def queried(capfd: pytest.CaptureFixture[str], *arguments: str) -> list[tuple[str, float]]:
    """What ``shardemb query`` prints."""
    capfd.readouterr()
    assert main(["query", *arguments]) == 0
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    return [(label, float(score)) for score, label in lines]


def test_a_run_from_python_goes_on_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, run, other = write(graph(), tmp_path / "graph"), tmp_path / "run", tmp_path / "other"
    monkeypatch.chdir(tmp_path)
    _, result = train(Triples.load("graph"), **SECTIONS, output=run, progress=False)
    monkeypatch.chdir("/")
    config = tomllib.loads((run / "config.toml").read_text())
    assert (config["dataset"], config["model"]["dim"]) == (folder, 12)
    (start,) = json.loads((run / "run.json").read_text())
    assert start["workers"] == "1"
    assert evaluated(run)["sides"]["both"] == pytest.approx(result, abs=1e-6)
    # as the command line trains it
    assert main(["train", "--dataset", folder, *SETTINGS, "--output", str(other)]) == 0
    last = read_metrics(other / "metrics.jsonl")[-1]
    assert {name: last[name] for name in result} == pytest.approx(result, abs=1e-6)
    for path in (run, other):
        for arguments in (["e3", "r1"], ["e3"], ["e3", "r1", "--inverse"]):
            options = {"relation": (*arguments, None)[1], "inverse": "--inverse" in arguments}
            expected = query_run(run, "e3", k=4, **options)  # type: ignore[arg-type]
            got = queried(capfd, str(path), *arguments, "-k", "4")
            assert [label for label, _ in got] == [label for label, _ in expected]
            assert [s for _, s in got] == pytest.approx([s for _, s in expected], rel=1e-4)
    newest = sorted((run / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    assert main(["train", "--output", str(run), "--resume"]) == 0
    assert "resuming from step-" in capfd.readouterr().err
    assert newest.is_dir()
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert {name: last[name] for name in result} == pytest.approx(result, abs=1e-6)
    assert len(json.loads((run / "run.json").read_text())) == 2
    assert tomllib.loads((run / "config.toml").read_text()) == config


@pytest.mark.filterwarnings("ignore:.*going back to step")
def test_a_graph_in_memory_needs_its_files_on_the_command_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, run = write(graph(), tmp_path / "graph"), tmp_path / "run"
    _, result = train(graph(), **SECTIONS, output=run, progress=False)
    for command in (["evaluate", str(run)], ["train", "--output", str(run), "--resume"]):
        assert main(command) == 1
        text = "config.toml: got no dataset, as the run was trained from Python on a graph in"
        assert text in capfd.readouterr().err
    figures = evaluated(run, "--dataset", folder)["sides"]["both"]
    assert figures == pytest.approx(result, abs=1e-6)
    (nearest,) = query_run(run, "e5", k=1)
    assert queried(capfd, str(run), "e5", "-k", "1")[0][0] == nearest[0]
    # the order of training triples is another one in files: a resumed run would be another run
    assert main(["train", "--output", str(run), "--resume", "--dataset", folder]) == 1
    assert "got triples of fingerprint" in capfd.readouterr().err
    for path in (tmp_path / "graph").iterdir():
        path.write_text(path.read_text().replace("e82", "x"))
    assert main(["evaluate", str(run), "--dataset", folder]) == 1
    assert "got entities of fingerprint" in capfd.readouterr().err


def test_a_dataset_that_has_changed_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the same labels: only its triples tell."""
    folder, run = write(graph(), tmp_path / "graph"), tmp_path / "run"
    train(Triples.load(folder), **SECTIONS, output=run, progress=False)
    (tmp_path / "graph/test.tsv").write_text("e1\tr0\te70\n")
    assert main(["evaluate", str(run)]) == 1
    assert "got triples of fingerprint" in capfd.readouterr().err


@pytest.mark.parametrize("workers", [1, 2])
def test_the_commands_from_python(tmp_path: Path, workers: int) -> None:
    folder, run = write(graph(), tmp_path / "graph"), tmp_path / "run"
    launch = [f"launch.workers={workers}"]
    config = JobConfig.load(overrides=[*SETTINGS[1::2], *launch], dataset=folder)
    said: list[str] = []
    result = train_run(config, run, notify=said.append)
    assert said == [f"training on {folder}, {workers} worker(s), into {run}"]
    got = evaluate_run(run, workers=3 - workers, overrides=["evaluation.per_relation=true"])
    assert got["sides"]["both"] == pytest.approx(result, abs=1e-3)
    assert {row["label"] for row in got["relations"]} == {"r0", "r1", "r2"}
    with pytest.raises(FileExistsError, match="is not empty"):
        train_run(config, run)
    with pytest.raises(ValueError, match="--resume needs the settings of the run, got dim = 8"):
        train_run(JobConfig.load(config_of(run), ["model.dim=8"]), run, resume=True)
    assert train_run(config, run, resume=True) == pytest.approx(result, abs=1e-5)
    with pytest.raises(ValueError, match="dataset: got '', expected a graph: give --dataset"):
        train_run(JobConfig(dataset=""), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def config_of(run: Path) -> Path:
    return RunFolder(run).config


def test_a_refused_run_changes_nothing(tmp_path: Path) -> None:
    train(graph(), **SECTIONS, output=tmp_path, progress=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(FileExistsError, match="holds checkpoints and metrics"):
        train(graph(), **SECTIONS, output=tmp_path, progress=False)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert after == before


SLOW = ("pandas", "duckdb", "torchrec", "fbgemm_gpu", "ray", "matplotlib")


def test_a_run_imports_what_it_uses(tmp_path: Path) -> None:
    """Pandas is pyarrow's for lists; matplotlib comes for the picture, at the end."""
    folder = write(graph(), tmp_path / "graph")
    code = (
        "import sys; from shardemb.cli import main; from shardemb.kge import trainer\n"
        "draw = trainer.plot_metrics\n"
        f"def plot(*args): print([name for name in {SLOW} if name in sys.modules]); draw(*args)\n"
        "trainer.plot_metrics = plot; sys.exit(main(sys.argv[1:]))"
    )
    command = ["train", "--dataset", folder, *SETTINGS, "--output", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("[]\ntest filtered mrr")
