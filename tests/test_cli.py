import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from shardemb.cli import main

NATIONS = ["train", "--dataset", "pykeen:nations", "--set", "training.epochs=2", "--set", "sampling.batch_size=512"]
SMALL = ["--set", "sampling.chunk_size=128", "--set", "sampling.num_negatives=10", "--set", "model.dim=16"]


def test_train_resume_and_the_same_result_on_two_workers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The main job, small: two worker processes, a killed run resumed, one worker for comparison."""
    pytest.importorskip("pykeen")
    mrr = {}
    for workers in (2, 1):
        run = tmp_path / str(workers)
        assert main([*NATIONS, *SMALL, "--workers", str(workers), "--output", str(run)]) == 0
        out, err = capfd.readouterr()
        assert "test filtered mrr" in out
        assert "loss" in err  # the progress bar, once
        assert {"config.toml", "metrics.jsonl", "metrics.png", "entities.parquet", "checkpoints"} <= {
            p.name for p in run.iterdir()
        }
        mrr[workers] = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["mrr"]
    assert mrr[1] == pytest.approx(mrr[2], abs=0.01)
    run = tmp_path / "2"
    assert main([*NATIONS, *SMALL, "--output", str(run)]) == 1
    assert "is not empty: give another --output, or go on with --resume" in capfd.readouterr().err
    assert main([*NATIONS, *SMALL, "--output", str(run), "--resume", "--set", "training.epochs=3"]) == 1
    assert "got epochs = 3 against epochs = 2" in capfd.readouterr().err
    newest = sorted((run / "checkpoints").iterdir())[-1]
    newest.rename(newest.with_suffix(".tmp"))
    capfd.readouterr()
    assert main(["train", "--workers", "2", "--output", str(run), "--resume"]) == 0  # with the run's own settings
    assert "resuming from step-" in capfd.readouterr().err
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["mrr"] == pytest.approx(mrr[2], abs=1e-6)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_bad_file_is_named_without_a_traceback(tmp_path: Path, capfd: pytest.CaptureFixture[str], workers: str) -> None:
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.tsv").write_text("a\tr\tb\na\tb\n" if split == "valid" else "a\tr\tb\n")
    arguments = ["train", "--dataset", str(tmp_path), "--workers", workers, "--output", str(tmp_path / "run")]
    assert main(arguments) == 1
    err = capfd.readouterr().err
    assert "valid.tsv, line 2: got 2 fields" in err
    assert "Traceback" not in err
    (tmp_path / "valid.tsv").write_text("a\tr\tb\n")
    assert main([*arguments, *SMALL, "--set", "training.epochs=1"]) == 0  # the same command, once the file is mended


@pytest.mark.parametrize("workers", ["1", "2"])
def test_triples_with_unseen_entities_can_be_dropped(tmp_path: Path, capfd: pytest.CaptureFixture[str], workers: str) -> None:
    for split, tail in (("train", "b"), ("valid", "b"), ("test", "z")):
        (tmp_path / f"{split}.tsv").write_text(f"a\tr\tb\nb\tr\t{tail}\n")
    arguments = ["train", "--dataset", str(tmp_path), "--workers", workers, *SMALL, "--set", "training.epochs=1", "--output"]
    assert main([*arguments, str(tmp_path / "error"), "--set", "unseen=error"]) == 1
    err = capfd.readouterr().err
    assert "1 of 2 test triples hold 1 entities ('z') that no training triple holds: add training triples" in err
    assert err.count("error:") == 1
    assert "Traceback" not in err
    with warnings.catch_warnings(record=True) as told:  # one worker is this process
        warnings.simplefilter("always")
        assert main([*arguments, str(tmp_path / "drop"), "--set", "unseen=drop"]) == 0
    text = capfd.readouterr().err + " ".join(str(warning.message) for warning in told)
    assert text.count("they are dropped") == 1


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_output_that_cannot_be_written_is_told_before_anything_else(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], workers: str
) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/nowhere")):
        assert main(["train", "--dataset", "no such data", "--workers", workers, "--output", str(output)]) == 1
        err = capfd.readouterr().err
        assert f"error: {output}: got" in err
        assert "expected a folder that can be made and written" in err
        assert "Traceback" not in err


def test_bad_usage(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path / "run")]
    assert main(["train", *output, "--set", "training.epoch=1"]) == 1
    assert "did you mean 'training.epochs'?" in capfd.readouterr().err
    for constrainer, text in (("clamp_norms", "'clamp_norms'|clamp_norms is an invalid"), ("clamp_norm", "maxnorm")):
        assert main(["train", *output, "--workers", "2", "--set", f"model.constrainer={constrainer}"]) == 1
        assert re.search(f"model.constrainer, model.constrainer_kwargs: .*({text})", capfd.readouterr().err)
    assert main(["train", *output, "--workers", "0"]) == 1
    assert "got 0 workers" in capfd.readouterr().err
    assert main(["train", str(tmp_path / "none.toml"), *output]) == 1
    with pytest.raises(SystemExit):
        main(["train"])


def test_help_and_import_do_not_load_torch() -> None:
    code = "import sys, shardemb.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: print(sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "train" in out
    assert "'torch'" not in out
    assert "'ray'" not in out
