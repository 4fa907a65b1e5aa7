"""The direction of imports between the package's folders, and what only some of them may import."""

import ast
from pathlib import Path

import pytest

import shardemb
import shardemb.kge

PACKAGE = Path(shardemb.__file__).parent

#: imports go down this list only
# fmt: off
ORDER = [
    "cli",
    "planning",
    "kge",
    "serving",
    "checkpoint",
    "pykeen", "coordinator", "pooling", "amp", "batches", "embedding", "initializers",
    "sharding",
    "launch",
    "comm",
    "optim", "transforms", "regularizers", "vocabulary",
    "kernels",
    "utils",
    "exceptions",
]
# fmt: on
#: third-party packages, and what alone may import them
ONLY = {
    "torchrec": ("sharding", "optim"),
    "fbgemm_gpu": ("sharding", "optim"),
    "ray": ("launch", "serving/ray_service.py"),
    "pykeen": ("pykeen.py",),
    "safetensors": (),
}
#: what works without a process group
NO_DISTRIBUTED = [
    "optim",
    "transforms",
    "regularizers",
    "vocabulary",
    "kernels",
    "utils",
    "exceptions",
]
#: torch.distributed's functions in which a rank waits for others
COLLECTIVES = {
    *("all_to_all", "all_to_all_single", "all_reduce", "all_gather", "all_gather_into_tensor"),
    *(
        "all_gather_object",
        "broadcast",
        "barrier",
        "monitored_barrier",
        "reduce",
        "gather",
        "scatter",
    ),
    *("reduce_scatter_tensor", "send", "recv"),
}
FILES = {str(path.relative_to(PACKAGE)): path for path in PACKAGE.rglob("*.py")}


def layer_of(module: str) -> str:
    """The folder or file on top of the package that a dotted name or a path below it belongs to."""
    return module.replace("/", ".").removesuffix(".py").split(".")[0]


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


def modules_imported(file: str) -> set[str]:
    """Files of the package that a file imports."""
    found = set()
    for name in imports(FILES[file]):
        if name.startswith("shardemb."):
            path = name.removeprefix("shardemb.").replace(".", "/")
            found |= {f"{path}.py", f"{path}/__init__.py"} & FILES.keys()
    return found - {file}


def test_every_folder_has_its_place_in_the_order() -> None:
    assert {layer_of(file) for file in FILES} == {*ORDER, "__init__", "__main__"}


@pytest.mark.parametrize("file", sorted(FILES.keys() - {"__init__.py", "__main__.py"}))
def test_imports_go_down(file: str) -> None:
    layer = layer_of(file)
    for name in imports(FILES[file]):
        top = name.split(".")[0]
        allowed = ONLY.get(top, (file,))
        assert file in allowed or layer in allowed, f"{file} must not import {top}"
        if name.startswith("torch.distributed"):
            assert layer not in NO_DISTRIBUTED, f"{file} must not import torch.distributed"
    for other in modules_imported(file):
        below = layer_of(other)
        assert below == layer or ORDER.index(below) > ORDER.index(layer), (
            f"{file} must not import {other}"
        )


def test_there_is_no_cycle_between_files() -> None:
    left = {file: modules_imported(file) for file in FILES if not file.endswith("__init__.py")}
    while left:
        free = {file for file, needs in left.items() if not needs & left.keys()}
        assert free, f"a cycle among {sorted(left)}"
        left = {file: needs for file, needs in left.items() if file not in free}


@pytest.mark.parametrize("file", sorted(FILES.keys() - {"comm/collectives.py"}))
def test_collectives_go_through_the_file_that_bounds_them(file: str) -> None:
    for node in ast.walk(ast.parse(FILES[file].read_text())):
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and ast.unparse(called.value) == "dist":
            assert called.attr not in COLLECTIVES, f"{file}:{node.lineno}: use comm.collectives"


@pytest.mark.parametrize("package", [shardemb, shardemb.kge], ids=["shardemb", "shardemb.kge"])
def test_public_names_exist(package: object) -> None:
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="nope"):
        package.nope  # noqa: B018


def test_nothing_loads_code_from_files() -> None:
    """No pickle, torch.load or the like on any path.

    Objects between trusted ranks are the exception.
    """
    for path in FILES.values():
        names = imports(path)
        assert not names & {"pickle", "cloudpickle", "joblib", "yaml", "shelve", "marshal"}, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                what = ast.unparse(node.func)
                assert what not in {"torch.load", "eval", "exec", "dcp.load"}, (
                    f"{path}:{node.lineno}"
                )


def test_no_function_has_more_than_twelve_parameters() -> None:
    """PyKEEN's own arguments aside, which Embedding takes."""
    many = []
    for file, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = node.args
                names = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
                if len([name for name in names if name.arg not in ("self", "cls")]) > 12:
                    many.append(f"{file}: {node.name}")
    assert many == ["embedding.py: __init__"]
