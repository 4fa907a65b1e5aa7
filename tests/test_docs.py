"""What README.md and docs/ say is so.

Their code and commands run, their links lead somewhere, and mkdocs builds them.
"""

import argparse
import inspect
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import shardemb
from shardemb import checkpoint, cli, exceptions, kge, launch, planning, serving
from shardemb.kge.config import JobConfig

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
FENCE = re.compile(r"^(?:<!-- ([\w ]+) -->\n)?```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
#: above a block: bash that this test runs (all of it parses, most would take long, or needs a
#: cluster); Python that starts Ray; a script that torchrun starts on two ranks, and that runs alone
#: too
RUNS, RAY, RANKS = "runs", "needs ray", "two ranks"


class Block(NamedTuple):
    """A fenced block, and the comment above it."""

    note: str
    language: str
    text: str


BLOCKS = {page: [Block(*found) for found in FENCE.findall(text)] for page, text in PAGES.items()}


def blocks(language: str) -> Iterator[tuple[str, str]]:
    yield from (
        (page, block.text)
        for page in BLOCKS
        for block in BLOCKS[page]
        if block.language == language
    )


def lines(text: str) -> list[str]:
    return text.replace("\\\n", " ").splitlines()


def of_shardemb(line: str) -> list[str]:
    """What a line of bash gives to ``shardemb``, by itself, after torchrun's -m.

    Or after a job's --; nothing if it is none.
    """
    words = shlex.split(line, comments=True)
    places = [
        n
        for n, word in enumerate(words)
        if Path(word).name == "shardemb" and (n == 0 or words[n - 1] in ("-m", "--"))
    ]
    return words[places[0] + 1 :] if places else []


def _run(rank: int, world_size: int, page: list[Block], folder: Path) -> None:
    """Do what a reader does who types a page's blocks in, one after the other.

    In one folder and one session of Python.
    """
    os.chdir(folder)
    names: dict[str, Any] = {"__name__": "page"}
    for block in page:
        if "__main__" in block.text:  # it starts processes, which read it
            Path("block.py").write_text(block.text)
            subprocess.run([sys.executable, "block.py"], check=True)
        elif block.language == "python":
            exec(compile(block.text, block.text.partition("\n")[0], "exec"), names)
        else:
            for line in lines(block.text):
                if words := of_shardemb(line):
                    assert cli.main(words) == 0, line
                else:
                    subprocess.run(["bash", "-ec", line], check=True)


def running(page: str, ray: bool) -> list[Block]:
    wanted = [
        block
        for block in BLOCKS[page]
        if block.language == "python" or (block.language, block.note) == ("bash", RUNS)
        if block.note != RANKS or "WORLD_SIZE" in block.text
    ]
    return [block for block in wanted if (block.note == RAY) == ray]


@pytest.mark.parametrize("page", [page for page in BLOCKS if running(page, ray=False)])
def test_the_blocks_of_a_page_run(page: str, run_ranks: Callable[..., Any], tmp_path: Path) -> None:
    run_ranks(_run, 1, running(page, ray=False), tmp_path, timeout=200.0)


SCRIPTS = [block.text for page in BLOCKS.values() for block in page if block.note == RANKS]


@pytest.mark.parametrize("number", range(len(SCRIPTS)))
def test_the_scripts_run_on_two_ranks(number: int, tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(SCRIPTS[number])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [*command, "loop.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.ray
@pytest.mark.parametrize("page", [page for page in BLOCKS if running(page, ray=True)])
def test_the_blocks_with_ray_run(page: str, run_ranks: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    run_ranks(_run, 1, running(page, ray=True), tmp_path, timeout=200.0)


def test_notes_above_blocks_are_known() -> None:
    notes = [block.note for page in BLOCKS.values() for block in page]
    assert set(notes) == {"", RUNS, RAY, RANKS}
    assert sum(len(re.findall("^```\\w", text, re.MULTILINE)) for text in PAGES.values()) == len(
        notes
    )  # none is missed


def _ordinary_loop(rank: int, world_size: int, block: str) -> float:
    names: dict = {}
    exec(block, names)
    rows = names["people"].local_rows()
    return (rows.norm(dim=1) - 1).abs().max().item()


def test_the_python_example_runs_on_two_ranks(run_ranks: Callable[..., Any]) -> None:
    example = next(block.text for block in BLOCKS["README.md"] if block.language == "python")
    assert max(run_ranks(_ordinary_loop, 2, example)) < 1e-6


def _pykeen_loop(rank: int, world_size: int, block: str) -> tuple[dict, float]:
    names: dict = {}
    exec(
        block.replace("range(30)", "range(2)"), names
    )  # a rounding error grows from epoch to epoch
    table = names["model"].entity_representations[0]
    return table.full_state_dict(), names["metrics"].get_metric("mrr")


def test_the_pykeen_loop_gives_the_same_on_any_number_of_ranks(
    run_ranks: Callable[..., Any],
) -> None:
    (loop,) = [
        text
        for page, text in blocks("python")
        if page == "docs/from-pykeen.md" and "Coordinator(model" in text
    ]
    ((expected, mrr),) = run_ranks(_pykeen_loop, 1, loop)
    for world_size in (2, 3):
        for state, other in run_ranks(_pykeen_loop, world_size, loop):
            torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-5)
            assert other == pytest.approx(mrr, rel=1e-3)


def test_the_two_commands_are_the_ones_that_ci_runs() -> None:
    commands = ["./dev train", "./dev test"]
    for page in ("README.md", "docs/quickstart.md"):
        shell = [
            line.split("#")[0].strip()
            for at, text in blocks("bash")
            if at == page
            for line in lines(text)
        ]
        assert [line for line in shell if line in commands] == commands
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in ci if line in commands] == commands
    usage = subprocess.run([ROOT / "dev"], capture_output=True, text=True, check=False)
    assert usage.returncode == 2
    named = {command for text in PAGES.values() for command in re.findall(r"\./dev \w+", text)}
    assert {*commands, "./dev docs"} <= named <= set(re.findall(r"\./dev \w+", usage.stdout))


def test_every_shardemb_command_parses(capsys: pytest.CaptureFixture[str]) -> None:
    seen = set()
    for page, text in blocks("bash"):
        for line in lines(text):
            if words := of_shardemb(line):
                try:
                    seen.add(cli.parser().parse_args(words).command)
                except SystemExit:
                    pytest.fail(f"{page}: {line}: {capsys.readouterr().err}")
    assert {
        "train",
        "evaluate",
        "plot",
        "top",
        "ingest",
        "query",
        "serve",
        "checkpoint",
        "plan",
        "bench",
    } <= seen


def test_commands_in_sentences_have_options_that_there_are() -> None:
    """They may lack what is required."""
    said = [
        (page, code)
        for page, text in PAGES.items()
        for code in re.findall(r"`shardemb ([^`]+)`", text)
    ]
    assert len(said) > 10
    for page, code in said:
        parser = cli.parser()
        for word in shlex.split(code):
            commands = [
                action
                for action in parser._actions
                if isinstance(action, argparse._SubParsersAction)
            ]
            if word.startswith("-"):
                assert word in parser._option_string_actions, f"{page}: shardemb {code}"
            elif commands:
                assert word in commands[0].choices, f"{page}: shardemb {code}"
                parser = commands[0].choices[word]


def test_every_benchmark_that_is_named_is_there_and_has_the_options() -> None:
    """In the pages, and in the result files whose commands the tables show."""
    results = (ROOT / "benchmarks" / "results").glob("*.json")
    texts = [*PAGES.values(), *(path.read_text() for path in results)]
    commands = [
        found
        for text in texts
        for found in re.findall(r"python (benchmarks/\w+\.py)((?: [\w/.-]+)*)", text)
    ]
    assert commands
    for script, rest in commands:
        source = (ROOT / script).read_text()
        for option in re.findall(r"--[\w-]+", rest):
            assert f'"{option}"' in source, f"{script}{rest}"


def test_toml_blocks_are_configurations(tmp_path: Path) -> None:
    found = list(blocks("toml"))
    assert len(found) >= 3
    for _, text in found:
        (tmp_path / "job.toml").write_text(text)
        JobConfig.load(tmp_path / "job.toml")


def test_the_configuration_lists_all_defaults(tmp_path: Path) -> None:
    (block,) = (text for page, text in blocks("toml") if page == "docs/configuration.md")
    (tmp_path / "job.toml").write_text(block)
    assert JobConfig.load(tmp_path / "job.toml") == JobConfig()
    told, known = tomllib.loads(block), tomllib.loads(JobConfig().to_toml())
    assert told == known  # none is left out


def key_tables() -> str:
    """The configuration's keys, their defaults as TOML and their comments in the code.

    As tables.
    """
    defaults, section = {}, ""
    for line in JobConfig().to_toml().splitlines():
        key, _, value = line.partition(" = ")
        section = key[1:-1] if key.startswith("[") else section
        defaults[section, key] = value
    text, sections = "", [field for field in fields(JobConfig) if is_dataclass(field.type)]
    for name, cls in [("", JobConfig), *((field.name, field.type) for field in sections)]:
        text += f"\n### `[{name}]`\n" * bool(name) + "\n| key | default | |\n|---|---|---|\n"
        source = "".join(inspect.getsource(c) for c in cls.__mro__ if is_dataclass(c))
        for comment, key in re.findall(r"((?: +#: .*\n)+) +(\w+):", source):
            words = " ".join(line.strip().removeprefix("#: ") for line in comment.splitlines())
            words = re.sub(r":\w+:`([^`]+)`", r"`\1`", words).replace("``", "`")
            text += f"| `{key}` | `{defaults.pop((name, key))}` | {words} |\n"
    assert all(key.startswith("[") or not key for _, key in defaults), (
        defaults
    )  # every key has a comment
    return text


def test_the_configuration_has_a_table_of_all_keys() -> None:
    assert key_tables() in PAGES["docs/configuration.md"], f"expected there:\n{key_tables()}"


def anchors(text: str) -> set[str]:
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE
    )
    return {
        re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())
        for heading in headings
    }


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\(([^)#\s:]*)(?:#([^)]+))?\)", text):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor and not anchor.startswith(
            "shardemb."
        ):  # which mkdocstrings makes, and the strict build looks for
            assert anchor in anchors(path.read_text()), f"{target}#{anchor}"


def test_every_page_is_linked_to_from_the_first_ones() -> None:
    """README.md links to docs/index.md, which links to all others."""
    linked = set(re.findall(r"\]\((docs/[^)#]+)", PAGES["README.md"]))
    assert "docs/index.md" in linked
    linked |= {f"docs/{target}" for target in re.findall(r"\]\(([^)#:]+)", PAGES["docs/index.md"])}
    pages = {page for page in PAGES if page.startswith("docs/")} - {"docs/index.md"}
    assert pages - linked == {
        f"docs/api/{name}.md" for name in ("checkpoints", "kge", "launch", "planning")
    }


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly by a Python that cannot import the package: its source is enough."""
    out = tmp_path_factory.mktemp("site")
    alone = (
        "import sys; sys.modules.update(shardemb=None, torch=None); from mkdocs.__main__ import"
        " cli; cli()"
    )
    command = [sys.executable, "-c", alone, "build", "--strict", "--site-dir", out]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return out


def test_the_site_has_every_public_name(site: Path) -> None:
    html = "".join(path.read_text() for path in (site / "api").glob("*.html"))
    for module in (shardemb, checkpoint, kge, launch, planning, serving):
        for name in module.__all__:
            value = getattr(module, name)
            # "shardemb" passes on names of packages, and packages those of shardemb.exceptions
            defined = f"{getattr(value, '__module__', '')}.{name}"
            paths = (f"{module.__name__}.{name}", f"shardemb.{name}", defined)
            assert any(f'id="{path}"' in html for path in paths), paths[0]
    others = [f"exceptions.{name}" for name in vars(exceptions) if name.endswith("Error")]
    others += [f"optim.{name}" for name in ("SparseSGD", "SparseAdagrad", "LazyAdam")]
    others += ["optim.RowWiseAdam", "pykeen.ShardedEmbedding", "launch.ray.connected"]
    others += ["serving.store.StoredTable", "planning.calibrate.calibrate"]
    assert not [name for name in others if f'id="shardemb.{name}"' not in html]
    assert not re.findall(":(?:class|func|meth|mod):", html)  # roles of Sphinx
    assert "what a NaN or infinite loss does" in html  # a comment above an attribute


def test_the_site_needs_no_network(site: Path) -> None:
    pages = [path.read_text() for path in site.rglob("*.html")]
    assert len(pages) > len(PAGES) - 1
    tags = [
        tag for page in pages for tag in re.findall(r"<(?:link|script|img|iframe)\b[^>]*>", page)
    ]
    assert tags
    assert not [tag for tag in tags if re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag)]
    assert (site / "files" / "benchmarks" / "results").is_dir()  # what pages link to


def test_changelog_and_licences() -> None:
    assert f"## {shardemb.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert (ROOT / "shardemb" / "py.typed").exists()


def test_package_metadata_pins_nothing_above_torch_2_11() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"torch>=2.11", "torchrec>=1.6", "fbgemm-gpu>=1.6"} <= set(project["dependencies"])
    assert not [d for d in project["dependencies"] if "==" in d or "<" in d]
