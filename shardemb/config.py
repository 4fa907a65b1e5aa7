"""A job's settings: the rooms' own dataclasses, read strictly from TOML and written back in full."""

import dataclasses
import difflib
import json
import tomllib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from shardemb.kge.model import ModelConfig
from shardemb.kge.sampling import SamplingConfig
from shardemb.kge.trainer import TrainingConfig

#: settings that a run may go on without
_WHEN_TO_SAVE = ("checkpoint_every", "checkpoint_seconds", "keep")


@dataclass(frozen=True)
class JobConfig:
    """Everything that decides what a training job computes; the number of workers does not."""

    #: see :meth:`shardemb.kge.Triples.load`
    dataset: str = "wordnet"
    #: what becomes of valid and test triples that hold what no training triple holds: "keep", "drop" or "error"
    unseen: str = "keep"
    model: ModelConfig = field(default_factory=ModelConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        if self.unseen not in ("keep", "drop", "error"):
            raise ValueError(f"unseen: got {self.unseen!r}, expected 'keep', 'drop' or 'error'")

    @classmethod
    def load(cls, path: Path | None = None, overrides: Iterable[str] = (), dataset: str | None = None) -> "JobConfig":
        """Read a TOML file, then ``key=value`` overrides such as ``training.epochs=3`` (values as in TOML, or a bare word).

        Raises:
            ValueError: an unknown key (with the nearest known one), a value of a wrong type or out of range.
            FileNotFoundError: no such file.
        """
        tree: dict[str, Any] = {}
        if path is not None:
            try:
                tree = tomllib.loads(path.read_text(encoding="utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: got a byte that is not UTF-8 ({error}), expected TOML") from error
            except tomllib.TOMLDecodeError as error:
                raise ValueError(f"{path}: got text that is not TOML: {error}") from error
        for override in overrides:
            key, separator, text = override.partition("=")
            if not separator:
                raise ValueError(f"got override {override!r}, expected key=value, e.g. training.epochs=3")
            *sections, name = key.strip().split(".")
            node = tree
            for section in sections:
                node = node.setdefault(section, {})
                if not isinstance(node, dict):
                    raise ValueError(f"got override {override!r}, but {section!r} is no section")
            node[name] = _parse(text.strip())
        if dataset is not None:
            tree["dataset"] = dataset
        return _build(cls, tree, str(path or "configuration"), "")

    def to_toml(self) -> str:
        """Return the whole configuration, defaults included, as TOML that :meth:`load` reads."""
        lines, sections = [], []
        for key, value in dataclasses.asdict(self).items():
            if isinstance(value, dict):
                sections += ["", f"[{key}]", *(f"{name} = {_format(entry)}" for name, entry in value.items())]
            else:
                lines.append(f"{key} = {_format(value)}")
        return "\n".join(lines + sections) + "\n"

    def differences(self, other: "JobConfig") -> list[str]:
        """Return ``this against other`` for each setting that differs and changes what is computed."""
        mine, theirs = self.to_toml().splitlines(), other.to_toml().splitlines()
        pairs = [(a, b) for a, b in zip(mine, theirs, strict=True) if a != b]
        return [f"{a} against {b}" for a, b in pairs if a.split(" ")[0] not in _WHEN_TO_SAVE]


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _format(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_format(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_format(entry) for entry in value) + "]"
    return json.dumps(value)


def _build(cls: Any, tree: Mapping[str, Any], source: str, prefix: str) -> Any:
    hints = get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean {prefix + near[0]!r}?" if near else f"known: {', '.join(prefix + name for name in hints)}"
            raise ValueError(f"{source}: unknown key {prefix + key!r}: {hint}")
        expected = hints[key]
        if dataclasses.is_dataclass(expected):
            if not isinstance(value, Mapping):
                raise ValueError(f"{source}: {prefix + key}: got {value!r}, expected a section")
            values[key] = _build(expected, value, source, f"{prefix}{key}.")
        else:
            values[key] = _check(value, expected, f"{source}: {prefix + key}")
    try:
        return cls(**values)
    except ValueError as error:  # out of range
        raise ValueError(f"{source}: {error}") from error


def _check(value: Any, expected: Any, where: str) -> Any:
    if isinstance(expected, types.GenericAlias):
        origin: Any = expected.__origin__
        if isinstance(value, origin) and all(isinstance(key, get_args(expected)[0]) for key in value):
            return value
    elif expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, expected) and isinstance(value, bool) == (expected is bool):
        return value
    raise ValueError(f"{where}: got {value!r}, expected a value of type {getattr(expected, '__name__', expected)}")
