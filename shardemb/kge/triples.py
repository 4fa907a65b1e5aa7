"""Head-relation-tail triples: read strictly, numbered densely.

A line that is not three labels is an error that names file and line; no triple is ever made up, or skipped unasked.
"""

import gzip
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain, compress, permutations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shardemb.vocabulary import Vocabulary, read_strings

SPLITS = ("train", "valid", "test")
SUFFIXES = (".tsv", ".tsv.gz", ".txt", ".txt.gz", ".parquet")
#: what becomes of valid and test triples with an entity or a relation that no training triple holds
UNSEEN = ("keep", "drop", "error")
#: graphs that come with the package
BUNDLED = Path(__file__).parent.parent / "data"
#: longest line that can be a triple, in bytes
MAX_LINE = 1 << 20

#: three columns of labels: heads, relations, tails
Columns = tuple[list[str], list[str], list[str]]

_NO_LABEL = frozenset("\0\t\n\r\ufeff")
_LABEL = "a label, not empty, without NUL, tab, end of line, byte-order mark or outer spaces"
#: what stands over columns of heads, of relations and of tails
_HEADER = (
    {"head", "h", "subject", "subj", "s", "source", "src", "from", "lhs", "entity1"},
    {"relation", "relationship", "rel", "r", "predicate", "pred", "p", "property", "edge", "type", "label"},
    {"tail", "t", "object", "obj", "o", "target", "dst", "to", "rhs", "entity2"},
)
_UTF8 = "UTF-8 text: convert it, e.g. iconv -f LATIN1 -t UTF-8"
#: first bytes that tell what a file is instead
_MAGIC = {
    b"\xff\xfe": "UTF-8 text: convert it, e.g. iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-8 text: convert it, e.g. iconv -f UTF-16 -t UTF-8",
    b"\x1f\x8b": "UTF-8 text: this is gzip, give it a name that ends in .gz",
}


def is_bundled(dataset: str) -> bool:
    """Whether this is the name of a graph that comes with the package."""
    return bool(dataset) and Path(dataset).name == dataset and (BUNDLED / dataset).is_dir()


def read_tsv(path: Path) -> Columns:
    """Read ``head TAB relation TAB tail`` lines in UTF-8, plain or ``.gz``; a quote is part of a label.

    Raises:
        ValueError: a malformed line, a header or a damaged file; names file and line, what was got and what was expected.
        OSError: the file cannot be opened.
    """
    columns: Columns = ([], [], [])
    for number, line in _lines(path):
        fields = line.split("\t")
        if "\r" in line:
            raise _malformed(path, number, f"a CR within {line[:80]!r}", "lines that end in LF or CRLF: convert the file")
        if len(fields) != 3:
            got = "an empty line" if not line else f"{len(fields)} field{'s' * (len(fields) != 1)}: {line[:80]!r}"
            raise _malformed(path, number, got, "three fields, head TAB relation TAB tail")
        for column, field in zip(columns, fields, strict=True):
            if not _is_label(field):
                raise _malformed(path, number, f"the field {field[:80]!r}", _LABEL)
            column.append(field)
        if number == 1 and _is_header(fields):
            expected = "a triple, head TAB relation TAB tail: remove the line (if it is a triple, let another be the first)"
            raise _malformed(path, number, f"the header {line!r}", expected)
    return columns


def _is_label(text: str) -> bool:
    return bool(text) and text == text.strip() and (text.isprintable() or _NO_LABEL.isdisjoint(text))


def _is_header(fields: Sequence[str]) -> bool:
    """Tell whether the fields are names of the three columns, in any order."""
    names = [re.sub(r"_(id|name|label|entity)$", "", field.strip("#\"' ").casefold()) for field in fields]
    return any(all(name in known for name, known in zip(names, order, strict=True)) for order in permutations(_HEADER))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    number, raw = 0, b""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            while raw := file.readline(MAX_LINE):
                number += 1
                if len(raw) == MAX_LINE:
                    raise _malformed(path, number, f"more than {MAX_LINE - 1:,} bytes", "a line of one triple")
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        expected = _MAGIC.get(raw[:2], _UTF8) if number == 1 else _UTF8
        raise _malformed(path, number, f"byte {error.object[error.start]:#04x}", expected) from error
    except (EOFError, OSError, zlib.error) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # it cannot be opened
        expected = "a whole gzip file" if path.suffix == ".gz" else "a file that can be read"
        raise _malformed(path, number + 1, f"a damaged file ({error})", f"{expected}: fetch it anew") from error


def _malformed(path: Path, number: int, got: str, expected: str) -> ValueError:
    return ValueError(f"{path}, line {number}: got {got}, expected {expected}")


def read_parquet(path: Path) -> Columns:
    """Read the columns "head", "relation" and "tail", strings (also dictionary-encoded) or integers.

    Raises:
        ValueError: a missing column, another type, a null, or what would be no label in a TSV file; names file, column and
            row (the first is row 0).
        OSError: the file cannot be opened.
    """
    names = ("head", "relation", "tail")
    heads, relations, tails = read_strings(path, names)
    for name, labels in zip(names, (heads, relations, tails), strict=True):
        for row, label in enumerate(labels):
            if not _is_label(label):
                raise ValueError(f"{path}, row {row}, column {name!r}: got {label[:80]!r}, expected {_LABEL}")
    return heads, relations, tails


def read(path: Path) -> Columns:
    """Read a file of triples by its suffix.

    Raises:
        ValueError: no triple in it, or malformed; names file and line or row.
        OSError: the file cannot be opened.
    """
    if path.is_dir():  # Arrow would read all files in it
        raise IsADirectoryError(f"{path}: got a folder, expected a file of triples")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: got a pipe or a device, expected a file of triples: every rank reads it")
    columns = read_parquet(path) if path.suffix == ".parquet" else read_tsv(path)
    if not columns[0]:
        raise ValueError(f"{path}: got a file without triples, expected at least one")
    return columns


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
    def load(cls, dataset: str | Path, unseen: str = "keep") -> "Triples":
        """Load a graph.

        Args:
            dataset: "wordnet", which comes with the package; "pykeen:NAME" for a set that comes with an installed PyKEEN
                (nations, umls, kinships, ...); a folder with train, valid and test files (.tsv, .tsv.gz, .txt, .txt.gz or
                .parquet); or one such file, of which a seeded twentieth each (5,000 at most) becomes valid and test.
            unseen: what becomes of valid and test triples with an entity or a relation that no training triple holds: "keep"
                them and warn, "drop" them and warn, or "error".

        Raises:
            FileNotFoundError: no such graph, or a folder without the three files.
            ValueError: a malformed file (names file and line or row), two files for one split, or unseen labels with "error".
            OSError: a file cannot be opened.
        """
        if str(dataset).startswith("pykeen:"):
            return cls._from_folder(str(dataset), _pykeen_folder(str(dataset).removeprefix("pykeen:")), unseen)
        path = Path(dataset)
        if path.is_file():
            return cls._from_file(path, unseen)
        if is_bundled(str(dataset)):
            path = BUNDLED / path
        if not str(dataset) or not path.is_dir():
            raise FileNotFoundError(
                f"got dataset {str(dataset)!r}, expected 'wordnet', 'pykeen:NAME', a folder with train, valid and test "
                f"files ({', '.join(SUFFIXES)}), or one such file"
            )
        return cls._from_folder(str(dataset), path, unseen)

    @classmethod
    def _from_folder(cls, name: str, folder: Path, unseen: str) -> "Triples":
        files = []
        for split in SPLITS:
            found = [file for suffix in SUFFIXES if (file := folder / f"{split}{suffix}").exists()]
            if len(found) > 1:
                raise ValueError(
                    f"{folder}: got {len(found)} files for {split!r}, {' and '.join(file.name for file in found)}, "
                    f"expected one: remove the others"
                )
            if not found:
                others = sorted(file.name for file in folder.glob(f"{split}*"))
                raise FileNotFoundError(
                    f"{folder}: got 0 files for {split!r}{f' but {others}' if others else ''}, "
                    f"expected one of {', '.join(split + suffix for suffix in SUFFIXES)}"
                )
            files += found
        train, valid, test = map(read, files)
        return cls.from_columns(name, train, valid, test, unseen)

    @classmethod
    def _from_file(cls, path: Path, unseen: str) -> "Triples":
        heads, relations, tails = read(path)
        held = min(len(heads) // 20, 5000)
        order = np.random.default_rng(0).permutation(len(heads))
        train, valid, test = (
            ([heads[i] for i in part], [relations[i] for i in part], [tails[i] for i in part])
            for part in np.split(order, [len(heads) - 2 * held, len(heads) - held])
        )
        return cls.from_columns(str(path), train, valid, test, unseen)

    @classmethod
    def from_columns(cls, name: str, train: Columns, valid: Columns, test: Columns, unseen: str = "keep") -> "Triples":
        """Number labels and make tensors.

        Args:
            name: of the graph, for messages.
            train: columns of ``(T,)`` labels.
            valid: columns; may be empty.
            test: columns; may be empty.
            unseen: see :meth:`load`.

        Raises:
            ValueError: no training triple, or unseen labels with "error".
        """
        if unseen not in UNSEEN:
            raise ValueError(f"unseen: got {unseen!r}, expected one of {', '.join(map(repr, UNSEEN))}")
        if not train[0]:
            raise ValueError(f"{name}: got no training triples, expected at least one")
        valid, test = _settle_unseen(name, train, valid, test, unseen)
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


def _settle_unseen(name: str, train: Columns, valid: Columns, test: Columns, unseen: str) -> tuple[Columns, Columns]:
    """Keep, drop or refuse the triples of valid and test that hold what no training triple holds."""
    entities, relations = {*train[0], *train[2]}, set(train[1])
    found, kept = [], []
    for split, part in (("valid", valid), ("test", test)):
        known = [h in entities and r in relations and t in entities for h, r, t in zip(*part, strict=True)]
        if not all(known):
            strange = [
                _count(kind, dict.fromkeys(label for label in labels if label not in seen))
                for kind, labels, seen in (
                    ("entities", chain.from_iterable(zip(part[0], part[2], strict=True)), entities),
                    ("relations", part[1], relations),
                )
            ]
            found.append(f"{known.count(False)} of {len(known)} {split} triples hold {' and '.join(filter(None, strange))}")
        heads, kinds, tails = (list(compress(labels, known)) if unseen == "drop" else labels for labels in part)
        kept.append((heads, kinds, tails))
    if found:
        text = f"{name}: {', '.join(found)} that no training triple holds"
        if unseen == "error":
            raise ValueError(f"{text}, expected none: unseen='drop' drops these triples, unseen='keep' keeps them")
        fate = "dropped these triples" if unseen == "drop" else "they stay untrained; unseen='drop' drops these triples"
        warnings.warn(f"{text}: {fate}", stacklevel=3)
    return kept[0], kept[1]


def _count(kind: str, labels: Iterable[str]) -> str:
    """Return for example "entities (4: 'a', 'b', 'c', ...)", or "" for none."""
    examples = [*map(repr, labels)]
    return f"{kind} ({len(examples)}: {', '.join(examples[:3] + ['...'] * (len(examples) > 3))})" if examples else ""


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
