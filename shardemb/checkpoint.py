"""Checkpoints: complete or invisible, at any number of ranks, without code in the files.

A checkpoint is a folder ``step-N`` of one safetensors file a rank and ``manifest.json``, which names each file with its
size and sha256, and each tensor with the global rows it holds. It is written as ``step-N.tmp``: files, fsync, a vote of
all ranks, the manifest, fsync, and then the rename that makes it visible. The newest ones are kept.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from shardemb.embedding import Embedding
from shardemb.files import fsync
from shardemb.plan import Spread

FORMAT = "shardemb/2"  # rows of several ranks are in the order of their slots
#: rows that are read at a time where their order changes
_READ_ROWS = 1 << 16
_STEP = re.compile(r"step-(\d{10})")
_FILE = re.compile(r"rank-\d{5}-of-\d{5}\.safetensors")


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, or that is not what its manifest says."""


@dataclass(frozen=True)
class _Piece:
    """What a rank holds of a tensor: rows ``[first, first + len(tensor))`` of ``total``, or, not sharded, all of it.

    A sharded tensor's rows are in the order of their slots (:mod:`shardemb.plan`), others in that of ids.
    """

    tensor: Tensor
    first: int
    total: int
    sharded: bool
    #: whether an earlier rank holds the same rows, and writes them
    copy: bool = False

    def like(self, tensor: Tensor, by_row: bool) -> "_Piece":
        """Return the piece for a tensor that has a value for each of these rows, or one that every rank holds whole."""
        if by_row:
            return _Piece(tensor, self.first, self.total, self.sharded, self.copy)
        return _Piece(tensor, 0, _length(tensor), False)

    def places(self, ids: Tensor) -> Tensor:
        """Return where rows of these ids ``(n,)`` are in the tensor, if they are."""
        return (Spread(self.total).slots(ids) if self.sharded else ids) - self.first


def _length(tensor: Tensor) -> int:
    return len(tensor) if tensor.dim() else 1


def _model_pieces(model: nn.Module) -> tuple[dict[str, _Piece], dict[Tensor, str]]:
    """Name the model's tables, other parameters and buffers; and the parameters by the names of their pieces."""
    pieces: dict[str, _Piece] = {}
    names: dict[Tensor, str] = {}
    inside: set[Tensor] = set()
    for prefix, table in _tables(model):
        for key, tensor in table.stored_rows().items():
            sharded, copy = table.plan.world_size > 1, not table.holds_first_copy
            pieces[prefix + key] = _Piece(tensor, table.plan.first, table.max_id, sharded, copy)
        for parameter in table.parameters():
            names[parameter] = prefix + "weight"
        inside |= {*table.parameters(), *table.buffers()}
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor not in inside:
            pieces[key] = _Piece(tensor.detach(), 0, _length(tensor), False)
            names[tensor] = key
    return pieces, names


def _tables(model: nn.Module) -> list[tuple[str, Embedding]]:
    return [(f"{name}." if name else "", m) for name, m in model.named_modules() if isinstance(m, Embedding)]


def _optimizer_pieces(
    optimizers: Iterable[torch.optim.Optimizer], pieces: Mapping[str, _Piece], names: Mapping[Tensor, str]
) -> dict[str, _Piece]:
    """Name the tensors that optimizers keep for the model's parameters."""
    found = {}
    for number, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state.items():
            for part, tensor in state.items():
                if isinstance(tensor, Tensor):
                    by_row = tensor.dim() > 0 and len(tensor) == len(parameter)
                    name = names[parameter]
                    found[f"optimizer.{number}.{name}.{part}"] = pieces[name].like(tensor, by_row)
    return found


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    state: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Write checkpoint ``folder/step-N``. A collective; on return it is complete, or all ranks have raised.

    Args:
        folder: holds the run's checkpoints, on storage that all ranks see.
        step: number of the checkpoint.
        model: its tables and other parameters.
        optimizers: their state for these parameters.
        state: anything JSON can hold, given back by :func:`load`.
        keep: how many finished checkpoints stay.

    Raises:
        CheckpointError: a rank could not write; the earlier checkpoints are untouched.
        ValueError: a table on a process group of its own.
    """
    optimizers = list(optimizers)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for _, table in _tables(model):
        table.require_default_group("a checkpoint")
    final = folder / f"step-{step:010d}"
    partial = final.with_suffix(".tmp")
    error = _try(_prepare, partial) if rank == 0 else None
    _vote(world_size, None, error, step)
    entry: dict[str, Any] = {}
    pieces, names = _model_pieces(model)
    pieces |= _optimizer_pieces(optimizers, pieces, names)
    error = _try(_write_shard, partial, rank, world_size, pieces, entry)
    entries = _vote(world_size, entry, error, step)
    if rank == 0:
        manifest = {
            "format": FORMAT,
            "step": step,
            "world_size": world_size,
            "state": dict(state or {}),
            "optimizers": _scalars(optimizers, names),
            "files": entries,
        }
        error = _try(_commit, partial, final, manifest, keep)
    _vote(world_size, None, error, step)
    return final


def _try(function: Any, *args: Any) -> str | None:
    try:
        function(*args)
    except Exception as error:  # the other ranks wait to be told
        return f"{type(error).__name__}: {error}"
    return None


def _vote(world_size: int, value: Any, error: str | None, step: int) -> list[Any]:
    told: list[Any] = [(value, error)]
    if world_size > 1:
        told = [None] * world_size
        dist.all_gather_object(told, (value, error))
    bad = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(told) if text is not None]
    if bad:
        raise CheckpointError(f"checkpoint of step {step} was not saved, earlier ones are untouched: {'; '.join(bad)}")
    return [value for value, _ in told]


def _scalars(optimizers: Iterable[torch.optim.Optimizer], names: Mapping[Tensor, str]) -> list[dict[str, Any]]:
    """Return, for each optimizer, its class and what it keeps for a parameter besides tensors (SparseAdam: the step)."""
    return [
        {
            "class": type(optimizer).__name__,
            "state": {
                names[parameter]: {part: value for part, value in state.items() if not isinstance(value, Tensor)}
                for parameter, state in optimizer.state.items()
            },
        }
        for optimizer in optimizers
    ]


def _prepare(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _write_shard(partial: Path, rank: int, world_size: int, pieces: Mapping[str, _Piece], entry: dict[str, Any]) -> None:
    # what every rank holds whole, the first one writes
    mine = {name: piece for name, piece in pieces.items() if rank == 0 or (piece.sharded and not piece.copy)}
    path = partial / f"rank-{rank:05d}-of-{world_size:05d}.safetensors"
    save_file({name: piece.tensor.detach().cpu().contiguous() for name, piece in mine.items()}, path)
    path.chmod(partial.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read
    fsync(path)
    entry |= {"file": path.name, "size": path.stat().st_size, "sha256": _sha256(path), "tensors": {}}
    for name, piece in mine.items():
        shape, dtype = list(piece.tensor.shape), str(piece.tensor.dtype).removeprefix("torch.")
        entry["tensors"][name] = {
            "first": piece.first,
            "total": piece.total,
            "sharded": piece.sharded,
            "shape": shape,
            "dtype": dtype,
        }


def _commit(partial: Path, final: Path, manifest: Mapping[str, Any], keep: int) -> None:
    body = json.dumps(manifest, sort_keys=True)
    document = json.dumps({"manifest": manifest, "sha256": hashlib.sha256(body.encode()).hexdigest()}, indent=1)
    path = partial / "manifest.json"
    path.write_text(document, encoding="utf-8")
    fsync(path)
    fsync(partial)
    if final.exists():
        raise FileExistsError(f"{final} exists: a finished checkpoint is never written again")
    partial.rename(final)
    fsync(final.parent)
    for old in checkpoints(final.parent)[:-keep]:
        gone = old.with_suffix(".tmp")  # a removal that is cut short must not look finished
        old.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _STEP.fullmatch(path.name))


def load(path: Path, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()) -> dict[str, Any]:
    """Load ``folder/step-N`` into tables of any number of ranks; each checks all files, and takes its own rows.

    Args:
        path: of the checkpoint.
        model: with the tables, shapes and dtypes of the one that was saved.
        optimizers: as were saved; their state for this rank's rows is put back.

    Returns:
        The ``state`` that was saved.

    Raises:
        CheckpointError: a missing, damaged or foreign file, a table that is not there or has another shape or dtype,
            other optimizers; nothing of a damaged file is used.
    """
    manifest = _read_manifest(path)
    for entry in manifest["files"]:
        _verify(path, entry)
    optimizers = list(optimizers)
    got, expected = [saved["class"] for saved in manifest["optimizers"]], [type(optimizer).__name__ for optimizer in optimizers]
    if got[: len(expected)] != expected:
        raise CheckpointError(f"{path}: was saved with optimizers {got}, expected {expected}")
    pieces, names = _model_pieces(model)
    in_tables: set[str] = set()
    for prefix, table in _tables(model):
        rows = {key: torch.empty_like(tensor) for key, tensor in table.stored_rows().items()}
        for key, tensor in rows.items():
            _read(path, manifest, prefix + key, pieces[prefix + key].like(tensor, True))
            in_tables.add(prefix + key)
        table.load_stored_rows(rows)
    for name in pieces.keys() - in_tables:
        _read(path, manifest, name, pieces[name])
    for number, optimizer in enumerate(optimizers):
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            optimizer.state[parameter].update(manifest["optimizers"][number]["state"].get(names[parameter], {}))
            _load_state(
                path,
                manifest,
                f"optimizer.{number}.{names[parameter]}.",
                optimizer.state[parameter],
                pieces[names[parameter]],
            )
    return manifest["state"]


def _load_state(path: Path, manifest: Mapping[str, Any], prefix: str, state: dict[str, Any], rows: _Piece) -> None:
    """Fill one parameter's optimizer state with what was saved for it."""
    saved = {
        name: tensor for entry in manifest["files"] for name, tensor in entry["tensors"].items() if name.startswith(prefix)
    }
    for name, tensor in saved.items():
        by_row = bool(tensor["shape"]) and tensor["total"] == rows.total
        shape = [len(rows.tensor), *tensor["shape"][1:]] if by_row else tensor["shape"]
        empty = torch.empty(shape, dtype=getattr(torch, tensor["dtype"]), device=rows.tensor.device)
        _read(path, manifest, name, rows.like(empty, by_row))
        state[name.removeprefix(prefix)] = empty


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / "manifest.json"
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        manifest, digest = document["manifest"], document["sha256"]
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing, so {path} is no complete checkpoint") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: got text that is not a manifest ({error})") from error
    if hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest() != digest:
        raise CheckpointError(f"{file}: was changed after it was written (its sha256 does not match)")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file}: got format {manifest.get('format')!r}, expected {FORMAT!r}")
    return manifest


def _verify(path: Path, entry: Mapping[str, Any]) -> None:
    if not _FILE.fullmatch(entry["file"]):
        raise CheckpointError(f"{path / 'manifest.json'}: got file name {entry['file']!r}, expected rank-R-of-W.safetensors")
    file = path / entry["file"]
    tensors = ", ".join(entry["tensors"])
    if not file.is_file():
        raise CheckpointError(f"{file}: missing; it holds {tensors}")
    if file.stat().st_size != entry["size"]:
        raise CheckpointError(f"{file}: got {file.stat().st_size} bytes, expected {entry['size']}; it holds {tensors}")
    if _sha256(file) != entry["sha256"]:
        raise CheckpointError(f"{file}: is damaged (its sha256 does not match); it holds {tensors}")


def _read(path: Path, manifest: Mapping[str, Any], name: str, piece: _Piece) -> None:
    """Fill a piece in place from every file that holds some of its rows."""
    low, high, done = piece.first, piece.first + _length(piece.tensor), 0
    dtype = str(piece.tensor.dtype).removeprefix("torch.")
    for entry in manifest["files"]:
        saved = entry["tensors"].get(name)
        if saved is None:
            continue
        got = (saved["total"], *saved["shape"][1:], saved["dtype"])
        expected = (piece.total, *piece.tensor.shape[1:], dtype)
        if got != expected:
            raise CheckpointError(f"{path}: {name!r} has rows, columns and dtype {got}, expected {expected}")
        with safe_open(path / entry["file"], framework="pt") as file:
            if not piece.tensor.dim():
                piece.tensor.copy_(file.get_tensor(name))
                done += 1
            elif saved["sharded"] == piece.sharded:
                start, stop = max(low, saved["first"]), min(high, saved["first"] + saved["shape"][0])
                if start < stop:
                    piece.tensor[start - low : stop - low] = file.get_slice(name)[
                        start - saved["first"] : stop - saved["first"]
                    ]
                    done += stop - start
            else:
                done += _read_in_another_order(file.get_slice(name), saved, piece)
    if done != high - low:
        raise CheckpointError(f"{path}: {name!r} has {done} of the rows {low} to {high}; is it a checkpoint of this model?")


def _read_in_another_order(rows: Any, saved: Mapping[str, Any], piece: _Piece) -> int:
    """Fill a piece from rows that were saved by slot, where it is by id, or the other way; return how many there were."""
    done = 0
    for start in range(0, saved["shape"][0], _READ_ROWS):
        stop = min(start + _READ_ROWS, saved["shape"][0])
        ids = torch.arange(saved["first"] + start, saved["first"] + stop)
        if saved["sharded"]:
            ids = Spread(saved["total"]).ids(ids)
        places = piece.places(ids)
        here = ((places >= 0) & (places < len(piece.tensor))).nonzero().squeeze(1)
        if len(here):
            values = rows[start:stop][here]
            piece.tensor.index_copy_(0, places[here].to(piece.tensor.device), values.to(piece.tensor.device))
            done += len(here)
    return done
