"""Loads checkpoints into the tables of any number of ranks."""

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from shardemb.checkpoint import safetensors_io
from shardemb.checkpoint.manifest import Manifest, SavedShard, Verify, dtype_name
from shardemb.checkpoint.plain_values import from_json
from shardemb.checkpoint.safetensors_io import DTYPES, Layout
from shardemb.checkpoint.shards import (
    LocalShard,
    dotted,
    known_parameters,
    length_of,
    local_shards,
    rng_state,
    set_rng_state,
    tables_of,
    vote,
)
from shardemb.checkpoint.storage import Location
from shardemb.comm import collectives
from shardemb.embedding import Embedding
from shardemb.exceptions import CheckpointError, OtherDataError
from shardemb.utils import logs

#: rows read at a time if their order changes
_READ_ROWS = 1 << 16

_log = logs.logger(__name__)


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
    strict: bool = True,
    fingerprints: Mapping[str, str] | None = None,
    verify: Verify = "sha256",
) -> dict[str, Any]:
    """Load ``folder/step-N`` into the tables of any number of ranks. A collective.

    Each rank reads its own rows straight into its tables. The model changes only if all files are
    complete and undamaged. With optimizers or schedulers, and the saved number of ranks, the random
    generators are restored too.

    Args:
        path: the checkpoint.
        model: its tables have the saved shapes and dtypes.
        optimizers: their hyper-parameters, and the state of this rank's rows, are restored.
        schedulers: their state is restored.
        tables: names of the model's tables to load ("" for an Embedding on its own), or a mapping
            from these to names in the checkpoint; None loads the whole model.
        optimizer_state: False loads rows alone, without the state of a fused optimizer.
        cast: convert rows to the tables' dtype.
        grow: allow tables with more rows than saved; the new rows stay as initialized.
        strict: False loads the parameters and buffers that both the model and the checkpoint have,
            as torch's load_state_dict, and warns of the others by name.
        fingerprints: must equal the saved ones of the same names.
        verify: "sha256" checks the hash of every file that is read, "size" only its size.

    Returns:
        The saved ``state``.

    Raises:
        CheckpointError: on all ranks: a missing or damaged file, or a model, optimizers, schedulers
            or fingerprints that differ from the saved ones.
    """
    start = time.monotonic()
    if tables is not None and not isinstance(tables, Mapping):
        tables = {name: name for name in tables}
    job = _Load(
        path, model, list(optimizers), list(schedulers), tables, optimizer_state, cast, grow, strict
    )

    def run(stage: Callable[..., None], *args: Any) -> None:
        vote(lambda: stage(*args), str(path), (OSError, EOFError))

    run(job.plan, fingerprints or {})
    collectives.agree(
        "ranks see different checkpoints",  # also where their paths differ
        {"the manifest's sha256": job.manifest.digest},
        raises=CheckpointError,
    )
    run(job.check, verify)
    run(job.read)
    state = job.finish()
    size = sum(shard.nbytes for _, shard in job.wanted)
    _log.info("loaded %s: %d bytes in %.2f s", path, size, time.monotonic() - start)
    return state


@dataclass
class _Load:
    path: Location
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    schedulers: list[Any]
    tables: Mapping[str, str] | None
    optimizer_state: bool
    cast: bool
    grow: bool
    strict: bool
    #: name in the checkpoint, and the shard that takes its rows
    wanted: list[tuple[str, LocalShard]] = field(default_factory=list)
    #: stored tensors of each table to load
    rows: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    #: the new state of each optimizer's parameters
    states: list[tuple[torch.optim.Optimizer, Tensor, dict[str, Any]]] = field(default_factory=list)
    #: the saved hyper-parameters of each optimizer
    groups: list[list[dict[str, Any]]] = field(default_factory=list)
    #: these states' tensors to allocate: index in `wanted`, state, key, device
    missing: list[tuple[int, dict[str, Any], str, torch.device]] = field(default_factory=list)

    def _error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {text}")

    def plan(self, fingerprints: Mapping[str, str]) -> None:
        tables = tables_of(self.model)
        for table in tables.values():
            table._require_default_group("a checkpoint")
        try:
            self.manifest = Manifest(self.path)
        except CheckpointError as error:
            names = ", ".join(repr(table.name) for table in tables.values())
            wanted = f"table {names}" if names else "a model without tables"
            raise CheckpointError(f"{error}; wanted for {wanted}") from error
        values = self.manifest.values
        self.state = from_json(values["state"], f"{self.path}: state")
        for name, expected in fingerprints.items():
            got = values["fingerprints"].get(name, expected)
            if got != expected:
                raise OtherDataError(
                    f"{self.path}: got {name} of fingerprint {got}, expected {expected}: it is of"
                    " other data"
                )
        shards, names_of, stored = local_shards(self.model)
        if self.tables is None:
            both = [name for name in tables if self.strict or name in values["tables"]]
            chosen: Mapping[str, str] = {name: name for name in both}
        else:
            chosen = self.tables
        for name, saved in chosen.items():
            if name not in tables or saved not in values["tables"]:
                has = {key: entry["name"] for key, entry in sorted(values["tables"].items())}
                raise self._error(
                    f"got table {name!r} to load from {saved!r}, expected one of {sorted(tables)}"
                    f" from one of {has}"
                )
            self._check_fused(tables[name], values["tables"][saved]["optimizer"])
            keys = stored[name] if self.optimizer_state else ["weight"]
            self.rows[name] = {key: stored[name][key] for key in keys}
            for key in keys:
                self._want(dotted(saved, key), shards[dotted(name, key)], self.grow)
        if self.tables is None:
            self._plan_others(shards, {dotted(t, key) for t in stored for key in stored[t]}, tables)
        if self.optimizer_state and self.optimizers:
            self._plan_optimizers(shards, names_of, chosen)
        if self.schedulers:
            self._check_classes("schedulers", self.schedulers)
        for name in {name for name, _ in self.wanted}:
            self.manifest.check_covered(name)
        rank, world_size = collectives.rank_and_size()
        continues = bool(self.optimizers or self.schedulers) and world_size == values["world_size"]
        self.generators = values["rng"][rank] if continues else {}
        if self.generators:
            own = rng_state()
            try:
                set_rng_state(self.generators)
            except Exception as error:
                raise self._error(f"the random generators' state is invalid: {error}") from error
            finally:
                set_rng_state(own)

    def _plan_others(
        self, shards: Mapping[str, LocalShard], in_tables: set[str], tables: Mapping[str, Any]
    ) -> None:
        others = shards.keys() - in_tables
        missing = others - self.manifest.shards.keys() if not self.strict else set()
        for name in sorted(others - missing):
            self._want(name, shards[name], False)
        saved = self.manifest.values["tables"]
        fused = {dotted(table, key) for table in saved for key in saved[table]["stored"]}
        unused = [
            name
            for name in self.manifest.shards
            if not name.startswith("optimizer.") and name not in others | in_tables | fused
        ]
        unused += [dotted(table, "weight") for table in saved if table not in tables]
        missing |= {dotted(table, "weight") for table in tables if table not in saved}
        if unused and self.strict:
            raise self._error(
                f"holds {unused}, which the model does not have: name the tables to load,"
                f" tables={sorted(tables)}, or pass strict=False"
            )
        if unused or missing:
            warnings.warn(
                f"{self.path}: not loaded: {sorted(unused)}, which the model does not have; kept:"
                f" {sorted(missing)}, which the checkpoint does not have",
                stacklevel=4,
            )

    def _check_fused(self, table: Embedding, got: Mapping[str, Any] | None) -> None:
        expected = table._fused_hyperparameters()
        if self.optimizer_state and (got and got["name"]) != (expected and expected["name"]):
            raise self._error(
                f"table {table.name!r} was saved with the fused optimizer {got}, expected"
                f" {expected}: load the rows alone with optimizer_state=False"
            )

    def _check_classes(self, kind: str, objects: list[Any]) -> None:
        got = [saved["class"] for saved in self.manifest.values[kind]]
        expected = [type(given).__name__ for given in objects]
        if got != expected:
            raise self._error(f"was saved with {kind} {got}, expected {expected}")

    def _plan_optimizers(
        self,
        shards: Mapping[str, LocalShard],
        names: Mapping[Tensor, str],
        chosen: Mapping[str, str],
    ) -> None:
        self._check_classes("optimizers", self.optimizers)
        saved_names = {dotted(a, "weight"): dotted(b, "weight") for a, b in chosen.items()}
        for number, optimizer in enumerate(self.optimizers):
            saved = self.manifest.values["optimizers"][number]
            groups = from_json(saved["groups"], f"{self.path}: {saved['class']}")
            self.groups.append(groups)
            parameters = known_parameters(optimizer, names)
            if self.tables is None:
                self._check_groups(number, optimizer.param_groups, groups, names)
            for parameter in parameters:
                name = names[parameter]
                if self.tables is not None and name not in saved_names:
                    continue
                name_in_file = saved_names.get(name, name)
                state = dict(saved["state"].get(name_in_file, {}))
                prefix = f"optimizer.{number}.{name_in_file}."
                own = optimizer.state.get(parameter, {})
                for key in [key for key in self.manifest.shards if key.startswith(prefix)]:
                    part = key.removeprefix(prefix)
                    state[part] = own.get(part)
                    self._want_state(key, shards[name], name_in_file, state, part)
                self.states.append((optimizer, parameter, state))

    def _check_groups(
        self,
        number: int,
        groups: list[dict[str, Any]],
        saved: list[dict[str, Any]],
        names: Mapping[Tensor, str],
    ) -> None:
        got = [group["params"] for group in saved]
        expected = [[names[p] for p in group["params"]] for group in groups]
        if got != expected:
            raise self._error(
                f"optimizer {number} was saved with the parameters {got}, expected {expected}"
            )
        for group, saved_group in zip(groups, saved, strict=True):
            for key, value in saved_group.items():
                if key != "params" and not _alike(value, group.get(key)):
                    raise self._error(
                        f"optimizer {number} was saved with {key} {value!r}, expected a value such"
                        f" as {group[key]!r}"
                    )

    def _want_state(
        self, key: str, rows: LocalShard, name: str, state: dict[str, Any], part: str
    ) -> None:
        """Plan to read an optimizer's tensor into ``state[part]``."""
        first = self.manifest.shards[key][0]
        parameter = self.manifest.shards.get(name, [])
        by_row = bool(
            first.shape and parameter and first.order.num_rows == parameter[0].order.num_rows
        )
        # a tensor without a value per row is whole on each rank
        count = len(rows.tensor) if by_row else first.order.num_rows
        shape, dtype = (count, *first.shape[1:]) if first.shape else (), DTYPES[first.dtype]
        old = state[part]
        if not isinstance(old, Tensor) or old.shape != shape or old.dtype != dtype:
            # allocate only after the files have been checked
            old = torch.empty(shape, dtype=dtype, device="meta")
            self.missing.append((len(self.wanted), state, part, rows.tensor.device))
        state[part] = old
        self._want(key, rows.like(old, by_row), self.grow and by_row)

    def _want(self, name: str, shard: LocalShard, may_grow: bool) -> None:
        saved_shards = self.manifest.shards.get(name)
        if saved_shards is None:
            if not shard.order.num_rows:
                return
            raise self._error(f"has no {name!r}; is it a checkpoint of this model?")
        saved = saved_shards[0]
        got = (saved.order.num_rows, *saved.shape[1:], saved.dtype)
        expected = (shard.order.num_rows, *shard.tensor.shape[1:], dtype_name(shard.tensor.dtype))
        alike = got[1:-1] == expected[1:-1] and len(saved.shape) == shard.tensor.dim()
        fewer = saved.order.num_rows < shard.order.num_rows
        fits = alike and (got[0] == expected[0] or (fewer and may_grow))
        if not fits or (got[-1] != expected[-1] and not self.cast):
            hint = "; cast=True converts" if fits else ""
            if alike and fewer and not may_grow:
                hint = "; grow=True lets a table have more rows than were saved"
            raise self._error(
                f"table {shard.table!r}: {name!r} has rows, columns and dtype {got}, expected"
                f" {expected}{hint}"
            )
        self.wanted.append((name, shard))

    def check(self, verify: Verify) -> None:
        needed = {shard.file for name, _ in self.wanted for shard in self.manifest.shards[name]}
        files = [file for file in self.manifest.files if file in needed]
        rank, world_size = collectives.rank_and_size()
        share = files[rank * len(files) // world_size : (rank + 1) * len(files) // world_size]
        with _threads() as pool:
            list(pool.map(lambda file: self.manifest.check_file(file, verify), share))

    def read(self) -> None:
        make = torch.zeros if self.grow else torch.empty
        for place, state, part, device in self.missing:
            name, shard = self.wanted[place]
            state[part] = make(shard.tensor.shape, dtype=shard.tensor.dtype, device=device)
            self.wanted[place] = name, replace(shard, tensor=state[part])
        for scheduler, saved in zip(
            self.schedulers, self.manifest.values["schedulers"], strict=False
        ):
            state = from_json(saved["state"], f"{self.path}: {saved['class']}")
            self._restore(scheduler, state)
        tasks: dict[str, list[tuple[str, SavedShard, LocalShard]]] = {}
        for name, local in self.wanted:
            for saved_shard in self.manifest.shards[name]:
                if _common(saved_shard, local) != range(0):
                    tasks.setdefault(saved_shard.file, []).append((name, saved_shard, local))

        def read_file(file: str) -> None:
            with self.manifest.folder.open(file) as opened:
                layouts = self.manifest.layouts(file, opened)
                for name, saved_shard, local in tasks[file]:
                    _read(opened, layouts[name], saved_shard, local)

        with _threads() as pool:
            list(pool.map(read_file, tasks))

    def _restore(self, scheduler: Any, state: dict[str, Any]) -> None:
        before = scheduler.state_dict()
        # load_state_dict sets any name as an attribute, even `optimizer`
        foreign = [key for key in state if key not in before and hasattr(scheduler, key)]
        try:
            if foreign:
                raise ValueError(f"it would replace {foreign}")
            if any(not _alike(value, before.get(key)) for key, value in state.items()):
                raise TypeError("it has values of other types")
            scheduler.load_state_dict(state)
        except Exception as error:
            name = type(scheduler).__name__
            raise self._error(f"{name} does not take its saved state: {error!r}") from error

    def finish(self) -> dict[str, Any]:
        tables, values = tables_of(self.model), self.manifest.values
        for name, rows in self.rows.items():
            tables[name]._load_stored_rows(rows)
        for optimizer, parameter, state in self.states:
            optimizer.state.pop(parameter, None)
            if state:
                optimizer.state[parameter] = state
        if self.tables is None and self.optimizer_state:
            for name in self.rows:
                fused = values["tables"][name]["optimizer"]
                if fused is not None:
                    tables[name].set_learning_rate(fused["lr"])
            for optimizer, groups in zip(self.optimizers, self.groups, strict=False):
                for group, saved_group in zip(optimizer.param_groups, groups, strict=True):
                    _set_hyperparameters(group, saved_group)
        if self.generators:
            set_rng_state(self.generators)
        return self.state


def _threads() -> ThreadPoolExecutor:
    # reading and hashing release the interpreter's lock
    return ThreadPoolExecutor(max(2, torch.get_num_threads()))


def _alike(value: Any, own: Any) -> bool:
    """Whether a value from JSON can replace ``own``; None fits anything."""
    if value is None or own is None:
        return True
    if isinstance(own, list | tuple):
        # a scheduler's lists grow
        fits = type(value) is type(own) and (isinstance(own, list) or len(value) == len(own))
        return fits and all(map(_alike, value, own))
    if isinstance(own, bool) or isinstance(value, bool):
        return type(own) is type(value)
    if isinstance(own, Tensor):
        return isinstance(value, int | float) and abs(value) < 1e30
    if isinstance(own, int | float):
        return isinstance(value, int | float)
    return isinstance(value, dict if isinstance(own, dict) else type(own))


def _set_hyperparameters(group: dict[str, Any], saved: Mapping[str, Any]) -> None:
    for key, value in saved.items():
        if key == "params":
            continue
        if isinstance(group.get(key), Tensor):
            group[key].fill_(value)
        else:
            group[key] = value


def _common(saved: SavedShard, local: LocalShard) -> range | None:
    """Return the slots of both; None if they hold different ids."""
    if saved.order != local.order and (saved.order.permuted or local.order.permuted):
        return None
    ends = (saved.first + saved.length, local.first + length_of(local.tensor))
    return range(max(saved.first, local.first), min(ends))


def _read(file: BinaryIO, layout: Layout, saved: SavedShard, local: LocalShard) -> None:
    slots = _common(saved, local)
    if slots is None:
        _read_permuted(file, layout, saved, local)
    elif slots:
        start, stop = slots.start - local.first, slots.stop - local.first
        rows = local.tensor[start:stop] if local.tensor.dim() else local.tensor
        safetensors_io.read_rows(file, layout, slots.start - saved.first, rows)


def _read_permuted(file: BinaryIO, layout: Layout, saved: SavedShard, local: LocalShard) -> None:
    """As :func:`_read`, for another order or number of rows."""
    for start in range(0, saved.length, _READ_ROWS):
        stop = min(start + _READ_ROWS, saved.length)
        ids = saved.order.ids(torch.arange(saved.first + start, saved.first + stop))
        positions = local.order.slots(ids) - local.first
        own = ((positions >= 0) & (positions < len(local.tensor))).nonzero().squeeze(1)
        if len(own):
            rows = torch.empty(stop - start, *saved.shape[1:], dtype=layout.dtype)
            safetensors_io.read_rows(file, layout, start, rows)
            values = rows[own].to(local.tensor.device, local.tensor.dtype)
            local.tensor.index_copy_(0, positions[own].to(local.tensor.device), values)
