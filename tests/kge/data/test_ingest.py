import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from shardemb.cli import main
from shardemb.kge import Triples, ingest
from shardemb.kge.data import ingest as ingest_module
from shardemb.kge.data import triple_files
from shardemb.kge.data.triples import BUNDLED
from shardemb.vocabulary import Vocabulary

HERE = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
COMMAND = [sys.executable, "-m", "shardemb", "ingest"]
Rows = list[tuple[str, str, str]]


def same(ours: Triples, theirs: Triples) -> None:
    """Bit by bit."""
    for split in ("train", "valid", "test"):
        one, other = getattr(ours, split), getattr(theirs, split)
        assert one.dtype == other.dtype == torch.int32
        assert torch.equal(one, other), split
    for one, other in ((ours.entities, theirs.entities), (ours.relations, theirs.relations)):
        assert one.labels == other.labels
        assert one.fingerprint == other.fingerprint == one.computed_fingerprint()
    assert (
        ours.fingerprint == theirs.fingerprint == replace(ours).fingerprint
    )  # told by dataset.json, and computed
    assert replace(ours, train=ours.train[1:]).fingerprint != ours.fingerprint


def write(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        columns = zip(*rows, strict=True)
        pq.write_table(
            pa.table(dict(zip(("head", "relation", "tail"), map(pa.array, columns), strict=True))),
            path,
        )
        return path
    nt = ".nt" in path.suffixes
    text = "".join(
        f"<x:{h}> <x:{r}> <x:{t}> .\n" if nt else f"{h}\t{r}\t{t}\n" for h, r, t in rows
    ).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def test_wordnet_is_the_same_and_opens_mapped(tmp_path: Path) -> None:
    out = ingest(BUNDLED / "wordnet", tmp_path / "new" / "wordnet")
    assert [path.name for path in out.parent.iterdir()] == ["wordnet"]
    ours = Triples.load(out, verify=True)
    same(ours, Triples.load("wordnet"))
    assert ours.entities.path == out / "entities.arrow"
    told = json.loads((out / "dataset.json").read_text())
    assert (told["entities"], told["relations"], told["dtype"]) == (112_199, 11, "int32")
    assert told["triples"] == {"train": 209_633, "valid": 4_367, "test": 4_367}
    assert np.load(out / "train.npy", mmap_mode="r").shape == (209_633, 3)
    # popular entities do not land on one of 8 shards
    load = torch.bincount(ours.train[:, [0, 2]].flatten() // -(-112_199 // 8), minlength=8).double()
    assert load.max() / load.mean() < 1.1


ENDINGS = [".tsv", ".tsv.gz", ".txt", ".nt", ".nt.gz", ".parquet"]


@pytest.mark.parametrize("seed", range(12))
def test_any_graph_is_what_load_makes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Repeated triples, unseen labels, loops, all kinds of files, part files, one graph or three.

    In blocks of a few lines.
    """
    draw = random.Random(seed)
    monkeypatch.setattr(triple_files, "BLOCK", draw.choice([40, 1000, 1 << 22]))
    monkeypatch.setattr(triple_files, "ROWS", draw.choice([3, 1 << 16]))
    monkeypatch.setattr(ingest_module, "PAGE", draw.choice([7, 1 << 18]))
    names = [
        f"{draw.choice(['a', 'é', chr(0x1F600), '<', '%'])}{i}"
        for i in range(draw.choice([3, 40, 400]))
    ]
    names = [re.sub("[<]", "(", name) for name in names]  # which no IRI has

    def rows(count: int, extra: str = "") -> Rows:
        return [
            (
                draw.choice(names) + extra * (draw.random() < 0.2),
                f"r{draw.randrange(3)}{extra}",
                draw.choice(names),
            )
            for _ in range(count)
        ]

    def parts(folder: Path, drawn: Rows) -> Path:
        for number in range(3):
            write(folder / f"part-{number}{draw.choice(ENDINGS)}", drawn[number::3])
        (folder / "_SUCCESS").touch()
        return folder

    source = tmp_path / "source"
    if seed % 3 == 0:
        for split, extra in (("train", ""), ("valid", "v"), ("test", "t" * (seed % 2))):
            drawn = rows(draw.randrange(30, 600), extra)
            if draw.random() < 0.3:
                parts(source / split, drawn)
            else:
                write(source / f"{split}{draw.choice(ENDINGS)}", drawn)
    elif seed % 3 == 1:
        parts(source, rows(700))
    else:
        source = write(source / f"all{draw.choice(ENDINGS)}", rows(draw.randrange(3, 900)))
    for unseen in ("keep", "drop", "error"):
        out, said = tmp_path / unseen, []
        for make in (
            partial(Triples.load, source, unseen),
            partial(ingest, source, out, unseen=unseen),
        ):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    made = make()
                    if isinstance(made, Triples):
                        expected = made
                except ValueError as error:
                    made = str(error)
            said.append(
                (
                    [str(warning.message) for warning in caught],
                    made if isinstance(made, str) else "",
                )
            )
        assert said[0] == said[1]
        if not said[0][1]:
            same(Triples.load(out, verify=True), expected)


def test_what_dataset_json_counts(tmp_path: Path) -> None:
    rows = [("a", "r", "b"), ("a", "r", "b"), ("a", "r", "b"), ("b", "q", "a")]
    for split, drawn in (("train", rows), ("valid", [*rows, ("z", "r", "a")]), ("test", rows[2:])):
        write(tmp_path / f"{split}.nt", drawn)
    with (tmp_path / "train.nt").open("a") as file:
        file.write('<x:a> <x:r> "text" .\n# a comment\n')
    with pytest.warns(UserWarning, match="1 of 5 valid triples hold entities"):
        out = ingest(tmp_path, tmp_path / "out", unseen="drop", literals="drop")
    told = json.loads((out / "dataset.json").read_text())
    assert told["triples"] == {"train": 4, "valid": 4, "test": 2}
    assert told["duplicates"] == {"train": 2, "valid": 2, "test": 0}
    assert told["unseen"] == {"fate": "drop", "triples": {"valid": 1}}
    assert told["literals"] == {"fate": "drop", "dropped": 1}
    assert [Path(source["path"]).name for source in told["sources"]] == [
        "train.nt",
        "valid.nt",
        "test.nt",
    ]


def test_large_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest_module, "dtype_of", lambda *counts: "int64")
    source = write(tmp_path / "x.tsv", [(f"e{i}", f"r{i % 2}", f"e{i % 3}") for i in range(15)])
    data = Triples.load(ingest(source, tmp_path / "out"))
    assert data.train.dtype == torch.int64
    assert torch.equal(data.train.int(), Triples.load(source).train)


def test_how_many_are_held_out(tmp_path: Path) -> None:
    rows = [(f"e{i}", "r", f"e{i + 1}") for i in range(200)]
    first, second = write(tmp_path / "1.tsv", rows[:150]), write(tmp_path / "2.tsv", rows[150:])
    with pytest.warns(UserWarning, match="no training triple holds"):
        data = Triples.load(ingest([first, second], tmp_path / "out", valid=0, test=150))
    assert (len(data.train), len(data.valid), len(data.test)) == (50, 0, 150)
    heads = [int(data.entities.label(i)[1:]) for i in data.test[:, 0].tolist()]
    assert heads == sorted(heads)
    assert heads != [*range(min(heads), min(heads) + 150)]
    assert {*heads} | {int(data.entities.label(i)[1:]) for i in data.train[:, 0].tolist()} == {
        *range(200)
    }
    with pytest.raises(
        ValueError, match=r"1\.tsv: got 100 valid and 50 test triples to hold out of 150, expected"
    ):
        ingest(first, tmp_path / "other", valid=100, test=50)
    folder = tmp_path / "split"
    for split in ("train", "valid", "test"):
        write(folder / f"{split}.tsv", rows)
    with pytest.raises(
        ValueError, match="has valid and test files, so valid=3, test=None split nothing"
    ):
        ingest(folder, tmp_path / "other", valid=3)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"a\tr\tb\n\na\tr\tb\n", "line 2: got an empty line"),
        (b"a\tr\tb\na\tr\n", "line 2: got 2 fields"),
        (b"a\tr\tb\na\tr\tb\x1f\n", r"line 2: got the field 'b\\x1f'"),
        ("a\tr\tb\na\tr\tb\u2003\n".encode(), "line 2: got the field"),
        (b"a\tr\tb\na\tr\t\xff\n", "line 2: got byte 0xff"),
        (b"head\trelation\ttail\na\tr\tb\n", "line 1: got the header"),
        (b"", "got a file without triples"),
    ],
)
def test_malformed_files_leave_nothing(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "x.tsv").write_bytes(content)
    for make in (
        lambda: ingest(tmp_path / "x.tsv", tmp_path / "out"),
        lambda: Triples.load(tmp_path / "x.tsv"),
    ):
        with pytest.raises(ValueError, match=rf"x\.tsv(, |: ){text}"):
            make()
    assert [path.name for path in tmp_path.iterdir()] == ["x.tsv"]


def test_settings_out_of_range(tmp_path: Path) -> None:
    source = write(tmp_path / "x.tsv", [("a", "r", "b")] * 50)
    for options, text in (
        (
            {"memory": "4 gallons"},
            "memory: got '4 gallons', expected at least 384MiB, such as 4GiB",
        ),
        ({"memory": "300MiB"}, "memory: got '300MiB', expected at least 384MiB"),
        ({"threads": -1}, "threads: got -1, expected at least 1"),
        ({"unseen": "dorp"}, "unseen: got 'dorp', expected one of 'keep', 'drop', 'error'"),
        ({"literals": "dorp"}, "literals: got 'dorp', expected one of 'error', 'drop', 'keep'"),
    ):
        with pytest.raises(ValueError, match=text):
            ingest(source, tmp_path / "out", **options)
    ballast = np.ones(384 << 17)  # 384 MiB, which this process holds
    with pytest.raises(
        MemoryError,
        match=r"x\.tsv: got 384 MiB for 2 threads, of which this process holds .* MiB more: raise",
    ):
        ingest(source, tmp_path / "out", memory="384MiB", threads=2)
    del ballast
    assert [path.name for path in tmp_path.iterdir()] == ["x.tsv"]
    with pytest.raises(FileNotFoundError, match="nowhere: got no such file or folder"):
        ingest([source, tmp_path / "nowhere"], tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out exists: give another name"):
        ingest(source, tmp_path / "out")


def test_labels_of_one_md5_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two such labels can be made with effort.

    Here a function that confuses more stands for MD5.
    """
    monkeypatch.setattr(ingest_module, "KEY", "length")
    source = write(tmp_path / "x.tsv", [("a", "r", "bb"), ("a", "r", "c")])
    with pytest.raises(ValueError, match="got two entities of one MD5"):
        ingest(source, tmp_path / "out")


def test_damage_is_named(tmp_path: Path) -> None:
    rows = [(f"e{i % 50}", f"r{i % 3}", f"e{i % 49}") for i in range(300)]
    out = ingest(write(tmp_path / "1.tsv", rows), tmp_path / "out")
    other = ingest(
        write(tmp_path / "2.tsv", [(h + "x", r, t + "x") for h, r, t in rows]), tmp_path / "other"
    )
    for path in sorted(out.iterdir()):
        whole = path.read_bytes()
        for content in (whole[:-2], whole[: len(whole) // 2], b""):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=f"^{path}: got "):
                Triples.load(out)
        path.unlink()
        if path.name != "dataset.json":
            with pytest.raises(ValueError, match=f"^{path}: missing"):
                Triples.load(out)
            path.write_bytes(whole[:-200] + bytes([whole[-200] ^ 1]) + whole[-199:])
            with pytest.raises(ValueError, match=f"^{path}: (is damaged|got)"):
                Triples.load(out, verify=True)
        path.write_bytes(whole)
    (out / "entities.arrow").write_bytes((other / "entities.arrow").read_bytes() + b"")
    with pytest.raises(ValueError, match=r"out/entities\.arrow: got "):
        Triples.load(out)


def graph_of(labels: int, triples: int, path: Path) -> Path:
    """A larger graph, fast."""
    draw = np.random.default_rng(0)
    heads, tails = draw.integers(labels, size=triples), draw.integers(labels, size=triples)
    with path.open("w") as file:
        file.writelines(
            f"http://example.org/resource/{h:012d}\tr{h % 7}\thttp://example.org/resource/{t:012d}\n"
            for h, t in zip(heads.tolist(), tails.tolist(), strict=True)
        )
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return graph_of(600_000, 600_000, tmp_path_factory.mktemp("large") / "x.tsv")


def test_memory_stays_below_what_is_allowed(tmp_path: Path, large: Path) -> None:
    script = """if True:
        import sys
        from shardemb.kge import ingest
        ingest(sys.argv[1], sys.argv[2], memory="512MiB", threads=2)
        # of this program; the system's ru_maxrss also knows the one that it was started from
        lines = open("/proc/self/status")
        print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024)
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, large, tmp_path / "out"],
        env=HERE,
        capture_output=True,
    )
    assert not done.returncode, done.stderr.decode()
    assert float(done.stdout) < 512
    vocabulary = Vocabulary.load(tmp_path / "out" / "entities.arrow")
    assert len(vocabulary) > 500_000
    assert len(np.load(tmp_path / "out" / "train.npy", mmap_mode="r")) == 590_000


def started(source: Path, out: Path) -> subprocess.Popen[bytes]:
    """An ingest that has read some of it."""
    process = subprocess.Popen(
        [*COMMAND, source, out],
        env=HERE,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a job in a shell's background ignores it
    )
    until = time.monotonic() + 60
    while not [*out.parent.glob("out.tmp-*/work/tables.duckdb")] and time.monotonic() < until:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    time.sleep(random.random() * 0.5)
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupt_cleans_up(
    tmp_path: Path, large: Path, number: signal.Signals, code: int
) -> None:
    process = started(large, tmp_path / "out")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert not [*tmp_path.iterdir()]
    assert b"Traceback" not in err


def test_a_killed_run_leaves_no_dataset_and_the_next_one_cleans_up(
    tmp_path: Path, large: Path
) -> None:
    process = started(large, tmp_path / "out")
    with pytest.raises(
        FileExistsError, match=r"out\.tmp-\d+: another process is making .*out: wait for it"
    ):
        ingest(large, tmp_path / "out")
    process.kill()
    process.communicate(timeout=60)
    (left,) = tmp_path.iterdir()
    with pytest.raises(FileNotFoundError):
        Triples.load(left)
    small = write(tmp_path / "x.tsv", [("a", "r", "b")] * 50)
    (tmp_path / "out.tmp-mine").mkdir()  # which ingest has not made
    ingest(small, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.tmp-mine", "x.tsv"]


def test_a_full_disk_is_a_clear_error(tmp_path: Path, large: Path) -> None:
    """A limit to the size of files stands for the disk."""
    script = """if True:
        import resource, sys
        from shardemb.cli import main
        from shardemb.kge.data.ingest import _Job
        original = getattr(_Job, sys.argv[1])
        def limited(self, *arguments):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
            return original(self, *arguments)
        setattr(_Job, sys.argv[1], limited)
        sys.exit(main(["ingest", *sys.argv[2:]]))
    """
    for since in ("read", "write_labels"):  # DuckDB's tables, or what is written of them
        command = [sys.executable, "-W", "ignore", "-c", script, since, large, tmp_path / "out"]
        done = subprocess.run(command, env=HERE, capture_output=True, text=True, timeout=100)
        assert done.returncode == 1
        assert re.search(r"shardemb: error: .*out\.tmp-\d+.*make room", done.stderr), done.stderr
        assert "Traceback" not in done.stderr
        assert not [*tmp_path.iterdir()]


def test_the_command_line_ingests_verifies_and_trains(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [(f"e{i}", f"r{step}", f"e{(i + step) % 60}") for i in range(60) for step in (1, 2)]
    source, out = write(tmp_path / "x.tsv.gz", rows), tmp_path / "out"
    assert (
        main(
            [
                "ingest",
                str(source),
                str(out),
                "--valid",
                "10",
                "--test",
                "12",
                "--memory",
                "4GiB",
                "--threads",
                "2",
            ]
        )
        == 0
    )
    said = capfd.readouterr().out
    assert f"{out}: 60 entities, 2 relations" in said
    assert re.search(r"valid: +10 triples, 0 of them repeated", said)
    assert re.search(r"[\d.]+ s, [\d,]+ MiB of memory at most", said)
    assert main(["ingest", "--verify", str(out)]) == 0
    assert "undamaged" in capfd.readouterr().out
    run = tmp_path / "run"
    settings = [
        "training.epochs=1",
        "sampling.batch_size=64",
        "sampling.chunk_size=32",
        "model.dim=8",
    ]
    sets = [word for setting in settings for word in ("--set", setting)]
    assert main(["train", "--dataset", str(out), "--output", str(run), *sets]) == 0
    assert "test filtered mrr" in capfd.readouterr().out
    assert (run / "entities.arrow").samefile(out / "entities.arrow")
    path = out / "train.npy"
    path.write_bytes(path.read_bytes()[:-4] + b"\1\0\0\0")
    assert main(["ingest", "--verify", str(out)]) == 1
    assert re.search(r"shardemb: error: .*train\.npy: is damaged", capfd.readouterr().err)
    for wrong in ([str(out)], ["--verify", str(source), str(out)]):
        assert main(["ingest", *wrong]) == 1
        assert "expected SOURCE... OUT, or --verify FOLDER" in capfd.readouterr().err


def test_unseen_triples_that_ingest_has_kept_are_not_dropped_later(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.tsv").write_text(
            "a\tr\tb\na\tr\tz\n" if split == "test" else "a\tr\tb\n"
        )
    with pytest.warns(UserWarning, match="entities"):
        out = ingest(tmp_path, tmp_path / "out")
    assert len(Triples.load(out).test) == 2
    for unseen in ("drop", "error"):
        with pytest.raises(
            ValueError, match=f"got 1 valid and test triples .* ingest again with --unseen {unseen}"
        ):
            Triples.load(out, unseen)
