"""Checkpoints: complete or invisible, at any number of ranks, without code in the files.

A checkpoint is a folder ``step-N`` of safetensors files of at most 256 MiB, and ``manifest.json``,
which names each file with its size and sha256, and each tensor in it with the global rows that it
holds. It is written as ``step-N.tmp``: files, fsync, a vote of all ranks, the manifest, fsync, and
then the rename that makes it visible. Where a folder cannot be renamed at once, in an object store,
the manifest comes last, and there is no checkpoint without one. The newest ones are kept.
"""

from typing import TYPE_CHECKING

from shardemb.exceptions import CheckpointError
from shardemb.utils.lazy import lazy_names

if TYPE_CHECKING:
    from shardemb.checkpoint.manifest import Manifest, checkpoints, verify
    from shardemb.checkpoint.reader import load
    from shardemb.checkpoint.writer import AsyncSaver, require_room, save, save_rows

__all__ = [
    "AsyncSaver",
    "CheckpointError",
    "Manifest",
    "checkpoints",
    "load",
    "require_room",
    "save",
    "save_rows",
    "verify",
]

_MODULES = {
    "AsyncSaver": "writer",
    "Manifest": "manifest",
    "checkpoints": "manifest",
    "load": "reader",
    "require_room": "writer",
    "save": "writer",
    "save_rows": "writer",
    "verify": "manifest",
}

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
