"""The names of the files in a run's folder."""

import json
import platform
import tempfile
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from shardemb import __version__
from shardemb.checkpoint.manifest import checkpoints
from shardemb.exceptions import InputError
from shardemb.utils.files import write_text
from shardemb.vocabulary import Vocabulary


class RunFolder:
    """The files of one run.

    ::

        config.toml                      all settings, defaults included
        run.json                         each start: time, command, workers, versions
        metrics.jsonl, metrics.png       metrics and their plot
        entities.arrow, relations.arrow  labels in the order of ids
        checkpoints/, best/              the newest; the best validation's
        tensorboard/, ray/               event files; Ray Train's records

    Args:
        path: a folder on storage that all ranks share; it need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.toml"
        self.starts = self.path / "run.json"
        self.metrics = self.path / "metrics.jsonl"
        self.plot = self.path / "metrics.png"
        self.checkpoints = self.path / "checkpoints"
        self.best = self.path / "best"
        self.tensorboard = self.path / "tensorboard"
        self.ray = self.path / "ray"

    def __str__(self) -> str:
        return str(self.path)

    def existing(self, path: Path) -> Path:
        """Return the path of an existing file; otherwise FileNotFoundError."""
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file, expected a run folder that shardemb train has made"
            )
        return path

    @property
    def started(self) -> bool:
        """Whether the folder holds more than a failed start leaves."""
        prepared = {self.config, self.starts}
        return self.path.is_dir() and any(path not in prepared for path in self.path.iterdir())

    @property
    def resumable_config(self) -> Path | None:
        """The run's settings; None before its first start."""
        return self.config if self.started and self.config.exists() else None

    def require_empty(self) -> None:
        """Raise FileExistsError if the run has started."""
        if self.started:
            raise FileExistsError(
                f"{self} is not empty: give another --output, or go on with --resume"
            )

    def results(self) -> list[str]:
        """Return the names of existing results."""
        return [p.name for p in (self.checkpoints, self.best, self.metrics) if p.exists()]

    def create(self) -> None:
        """Make the folder and check that it is writable; OSError otherwise."""
        try:
            str(self).encode()  # Arrow requires UTF-8 names
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except (OSError, UnicodeEncodeError) as error:
            raise OSError(
                f"--output {self}: expected a folder that can be made and written to: {error}"
            ) from error

    def write_start(self, config: str, command: str, workers: str) -> None:
        """Write the settings of a new run as TOML, and add a start to run.json."""
        if self.resumable_config is None:
            write_text(self.config, config)
        starts = json.loads(self.starts.read_text("utf-8")) if self.starts.exists() else []
        versions = {name: version(name) for name in ("numpy", "torch", "torchrec")}
        start = {
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": command,
            "workers": workers,
            "versions": {
                "python": platform.python_version(),
                "platform": platform.platform(),
                **versions,
                "shardemb": __version__,
            },
        }
        write_text(self.starts, json.dumps([*starts, start], indent=1) + "\n")

    def newest(self) -> str | None:
        """Return the name of the newest finished checkpoint."""
        finished = checkpoints(self.checkpoints)
        return Path(finished[-1]).name if finished else None

    def checkpoint(self, step: int) -> Path:
        """Return the path of a step's checkpoint."""
        return self.checkpoints / f"step-{step:010d}"

    def best_checkpoint(self, step: int) -> Path:
        """Return the path of a step's checkpoint in ``best/``."""
        return self.best / self.checkpoint(step).name

    def check_labels(self, vocabularies: Mapping[str, Vocabulary]) -> None:
        """Raise ValueError if the run has other "entities" or "relations"."""
        for path, vocabulary in self._labels(vocabularies):
            if path.exists() and Vocabulary.load(path).fingerprint != vocabulary.fingerprint:
                raise InputError(
                    f"{path}: the run was trained on other labels than the dataset has now: give"
                    " another --output"
                )

    def save_labels(self, vocabularies: Mapping[str, Vocabulary]) -> None:
        """Write missing label files; other ranks may be reading existing ones."""
        for path, vocabulary in self._labels(vocabularies):
            if not path.exists():
                vocabulary.save(path)

    def _labels(self, vocabularies: Mapping[str, Vocabulary]) -> list[tuple[Path, Vocabulary]]:
        return [(self.path / f"{kind}.arrow", vocab) for kind, vocab in vocabularies.items()]
