"""Writes checkpoints, in the foreground or in the background."""

import datetime
import hashlib
import json
import os
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardemb import kernels
from shardemb.checkpoint import safetensors_io
from shardemb.checkpoint.manifest import FORMAT, MANIFEST, check_schema, dtype_name, finished
from shardemb.checkpoint.shards import (
    LocalShard,
    check_known,
    dotted,
    length_of,
    local_shards,
    optimizer_shards,
    rng_state,
    tables_of,
    whole,
)
from shardemb.checkpoint.storage import Folder, Location, child, folder_at
from shardemb.comm import collectives, watchdog
from shardemb.embedding import Embedding
from shardemb.exceptions import CheckpointError, InputError, NonfiniteError
from shardemb.transforms import to_json
from shardemb.utils import logs
from shardemb.utils.memory import free_bytes
from shardemb.utils.types import few

#: most bytes of tensors in a file (a single row may exceed it); files hash in parallel
FILE_BYTES = 1 << 28

Nonfinite = Literal["error", "warn", "ignore"]

_log = logs.logger(__name__)


@dataclass
class _Snapshot:
    step: int
    keep: int
    #: only the shards that this rank writes
    shards: dict[str, LocalShard]
    #: without files and random generators
    manifest: dict[str, Any]
    #: state of this rank's random generators
    rng: dict[str, Any]
    nonfinite: Nonfinite
    rank: int
    world_size: int
    #: process group of the votes
    group: Any = None
    #: file, size, sha256 and tensors of each written file
    files: list[dict[str, Any]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards.values())


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

    On return the checkpoint is complete on disk; otherwise all ranks raise. It needs a few
    megabytes of memory.

    Args:
        folder: the run's checkpoints, on storage that all ranks share: a path, or a URI such as
            ``s3://bucket/run``.
        step: number of the checkpoint.
        model: its tables, other parameters and buffers are saved.
        optimizers: their state and hyper-parameters are saved.
        state: JSON, such as the position in the data; :func:`load` returns it.
        keep: number of finished checkpoints to keep, up to this step; later steps stay.
        schedulers: learning-rate schedulers, or anything whose ``state_dict`` is JSON.
        seed: the run's seed, for the manifest.
        fingerprints: hashes of the data, such as {"vocabulary": ...}; :func:`load` compares them.
        nonfinite: what NaN or infinite rows do: "error", "warn" or "ignore".

    Returns:
        The checkpoint's location.

    Raises:
        CheckpointError: a rank could not write, or a table is not finite; earlier checkpoints stay.
        ValueError: an argument is out of range, or a table has its own process group.
    """
    snapshot = _snapshot(
        step, model, optimizers, state, keep, schedulers, seed, fingerprints, nonfinite
    )
    return _write(folder, snapshot)


def _snapshot(
    step: int,
    model: nn.Module,
    optimizers: Iterable[torch.optim.Optimizer],
    state: Mapping[str, Any] | None,
    keep: int,
    schedulers: Iterable[Any],
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
    tables, optimizers = tables_of(model), list(optimizers)
    for table in tables.values():
        table._require_default_group("a checkpoint")
    shards, names, stored = local_shards(model)
    shards |= optimizer_shards(optimizers, shards, names)
    manifest = _manifest(step, world_size, seed, fingerprints or {}, state or {})
    manifest["tables"] = {
        prefix: _describe(table) | {"stored": sorted(stored[prefix])}
        for prefix, table in tables.items()
    }
    manifest["optimizers"] = [_scalars(optimizer, names) for optimizer in optimizers]
    manifest["schedulers"] = [
        {"class": type(s).__name__, "state": s.state_dict()} for s in schedulers
    ]
    own = _written_by(rank, shards)
    return _Snapshot(step, keep, own, manifest, rng_state(), nonfinite, rank, world_size)


def _written_by(rank: int, shards: Mapping[str, LocalShard]) -> dict[str, LocalShard]:
    return {
        name: shard
        for name, shard in shards.items()
        if rank == 0 or (shard.order.permuted and not shard.copy)
    }


def _manifest(
    step: int,
    world_size: int,
    seed: int | None,
    fingerprints: Mapping[str, str],
    state: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "step": step,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "world_size": world_size,
        "seed": seed,
        "fingerprints": dict(fingerprints),
        "state": dict(state),
        "tables": {},
        "optimizers": [],
        "schedulers": [],
    }


def _describe(table: Embedding) -> dict[str, Any]:
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
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        check_known(optimizer, parameter, names)

    def plain(key: str, value: Any) -> Any:
        if key == "params":
            return [names[parameter] for parameter in value]
        return value.item() if isinstance(value, Tensor) else value

    groups = [{key: plain(key, group[key]) for key in group} for group in optimizer.param_groups]
    state = {
        names[parameter]: {key: x for key, x in values.items() if not isinstance(x, Tensor)}
        for parameter, values in optimizer.state.items()
    }
    return {"class": type(optimizer).__name__, "groups": groups, "state": state}


def _write(folder: Location, snapshot: _Snapshot) -> Location:
    start, name = time.monotonic(), f"step-{snapshot.step:010d}"
    root = folder_at(folder)
    target, mark = name + ".tmp", ""
    if not root.renames:
        # an abandoned attempt may still be writing: use other file names
        target, mark = name, f"-{secrets.token_hex(4)}"

    def commit() -> None:
        files = [entry for files, _ in shares for entry in files]
        manifest = snapshot.manifest | {"files": files, "rng": [rng for _, rng in shares]}
        _commit(root, name, target, manifest, snapshot.keep)

    def on_first(function: Callable[..., Any], *args: Any) -> str | None:
        return _try(function, *args) if snapshot.rank == 0 else None

    error = _try(_check_loadable, snapshot.manifest)
    needed = sum(_vote(snapshot, snapshot.nbytes, error))
    collectives.agree(
        "ranks save different steps",
        {"step": snapshot.step},
        group=snapshot.group,
        raises=CheckpointError,
    )
    try:
        mark = _vote(snapshot, mark, on_first(_prepare, root, name, target, needed))[0]
        error = _try(_write_files, root.child(target), mark, snapshot)
        shares = _vote(snapshot, (snapshot.files, snapshot.rng), error)
        _vote(snapshot, None, on_first(commit))
    except CheckpointError:
        if snapshot.rank == 0 and root.child(name).size(MANIFEST) is None:
            _try(root.remove, target)  # free the space for the next checkpoint
        raise
    location, seconds = child(folder, name), time.monotonic() - start
    _log.info("saved %s: %d bytes in %.2f s", location, snapshot.nbytes, seconds)
    return location


def _check_loadable(manifest: Mapping[str, Any]) -> None:
    """Raise what loading would raise, before writing."""
    check_schema(json.loads(json.dumps({**manifest, "files": [], "rng": []})), "")


def _try(function: Callable[..., Any], *args: Any) -> str | None:
    """Return the error's text instead of raising: other ranks wait for it."""
    try:
        function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _vote(snapshot: _Snapshot, value: Any, error: str | None) -> list[Any]:
    failure = None
    if error is not None:
        failure = CheckpointError(
            f"checkpoint of step {snapshot.step} was not saved, earlier ones are untouched: rank"
            f" {snapshot.rank}: {error}"
        )
    return collectives.gather_or_raise(
        value, failure, group=snapshot.group, operation="a checkpoint's vote"
    )


def _prepare(root: Folder, name: str, target: str, needed: int) -> None:
    if root.child(name).size(MANIFEST) is not None:
        raise FileExistsError(f"{name} exists: a finished checkpoint is never written again")
    root.remove(target)
    root.child(target).make()
    check_space(root, needed)


def check_space(root: Folder, needed: int) -> None:
    """Raise OSError if the disk has fewer free bytes than needed, if known."""
    free = root.free_bytes()
    if free is not None and free < needed:
        raise OSError(
            f"the disk is too full: got {free:,} free bytes, expected {needed:,}: free some, or"
            " keep fewer"
        )


def require_space(
    folder: Location,
    model: nn.Module,
    optimizers: Iterable[torch.optim.Optimizer] = (),
    keep: int = 2,
) -> None:
    """Check that a folder is writable and has space for ``keep`` checkpoints. A collective.

    Counts future optimizer state of :mod:`shardemb.optim`, and only existing state of others.

    Raises:
        CheckpointError: on all ranks; names the folder, the needed and the free bytes.
    """
    rank, optimizers = collectives.rank_and_size()[0], list(optimizers)
    shards, names, _ = local_shards(model)
    shards |= optimizer_shards(optimizers, shards, names)
    size = sum(shard.nbytes for shard in _written_by(rank, shards).values())
    for optimizer in optimizers:
        state_per_row = getattr(optimizer, "state_per_row", {}).values()
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if parameter not in optimizer.state:
                for per_row in state_per_row:
                    size += 4 * (len(parameter) if per_row else parameter.numel())
    operation = "space for checkpoints"
    total = sum(collectives.gather(size, operation=operation))

    def check() -> None:
        root = folder_at(folder)
        root.make()
        root.remove(".probe")
        with root.create(".probe") as file:
            file.write(b"can this folder be written?")
        root.remove(".probe")
        check_space(root, total * max(1, keep + 1 - len(finished(root))))

    error = _try(check) if rank == 0 else None
    failure = error and CheckpointError(f"{folder}: cannot hold the checkpoints: {error}")
    collectives.gather_or_raise(None, failure or None, operation=operation)


def _write_files(inside: Folder, mark: str, snapshot: _Snapshot) -> None:
    rank_of = f"rank-{snapshot.rank:05d}-of-{snapshot.world_size:05d}"
    for number, shards in enumerate(_divided(snapshot.shards)):
        for name, shard in shards.items():
            _check_finite(name, shard, snapshot)
        file_name = f"{rank_of}-{number:05d}{mark}.safetensors"
        with inside.create(file_name) as file:
            tensors = {name: shard.tensor for name, shard in shards.items()}
            size, digest = safetensors_io.write(file, tensors)
        entries = {
            name: {
                "first": shard.first,
                "total": shard.order.num_rows,
                "sharded": shard.order.permuted,
                "shape": list(shard.tensor.shape),
                "dtype": dtype_name(shard.tensor.dtype),
            }
            for name, shard in shards.items()
        }
        entry = {"file": file_name, "size": size, "sha256": digest, "tensors": entries}
        snapshot.files.append(entry)


def _divided(shards: Mapping[str, LocalShard]) -> Iterator[dict[str, LocalShard]]:
    file: dict[str, LocalShard] = {}
    left = FILE_BYTES
    for name, shard in shards.items():
        done, length = 0, length_of(shard.tensor)
        while done < length:
            row_bytes = -(-shard.nbytes // length)
            stop = min(length, done + left // max(1, row_bytes))
            if stop > done or not file:
                stop = max(stop, done + 1)
                part = shard if (done, stop) == (0, length) else shard.rows(done, stop)
                file[name], left, done = part, left - part.nbytes, stop
            if done < length:
                yield file
                file, left = {}, FILE_BYTES
    if file:
        yield file


def _check_finite(name: str, shard: LocalShard, snapshot: _Snapshot) -> None:
    tensor = torch.view_as_real(shard.tensor) if shard.tensor.is_complex() else shard.tensor
    if snapshot.nonfinite == "ignore" or not tensor.is_floating_point():
        return
    bad: list[int] = []
    start = 0
    for chunk in safetensors_io.row_chunks(tensor):
        bad += shard.ids(kernels.nonfinite_rows(chunk) + start).tolist()
        start += len(chunk)
    if bad:
        text = (
            f"table {shard.table!r}, rank {snapshot.rank}: {name!r} has NaN or infinite values in"
            f" {len(bad)} rows: {few(bad)}: continue from an earlier checkpoint with a lower"
            " learning rate, or save with nonfinite='ignore'"
        )
        if snapshot.nonfinite == "error":
            raise NonfiniteError(text)
        warnings.warn(text, stacklevel=2)


def _commit(root: Folder, name: str, target: str, manifest: Mapping[str, Any], keep: int) -> None:
    body = json.dumps(manifest, sort_keys=True)
    digest = hashlib.sha256(body.encode()).hexdigest()
    with root.child(target).create(MANIFEST) as file:
        file.write(json.dumps({"manifest": manifest, "sha256": digest}, indent=1).encode())
    if target != name:
        root.rename(target, name)
    # later steps belong to another continuation of the run
    names = finished(root)
    for old in names[: names.index(name) + 1][:-keep]:
        _retire(root, old)


def _retire(root: Folder, name: str) -> None:
    """Remove a checkpoint; an interrupted removal must not look finished."""
    if root.renames:
        retired = f"{name}.tmp"
        root.remove(retired)
        root.rename(name, retired)
        name = retired
    else:
        root.child(name).remove(MANIFEST)
    root.remove(name)


def save_rows(
    folder: Location, step: int, tables: Mapping[str, Tensor], fingerprints: Mapping[str, str]
) -> Location:
    """Write a checkpoint of tables without a model.

    Args:
        folder: as in :func:`save`.
        step: as in :func:`save`.
        tables: rows ``(V, *shape)`` by name; they may be memory-mapped.
        fingerprints: as in :func:`save`.

    Raises:
        CheckpointError: as :func:`save`.
    """
    manifest = _manifest(step, 1, None, fingerprints, {})
    shards = {}
    for name, rows in tables.items():
        stored = torch.view_as_real(rows) if rows.is_complex() else rows
        stored = stored.reshape(len(rows), -1)
        shards[dotted(name, "weight")] = whole(stored, name)
        manifest["tables"][name] = {
            "name": name,
            "max_id": len(rows),
            "shape": list(rows.shape[1:]),
            "complex": rows.is_complex(),
            "stored": ["weight"],
            **dict.fromkeys(("normalizer", "constrainer", "gradient", "optimizer")),
        }
    return _write(folder, _Snapshot(step, 1, shards, manifest, {}, "ignore", 0, 1))


class AsyncSaver:
    """Saves in the background: :meth:`save` copies this rank's rows, and a thread writes the copy.

    The copy doubles the memory of rows and optimizer state. Without enough free memory, the save
    runs in the foreground, with a warning. The constructor is a collective.

    Args:
        folder: as in :func:`save`.
        keep: as in :func:`save`.
        background: False saves in the foreground, without a copy.
    """

    def __init__(self, folder: Location, keep: int = 2, background: bool = True) -> None:
        self._folder, self._keep, self._background = folder, keep, background
        self._group = None
        if collectives.rank_and_size()[1] > 1:
            operation = "a saver's process group"
            with watchdog.guarded(None, operation):
                self._group = dist.new_group(backend="gloo")
            # new_group returns before its peers have connected
            collectives.gather(None, group=self._group, operation=operation)
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
        """Wait for the previous save, copy the rows, and write them. A collective.

        Arguments of :func:`shardemb.checkpoint.save`.

        Raises:
            CheckpointError: the previous save failed, on all ranks.
        """
        self.wait()
        snapshot = _snapshot(
            step, model, optimizers, state, self._keep, schedulers, seed, fingerprints, nonfinite
        )
        snapshot.group = self._group
        free = free_bytes(torch.device("cpu"))
        copied = sum(buffer.numel() * buffer.itemsize for buffer in self._buffers.values())
        more = snapshot.nbytes - copied
        fits = free is None or more <= free
        if not self._background or not fits:
            if self._background:
                warnings.warn(
                    f"checkpoint of step {step}, rank {snapshot.rank}: a copy of this rank's rows"
                    f" needs {more:,} bytes more, {free:,} are free: saving in the foreground",
                    stacklevel=2,
                )
            self._run(snapshot)
            self.wait()
            return
        snapshot.shards = {
            name: replace(shard, tensor=self._copy(name, shard.tensor))
            for name, shard in snapshot.shards.items()
        }
        self._thread = threading.Thread(target=self._run, args=(snapshot,), name="shardemb-saver")
        self._thread.start()

    def close(self) -> None:
        """Wait for the last save, ignore its failure, and free the memory."""
        self._join()
        self._buffers.clear()
        if self._group is not None:
            watchdog.forget(self._group)

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            shape = (1, 1)
            if tensor.dim():
                shape = (len(tensor), tensor[0].numel() if len(tensor) else 0)
            buffer = kernels.empty(shape, tensor.dtype, torch.device("cpu")).reshape(tensor.shape)
            self._buffers[name] = buffer
        return buffer.copy_(tensor)

    def _run(self, snapshot: _Snapshot) -> None:
        if threading.current_thread() is self._thread:
            with suppress(OSError):  # training has priority; a Linux thread has its own
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        try:
            _write(self._folder, snapshot)
        except BaseException as error:
            self._failure = error

    def check(self) -> None:
        """Raise CheckpointError if the last save failed; cheap."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def wait(self) -> None:
        """Wait for the last save; CheckpointError, on all ranks, if it failed."""
        self._join()
        self.check()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
