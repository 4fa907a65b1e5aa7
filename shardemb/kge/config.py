"""A job's settings: dataclasses, read strictly from TOML and written in full."""

import dataclasses
import difflib
import hashlib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from shardemb.coordinator import NONFINITE
from shardemb.exceptions import InputError
from shardemb.kge.data.splits import UNSEEN
from shardemb.kge.data.triples import absolute
from shardemb.kge.evaluation import EvaluationConfig
from shardemb.kge.losses import LossConfig
from shardemb.kge.model import ModelConfig
from shardemb.kge.optimizers import OptimizerConfig
from shardemb.kge.sampling import SamplingConfig
from shardemb.launch.config import LaunchConfig
from shardemb.utils.files import read_text
from shardemb.utils.validation import at_least, choice, one_of

#: settings of training that may differ in a resumed run
WHEN_TO_SAVE = ("checkpoint_every", "checkpoint_seconds", "keep", "background_saves")


@dataclass(frozen=True)
class TrainingConfig:
    """Epochs, validation, checkpoints, precision and device."""

    #: passes over the triples (or over the queries, with scheme "kvsall")
    epochs: int = 8
    #: of initial rows, order and negatives
    seed: int = 0
    #: epochs between two validations; 0 for none
    validate_every: int = 2
    #: triples of the validation split, drawn by the seed, that are ranked on the way; 0 for all
    validation_triples: int = 1000
    #: stop after this many validations without a better MRR, and go back to the best one; 0 for
    #: never
    patience: int = 0
    #: epochs between two checkpoints; the last epoch always makes one
    checkpoint_every: int = 1
    #: seconds after which a checkpoint is made within an epoch; 0 for none
    checkpoint_seconds: float = 0.0
    #: finished checkpoints that stay
    keep: int = 2
    #: write checkpoints while training goes on, from a copy of the rows, instead of waiting for the
    #: disk
    background_saves: bool = True
    #: what a NaN or infinite loss does: "error" ends the run, "warn" tells, "skip" leaves the step
    #: out, and tells
    nonfinite: str = "error"
    #: in which scores are computed: "float32", or "bfloat16" by torch's autocast; rows and their
    #: state stay float32
    precision: str = "float32"
    #: where rows lie: "cpu" or "cuda" (then each rank takes the GPU of its local number)
    device: str = "cpu"

    def __post_init__(self) -> None:
        precisions, devices = ("float32", "bfloat16"), ("cpu", "cuda")
        allowed = {"nonfinite": NONFINITE, "precision": precisions, "device": devices}
        one_of("training", self, allowed)
        at_least("training", self, epochs=1, checkpoint_every=1, keep=1)
        at_least("training", self, seed=0, validate_every=0, validation_triples=0, patience=0)
        at_least("training", self, checkpoint_seconds=0)
        if self.patience and not self.validate_every:
            raise InputError(
                f"training.patience: got {self.patience} with validate_every = 0, expected"
                " validations to wait for"
            )


@dataclass(frozen=True)
class JobConfig:
    """What a training job computes; ``launch`` says where, and changes no result."""

    #: see :meth:`shardemb.kge.Triples.load`
    dataset: str = "wordnet"
    #: "keep", "drop" or "error": valid and test triples with an entity or a relation that no
    #: training triple holds
    unseen: str = "keep"
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        choice("unseen", self.unseen, UNSEEN)
        scheme = self.sampling.scheme
        if scheme != "negatives" and self.loss.name not in ("softmax", "logistic"):
            raise InputError(
                f"loss.name: got {self.loss.name!r} with scheme {scheme!r}, expected 'softmax' or"
                " 'logistic'"
            )
        if scheme == "kvsall" and self.loss.subsampling:
            raise InputError(
                "loss.subsampling: got true with sampling.scheme 'kvsall', whose queries stand for"
                " many triples each"
            )
        if self.optimizer.schedule == "plateau" and not self.training.validate_every:
            raise InputError(
                "optimizer.schedule: got 'plateau' with training.validate_every = 0, expected"
                " validations to look at"
            )

    @property
    def fingerprint(self) -> str:
        """A sha256 of all settings that a resumed run must keep."""
        saving = {key: getattr(TrainingConfig, key) for key in WHEN_TO_SAVE}
        training = dataclasses.replace(self.training, **saving)
        same = dataclasses.replace(self, training=training, evaluation=EvaluationConfig())
        names = "model", "loss", "sampling", "optimizer", "training", "evaluation"
        text = ", ".join(f"{name}={getattr(same, name)!r}" for name in names)
        return hashlib.sha256(f"Settings({text})".encode()).hexdigest()

    @classmethod
    def load(
        cls, path: Path | None = None, overrides: Iterable[str] = (), dataset: str | None = None
    ) -> "JobConfig":
        """Read a TOML file and apply overrides.

        Args:
            path: None for the defaults.
            overrides: ``key=value``, such as ``training.epochs=3``; values as in TOML, or a bare
                word.
            dataset: replaces the file's.

        Raises:
            ValueError: not TOML, an unknown key, or a value of a wrong type or out of range; names
                file, overrides and key.
            OSError: the file cannot be opened.
        """
        overrides = list(overrides)
        names = [str(path or ""), " ".join(overrides)]
        source = " with ".join(filter(None, names)) or "configuration"
        tree: dict[str, Any] = {}
        if path is not None:
            text = read_text(path)
            try:
                tree = tomllib.loads(text)
            except (ValueError, RecursionError) as error:  # long numbers and deep nesting too
                raise InputError(f"{path}: got text that is not TOML: {error}") from error
        for override in overrides:
            key, separator, text = override.partition("=")
            if not separator:
                example = "key=value, e.g. training.epochs=3"
                raise InputError(f"got override {override!r}, expected {example}")
            *sections, name = key.strip().split(".")
            node = tree
            for section in sections:
                node = node.setdefault(section, {})
                if not isinstance(node, dict):
                    raise InputError(f"{source}: got {override!r}, but {section!r} is no section")
            node[name] = _parse(text.strip())
        if dataset is not None:
            tree["dataset"] = dataset
        if isinstance(tree.get("dataset"), str):
            tree["dataset"] = absolute(tree["dataset"])
        return _build(cls, tree, source, "")

    def to_toml(self) -> str:
        """Return the whole configuration, defaults included, as TOML."""
        lines, sections = [], []
        for key, value in dataclasses.asdict(self).items():
            if isinstance(value, dict):
                entries = [f"{name} = {_format(entry)}" for name, entry in value.items()]
                sections += ["", f"[{key}]", *entries]
            else:
                lines.append(f"{key} = {_format(value)}")
        return "\n".join(lines + sections) + "\n"

    def differences(self, other: "JobConfig") -> list[str]:
        """Return ``this against other`` for each differing setting that changes the results.

        The dataset is compared only if ``other`` has one.
        """
        launch, dataset = LaunchConfig(), other.dataset and self.dataset
        own = dataclasses.replace(self, launch=launch, dataset=dataset).to_toml()
        others = dataclasses.replace(other, launch=launch).to_toml()
        lines = zip(own.splitlines(), others.splitlines(), strict=True)
        pairs = [(a, b) for a, b in lines if a != b]
        return [f"{a} against {b}" for a, b in pairs if a.split(" ")[0] not in WHEN_TO_SAVE]


def _parse(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text  # otherwise the text contains a line break


def _format(value: Any) -> str:
    if isinstance(value, Mapping):
        pairs = (f"{_format(key)} = {_format(entry)}" for key, entry in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_format, value))}]"
    if isinstance(value, float):
        return repr(value)  # unlike JSON, TOML has inf
    # TOML has no surrogates, and escapes DEL
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _keys(cls: Any, prefix: str = "") -> list[str]:
    keys = []
    for key, expected in get_type_hints(cls).items():
        keys.append(prefix + key)
        if dataclasses.is_dataclass(expected):
            keys += _keys(expected, f"{prefix}{key}.")
    return keys


def _near(key: str, hints: Iterable[str], prefix: str) -> str:
    places = {name.rpartition(".")[2]: name for name in _keys(JobConfig)}
    places |= {name: prefix + name for name in hints}
    if near := difflib.get_close_matches(key, places, n=1):
        return f"did you mean {places[near[0]]!r}?"
    return f"known: {', '.join(prefix + name for name in hints)}"


def _build(cls: Any, tree: Mapping[str, Any], source: str, prefix: str) -> Any:
    hints = get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            raise InputError(f"{source}: unknown key {prefix + key!r}: {_near(key, hints, prefix)}")
        where = f"{source}: {prefix + key}"
        if not dataclasses.is_dataclass(hints[key]):
            values[key] = _check(value, hints[key], where)
        elif isinstance(value, Mapping):
            values[key] = _build(hints[key], value, source, f"{prefix}{key}.")
        else:
            raise InputError(f"{where}: got {value!r}, expected a section")
    try:
        return cls(**values)
    except ValueError as error:
        raise InputError(f"{source}: {error}") from error


def _check(value: Any, expected: Any, where: str) -> Any:
    _require_writable(value, where)
    kind = getattr(expected, "__origin__", expected)
    if kind is float and type(value) is int:  # not bool
        value = float(value)
    if type(value) is not kind:
        name = getattr(expected, "__name__", expected)
        raise InputError(f"{where}: got {value!r:.80}, expected a value of type {name}")
    if kind is float and not math.isfinite(value):
        raise InputError(f"{where}: got {value!r}, expected a finite number")
    return value


def _require_writable(value: Any, where: str) -> None:
    if isinstance(value, dict | list):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            _require_writable(key, where)
            _require_writable(entry, f"{where}.{key}")
    elif not isinstance(value, str | int | float):
        raise InputError(f"{where}: got {value!r}, expected text, a number or a truth value")
    elif isinstance(value, int) and (bits := value.bit_length()) > 63:
        raise InputError(f"{where}: got an integer of {bits} bits, expected at most 63")
    elif isinstance(value, float) and math.isnan(value):
        raise InputError(f"{where}: got nan, expected a number")
    elif isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:  # bytes of the command line that are not UTF-8
            raise InputError(f"{where}: got {value!r:.80}, expected UTF-8 text") from error
