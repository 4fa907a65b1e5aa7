"""What the README says is what CI runs, and its code works."""

import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import shardemb
from shardemb import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = {language: re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) for language in ("python", "bash", "toml")}


def test_the_two_commands_are_the_ones_that_ci_runs() -> None:
    first, second = "./dev train", "./dev test"
    shell = [line.split("#")[0].strip() for block in BLOCKS["bash"] for line in block.splitlines()]
    assert first in shell
    assert second in shell
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert first in ci
    assert second in ci
    assert ci.index(first) < ci.index(second)
    usage = subprocess.run([ROOT / "dev"], capture_output=True, text=True, check=False)
    assert usage.returncode == 2
    assert all(command in usage.stdout for command in (first, second))


@pytest.mark.parametrize("block", BLOCKS["python"], ids=range(len(BLOCKS["python"])))
def test_python_blocks_run(block: str, tmp_path: Path) -> None:
    if "pykeen" in block:
        pytest.importorskip("pykeen")
    (tmp_path / "block.py").write_text(block)
    done = subprocess.run([sys.executable, "block.py"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


def _ordinary_loop(rank: int, world_size: int, block: str) -> float:
    names: dict = {}
    exec(block, names)
    rows = names["people"].local_rows()
    return (rows.norm(dim=1) - 1).abs().max().item()


def test_the_python_example_runs_on_two_ranks(run_ranks) -> None:
    assert max(run_ranks(_ordinary_loop, 2, BLOCKS["python"][0])) < 1e-6


def _pykeen_loop(rank: int, world_size: int, block: str) -> tuple[dict, float]:
    names: dict = {}
    exec(block.replace("range(30)", "range(2)"), names)  # a rounding error grows from epoch to epoch
    table = names["model"].entity_representations[0]
    return table.full_state_dict(), names["metrics"].get_metric("mrr")


def test_the_pykeen_loop_gives_the_same_on_any_number_of_ranks(run_ranks) -> None:
    pytest.importorskip("pykeen")
    (block,) = [block for block in BLOCKS["python"] if "pykeen" in block and "Coordinator(model" in block]
    ((expected, mrr),) = run_ranks(_pykeen_loop, 1, block)
    for world_size in (2, 3):
        for state, other in run_ranks(_pykeen_loop, world_size, block):
            torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-5)
            assert other == pytest.approx(mrr, rel=1e-3)


def test_every_shardemb_command_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for command in ["train", "evaluate", "plot", "top", "ingest", "query", "serve", "list", "verify", "export", "import"]:
        monkeypatch.setattr(cli, f"_{command}", lambda arguments: seen.append(arguments) or 0)
    for block in BLOCKS["bash"]:
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and Path(words[0]).name == "shardemb":
                assert cli.main(words[1:]) == 0, line
    assert seen


def test_toml_blocks_are_configurations(tmp_path: Path) -> None:
    from shardemb.config import JobConfig

    for block in BLOCKS["toml"]:
        path = tmp_path / "job.toml"
        path.write_text(block)
        JobConfig.load(path)
    (block,) = BLOCKS["toml"]
    told = tomllib.loads(block)
    assert JobConfig.load(path) == JobConfig()  # as the README says: the defaults
    sections = {name for name, section in asdict(JobConfig()).items() if isinstance(section, dict)}
    assert {name: set(told[name]) for name in sections} == {name: set(asdict(JobConfig())[name]) for name in sections}


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", re.sub(r"```.*?```", "", README, flags=re.DOTALL)):
        assert (ROOT / target).exists(), target


def test_changelog_and_licences() -> None:
    assert f"## {shardemb.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert (ROOT / "shardemb" / "py.typed").exists()


def test_package_metadata_pins_nothing_above_torch_2_11() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"torch>=2.11", "torchrec>=1.6", "fbgemm-gpu>=1.6"} <= set(project["dependencies"])
    assert not [d for d in project["dependencies"] if "==" in d or "<" in d]
