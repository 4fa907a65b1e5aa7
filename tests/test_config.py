from pathlib import Path

import pytest

from shardemb.config import JobConfig

CONFIG = """
dataset = "pykeen:nations"
[model]
dim = 64
constrainer = "clamp_norm"
constrainer_kwargs = {maxnorm = 1.0, dim = -1}
[training]
epochs = 3
"""


def test_reads_what_it_writes(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(CONFIG)
    config = JobConfig.load(path, ["training.seed=7", "model.n3=1", "model.scorer=distmult"], dataset="wordnet")
    assert config.dataset == "wordnet"
    assert config.model.constrainer_kwargs == {"maxnorm": 1.0, "dim": -1}
    assert (config.model.dim, config.model.n3, config.model.scorer) == (64, 1.0, "distmult")
    assert (config.training.epochs, config.training.seed) == (3, 7)
    path.write_text(config.to_toml())
    assert JobConfig.load(path) == config
    assert config.differences(config) == []
    assert JobConfig.load(path, ["training.epochs=4"]).differences(config) == ["epochs = 4 against epochs = 3"]
    assert JobConfig.load(path, ["training.checkpoint_seconds=60", "training.keep=5"]).differences(config) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "unknown key 'epoch': known: dataset, unseen, model, sampling, training"),
        ("[training]\nepoch = 3", "unknown key 'training.epoch': did you mean 'training.epochs'?"),
        ("[training]\nepochs = 'x'", "training.epochs: got 'x', expected a value of type int"),
        ("[training]\nepochs = true", "training.epochs: got True"),
        ("[model]\ndim = 1.5", "model.dim: got 1.5"),
        ("model = 3", "model: got 3, expected a section"),
        ("[model]\nconstrainer_kwargs = 3", "model.constrainer_kwargs: got 3"),
        ("[training]\nepochs = 0", "training.epochs: got 0, expected at least 1"),
        ("epochs =", "not TOML"),
        ("unseen = 'hide'", "unseen: got 'hide', expected 'keep', 'drop' or 'error'"),
        ("unseens = 'drop'", "unknown key 'unseens': did you mean 'unseen'?"),
        ("[train]\nepochs = 3", "unknown key 'train': did you mean 'training'?"),
        ("[model]\nentity_lr = nan", "model.entity_lr: got nan, expected a finite number"),
        ("[training]\ncheckpoint_seconds = inf", "training.checkpoint_seconds: got inf, expected a number, at least 0"),
        ("[training]\ncheckpoint_seconds = true", "training.checkpoint_seconds: got True, expected a value of type float"),
        ("[training]\nnonfinite = 'ignore'", "training.nonfinite: got 'ignore', expected 'error', 'warn' or 'skip'"),
        ("[training]\nkeep = 0", "training.keep: got 0, expected at least 1"),
        ("[[model]]\ndim = 3", "model: got [{'dim': 3}], expected a section"),
        ("dataset = 3", "dataset: got 3, expected a value of type str"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "job.toml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        JobConfig.load(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_bytes(b"dataset = 'caf\xe9'")
    with pytest.raises(ValueError, match=r"job\.toml: got a byte that is not UTF-8"):
        JobConfig.load(path)
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        JobConfig.load(tmp_path)
    path.write_text("")
    assert JobConfig.load(path) == JobConfig()


@pytest.mark.parametrize("override", ["training.epochs", "dataset.x=3"])
def test_overrides_are_checked(override: str) -> None:
    with pytest.raises(ValueError, match="override"):
        JobConfig.load(None, ["dataset=wordnet", override])
