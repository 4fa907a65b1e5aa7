"""What a checkpoint says of itself.

Its files, and which rows of which tensor lie where, all of it to be verified.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import torch

from shardemb.checkpoint import safetensors_io
from shardemb.checkpoint.safetensors_io import Layout
from shardemb.checkpoint.storage import Folder, Location, child, folder_at, name_of
from shardemb.exceptions import CheckpointError

FORMAT = "shardemb/3"  # rows of several ranks are in the order of their slots
MANIFEST = "manifest.json"
STEP = re.compile(r"step-(\d{10,})")
_FILE = re.compile(r"rank-\d{5,}-of-\d{5,}-\d{5,}(-[0-9a-f]{8})?\.safetensors")

Verify = Literal["sha256", "size"]


@dataclass(frozen=True)
class SavedShard:
    """Rows of a tensor in a file."""

    file: str
    #: first row of the whole tensor's
    first: int
    #: rows of the whole tensor
    total: int
    #: whether the rows are in the order of slots, or of ids
    sharded: bool
    shape: tuple[int, ...]
    dtype: str

    @property
    def length(self) -> int:
        """Rows, or 1 for a scalar."""
        return self.shape[0] if self.shape else 1


class Manifest:
    """What a checkpoint says of itself, checked against its own hash.

    Args:
        path: of the checkpoint.

    Raises:
        CheckpointError: it is missing, damaged, changed, of another format, or names a file outside
            of the folder.
    """

    def __init__(self, path: Location) -> None:
        self.path, self.folder = path, folder_at(path)
        where = child(path, MANIFEST)
        if self.folder.size(MANIFEST) is None:
            raise CheckpointError(f"{where}: missing, so {path} is no complete checkpoint")
        try:
            document = json.loads(self.folder.read(MANIFEST).decode())
            values, self.digest = document["manifest"], document["sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{where}: got text that is not a manifest ({error})") from error
        if hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest() != self.digest:
            raise CheckpointError(
                f"{where}: was changed after it was written (its sha256 does not match)"
            )
        if values.get("format") != FORMAT:
            raise CheckpointError(
                f"{where}: got format {values.get('format')!r}, expected {FORMAT!r}"
            )
        self.values: dict[str, Any] = values
        name = name_of(path)
        if STEP.fullmatch(name) and int(name.removeprefix("step-")) != values["step"]:
            raise CheckpointError(
                f"{where}: is of step {values['step']}, but lies in {name}: it is another"
                " checkpoint's"
            )
        #: file, size, sha256, tensors
        self.files: dict[str, dict[str, Any]] = {}
        self.parts: dict[str, list[SavedShard]] = {}
        for entry in values["files"]:
            if not _FILE.fullmatch(entry["file"]):
                raise CheckpointError(
                    f"{where}: got file name {entry['file']!r}, expected rank-R-of-W-N.safetensors,"
                    " which lies in the folder"
                )
            self.files[entry["file"]] = entry
            for tensor, saved in entry["tensors"].items():
                part = SavedShard(
                    entry["file"],
                    saved["first"],
                    saved["total"],
                    saved["sharded"],
                    tuple(saved["shape"]),
                    saved["dtype"],
                )
                self.parts.setdefault(tensor, []).append(part)

    def holds(self, file: str) -> str:
        """Say what a file holds, for errors."""
        return ", ".join(self.files[file]["tensors"])

    def check_covered(self, name: str) -> None:
        """Raise CheckpointError unless the parts of a tensor are its rows, each once."""
        at = 0
        for part in sorted(self.parts[name], key=lambda part: (part.first, part.length)):
            if part.first != at:
                break
            at += part.length
        total = self.parts[name][0].total
        if at != total:
            raise CheckpointError(
                f"{self.path}: {name!r} has the rows 0 to {at} without a gap, expected {total}"
            )

    def check_file(self, file: str, verify: Verify = "sha256") -> None:
        """Raise CheckpointError unless a file is there, has its size and, with "sha256".

        Holds what was written.
        """
        entry, where = self.files[file], child(self.path, file)
        size = self.folder.size(file)
        if size is None:
            raise CheckpointError(f"{where}: missing; it holds {self.holds(file)}")
        if size != entry["size"]:
            raise CheckpointError(
                f"{where}: got {size} bytes, expected {entry['size']}; it holds {self.holds(file)}"
            )
        if verify == "sha256":
            with self.folder.open(file) as opened:
                digest = safetensors_io.sha256_of(opened)
            if digest != entry["sha256"]:
                raise CheckpointError(
                    f"{where}: is damaged (its sha256 does not match); it holds {self.holds(file)}"
                )

    def layouts(self, file: str, opened: BinaryIO) -> dict[str, Layout]:
        """Return where the tensors of a file lie.

        CheckpointError if they are not those of the manifest.
        """
        where = child(self.path, file)
        try:
            found = safetensors_io.layouts(opened)
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}; it holds {self.holds(file)}") from error
        for name, saved in self.files[file]["tensors"].items():
            layout = found.get(name)
            got = None if layout is None else (list(layout.shape), dtype_name(layout.dtype))
            if got != (saved["shape"], saved["dtype"]):
                raise CheckpointError(
                    f"{where}: got {name!r} as {got}, expected {saved['shape'], saved['dtype']}"
                )
        return found


def verify(path: Location, how: Verify = "sha256") -> Manifest:
    """Check all of a checkpoint: manifest, files, hashes, headers, and that no row is missing.

    Args:
        path: of the checkpoint.
        how: "sha256", or "size" for the sizes alone.

    Returns:
        Its manifest.

    Raises:
        CheckpointError: the first fault; names file and tensors.
    """
    manifest = Manifest(path)
    for name in manifest.parts:
        manifest.check_covered(name)
    for file in manifest.files:
        manifest.check_file(file, how)
        with manifest.folder.open(file) as opened:
            manifest.layouts(file, opened)
    return manifest


def finished(root: Folder) -> list[str]:
    """Return the names of the finished checkpoints in a folder, oldest first."""
    names = [name for name in root.names() if STEP.fullmatch(name)]
    found = (
        names
        if root.renames
        else [name for name in names if root.child(name).size(MANIFEST) is not None]
    )
    return sorted(found, key=lambda name: int(name.removeprefix("step-")))


def checkpoints(folder: Location) -> list[Location]:
    """Return the finished checkpoints in a folder, oldest first.

    Paths if it is one, URIs otherwise.
    """
    return [child(folder, name) for name in finished(folder_at(folder))]


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")
