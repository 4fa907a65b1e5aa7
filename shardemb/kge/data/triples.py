"""Head-relation-tail triples with dense ids."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from shardemb.exceptions import InputError
from shardemb.kge.data import dataset as dataset_folder
from shardemb.kge.data.splits import SPLITS, UNSEEN, Unseen, find, held_out, judge, mixed
from shardemb.kge.data.triple_files import SCHEMA, SUFFIXES, read
from shardemb.utils.validation import choice
from shardemb.vocabulary import Vocabulary, column_of, numbers, text_column

#: graphs in the package
BUNDLED = Path(__file__).parent

#: labels of heads, relations and tails
Columns = tuple[Sequence[str], Sequence[str], Sequence[str]]

#: columns with the labels of each vocabulary
_COLUMNS = {"entities": [0, 2], "relations": [1]}


def is_bundled(dataset: str) -> bool:
    """Whether the package contains a graph of this name."""
    named = bool(dataset) and Path(dataset).name == dataset
    return named and (BUNDLED / dataset / "train.tsv.gz").is_file()


def absolute(dataset: str) -> str:
    """Make a path absolute; other dataset names stay."""
    if dataset and not is_bundled(dataset) and Path(dataset).exists():
        return str(Path(dataset).resolve())
    return dataset


@dataclass(frozen=True)
class Triples:
    """A graph in three splits; ids index the vocabularies."""

    #: for messages
    name: str
    #: (T, 3) head, relation, tail; int32, or int64 if necessary; the order depends on T alone
    train: Tensor
    #: (T, 3), in the order of the files
    valid: Tensor
    #: (T, 3), in the order of the files
    test: Tensor
    entities: Vocabulary
    relations: Vocabulary
    #: what :meth:`load` takes, from any folder, to make this graph; "" for a graph in memory
    dataset: str = ""
    #: what :meth:`load` did with unseen labels
    unseen: str = "keep"

    @classmethod
    def load(
        cls,
        dataset: str | Path,
        unseen: str = "keep",
        literals: str = "error",
        verify: bool = False,
    ) -> "Triples":
        """Load a graph.

        Args:
            dataset: "wordnet", in the package; "pykeen:NAME", in an installed PyKEEN (nations,
                umls, kinships, ...); a folder of :func:`shardemb.kge.ingest`, which is mapped; a
                folder with train, valid and test, each a file (.tsv, .tsv.gz, .txt, .txt.gz, .nt,
                .nt.gz or .parquet) or a folder of part files; or one such file or folder, of which
                a twentieth each (at most 5,000) becomes valid and test, always the same.
            unseen: valid and test triples with an entity or a relation that no training triple has:
                "keep" and warn, "drop" and warn, or "error". Decided already in an ingested folder.
            literals: N-Triples whose object is a literal: "error", "drop" or "keep".
            verify: check the hashes of an ingested folder, which reads all files.

        Raises:
            FileNotFoundError: no such graph, or a split is missing.
            ValueError: a malformed or damaged file (names file and line or row), two files of one
                split, or unseen labels with "error".
            OSError: a file cannot be opened.
        """
        name, path = str(dataset), Path(dataset)
        choice("unseen", unseen, UNSEEN)
        if name.startswith("pykeen:"):
            path = _pykeen_folder(name.removeprefix("pykeen:"))
        elif not path.is_file():
            if is_bundled(name):
                path = BUNDLED / path
            if not name or not path.is_dir():
                raise FileNotFoundError(
                    f"got dataset {name!r}, expected 'wordnet', 'pykeen:NAME', a folder that"
                    " shardemb ingest made, one with train, valid and test files"
                    f" ({', '.join(SUFFIXES)}), or one such file"
                )
        if (path / dataset_folder.DESCRIPTION).is_file():
            return cls._mapped(name, path, unseen, verify)
        tables = {
            split: pa.concat_tables([read(file, literals) for file in files])
            for split, files in find([path]).items()
        }
        labels, codes = _encode(tables)
        train = codes["" if "" in codes else "train"]
        order = np.argsort(mixed(np.arange(len(train))))
        if "" in tables:
            num_valid, num_test = held_out(name, len(train))
            test, valid, order = np.split(order, [num_test, num_test + num_valid])
            codes = {"valid": train[np.sort(valid)], "test": train[np.sort(test)]}
        again = absolute(name) if literals == "error" else ""
        return cls._number(name, labels, codes | {"train": train[order]}, unseen, again)

    @classmethod
    def _mapped(cls, name: str, folder: Path, unseen: str, verify: bool) -> "Triples":
        description, arrays, vocabularies = dataset_folder.read(folder, verify)
        decision = description["unseen"]
        kept = sum(decision["triples"].values()) if decision["fate"] == "keep" else 0
        if kept and unseen != "keep":
            raise InputError(
                f"{folder}: got {kept:,} valid and test triples with labels that no training triple"
                f" has, kept by ingest, and unseen={unseen!r}: ingest again with --unseen {unseen}"
            )
        data = cls._of(name, arrays, vocabularies, absolute(name), unseen)
        # no need to read all triples; dataclasses.replace drops it
        data.__dict__["fingerprint"] = _fingerprint(
            description["files"][f"{split}.npy"]["sha256"] for split in SPLITS
        )
        return data

    @classmethod
    def from_columns(
        cls, name: str, train: Columns, valid: Columns, test: Columns, unseen: str = "keep"
    ) -> "Triples":
        """Make a graph from labels, in the given order.

        Args:
            name: for messages.
            train: columns of ``(T,)`` labels.
            valid: columns; may be empty.
            test: columns; may be empty.
            unseen: see :meth:`load`.

        Raises:
            ValueError: no training triple, or unseen labels with "error".
        """
        choice("unseen", unseen, UNSEEN)
        if not len(train[0]):
            raise InputError(f"{name}: got no training triples, expected at least one")
        tables = {
            split: pa.table([pa.array(c, pa.large_string()) for c in columns], schema=SCHEMA)
            for split, columns in zip(SPLITS, (train, valid, test), strict=True)
        }
        return cls._number(name, *_encode(tables), unseen)

    @classmethod
    def _number(
        cls,
        name: str,
        labels: dict[str, pa.Array],
        codes: dict[str, np.ndarray],
        unseen: str,
        dataset: str = "",
    ) -> "Triples":
        _settle_unseen(name, labels, codes, unseen)
        vocabularies, ids = {}, {}
        for kind, columns in _COLUMNS.items():
            used = np.unique(np.concatenate([part[:, columns].ravel() for part in codes.values()]))
            vocabulary = Vocabulary.from_labels(labels[kind].take(column_of(used)).to_pylist())
            # unused labels get no id
            ids[kind] = numbers(pc.index_in(labels[kind], text_column(vocabulary.labels)))
            vocabularies[kind] = vocabulary
        dtype = dataset_folder.dtype_of(*map(len, vocabularies.values()))
        arrays = {}
        for split in SPLITS:
            array = np.empty(codes[split].shape, dtype=dtype)
            for kind, columns in _COLUMNS.items():
                array[:, columns] = ids[kind][codes[split][:, columns]]
            arrays[split] = array
        return cls._of(name, arrays, vocabularies, dataset, unseen)

    @classmethod
    def _of(
        cls,
        name: str,
        arrays: Mapping[str, np.ndarray],
        vocabularies: Mapping[str, Vocabulary],
        dataset: str,
        unseen: str,
    ) -> "Triples":
        train, valid, test = (torch.from_numpy(arrays[split]) for split in SPLITS)
        return cls(name, train, valid, test, **vocabularies, dataset=dataset, unseen=unseen)

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 of the hashes of the splits' arrays, as ingest writes them."""
        return _fingerprint(dataset_folder.sha256_of_array(split.numpy()) for split in self.splits)

    @property
    def vocabularies(self) -> dict[str, Vocabulary]:
        """The labels of "entities" and "relations"."""
        return {"entities": self.entities, "relations": self.relations}

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of "entities", "relations" and "triples"."""
        labels = {kind: vocabulary.fingerprint for kind, vocabulary in self.vocabularies.items()}
        return {**labels, "triples": self.fingerprint}

    @property
    def splits(self) -> tuple[Tensor, Tensor, Tensor]:
        """Train, valid and test: the true answers for filtered ranking."""
        return self.train, self.valid, self.test


def _fingerprint(hashes: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def _encode(tables: Mapping[str, pa.Table]) -> tuple[dict[str, pa.Array], dict[str, np.ndarray]]:
    """Return each vocabulary's labels, and tables as (T, 3) int32 indices of them."""
    labels = {}
    codes = {split: np.empty((len(table), 3), dtype=np.int32) for split, table in tables.items()}
    for kind, columns in _COLUMNS.items():
        parts = [part for t in tables.values() for c in columns for part in t.column(c).chunks]
        labels[kind] = pc.unique(pa.chunked_array(parts, pa.large_string()))
        for split, table in tables.items():
            for column in columns:
                places = pc.index_in(table.column(column), labels[kind]).chunks
                if places:
                    codes[split][:, column] = np.concatenate([*map(numbers, places)])
    return labels, codes


def _settle_unseen(
    name: str, labels: Mapping[str, pa.Array], codes: dict[str, np.ndarray], unseen: str
) -> None:
    seen = {}
    for kind, columns in _COLUMNS.items():
        seen[kind] = np.zeros(len(labels[kind]), dtype=bool)
        seen[kind][codes["train"][:, columns]] = True
    reports = []
    for split in ("valid", "test"):
        part, known = codes[split], np.ones(len(codes[split]), dtype=bool)
        strange = {}
        for kind, columns in _COLUMNS.items():
            is_seen = seen[kind][part[:, columns]]
            known &= is_seen.all(axis=1)
            first = [*dict.fromkeys(part[:, columns][~is_seen].tolist())]
            strange[kind] = len(first), [labels[kind][code].as_py() for code in first[:3]]
        if not known.all():
            reports.append(Unseen(split, int((~known).sum()), len(part), strange))
        if unseen == "drop":
            codes[split] = part[known]
    judge(name, reports, unseen)


def _pykeen_folder(name: str) -> Path:
    """Return a dataset's folder in PyKEEN, without the slow import."""
    spec = find_spec("pykeen")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"dataset 'pykeen:{name}' comes with PyKEEN, which is not installed: pip install pykeen"
        )
    datasets = Path(spec.submodule_search_locations[0]) / "datasets"
    bundled = sorted(path.parent.name for path in datasets.glob("*/train.txt"))
    if name not in bundled:
        raise FileNotFoundError(
            f"got dataset 'pykeen:{name}', expected one of the sets that PyKEEN ships: {bundled}"
        )
    return datasets / name
