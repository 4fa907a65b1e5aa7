"""Head-relation-tail triples, numbered densely."""

import hashlib
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from shardemb.kge.data.splits import SPLITS, Unseen, check_unseen, find, held_out, judge, mixed
from shardemb.kge.data.triple_files import SCHEMA, SUFFIXES, read
from shardemb.vocabulary import Vocabulary

#: graphs that come with the package
BUNDLED = Path(__file__).parent

#: three columns of labels: heads, relations, tails
Columns = tuple[Sequence[str], Sequence[str], Sequence[str]]


def is_bundled(dataset: str) -> bool:
    """Whether this is the name of a graph that comes with the package."""
    return (
        bool(dataset)
        and Path(dataset).name == dataset
        and (BUNDLED / dataset / "train.tsv.gz").is_file()
    )


@dataclass(frozen=True)
class Triples:
    """A graph in three splits; ids are places in the vocabularies."""

    #: what it was loaded from
    name: str
    #: (T, 3) int32, or int64 if an id needs it: head, relation, tail, in an order that depends on T
    #: alone
    train: Tensor
    #: (T, 3), in the order of the files
    valid: Tensor
    #: (T, 3), in the order of the files
    test: Tensor
    entities: Vocabulary
    relations: Vocabulary
    #: training triples on all ranks, if ``train`` is this rank's share of them; 0 if it is all of
    #: them
    shared: int = 0

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
            dataset: "wordnet", which comes with the package; "pykeen:NAME" for a set that comes
                with an installed PyKEEN (nations, umls, kinships, ...); a folder that
                :func:`shardemb.kge.ingest` made, which is mapped into memory at once; a folder with
                train, valid and test, each a file (.tsv, .tsv.gz, .txt, .txt.gz, .nt, .nt.gz or
                .parquet) or a folder of part files; or one such file, or folder of part files, of
                which a twentieth each (5,000 at most) becomes valid and test, always the same.
            unseen: what becomes of valid and test triples with an entity or a relation that no
                training triple holds: "keep" them and warn, "drop" them and warn, or "error". In a
                folder that ingest made it is settled.
            literals: what becomes of triples of N-Triples whose object is a literal: "error",
                "drop" or "keep".
            verify: compare the hashes of the files that ingest made, which reads all of them.

        Raises:
            FileNotFoundError: no such graph, or a folder without the three files.
            ValueError: a malformed file (names file and line or row), two files for one split,
                unseen labels with "error", or a damaged file of ingest's.
            OSError: a file cannot be opened.
        """
        name, path = str(dataset), Path(dataset)
        check_unseen(unseen)
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
        return cls._number(name, labels, codes | {"train": train[order]}, unseen)

    @classmethod
    def _mapped(cls, name: str, folder: Path, unseen: str, verify: bool) -> "Triples":
        told, arrays, vocabularies = dataset_folder.read(folder, verify)
        kept = sum(told["unseen"]["triples"].values()) if told["unseen"]["fate"] == "keep" else 0
        if kept and unseen != "keep":
            raise InputError(
                f"{folder}: got {kept:,} valid and test triples with what no training triple holds,"
                f" kept by ingest, and unseen={unseen!r}: ingest again with --unseen {unseen}"
            )
        train, valid, test = (torch.from_numpy(arrays[split]) for split in SPLITS)
        data = cls(name, train, valid, test, vocabularies["entities"], vocabularies["relations"])
        # no rank reads all triples for it; dataclasses.replace leaves it behind
        data.__dict__["fingerprint"] = _fingerprint(
            told["files"][f"{split}.npy"]["sha256"] for split in SPLITS
        )
        return data

    @classmethod
    def from_columns(
        cls, name: str, train: Columns, valid: Columns, test: Columns, unseen: str = "keep"
    ) -> "Triples":
        """Number labels and make tensors, in the given order.

        Args:
            name: of the graph, for messages.
            train: columns of ``(T,)`` labels.
            valid: columns; may be empty.
            test: columns; may be empty.
            unseen: see :meth:`load`.

        Raises:
            ValueError: no training triple, or unseen labels with "error".
        """
        check_unseen(unseen)
        if not len(train[0]):
            raise InputError(f"{name}: got no training triples, expected at least one")
        parts = zip(SPLITS, (train, valid, test), strict=True)
        tables = {
            split: pa.table([pa.array(column, pa.large_string()) for column in part], schema=SCHEMA)
            for split, part in parts
        }
        return cls._number(name, *_encode(tables), unseen)

    @classmethod
    def _number(
        cls, name: str, labels: dict[str, pa.Array], codes: dict[str, np.ndarray], unseen: str
    ) -> "Triples":
        _settle_unseen(name, labels, codes, unseen)
        vocabularies, ids = {}, {}
        for kind, columns in _KINDS.items():
            used = labels[kind].take(
                np.unique(np.concatenate([part[:, columns].ravel() for part in codes.values()]))
            )
            vocabularies[kind] = Vocabulary.from_labels(used.to_pylist())
            ids[kind] = (
                pc.index_in(labels[kind], pa.array(vocabularies[kind].labels, pa.large_string()))
                .fill_null(0)
                .to_numpy()
            )
        dtype = dataset_folder.dtype_of(*map(len, vocabularies.values()))
        arrays = []
        for split in SPLITS:
            array = np.empty(codes[split].shape, dtype=dtype)
            for kind, columns in _KINDS.items():
                array[:, columns] = ids[kind][codes[split][:, columns]]
            arrays.append(torch.from_numpy(array))
        return cls(
            name,
            arrays[0],
            arrays[1],
            arrays[2],
            vocabularies["entities"],
            vocabularies["relations"],
        )

    def with_share(self, batches: Iterable[pa.Table], total: int, source: str) -> "Triples":
        """Return the graph with other training triples, of which this rank has a share.

        They lie in an unlinked file.

        Args:
            batches: this rank's: columns head, relation and tail, of labels.
            total: triples of all ranks.
            source: where they come from; it stands for them in the fingerprint.

        Raises:
            KeyError: a label that the graph has not.
            ValueError: other columns, a missing label, or no triple at all.
        """
        dtype = np.dtype(dataset_folder.dtype_of(len(self.entities), len(self.relations)))
        with tempfile.TemporaryFile(prefix="shardemb-share-") as file:
            for batch in batches:
                if not {*SCHEMA.names} <= {*batch.column_names}:
                    raise InputError(
                        f"{source}: got columns {batch.column_names}, expected"
                        f" {', '.join(SCHEMA.names)}"
                    )
                columns = [self._ids(batch.column(name), name, source) for name in SCHEMA.names]
                np.stack(columns, axis=1).astype(dtype).tofile(file)
            file.flush()
            if not file.tell():
                raise InputError(
                    f"{source}: got no triples for this rank, expected some: take fewer ranks"
                )
            train = torch.from_numpy(np.memmap(file, dtype=dtype, mode="c").reshape(-1, 3))
        data = replace(self, train=train, shared=total)
        held = (dataset_folder.sha256_of_array(split.numpy()) for split in (self.valid, self.test))
        data.__dict__["fingerprint"] = _fingerprint([source, str(total), *held])
        return data

    def _ids(self, column: pa.ChunkedArray, name: str, source: str) -> np.ndarray:
        if column.null_count:
            raise InputError(
                f"{source}: got {column.null_count} rows without a {name}, expected a label in each"
            )
        encoded = column.cast(pa.large_string()).combine_chunks().dictionary_encode()
        vocabulary = self.relations if name == "relation" else self.entities
        return vocabulary.ids(encoded.dictionary.to_pylist())[encoded.indices.to_numpy()]

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 of the triples' ids in all splits, in order.

        Of the hashes of the files that ingest would make of them.
        """
        return _fingerprint(dataset_folder.sha256_of_array(split.numpy()) for split in self.splits)

    @property
    def splits(self) -> tuple[Tensor, Tensor, Tensor]:
        """Train (a share of it, if ``shared``), valid and test.

        What filtered ranking leaves out.
        """
        return self.train, self.valid, self.test


#: which columns hold the labels of each vocabulary
_KINDS = {"entities": [0, 2], "relations": [1]}


def _fingerprint(hashes: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def _encode(tables: Mapping[str, pa.Table]) -> tuple[dict[str, pa.Array], dict[str, np.ndarray]]:
    """Return the distinct labels of each kind, and each table as (T, 3) int32 places among them."""
    labels, codes = (
        {},
        {split: np.empty((len(table), 3), dtype=np.int32) for split, table in tables.items()},
    )
    for kind, columns in _KINDS.items():
        chunks = [
            chunk
            for table in tables.values()
            for column in columns
            for chunk in table.column(column).chunks
        ]
        labels[kind] = pc.unique(pa.chunked_array(chunks, pa.large_string()))
        for split, table in tables.items():
            for column in columns:
                codes[split][:, column] = pc.index_in(table.column(column), labels[kind])
    return labels, codes


def _settle_unseen(
    name: str, labels: Mapping[str, pa.Array], codes: dict[str, np.ndarray], unseen: str
) -> None:
    """Keep.

    Drop or refuse the triples of valid and test that hold what no training triple holds.
    """
    seen = {}
    for kind, columns in _KINDS.items():
        seen[kind] = np.zeros(len(labels[kind]), dtype=bool)
        seen[kind][codes["train"][:, columns]] = True
    found = []
    for split in ("valid", "test"):
        part, known = codes[split], np.ones(len(codes[split]), dtype=bool)
        strange = {}
        for kind, columns in _KINDS.items():
            known &= seen[kind][part[:, columns]].all(axis=1)
            places = part[:, columns][~seen[kind][part[:, columns]]]
            first = [*dict.fromkeys(places.tolist())]
            strange[kind] = len(first), [labels[kind][code].as_py() for code in first[:3]]
        if not known.all():
            found.append(Unseen(split, int((~known).sum()), len(part), strange))
        if unseen == "drop":
            codes[split] = part[known]
    if text := judge(name, found, unseen):
        warnings.warn(text, stacklevel=4)


def _pykeen_folder(name: str) -> Path:
    """Where PyKEEN keeps a set that it ships; found without importing it, which takes seconds."""
    spec = find_spec("pykeen")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"dataset 'pykeen:{name}' comes with PyKEEN, which is not installed: pip install pykeen"
        )
    datasets = Path(spec.submodule_search_locations[0]) / "datasets"
    bundled = sorted(p.parent.name for p in datasets.glob("*/train.txt"))
    if name not in bundled:
        raise FileNotFoundError(
            f"got dataset 'pykeen:{name}', expected one of the sets that PyKEEN ships: {bundled}"
        )
    return datasets / name
