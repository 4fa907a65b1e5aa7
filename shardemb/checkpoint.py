"""Checkpoints: complete or invisible, at any number of ranks, without code in the files.

A checkpoint is a folder ``step-N`` of safetensors files of at most 256 MiB, and ``manifest.json``, which names each file with
its size and sha256, and each tensor in it with the global rows that it holds. It is written as ``step-N.tmp``: files, fsync, a
vote of all ranks, the manifest, fsync, and then the rename that makes it visible. Where a folder cannot be renamed at once, in
an object store, the manifest comes last, and there is no checkpoint without one. The newest ones are kept.
"""

import base64
import datetime
import hashlib
import json
import os
import random
import secrets
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardemb import collectives, faults, native, tensorfile
from shardemb.embedding import Embedding
from shardemb.manifest import (
    FORMAT,
    MANIFEST,
    CheckpointError,
    Manifest,
    Part,
    Verify,
    checkpoints,
    dtype_name,
    finished,
    verify,
)
from shardemb.metrics import free_bytes
from shardemb.plan import Spread
from shardemb.storage import Folder, Location, child, folder_at
from shardemb.tensorfile import Layout
from shardemb.transforms import to_json

__all__ = ["AsyncSaver", "CheckpointError", "Manifest", "check_room", "checkpoints", "load", "save", "verify"]

#: bytes of tensors in a file, at most (unless a single row has more): enough files to hash several at a time
FILE_BYTES = 1 << 28
#: rows that are read at a time where their order changes
_READ_ROWS = 1 << 16

Nonfinite = Literal["error", "warn", "ignore"]


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
    #: the table that it belongs to, for errors
    table: str = ""

    def like(self, tensor: Tensor, by_row: bool) -> "_Piece":
        """Return the piece for a tensor that has a value for each of these rows, or one that every rank holds whole."""
        if by_row:
            return replace(self, tensor=tensor)
        return _Piece(tensor, 0, _length(tensor), False, table=self.table)

    def rows(self, start: int, stop: int) -> "_Piece":
        """Return a part of it."""
        return replace(self, tensor=self.tensor[start:stop], first=self.first + start)

    def places(self, ids: Tensor) -> Tensor:
        """Return where rows of these ids ``(n,)`` are in the tensor, if they are."""
        return (Spread(self.total).slots(ids) if self.sharded else ids) - self.first

    def ids(self, places: Tensor) -> Tensor:
        """Return the ids of rows of the tensor."""
        return Spread(self.total).ids(places + self.first) if self.sharded else places + self.first

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.itemsize


def _length(tensor: Tensor) -> int:
    return len(tensor) if tensor.dim() else 1


def _tables(model: nn.Module) -> dict[str, Embedding]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Embedding)}


def _dotted(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _model_pieces(model: nn.Module) -> tuple[dict[str, _Piece], dict[Tensor, str]]:
    """Name the model's tables, other parameters and buffers; and the parameters by the names of their pieces."""
    pieces: dict[str, _Piece] = {}
    names: dict[Tensor, str] = {}
    inside: set[Tensor] = set()
    for prefix, table in _tables(model).items():
        for key, tensor in table.stored_rows().items():
            sharded, copy = table.plan.world_size > 1, not table.holds_first_copy
            pieces[_dotted(prefix, key)] = _Piece(tensor, table.plan.first, table.max_id, sharded, copy, table.name)
        for parameter in table.parameters():
            names[parameter] = _dotted(prefix, "weight")
        inside |= {*table.parameters(), *table.buffers()}
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor not in inside:
            pieces[key] = _Piece(tensor.detach(), 0, _length(tensor), False, table=key)
            names[tensor] = key
    return pieces, names


def _optimizer_pieces(
    optimizers: Iterable[torch.optim.Optimizer], pieces: Mapping[str, _Piece], names: Mapping[Tensor, str]
) -> dict[str, _Piece]:
    """Name the tensors that optimizers keep for the model's parameters."""
    found = {}
    for number, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state.items():
            _check_known(optimizer, parameter, names)
            for part, tensor in state.items():
                if isinstance(tensor, Tensor):
                    by_row = tensor.dim() > 0 and len(tensor) == len(parameter)
                    name = names[parameter]
                    found[f"optimizer.{number}.{name}.{part}"] = pieces[name].like(tensor, by_row)
    return found


def _check_known(optimizer: torch.optim.Optimizer, parameter: Tensor, names: Mapping[Tensor, str]) -> None:
    if parameter not in names:
        raise ValueError(
            f"{type(optimizer).__name__} has a parameter of shape {tuple(parameter.shape)} that is not the model's: give the "
            f"model that holds all parameters of the optimizers"
        )


# ---------------------------------------------------------------------------------------------------------------- saving


@dataclass
class _Snapshot:
    """What one rank writes."""

    step: int
    keep: int
    #: of this rank's share
    pieces: dict[str, _Piece]
    #: what the manifest says besides the files
    manifest: dict[str, Any]
    #: of this rank alone
    rng: dict[str, Any]
    nonfinite: Nonfinite
    rank: int
    world_size: int
    #: of the votes
    group: Any = None
    #: file, size, sha256, tensors: filled in while writing
    files: list[dict[str, Any]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces.values())


def save(
    folder: Location,
    step: int,
    model: nn.Module,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    state: Mapping[str, Any] | None = None,
    keep: int = 2,
    *,
    schedulers: Iterable[Any] = (),
    seed: int | None = None,
    fingerprints: Mapping[str, str] | None = None,
    nonfinite: Nonfinite = "error",
) -> Location:
    """Write checkpoint ``folder/step-N``. A collective; on return it is complete, or all ranks have raised.

    Needs no memory besides the tables', up to some megabytes.

    Args:
        folder: holds the run's checkpoints, on storage that all ranks see: a path, or a URI such as ``s3://bucket/run``.
        step: number of the checkpoint.
        model: its tables and other parameters.
        optimizers: their state for these parameters, and their hyper-parameters.
        state: anything JSON can hold, such as the position in the data; given back by :func:`load`.
        keep: how many finished checkpoints stay.
        schedulers: of learning rates; anything with a ``state_dict`` that JSON can hold.
        seed: of the run, for the manifest.
        fingerprints: hashes of what the rows depend on, such as {"vocabulary": ...}, which :func:`load` compares.
        nonfinite: what to do if a table holds NaN or infinite values: "error", "warn" or "ignore".

    Returns:
        Where it lies.

    Raises:
        CheckpointError: a rank could not write, or a table holds NaN or infinite values; the earlier checkpoints are untouched.
        ValueError: a table on a process group of its own; a step, ``keep`` or ``nonfinite`` out of range.
    """
    snapshot = _snapshot(step, model, list(optimizers), state, keep, list(schedulers), seed, fingerprints, nonfinite)
    return _write(folder, snapshot)


def _snapshot(
    step: int,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    state: Mapping[str, Any] | None,
    keep: int,
    schedulers: Sequence[Any],
    seed: int | None,
    fingerprints: Mapping[str, str] | None,
    nonfinite: Nonfinite,
) -> _Snapshot:
    if step < 0 or keep < 1 or nonfinite not in ("error", "warn", "ignore"):
        raise ValueError(
            f"got step={step}, keep={keep}, nonfinite={nonfinite!r}, expected step at least 0, keep at least 1 and nonfinite "
            f"'error', 'warn' or 'ignore'"
        )
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    tables = _tables(model)
    for table in tables.values():
        table.require_default_group("a checkpoint")
    pieces, names = _model_pieces(model)
    pieces |= _optimizer_pieces(optimizers, pieces, names)
    # what every rank holds whole, the first one writes
    mine = {name: piece for name, piece in pieces.items() if rank == 0 or (piece.sharded and not piece.copy)}
    manifest = _manifest(
        step, world_size, seed, fingerprints or {}, state or {}, {prefix: _describe(table) for prefix, table in tables.items()}
    )
    manifest["optimizers"] = [_scalars(optimizer, names) for optimizer in optimizers]
    manifest["schedulers"] = [{"class": type(s).__name__, "state": s.state_dict()} for s in schedulers]
    return _Snapshot(step, keep, mine, manifest, _rng_state(), nonfinite, rank, world_size)


def _manifest(
    step: int,
    world_size: int,
    seed: int | None,
    fingerprints: Mapping[str, str],
    state: Mapping[str, Any],
    tables: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "step": step,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "world_size": world_size,
        "seed": seed,
        "fingerprints": dict(fingerprints),
        "state": dict(state),
        "tables": dict(tables),
        "optimizers": [],
        "schedulers": [],
    }


def _describe(table: Embedding) -> dict[str, Any]:
    """Say what is needed to read the table's rows as its forward gives them, and what trained them."""
    return {
        "name": table.name,
        "max_id": table.max_id,
        "shape": list(table.shape),
        "complex": table.is_complex,
        "normalizer": to_json(table.normalizer),
        "constrainer": to_json(table.constrainer),
        "gradient": table.gradient,
        "optimizer": table.fused_hyperparameters(),
        "stored": sorted(table.stored_rows()),
    }


def _scalars(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Any]:
    """Return an optimizer's class, hyper-parameters, and what it keeps besides tensors (SparseAdam: the step)."""
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        _check_known(optimizer, parameter, names)

    def plain(value: Any) -> Any:
        return value.item() if isinstance(value, Tensor) else value

    return {
        "class": type(optimizer).__name__,
        "groups": [
            {key: [names[p] for p in value] if key == "params" else plain(value) for key, value in group.items()}
            for group in optimizer.param_groups
        ],
        "state": {
            names[parameter]: {part: value for part, value in state.items() if not isinstance(value, Tensor)}
            for parameter, state in optimizer.state.items()
        },
    }


def _rng_state() -> dict[str, Any]:
    """Return what the random generators of torch, Python and numpy will go on with, for JSON."""

    def text(state: Tensor) -> str:
        return base64.b64encode(state.numpy().tobytes()).decode()

    state = np.random.get_state(legacy=False)
    assert isinstance(state, dict)
    words = {**state, "state": {**state["state"], "key": state["state"]["key"].tolist()}}
    version, internal, gauss = random.getstate()
    cuda = [text(s) for s in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else []
    python = [version, list(internal), gauss]
    return {"torch": text(torch.get_rng_state()), "cuda": cuda, "python": python, "numpy": words}


def _set_rng_state(saved: Mapping[str, Any]) -> None:
    def state(text: str) -> Tensor:
        return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.uint8).copy())

    torch.set_rng_state(state(saved["torch"]))
    if len(saved["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state(text) for text in saved["cuda"]])
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    words = saved["numpy"]
    key = np.array(words["state"]["key"], dtype=np.uint32)
    np.random.set_state({**words, "state": {**words["state"], "key": key}})


def _write(folder: Location, snapshot: _Snapshot) -> Location:
    """Write what all ranks have snapped. A collective."""
    name = f"step-{snapshot.step:010d}"
    root = folder_at(folder)
    target = name + ".tmp" if root.renames else name
    # where nothing can be renamed, a writer of an attempt that was given up may still be at work: not in these files
    mark = "" if root.renames else f"-{secrets.token_hex(4)}"

    def commit() -> None:
        manifest = snapshot.manifest | {
            "files": [entry for files, _ in shares for entry in files],
            "rng": [rng for _, rng in shares],
        }
        _commit(root, name, target, manifest, snapshot.keep)

    told = _vote(snapshot, (snapshot.nbytes, snapshot.step), _try(json.dumps, snapshot.manifest))
    if len({step for _, step in told}) > 1:
        raise CheckpointError(f"ranks save different steps: got {[step for _, step in told]} of ranks 0, 1, ..., expected one")
    needed = sum(nbytes for nbytes, _ in told)
    try:
        mark = _vote(snapshot, mark, _try(_prepare, root, name, target, needed) if snapshot.rank == 0 else None)[0]
        error = _try(_write_files, root.child(target), mark, snapshot)
        shares = _vote(snapshot, (snapshot.files, snapshot.rng), error)
        _vote(snapshot, None, _try(commit) if snapshot.rank == 0 else None)
    except CheckpointError:
        if snapshot.rank == 0 and root.child(name).size(MANIFEST) is None:
            _try(root.remove, target)  # it would keep the room that the next one needs
        raise
    return child(folder, name)


def _try(function: Callable[..., Any], *args: Any) -> str | None:
    try:
        function(*args)
    except Exception as error:  # the other ranks wait to be told
        return f"{type(error).__name__}: {error}"
    return None


def _vote(snapshot: _Snapshot, value: Any, error: str | None) -> list[Any]:
    told = _gather((value, error), snapshot.group, snapshot.world_size)
    bad = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(told) if text is not None]
    if bad:
        raise CheckpointError(f"checkpoint of step {snapshot.step} was not saved, earlier ones are untouched: {'; '.join(bad)}")
    return [value for value, _ in told]


def _gather(value: Any, group: Any, world_size: int) -> list[Any]:
    return collectives.gather(value, group=group, operation="a checkpoint's vote") if world_size > 1 else [value]


def _prepare(root: Folder, name: str, target: str, needed: int) -> None:
    if root.child(name).size(MANIFEST) is not None:
        raise FileExistsError(f"{name} exists: a finished checkpoint is never written again")
    root.remove(target)
    root.child(target).make()
    check_room(root, needed)


def check_room(root: Folder, needed: int) -> None:
    """Raise OSError if a folder's disk has less room than these bytes, as far as can be known."""
    free = root.free_bytes()
    if free is not None and free < needed:
        raise OSError(f"the disk is too full: got {free:,} free bytes, expected {needed:,}: make room, or keep fewer")


def require_room(folder: Location, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = (), keep: int = 2) -> None:
    """Refuse, before training, a folder that cannot be written, or whose disk is too small for its checkpoints. A collective.

    The state that an optimizer will make is counted for those of :mod:`shardemb.optim`, and as it is now for others.

    Raises:
        CheckpointError: naming the folder, what is needed and what is free; on all ranks.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    pieces, names = _model_pieces(model)
    pieces |= _optimizer_pieces(optimizers, pieces, names)
    mine = sum(piece.nbytes for piece in pieces.values() if rank == 0 or (piece.sharded and not piece.copy))
    for optimizer in optimizers:
        for parameter in (p for group in optimizer.param_groups for p in group["params"] if p not in optimizer.state):
            for per_row in getattr(optimizer, "state_per_row", {}).values():
                mine += 4 * (len(parameter) if per_row else parameter.numel())
    total = sum(_gather(mine, None, world_size))

    def check() -> None:
        root = folder_at(folder)
        root.make()
        root.remove(".probe")
        with root.create(".probe") as file:
            file.write(b"can this folder be written?")
        root.remove(".probe")
        check_room(root, total * max(1, keep + 1 - len(finished(root))))

    error = _gather(_try(check) if rank == 0 else None, None, world_size)[0]
    if error is not None:
        raise CheckpointError(f"{folder}: cannot hold the checkpoints: {error}")


def _write_files(inside: Folder, mark: str, snapshot: _Snapshot) -> None:
    for number, pieces in enumerate(_shared_out(snapshot.pieces)):
        for name, piece in pieces.items():
            _check_finite(name, piece, snapshot)
        file_name = f"rank-{snapshot.rank:05d}-of-{snapshot.world_size:05d}-{number:05d}{mark}.safetensors"
        with inside.create(file_name) as file:
            size, digest = tensorfile.write(file, {name: piece.tensor for name, piece in pieces.items()})
        tensors = {
            name: {
                "first": piece.first,
                "total": piece.total,
                "sharded": piece.sharded,
                "shape": list(piece.tensor.shape),
                "dtype": dtype_name(piece.tensor.dtype),
            }
            for name, piece in pieces.items()
        }
        snapshot.files.append({"file": file_name, "size": size, "sha256": digest, "tensors": tensors})


def _shared_out(pieces: Mapping[str, _Piece]) -> Iterator[dict[str, _Piece]]:
    """Share pieces out to files of FILE_BYTES, cut between rows where they do not fit."""
    file: dict[str, _Piece] = {}
    room = FILE_BYTES
    for name, piece in pieces.items():
        done, length = 0, _length(piece.tensor)
        while done < length:
            row = -(-piece.nbytes // length)
            stop = min(length, done + room // max(1, row))
            if stop == done and file:
                yield file
                file, room = {}, FILE_BYTES
                continue
            stop = max(stop, done + 1)
            part = piece if (done, stop) == (0, length) else piece.rows(done, stop)
            file[name], room, done = part, room - part.nbytes, stop
            if done < length:
                yield file
                file, room = {}, FILE_BYTES
    if file:
        yield file


def _check_finite(name: str, piece: _Piece, snapshot: _Snapshot) -> None:
    """Look for NaN and infinite values, at a tenth of the cost of hashing."""
    tensor = torch.view_as_real(piece.tensor) if piece.tensor.is_complex() else piece.tensor
    if snapshot.nonfinite == "ignore" or not tensor.is_floating_point():
        return
    bad: list[int] = []
    start = 0
    for chunk in tensorfile.row_chunks(tensor):
        if chunk.numel() and not torch.isfinite(torch.stack(torch.aminmax(chunk))).all():
            rows = (~torch.isfinite(chunk)).reshape(len(chunk), -1).any(1).nonzero().squeeze(1)
            bad += piece.ids(rows + start).tolist()
        start += len(chunk)
    if bad:
        few = ", ".join(str(row) for row in sorted(bad)[:5]) + (", ..." if len(bad) > 5 else "")
        text = (
            f"table {piece.table!r}, rank {snapshot.rank}: {name!r} has NaN or infinite values in {len(bad)} rows: {few}: "
            f"go on from an earlier checkpoint with a lower learning rate, or save with nonfinite='ignore'"
        )
        if snapshot.nonfinite == "error":
            raise FloatingPointError(text)
        warnings.warn(text, stacklevel=2)


def _commit(root: Folder, name: str, target: str, manifest: Mapping[str, Any], keep: int) -> None:
    body = json.dumps(manifest, sort_keys=True)
    document = json.dumps({"manifest": manifest, "sha256": hashlib.sha256(body.encode()).hexdigest()}, indent=1)
    with root.child(target).create(MANIFEST) as file:
        file.write(document.encode())
    if target != name:
        root.rename(target, name)
    for old in finished(root)[:-keep]:
        _retire(root, old)


def _retire(root: Folder, name: str) -> None:
    """Remove a checkpoint; a removal that is cut short must not look finished."""
    if root.renames:
        gone = f"{name}.tmp"
        root.remove(gone)
        root.rename(name, gone)
        name = gone
    else:
        root.child(name).remove(MANIFEST)
    root.remove(name)


def save_rows(folder: Location, step: int, tables: Mapping[str, Tensor], fingerprints: Mapping[str, str]) -> Location:
    """Write a checkpoint of rows ``(V, *shape)`` that are no model's, by the names of their tables; they may be mapped files.

    Raises:
        CheckpointError: as :func:`save`.
    """
    pieces, told = {}, {}
    for name, rows in tables.items():
        stored = torch.view_as_real(rows) if rows.is_complex() else rows
        pieces[_dotted(name, "weight")] = _Piece(stored.reshape(len(rows), -1), 0, len(rows), False, table=name)
        told[name] = {"name": name, "max_id": len(rows), "shape": list(rows.shape[1:]), "complex": rows.is_complex()}
        told[name] |= {"normalizer": None, "constrainer": None, "gradient": None, "optimizer": None, "stored": ["weight"]}
    manifest = _manifest(step, 1, None, fingerprints, {}, told)
    return _write(folder, _Snapshot(step, 1, pieces, manifest, {}, "ignore", 0, 1))


class AsyncSaver:
    """Saves in the background: :meth:`save` copies this rank's rows, and a thread writes the copy.

    The copy takes as much memory again as the rank's rows and optimizer state, kept from one save to the next; where that is
    not free, the save is made in the foreground, with a warning. The constructor is a collective: the threads of the ranks vote
    in a process group of their own.

    Args:
        folder: as in :func:`save`.
        keep: as in :func:`save`.
    """

    def __init__(self, folder: Location, keep: int = 2) -> None:
        self._folder, self._keep = folder, keep
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if several else None
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizers: Iterable[torch.optim.Optimizer] = (),
        state: Mapping[str, Any] | None = None,
        *,
        schedulers: Iterable[Any] = (),
        seed: int | None = None,
        fingerprints: Mapping[str, str] | None = None,
        nonfinite: Nonfinite = "error",
    ) -> None:
        """Copy the rows and return; the arguments are those of :func:`save`. A collective.

        Waits for the save before, if it is still under way.

        Raises:
            CheckpointError: the save before failed, on all ranks.
        """
        self.wait()
        snapshot = _snapshot(step, model, list(optimizers), state, self._keep, list(schedulers), seed, fingerprints, nonfinite)
        snapshot.group = self._group
        free = free_bytes(torch.device("cpu"))
        more = snapshot.nbytes - sum(buffer.numel() * buffer.itemsize for buffer in self._buffers.values())
        if free is not None and more > free:
            warnings.warn(
                f"checkpoint of step {step}, rank {snapshot.rank}: a copy of this rank's rows needs {more:,} bytes more, "
                f"{free:,} are free: saving in the foreground",
                stacklevel=2,
            )
            self._run(snapshot)
            self.wait()
            return
        snapshot.pieces = {
            name: replace(piece, tensor=self._copy(name, piece.tensor)) for name, piece in snapshot.pieces.items()
        }
        self._thread = threading.Thread(target=self._run, args=(snapshot,), name="shardemb-saver")
        self._thread.start()

    def close(self) -> None:
        """Wait for the last save, keep its failure to itself (the job may have failed already), and forget all."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._buffers.clear()
        if self._group is not None:
            faults.forget(self._group)

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            # scalars and small ones too: the writer must not see what the next step makes of them
            shape = (len(tensor), tensor[0].numel() if len(tensor) else 0) if tensor.dim() else (1, 1)
            buffer = native.empty(shape, tensor.dtype, torch.device("cpu")).reshape(tensor.shape)
            self._buffers[name] = buffer
        return buffer.copy_(tensor)

    def _run(self, snapshot: _Snapshot) -> None:
        if threading.current_thread() is self._thread:
            with suppress(OSError):  # training comes first; a thread has a priority of its own on Linux
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        try:
            _write(self._folder, snapshot)
        except BaseException as error:
            self._failure = error

    def check(self) -> None:
        """Raise CheckpointError if the last save has failed; call it in each step. Costs nothing."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def wait(self) -> None:
        """Return when the last save is complete; raises CheckpointError if it failed, on all ranks."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()


# --------------------------------------------------------------------------------------------------------------- loading


def load(
    path: Location,
    model: nn.Module,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    *,
    schedulers: Iterable[Any] = (),
    tables: Iterable[str] | Mapping[str, str] | None = None,
    optimizer_state: bool = True,
    cast: bool = False,
    grow: bool = False,
    fingerprints: Mapping[str, str] | None = None,
    verify: Verify = "sha256",
) -> dict[str, Any]:
    """Load ``folder/step-N`` into tables of any number of ranks. A collective.

    The ranks share the work of checking the files; then each reads its own rows, straight into the tables. Nothing of the model
    changes unless all of it is there and undamaged. With optimizers or schedulers, which is how training goes on, the random
    generators go on too, if the number of ranks is that of the checkpoint.

    Args:
        path: of the checkpoint.
        model: with the tables, shapes and dtypes of the one that was saved.
        optimizers: as were saved; their hyper-parameters and their state for this rank's rows are put back. None for the
            parameters alone.
        schedulers: as were saved; their state is put back.
        tables: load these tables of the model alone, by their names in the model (an Embedding on its own is ""); or a mapping
            of these to names in the checkpoint.
        optimizer_state: False loads rows alone, also without the state of a fused optimizer.
        cast: let the rows be converted into the tables' dtype.
        grow: let tables have more rows than were saved: ids keep their rows, new ones stay as they are initialized.
        fingerprints: must be equal to those of the same names that were saved.
        verify: "sha256" checks the hash of every file that is read; "size" only its size.

    Returns:
        The ``state`` that was saved.

    Raises:
        CheckpointError: a missing, damaged or foreign file; a table that is not there or has another shape or dtype; other
            optimizers, schedulers or fingerprints. On all ranks.
    """
    job = _Load(path, model, list(optimizers), list(schedulers), tables, optimizer_state, cast, grow)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    for stage in (lambda: job.plan(fingerprints or {}), lambda: job.check(verify), job.read):
        error: str | None = None
        try:
            stage()
        except CheckpointError as failure:
            error = str(failure)
        except (OSError, EOFError) as failure:
            error = f"{path}: {type(failure).__name__}: {failure}"
        told = _gather((error, job.digest), None, world_size)
        bad = [text for text, _ in told if text is not None]
        if bad:
            raise CheckpointError(bad[0])
        if len({digest for _, digest in told}) > 1:
            raise CheckpointError(f"{path}: ranks see different checkpoints there, by the sha256 of the manifest: {told}")
    return job.finish()


class _Load:
    """One rank's share of a load."""

    def __init__(
        self,
        path: Location,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        schedulers: list[Any],
        tables: Iterable[str] | Mapping[str, str] | None,
        optimizer_state: bool,
        cast: bool,
        grow: bool,
    ) -> None:
        self.path, self.model, self.optimizers, self.schedulers = path, model, optimizers, schedulers
        self.tables = tables if tables is None or isinstance(tables, Mapping) else {name: name for name in tables}
        self.optimizer_state, self.cast, self.grow = optimizer_state, cast, grow
        self.digest = ""
        #: name in the checkpoint, and where its rows go
        self.wanted: list[tuple[str, _Piece]] = []
        #: of each table that is loaded
        self.rows: dict[str, dict[str, Tensor]] = {}
        #: what an optimizer shall keep for a parameter
        self.states: list[tuple[torch.optim.Optimizer, Tensor, dict[str, Any]]] = []

    def plan(self, fingerprints: Mapping[str, str]) -> None:
        """Find out what goes where, and whether it fits; nothing is changed."""
        here = _tables(self.model)
        try:
            self.manifest = Manifest(self.path)
        except CheckpointError as error:
            wanted = ", ".join(repr(table.name) for table in here.values())
            raise CheckpointError(f"{error}; wanted for {f'table {wanted}' if wanted else 'a model without tables'}") from error
        self.digest, values = self.manifest.digest, self.manifest.values
        for name, expected in fingerprints.items():
            got = values["fingerprints"].get(name)
            if got is not None and got != expected:
                raise CheckpointError(f"{self.path}: got {name} of fingerprint {got}, expected {expected}: it is of other data")
        pieces, names = _model_pieces(self.model)
        if self.tables is not None:
            for mine, saved in self.tables.items():
                if mine not in here or saved not in values["tables"]:
                    raise CheckpointError(
                        f"{self.path}: got table {mine!r} to load from {saved!r}, expected one of {sorted(here)} from one of "
                        f"{sorted(values['tables'])}"
                    )
        chosen = {name: name for name in here} if self.tables is None else self.tables
        in_tables: set[str] = set()
        for mine, table in here.items():
            stored = table.stored_rows()
            in_tables |= {_dotted(mine, key) for key in stored}
            if mine not in chosen:
                continue
            saved = chosen[mine]
            self._check_fused(mine, table, set(stored), saved)
            self.rows[mine] = {key: stored[key] for key in stored if key == "weight" or self.optimizer_state}
            for key, tensor in self.rows[mine].items():
                self._want(_dotted(saved, key), pieces[_dotted(mine, key)].like(tensor, True), self.grow)
        if self.tables is None:
            rest = pieces.keys() - in_tables
            for name in sorted(rest):
                self._want(name, pieces[name], False)
            fused = {_dotted(t, key) for t, told in values["tables"].items() for key in told["stored"]}
            unused = [n for n in self.manifest.parts if not n.startswith("optimizer.") and n not in rest | in_tables | fused]
            unused += [_dotted(t, "weight") for t in values["tables"] if t not in here]
            if unused:
                raise CheckpointError(
                    f"{self.path}: holds {unused}, which the model has not: name the tables to load, tables={sorted(here)}"
                )
        if self.optimizer_state and self.optimizers:
            self._plan_optimizers(pieces, names, chosen)
        saved_with, given = [s["class"] for s in values["schedulers"]], [type(s).__name__ for s in self.schedulers]
        if self.schedulers and saved_with != given:
            raise CheckpointError(f"{self.path}: was saved with schedulers {saved_with}, expected {given}")
        for name in {name for name, _ in self.wanted}:
            self.manifest.check_covered(name)

    def _check_fused(self, mine: str, table: Embedding, stored: set[str], saved: str) -> None:
        told = self.manifest.values["tables"].get(saved)
        if told is None:
            raise CheckpointError(f"{self.path}: has no table {saved!r}, expected by the model; it has {self._described()}")
        got, expected = told["optimizer"], table.fused_hyperparameters()
        same = (got and got["name"]) == (expected and expected["name"])
        if self.optimizer_state and not same:
            raise CheckpointError(
                f"{self.path}: table {table.name!r} was saved with the fused optimizer {got}, expected {expected}: load the "
                f"rows alone with optimizer_state=False"
            )

    def _described(self) -> str:
        return ", ".join(f"{name!r} ({told['name']})" for name, told in self.manifest.values["tables"].items()) or "none"

    def _plan_optimizers(self, pieces: Mapping[str, _Piece], names: Mapping[Tensor, str], chosen: Mapping[str, str]) -> None:
        saved = self.manifest.values["optimizers"]
        got, expected = [o["class"] for o in saved], [type(optimizer).__name__ for optimizer in self.optimizers]
        if got != expected:
            raise CheckpointError(f"{self.path}: was saved with optimizers {got}, expected {expected}")
        renamed = {_dotted(mine, "weight"): _dotted(other, "weight") for mine, other in chosen.items()}
        for number, (optimizer, told) in enumerate(zip(self.optimizers, saved, strict=True)):
            mine = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
            theirs = [group["params"] for group in told["groups"]]
            if self.tables is None and mine != theirs:
                raise CheckpointError(
                    f"{self.path}: optimizer {number} was saved with the parameters {theirs}, expected {mine}"
                )
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                name = names[parameter]
                if self.tables is not None and name not in renamed:
                    continue
                other = renamed.get(name, name)
                new = dict(told["state"].get(other, {}))
                prefix = f"optimizer.{number}.{other}."
                for key in [key for key in self.manifest.parts if key.startswith(prefix)]:
                    part = key.removeprefix(prefix)
                    rows, first = pieces[name], self.manifest.parts[key][0]
                    by_row = bool(first.shape) and first.total == self._rows_saved(other)
                    old = optimizer.state[parameter].get(part) if parameter in optimizer.state else None
                    shape = [len(rows.tensor), *first.shape[1:]] if by_row else list(first.shape)
                    dtype = getattr(torch, first.dtype)
                    if not isinstance(old, Tensor) or list(old.shape) != shape or old.dtype != dtype:
                        make = torch.zeros if self.grow else torch.empty
                        old = make(shape, dtype=dtype, device=rows.tensor.device)
                    new[part] = old
                    self._want(key, rows.like(old, by_row), self.grow and by_row)
                self.states.append((optimizer, parameter, new))

    def _rows_saved(self, name: str) -> int:
        return self.manifest.parts[name][0].total if name in self.manifest.parts else -1

    def _want(self, name: str, piece: _Piece, may_grow: bool) -> None:
        parts = self.manifest.parts.get(name)
        if parts is None:
            if not piece.total:
                return
            raise CheckpointError(f"{self.path}: has no {name!r}; is it a checkpoint of this model?")
        for part in parts:
            got = (part.total, *part.shape[1:], part.dtype)
            expected = (piece.total, *piece.tensor.shape[1:], dtype_name(piece.tensor.dtype))
            if got == expected:
                continue
            hint = ""
            if got[:-1] == expected[:-1] or (may_grow and got[1:-1] == expected[1:-1]):
                hint = "; cast=True converts" if got[-1] != expected[-1] else ""
            if got[1:-1] == expected[1:-1] and got[0] < expected[0] and not may_grow:
                hint += "; grow=True lets a table have more rows than were saved"
            fits = (got[0] == expected[0] or (may_grow and got[0] < expected[0])) and got[1:-1] == expected[1:-1]
            if not fits or (got[-1] != expected[-1] and not self.cast):
                raise CheckpointError(
                    f"{self.path}: table {piece.table!r}: {name!r} has rows, columns and dtype {got}, expected {expected}{hint}"
                )
        self.wanted.append((name, piece))

    def check(self, verify: Verify) -> None:
        """Check this rank's share of the files that any rank reads."""
        files = [
            file for file in self.manifest.files if any(file == p.file for n, _ in self.wanted for p in self.manifest.parts[n])
        ]
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        mine = files[rank * len(files) // world_size : (rank + 1) * len(files) // world_size]
        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:  # hashing releases the interpreter
            list(pool.map(lambda file: self.manifest.check_file(file, verify), mine))

    def read(self) -> None:
        """Read the rows of this rank."""
        tasks: dict[str, list[tuple[str, Part, _Piece]]] = {}
        for name, piece in self.wanted:
            for part in self.manifest.parts[name]:
                if not _apart(part, piece):
                    tasks.setdefault(part.file, []).append((name, part, piece))

        def read(file: str) -> None:
            with self.manifest.folder.open(file) as opened:
                layouts = self.manifest.layouts(file, opened)
                for name, part, piece in tasks[file]:
                    _read(opened, layouts[name], part, piece)

        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
            list(pool.map(read, tasks))

    def finish(self) -> dict[str, Any]:
        """Let tables and optimizers know what was read."""
        tables, values = _tables(self.model), self.manifest.values
        for name, rows in self.rows.items():
            tables[name].load_stored_rows(rows)
        for optimizer, parameter, new in self.states:
            optimizer.state[parameter].update(new)
        if self.tables is None:
            for name in self.rows:
                fused = values["tables"][name]["optimizer"]
                if fused is not None and self.optimizer_state:
                    tables[name].set_learning_rate(fused["lr"])
            if self.optimizer_state:
                for optimizer, told in zip(self.optimizers, values["optimizers"], strict=False):
                    for group, saved in zip(optimizer.param_groups, told["groups"], strict=True):
                        _put_back(group, saved)
        for scheduler, told in zip(self.schedulers, values["schedulers"], strict=False):
            scheduler.load_state_dict(told["state"])
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if (self.optimizers or self.schedulers) and values["rng"][0] and world_size == values["world_size"]:
            _set_rng_state(values["rng"][rank])
        return values["state"]


def _put_back(group: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Set an optimizer's hyper-parameters."""
    for key, value in saved.items():
        if key == "params":
            continue
        if isinstance(group.get(key), Tensor):
            group[key].fill_(value)
        else:
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value


def _apart(part: Part, piece: _Piece) -> bool:
    """Whether it is sure that a part has no row of a piece."""
    if not piece.tensor.dim() or part.sharded != piece.sharded or part.total != piece.total:
        return False
    return part.first >= piece.first + len(piece.tensor) or part.first + part.length <= piece.first


def _read(file: BinaryIO, layout: Layout, part: Part, piece: _Piece) -> None:
    """Fill a piece in place with the rows of it that a part has."""
    if not piece.tensor.dim():
        tensorfile.read_rows(file, layout, 0, piece.tensor)
    elif part.sharded == piece.sharded and (part.total == piece.total or not part.sharded):
        low, high = piece.first, piece.first + len(piece.tensor)
        start, stop = max(low, part.first), min(high, part.first + part.length)
        if start < stop:
            tensorfile.read_rows(file, layout, start - part.first, piece.tensor[start - low : stop - low])
    else:
        _read_in_another_order(file, layout, part, piece)


def _read_in_another_order(file: BinaryIO, layout: Layout, part: Part, piece: _Piece) -> None:
    """Fill a piece with rows whose order is another: by slot where it is by id, or of a table with fewer rows."""
    for start in range(0, part.length, _READ_ROWS):
        stop = min(start + _READ_ROWS, part.length)
        ids = torch.arange(part.first + start, part.first + stop)
        if part.sharded:
            ids = Spread(part.total).ids(ids)
        places = piece.places(ids)
        here = ((places >= 0) & (places < len(piece.tensor))).nonzero().squeeze(1)
        if len(here):
            rows = torch.empty(stop - start, *part.shape[1:], dtype=layout.dtype)
            tensorfile.read_rows(file, layout, start, rows)
            values = rows[here].to(piece.tensor.device, piece.tensor.dtype)
            piece.tensor.index_copy_(0, places[here].to(piece.tensor.device), values)
