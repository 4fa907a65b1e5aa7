"""Damages a checkpoint in random ways, one at a time, and checks that loading reports it."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shardemb import Embedding, checkpoint
from shardemb.checkpoint import writer


class Model(torch.nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.user = Embedding(501, shape=6, seed=seed, name="user")
        self.item = Embedding(71, shape=3, seed=seed + 1, name="item", kernel="fused")


def save_two(rank: int, world_size: int, folder: Path) -> None:
    """Make two checkpoints of the same shapes; a job of any number of ranks."""
    writer.FILE_BYTES = 2000
    for step in (1, 2):
        checkpoint.save(folder, step, Model(seed=step))


def _pick(path: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(path.iterdir()))


def _flip(path: Path, other: Path, draw: random.Random) -> str:
    file = _pick(path, draw)
    content = bytearray(file.read_bytes())
    place = draw.randrange(len(content))
    content[place] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    return f"{file.name}: a bit of byte {place}"


def _zeros(path: Path, other: Path, draw: random.Random) -> str:
    file = _pick(path, draw)
    content = bytearray(file.read_bytes())
    start = draw.randrange(len(content))
    stop = min(len(content), start + draw.choice([1, 16, 512, 4096]))
    content[start:stop] = bytes(stop - start)
    file.write_bytes(content)
    return f"{file.name}: zeros from {start} to {stop}"


def _length(path: Path, other: Path, draw: random.Random) -> str:
    file = _pick(path, draw)
    content = file.read_bytes()
    length = draw.choice([0, draw.randrange(len(content)), len(content) - 1])
    file.write_bytes(
        content[:length] if draw.random() < 0.8 else content + bytes(1 + draw.randrange(100))
    )
    return f"{file.name}: {file.stat().st_size} of {len(content)} bytes"


def _missing(path: Path, other: Path, draw: random.Random) -> str:
    file = _pick(path, draw)
    file.unlink()
    return f"{file.name}: missing"


def _swap(path: Path, other: Path, draw: random.Random) -> str:
    files = [file for file in path.iterdir() if file.suffix == ".safetensors"]
    if draw.random() < 0.5:
        file = _pick(path, draw)
        shutil.copy(other / file.name, file)
        return f"{file.name}: of another checkpoint"
    one, two = draw.sample(sorted(files), 2)
    three = path / "three"
    one.rename(three), two.rename(one), three.rename(two)
    return f"{one.name} and {two.name}: swapped"


def _edit(path: Path, other: Path, draw: random.Random) -> str:
    document = json.loads((path / "manifest.json").read_text())
    node, key = document, "manifest"
    while isinstance(node[key], dict | list) and node[key] and draw.random() < 0.95:
        node = node[key]
        key = draw.choice(sorted(node)) if isinstance(node, dict) else draw.randrange(len(node))
    value = node[key]
    if draw.random() < 0.3:
        del node[key]
    elif isinstance(value, bool):
        node[key] = not value
    elif isinstance(value, int | float):
        node[key] = value + draw.choice([-1, 1, 1000])
    elif isinstance(value, str):
        node[key] = value[::-1] + "x"
    else:
        node[key] = 0
    (path / "manifest.json").write_text(json.dumps(document))
    return f"manifest.json: {key} was {str(value)[:40]}"


_MUTATIONS: list[Callable[[Path, Path, random.Random], str]] = [
    _flip,
    _zeros,
    _length,
    _missing,
    _swap,
    _edit,
]


def damage(
    folder: Path, count: int, seed: int, load: Callable[[Path, Any], Any] = checkpoint.load
) -> tuple[Counter, list[str]]:
    """Damage the newer of :func:`save_two`'s checkpoints; return how often, and what went wrong.

    Args:
        folder: of both checkpoints.
        count: of mutations that change something.
        seed: of what is changed.
        load: what is tried.
    """
    draw, done, faults = random.Random(seed), Counter(), []
    other, whole = (Path(path) for path in checkpoint.checkpoints(folder))
    original = {file.name: file.read_bytes() for file in whole.iterdir()}
    model = Model(seed=7)
    before = [table(None).detach().clone() for table in model.children()]
    while sum(done.values()) < count:
        mutate = draw.choice(_MUTATIONS)
        what = mutate(whole, other, draw)
        if {file.name: file.read_bytes() for file in whole.iterdir()} != original:
            done[mutate.__name__.strip("_")] += 1
            try:
                load(whole, model)
                faults.append(f"not noticed: {what}")
            except checkpoint.CheckpointError as error:
                if str(whole) not in str(error) or not (
                    "user" in str(error) or "item" in str(error)
                ):
                    faults.append(f"{what}: the error names no file or no table: {error}")
            except Exception as error:
                faults.append(f"{what}: {type(error).__name__}: {error}")
            if not all(
                torch.equal(table(None), rows)
                for table, rows in zip(model.children(), before, strict=True)
            ):
                faults.append(f"{what}: the model was changed")
                for table, rows in zip(model.children(), before, strict=True):
                    table._load_stored_rows({"weight": rows})
        shutil.rmtree(whole)
        whole.mkdir()
        for name, content in original.items():
            (whole / name).write_bytes(content)
    load(whole, model)  # as it was
    return done, faults
