"""Labels and their dense ids.

Ids are shuffled by a fixed seed: in order of appearance (or of the alphabet) popular entities stand together, and the
first of 8 contiguous shards gets 2.4 times the mean load.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shardemb.files import replacing


class Vocabulary:
    """An immutable list of distinct labels; a label's id is its place.

    Args:
        labels: in order of their ids.

    Raises:
        ValueError: a label stands there twice.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = list(labels)
        self._ids = {label: i for i, label in enumerate(self.labels)}
        if len(self._ids) != len(self.labels):
            twice = next(label for i, label in enumerate(self.labels) if self._ids[label] != i)
            raise ValueError(f"label {twice!r} stands twice in a vocabulary of {len(self.labels)}: labels must be distinct")

    @classmethod
    def from_labels(cls, labels: Iterable[str], seed: int = 0) -> "Vocabulary":
        """Collect distinct labels and shuffle their ids; the same set and seed give the same ids."""
        distinct = sorted(set(labels))
        order = np.random.default_rng(seed).permutation(len(distinct))
        return cls([distinct[i] for i in order])

    def ids(self, labels: Iterable[str]) -> np.ndarray:
        """Return int64 ids ``(n,)``; KeyError names an unknown label."""
        known = self._ids
        return np.fromiter((known[label] for label in labels), dtype=np.int64)

    def save(self, path: Path) -> None:
        """Write one column of labels, in order of ids, as Parquet."""
        with replacing(path) as partial:
            pq.write_table(pa.table({"label": self.labels}), partial)

    @classmethod
    def load(cls, path: Path) -> "Vocabulary":
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another kind of file or of columns, a null, a label twice; names the file.
        """
        try:
            table = pq.read_table(path)
        except (pa.ArrowInvalid, IsADirectoryError) as error:
            raise ValueError(f"{path}: got a file that is not Parquet ({error})") from error
        if table.column_names != ["label"] or not pa.types.is_string(table.column(0).type):
            got = ", ".join(f"{field.name} ({field.type})" for field in table.schema)
            raise ValueError(f"{path}: got columns {got or 'none'}, expected label (string)")
        labels = table.column(0).to_pylist()
        if None in labels:
            raise ValueError(f"{path}, row {labels.index(None)}: got no label, expected one")
        try:
            return cls(labels)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def __len__(self) -> int:
        return len(self.labels)
