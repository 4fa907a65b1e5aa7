"""Checkpoints: complete or invisible, loadable at any number of ranks, free of code.

A checkpoint is a folder ``step-N`` of safetensors files of at most 256 MiB and ``manifest.json``,
which lists their sizes, sha256, tensors and rows. The ranks write ``step-N.tmp``: files, fsync, a
vote of all ranks, the manifest, fsync. The rename to ``step-N`` makes it visible. In an object
store, which cannot rename, the manifest makes it visible.
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
