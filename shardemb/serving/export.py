"""Tables to and from files of other programs, chunk by chunk."""

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from shardemb.checkpoint import safetensors_io
from shardemb.checkpoint.storage import Location
from shardemb.checkpoint.writer import save_rows
from shardemb.exceptions import InputError
from shardemb.serving.store import StoredTable, map_rows, open_store
from shardemb.utils.files import replacing
from shardemb.vocabulary import Vocabulary

#: bytes of rows in each file of a sharded export
SHARD_BYTES = 1 << 30


def export_table(
    source: str | Path,
    out: str | Path,
    format: str | None = None,
    table: str | None = None,
    raw: bool = False,
    shown: bool = False,
) -> Path:
    """Write a checkpoint's table for other programs, in the order of ids.

    Args:
        source: a checkpoint or run folder, as for :func:`shardemb.open_store`.
        out: a new file, or a folder for "sharded"; it appears when complete.
        format: "safetensors"; "sharded": safetensors files of 1 GiB with Hugging Face's index;
            "parquet": id, label (if known), vector; "npy"; "word2vec": text lines of label or id
            and numbers. None takes it from the suffix.
        table: name in the model; None for the largest.
        raw: omit the normalizer.
        shown: show a progress bar.

    Raises:
        ValueError: an unknown format, or a label with spaces for "word2vec".
        FileExistsError: ``out`` exists.
        CheckpointError: as :func:`shardemb.open_store`.
    """
    out = Path(out)
    format = format or _SUFFIXES.get(out.suffix)
    if format not in _WRITERS:
        raise InputError(f"got format {format!r} for {out}, expected one of {sorted(_WRITERS)}")
    if out.exists():
        raise FileExistsError(f"{out} exists: give another name, or remove it")
    store = open_store(source)
    chosen = store.table if table is None else store[table]
    name = f"exporting {chosen.name}" if shown else ""
    with replacing(out) as partial:
        _WRITERS[format](chosen, partial, (rows for _, rows in chosen.chunks(raw, name)))
    return out


#: chunks of rows ``(n, *shape)``
_Rows = Iterator[Tensor]


def _flat(rows: Tensor) -> Tensor:
    """Return ``(n, D)`` float32 or float64; a complex number as two."""
    rows = torch.view_as_real(rows) if rows.is_complex() else rows
    dtype = rows.dtype if rows.dtype == torch.float64 else torch.float32
    return rows.reshape(len(rows), -1).to(dtype)


def _columns(table: StoredTable) -> int:
    return math.prod(table.shape) * (2 if table.is_complex else 1)


def _write_tensor(path: Path, name: str, table: StoredTable, length: int, rows: _Rows) -> None:
    with path.open("wb") as file:
        writer = safetensors_io.Writer(file)
        writer.write([safetensors_io.header({name: (table.dtype, (length, *table.shape))})])
        writer.write(safetensors_io.as_bytes(chunk.contiguous()) for chunk in rows)


def _write_safetensors(table: StoredTable, out: Path, rows: _Rows) -> None:
    _write_tensor(out, "weight", table, table.max_id, rows)


def _write_sharded(table: StoredTable, out: Path, rows: _Rows) -> None:
    out.mkdir()
    row_bytes = max(1, table.dtype.itemsize * math.prod(table.shape))
    chunks_per_file = max(1, SHARD_BYTES // (row_bytes * table.chunk_rows))
    per_file = chunks_per_file * table.chunk_rows
    firsts, index = range(0, max(1, table.max_id), per_file), {}
    for number, first in enumerate(firsts, 1):
        last = min(first + per_file, table.max_id)
        name = f"model-{number:05d}-of-{len(firsts):05d}.safetensors"
        tensor = f"weight.rows-{first}-{last}"
        index[tensor] = name
        _write_tensor(out / name, tensor, table, last - first, islice(rows, chunks_per_file))
    document = {"metadata": {"total_size": table.max_id * row_bytes}, "weight_map": index}
    text = json.dumps(document, indent=1)
    (out / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _write_parquet(table: StoredTable, out: Path, rows: _Rows) -> None:
    number = pa.float64() if table.dtype in (torch.float64, torch.complex128) else pa.float32()
    fields = {"id": pa.int64(), "label": pa.string(), "vector": pa.list_(number, _columns(table))}
    if table.vocabulary is None:
        del fields["label"]
    schema, done = pa.schema(fields), 0
    with pq.ParquetWriter(out, schema) as writer:
        for chunk in rows:
            flat = _flat(chunk)
            ids = range(done, done + len(flat))
            columns: dict[str, Any] = {"id": pa.array(ids, pa.int64())}
            if "label" in fields:
                columns["label"] = pa.array([table.label(row) for row in ids], pa.string())
            values = pa.array(flat.reshape(-1).numpy(), number)
            columns["vector"] = pa.FixedSizeListArray.from_arrays(values, _columns(table))
            writer.write_table(pa.table(columns, schema=schema))
            done += len(flat)


def _write_npy(table: StoredTable, out: Path, rows: _Rows) -> None:
    plain = table.dtype not in (torch.bfloat16, torch.complex32)  # numpy lacks these
    dtype = torch.empty(0, dtype=table.dtype if plain else torch.float32).numpy().dtype
    header = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": (table.max_id, *table.shape),
    }
    with out.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in rows:
            file.write(safetensors_io.as_bytes((chunk if plain else chunk.float()).contiguous()))


def _write_word2vec(table: StoredTable, out: Path, rows: _Rows) -> None:
    done = 0
    with out.open("w", encoding="utf-8") as file:
        file.write(f"{table.max_id} {_columns(table)}\n")
        for chunk in rows:
            for row in _flat(chunk).numpy():
                label = table.label(done)
                if any(char.isspace() for char in label):
                    raise InputError(
                        f"table {table.name!r}: got label {label!r}, expected none with spaces,"
                        " which separate the columns of word2vec's text: export as Parquet"
                    )
                file.write(f"{label} {' '.join(map(str, row))}\n")
                done += 1


_WRITERS: dict[str, Callable[[StoredTable, Path, _Rows], None]] = {
    "safetensors": _write_safetensors,
    "sharded": _write_sharded,
    "parquet": _write_parquet,
    "npy": _write_npy,
    "word2vec": _write_word2vec,
}
_SUFFIXES = {f".{format}": format for format in ("safetensors", "parquet", "npy")}
_SUFFIXES |= {".txt": "word2vec", ".vec": "word2vec"}


def import_table(
    source: Any,
    out: str | Path,
    table: str = "entity",
    labels: Sequence[str] | None = None,
    key: str | None = None,
) -> Location:
    """Make a run folder with one table from rows of another program.

    :func:`shardemb.open_store` and :func:`shardemb.checkpoint.load` read its
    ``checkpoints/step-0``; the labels are beside it. Files of torch (``.pt``, ``.pkl``) are
    pickles, which can run code: load them yourself, and pass the module or state dict.

    Args:
        source: an array or tensor ``(V, *shape)``; a module or state dict, such as
            torch.nn.Embedding or a PyKEEN model; or a ``.npy``, ``.safetensors``, ``.parquet``
            (columns "vector" and optionally "label"), ``.txt`` or ``.vec`` (word2vec) file.
        out: run folder without checkpoints.
        table: the table's name.
        labels: one for each row; by default the file's.
        key: name of the tensor or column, if there are several.

    Returns:
        The checkpoint's location.

    Raises:
        ValueError: an unknown or malformed file (names line or row), several tensors, or another
            number of labels than of rows.
        FileExistsError: ``out`` has checkpoints.
    """
    out = Path(out)
    if (out / "checkpoints").exists():
        raise FileExistsError(f"{out} has checkpoints: give another folder")
    out.mkdir(parents=True, exist_ok=True)
    with _rows_of(source, key, out) as (rows, own):
        labels = own if labels is None else list(labels)
        if labels is not None and len(labels) != len(rows):
            raise InputError(
                f"got {len(labels):,} labels for {len(rows):,} rows, expected one for each"
            )
        fingerprints = {}
        if labels is not None:
            vocabulary = Vocabulary(labels)
            vocabulary.save(out / "entities.arrow")
            fingerprints["entities"] = vocabulary.fingerprint
        return save_rows(out / "checkpoints", 0, {table: rows}, fingerprints)


_Imported = tuple[Tensor, list[str] | None]


@contextmanager
def _rows_of(source: Any, key: str | None, scratch: Path) -> Iterator[_Imported]:
    if isinstance(source, str | Path):
        path = Path(source)
        if path.suffix not in _READERS:
            raise InputError(
                f"{path}: got a file of suffix {path.suffix!r}, expected one of"
                f" {', '.join(_READERS)}; torch's .pt is a pickle, which can run code:"
                " load it yourself, and give import_table the module or state dict"
            )
        with tempfile.TemporaryDirectory(dir=scratch, prefix="import-") as folder:
            yield _READERS[path.suffix](path, key, Path(folder))
        return
    if isinstance(source, nn.Module):
        source = source.state_dict()
    if isinstance(source, Mapping):
        source = _one(source, key, "state dict", lambda x: isinstance(x, Tensor) and x.dim() > 1)
    rows = torch.as_tensor(source).detach()
    if rows.dim() < 2 or not (rows.is_floating_point() or rows.is_complex()):
        raise InputError(
            f"got {rows.dtype} of shape {tuple(rows.shape)}, expected floating point or complex"
            " rows (V, *shape)"
        )
    yield rows, None


def _one(values: Mapping[str, Any], key: str | None, what: str, fits: Callable[[Any], bool]) -> Any:
    names = [name for name, value in values.items() if fits(value) and key in (None, name)]
    if len(names) != 1:
        raise InputError(f"got a {what} with {sorted(values)}, expected one table: give its key=")
    return values[names[0]]


def _read_npy(path: Path, key: str | None, scratch: Path) -> _Imported:
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(
            f"{path}: got a file that is not numpy's, or holds objects ({error})"
        ) from error
    if not isinstance(array, np.ndarray) or array.ndim < 2 or array.dtype.kind not in "fc":
        raise InputError(
            f"{path}: got {getattr(array, 'dtype', type(array))}, expected floating point or"
            " complex rows (V, *shape)"
        )
    return torch.from_numpy(np.ascontiguousarray(array)), None


def _read_safetensors(path: Path, key: str | None, scratch: Path) -> _Imported:
    with path.open("rb") as file:
        try:
            layouts = safetensors_io.layouts(file)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from error

    def fits(layout: safetensors_io.Layout) -> bool:
        return len(layout.shape) > 1 and layout.dtype.is_floating_point

    return map_rows(path, _one(layouts, key, f"file {path}", fits)), None


def _read_parquet(path: Path, key: str | None, scratch: Path) -> _Imported:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: got a file that is not Parquet ({error})") from error
    name, names = key or "vector", file.schema_arrow.names
    if name not in names:
        raise InputError(
            f"{path}: got columns {names}, expected {name!r} and, if there are labels, 'label'"
        )
    labels: list[str] = []
    columns = [name, "label"] if "label" in names else [name]

    def rows() -> Iterator[np.ndarray]:
        for batch in file.iter_batches(columns=columns):
            column = batch.column(name)
            type_of = column.type
            is_list = pa.types.is_list(type_of) or pa.types.is_fixed_size_list(type_of)
            if column.null_count or not is_list:
                raise InputError(
                    f"{path}: got column {name!r} of {type_of} with {column.null_count} nulls,"
                    " expected lists"
                )
            if "label" in columns:
                labels.extend(batch.column("label").to_pylist())
            values = column.flatten().to_numpy(zero_copy_only=False)
            if len(column) and len(values) % len(column):
                raise InputError(
                    f"{path}: got vectors of different lengths in column {name!r}, expected the"
                    " same for all rows"
                )
            yield values.reshape(len(column), -1)

    return _spooled(rows(), scratch, path), labels if "label" in columns else None


def _read_word2vec(path: Path, key: str | None, scratch: Path) -> _Imported:
    labels: list[str] = []

    def rows() -> Iterator[np.ndarray]:
        with path.open(encoding="utf-8") as file:
            header = file.readline().split()
            if len(header) != 2 or not all(part.isdigit() for part in header):
                raise InputError(
                    f"{path}, line 1: got {' '.join(header)[:80]!r}, expected the number of rows"
                    " and of columns"
                )
            count, columns = int(header[0]), int(header[1])
            for number, line in enumerate(file, 2):
                where = f"{path}, line {number}"
                label, *values = line.rstrip("\n").rstrip(" ").split(" ")
                try:
                    row = np.array(values, dtype=np.float32)
                except ValueError as error:
                    raise InputError(f"{where}: got a value that is no number ({error})") from error
                if len(row) != columns:
                    raise InputError(f"{where}: got {len(row)} numbers, expected {columns}")
                labels.append(label)
                yield row[None]
            if len(labels) != count:
                raise InputError(
                    f"{path}: got {len(labels)} rows, expected {count}, as the first line says: was"
                    " the file cut off?"
                )

    try:
        return _spooled(rows(), scratch, path), labels
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}, line {len(labels) + 2}: got a byte that is not UTF-8 ({error})"
        ) from error


def _spooled(batches: Iterator[np.ndarray], scratch: Path, path: Path) -> Tensor:
    """The number of rows is unknown, so they go through a mapped file."""
    spool, count, width = scratch / "rows", 0, 0
    dtype: Any = np.float32
    with spool.open("wb") as file:
        for batch in batches:
            if not count:
                width = batch.shape[1]
                dtype = np.float64 if batch.dtype == np.float64 else np.float32
            if batch.shape[1] != width:
                raise InputError(
                    f"{path}, row {count}: got {batch.shape[1]} numbers, expected {width}, as in"
                    " the rows before"
                )
            file.write(np.ascontiguousarray(batch, dtype=dtype).data)
            count += len(batch)
    if not count or not width:
        raise InputError(f"{path}: got {count} rows of {width} numbers, expected at least one")
    return torch.from_numpy(np.memmap(spool, dtype=dtype, mode="c", shape=(count, width)))


_READERS: dict[str, Callable[[Path, str | None, Path], _Imported]] = {
    ".npy": _read_npy,
    ".safetensors": _read_safetensors,
    ".parquet": _read_parquet,
    ".txt": _read_word2vec,
    ".vec": _read_word2vec,
}
