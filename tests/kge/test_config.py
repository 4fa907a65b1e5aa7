from pathlib import Path

import pytest

from shardemb.kge.config import JobConfig

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
    config = JobConfig.load(
        path, ["training.seed=7", "model.n3=1", "model.scorer=distmult"], dataset="wordnet"
    )
    assert config.dataset == "wordnet"
    assert config.model.constrainer_kwargs == {"maxnorm": 1.0, "dim": -1}
    assert (config.model.dim, config.model.n3, config.model.scorer) == (64, 1.0, "distmult")
    assert (config.training.epochs, config.training.seed) == (3, 7)
    path.write_text(config.to_toml())
    assert JobConfig.load(path) == config
    assert config.differences(config) == []
    assert JobConfig.load(path, ["training.epochs=4"]).differences(config) == [
        "epochs = 4 against epochs = 3"
    ]
    assert (
        JobConfig.load(path, ["training.checkpoint_seconds=60", "training.keep=5"]).differences(
            config
        )
        == []
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "nonsense = 3",
            (
                ": unknown key 'nonsense': known: dataset, unseen, model, loss, sampling,"
                " optimizer, training"
            ),
        ),
        ("epoch = 3", ": unknown key 'epoch': did you mean 'training.epochs'?"),
        ("[training]\ndim = 3", ": unknown key 'training.dim': did you mean 'model.dim'?"),
        ("[traning]\nepochs = 3", ": unknown key 'traning': did you mean 'training'?"),
        (
            "[model.constrainr]\np = 2",
            ": unknown key 'model.constrainr': did you mean 'model.constrainer'?",
        ),
        ("dataset = 3", ": dataset: got 3, expected a value of type str"),
        ("unseen = 'dorp'", ": unseen: got 'dorp', expected one of 'keep', 'drop', 'error'"),
        ("[training]\nepoch = 3", "unknown key 'training.epoch': did you mean 'training.epochs'?"),
        ("[training]\nepochs = 'x'", "training.epochs: got 'x', expected a value of type int"),
        ("[training]\nepochs = true", "training.epochs: got True"),
        ("[model]\ndim = 1.5", "model.dim: got 1.5"),
        ("model = 3", "model: got 3, expected a section"),
        ("[model]\nconstrainer_kwargs = 3", "model.constrainer_kwargs: got 3"),
        ("[[model]]", ": model: got [{}], expected a section"),
        ("[model]\nn3 = true", ": model.n3: got True, expected a value of type float"),
        ("[model]\nn3 = nan", ": model.n3: got nan, expected a number"),
        (
            "[optimizer]\nentity_lr = inf",
            ": optimizer.entity_lr: got inf, expected a finite number",
        ),
        (
            "[optimizer]\nfinal_lr = -inf",
            ": optimizer.final_lr: got -inf, expected a finite number",
        ),
        (
            "[model]\nn3 = " + "9" * 400,
            ": model.n3: got an integer of 1329 bits, expected at most 63",
        ),
        ("[model]\ndim = 7", ": model.dim: got 7, expected a multiple of 2"),
        (
            "[model]\nconstrainer_kwargs = {maxnorm = nan}",
            ": model.constrainer_kwargs.maxnorm: got nan, expected a number",
        ),
        (
            "[model]\nconstrainer_kwargs = {a = [1979-05-27]}",
            ": model.constrainer_kwargs.a.0: got datetime.date(1979, 5, 27)",
        ),
        (
            "[training]\ncheckpoint_seconds = -1",
            ": training.checkpoint_seconds: got -1.0, expected a finite number",
        ),
        (
            "[training]\nnonfinite = 'ignore'",
            ": training.nonfinite: got 'ignore', expected one of 'error', 'warn', 'skip'",
        ),
        ("[training]\nkeep = 0", ": training.keep: got 0, expected at least 1"),
        ("[training]\nepochs = 0", ": training.epochs: got 0, expected at least 1"),
        ("epochs =", ": got text that is not TOML: Invalid value (at "),
        ("a = 1\na = 2", ": got text that is not TOML: Cannot overwrite a value"),
        ("a = " + "[" * 5000, ": got text that is not TOML: maximum recursion depth"),
        ("a = " + "9" * 5000, ": got text that is not TOML: Exceeds the limit"),
        ("PK\0\1", ": got text that is not TOML: "),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "job.toml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        JobConfig.load(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


def test_files_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    for content, text in (
        (b"# one\n# caf\xe9\n", "line 2: got byte 0xe9, expected UTF-8 text"),
        (CONFIG.encode("utf-16"), "line 1: got byte 0xff"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path}, {text}"):
            JobConfig.load(path)
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        JobConfig.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none\.toml"):
        JobConfig.load(tmp_path / "none.toml")


def test_a_file_that_cannot_be_opened(as_nobody: Path) -> None:
    (as_nobody / "job.toml").touch(0o000)
    with pytest.raises(PermissionError, match=r"job\.toml"):
        JobConfig.load(as_nobody / "job.toml")


def test_an_empty_file_and_none_are_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    for content in (b"", b"\n\n", b"\xef\xbb\xbf# an editor's byte-order mark\r\n[model]\r\n"):
        path.write_bytes(content)
        assert JobConfig.load(path) == JobConfig.load() == JobConfig()


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("training.epochs", "expected key=value"),
        ("dataset.x=3", "but 'dataset' is no section"),
        ("model.constrainer_kwargs.dim.x=3", "but 'dim' is no section"),
        ("training.epoch=3", "unknown key 'training.epoch': did you mean 'training.epochs'"),
        ("training.epochs=three", "training.epochs: got 'three', expected a value of type int"),
        (
            "training.epochs=3\nx = 1",
            r"training.epochs: got '3\\nx = 1', expected a value of type int",
        ),
        ("training.epochs=0", "training.epochs: got 0, expected at least 1"),
        ("training.epochs.x=0", "training.epochs: got {'x': 0}, expected a value of type int"),
        ("training=3", "training: got 3, expected a section"),
        ("model.n3=nan", "model.n3: got nan"),
        ("dataset=/\udcff", r"dataset: got '/\\udcff', expected UTF-8 text"),
        ("=3", "unknown key ''"),
    ],
)
def test_overrides_are_checked_and_named(tmp_path: Path, override: str, text: str) -> None:
    path = tmp_path / "job.toml"
    path.write_text("[model]\nconstrainer_kwargs = {dim = -1}")
    with pytest.raises(ValueError, match=text) as caught:
        JobConfig.load(path, ["dataset=wordnet", override])
    assert override.strip() in str(caught.value) or repr(override) in str(caught.value)


def test_deep_overrides(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(CONFIG)
    config = JobConfig.load(
        path,
        ["model.constrainer_kwargs.maxnorm=2", "model.constrainer_kwargs.p = inf", "unseen=drop"],
    )
    assert config.model.constrainer_kwargs == {"maxnorm": 2, "dim": -1, "p": float("inf")}
    assert config.unseen == "drop"
    path.write_text(config.to_toml())  # inf is no JSON
    assert JobConfig.load(path) == config


@pytest.mark.parametrize("dataset", ["/data/\U0001f600 é", "a\x7f\tb\\\"'\n", "true", ""])
def test_any_name_comes_back(tmp_path: Path, dataset: str) -> None:
    path = tmp_path / "job.toml"
    path.write_text(JobConfig(dataset=dataset).to_toml(), encoding="utf-8")
    assert JobConfig.load(path).dataset == dataset


@pytest.mark.parametrize(
    "path",
    sorted((Path(__file__).parents[2] / "configs").glob("*.toml")),
    ids=lambda path: path.stem,
)
def test_the_configurations_that_come_with_the_repository_are_read(path: Path) -> None:
    assert JobConfig.load(path, dataset="wordnet").dataset == "wordnet"
    assert f"shardemb train configs/{path.name} --dataset FOLDER" in path.read_text()
