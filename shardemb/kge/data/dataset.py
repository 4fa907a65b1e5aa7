"""A dataset folder of ``shardemb ingest``, checked and mapped into memory.

It holds ``dataset.json``, ``train.npy``, ``valid.npy`` and ``test.npy`` of (head, relation, tail),
``entities.arrow`` and ``relations.arrow``.
"""

import hashlib
import json
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
VOCABULARIES = ("entities", "relations")


def read(
    folder: Path, verify: bool = False
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, Vocabulary]]:
    """Open a dataset folder; ``verify`` compares all files' sha256.

    Returns the content of ``dataset.json``, the triples ``(T, 3)`` by split, mapped privately, and
    the vocabularies "entities" and "relations".

    Raises:
        ValueError: another format, or a file that is missing, damaged or of another dataset.
    """
    description = _description(folder)
    for name, entry in description["files"].items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path}: missing, but dataset.json lists it")
        size = path.stat().st_size
        if size != entry["size"]:
            raise InputError(f"{path}: got {size:,} bytes, expected {entry['size']:,}")
        if verify and sha256_of(path) != entry["sha256"]:
            raise InputError(
                f"{path}: is damaged (its sha256 does not match): make the dataset anew"
            )
    vocabularies = {kind: _vocabulary(folder, kind, description) for kind in VOCABULARIES}
    triples = {split: _triples(folder, split, description) for split in SPLITS}
    return description, triples, vocabularies


def dtype_of(*counts: int) -> str:
    """Return the smallest dtype for ids below these counts."""
    return "int32" if max(counts) <= 1 << 31 else "int64"


def sha256_of_array(array: np.ndarray) -> str:
    """Return the sha256 of an array's ``.npy`` file."""
    digest = hashlib.sha256()
    np.lib.format.write_array(SimpleNamespace(write=digest.update), np.ascontiguousarray(array))
    return digest.hexdigest()


def _description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        version = description["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: got text that describes no dataset ({error})") from error
    if version != FORMAT:
        raise InputError(f"{path}: got format {version!r}, expected {FORMAT!r}")
    files = {*(f"{split}.npy" for split in SPLITS), *(f"{kind}.arrow" for kind in VOCABULARIES)}
    parts = {"files": files, "triples": set(SPLITS), "fingerprints": set(VOCABULARIES)}
    for name, expected in parts.items():
        if not isinstance(description.get(name), dict) or set(description[name]) != expected:
            raise InputError(f"{path}: got other {name} than those of {sorted(expected)}")
    return description


def _vocabulary(folder: Path, kind: str, description: dict[str, Any]) -> Vocabulary:
    path = folder / f"{kind}.arrow"
    vocabulary = Vocabulary.load(path)
    expected = description.get(kind), description["fingerprints"][kind]
    if (len(vocabulary), vocabulary.fingerprint) != expected:
        raise InputError(
            f"{path}: got other labels than dataset.json lists: the files of two datasets are mixed"
        )
    return vocabulary


def _triples(folder: Path, split: str, description: dict[str, Any]) -> np.ndarray:
    path = folder / f"{split}.npy"
    shape, dtype = (description["triples"][split], 3), np.dtype(description.get("dtype"))
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except ValueError as error:
        raise InputError(f"{path}: got a file that is not numpy's ({error})") from error
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        raise InputError(
            f"{path}: got {array.dtype} of shape {array.shape}, expected {dtype} of {shape}"
        )
    return array
