"""Folders of checkpoints, on a local file system or in an object store.

A location with "://" is one of pyarrow's file systems (``s3://``, ``gs://``, ``abfss://``,
``hdfs://``; options in the query, such as ``?region=`` or ``?endpoint_override=``) or else one of
fsspec's. Any other location is a local path.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from shardemb.exceptions import InputError
from shardemb.utils.files import fsync, move, remove

#: a local path or a URI
Location = str | Path


def is_remote(location: Location) -> bool:
    """Whether a location is a URI of a remote file system."""
    return "://" in str(location) and not str(location).startswith("file://")


def child(location: Location, name: str) -> Location:
    """Return the location of a folder's entry."""
    if not is_remote(location):
        return _local(location) / name
    path, mark, query = str(location).partition("?")
    return f"{path.rstrip('/')}/{name}{mark}{query}"


def name_of(location: Location) -> str:
    """Return the last part of a location."""
    path = str(location)
    return Path(path.partition("?")[0] if is_remote(path) else path).name


def _local(location: Location) -> Path:
    return Path(str(location).removeprefix("file://"))


def folder_at(location: Location) -> "Folder":
    """Return the folder at a location, which need not exist; ValueError for an unknown URI."""
    return _ObjectFolder(str(location)) if is_remote(location) else Folder(_local(location))


class Folder:
    """A local folder whose files are written once, by one process."""

    #: whether folders can be renamed atomically
    renames = True

    def __init__(self, path: Any) -> None:
        self._path = path

    def child(self, name: str) -> "Folder":
        """Return a folder in this one; it need not exist."""
        return Folder(self._path / name)

    def names(self) -> list[str]:
        """Return the sorted names of the entries; empty for a missing folder."""
        return sorted(os.listdir(self._path)) if self._path.is_dir() else []  # noqa: PTH208

    def size(self, name: str) -> int | None:
        """Return a file's bytes; None for a missing file."""
        path = self._path / name
        return path.stat().st_size if path.is_file() else None

    @contextmanager
    def create(self, name: str) -> Iterator[Any]:
        """Open a new file; the context syncs it to disk."""
        with (self._path / name).open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def open(self, name: str) -> BinaryIO:
        """Open a file for random reads."""
        file = (self._path / name).open("rb", buffering=0)
        with suppress(OSError, AttributeError):  # read ahead while hashing
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        return file

    def read(self, name: str) -> bytes:
        """Return a file's content."""
        with self.open(name) as file:
            return file.read()

    def make(self) -> None:
        """Make the folder."""
        self._path.mkdir(parents=True, exist_ok=True)

    def remove(self, name: str) -> None:
        """Remove an entry and its content, if it exists."""
        remove(self._path / name)

    def rename(self, name: str, new: str) -> None:
        """Rename an entry atomically and sync the change to disk."""
        move(self._path / name, self._path / new)
        fsync(self._path.parent)  # this folder may be new too

    def free_bytes(self) -> int | None:
        """Return the bytes that can be written; None if unknown."""
        folders = (self._path, *self._path.absolute().parents)
        return shutil.disk_usage(next(path for path in folders if path.exists())).free


class _ObjectFolder(Folder):
    """A folder in an object store, which syncs each file and cannot rename."""

    renames = False

    def __init__(self, uri: str) -> None:
        from pyarrow import ArrowInvalid, fs

        try:
            try:
                self._fs, self._path = fs.FileSystem.from_uri(uri)
            except ArrowInvalid as error:
                if "nrecognized filesystem" not in str(error):
                    raise
                self._fs, self._path = fs.FileSystem.from_uri(f"fsspec+{uri}")
        except (ArrowInvalid, ImportError, ValueError) as error:
            raise InputError(
                f"got location {uri!r}, expected a local path or a URI of a file system that"
                f" pyarrow or fsspec knows ({error})"
            ) from error

    def child(self, name: str) -> Folder:
        child = object.__new__(_ObjectFolder)
        child._fs, child._path = self._fs, f"{self._path}/{name}"
        return child

    def names(self) -> list[str]:
        from pyarrow import fs

        infos = self._fs.get_file_info(fs.FileSelector(self._path, allow_not_found=True))
        return sorted(info.base_name for info in infos)

    def size(self, name: str) -> int | None:
        info = self._fs.get_file_info(f"{self._path}/{name}")
        return info.size if info.is_file else None

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        with self._fs.open_output_stream(f"{self._path}/{name}") as file:
            yield file

    def open(self, name: str) -> BinaryIO:
        return self._fs.open_input_file(f"{self._path}/{name}")

    def make(self) -> None:
        self._fs.create_dir(self._path)

    def remove(self, name: str) -> None:
        path = f"{self._path}/{name}"
        info = self._fs.get_file_info(path)
        if info.is_file:
            self._fs.delete_file(path)
        elif info.type.name == "Directory":
            self._fs.delete_dir(path)

    def free_bytes(self) -> int | None:
        return None
