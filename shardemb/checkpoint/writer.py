"""Writes checkpoints, in the foreground and in the background.

:mod:`shardemb.checkpoint` says what they are.
"""

import datetime
import hashlib
import json
import os
import secrets
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardemb import kernels
from shardemb.checkpoint import safetensors_io
from shardemb.checkpoint.manifest import FORMAT, MANIFEST, dtype_name, finished
from shardemb.checkpoint.shards import (
    LocalShard,
    check_known,
    dotted,
    length_of,
    model_pieces,
    optimizer_pieces,
    rng_state,
    tables_of,
)
from shardemb.checkpoint.storage import Folder, Location, child, folder_at
from shardemb.comm import collectives, watchdog
from shardemb.embedding import Embedding
from shardemb.exceptions import CheckpointError, InputError, NonfiniteError
from shardemb.transforms import to_json
from shardemb.utils.memory import free_bytes
from shardemb.utils.types import few

#: bytes of tensors in a file, at most (unless a single row has more): enough files to hash several
#: at a time
FILE_BYTES = 1 << 28

Nonfinite = Literal["error", "warn", "ignore"]


@dataclass
class _Snapshot:
    """What one rank writes."""

    step: int
    keep: int
    #: of this rank's share
    pieces: dict[str, LocalShard]
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
    """Write checkpoint ``folder/step-N``. A collective.

    On return it is complete, or all ranks have raised.

    Needs no memory besides the tables', up to some megabytes.

    Args:
        folder: holds the run's checkpoints, on storage that all ranks see: a path, or a URI such as
            ``s3://bucket/run``.
        step: number of the checkpoint.
        model: its tables and other parameters.
        optimizers: their state for these parameters, and their hyper-parameters.
        state: anything JSON can hold, such as the position in the data; given back by :func:`load`.
        keep: how many finished checkpoints stay, this one and those before it; later ones are left
            alone.
        schedulers: of learning rates; anything with a ``state_dict`` that JSON can hold.
        seed: of the run, for the manifest.
        fingerprints: hashes of what the rows depend on, such as {"vocabulary": ...}, which
            :func:`load` compares.
        nonfinite: what to do if a table holds NaN or infinite values: "error", "warn" or "ignore".

    Returns:
        Where it lies.

    Raises:
        CheckpointError: a rank could not write, or a table holds NaN or infinite values; the
            earlier checkpoints are untouched.
        ValueError: a table on a process group of its own; a step, ``keep`` or ``nonfinite`` out of
            range.
    """
    snapshot = _snapshot(
        step, model, list(optimizers), state, keep, list(schedulers), seed, fingerprints, nonfinite
    )
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
        raise InputError(
            f"got step={step}, keep={keep}, nonfinite={nonfinite!r}, expected step at least 0, keep"
            " at least 1 and nonfinite 'error', 'warn' or 'ignore'"
        )
    rank, world_size = collectives.rank_and_size()
    tables = tables_of(model)
    for table in tables.values():
        table._require_default_group("a checkpoint")
    pieces, names, stored = model_pieces(model)
    pieces |= optimizer_pieces(optimizers, pieces, names)
    # what every rank holds whole, the first one writes
    mine = {
        name: piece
        for name, piece in pieces.items()
        if rank == 0 or (piece.sharded and not piece.copy)
    }
    told = {
        prefix: _describe(table) | {"stored": sorted(stored[prefix])}
        for prefix, table in tables.items()
    }
    manifest = _manifest(step, world_size, seed, fingerprints or {}, state or {}, told)
    manifest["optimizers"] = [_scalars(optimizer, names) for optimizer in optimizers]
    manifest["schedulers"] = [
        {"class": type(s).__name__, "state": s.state_dict()} for s in schedulers
    ]
    return _Snapshot(step, keep, mine, manifest, rng_state(), nonfinite, rank, world_size)


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
    """Say what is needed to read the table's rows as its forward gives them.

    And what trained them.
    """
    return {
        "name": table.name,
        "max_id": table.max_id,
        "shape": list(table.shape),
        "complex": table.is_complex,
        "normalizer": to_json(table.normalizer),
        "constrainer": to_json(table.constrainer),
        "gradient": table.kernel,
        "optimizer": table._fused_hyperparameters(),
    }


def _scalars(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Any]:
    """Return an optimizer's class, hyper-parameters, and what it keeps besides tensors (SparseAdam.

    The step).
    """
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        check_known(optimizer, parameter, names)

    def plain(value: Any) -> Any:
        return value.item() if isinstance(value, Tensor) else value

    return {
        "class": type(optimizer).__name__,
        "groups": [
            {
                key: [names[p] for p in value] if key == "params" else plain(value)
                for key, value in group.items()
            }
            for group in optimizer.param_groups
        ],
        "state": {
            names[parameter]: {
                part: value for part, value in state.items() if not isinstance(value, Tensor)
            }
            for parameter, state in optimizer.state.items()
        },
    }


def _write(folder: Location, snapshot: _Snapshot) -> Location:
    """Write what all ranks have snapped. A collective."""
    name = f"step-{snapshot.step:010d}"
    root = folder_at(folder)
    target = name + ".tmp" if root.renames else name
    # where nothing can be renamed, a writer of an attempt that was given up may still be at work:
    # not in these files
    mark = "" if root.renames else f"-{secrets.token_hex(4)}"

    def commit() -> None:
        manifest = snapshot.manifest | {
            "files": [entry for files, _ in shares for entry in files],
            "rng": [rng for _, rng in shares],
        }
        _commit(root, name, target, manifest, snapshot.keep)

    told = _vote(snapshot, (snapshot.nbytes, snapshot.step), _try(json.dumps, snapshot.manifest))
    if len({step for _, step in told}) > 1:
        raise CheckpointError(
            f"ranks save different steps: got {[step for _, step in told]} of ranks 0, 1, ...,"
            " expected one"
        )
    needed = sum(nbytes for nbytes, _ in told)
    try:
        mark = _vote(
            snapshot,
            mark,
            _try(_prepare, root, name, target, needed) if snapshot.rank == 0 else None,
        )[0]
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
    told = collectives.gather((value, error), group=snapshot.group, operation="a checkpoint's vote")
    bad = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(told) if text is not None]
    if bad:
        raise CheckpointError(
            f"checkpoint of step {snapshot.step} was not saved, earlier ones are untouched:"
            f" {'; '.join(bad)}"
        )
    return [value for value, _ in told]


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
        raise OSError(
            f"the disk is too full: got {free:,} free bytes, expected {needed:,}: make room, or"
            " keep fewer"
        )


def require_room(
    folder: Location,
    model: nn.Module,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    keep: int = 2,
) -> None:
    """Refuse, before training, a folder that cannot be written.

    Or whose disk is too small for its checkpoints. A collective.

    The state that an optimizer will make is counted for those of :mod:`shardemb.optim`, and as it
    is now for others.

    Raises:
        CheckpointError: naming the folder, what is needed and what is free; on all ranks.
    """
    rank, optimizers = dist.get_rank() if dist.is_initialized() else 0, list(optimizers)
    pieces, names, _ = model_pieces(model)
    pieces |= optimizer_pieces(optimizers, pieces, names)
    mine = sum(
        piece.nbytes for piece in pieces.values() if rank == 0 or (piece.sharded and not piece.copy)
    )
    for optimizer in optimizers:
        for parameter in (
            p
            for group in optimizer.param_groups
            for p in group["params"]
            if p not in optimizer.state
        ):
            for per_row in getattr(optimizer, "state_per_row", {}).values():
                mine += 4 * (len(parameter) if per_row else parameter.numel())
    total = sum(collectives.gather(mine, operation="room for checkpoints"))

    def check() -> None:
        root = folder_at(folder)
        root.make()
        root.remove(".probe")
        with root.create(".probe") as file:
            file.write(b"can this folder be written?")
        root.remove(".probe")
        check_room(root, total * max(1, keep + 1 - len(finished(root))))

    error = collectives.gather(
        _try(check) if rank == 0 else None, operation="room for checkpoints"
    )[0]
    if error is not None:
        raise CheckpointError(f"{folder}: cannot hold the checkpoints: {error}")


def _write_files(inside: Folder, mark: str, snapshot: _Snapshot) -> None:
    for number, pieces in enumerate(_shared_out(snapshot.pieces)):
        for name, piece in pieces.items():
            _check_finite(name, piece, snapshot)
        file_name = (
            f"rank-{snapshot.rank:05d}-of-{snapshot.world_size:05d}-{number:05d}{mark}.safetensors"
        )
        with inside.create(file_name) as file:
            size, digest = safetensors_io.write(
                file, {name: piece.tensor for name, piece in pieces.items()}
            )
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
        snapshot.files.append(
            {"file": file_name, "size": size, "sha256": digest, "tensors": tensors}
        )


def _shared_out(pieces: Mapping[str, LocalShard]) -> Iterator[dict[str, LocalShard]]:
    """Share pieces out to files of FILE_BYTES, cut between rows where they do not fit."""
    file: dict[str, LocalShard] = {}
    room = FILE_BYTES
    for name, piece in pieces.items():
        done, length = 0, length_of(piece.tensor)
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


def _check_finite(name: str, piece: LocalShard, snapshot: _Snapshot) -> None:
    """Look for NaN and infinite values; it takes little beside the hashing."""
    tensor = torch.view_as_real(piece.tensor) if piece.tensor.is_complex() else piece.tensor
    if snapshot.nonfinite == "ignore" or not tensor.is_floating_point():
        return
    bad: list[int] = []
    start = 0
    for chunk in safetensors_io.row_chunks(tensor):
        bad += piece.ids(kernels.nonfinite_rows(chunk) + start).tolist()
        start += len(chunk)
    if bad:
        text = (
            f"table {piece.table!r}, rank {snapshot.rank}: {name!r} has NaN or infinite values in"
            f" {len(bad)} rows: {few(bad)}: go on from an earlier checkpoint with a lower learning"
            " rate, or save with nonfinite='ignore'"
        )
        if snapshot.nonfinite == "error":
            raise NonfiniteError(text)
        warnings.warn(text, stacklevel=2)


def _commit(root: Folder, name: str, target: str, manifest: Mapping[str, Any], keep: int) -> None:
    body = json.dumps(manifest, sort_keys=True)
    document = json.dumps(
        {"manifest": manifest, "sha256": hashlib.sha256(body.encode()).hexdigest()}, indent=1
    )
    with root.child(target).create(MANIFEST) as file:
        file.write(document.encode())
    if target != name:
        root.rename(target, name)
    # later ones are of a run that went on elsewhere: not ours to remove
    earlier = finished(root)
    for old in earlier[: earlier.index(name) + 1][:-keep]:
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


def save_rows(
    folder: Location, step: int, tables: Mapping[str, Tensor], fingerprints: Mapping[str, str]
) -> Location:
    """Write a checkpoint of rows ``(V, *shape)`` that are no model's, by the names of their tables.

    They may be mapped files.

    Raises:
        CheckpointError: as :func:`save`.
    """
    pieces, told = {}, {}
    for name, rows in tables.items():
        stored = torch.view_as_real(rows) if rows.is_complex() else rows
        pieces[dotted(name, "weight")] = LocalShard(
            stored.reshape(len(rows), -1), 0, len(rows), False, table=name
        )
        told[name] = {
            "name": name,
            "max_id": len(rows),
            "shape": list(rows.shape[1:]),
            "complex": rows.is_complex(),
        }
        told[name] |= {
            "normalizer": None,
            "constrainer": None,
            "gradient": None,
            "optimizer": None,
            "stored": ["weight"],
        }
    manifest = _manifest(step, 1, None, fingerprints, {}, told)
    return _write(folder, _Snapshot(step, 1, pieces, manifest, {}, "ignore", 0, 1))


class AsyncSaver:
    """Saves in the background: :meth:`save` copies this rank's rows, and a thread writes the copy.

    The copy takes as much memory again as the rank's rows and optimizer state, kept from one save
    to the next; where that is not free, the save is made in the foreground, with a warning. The
    constructor is a collective: the threads of the ranks vote in a process group of their own.

    Args:
        folder: as in :func:`save`.
        keep: as in :func:`save`.
        background: False makes every save in the foreground, without a copy.
    """

    def __init__(self, folder: Location, keep: int = 2, background: bool = True) -> None:
        self._folder, self._keep, self._background = folder, keep, background
        self._group = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            with watchdog.guarded(None, "a saver's process group"):
                self._group = dist.new_group(backend="gloo")
            # new_group returns before its peers have connected: one that ends at once would break
            # their connections
            collectives.gather(None, group=self._group, operation="a saver's process group")
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
        snapshot = _snapshot(
            step,
            model,
            list(optimizers),
            state,
            self._keep,
            list(schedulers),
            seed,
            fingerprints,
            nonfinite,
        )
        snapshot.group = self._group
        free = free_bytes(torch.device("cpu"))
        more = snapshot.nbytes - sum(
            buffer.numel() * buffer.itemsize for buffer in self._buffers.values()
        )
        if not self._background or (free is not None and more > free):
            if self._background:
                warnings.warn(
                    f"checkpoint of step {step}, rank {snapshot.rank}: a copy of this rank's rows"
                    f" needs {more:,} bytes more, {free:,} are free: saving in the foreground",
                    stacklevel=2,
                )
            self._run(snapshot)
            self.wait()
            return
        snapshot.pieces = {
            name: replace(piece, tensor=self._copy(name, piece.tensor))
            for name, piece in snapshot.pieces.items()
        }
        self._thread = threading.Thread(target=self._run, args=(snapshot,), name="shardemb-saver")
        self._thread.start()

    def close(self) -> None:
        """Wait for the last save, keep its failure to itself (the job may have failed already).

        And forget all.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._buffers.clear()
        if self._group is not None:
            watchdog.forget(self._group)

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            # scalars and small ones too: the writer must not see what the next step makes of them
            shape = (
                (len(tensor), tensor[0].numel() if len(tensor) else 0) if tensor.dim() else (1, 1)
            )
            buffer = kernels.empty(shape, tensor.dtype, torch.device("cpu")).reshape(tensor.shape)
            self._buffers[name] = buffer
        return buffer.copy_(tensor)

    def _run(self, snapshot: _Snapshot) -> None:
        if threading.current_thread() is self._thread:
            with suppress(
                OSError
            ):  # training comes first; a thread has a priority of its own on Linux
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        try:
            _write(self._folder, snapshot)
        except BaseException as error:
            self._failure = error

    def check(self) -> None:
        """Raise CheckpointError if the last save has failed; call it in each step.

        Costs nothing.
        """
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def wait(self) -> None:
        """Return when the last save is complete.

        Raises CheckpointError if it failed, on all ranks.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()
