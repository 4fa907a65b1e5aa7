"""Tables to and from the files of other programs, a chunk at a time."""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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

#: bytes of rows in a file of a sharded export
SHARD_BYTES = 1 << 30


def export_table(
    source: str | Path,
    out: str | Path,
    format: str | None = None,
    table: str | None = None,
    raw: bool = False,
    shown: bool = False,
) -> Path:
    """Write a checkpoint's table for other programs, in the order of ids, a chunk at a time.

    Args:
        source: a checkpoint or a run folder, see :func:`shardemb.open_store`.
        out: a file, or a folder for "sharded"; it must not be there yet, and appears when all of it
            is written.
        format: "safetensors": one file; "sharded": safetensors files of 1 GiB and an index, as
            Hugging Face's; "parquet": id, label (if there are labels), vector; "npy": numpy's,
            which ``np.load(mmap_mode="r")`` maps; "word2vec": text, the label (or id) and the
            numbers of a row in a line. Without it the suffix decides.
        table: its name in the model; by default the largest.
        raw: rows as they are stored, without the normalizer.
        shown: show a progress bar.

    Returns:
        ``out``.

    Raises:
        ValueError: an unknown format; a label that word2vec's text cannot hold.
        FileExistsError: ``out`` is there.
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
        _WRITERS[format](chosen, partial, lambda: (rows for _, rows in chosen.chunks(raw, name)))
    return out


#: makes an iterator of rows ``(n, *shape)``
_Rows = Callable[[], Iterator[Tensor]]


def _flat(rows: Tensor) -> Tensor:
    """Return ``(n, D)`` float32 or float64, a complex number as two."""
    rows = torch.view_as_real(rows) if rows.is_complex() else rows
    return rows.reshape(len(rows), -1).to(
        rows.dtype if rows.dtype == torch.float64 else torch.float32
    )


def _columns(table: StoredTable) -> int:
    return int(np.prod(table.shape, dtype=np.int64)) * (2 if table.is_complex else 1)


def _write_safetensors(table: StoredTable, out: Path, rows: _Rows) -> None:
    with out.open("wb") as file:
        writer = safetensors_io.Writer(file)
        writer.write(
            [safetensors_io.header({"weight": (table.dtype, (table.max_id, *table.shape))})]
        )
        writer.write(safetensors_io.as_bytes(chunk.contiguous()) for chunk in rows())


def _write_sharded(table: StoredTable, out: Path, rows: _Rows) -> None:
    out.mkdir()
    row_bytes = max(1, table.dtype.itemsize * int(np.prod(table.shape, dtype=np.int64)))
    per_file = max(1, SHARD_BYTES // row_bytes)
    count = max(1, -(-table.max_id // per_file))
    chunks, left, index = rows(), None, {}
    for number in range(count):
        first, last = number * per_file, min((number + 1) * per_file, table.max_id)
        name, tensor = (
            f"model-{number + 1:05d}-of-{count:05d}.safetensors",
            f"weight.rows-{first}-{last}",
        )
        index[tensor] = name
        with (out / name).open("wb") as file:
            writer, missing = safetensors_io.Writer(file), last - first
            writer.write([safetensors_io.header({tensor: (table.dtype, (missing, *table.shape))})])
            while missing:
                chunk = next(chunks) if left is None else left
                part, left = chunk[:missing], chunk[missing:] if len(chunk) > missing else None
                writer.write([safetensors_io.as_bytes(part.contiguous())])
                missing -= len(part)
    document = {"metadata": {"total_size": table.max_id * row_bytes}, "weight_map": index}
    (out / "model.safetensors.index.json").write_text(
        json.dumps(document, indent=1), encoding="utf-8"
    )


def _write_parquet(table: StoredTable, out: Path, rows: _Rows) -> None:
    number = pa.float64() if table.dtype in (torch.float64, torch.complex128) else pa.float32()
    fields = [
        ("id", pa.int64()),
        ("label", pa.string()),
        ("vector", pa.list_(number, _columns(table))),
    ]
    fields = [field for field in fields if field[0] != "label" or table.vocabulary is not None]
    done = 0
    with pq.ParquetWriter(out, pa.schema(fields)) as writer:
        for chunk in rows():
            flat = _flat(chunk)
            ids = range(done, done + len(flat))
            columns: dict[str, Any] = {"id": pa.array(ids, pa.int64())}
            if table.vocabulary is not None:
                columns["label"] = pa.array([table.label(row) for row in ids], pa.string())
            values = pa.array(flat.reshape(-1).numpy(), number)
            columns["vector"] = pa.FixedSizeListArray.from_arrays(values, _columns(table))
            writer.write_table(pa.table(columns, schema=pa.schema(fields)))
            done += len(flat)


def _write_npy(table: StoredTable, out: Path, rows: _Rows) -> None:
    plain = table.dtype not in (torch.bfloat16, torch.complex32)  # which numpy has not
    kind = torch.empty(0, dtype=table.dtype if plain else torch.float32).numpy().dtype
    with out.open("wb") as file:
        header = {
            "descr": np.lib.format.dtype_to_descr(kind),
            "fortran_order": False,
            "shape": (table.max_id, *table.shape),
        }
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in rows():
            file.write(safetensors_io.as_bytes((chunk if plain else chunk.float()).contiguous()))


def _write_word2vec(table: StoredTable, out: Path, rows: _Rows) -> None:
    done = 0
    with out.open("w", encoding="utf-8") as file:
        file.write(f"{table.max_id} {_columns(table)}\n")
        for chunk in rows():
            for row in _flat(chunk).numpy():
                label = table.label(done) if table.vocabulary is not None else str(done)
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
_SUFFIXES = {
    ".safetensors": "safetensors",
    ".parquet": "parquet",
    ".npy": "npy",
    ".txt": "word2vec",
    ".vec": "word2vec",
}


def import_table(
    source: Any,
    out: str | Path,
    table: str = "entity",
    labels: Sequence[str] | None = None,
    key: str | None = None,
) -> Location:
    """Make a run folder with one table from other programs' rows.

    ``OUT/checkpoints/step-0``, and the labels beside it.

    :func:`shardemb.open_store` reads it, and :func:`shardemb.checkpoint.load` takes the table into
    a model. A file of torch (``.pt``, ``.pkl``) is a pickle, which can run code: load it yourself,
    and give the module or the state dict.

    Args:
        source: an array or tensor ``(V, *shape)``; a module or state dict, such as
            torch.nn.Embedding, pykeen.nn.Embedding or one of a PyKEEN model; or a file: ``.npy``,
            ``.safetensors``, ``.parquet`` (columns "vector" and, if there are labels, "label"),
            ``.txt`` or ``.vec`` (word2vec's text).
        out: run folder; must not hold checkpoints.
        table: the table's name.
        labels: of the rows; a file's own by default, for word2vec and Parquet.
        key: the tensor to take, if there are several.

    Returns:
        Where the checkpoint lies.

    Raises:
        ValueError: another kind of file, a malformed one (with its line or row), several tensors,
            labels of another number.
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


@contextmanager
def _rows_of(
    source: Any, key: str | None, scratch: Path
) -> Iterator[tuple[Tensor, list[str] | None]]:
    """Give rows ``(V, *shape)``, in memory or mapped, and the labels that came with them."""
    if isinstance(source, nn.Module):
        source = source.state_dict()
    if isinstance(source, str | Path):
        path = Path(source)
        if path.suffix not in _READERS:
            pickled = (
                " (a pickle, which can run code: load it yourself, and give import_table the module"
                " or state dict)"
            )
            raise InputError(
                f"{path}: got a"
                f" file{pickled if path.suffix in ('.pt', '.pth', '.pkl', '.bin') else ''},"
                f" expected one of {', '.join(_READERS)}"
            )
        with tempfile.TemporaryDirectory(dir=scratch, prefix="import-") as folder:
            yield _READERS[path.suffix](path, key, Path(folder))
        return
    if isinstance(source, Mapping):
        source = _one(
            source, key, "state dict", lambda value: isinstance(value, Tensor) and value.dim() > 1
        )
    rows = torch.as_tensor(source).detach()
    if rows.dim() < 2 or not (rows.is_floating_point() or rows.is_complex()):
        raise InputError(
            f"got {rows.dtype} of shape {tuple(rows.shape)}, expected floating point or complex"
            " rows (V, *shape)"
        )
    yield rows, None


def _one(values: Mapping[str, Any], key: str | None, what: str, fits: Callable[[Any], bool]) -> Any:
    found = [name for name, value in values.items() if fits(value) and key in (None, name)]
    if len(found) != 1:
        raise InputError(f"got a {what} with {sorted(values)}, expected one table: give its key=")
    return values[found[0]]


def _read_npy(path: Path, key: str | None, scratch: Path) -> tuple[Tensor, None]:
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
    return (
        torch.from_numpy(array if array.flags.c_contiguous else np.ascontiguousarray(array)),
        None,
    )


def _read_safetensors(path: Path, key: str | None, scratch: Path) -> tuple[Tensor, None]:
    with path.open("rb") as file:
        try:
            layouts = safetensors_io.layouts(file)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from error
    layout = _one(
        layouts,
        key,
        f"file {path}",
        lambda layout: len(layout.shape) > 1 and layout.dtype.is_floating_point,
    )
    return map_rows(path, layout), None


def _read_parquet(path: Path, key: str | None, scratch: Path) -> tuple[Tensor, list[str] | None]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: got a file that is not Parquet ({error})") from error
    name = key or "vector"
    if name not in file.schema_arrow.names:
        raise InputError(
            f"{path}: got columns {file.schema_arrow.names}, expected {name!r} and, if there are"
            " labels, 'label'"
        )
    labels: list[str] = []
    has_labels = "label" in file.schema_arrow.names

    def rows() -> Iterator[np.ndarray]:
        for batch in file.iter_batches(columns=[name, "label"] if has_labels else [name]):
            column = batch.column(name)
            if column.null_count or not (
                pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type)
            ):
                raise InputError(
                    f"{path}: got column {name!r} of {column.type} with {column.null_count} nulls,"
                    " expected lists"
                )
            if has_labels:
                labels.extend(batch.column("label").to_pylist())
            values = column.flatten().to_numpy(zero_copy_only=False)
            if len(column) and len(values) % len(column):
                raise InputError(
                    f"{path}: got vectors of different lengths in column {name!r}, expected the"
                    " same for all rows"
                )
            yield values.reshape(len(column), -1)

    return _spooled(rows(), scratch, path), labels if has_labels else None


def _read_word2vec(path: Path, key: str | None, scratch: Path) -> tuple[Tensor, list[str]]:
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
                label, *values = line.rstrip("\n").rstrip(" ").split(" ")
                try:
                    row = np.array(values, dtype=np.float32)
                except ValueError as error:
                    raise InputError(
                        f"{path}, line {number}: got a value that is no number ({error})"
                    ) from error
                if len(row) != columns:
                    raise InputError(
                        f"{path}, line {number}: got {len(row)} numbers, expected {columns}"
                    )
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


def _spooled(rows: Iterator[np.ndarray], scratch: Path, path: Path) -> Tensor:
    """Write rows of unknown number to a file, and map it into memory."""
    spool, count, width = scratch / "rows", 0, -1
    kind: Any = np.float32
    with spool.open("wb") as file:
        for batch in rows:
            if width >= 0 and batch.shape[1] != width:
                raise InputError(
                    f"{path}, row {count}: got {batch.shape[1]} numbers, expected {width}, as in"
                    " the rows before"
                )
            if width < 0:
                width, kind = (
                    batch.shape[1],
                    (np.float64 if batch.dtype == np.float64 else np.float32),
                )
            file.write(np.ascontiguousarray(batch, dtype=kind).data)
            count += len(batch)
    if not count or not width:
        raise InputError(
            f"{path}: got {count} rows of {max(width, 0)} numbers, expected at least one"
        )
    return torch.from_numpy(np.memmap(spool, dtype=kind, mode="c", shape=(count, width)))


_READERS: dict[str, Callable[[Path, str | None, Path], tuple[Tensor, list[str] | None]]] = {
    ".npy": _read_npy,
    ".safetensors": _read_safetensors,
    ".parquet": _read_parquet,
    ".txt": _read_word2vec,
    ".vec": _read_word2vec,
}
