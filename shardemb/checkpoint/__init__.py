"""Checkpoints: complete or invisible, loadable at any number of ranks, free of code.

A checkpoint is a folder ``step-N`` of safetensors files of at most 256 MiB and ``manifest.json``,
which gives each file's size, sha256, tensors and global rows. The ranks write ``step-N.tmp``:
files, fsync, a vote of all ranks, the manifest, fsync. The rename to ``step-N`` makes it visible.
Object stores cannot rename: there the manifest is written last, and a folder without one is no
checkpoint. Only the newest checkpoints are kept.
"""

from typing import TYPE_CHECKING

from shardemb.exceptions import CheckpointError
from shardemb.utils.lazy import lazy_names

if TYPE_CHECKING:
    from shardemb.checkpoint.manifest import Manifest, checkpoints, verify
    from shardemb.checkpoint.reader import load
    from shardemb.checkpoint.writer import AsyncSaver, require_space, save, save_rows

__all__ = [
    "AsyncSaver",
    "CheckpointError",
    "Manifest",
    "checkpoints",
    "load",
    "require_space",
    "save",
    "save_rows",
    "verify",
]

_MODULES = {
    **dict.fromkeys(("Manifest", "checkpoints", "verify"), "manifest"),
    **dict.fromkeys(("AsyncSaver", "require_space", "save", "save_rows"), "writer"),
    "load": "reader",
}

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
