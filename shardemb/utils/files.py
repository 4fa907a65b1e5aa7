"""Files that are complete or absent, hashes of files, and UTF-8 text."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from shardemb.exceptions import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or folder; it replaces ``path`` if the block succeeds."""
    partial = path.with_name(path.name + ".tmp")
    remove(partial)
    try:
        yield partial
        for written in partial.rglob("*"):
            fsync(written)
        move(partial, path)
    except BaseException:  # Ctrl-C too
        remove(partial)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file whole, or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON whole, or not at all."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def move(source: Path, target: Path) -> None:
    """Rename within a folder, atomically, and sync the change to disk."""
    fsync(source)
    source.replace(target)
    fsync(target.parent)


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256_of(source: Path | BinaryIO) -> str:
    """Return a file's sha256 in hexadecimal."""
    if isinstance(source, Path):
        with source.open("rb", buffering=0) as file:
            return sha256_of(file)
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 22))
    source.seek(0)
    while size := source.readinto(buffer):  # type: ignore[attr-defined]
        digest.update(buffer[:size])
    return digest.hexdigest()


def cache_folder() -> Path:
    """Return this user's cache folder, which may not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardemb"


def read_text(path: Path) -> str:
    """Read UTF-8 text; ValueError for another encoding names file, line and byte."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        raise InputError(
            f"{path}, line {line}: got byte {byte:#04x}, expected UTF-8 text"
        ) from error


def fsync(path: Path) -> None:
    """Wait until a file, or a folder's list of entries, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
