"""Reading without training.

A checkpoint's tables, memory-mapped, in one process without a process group.
"""

import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardemb import kernels
from shardemb.checkpoint.manifest import Manifest, SavedShard, Verify, checkpoints
from shardemb.checkpoint.manifest import verify as verify_all
from shardemb.checkpoint.safetensors_io import Layout
from shardemb.checkpoint.storage import Location, is_remote
from shardemb.exceptions import CheckpointError, InputError
from shardemb.serving.read_table import Metric, Nearest, Table, Tables, best_of, scores_of
from shardemb.sharding.placement import RowOrder
from shardemb.transforms import resolve_normalizer
from shardemb.utils.progress import progress
from shardemb.utils.types import RowFunction
from shardemb.vocabulary import Vocabulary

#: numbers that a chunk of rows, or of scores, may have
_CHUNK = 1 << 22
#: a run folder's labels, by the table that they name
_LABELS = {"entity": "entities.arrow", "relation": "relations.arrow"}


def open_store(
    path: str | Path,
    normalizers: Mapping[str, RowFunction | None] | None = None,
    verify: Verify | None = None,
) -> "Store":
    """Open a checkpoint, or the newest one of a run folder, to be read.

    Files are mapped into memory, so that opening costs the same at any size, and rows are read when
    they are asked for.

    Args:
        path: a checkpoint ``step-N``, a folder of such, or a run folder, whose ``entities.arrow``
            and ``relations.arrow`` give the labels.
        normalizers: by table; for those whose normalizer the checkpoint cannot name, because it is
            a function of your own.
        verify: check "sha256" or "size" of all files first; None checks sizes alone of what is
            opened.

    Raises:
        CheckpointError: no checkpoint there, or one that is damaged as far as it was looked at.
        ValueError: a URI: only local files can be mapped into memory.
    """
    if is_remote(path):
        raise InputError(
            f"got {str(path)!r}, expected a local path: files of an object store cannot be mapped"
            " into memory, copy them"
        )
    return Store(newest(Path(str(path).removeprefix("file://"))), normalizers or {}, verify)


def newest(path: Path) -> Path:
    """Return a checkpoint's path, or the newest one of a run folder or of a folder of checkpoints.

    Raises:
        CheckpointError: there is none.
    """
    if (path / "manifest.json").is_file():
        return path
    found: list[Location] = []
    for folder in (
        path,
        path / "best",
        path / "checkpoints",
    ):  # best: what a run with patience has gone back to
        found = found or checkpoints(folder)
    if not found:
        raise CheckpointError(
            f"{path}: got no finished checkpoint there, expected step-N with a manifest.json, or a"
            " run folder"
        )
    return Path(found[-1])


class Store(Tables["StoredTable"]):
    """The tables of one checkpoint, read-only; see :func:`open`.

    It maps table names to :class:`StoredTable`.
    """

    def __init__(
        self, path: Path, normalizers: Mapping[str, RowFunction | None], verify: Verify | None
    ) -> None:
        self.path = path
        self.manifest = Manifest(path) if verify is None else verify_all(path, verify)
        values = self.manifest.values
        self.step = values["step"]
        #: what the checkpoint keeps besides tensors
        self.state: dict[str, Any] = values["state"]
        unknown = normalizers.keys() - values["tables"].keys()
        if unknown:
            raise CheckpointError(
                f"{path}: got a normalizer for {sorted(unknown)}, expected one of"
                f" {sorted(values['tables'])}"
            )
        self.tables = {
            prefix: StoredTable(self, prefix, told, normalizers.get(prefix, _SAVED))
            for prefix, told in values["tables"].items()
        }


_SAVED: Any = object()


class StoredTable(Table):
    """A table of a checkpoint, its files mapped into memory."""

    def __init__(self, store: Store, prefix: str, told: Mapping[str, Any], normalizer: Any) -> None:
        self.name, self.max_id, self.shape, self.path = (
            told["name"],
            told["max_id"],
            tuple(told["shape"]),
            store.path,
        )
        self.is_complex: bool = told["complex"]
        self._store, self._prefix = store, prefix
        self._saved_normalizer, self._normalizer = told["normalizer"], normalizer
        manifest, tensor = store.manifest, f"{prefix}.weight" if prefix else "weight"
        parts = manifest.parts.get(tensor, [])
        if parts:
            manifest.check_covered(tensor)
        parts = sorted((part for part in parts if part.length), key=lambda part: part.first)
        #: whether the files are in the order of slots, or of ids
        self.sharded = any(part.sharded for part in parts)
        self._firsts = torch.tensor([part.first for part in parts] or [0])
        self._rows = [_mapped(manifest, part, tensor) for part in parts]
        stored = self._rows[0].dtype if self._rows else torch.float32
        self.dtype = torch.promote_types(stored, torch.complex32) if self.is_complex else stored

    @cached_property
    def normalizer(self) -> RowFunction | None:
        """What forward applies to the rows."""
        if self._normalizer is not _SAVED:
            return self._normalizer
        saved = self._saved_normalizer
        if saved is not None and saved["name"] is None:
            raise CheckpointError(
                f"{self._store.path}: table {self.name!r} was trained with the normalizer"
                f" {saved['function']}, a function of your own: give it,"
                f" normalizers={{{self._prefix!r}: ...}}, or None for the rows as they are stored"
            )
        return None if saved is None else resolve_normalizer(saved["name"], saved["kwargs"])

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The labels of the rows, from the run folder; None if there are none.

        Opened when they are first asked for.
        """
        alone = (
            len(self._store.manifest.values["tables"]) == 1
        )  # then the labels are its own, whatever its name
        name = _LABELS.get(self._prefix, _LABELS["entity"] if alone else None)
        for folder in (self._store.path.parent, self._store.path.parent.parent) if name else ():
            path = folder / str(name)
            if path.is_file():
                vocabulary = Vocabulary.load(path)
                if self.max_id not in (
                    len(vocabulary),
                    2 * len(vocabulary),
                ):  # with reciprocal relations
                    raise CheckpointError(
                        f"{path}: got {len(vocabulary)} labels for {self.max_id} rows of table"
                        f" {self.name!r}"
                    )
                expected = self._store.manifest.values["fingerprints"].get(path.stem)
                if expected is not None and vocabulary.fingerprint != expected:
                    raise CheckpointError(
                        f"{path}: got other labels than the rows of {self._store.path} were trained"
                        " with"
                    )
                return vocabulary
        return None

    def label(self, row: int) -> str:
        """Return the label of a row, or its id as text.

        Those past the vocabulary are reciprocal relations.
        """
        vocabulary, known = self.vocabulary, len(self.vocabulary or ())
        if vocabulary is None or row >= 2 * known:
            return str(row)
        return (
            vocabulary.label(row) if row < known else f"inverse of {vocabulary.label(row - known)}"
        )

    @property
    def labelled(self) -> bool:
        """Whether there is a vocabulary."""
        return self.vocabulary is not None

    def _ids_of(self, labels: list[str]) -> np.ndarray:
        assert self.vocabulary is not None
        return self.vocabulary.ids(labels)

    def _labels_of(self, ids: Tensor) -> list[list[str]]:
        return [[self.label(row) for row in line] for line in ids.tolist()]

    def places(self, ids: Tensor) -> Tensor:
        """Return where the rows of ids ``(n,)`` lie in the order of the files."""
        return RowOrder(self.max_id, self.sharded).slots(ids)

    def stored(self, ids: Tensor) -> Tensor:
        """Return rows ``(n, D)`` as they are stored, for ids ``(n,)`` in range."""
        order = self.places(ids)
        if len(self._rows) == 1:
            return kernels.take(self._rows[0], order.contiguous())
        out = torch.empty(
            len(ids),
            self._rows[0].shape[1] if self._rows else 0,
            dtype=self._rows[0].dtype if self._rows else None,
        )
        which = torch.searchsorted(self._firsts, order, right=True) - 1
        for number in which.unique().tolist():
            here = (which == number).nonzero().squeeze(1)
            out[here] = kernels.take(self._rows[number], order[here] - self._firsts[number])
        return out

    def _as_seen(self, stored: Tensor, raw: bool = False) -> Tensor:
        x = (
            stored.reshape(len(stored), *self.shape, 2)
            if self.is_complex
            else stored.reshape(len(stored), *self.shape)
        )
        if self.is_complex:
            x = torch.view_as_complex(x)
        return x if raw or self.normalizer is None else self.normalizer(x)

    def _look_up(self, ids: Tensor, raw: bool) -> Tensor:
        return self._as_seen(self.stored(ids), raw)

    def chunks(self, raw: bool = False, shown: str = "") -> Iterator[tuple[Tensor, Tensor]]:
        """Go over ids ``(n,)`` and rows ``(n, *shape)`` in the order of the ids.

        ``shown`` names a progress bar.
        """
        step = max(1, _CHUNK // max(1, self._width))
        starts = range(0, self.max_id, step)
        for start in progress(starts, shown, self.max_id / max(1, len(starts)), bool(shown)):
            ids = torch.arange(start, min(start + step, self.max_id))
            with torch.no_grad():
                yield ids, self._as_seen(self.stored(ids), raw)

    @property
    def _width(self) -> int:
        return self._rows[0].shape[1] if self._rows else 0

    @torch.no_grad()
    def best(
        self,
        scores: Callable[[Tensor], Tensor],
        k: int,
        exclude: Tensor | None = None,
        queries: int = 1,
    ) -> Nearest:
        """Find the rows of the highest scores among all.

        Chunk by chunk in the order in which they lie on the disk.

        Args:
            scores: maps rows ``(n, *shape)`` to ``(q, n)``.
            k: how many; fewer if the table has fewer.
            exclude: ``(q,)`` ids to leave out, -1 for none.
            queries: ``q``, for the size of the chunks.
        """
        return self._named(*self.best_among(0, self.max_id, scores, k, exclude, queries))

    @torch.no_grad()
    def best_among(
        self,
        first: int,
        last: int,
        scores: Callable[[Tensor], Tensor],
        k: int,
        exclude: Tensor | None = None,
        queries: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`best` among rows ``[first, last)`` in the order of the files.

        What is left out has the score -inf.

        Returns:
            Scores and ids ``(q, k)``, as :func:`shardemb.serving.read_table.best_of`.
        """
        best, found = torch.empty(queries, 0), torch.empty(queries, 0, dtype=torch.int64)
        step = max(1, _CHUNK // max(1, self._width, queries))
        for begin, rows in zip(self._firsts.tolist(), self._rows, strict=False):
            end = min(last - begin, len(rows))
            for start in range(max(first - begin, 0), end, step):
                chunk = rows[start : min(start + step, end)]
                ids = torch.arange(begin + start, begin + start + len(chunk))
                ids = RowOrder(self.max_id, self.sharded).ids(ids)
                new = scores(self._as_seen(chunk)).float()
                if exclude is not None:
                    new = new.masked_fill(ids == exclude.unsqueeze(1), -torch.inf)
                new, ids = best_of(new, ids, k)
                best, found = best_of(torch.cat([best, new], 1), torch.cat([found, ids], 1), k)
        return best, found

    def _search(
        self, vectors: Tensor, k: int, metric: Metric, exclude: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self.best_among(0, self.max_id, scores_of(vectors, metric), k, exclude, len(vectors))


def _mapped(manifest: Manifest, part: SavedShard, tensor: str) -> Tensor:
    """Map the rows of a part into memory, ``(n, D)``."""
    manifest.check_file(part.file, "size")
    path = Path(manifest.path) / part.file
    with path.open("rb") as file:
        layout = manifest.layouts(part.file, file)[tensor]
    return map_rows(path, layout)


def map_rows(path: Path, layout: Layout) -> Tensor:
    """Map a tensor of a safetensors file into memory."""
    count = math.prod(layout.shape)
    if not count:
        return torch.empty(layout.shape, dtype=layout.dtype)
    with path.open("rb") as file:
        # private: the file stays as it is, whatever happens to the tensor
        mapped = mmap.mmap(
            file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )
    return torch.frombuffer(mapped, dtype=layout.dtype, count=count, offset=layout.start).reshape(
        layout.shape
    )
