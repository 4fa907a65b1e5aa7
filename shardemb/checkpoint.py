"""Checkpoints: complete or invisible, at any number of ranks, without code in the files.

A checkpoint is a folder ``step-N`` of safetensors files of at most 256 MiB, and ``manifest.json``, which names each file with
its size and sha256, and each tensor in it with the global rows that it holds. It is written as ``step-N.tmp``: files, fsync, a
vote of all ranks, the manifest, fsync, and then the rename that makes it visible. Where a folder cannot be renamed at once, in
an object store, the manifest comes last, and there is no checkpoint without one. The newest ones are kept.
"""

from shardemb.loading import load
from shardemb.manifest import CheckpointError, Manifest, checkpoints, verify
from shardemb.saving import AsyncSaver, require_room, save, save_rows

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
