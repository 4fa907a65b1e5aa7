"""A checkpoint's manifest: its files, and which rows of which tensor each file holds.

Manifests are untrusted; :class:`Manifest` checks them against a schema.
"""

import hashlib
import json
import math
import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import torch

from shardemb.checkpoint import safetensors_io
from shardemb.checkpoint.safetensors_io import DTYPES, Layout
from shardemb.checkpoint.storage import Folder, Location, child, folder_at, name_of
from shardemb.exceptions import CheckpointError, InputError
from shardemb.sharding.placement import RowOrder
from shardemb.utils.files import sha256_of

FORMAT = "shardemb/3"  # sharded rows are in the order of their slots
MANIFEST = "manifest.json"
STEP = re.compile(r"step-([0-9]{10,})")
#: most rows of a table, most bytes of a file
_ROWS, _BYTES = 1 << 40, 1 << 44

Verify = Literal["sha256", "size"]

# The schema. A class, a pattern or a range (of ints) describes a value; float is any number within
# 1e30, object any JSON. [x] is a list, [x, n] a list of length n. In an object, "*" describes all
# other keys; without it, they are ignored. (x, y) also allows the value x.
_COUNT, _INT64 = range(_ROWS + 1), range(-(1 << 63), 1 << 63)
_PLAIN = {"*": object}
_FUNCTION = (None, {"name": (None, str), "kwargs": _PLAIN, "function": str})
_BASE64 = re.compile("[A-Za-z0-9+/]*={0,2}")
_GENERATORS = {
    "torch": _BASE64,
    "cuda": [_BASE64],
    "python": [object, 3],
    "numpy": {
        "bit_generator": re.compile("MT19937"),
        "state": {"key": [range(1 << 32), 624], "pos": range(625)},
        "has_gauss": range(2),
        "gauss": float,
    },
}
_TENSOR = {
    "first": _COUNT,
    "total": _COUNT,
    "sharded": bool,
    "shape": [range(_BYTES)],
    "dtype": re.compile("|".join(DTYPES)),
}
_TABLE = {
    "name": str,
    "max_id": _COUNT,
    "shape": [range(_BYTES)],
    "complex": bool,
    "normalizer": _FUNCTION,
    "optimizer": (None, {"name": str, "lr": float}),
    "stored": [str],
}
_FILE = {
    "file": re.compile(
        r"rank-[0-9]{5,}-of-[0-9]{5,}-[0-9]{5,}(-[0-9a-f]{8})?\.safetensors"  # no other folder
    ),
    "size": range(_BYTES),
    "sha256": re.compile("[0-9a-f]{64}"),
    "tensors": {"*": _TENSOR},
}
_MANIFEST = {
    "format": re.compile(FORMAT),
    "step": range(1 << 63),
    "time": str,
    "world_size": range(1, 1 << 20),
    "seed": (None, int),
    "fingerprints": {"*": str},
    "state": dict,
    "tables": {"*": _TABLE},
    "optimizers": [
        {"class": str, "groups": [{"params": [str], "*": object}], "state": {"*": _PLAIN}}
    ],
    "schedulers": [{"class": str, "state": dict}],
    "files": [_FILE],
    "rng": [({}, _GENERATORS)],  # {}: saved by save_rows
}


def check_schema(values: Any, where: str) -> None:
    """Raise CheckpointError, which names the key, unless ``values`` fit the schema."""
    _check(values, _MANIFEST, f"{where}manifest")


def _check(value: Any, schema: Any, where: str) -> None:
    if isinstance(schema, tuple):
        if value == schema[0] and type(value) is type(schema[0]):
            return
        schema = schema[1]
    if schema is object:
        known: dict[type, Any] = {int: _INT64, list: [object], dict: _PLAIN}
        schema = known.get(type(value), type(value))
    expected = getattr(schema, "__name__", type(schema).__name__)
    fits: Any = type(value) is (schema if isinstance(schema, type) else type(schema))
    if isinstance(schema, re.Pattern):
        expected, fits = schema.pattern, isinstance(value, str) and schema.fullmatch(value)
    elif isinstance(schema, range):
        expected = f"a whole number from {schema[0]} to {schema[-1]}"
        fits = type(value) is int and value in schema
    elif schema is float:
        fits = type(value) in (int, float) and abs(value) < 1e30
    elif isinstance(schema, list):
        expected, fits = f"list of {schema[1:]}", fits and schema[1:] in ([], [len(value)])
    if not fits:
        raise CheckpointError(f"{where}: got {reprlib.repr(value)}, expected {expected}")
    if isinstance(schema, list):
        for number, entry in enumerate(value):
            _check(entry, schema[0], f"{where}[{number}]")
    elif isinstance(schema, dict):
        for key in [*schema, *value] if "*" in schema else schema:
            if key != "*" or key in value:
                if key not in value:
                    raise CheckpointError(f"{where}: got no {key!r}, expected one")
                _check(value[key], schema.get(key, schema.get("*")), f"{where}.{key[:80]}")


@dataclass(frozen=True)
class SavedShard:
    """Rows of a tensor in a file."""

    file: str
    #: slot of its first row
    first: int
    #: order of the whole tensor's rows
    order: RowOrder
    shape: tuple[int, ...]
    #: torch's name
    dtype: str

    @property
    def length(self) -> int:
        """Number of rows; 1 for a scalar."""
        return self.shape[0] if self.shape else 1


class Manifest:
    """A checkpoint's manifest, checked against its hash and the schema.

    Args:
        path: the checkpoint.

    Attributes:
        values: the whole manifest.
        digest: its sha256.
        files: file, size, sha256 and tensors, by file.
        shards: saved shards, by tensor.

    Raises:
        CheckpointError: it is missing, damaged, inconsistent or of another format, or names a file
            outside of the folder.
    """

    def __init__(self, path: Location) -> None:
        self.path, self.folder = path, folder_at(path)
        where = child(path, MANIFEST)
        if self.folder.size(MANIFEST) is None:
            raise CheckpointError(f"{where}: missing, so {path} is no complete checkpoint")
        try:
            document = safetensors_io.parse_json(self.folder.read(MANIFEST))
            values, self.digest = document["manifest"], document["sha256"]
            body = json.dumps(values, sort_keys=True)
            if hashlib.sha256(body.encode()).hexdigest() != self.digest:
                raise CheckpointError(f"{where}: was changed after it was written (another sha256)")
            check_schema(values, f"{where}: ")
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{where}: got text that is not a manifest ({error})") from error
        self.values: dict[str, Any] = values
        step = STEP.fullmatch(name_of(path))
        if step and int(step[1]) != values["step"]:
            raise CheckpointError(
                f"{where}: is of step {values['step']}, expected that of its folder: it belongs to"
                " another checkpoint"
            )
        self.files: dict[str, dict[str, Any]] = {entry["file"]: entry for entry in values["files"]}
        self.shards: dict[str, list[SavedShard]] = {}
        for file, entry in self.files.items():
            for tensor, saved in entry["tensors"].items():
                try:
                    order = RowOrder(saved["total"], saved["sharded"])
                except InputError as error:
                    raise CheckpointError(f"{where}: {tensor!r}: {error}") from error
                shape = tuple(saved["shape"])
                shard = SavedShard(file, saved["first"], order, shape, saved["dtype"])
                self.shards.setdefault(tensor, []).append(shard)
        problem = next(self._contradictions(), None)
        if problem:
            raise CheckpointError(f"{where}: contradicts itself: {problem}")

    def _contradictions(self) -> Iterator[str]:
        if len(self.files) < len(self.values["files"]):
            yield "it names a file twice"
        if len(self.values["rng"]) != self.values["world_size"]:
            yield f"random generators of {len(self.values['rng'])} ranks, expected world_size"
        space = {file: entry["size"] for file, entry in self.files.items()}
        for tensor, shards in self.shards.items():
            alike = {(s.order, len(s.shape), s.shape[1:], s.dtype) for s in shards}
            if len(alike) > 1:
                yield f"shards of {tensor!r} differ: {sorted(map(str, alike))[:2]}"
            for shard in shards:
                # an empty tensor's columns count too
                size = DTYPES[shard.dtype].itemsize * math.prod(n or 1 for n in shard.shape[:1])
                space[shard.file] -= size * math.prod(shard.shape[1:])
                if space[shard.file] < 0 or shard.first + shard.length > shard.order.num_rows:
                    yield f"{tensor!r} of shape {shard.shape} does not fit {shard.file}"
        for prefix, table in self.values["tables"].items():
            weight = self.shards.get(f"{prefix}.weight" if prefix else "weight")
            if weight is None and table["max_id"]:
                yield f"no rows of table {prefix!r}"
            columns = math.prod(table["shape"]) * (2 if table["complex"] else 1)
            if columns > _BYTES:
                yield f"table {prefix!r} has {columns} columns"
            for shard in weight or ():
                if (shard.order.num_rows, *shard.shape[1:]) != (table["max_id"], columns):
                    yield f"table {prefix!r} has rows of shape {shard.shape}, expected {columns}"
                dtype = DTYPES[shard.dtype]
                if not dtype.is_floating_point or (table["complex"] and dtype == torch.bfloat16):
                    yield f"table {prefix!r} has rows of {shard.dtype}"

    def holds(self, file: str) -> str:
        """Name the tensors of a file, for errors."""
        return ", ".join(self.files[file]["tensors"])

    def check_covered(self, name: str) -> None:
        """Raise CheckpointError unless the shards hold each row of a tensor once."""
        covered = 0
        for shard in sorted(self.shards[name], key=lambda shard: (shard.first, shard.length)):
            if shard.first != covered:
                break
            covered += shard.length
        total = self.shards[name][0].order.num_rows
        if covered != total:
            raise CheckpointError(
                f"{self.path}: {name!r} has the rows 0 to {covered} without a gap, expected {total}"
            )

    def check_file(self, file: str, verify: Verify = "sha256") -> None:
        """Raise CheckpointError if a file's size, or its sha256, is wrong."""
        entry, where = self.files[file], child(self.path, file)
        holds, size = f"it holds {self.holds(file)}", self.folder.size(file)
        if size is None:
            raise CheckpointError(f"{where}: missing; {holds}")
        if size != entry["size"]:
            raise CheckpointError(f"{where}: got {size} bytes, expected {entry['size']}; {holds}")
        if verify == "sha256":
            with self.folder.open(file) as opened:
                digest = sha256_of(opened)
            if digest != entry["sha256"]:
                raise CheckpointError(f"{where}: is damaged (another sha256); {holds}")

    def layouts(self, file: str, opened: BinaryIO) -> dict[str, Layout]:
        """Read a file's header; CheckpointError if it differs from the manifest."""
        where = child(self.path, file)
        try:
            layouts = safetensors_io.layouts(opened)
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}; it holds {self.holds(file)}") from error
        for name, saved in self.files[file]["tensors"].items():
            layout, expected = layouts.get(name), (saved["shape"], saved["dtype"])
            got = layout and (list(layout.shape), dtype_name(layout.dtype))
            if got != expected:
                raise CheckpointError(f"{where}: got {name!r} as {got}, expected {expected}")
        return layouts


def verify(path: Location, how: Verify = "sha256") -> Manifest:
    """Check a whole checkpoint: manifest, files, hashes, headers, and that no row is missing.

    Args:
        path: the checkpoint.
        how: "sha256" reads all files, "size" checks only their sizes.

    Raises:
        CheckpointError: the first fault; names file and tensors.
    """
    manifest = Manifest(path)
    for name in manifest.shards:
        manifest.check_covered(name)
    for file in manifest.files:
        manifest.check_file(file, how)
        with manifest.folder.open(file) as opened:
            manifest.layouts(file, opened)
    return manifest


def finished(root: Folder) -> list[str]:
    """Return the names of a folder's finished checkpoints, oldest first."""
    names = [name for name in root.names() if STEP.fullmatch(name)]
    if not root.renames:
        names = [name for name in names if root.child(name).size(MANIFEST) is not None]
    return sorted(names, key=lambda name: int(name.removeprefix("step-")))


def checkpoints(folder: Location) -> list[Location]:
    """Return a folder's finished checkpoints, oldest first: paths, or URIs for a URI."""
    return [child(folder, name) for name in finished(folder_at(folder))]


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")
