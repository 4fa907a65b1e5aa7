"""The files of each split of a graph, and the order of its triples."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shardemb.exceptions import InputError
from shardemb.kge.data.triple_files import SUFFIXES

SPLITS = ("train", "valid", "test")
#: what to do with valid and test triples whose entity or relation no training triple has
UNSEEN = ("keep", "drop", "error")
#: prefixes of names of splits
_SPLIT_LIKE = ("train", "valid", "test", "dev", "val")


def find(sources: Sequence[Path]) -> dict[str, list[Path]]:
    """Return the files of each split, or those of an unsplit graph as split "".

    ``sources`` is one folder with train, valid and test, each a file or a folder of part files; or
    files and folders of part files of one unsplit graph.

    Raises:
        FileNotFoundError: a source or a split is missing, or a folder is empty.
        ValueError: two files of one split, or a part file of another type or with a split's name.
    """
    if len(sources) == 1 and sources[0].is_dir():
        folder = sources[0]
        has_parts = any(path.name.endswith(SUFFIXES) for path in folder.iterdir())
        if not has_parts or any(_candidates(folder, split) for split in SPLITS):
            return {split: _files_of(folder, split) for split in SPLITS}
        for path in _parts(folder):
            if path.name.lower().startswith(_SPLIT_LIKE):
                raise InputError(
                    f"{path}: got a file that is named like a split among part files of one graph,"
                    f" expected train, valid and test files ({', '.join(SUFFIXES)}), or folders of"
                    " these names: rename it"
                )
    files: list[Path] = []
    for source in sources:
        if not source.exists():
            raise FileNotFoundError(f"{source}: got no such file or folder, expected triples")
        files += _parts(source) if source.is_dir() else [source]
    return {"": files}


def _candidates(folder: Path, split: str) -> list[Path]:
    files = [file for suffix in SUFFIXES if (file := folder / f"{split}{suffix}").exists()]
    return files + [folder / split] * (folder / split).is_dir()


def _files_of(folder: Path, split: str) -> list[Path]:
    files = _candidates(folder, split)
    if len(files) > 1:
        raise InputError(
            f"{folder}: got {len(files)} files for {split!r},"
            f" {' and '.join(file.name for file in files)}, expected one: remove the others"
        )
    if not files:
        others = sorted(file.name for file in folder.glob(f"{split}*"))
        raise FileNotFoundError(
            f"{folder}: got 0 files for {split!r}{f' but {others}' if others else ''}, "
            f"expected one of {', '.join(split + suffix for suffix in SUFFIXES)}"
        )
    return _parts(files[0]) if files[0].name == split else files


def _parts(folder: Path) -> list[Path]:
    """Return a folder's part files; "." and "_" files are those of programs like Spark."""
    parts = sorted(path for path in folder.iterdir() if not path.name.startswith((".", "_")))
    for path in parts:
        if path.is_dir() or not path.name.endswith(SUFFIXES):
            raise InputError(
                f"{path}: got no part file, expected only {', '.join(SUFFIXES)} in its folder: move"
                " it elsewhere"
            )
    if not parts:
        raise FileNotFoundError(
            f"{folder}: got a folder without files, expected part files ({', '.join(SUFFIXES)})"
        )
    return parts


def mixed(rows: np.ndarray) -> np.ndarray:
    """Return splitmix64 of row numbers, distinct uint64, which orders training triples."""
    x = rows.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def held_out(
    name: str, count: int, valid: int | None = None, test: int | None = None
) -> tuple[int, int]:
    """Return the numbers of valid and test triples; by default a twentieth each, at most 5,000.

    In the order of :func:`mixed`, test comes first, then valid, then train. ValueError if no
    training triple would remain.
    """
    usual = min(count // 20, 5000)
    valid, test = usual if valid is None else valid, usual if test is None else test
    if valid < 0 or test < 0 or valid + test >= count:
        raise InputError(
            f"{name}: got {valid:,} valid and {test:,} test triples to hold out of {count:,},"
            " expected 0 or more, and some left"
        )
    return valid, test


class Unseen(NamedTuple):
    """A split's labels that no training triple has."""

    split: str
    #: triples with such labels
    triples: int
    #: all triples of the split
    total: int
    #: by "entities" and "relations": their number, and the first ones
    labels: Mapping[str, tuple[int, Iterable[str]]]

    def __str__(self) -> str:
        kinds = [
            f"{kind} ({count}: {', '.join([*map(repr, first)][:3] + ['...'] * (count > 3))})"
            for kind, (count, first) in self.labels.items()
            if count
        ]
        return f"{self.triples} of {self.total} {self.split} triples hold {' and '.join(kinds)}"


def judge(name: str, reports: Sequence[Unseen], unseen: str) -> None:
    """Warn about unseen labels; ValueError if ``unseen`` is "error"."""
    if not reports:
        return
    text = f"{name}: {', '.join(map(str, reports))} that no training triple holds"
    if unseen == "error":
        raise InputError(f"{text}, expected none: unseen='drop' drops these, 'keep' keeps them")
    fate = "they stay untrained; unseen='drop' drops these triples"
    if unseen == "drop":
        fate = "dropped these triples"
    warnings.warn(f"{text}: {fate}", stacklevel=5)
