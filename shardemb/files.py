"""Files that are whole or not there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside ``path`` for a file or folder; it takes the place of ``path`` once the block has ended well."""
    partial = path.with_name(path.name + ".tmp")
    _remove(partial)
    try:
        yield partial
        for written in [*partial.rglob("*"), partial]:
            fsync(written)
        partial.replace(path)
        fsync(path.parent)
    except BaseException:  # Ctrl-C too
        _remove(partial)
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
