"""Reading without training: a checkpoint's tables, memory-mapped, in one process without a process group."""

import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from shardemb import native
from shardemb.manifest import CheckpointError, Manifest, Part, Verify, checkpoints
from shardemb.manifest import verify as verify_all
from shardemb.metrics import progress
from shardemb.plan import Spread
from shardemb.storage import Location, is_remote
from shardemb.tensorfile import Layout
from shardemb.transforms import resolve_normalizer
from shardemb.types import RowFunction
from shardemb.vocabulary import Vocabulary

Metric = Literal["cosine", "dot", "l2"]
#: ids or labels, one or many
Keys = int | str | Sequence[int] | Sequence[str] | np.ndarray | Tensor
#: numbers that a chunk of rows, or of scores, may have
_CHUNK = 1 << 22
#: a run folder's labels, by the table that they name
_LABELS = {"entity": "entities.arrow", "relation": "relations.arrow"}


@dataclass(frozen=True)
class Nearest:
    """The best rows for each of q queries, best first."""

    #: (q, k) int64
    ids: Tensor
    #: (q, k): cosine or dot product, which fall, or distances, which rise
    scores: Tensor
    #: q lists of k labels; None without a vocabulary
    labels: list[list[str]] | None


def open(
    path: str | Path, normalizers: Mapping[str, RowFunction | None] | None = None, verify: Verify | None = None
) -> "Store":
    """Open a checkpoint, or the newest one of a run folder, to be read.

    Files are mapped into memory, so that opening costs the same at any size, and rows are read when they are asked for.

    Args:
        path: a checkpoint ``step-N``, a folder of such, or a run folder, whose ``entities.arrow`` and ``relations.arrow``
            give the labels.
        normalizers: by table; for those whose normalizer the checkpoint cannot name, because it is a function of your own.
        verify: check "sha256" or "size" of all files first; None checks sizes alone of what is opened.

    Raises:
        CheckpointError: no checkpoint there, or one that is damaged as far as it was looked at.
        ValueError: a URI: only local files can be mapped into memory.
    """
    if is_remote(path):
        raise ValueError(
            f"got {str(path)!r}, expected a local path: files of an object store cannot be mapped into memory, copy them"
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
    for folder in (path, path / "best", path / "checkpoints"):  # best: what a run with patience has gone back to
        found = found or checkpoints(folder)
    if not found:
        raise CheckpointError(
            f"{path}: got no finished checkpoint there, expected step-N with a manifest.json, or a run folder"
        )
    return Path(found[-1])


class Store:
    """The tables of one checkpoint, read-only; see :func:`open`. It maps table names to :class:`StoredTable`."""

    def __init__(self, path: Path, normalizers: Mapping[str, RowFunction | None], verify: Verify | None) -> None:
        self.path = path
        self.manifest = Manifest(path) if verify is None else verify_all(path, verify)
        values = self.manifest.values
        #: optimizer step of the checkpoint
        self.step: int = values["step"]
        #: what the checkpoint keeps besides tensors
        self.state: dict[str, Any] = values["state"]
        unknown = normalizers.keys() - values["tables"].keys()
        if unknown:
            raise CheckpointError(f"{path}: got a normalizer for {sorted(unknown)}, expected one of {sorted(values['tables'])}")
        #: by their names in the model
        self.tables = {
            prefix: StoredTable(self, prefix, told, normalizers.get(prefix, _SAVED))
            for prefix, told in values["tables"].items()
        }

    def __getitem__(self, name: str) -> "StoredTable":
        try:
            return self.tables[name]
        except KeyError:
            raise KeyError(f"{self.path}: got table {name!r}, expected one of {sorted(self.tables)}") from None

    @property
    def table(self) -> "StoredTable":
        """The table with the most rows: the entities' of a knowledge graph, or the only one."""
        if not self.tables:
            raise CheckpointError(f"{self.path}: has no table")
        return max(self.tables.values(), key=lambda table: table.max_id)

    def lookup(self, keys: Keys) -> Tensor:
        """Look rows of :attr:`table` up, see :meth:`StoredTable.lookup`."""
        return self.table.lookup(keys)

    def nearest(self, query: Any, k: int = 10, metric: Metric = "cosine", exclude_query: bool = True) -> Nearest:
        """Find the nearest rows of :attr:`table`, see :meth:`StoredTable.nearest`."""
        return self.table.nearest(query, k, metric, exclude_query)


_SAVED: Any = object()


class StoredTable:
    """A table of a checkpoint.

    Attributes:
        name: the table's own.
        max_id: its rows.
        shape: of one.
        dtype: of what :meth:`lookup` returns.
    """

    def __init__(self, store: Store, prefix: str, told: Mapping[str, Any], normalizer: Any) -> None:
        self.name: str = told["name"]
        self.max_id: int = told["max_id"]
        self.shape: tuple[int, ...] = tuple(told["shape"])
        self.is_complex: bool = told["complex"]
        self._store, self._prefix = store, prefix
        self._saved_normalizer, self._normalizer = told["normalizer"], normalizer
        manifest, tensor = store.manifest, f"{prefix}.weight" if prefix else "weight"
        parts = manifest.parts.get(tensor, [])
        if parts:
            manifest.check_covered(tensor)
        parts = sorted((part for part in parts if part.length), key=lambda part: part.first)
        self._sharded = any(part.sharded for part in parts)
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
                f"{self._store.path}: table {self.name!r} was trained with the normalizer {saved['function']}, a function of "
                f"your own: give it, normalizers={{{self._prefix!r}: ...}}, or None for the rows as they are stored"
            )
        return None if saved is None else resolve_normalizer(saved["name"], saved["kwargs"])

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The labels of the rows, from the run folder; None if there are none. Opened when they are first asked for."""
        alone = len(self._store.manifest.values["tables"]) == 1  # then the labels are its own, whatever its name
        name = _LABELS.get(self._prefix, _LABELS["entity"] if alone else None)
        for folder in (self._store.path.parent, self._store.path.parent.parent) if name else ():
            path = folder / str(name)
            if path.is_file():
                vocabulary = Vocabulary.load(path)
                if self.max_id not in (len(vocabulary), 2 * len(vocabulary)):  # with reciprocal relations
                    raise CheckpointError(f"{path}: got {len(vocabulary)} labels for {self.max_id} rows of table {self.name!r}")
                expected = self._store.manifest.values["fingerprints"].get(path.stem)
                if expected is not None and vocabulary.fingerprint != expected:
                    raise CheckpointError(f"{path}: got other labels than the rows of {self._store.path} were trained with")
                return vocabulary
        return None

    def label(self, row: int) -> str:
        """Return the label of a row, or its id as text; those past the vocabulary are reciprocal relations."""
        vocabulary, known = self.vocabulary, len(self.vocabulary or ())
        if vocabulary is None or row >= 2 * known:
            return str(row)
        return vocabulary.label(row) if row < known else f"inverse of {vocabulary.label(row - known)}"

    def ids(self, keys: Keys) -> Tensor:
        """Return int64 ids for ids or labels of any shape.

        Raises:
            KeyError: an unknown label, or a label where there is no vocabulary.
            IndexError: an id out of range.
            TypeError: neither integers nor labels.
        """
        where = f"{self._store.path}: table {self.name!r}"
        labels = [keys] if isinstance(keys, str) else keys
        if isinstance(labels, Sequence) and labels and all(isinstance(label, str) for label in labels):
            if self.vocabulary is None:
                raise KeyError(f"{where}: got a label, but there is no vocabulary beside the checkpoint: give ids")
            try:
                found = torch.from_numpy(self.vocabulary.ids([str(label) for label in labels]))
            except KeyError as error:
                raise KeyError(f"{where}: {error.args[0]}") from None
            return found[0] if isinstance(keys, str) else found
        ids = torch.as_tensor(keys)
        if ids.dtype not in (torch.int32, torch.int64) and ids.numel():
            raise TypeError(f"{where}: got keys of {ids.dtype}, expected integers or labels")
        ids = ids.long()
        if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < self.max_id):
            bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            raise IndexError(f"{where}: got id {bad}, expected 0 <= id < {self.max_id}")
        return ids

    def stored(self, ids: Tensor) -> Tensor:
        """Return rows ``(n, D)`` as they are stored, for ids ``(n,)`` in range."""
        order = Spread(self.max_id).slots(ids) if self._sharded else ids
        if len(self._rows) == 1:
            return native.take(self._rows[0], order.contiguous())
        out = torch.empty(
            len(ids), self._rows[0].shape[1] if self._rows else 0, dtype=self._rows[0].dtype if self._rows else None
        )
        which = torch.searchsorted(self._firsts, order, right=True) - 1
        for number in which.unique().tolist():
            here = (which == number).nonzero().squeeze(1)
            out[here] = native.take(self._rows[number], order[here] - self._firsts[number])
        return out

    def _as_seen(self, stored: Tensor, raw: bool = False) -> Tensor:
        x = stored.reshape(len(stored), *self.shape, 2) if self.is_complex else stored.reshape(len(stored), *self.shape)
        if self.is_complex:
            x = torch.view_as_complex(x)
        return x if raw or self.normalizer is None else self.normalizer(x)

    @torch.no_grad()
    def lookup(self, keys: Keys, raw: bool = False) -> Tensor:
        """Look rows up by ids or labels.

        Args:
            keys: an id, a label, or many of one kind, of any shape ``s``.
            raw: leave the normalizer out.

        Returns:
            ``(*s, *shape)``, normalized as the table's forward does; a copy.

        Raises:
            KeyError, IndexError, TypeError: as :meth:`ids`.
        """
        ids = self.ids(keys)
        return self._as_seen(self.stored(ids.reshape(-1)), raw).reshape(*ids.shape, *self.shape)

    def chunks(self, raw: bool = False, shown: str = "") -> Iterator[tuple[Tensor, Tensor]]:
        """Go over ids ``(n,)`` and rows ``(n, *shape)`` in the order of the ids; ``shown`` names a progress bar."""
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
    def best(self, scores: Callable[[Tensor], Tensor], k: int, exclude: Tensor | None = None, queries: int = 1) -> Nearest:
        """Find the rows of the highest scores among all, chunk by chunk in the order in which they lie on the disk.

        Args:
            scores: maps rows ``(n, *shape)`` to ``(q, n)``.
            k: how many; fewer if the table has fewer.
            exclude: ``(q,)`` ids to leave out, -1 for none.
            queries: ``q``, for the size of the chunks.
        """
        best, found = torch.empty(queries, 0), torch.empty(queries, 0, dtype=torch.int64)
        step = max(1, _CHUNK // max(1, self._width, queries))
        for first, rows in zip(self._firsts.tolist(), self._rows, strict=False):
            for start in range(0, len(rows), step):
                chunk = rows[start : start + step]
                ids = torch.arange(first + start, first + start + len(chunk))
                ids = Spread(self.max_id).ids(ids) if self._sharded else ids
                new = scores(self._as_seen(chunk)).float()
                if exclude is not None:
                    new = new.masked_fill(ids == exclude.unsqueeze(1), -torch.inf)
                top = new.topk(min(k, new.shape[1]), dim=1)
                best, found = torch.cat([best, top.values], 1), torch.cat([found, ids[top.indices]], 1)
                best, order = best.topk(min(k, best.shape[1]), dim=1)
                found = found.gather(1, order)
        # those that are left out come last, if there are not k others
        kept = int((best > -torch.inf).sum(1).min()) if best.numel() else 0
        best, found = best[:, :kept], found[:, :kept]
        labels = None if self.vocabulary is None else [[self.label(row) for row in line] for line in found.tolist()]
        return Nearest(found, best, labels)

    @torch.no_grad()
    def nearest(self, query: Any, k: int = 10, metric: Metric = "cosine", exclude_query: bool = True) -> Nearest:
        """Find the nearest rows exactly, by comparing with all of them.

        Args:
            query: ids or labels, one or ``(q,)``; or a floating point or complex tensor ``(q, *shape)`` of vectors.
            k: how many.
            metric: "cosine" (0 for a zero row), "dot" (complex: the real part of the Hermitian product), or "l2", the distance.
            exclude_query: leave the rows that were asked for out.

        Raises:
            ValueError: another metric, vectors of another shape, k below 1.
            KeyError, IndexError, TypeError: as :meth:`ids`.
        """
        if metric not in ("cosine", "dot", "l2") or k < 1:
            raise ValueError(f"got metric={metric!r}, k={k}, expected 'cosine', 'dot' or 'l2', and at least 1")
        exclude = None
        if isinstance(query, Tensor) and (query.is_floating_point() or query.is_complex()):
            vectors = query
            if tuple(vectors.shape[1:]) != self.shape or not vectors.dim():
                raise ValueError(f"table {self.name!r}: got vectors of shape {tuple(query.shape)}, expected (q, *{self.shape})")
        else:
            ids = self.ids(query).reshape(-1)
            vectors, exclude = self.lookup(ids), ids if exclude_query else None
        flat = _real(vectors)

        def scores(rows: Tensor) -> Tensor:
            other = _real(rows)
            if metric == "l2":  # without the matmul, whose rounding is as large as small distances
                return -torch.cdist(flat, other, compute_mode="donot_use_mm_for_euclid_dist")
            product = flat @ other.T
            if metric == "dot":
                return product
            return product / (flat.norm(dim=1, keepdim=True) * other.norm(dim=1)).clamp_min(torch.finfo(flat.dtype).tiny)

        found = self.best(scores, k, exclude, len(flat))
        return found if metric != "l2" else Nearest(found.ids, -found.scores, found.labels)


def _real(x: Tensor) -> Tensor:
    """Flatten rows into real numbers, float32 at least."""
    x = torch.view_as_real(x) if x.is_complex() else x
    return x.reshape(len(x), -1).to(torch.promote_types(x.dtype, torch.float32))


def _mapped(manifest: Manifest, part: Part, tensor: str) -> Tensor:
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
        mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return torch.frombuffer(mapped, dtype=layout.dtype, count=count, offset=layout.start).reshape(layout.shape)
