"""Loads checkpoints into tables of any number of ranks.

:mod:`shardemb.checkpoint` says what they are.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from shardemb.checkpoint import safetensors_io
from shardemb.checkpoint.manifest import Manifest, SavedShard, Verify, dtype_name
from shardemb.checkpoint.safetensors_io import Layout
from shardemb.checkpoint.shards import LocalShard, dotted, model_pieces, set_rng_state, tables_of
from shardemb.checkpoint.storage import Location
from shardemb.comm import collectives
from shardemb.embedding import Embedding
from shardemb.exceptions import CheckpointError
from shardemb.sharding.placement import RowOrder

#: rows that are read at a time where their order changes
_READ_ROWS = 1 << 16


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

    The ranks share the work of checking the files; then each reads its own rows, straight into the
    tables. Nothing of the model changes unless all of it is there and undamaged. With optimizers or
    schedulers, which is how training goes on, the random generators go on too, if the number of
    ranks is that of the checkpoint.

    Args:
        path: of the checkpoint.
        model: with the tables, shapes and dtypes of the one that was saved.
        optimizers: as were saved; their hyper-parameters and their state for this rank's rows are
            put back. None for the parameters alone.
        schedulers: as were saved; their state is put back.
        tables: load these tables of the model alone, by their names in the model (an Embedding on
            its own is ""); or a mapping of these to names in the checkpoint.
        optimizer_state: False loads rows alone, also without the state of a fused optimizer.
        cast: let the rows be converted into the tables' dtype.
        grow: let tables have more rows than were saved: ids keep their rows, new ones stay as they
            are initialized.
        fingerprints: must be equal to those of the same names that were saved.
        verify: "sha256" checks the hash of every file that is read; "size" only its size.

    Returns:
        The ``state`` that was saved.

    Raises:
        CheckpointError: a missing, damaged or foreign file; a table that is not there or has
            another shape or dtype; other optimizers, schedulers or fingerprints. On all ranks.
    """
    job = _Load(
        path, model, list(optimizers), list(schedulers), tables, optimizer_state, cast, grow
    )
    for stage in (lambda: job.plan(fingerprints or {}), lambda: job.check(verify), job.read):
        error: str | None = None
        try:
            stage()
        except CheckpointError as failure:
            error = str(failure)
        except (OSError, EOFError) as failure:
            error = f"{path}: {type(failure).__name__}: {failure}"
        told = collectives.gather((error, job.digest), operation="a checkpoint's vote")
        bad = [text for text, _ in told if text is not None]
        if bad:
            raise CheckpointError(bad[0])
        if len({digest for _, digest in told}) > 1:
            raise CheckpointError(
                f"{path}: ranks see different checkpoints there, by the sha256 of the manifest:"
                f" {told}"
            )
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
        self.path, self.model, self.optimizers, self.schedulers = (
            path,
            model,
            optimizers,
            schedulers,
        )
        self.tables = (
            tables
            if tables is None or isinstance(tables, Mapping)
            else {name: name for name in tables}
        )
        self.optimizer_state, self.cast, self.grow = optimizer_state, cast, grow
        self.digest = ""
        #: name in the checkpoint, and where its rows go
        self.wanted: list[tuple[str, LocalShard]] = []
        #: of each table that is loaded
        self.rows: dict[str, dict[str, Tensor]] = {}
        #: what an optimizer shall keep for a parameter
        self.states: list[tuple[torch.optim.Optimizer, Tensor, dict[str, Any]]] = []

    def plan(self, fingerprints: Mapping[str, str]) -> None:
        """Find out what goes where, and whether it fits; nothing is changed."""
        here = tables_of(self.model)
        try:
            self.manifest = Manifest(self.path)
        except CheckpointError as error:
            wanted = ", ".join(repr(table.name) for table in here.values())
            raise CheckpointError(
                f"{error}; wanted for {f'table {wanted}' if wanted else 'a model without tables'}"
            ) from error
        self.digest, values = self.manifest.digest, self.manifest.values
        for name, expected in fingerprints.items():
            got = values["fingerprints"].get(name)
            if got is not None and got != expected:
                raise CheckpointError(
                    f"{self.path}: got {name} of fingerprint {got}, expected {expected}: it is of"
                    " other data"
                )
        pieces, names, kept = model_pieces(self.model)
        if self.tables is not None:
            for mine, saved in self.tables.items():
                if mine not in here or saved not in values["tables"]:
                    raise CheckpointError(
                        f"{self.path}: got table {mine!r} to load from {saved!r}, expected one of"
                        f" {sorted(here)} from one of {sorted(values['tables'])}"
                    )
        chosen = {name: name for name in here} if self.tables is None else self.tables
        in_tables: set[str] = set()
        for mine, table in here.items():
            stored = kept[mine]
            in_tables |= {dotted(mine, key) for key in stored}
            if mine not in chosen:
                continue
            saved = chosen[mine]
            self._check_fused(table, saved)
            self.rows[mine] = {
                key: stored[key] for key in stored if key == "weight" or self.optimizer_state
            }
            for key in self.rows[mine]:
                self._want(dotted(saved, key), pieces[dotted(mine, key)], self.grow)
        if self.tables is None:
            rest = pieces.keys() - in_tables
            for name in sorted(rest):
                self._want(name, pieces[name], False)
            fused = {
                dotted(t, key) for t, told in values["tables"].items() for key in told["stored"]
            }
            unused = [
                n
                for n in self.manifest.parts
                if not n.startswith("optimizer.") and n not in rest | in_tables | fused
            ]
            unused += [dotted(t, "weight") for t in values["tables"] if t not in here]
            if unused:
                raise CheckpointError(
                    f"{self.path}: holds {unused}, which the model has not: name the tables to"
                    f" load, tables={sorted(here)}"
                )
        if self.optimizer_state and self.optimizers:
            self._plan_optimizers(pieces, names, chosen)
        saved_with, given = (
            [s["class"] for s in values["schedulers"]],
            [type(s).__name__ for s in self.schedulers],
        )
        if self.schedulers and saved_with != given:
            raise CheckpointError(
                f"{self.path}: was saved with schedulers {saved_with}, expected {given}"
            )
        for name in {name for name, _ in self.wanted}:
            self.manifest.check_covered(name)

    def _check_fused(self, table: Embedding, saved: str) -> None:
        told = self.manifest.values["tables"].get(saved)
        if told is None:
            raise CheckpointError(
                f"{self.path}: has no table {saved!r}, expected by the model; it has"
                f" {self._described()}"
            )
        got, expected = told["optimizer"], table._fused_hyperparameters()
        same = (got and got["name"]) == (expected and expected["name"])
        if self.optimizer_state and not same:
            raise CheckpointError(
                f"{self.path}: table {table.name!r} was saved with the fused optimizer {got},"
                f" expected {expected}: load the rows alone with optimizer_state=False"
            )

    def _described(self) -> str:
        return (
            ", ".join(
                f"{name!r} ({told['name']})"
                for name, told in self.manifest.values["tables"].items()
            )
            or "none"
        )

    def _plan_optimizers(
        self,
        pieces: Mapping[str, LocalShard],
        names: Mapping[Tensor, str],
        chosen: Mapping[str, str],
    ) -> None:
        saved = self.manifest.values["optimizers"]
        got, expected = (
            [o["class"] for o in saved],
            [type(optimizer).__name__ for optimizer in self.optimizers],
        )
        if got != expected:
            raise CheckpointError(
                f"{self.path}: was saved with optimizers {got}, expected {expected}"
            )
        renamed = {
            dotted(mine, "weight"): dotted(other, "weight") for mine, other in chosen.items()
        }
        for number, (optimizer, told) in enumerate(zip(self.optimizers, saved, strict=True)):
            mine = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
            theirs = [group["params"] for group in told["groups"]]
            if self.tables is None and mine != theirs:
                raise CheckpointError(
                    f"{self.path}: optimizer {number} was saved with the parameters {theirs},"
                    f" expected {mine}"
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
                    old = (
                        optimizer.state[parameter].get(part)
                        if parameter in optimizer.state
                        else None
                    )
                    shape = [len(rows.tensor), *first.shape[1:]] if by_row else list(first.shape)
                    dtype = getattr(torch, first.dtype)
                    if (
                        not isinstance(old, Tensor)
                        or list(old.shape) != shape
                        or old.dtype != dtype
                    ):
                        make = torch.zeros if self.grow else torch.empty
                        old = make(shape, dtype=dtype, device=rows.tensor.device)
                    new[part] = old
                    self._want(key, rows.like(old, by_row), self.grow and by_row)
                self.states.append((optimizer, parameter, new))

    def _rows_saved(self, name: str) -> int:
        return self.manifest.parts[name][0].total if name in self.manifest.parts else -1

    def _want(self, name: str, piece: LocalShard, may_grow: bool) -> None:
        parts = self.manifest.parts.get(name)
        if parts is None:
            if not piece.total:
                return
            raise CheckpointError(
                f"{self.path}: has no {name!r}; is it a checkpoint of this model?"
            )
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
            fits = (got[0] == expected[0] or (may_grow and got[0] < expected[0])) and got[
                1:-1
            ] == expected[1:-1]
            if not fits or (got[-1] != expected[-1] and not self.cast):
                raise CheckpointError(
                    f"{self.path}: table {piece.table!r}: {name!r} has rows, columns and dtype"
                    f" {got}, expected {expected}{hint}"
                )
        self.wanted.append((name, piece))

    def check(self, verify: Verify) -> None:
        """Check this rank's share of the files that any rank reads."""
        read = {part.file for name, _ in self.wanted for part in self.manifest.parts[name]}
        files = [file for file in self.manifest.files if file in read]
        rank, world_size = collectives.rank_and_size()
        mine = files[rank * len(files) // world_size : (rank + 1) * len(files) // world_size]
        with ThreadPoolExecutor(
            max(2, torch.get_num_threads())
        ) as pool:  # neither disk nor hashing holds the interpreter
            list(pool.map(lambda file: self.manifest.check_file(file, verify), mine))

    def read(self) -> None:
        """Read the rows of this rank."""
        tasks: dict[str, list[tuple[str, SavedShard, LocalShard]]] = {}
        for name, piece in self.wanted:
            for part in self.manifest.parts[name]:
                if not _apart(part, piece):
                    tasks.setdefault(part.file, []).append((name, part, piece))

        def read(file: str) -> None:
            with self.manifest.folder.open(file) as opened:
                layouts = self.manifest.layouts(file, opened)
                for name, part, piece in tasks[file]:
                    _read(opened, layouts[name], part, piece)

        with ThreadPoolExecutor(max(2, torch.get_num_threads())) as pool:
            list(pool.map(read, tasks))

    def finish(self) -> dict[str, Any]:
        """Let tables and optimizers know what was read."""
        tables, values = tables_of(self.model), self.manifest.values
        for name, rows in self.rows.items():
            tables[name]._load_stored_rows(rows)
        for optimizer, parameter, new in self.states:
            optimizer.state.pop(parameter, None)
            if new:
                optimizer.state[parameter] = new
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
        rank, world_size = collectives.rank_and_size()
        if (
            (self.optimizers or self.schedulers)
            and values["rng"][0]
            and world_size == values["world_size"]
        ):
            set_rng_state(values["rng"][rank])
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


def _apart(part: SavedShard, piece: LocalShard) -> bool:
    """Whether it is sure that a part has no row of a piece."""
    if not piece.tensor.dim() or part.sharded != piece.sharded or part.total != piece.total:
        return False
    return part.first >= piece.first + len(piece.tensor) or part.first + part.length <= piece.first


def _read(file: BinaryIO, layout: Layout, part: SavedShard, piece: LocalShard) -> None:
    """Fill a piece in place with the rows of it that a part has."""
    if not piece.tensor.dim():
        safetensors_io.read_rows(file, layout, 0, piece.tensor)
    elif part.sharded == piece.sharded and (part.total == piece.total or not part.sharded):
        low, high = piece.first, piece.first + len(piece.tensor)
        start, stop = max(low, part.first), min(high, part.first + part.length)
        if start < stop:
            safetensors_io.read_rows(
                file, layout, start - part.first, piece.tensor[start - low : stop - low]
            )
    else:
        _read_in_another_order(file, layout, part, piece)


def _read_in_another_order(
    file: BinaryIO, layout: Layout, part: SavedShard, piece: LocalShard
) -> None:
    """Fill a piece with rows whose order is another.

    By slot where it is by id, or of a table with fewer rows.
    """
    for start in range(0, part.length, _READ_ROWS):
        stop = min(start + _READ_ROWS, part.length)
        ids = torch.arange(part.first + start, part.first + stop)
        if part.sharded:
            ids = RowOrder(part.total, True).ids(ids)
        places = piece.places(ids)
        here = ((places >= 0) & (places < len(piece.tensor))).nonzero().squeeze(1)
        if len(here):
            rows = torch.empty(stop - start, *part.shape[1:], dtype=layout.dtype)
            safetensors_io.read_rows(file, layout, start, rows)
            values = rows[here].to(piece.tensor.device, piece.tensor.dtype)
            piece.tensor.index_copy_(0, places[here].to(piece.tensor.device), values)
