"""A checkpoint's tables, memory-mapped for reading in one process."""

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
from shardemb.checkpoint.plain_values import from_json
from shardemb.checkpoint.safetensors_io import Layout
from shardemb.checkpoint.storage import is_remote
from shardemb.exceptions import CheckpointError, InputError
from shardemb.serving.read_table import Metric, Table, Tables, best_of, scores_of
from shardemb.sharding.placement import RowOrder
from shardemb.transforms import resolve_normalizer
from shardemb.utils.progress import progress
from shardemb.utils.types import RowFunction
from shardemb.vocabulary import Vocabulary

#: most numbers in a chunk of rows or scores
_CHUNK = 1 << 22
#: a run folder's labels, by table
_LABELS = {"entity": "entities.arrow", "relation": "relations.arrow"}


def open_store(
    path: str | Path,
    normalizers: Mapping[str, RowFunction | None] | None = None,
    verify: Verify | None = None,
) -> "Store":
    """Open a checkpoint, or the newest one of a run folder, for reading.

    Files are mapped into memory, so opening takes the same time at any size.

    Args:
        path: a checkpoint ``step-N``, a folder of them, or a run folder, whose ``entities.arrow``
            and ``relations.arrow`` give the labels.
        normalizers: by table, for normalizers that are your own functions, which a checkpoint
            cannot hold.
        verify: check "sha256" or "size" of all files; None checks the sizes of the mapped ones.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        ValueError: a URI; only local files can be mapped.
    """
    if is_remote(path):
        raise InputError(
            f"got {str(path)!r}, expected a local path: files of an object store cannot be mapped"
            " into memory, copy them"
        )
    return Store(newest(Path(str(path).removeprefix("file://"))), normalizers or {}, verify)


def newest(path: Path) -> Path:
    """Return a folder's newest checkpoint, or the path itself; CheckpointError for none."""
    if (path / "manifest.json").is_file():
        return path
    # best: where a run with patience keeps its best checkpoint
    for folder in (path, path / "best", path / "checkpoints"):
        if finished := checkpoints(folder):
            return Path(finished[-1])
    raise CheckpointError(
        f"{path}: got no finished checkpoint there, expected step-N with a manifest.json, or a run"
        " folder"
    )


class Store(Tables["StoredTable"]):
    """The tables of one checkpoint, read-only; :func:`open_store` opens one.

    Attributes:
        manifest: the checkpoint's manifest.
        state: the user's state in the checkpoint.
    """

    def __init__(
        self, path: Path, normalizers: Mapping[str, RowFunction | None], verify: Verify | None
    ) -> None:
        self.path = path
        self.manifest = Manifest(path) if verify is None else verify_all(path, verify)
        values = self.manifest.values
        self.step = values["step"]
        self.state: dict[str, Any] = from_json(values["state"], f"{path}: state")
        self.normalizers, self._verify = normalizers, verify
        unknown = normalizers.keys() - values["tables"].keys()
        if unknown:
            raise CheckpointError(
                f"{path}: got a normalizer for {sorted(unknown)}, expected one of"
                f" {sorted(values['tables'])}"
            )
        self.tables = {prefix: StoredTable(self, prefix) for prefix in values["tables"]}

    def __reduce__(self) -> Any:  # by its path: another process maps the same files
        return Store, (self.path, self.normalizers, self._verify)


class StoredTable(Table):
    """A table of a checkpoint, its files mapped into memory."""

    def __init__(self, store: Store, prefix: str) -> None:
        entry = store.manifest.values["tables"][prefix]
        self.name, self.max_id, self.path = entry["name"], entry["max_id"], store.path
        self.shape, self.is_complex = tuple(entry["shape"]), entry["complex"]
        self._store, self._prefix, self._saved_normalizer = store, prefix, entry["normalizer"]
        manifest, tensor = store.manifest, f"{prefix}.weight" if prefix else "weight"
        if tensor in manifest.shards:
            manifest.check_covered(tensor)
        shards = [shard for shard in manifest.shards.get(tensor, []) if shard.length]
        shards.sort(key=lambda shard: shard.first)
        #: order of the stored rows
        self.order = shards[0].order if shards else RowOrder(self.max_id, permuted=False)
        self._firsts = torch.tensor([shard.first for shard in shards] or [0])
        self._rows = [_mapped(manifest, shard, tensor) for shard in shards]
        stored = self._rows[0].dtype if self._rows else torch.float32
        self._width = self._rows[0].shape[1] if self._rows else 0
        self.dtype = torch.promote_types(stored, torch.complex32) if self.is_complex else stored
        #: most rows of a chunk
        self.chunk_rows = max(1, _CHUNK // max(1, self._width))

    def __reduce__(self) -> Any:
        return Store.__getitem__, (self._store, self._prefix)

    @cached_property
    def normalizer(self) -> RowFunction | None:
        """The function that forward applies; raises CheckpointError if it is unknown."""
        given, saved = self._store.normalizers, self._saved_normalizer
        if self._prefix in given or saved is None:
            return given.get(self._prefix)
        where = f"{self.path}: table {self.name!r} was trained with the normalizer"

        def apply(x: Tensor) -> Tensor:
            if saved["name"] is None:
                raise CheckpointError(
                    f"{where} {saved['function']}, a function of your own: give it,"
                    f" normalizers={{{self._prefix!r}: ...}}, or None for the rows as stored"
                )
            try:  # the manifest is untrusted
                y = (resolve_normalizer(saved["name"], saved["kwargs"]) or torch.clone)(x)
            except Exception as error:
                raise CheckpointError(f"{where} {saved}, which fails: {error}") from error
            if y.shape != x.shape:
                raise CheckpointError(f"{where} {saved}, which changes the shape of rows")
            return y

        return apply

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The rows' labels from the run folder, if any; read at first use."""
        values = self._store.manifest.values
        # a single table may have any name
        default = _LABELS["entity"] if len(values["tables"]) == 1 else None
        name = _LABELS.get(self._prefix, default)
        for folder in (self.path.parent, self.path.parent.parent) if name else ():
            path = folder / str(name)
            if not path.is_file():
                continue
            vocabulary = Vocabulary.load(path)
            count = len(vocabulary)
            if self.max_id not in (count, 2 * count):  # with inverse relations
                raise CheckpointError(
                    f"{path}: got {count} labels for {self.max_id} rows of table {self.name!r}"
                )
            expected = values["fingerprints"].get(path.stem, vocabulary.fingerprint)
            if vocabulary.fingerprint != expected:
                raise CheckpointError(
                    f"{path}: got other labels than the rows of {self.path} were trained with"
                )
            return vocabulary
        return None

    def label(self, row: int) -> str:
        """Return a row's label, or its id as text; inverse relations follow the labels."""
        vocabulary, known = self.vocabulary, len(self.vocabulary or ())
        if vocabulary is None or row >= 2 * known:
            return str(row)
        inverse = "inverse of " * (row >= known)
        return inverse + vocabulary.label(row % known)

    @property
    def labelled(self) -> bool:
        """Whether the rows have labels."""
        return self.vocabulary is not None

    def _ids_of(self, labels: list[str]) -> np.ndarray:
        assert self.vocabulary is not None
        return self.vocabulary.ids(labels)

    def _labels_of(self, ids: Tensor) -> list[list[str]]:
        return [[self.label(row) for row in line] for line in ids.tolist()]

    def stored(self, ids: Tensor) -> Tensor:
        """Return stored rows ``(n, D)`` for valid ids ``(n,)``."""
        slots = self.order.slots(ids)
        if len(self._rows) == 1:
            return kernels.take(self._rows[0], slots.contiguous())
        dtype = self._rows[0].dtype if self._rows else None
        out = torch.empty(len(ids), self._width, dtype=dtype)
        shard_of = torch.searchsorted(self._firsts, slots, right=True) - 1
        for shard in shard_of.unique().tolist():
            places = (shard_of == shard).nonzero().squeeze(1)
            out[places] = kernels.take(self._rows[shard], slots[places] - self._firsts[shard])
        return out

    def _as_seen(self, stored: Tensor, raw: bool = False) -> Tensor:
        x = stored.reshape(len(stored), *self.shape, *[2] * self.is_complex)
        x = torch.view_as_complex(x) if self.is_complex else x
        return x if raw or self.normalizer is None else self.normalizer(x)

    def _look_up(self, ids: Tensor, raw: bool) -> Tensor:
        return self._as_seen(self.stored(ids), raw)

    def chunks(self, raw: bool = False, shown: str = "") -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over ids ``(n,)`` and rows ``(n, *shape)`` in the order of ids.

        Args:
            raw: omit the normalizer.
            shown: title of a progress bar; "" shows none.
        """
        step = self.chunk_rows
        starts = range(0, self.max_id, step)
        for start in progress(starts, shown, self.max_id / max(1, len(starts)), bool(shown)):
            ids = torch.arange(start, min(start + step, self.max_id))
            with torch.no_grad():
                yield ids, self._as_seen(self.stored(ids), raw)

    @torch.no_grad()
    def best(
        self,
        scores: Callable[[Tensor], Tensor],
        k: int,
        exclude: Tensor | None = None,
        queries: int = 1,
        slots: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the highest scores, and their ids, ``(q, k)``, chunk by chunk.

        Args:
            scores: maps rows ``(n, *shape)`` to ``(q, n)``.
            k: rows per query; fewer if the table has fewer.
            exclude: ids ``(q,)`` that score -inf, -1 for none.
            queries: ``q``.
            slots: only ``[first, last)``; None for all.
        """
        first, last = slots or (0, self.max_id)
        best, best_ids = torch.empty(queries, 0), torch.empty(queries, 0, dtype=torch.int64)
        step = max(1, _CHUNK // max(1, self._width, queries))
        for begin, rows in zip(self._firsts.tolist(), self._rows, strict=False):
            end = min(last - begin, len(rows))
            for start in range(max(first - begin, 0), end, step):
                chunk = rows[start : min(start + step, end)]
                ids = self.order.ids(torch.arange(len(chunk)) + begin + start)
                new = scores(self._as_seen(chunk)).float()
                if exclude is not None:
                    new = new.masked_fill(ids == exclude.unsqueeze(1), -torch.inf)
                new, ids = best_of(new, ids, k)
                both = torch.cat([best, new], 1), torch.cat([best_ids, ids], 1)
                best, best_ids = best_of(*both, k)
        return best, best_ids

    def _search(
        self, vectors: Tensor, k: int, metric: Metric, exclude: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self.best(scores_of(vectors, metric), k, exclude, len(vectors))


def _mapped(manifest: Manifest, shard: SavedShard, tensor: str) -> Tensor:
    manifest.check_file(shard.file, "size")
    path = Path(manifest.path) / shard.file
    with path.open("rb") as file:
        layout = manifest.layouts(shard.file, file)[tensor]
    return map_rows(path, layout)


def map_rows(path: Path, layout: Layout) -> Tensor:
    """Map a tensor of a safetensors file into memory."""
    count = math.prod(layout.shape)
    if not count:
        return torch.empty(layout.shape, dtype=layout.dtype)
    access = mmap.PROT_READ | mmap.PROT_WRITE
    with path.open("rb") as file:
        # private: changes of the tensor never reach the file
        mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=access)
    rows = torch.frombuffer(mapped, dtype=layout.dtype, count=count, offset=layout.start)
    return rows.reshape(layout.shape)
