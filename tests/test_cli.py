import gzip
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from shardemb.cli import main
from shardemb.kge.config import JobConfig
from shardemb.utils.run_metrics import read_metrics
from shardemb.vocabulary import Vocabulary

NATIONS = [
    "train",
    "--dataset",
    "pykeen:nations",
    "--set",
    "training.epochs=2",
    "--set",
    "sampling.batch_size=512",
]
HERE = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
SMALL = [
    "--set",
    "sampling.chunk_size=128",
    "--set",
    "sampling.num_negatives=10",
    "--set",
    "model.dim=16",
]


def test_train_resume_and_the_same_result_on_two_workers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The main job, small.

    Two worker processes, a killed run resumed, one worker for comparison.
    """
    pytest.importorskip("pykeen")
    mrr = {}
    for workers in (2, 1):
        run = tmp_path / str(workers)
        assert main([*NATIONS, *SMALL, "--workers", str(workers), "--output", str(run)]) == 0
        out, err = capfd.readouterr()
        assert "test filtered mrr" in out
        assert "loss" in err  # the progress bar, once
        expected = {
            "config.toml",
            "run.json",
            "metrics.jsonl",
            "metrics.png",
            "entities.arrow",
            "checkpoints",
            "tensorboard",
        }
        assert expected <= {p.name for p in run.iterdir()}
        mrr[workers] = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["mrr"]
    assert mrr[1] == pytest.approx(mrr[2], abs=0.01)
    run = tmp_path / "2"
    assert main([*NATIONS, *SMALL, "--output", str(run)]) == 1
    assert "is not empty: give another --output, or go on with --resume" in capfd.readouterr().err
    assert (
        main([*NATIONS, *SMALL, "--output", str(run), "--resume", "--set", "training.epochs=3"])
        == 1
    )
    assert "got epochs = 3 against epochs = 2" in capfd.readouterr().err
    written = run / "config.toml"
    assert 'unseen = "keep"\n' in written.read_text()
    written.write_text(
        written.read_text().replace('unseen = "keep"\n', "")
    )  # as a run that was made before the key was
    newest = sorted((run / "checkpoints").iterdir())[-1]
    newest.rename(newest.with_suffix(".tmp"))
    capfd.readouterr()
    assert (
        main(["train", "--workers", "2", "--output", str(run), "--resume"]) == 0
    )  # with the run's own settings
    assert "resuming from step-" in capfd.readouterr().err
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["mrr"] == pytest.approx(
        mrr[2], abs=1e-6
    )
    first, second = json.loads((run / "run.json").read_text())
    assert first["command"].startswith(
        "shardemb train --dataset pykeen:nations --set training.epochs=2"
    )
    assert second["command"] == f"shardemb train --workers 2 --output {run} --resume"
    assert first["versions"]["torch"] == torch.__version__


def test_a_run_folder_knows_where_its_dataset_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "graph").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / f"graph/{split}.tsv").write_text("a\tr\tb\n")
    monkeypatch.chdir(tmp_path)
    assert (
        main(
            ["train", "--dataset", "graph", "--output", "run", *SMALL, "--set", "training.epochs=1"]
        )
        == 0
    )
    monkeypatch.chdir("/")
    assert JobConfig.load(tmp_path / "run/config.toml").dataset == str(tmp_path / "graph")
    assert main(["train", "--output", str(tmp_path / "run"), "--resume"]) == 0


KILL = """
import os, signal, sys
from pathlib import Path
from shardemb.utils import run_metrics
from shardemb.cli import main

def listener(kind, step, figures):
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if figures["epoch"] >= 1 and os.environ["RANK"] == "1" and first:
        os.kill(os.getpid(), signal.SIGKILL)

run_metrics.listen(listener)
sys.exit(main(sys.argv[1:]))
"""


def test_ranks_that_torchrun_has_started(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The same job and result; one that is killed goes on where it was."""
    pytest.importorskip("pykeen")
    (tmp_path / "job.py").write_text(KILL)
    assert main([*NATIONS, *SMALL, "--workers", "2", "--output", str(tmp_path / "local")]) == 0
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
    ]
    command += [
        str(tmp_path / "job.py"),
        *NATIONS,
        *SMALL,
        "--launcher",
        "torchrun",
        "--output",
        str(tmp_path / "run"),
    ]
    capfd.readouterr()
    done = subprocess.run(
        command, env=HERE | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test filtered mrr") == 1
    assert [start["workers"] for start in json.loads((tmp_path / "run/run.json").read_text())] == [
        "2",
        "2",
    ]
    ours, theirs = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "local"))
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    assert ours[-1]["mrr"] == pytest.approx(theirs[-1]["mrr"], abs=1e-6)
    assert (
        main([*NATIONS, *SMALL, "--launcher", "torchrun", "--output", str(tmp_path / "other")]) == 1
    )
    assert (
        "that torchrun has not started, expected torchrun --nproc-per-node 2 -m shardemb train"
        in one_error(capfd)
    )


def test_top_shows_where_a_run_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pykeen")
    run = tmp_path / "run"
    assert main([*NATIONS, *SMALL, "--workers", "2", "--output", str(run)]) == 0
    records = read_metrics(run / "metrics.jsonl")
    train = [record for record in records if record["kind"] == "train"][-1]
    assert len(train["memory_bytes"]) == 2
    assert all(1e8 < size < 4e9 for size in train["memory_bytes"])
    assert 1 <= train["imbalance"] < 1.5
    assert 0 < train["touched_rows"] <= 14  # all of the entities
    assert train["exchange_bytes"] > train["touched_rows"] * 16 * 4  # their rows, at least
    assert 0 < train["step_seconds"] < 10
    capfd.readouterr()
    assert main(["top", str(run)]) == 0  # it has ended
    out = capfd.readouterr().out
    assert out.startswith(f"{run}\nepoch 2.00  step {train['step']:,}  loss {train['loss']:.4f}")
    assert f"a step: {train['touched_rows']} rows updated" in out
    assert f"test MRR {records[-1]['mrr']:.4f} after epoch 2" in out
    cut = [json.dumps(record) + "\n" for record in records[:-1]]
    (run / "metrics.jsonl").write_text(
        "".join(cut) + cut[0][:20]
    )  # as it is while a line is being written
    assert main(["top", str(run), "--once"]) == 0
    assert main(["top", str(tmp_path)]) == 1
    assert "metrics.jsonl: no such file, expected a run folder" in one_error(capfd)


def one_error(capfd: pytest.CaptureFixture[str]) -> str:
    """The one line that a failed command says of it."""
    err = capfd.readouterr().err
    (line,) = [line for line in err.splitlines() if re.search("error:|Error", line)]
    assert line.startswith("shardemb: error: ")
    assert "Traceback" not in err
    assert err.endswith(line + "\n")
    return line


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_bad_file_is_named_without_a_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], workers: str
) -> None:
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.tsv").write_text(
            "a\tr\tb\na\tb\n" if split == "valid" else "a\tr\tb\n"
        )
    arguments = [
        "train",
        "--dataset",
        str(tmp_path),
        "--workers",
        workers,
        "--output",
        str(tmp_path / "run"),
    ]
    assert main(arguments) == 1
    error = one_error(capfd)
    assert "valid.tsv, line 2: got 2 fields" in error
    (tmp_path / "valid.tsv").write_text("a\tr\tb\n")
    assert (
        main([*arguments, *SMALL, "--set", "training.epochs=1"]) == 0
    )  # the same command, once the file is mended


@pytest.mark.parametrize("workers", ["1", "2"])
def test_unseen_labels_are_said_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], workers: str
) -> None:
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.tsv").write_text(
            "a\tr\tb\na\tr\tz\n" if split == "test" else "a\tr\tb\n"
        )
    arguments = [
        "train",
        "--dataset",
        str(tmp_path),
        "--workers",
        workers,
        *SMALL,
        "--set",
        "training.epochs=1",
    ]
    assert main([*arguments, "--output", str(tmp_path / "error"), "--set", "unseen=error"]) == 1
    text = "1 of 2 test triples hold entities (1: 'z') that no training triple holds"
    assert f"{text}, expected none" in one_error(capfd)
    with warnings.catch_warnings():  # of this process, they would go to pytest
        warnings.simplefilter("default")
        assert main([*arguments, "--output", str(tmp_path / "drop"), "--set", "unseen=drop"]) == 0
    if workers == "2":
        assert capfd.readouterr().err.count(f"{text}: dropped these triples") == 1
    assert (
        json.loads((tmp_path / "drop/metrics.jsonl").read_text().splitlines()[-1])["triples"] == 1
    )
    assert len(Vocabulary.load(tmp_path / "drop/entities.arrow")) == 2


def test_an_output_that_cannot_be_written_is_found_out_first(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for output, text in (
        (tmp_path / "file", "File exists"),
        (tmp_path / "file/run", "Not a directory"),
        (tmp_path / "link", "File exists"),
        (tmp_path / ("x" * 300), "File name too long"),
        (Path("/proc/run"), "No such file or directory"),
        (Path("/proc/self/task"), "is not empty"),
        (tmp_path / "caf\udce9", "surrogates not allowed"),
    ):
        assert (
            main(
                [
                    "train",
                    "--dataset",
                    str(tmp_path / "none"),
                    "--workers",
                    "2",
                    "--output",
                    str(output),
                ]
            )
            == 1
        )
        error = one_error(capfd)
        assert str(output).encode(errors="replace").decode() in error.replace("\\udce9", "?")
        assert text in error
    assert not (tmp_path / "caf\udce9").exists()


def test_an_output_without_permission(as_nobody: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (as_nobody / "run").mkdir(0o500)
    for output in (as_nobody / "run", as_nobody / "run/inner"):
        assert main(["train", "--dataset", "none", "--output", str(output)]) == 1
        assert "Permission denied" in one_error(capfd)


@pytest.mark.parametrize("resume", [False, True])
def test_an_output_on_a_read_only_file_system(tmp_path: Path, resume: bool) -> None:
    """In a mount namespace of its own, where the system lets us make one."""
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run(
        [*alone, "mount", "-t", "tmpfs", "none", str(tmp_path)], capture_output=True, check=False
    ).returncode:
        pytest.skip("no mount namespaces here")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/config.toml").write_text("dataset = 'none'")
    output = "run --resume" if resume else "new"
    script = (
        f"mount -o bind,ro . . && cd {tmp_path} && {sys.executable} -m shardemb train --dataset"
        f" none --output {output}"
    )
    done = subprocess.run(
        [*alone, "sh", "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=HERE,
        check=False,
    )
    assert done.returncode == 1
    assert re.fullmatch(
        r"shardemb: error: --output \w+: expected a folder .*Read-only file system: .*\n",
        done.stderr,
    )


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"[training]\nepoch = 1", "unknown key"),
        (b"epochs =", "not TOML"),
        (b"\xff", "byte 0xff"),
        (None, "Is a directory"),
    ],
)
def test_a_bad_configuration_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes | None, text: str
) -> None:
    path = tmp_path / "job.toml"
    path.mkdir() if content is None else path.write_bytes(content)
    assert main(["train", str(path), "--output", str(tmp_path / "run")]) == 1
    error = one_error(capfd)
    assert str(path) in error
    assert text in error
    assert not (tmp_path / "run").exists()


def test_files_of_triples_that_are_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / f"folder/{split}.parquet").mkdir()
    (tmp_path / "short.tsv.gz").write_bytes(gzip.compress(b"a\tr\tb\n" * 1000)[:-9])
    (tmp_path / "short.parquet").write_bytes(b"PAR1PAR1")
    (tmp_path / "empty.tsv").touch()
    names = "head", "relation", "tail"
    pq.write_table(pa.table({name: ["a"] for name in names}), tmp_path / "damaged.parquet")
    content = (tmp_path / "damaged.parquet").read_bytes()
    (tmp_path / "damaged.parquet").write_bytes(content.replace(b"head", b"\xffead", 1))
    for number, name in enumerate(
        ("folder", "short.tsv.gz", "short.parquet", "damaged.parquet", "empty.tsv", "none")
    ):
        assert (
            main(
                [
                    "train",
                    "--dataset",
                    str(tmp_path / name),
                    "--output",
                    str(tmp_path / str(number)),
                ]
            )
            == 1
        )
        assert str(tmp_path / name) in one_error(capfd)


def test_labels_that_are_no_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "rows.npy", np.zeros((2, 4), np.float32))
    labels = tmp_path / "labels.txt"
    labels.write_bytes(b"a\ncaf\xe9\n")
    arguments = [
        "checkpoint",
        "import",
        str(tmp_path / "rows.npy"),
        str(tmp_path / "run"),
        "--labels",
        str(labels),
    ]
    assert main(arguments) == 1
    assert f"{labels}, line 2: got byte 0xe9, expected UTF-8 text" in one_error(capfd)
    labels.write_text("\ufeffa\ncafé\n", encoding="utf-8")
    assert main(arguments) == 0
    assert Vocabulary.load(tmp_path / "run/entities.arrow").labels == ["a", "café"]


def _last(run: Path) -> dict:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def test_evaluate_gives_the_training_runs_own_figures(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of the newest checkpoint and of the best one, on other numbers of workers.

    Then with other settings, and a picture.
    """
    pytest.importorskip("pykeen")
    run, stopped, file = tmp_path / "run", tmp_path / "stopped", tmp_path / "figures.json"
    assert main([*NATIONS, *SMALL, "--output", str(run), "--set", "evaluation.candidates=9"]) == 0
    hasty = [
        "--set",
        "training.patience=1",
        "--set",
        "training.validate_every=1",
        "--set",
        "optimizer.entity_lr=3.0",
    ]
    assert (
        main([*NATIONS, *SMALL, *hasty, "--output", str(stopped), "--set", "training.epochs=9"])
        == 0
    )
    assert (stopped / "best").is_dir()
    for folder, workers in ((run, 1), (run, 2), (stopped, 1)):
        capfd.readouterr()
        assert main(["evaluate", str(folder), "--workers", str(workers), "--json", str(file)]) == 0
        out, err = capfd.readouterr()
        figures, told = json.loads(file.read_text()), _last(folder)
        for name, value in figures["sides"]["both"].items():
            assert value == pytest.approx(told[name], abs=1e-9)
            assert f"{value:11.4f}" in out.splitlines()[1]
        assert [line.split()[-1] for line in out.splitlines()[1:]] == ["both", "tail", "head"]
        assert figures["triples"] == told["triples"]
        assert err.count("queries") <= 2 or workers == 2  # one bar, in one or two states
    assert "/best/step-" in err
    newest = str(sorted((stopped / "checkpoints").iterdir())[-1])
    assert main(["evaluate", str(stopped), "--checkpoint", newest, "--json", str(file)]) == 0
    assert json.loads(file.read_text())["sides"]["both"]["mrr"] != pytest.approx(
        _last(stopped)["mrr"], abs=1e-4
    )
    options = ["per_relation=true", "hits=[2]", "ties=optimistic", "candidates=0", "filtered=false"]
    options = [part for option in options for part in ("--set", f"evaluation.{option}")]
    capfd.readouterr()
    assert main(["evaluate", str(run), "--split", "valid", *options, "--json", str(file)]) == 0
    lines, figures = capfd.readouterr().out.splitlines(), json.loads(file.read_text())
    assert lines[0].split() == ["mrr", "mr", "hits_at_2", "amri", "queries"]
    counts = [row["count"] for row in figures["relations"]]
    assert counts == sorted(counts, reverse=True)
    assert sum(counts) == 2 * figures["triples"] == 2 * 199
    assert lines[5].endswith(f"{counts[0]}  tail of {figures['relations'][0]['label']}")
    assert main(["plot", str(run), "--output", str(tmp_path / "run.png")]) == 0
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", str(run)]) == 0
    assert capfd.readouterr().out.endswith(f"{run}/metrics.png\n")


def test_what_cannot_be_evaluated_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    data.mkdir()
    for split in ("train", "valid", "test"):
        (data / f"{split}.tsv").write_text("a\tr\tb\na\tr\tc\n" if split == "train" else "")
    for command in ("evaluate", "plot"):
        assert main([command, str(run)]) == 1
        assert re.search(
            rf"{run}/(config.toml|metrics.jsonl): no such file, expected a run folder",
            one_error(capfd),
        )
    run.mkdir()
    (run / "config.toml").write_text(f"dataset = {json.dumps(str(data))}")
    assert main(["evaluate", str(run)]) == 1
    assert f"{run}: got no finished checkpoint there" in one_error(capfd)
    (run / "config.toml").unlink()
    (data / "valid.tsv").write_text("a\tr\tb\n")
    (data / "test.tsv").write_text("a\tr\tb\n")
    assert (
        main(
            [
                "train",
                "--dataset",
                str(data),
                "--output",
                str(run),
                *SMALL,
                "--set",
                "training.epochs=1",
            ]
        )
        == 0
    )
    capfd.readouterr()
    for arguments, text in (
        (["--set", "model.dim=8"], "got --set model.dim=8, expected evaluation.KEY=VALUE"),
        (["--set", "evaluation.ties=best"], "evaluation.ties: got 'best', expected one of"),
        (["--set", "evaluation.candidates=3"], "evaluation.candidates: got 3 of 3 entities"),
        (["--checkpoint", str(data)], f"{data}: got no finished checkpoint"),
        (["--workers", "0"], "got 0 workers"),
    ):
        assert main(["evaluate", str(run), *arguments]) == 1
        assert text in one_error(capfd)
    (data / "train.tsv").write_text("a\tr\tb\na\tr\td\n")
    assert main(["evaluate", str(run)]) == 1
    assert re.search(rf"{run}/checkpoints/step-\d+: got entities of fingerprint", one_error(capfd))


def test_bad_usage(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path / "run")]
    assert main(["train", *output, "--set", "training.epoch=1"]) == 1
    assert "did you mean 'training.epochs'?" in capfd.readouterr().err
    for constrainer, text in (
        ("clamp_norms", "'clamp_norms'|clamp_norms is an invalid"),
        ("clamp_norm", "maxnorm"),
    ):
        assert (
            main(["train", *output, "--workers", "2", "--set", f"model.constrainer={constrainer}"])
            == 1
        )
        assert re.search(
            f"model.constrainer, model.constrainer_kwargs: .*({text})", capfd.readouterr().err
        )
    assert main(["train", *output, "--workers", "0"]) == 1
    assert "launch.workers: got 0, expected at least 1" in capfd.readouterr().err
    assert main(["train", str(tmp_path / "none.toml"), *output]) == 1
    with pytest.raises(SystemExit):
        main(["train"])


def test_help_and_import_do_not_load_torch() -> None:
    code = (
        "import sys, shardemb.cli as c\ntry: c.main(['--help'])\nexcept SystemExit:"
        " print(sorted(sys.modules))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert "train" in out
    assert "'torch'" not in out
    assert "'ray'" not in out
