"""Which files hold which part of a graph, and the order of its triples.

The same for all ways in.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shardemb.exceptions import InputError
from shardemb.kge.data.triple_files import SUFFIXES

SPLITS = ("train", "valid", "test")
#: what becomes of valid and test triples with an entity or a relation that no training triple holds
UNSEEN = ("keep", "drop", "error")
#: names of files that look like those of a split, but for the end
_SPLIT_LIKE = ("train", "valid", "test", "dev", "val")


def find(sources: Sequence[Path]) -> dict[str, list[Path]]:
    """Find the files of a graph.

    Args:
        sources: one folder with train, valid and test, each a file or a folder of part files; or
            else files, and folders of part files, that make one graph, which is not split.

    Returns:
        The files of each split, or of the graph as that of "", in the order in which they are read:
        part files by their names.

    Raises:
        FileNotFoundError: a source is not there, a split has no file, or a folder holds none.
        ValueError: two files for one split; a file of another kind among part files; a split's name
            among those of parts.
    """
    if len(sources) == 1 and sources[0].is_dir():
        folder = sources[0]
        if any(_candidates(folder, split) for split in SPLITS) or not _has_parts(folder):
            return {split: _files_of(folder, split) for split in SPLITS}
        for path in _parts(folder):
            if path.name.lower().startswith(_SPLIT_LIKE):
                raise InputError(
                    f"{path}: got a file that is named like a split among part files of one graph,"
                    f" expected train, valid and test files ({', '.join(SUFFIXES)}), or folders of"
                    " these names: rename it"
                )
    found: list[Path] = []
    for source in sources:
        if not source.exists():
            raise FileNotFoundError(f"{source}: got no such file or folder, expected triples")
        found += _parts(source) if source.is_dir() else [source]
    return {"": found}


def _candidates(folder: Path, split: str) -> list[Path]:
    files = [file for suffix in SUFFIXES if (file := folder / f"{split}{suffix}").exists()]
    return files + [folder / split] * (folder / split).is_dir()


def _files_of(folder: Path, split: str) -> list[Path]:
    found = _candidates(folder, split)
    if len(found) > 1:
        raise InputError(
            f"{folder}: got {len(found)} files for {split!r},"
            f" {' and '.join(file.name for file in found)}, expected one: remove the others"
        )
    if not found:
        others = sorted(file.name for file in folder.glob(f"{split}*"))
        raise FileNotFoundError(
            f"{folder}: got 0 files for {split!r}{f' but {others}' if others else ''}, "
            f"expected one of {', '.join(split + suffix for suffix in SUFFIXES)}"
        )
    return _parts(found[0]) if found[0].name == split else found


def _has_parts(folder: Path) -> bool:
    return any(path.name.endswith(SUFFIXES) for path in folder.iterdir())


def _parts(folder: Path) -> list[Path]:
    """Return a folder's part files.

    Those that begin with "." or "_" are other programs' notes, as for Spark.
    """
    found = sorted(path for path in folder.iterdir() if not path.name.startswith((".", "_")))
    for path in found:
        if path.is_dir() or not path.name.endswith(SUFFIXES):
            raise InputError(
                f"{path}: got no part file, expected only {', '.join(SUFFIXES)} in its folder: move"
                " it elsewhere"
            )
    if not found:
        raise FileNotFoundError(
            f"{folder}: got a folder without files, expected part files ({', '.join(SUFFIXES)})"
        )
    return found


def mixed(rows: np.ndarray) -> np.ndarray:
    """Return a different random uint64 for each row number: splitmix64.

    Training triples are in the order of these.
    """
    x = rows.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def held_out(
    name: str, count: int, valid: int | None = None, test: int | None = None
) -> tuple[int, int]:
    """Return how many of a graph's triples become valid and test.

    By default a twentieth each, 5,000 at most.

    They are the first in the order of :func:`mixed`: of all test, then valid.

    Raises:
        ValueError: no triple would be left.
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
    """What a split holds that no training triple holds."""

    split: str
    #: triples that hold it
    triples: int
    #: of all triples of the split
    total: int
    #: by "entities" and "relations", how many, and the first ones
    labels: Mapping[str, tuple[int, Iterable[str]]]

    def __str__(self) -> str:
        kinds = [
            f"{kind} ({count}: {', '.join([*map(repr, first)][:3] + ['...'] * (count > 3))})"
            for kind, (count, first) in self.labels.items()
            if count
        ]
        return f"{self.triples} of {self.total} {self.split} triples hold {' and '.join(kinds)}"


def judge(name: str, found: Sequence[Unseen], unseen: str) -> str:
    """Return what to say of unseen labels, if anything.

    Raises:
        ValueError: there are some, and ``unseen`` is "error".
    """
    if not found:
        return ""
    text = f"{name}: {', '.join(map(str, found))} that no training triple holds"
    if unseen == "error":
        raise InputError(
            f"{text}, expected none: unseen='drop' drops these triples, unseen='keep' keeps them"
        )
    return f"{text}: " + (
        "dropped these triples"
        if unseen == "drop"
        else "they stay untrained; unseen='drop' drops these triples"
    )


def check_unseen(unseen: str) -> None:
    """Raise ValueError unless it is one of :data:`UNSEEN`."""
    if unseen not in UNSEEN:
        raise InputError(f"unseen: got {unseen!r}, expected one of {', '.join(map(repr, UNSEEN))}")
