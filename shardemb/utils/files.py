"""Files that are whole or not there, and text that is UTF-8 or refused."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shardemb.exceptions import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside ``path`` for a file or folder.

    It takes the place of ``path`` once the block has ended well.
    """
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


def cache_folder() -> Path:
    """Return this user's folder for what can be made again; it may not be there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardemb"


def read_text(path: Path) -> str:
    """Read UTF-8 text, with or without a byte-order mark.

    Raises:
        OSError: the file cannot be opened.
        ValueError: another encoding; names file, line and byte.
    """
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        raise InputError(
            f"{path}, line {line}: got byte {byte:#04x}, expected UTF-8 text"
        ) from error


def fsync(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
