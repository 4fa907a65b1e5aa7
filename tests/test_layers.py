"""The floors of the house: a room imports only rooms on floors below its own."""

import ast
from pathlib import Path

import pytest

import shardemb
import shardemb.kge

PACKAGE = Path(shardemb.__file__).parent

FLOORS = [
    {"types", "files", "settings"},
    {"storage", "tensorfile"},
    {"manifest"},
    {"metrics", "native", "faults", "lookup"},
    {"shm"},
    {"collectives", "cluster"},
    {"plan", "transforms", "vocabulary", "optim"},
    {"initializers"},
    {"exchange", "table"},
    {"torchrec"},
    {"embedding"},
    {"coordinator", "pykeen"},
    {"pieces", "store"},
    {"saving", "loading", "serving"},
    {"checkpoint"},
    {"formats"},
    {"kge.reading", "kge.scorers", "kge.losses", "kge.sampling", "kge.vs_all"},
    {"kge.splits"},
    {"kge.dataset"},
    {"kge.triples", "kge.ingestion"},
    {"kge.model"},
    {"kge.ranking", "kge.optimizers", "kge.query"},
    {"kge.evaluation"},
    {"kge.trainer"},
    {"launch", "estimate"},
    {"config", "calibrate"},
    {"planning"},
    {"cli"},
]
#: third-party packages that only some rooms may know
ONLY = {
    "torchrec": {"torchrec", "table", "exchange", "optim", "plan"},
    "fbgemm_gpu": {"table", "exchange", "optim", "plan"},
    "ray": {"cluster", "launch", "serving"},
    "pykeen": {"pykeen"},
}
#: rooms that work without a process group
NO_DISTRIBUTED = {
    "types",
    "files",
    "settings",
    "lookup",
    "storage",
    "tensorfile",
    "metrics",
    "native",
    "plan",
    "initializers",
    "transforms",
    "vocabulary",
    "optim",
    "table",
}
NO_DISTRIBUTED |= {
    "kge.reading",
    "kge.splits",
    "kge.dataset",
    "kge.ingestion",
    "kge.triples",
    "kge.scorers",
    "kge.losses",
    "kge.sampling",
    "kge.model",
    "kge.query",
}

floor_of = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


ROOMS = {room_of(p): p for p in PACKAGE.rglob("*.py") if p.name not in {"__init__.py", "__main__.py"}}


def imports(path: Path) -> set[str]:
    """Every module named by an import, also inside functions and TYPE_CHECKING blocks."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


#: torch.distributed's functions in which a rank waits for others
COLLECTIVES = {"all_to_all", "all_to_all_single", "all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "barrier"}
COLLECTIVES |= {
    "reduce",
    "gather",
    "scatter",
    "reduce_scatter_tensor",
    "all_gather_object",
    "send",
    "recv",
    "monitored_barrier",
}


@pytest.mark.parametrize("room", sorted(set(ROOMS) - {"collectives"}))
def test_collectives_go_through_the_room_that_bounds_them(room: str) -> None:
    for node in ast.walk(ast.parse(ROOMS[room].read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "dist":
            assert node.func.attr not in COLLECTIVES, f"{room}:{node.lineno}: use shardemb.collectives"


def test_every_room_has_a_floor() -> None:
    assert set(ROOMS) == set(floor_of)


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_imports_go_down(room: str) -> None:
    for name in imports(ROOMS[room]):
        top = name.split(".")[0]
        assert room in ONLY.get(top, {room}), f"{room} must not import {top}"
        if name.startswith("torch.distributed"):
            assert room not in NO_DISTRIBUTED, f"{room} must not import torch.distributed"
        target = name.removeprefix("shardemb.")
        if name.startswith("shardemb.") and target in floor_of:
            assert floor_of[target] < floor_of[room], f"{room} must not import {target}"


@pytest.mark.parametrize("package", [shardemb, shardemb.kge], ids=["shardemb", "shardemb.kge"])
def test_public_names_exist(package: object) -> None:
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="nope"):
        package.nope  # noqa: B018


def test_nothing_loads_code_from_files() -> None:
    """No pickle, torch.load or the like on any path; sending objects between trusted ranks is the only exception."""
    for path in PACKAGE.rglob("*.py"):
        names = imports(path)
        assert not names & {"pickle", "cloudpickle", "joblib", "yaml", "shelve", "marshal"}, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in {"torch.load", "eval", "exec", "dcp.load"}, f"{path}:{node.lineno}"
