"""A dataset folder: what ``shardemb ingest`` writes, checked and mapped into memory.

It holds ``dataset.json``, ``train.npy``, ``valid.npy`` and ``test.npy`` of (head, relation, tail),
``entities.arrow`` and ``relations.arrow``.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from shardemb.exceptions import InputError
from shardemb.kge.data.splits import SPLITS
from shardemb.utils.files import sha256_of
from shardemb.vocabulary import Vocabulary

FORMAT = "shardemb-dataset/1"
DESCRIPTION = "dataset.json"


def read(
    folder: Path, verify: bool = False
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, Vocabulary]]:
    """Open a dataset folder; nothing of the files is read that is not asked for.

    Args:
        folder: with a ``dataset.json``.
        verify: read all files, and compare their sha256.

    Returns:
        What ``dataset.json`` says; by split ``(T, 3)`` int32 or int64, mapped privately; the
        vocabularies "entities" and "relations".

    Raises:
        ValueError: another format, or a file that is missing, damaged or of another dataset; names
            it.
    """
    told = _description(folder)
    for name, entry in told["files"].items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path}: missing, but dataset.json tells of it")
        if path.stat().st_size != entry["size"]:
            raise InputError(
                f"{path}: got {path.stat().st_size:,} bytes, expected {entry['size']:,}"
            )
        if verify and sha256_of(path) != entry["sha256"]:
            raise InputError(
                f"{path}: is damaged (its sha256 does not match): make the dataset anew"
            )
    vocabularies = dict(_vocabularies(folder, told))
    return (
        told,
        {split: _triples(folder / f"{split}.npy", told, split) for split in SPLITS},
        vocabularies,
    )


def dtype_of(*counts: int) -> str:
    """Return the smallest dtype for the ids of so many entities and relations."""
    return "int32" if max(counts) <= 1 << 31 else "int64"


def sha256_of_array(array: np.ndarray) -> str:
    """Return the sha256 of the ``.npy`` file of an array."""
    digest = hashlib.sha256()
    np.lib.format.write_array(SimpleNamespace(write=digest.update), np.ascontiguousarray(array))
    return digest.hexdigest()


def _description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        found = told["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: got text that describes no dataset ({error})") from error
    if found != FORMAT:
        raise InputError(f"{path}: got format {found!r}, expected {FORMAT!r}")
    files = {*(f"{split}.npy" for split in SPLITS), "entities.arrow", "relations.arrow"}
    parts = {"files": files, "triples": set(SPLITS), "fingerprints": {"entities", "relations"}}
    for name, expected in parts.items():
        if not isinstance(told.get(name), dict) or set(told[name]) != expected:
            raise InputError(f"{path}: got other {name} than those of {sorted(expected)}")
    return told


def _vocabularies(folder: Path, told: dict[str, Any]) -> Iterator[tuple[str, Vocabulary]]:
    for kind in ("entities", "relations"):
        path = folder / f"{kind}.arrow"
        vocabulary = Vocabulary.load(path)
        if (len(vocabulary), vocabulary.fingerprint) != (
            told.get(kind),
            told["fingerprints"][kind],
        ):
            raise InputError(
                f"{path}: got other labels than dataset.json tells of: the files of two datasets"
                " are mixed"
            )
        yield kind, vocabulary


def _triples(path: Path, told: dict[str, Any], split: str) -> np.ndarray:
    shape, dtype = (told["triples"][split], 3), np.dtype(told.get("dtype"))
    try:
        found = np.load(path, mmap_mode="c", allow_pickle=False)
    except ValueError as error:
        raise InputError(f"{path}: got a file that is not numpy's ({error})") from error
    if found.shape != shape or found.dtype != dtype or not found.flags.c_contiguous:
        raise InputError(
            f"{path}: got {found.dtype} of shape {found.shape}, expected {dtype} of {shape}"
        )
    return found
