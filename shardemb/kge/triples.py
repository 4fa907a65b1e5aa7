"""Head-relation-tail triples: read strictly, numbered densely.

A line that is not three non-empty fields is an error that names file and line; no triple is ever made up or skipped.
"""

import gzip
import re
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from shardemb.vocabulary import Vocabulary

Unseen = Literal["keep", "drop", "error"]
SPLITS = ("train", "valid", "test")
SUFFIXES = (".tsv", ".tsv.gz", ".txt", ".txt.gz", ".parquet")
#: graphs that come with the package
BUNDLED = Path(__file__).parent.parent / "data"
#: longest line that can be a triple, in bytes
MAX_LINE = 1 << 20

#: first lines that name columns instead of holding a triple
_HEADERS = {
    tuple(names.split())
    for names in (
        "head relation tail", "head rel tail", "h r t", "subject predicate object", "s p o", "source relation target",
        "source type target", "source label target", "src rel dst", "src relation dst", "from relation to", "from type to",
    )
}  # fmt: skip

#: three columns of labels: heads, relations, tails
Columns = tuple[list[str], list[str], list[str]]


def read_tsv(path: Path) -> Columns:
    """Read ``head TAB relation TAB tail`` lines in UTF-8, plain or ``.gz``.

    Raises:
        ValueError: a malformed line or a damaged file; names file and line, what was got and what was expected.
    """
    columns: Columns = ([], [], [])
    for number, line in _lines(path):
        fields = line.split("\t")
        if number == 1 and tuple(field.strip().casefold() for field in fields) in _HEADERS:
            raise _malformed(
                path, 1, f"a header, {line[:80]!r}", "a triple: remove the line (tail -n +2), or it would become one"
            )
        if len(fields) != 3:
            got = "an empty line" if not line else f"{len(fields)} field{'s' * (len(fields) != 1)}: {line[:80]!r}"
            raise _malformed(path, number, got, "three fields, head TAB relation TAB tail")
        for column, field in zip(columns, fields, strict=True):
            if not _is_label(field):
                raise _malformed(path, number, f"the field {field[:80]!r}", _LABEL)
            column.append(field)
    return columns


#: what a label is
_LABEL = "a label, not empty, without NUL, tab, line break or outer spaces"
_NO_LABEL = re.compile(r"\A\s|\s\Z|[\0\t\r\n]|\A\Z")


def _is_label(text: str) -> bool:
    return not _NO_LABEL.search(text)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            while raw := file.readline(MAX_LINE):
                number += 1
                if len(raw) == MAX_LINE:
                    raise _malformed(path, number, f"more than {MAX_LINE - 1:,} bytes", "a line of one triple")
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise _malformed(path, number, f"byte {error.object[error.start]:#04x}", "UTF-8 text") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _malformed(path, number + 1, f"a damaged file ({error})", "a whole gzip file") from error


def _malformed(path: Path, number: int, got: str, expected: str) -> ValueError:
    return ValueError(f"{path}, line {number}: got {got}, expected {expected}")


def read_parquet(path: Path) -> Columns:
    """Read the columns "head", "relation" and "tail", strings or integers.

    Raises:
        ValueError: a missing column, another type, a null or an empty label; names file, column and row.
    """
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: got a file that is not Parquet ({error})") from error
    columns = []
    for name in ("head", "relation", "tail"):
        if name not in table.column_names:
            raise ValueError(f"{path}: got columns {table.column_names}, expected 'head', 'relation' and 'tail'")
        column = table.column(name)
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ValueError(f"{path}: got column {name!r} of type {column.type}, expected strings or integers")
        labels = column.cast(kind).cast(pa.string()).to_pylist()
        for row, label in enumerate(labels):
            if label is None or not _is_label(label):
                raise ValueError(f"{path}, row {row}, column {name!r}: got {label!r}, expected {_LABEL}")
        columns.append(labels)
    return columns[0], columns[1], columns[2]


def read(path: Path) -> Columns:
    """Read a file of triples by its suffix."""
    return read_parquet(path) if path.suffix == ".parquet" else read_tsv(path)


@dataclass(frozen=True)
class Triples:
    """A graph in three splits; ids are places in the vocabularies."""

    #: what it was loaded from
    name: str
    #: (T, 3) int64: head, relation, tail
    train: Tensor
    #: (T, 3) int64
    valid: Tensor
    #: (T, 3) int64
    test: Tensor
    entities: Vocabulary
    relations: Vocabulary

    @classmethod
    def load(cls, dataset: str | Path, unseen: Unseen = "keep") -> "Triples":
        """Load a graph.

        Args:
            dataset: "wordnet", which comes with the package; "pykeen:NAME" for a set that comes with an installed PyKEEN
                (nations, umls, kinships, ...); a folder with train, valid and test files (.tsv, .tsv.gz, .txt, .txt.gz or
                .parquet); or one such file, of which a seeded twentieth each (5,000 at most) becomes valid and test.

            unseen: what to do with triples of valid and test that hold an entity or relation that no training triple holds:
                "keep" them, with a warning, "drop" them, with a warning, or "error".

        Raises:
            FileNotFoundError: no such graph, or a folder without the three files.
            ValueError: a malformed file; names file and line or row. Unseen entities or relations, with unseen="error".
        """
        if str(dataset).startswith("pykeen:"):
            return cls._from_folder(str(dataset), _pykeen_folder(str(dataset).removeprefix("pykeen:")), unseen)
        path = Path(dataset)
        if path.is_file():
            return cls._from_file(path, unseen)
        if (BUNDLED / str(dataset)).is_dir() and path.name == str(dataset):
            path = BUNDLED / path
        if not path.is_dir():
            raise FileNotFoundError(
                f"got dataset {str(dataset)!r}, expected 'wordnet', 'pykeen:NAME', a folder with train, valid and test "
                f"files ({', '.join(SUFFIXES)}), or one such file"
            )
        return cls._from_folder(str(dataset), path, unseen)

    @classmethod
    def _from_folder(cls, name: str, folder: Path, unseen: Unseen) -> "Triples":
        parts = []
        for split in SPLITS:
            found = [file for suffix in SUFFIXES if (file := folder / f"{split}{suffix}").is_file()]
            if len(found) != 1:
                raise FileNotFoundError(
                    f"{folder}: got {len(found)} files for {split!r}, expected one of {', '.join(split + s for s in SUFFIXES)}"
                )
            parts.append(read(found[0]))
        return cls.from_columns(name, parts[0], parts[1], parts[2], unseen)

    @classmethod
    def _from_file(cls, path: Path, unseen: Unseen) -> "Triples":
        heads, relations, tails = read(path)
        held = min(len(heads) // 20, 5000)
        order = np.random.default_rng(0).permutation(len(heads))
        train, valid, test = (
            ([heads[i] for i in part], [relations[i] for i in part], [tails[i] for i in part])
            for part in np.split(order, [len(heads) - 2 * held, len(heads) - held])
        )
        return cls.from_columns(str(path), train, valid, test, unseen)

    @classmethod
    def from_columns(cls, name: str, train: Columns, valid: Columns, test: Columns, unseen: Unseen = "keep") -> "Triples":
        """Number labels and make tensors; ``unseen`` as in :meth:`load`.

        Raises:
            ValueError: no training triple; unseen entities or relations, with unseen="error".
        """
        if not train[0]:
            raise ValueError(f"{name}: got no training triples, expected at least one")
        valid, test = _look_for_unseen(name, train, {"valid": valid, "test": test}, unseen)
        parts = (train, valid, test)
        entities = Vocabulary.from_labels(chain.from_iterable(labels for h, _, t in parts for labels in (h, t)))
        relations = Vocabulary.from_labels(chain.from_iterable(r for _, r, _ in parts))

        def number(part: Columns) -> Tensor:
            heads, kinds, tails = part
            return torch.from_numpy(np.stack([entities.ids(heads), relations.ids(kinds), entities.ids(tails)], axis=1))

        return cls(name, number(train), number(valid), number(test), entities, relations)

    def all(self) -> Tensor:
        """Return the triples of all splits, ``(T, 3)``: what filtered ranking leaves out."""
        return torch.cat([self.train, self.valid, self.test])


def _look_for_unseen(name: str, train: Columns, splits: dict[str, Columns], unseen: Unseen) -> tuple[Columns, Columns]:
    """Return valid and test without what shall be dropped, and tell what no training triple holds."""
    if unseen not in ("keep", "drop", "error"):
        raise ValueError(f"got unseen={unseen!r}, expected 'keep', 'drop' or 'error'")
    entities, relations = {*train[0], *train[2]}, {*train[1]}
    told, kept = [], []
    for split, (heads, kinds, tails) in splits.items():
        new_entities = [e for pair in zip(heads, tails, strict=True) for e in pair if e not in entities]
        new_relations = [r for r in kinds if r not in relations]
        good = [i for i in range(len(heads)) if heads[i] in entities and tails[i] in entities and kinds[i] in relations]
        if bad := len(heads) - len(good):
            what = [
                f"{len(set(found))} {kind} ({', '.join(map(repr, sorted(set(found))[:3]))}{', ...' * (len(set(found)) > 3)})"
                for kind, found in (("entities", new_entities), ("relations", new_relations))
                if found
            ]
            told.append(f"{bad} of {len(heads)} {split} triples hold {' and '.join(what)}")
        keep = range(len(heads)) if unseen == "keep" else good
        kept.append(([heads[i] for i in keep], [kinds[i] for i in keep], [tails[i] for i in keep]))
    if told:
        text = f"{name}: {'; '.join(told)} that no training triple holds"
        if unseen == "error":
            raise ValueError(f"{text}: add training triples, or take unseen='drop' or 'keep'")
        how = "they are dropped" if unseen == "drop" else "they stay untrained; unseen='drop' leaves these triples out"
        warnings.warn(f"{text}: {how}", stacklevel=4)
    return kept[0], kept[1]


def _pykeen_folder(name: str) -> Path:
    """Where PyKEEN keeps a set that it ships; found without importing it, which takes seconds."""
    spec = find_spec("pykeen")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"dataset 'pykeen:{name}' comes with PyKEEN, which is not installed: pip install pykeen")
    datasets = Path(spec.submodule_search_locations[0]) / "datasets"
    bundled = sorted(p.parent.name for p in datasets.glob("*/train.txt"))
    if name not in bundled:
        raise FileNotFoundError(f"got dataset 'pykeen:{name}', expected one of the sets that PyKEEN ships: {bundled}")
    return datasets / name
