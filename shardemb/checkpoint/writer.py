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
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypedDict, Unpack, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardemb import kernels
from shardemb.checkpoint import plain_values, safetensors_io
from shardemb.checkpoint.manifest import FORMAT, MANIFEST, check_schema, dtype_name, finished
from shardemb.checkpoint.shards import (
    LocalShard,
    dotted,
    known_parameters,
    length_of,
    local_shards,
    rng_state,
    tables_of,
    vote,
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


class SaveOptions(TypedDict, total=False):
    """Options of :func:`save`."""

    schedulers: Iterable[Any]
    seed: int | None
    fingerprints: Mapping[str, str] | None
    nonfinite: Nonfinite


@dataclass
class _Snapshot:
    #: only the shards that this rank writes
    shards: dict[str, LocalShard]
    #: without files and random generators
    manifest: dict[str, Any]
    keep: int = 1
    nonfinite: Nonfinite = "ignore"
    #: state of this rank's random generators
    rng: dict[str, Any] = field(default_factory=dict)

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
    **options: Unpack[SaveOptions],
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
        state: plain values, such as the position in the data: None, bools, numbers, strings, and
            lists, tuples, sets and dicts of these; :func:`load` returns it as it was.
        keep: number of finished checkpoints to keep, up to this step; later steps stay.
        options: ``schedulers``: learning-rate schedulers, or anything whose ``state_dict`` has such
            values; ``seed``: the run's, for the manifest; ``fingerprints``: hashes of the data,
            such as {"vocabulary": ...}, which :func:`load` compares; ``nonfinite``: what NaN or
            infinite rows do, "error" (the default), "warn" or "ignore".

    Returns:
        The checkpoint's location.

    Raises:
        CheckpointError: a rank could not write, or a table is not finite; earlier checkpoints stay.
        ValueError: an argument is out of range, or a table has its own process group.
    """
    return _write(folder, _snapshot(step, model, optimizers, state, keep, **options))


def _snapshot(
    step: int,
    model: nn.Module,
    optimizers: Iterable[torch.optim.Optimizer],
    state: Mapping[str, Any] | None,
    keep: int,
    schedulers: Iterable[Any] = (),
    seed: int | None = None,
    fingerprints: Mapping[str, str] | None = None,
    nonfinite: Nonfinite = "error",
) -> _Snapshot:
    if step < 0 or keep < 1 or nonfinite not in get_args(Nonfinite):
        raise InputError(
            f"got step={step}, keep={keep}, nonfinite={nonfinite!r}, expected step at least 0, keep"
            f" at least 1 and nonfinite one of {get_args(Nonfinite)}"
        )
    tables, optimizers = tables_of(model), list(optimizers)
    for table in tables.values():
        table._require_default_group("a checkpoint")
    shards, names, stored = local_shards(model, optimizers)
    manifest = _manifest(step, fingerprints or {}) | {
        "seed": seed,
        "state": plain_values.to_json(dict(state or {}), "state"),
        "tables": {
            prefix: _describe(table) | {"stored": sorted(stored[prefix])}
            for prefix, table in tables.items()
        },
        "optimizers": [_scalars(optimizer, names) for optimizer in optimizers],
        "schedulers": [_scheduler_state(scheduler) for scheduler in schedulers],
    }
    return _Snapshot(_written_by_this_rank(shards), manifest, keep, nonfinite, rng_state())


def _written_by_this_rank(shards: Mapping[str, LocalShard]) -> dict[str, LocalShard]:
    rank, _ = collectives.rank_and_size()
    return {
        name: shard
        for name, shard in shards.items()
        if rank == 0 or (shard.order.permuted and not shard.copy)
    }


def _manifest(step: int, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """Return the manifest of a checkpoint without model."""
    return {
        "format": FORMAT,
        "step": step,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "world_size": collectives.rank_and_size()[1],
        "seed": None,
        "fingerprints": dict(fingerprints),
        "state": {},
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
    def plain(key: str, value: Any) -> Any:
        if key == "params":
            return [names[parameter] for parameter in value]
        value = value.item() if isinstance(value, Tensor | np.generic) else value
        return plain_values.to_json(value, f"{type(optimizer).__name__}'s {key}")

    groups = [{key: plain(key, group[key]) for key in group} for group in optimizer.param_groups]
    state = {
        names[parameter]: {key: x for key, x in values.items() if not isinstance(x, Tensor)}
        for parameter, values in optimizer.state.items()
    }
    return {"class": type(optimizer).__name__, "groups": groups, "state": state}


def _scheduler_state(scheduler: Any) -> dict[str, Any]:
    name = type(scheduler).__name__
    return {"class": name, "state": plain_values.to_json(scheduler.state_dict(), name)}


def _write(folder: Location, snapshot: _Snapshot, group: Any = None) -> Location:
    """Write a checkpoint; ``group`` is the process group of the votes."""
    start, step, root = time.monotonic(), snapshot.manifest["step"], folder_at(folder)
    rank, _ = collectives.rank_and_size()
    name = f"step-{step:010d}"
    target = f"{name}.tmp" if root.renames else name
    failed = f"checkpoint of step {step} was not saved, earlier ones are untouched: rank {rank}"

    def all_ranks(stage: Callable[..., Any], *args: Any) -> list[Any]:
        return vote(lambda: stage(*args), failed, Exception, group)

    def first_rank(stage: Callable[..., Any], *args: Any) -> Any:
        return all_ranks(lambda: stage(*args) if rank == 0 else None)[0]

    needed = sum(all_ranks(_checked_bytes, snapshot))
    collectives.agree(
        "ranks save different steps", {"step": step}, group=group, raises=CheckpointError
    )
    try:
        mark = first_rank(_prepare, root, name, target, needed)
        shares = all_ranks(_write_files, root.child(target), mark, snapshot)
        files = [entry for files, _ in shares for entry in files]
        manifest = snapshot.manifest | {"files": files, "rng": [rng for _, rng in shares]}
        first_rank(_commit, root, name, target, manifest, snapshot.keep)
    except CheckpointError:
        if rank == 0 and root.child(name).size(MANIFEST) is None:
            with suppress(Exception):
                root.remove(target)  # free the space for the next checkpoint
        raise
    location, seconds = child(folder, name), time.monotonic() - start
    _log.info("saved %s: %d bytes in %.2f s", location, snapshot.nbytes, seconds)
    return location


def _checked_bytes(snapshot: _Snapshot) -> int:
    """Raise what loading would raise, before writing; return this rank's bytes."""
    check_schema(json.loads(json.dumps({**snapshot.manifest, "files": [], "rng": []})), "")
    return snapshot.nbytes


def _prepare(root: Folder, name: str, target: str, needed: int) -> str:
    """Make the folder to write in; return a mark for the names of its files."""
    if root.child(name).size(MANIFEST) is not None:
        raise FileExistsError(f"{name} exists: a finished checkpoint is never written again")
    root.remove(target)
    root.child(target).make()
    check_space(root, needed)
    # an abandoned attempt may still be writing to the same folder
    return "" if root.renames else f"-{secrets.token_hex(4)}"


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
    optimizers = list(optimizers)
    shards, names, _ = local_shards(model, optimizers)
    size = sum(shard.nbytes for shard in _written_by_this_rank(shards).values())
    for optimizer in optimizers:
        state_per_row = getattr(optimizer, "state_per_row", {}).values()
        for parameter in known_parameters(optimizer, names):
            if parameter not in optimizer.state:
                for per_row in state_per_row:
                    size += 4 * (len(parameter) if per_row else parameter.numel())
    total = sum(collectives.gather(size, operation="space for checkpoints"))

    def check() -> None:
        if collectives.rank_and_size()[0] > 0:
            return
        root = folder_at(folder)
        root.make()
        root.remove(".probe")
        with root.create(".probe") as file:
            file.write(b"can this folder be written?")
        root.remove(".probe")
        check_space(root, total * max(1, keep + 1 - len(finished(root))))

    vote(check, f"{folder}: cannot hold the checkpoints", Exception)


def _write_files(
    inside: Folder, mark: str, snapshot: _Snapshot
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return file, size, sha256 and tensors of each written file, and the random generators."""
    rank, world_size = collectives.rank_and_size()
    files = []
    for number, shards in enumerate(_divided(snapshot.shards)):
        for name, shard in shards.items():
            _check_finite(name, shard, snapshot.nonfinite)
        file_name = f"rank-{rank:05d}-of-{world_size:05d}-{number:05d}{mark}.safetensors"
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
        files.append({"file": file_name, "size": size, "sha256": digest, "tensors": entries})
    return files, snapshot.rng


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


def _check_finite(name: str, shard: LocalShard, nonfinite: Nonfinite) -> None:
    tensor = shard.tensor
    if nonfinite == "ignore" or not (tensor.is_floating_point() or tensor.is_complex()):
        return
    bad: list[int] = []
    start = 0
    for chunk in safetensors_io.row_chunks(tensor):
        rows = kernels.nonfinite_rows(chunk) + start
        bad += shard.order.ids(rows + shard.first).tolist()
        start += len(chunk)
    if bad:
        text = (
            f"table {shard.table!r}, rank {collectives.rank_and_size()[0]}: {name!r} has NaN or"
            f" infinite values in {len(bad)} rows: {few(bad)}: continue from an earlier checkpoint"
            " with a lower learning rate, or save with nonfinite='ignore'"
        )
        if nonfinite == "error":
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
    manifest = _manifest(step, fingerprints)
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
    return _write(folder, _Snapshot(shards, manifest))


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
        self._threads = ThreadPoolExecutor(1, "shardemb-saver", _lower_priority)
        self._saving: Future[Location] | None = None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizers: Iterable[torch.optim.Optimizer] = (),
        state: Mapping[str, Any] | None = None,
        **options: Unpack[SaveOptions],
    ) -> None:
        """Wait for the previous save, copy the rows, and write them. A collective.

        Arguments of :func:`shardemb.checkpoint.save`.

        Raises:
            CheckpointError: the previous save failed, on all ranks.
        """
        self.wait()
        snapshot = _snapshot(step, model, optimizers, state, self._keep, **options)
        free = free_bytes(torch.device("cpu"))
        copied = sum(buffer.numel() * buffer.itemsize for buffer in self._buffers.values())
        more = snapshot.nbytes - copied
        fits = free is None or more <= free
        if self._background and not fits:
            rank, _ = collectives.rank_and_size()
            warnings.warn(
                f"checkpoint of step {step}, rank {rank}: a copy of this rank's rows needs"
                f" {more:,} bytes more, {free:,} are free: saving in the foreground",
                stacklevel=2,
            )
        if not (self._background and fits):
            _write(self._folder, snapshot, self._group)
            return
        snapshot.shards = {
            name: replace(shard, tensor=self._copy(name, shard.tensor))
            for name, shard in snapshot.shards.items()
        }
        self._saving = self._threads.submit(_write, self._folder, snapshot, self._group)

    def close(self) -> None:
        """Wait for the last save, ignore its failure, and free the memory."""
        self._threads.shutdown()
        self._saving = None
        self._buffers.clear()
        if self._group is not None:
            watchdog.forget(self._group)

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = kernels.empty(tensor.shape, tensor.dtype)
            self._buffers[name] = buffer
        return buffer.copy_(tensor)

    def check(self) -> None:
        """Raise CheckpointError if the last save failed; cheap."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the last save; CheckpointError, on all ranks, if it failed."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()


def _lower_priority() -> None:
    with suppress(OSError):  # training has priority; a Linux thread has its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
