import ast
from pathlib import Path

import pytest
from corruption import damage, save_two

import shardemb
from shardemb import checkpoint

PACKAGE = Path(shardemb.__file__).parent


@pytest.mark.parametrize("ranks", [1, 3])
def test_no_damage_is_silent(run_ranks, tmp_path: Path, ranks: int) -> None:
    """The long run, 1000 mutations, is benchmarks/reliability.py."""
    run_ranks(save_two, ranks, tmp_path)
    done, faults = damage(tmp_path, 100, seed=ranks)
    assert faults == []
    assert set(done) == {"flip", "zeros", "length", "missing", "swap", "edit"}


def test_the_mutations_are_noticed_only_because_they_are_looked_for(
    run_ranks, tmp_path: Path
) -> None:
    run_ranks(save_two, 2, tmp_path)
    _, faults = damage(
        tmp_path, 60, seed=1, load=lambda path, model: checkpoint.load(path, model, verify="size")
    )
    assert any("not noticed" in fault for fault in faults)


#: what runs code that is in a file, or may
FORBIDDEN = {
    "torch.load",
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "yaml",
    "dcp",
    "dist_cp",
}
FORBIDDEN |= {
    "torch.distributed.checkpoint",
    "torch.package",
    "eval",
    "exec",
    "all_gather_object",
    "broadcast_object_list",
}


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def forbidden_in(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call):
            name = _dotted(node.func)
            names = (
                [name, name.rpartition(".")[2]]
                if name.endswith(("_object", "_object_list", "_object_sync"))
                else [name]
            )
            if name.endswith("np.load") or name == "numpy.load":
                allowed = [k.value for k in node.keywords if k.arg == "allow_pickle"]
                if [a.value for a in allowed if isinstance(a, ast.Constant)] != [False]:
                    found.append(f"line {node.lineno}: {name} without allow_pickle=False")
        found += [
            f"line {node.lineno}: {name}"
            for name in names
            if name in FORBIDDEN
            or name.split(".")[0] in FORBIDDEN
            or any(name.startswith(f"{f}.") for f in FORBIDDEN)
        ]
    return found


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_no_file_is_unpickled(path: Path) -> None:
    assert forbidden_in(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "import torch.distributed.checkpoint as dcp\ndcp.load({})",
        "import yaml\nyaml.load('x')",
        "import numpy as np\nnp.load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import torch.distributed as dist\ndist.all_gather_object([], 1)",
        "eval('1')",
    ],
)
def test_what_the_search_finds(source: str) -> None:
    assert forbidden_in(source)
