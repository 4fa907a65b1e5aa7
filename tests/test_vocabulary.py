import hashlib
import os
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from shardemb import vocabulary as room
from shardemb.vocabulary import SCHEMA, Vocabulary, digests, write

ODD = ["", " a ", "a\tb\n", "\ufeffa", "é", "\U0001f600", "a\0", "?" * 64]


def test_ids_are_dense_spread_and_depend_on_the_labels_alone(tmp_path: Path) -> None:
    labels = [f"e{i:04d}" for i in range(1000)]
    vocabulary = Vocabulary.from_labels(labels + labels[::-1])
    assert len(vocabulary) == 1000
    assert vocabulary.labels == Vocabulary.from_labels(reversed(labels)).labels
    ids = vocabulary.ids(labels)
    assert ids.dtype == np.int64
    assert sorted(ids) == list(range(1000))
    assert [vocabulary.label(i) for i in ids.tolist()] == labels
    # the 100 first labels, as if they were the popular ones, spread over 4 shards
    assert np.bincount(ids[:100] // 250, minlength=4).max() < 40
    vocabulary.save(tmp_path / "v.arrow")
    assert Vocabulary.load(tmp_path / "v.arrow").labels == vocabulary.labels


def test_duckdb_has_the_same_hash_and_order() -> None:
    labels = sorted({*ODD, *(f"label {i}" for i in range(500))})
    known = pa.table({"label": labels})
    with duckdb.connect() as connection:
        connection.register("known", known)
        found = connection.execute(
            "SELECT md5_number(label) AS key, label FROM known ORDER BY key, label"
        ).fetchall()
    assert [label for _, label in found] == Vocabulary.from_labels(labels).labels
    upper, lower = digests(labels).T.tolist()
    assert {(key >> 64, key & (1 << 64) - 1) for key, _ in found} == set(
        zip(upper, lower, strict=True)
    )
    assert upper[3] == int.from_bytes(hashlib.md5(labels[3].encode()).digest(), "little") >> 64


@pytest.mark.parametrize("batch", [1, 3, 1000])
def test_a_file_in_batches_is_the_list_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(room, "BATCH", batch)
    labels = ODD + [f"e{i}" for i in range(50)]  # in another order than that of their hashes
    made = Vocabulary(labels)
    made.save(tmp_path / "v.arrow")
    opened = Vocabulary.load(tmp_path / "v.arrow")
    assert opened.labels == [*opened] == labels
    assert [opened.label(i) for i in range(58)] == labels
    assert opened.ids(labels).tolist() == made.ids(labels).tolist() == list(range(58))
    assert opened.ids(labels[::-3]).tolist() == list(range(57, -1, -3))
    assert opened.ids([]).tolist() == []
    for absent in ("e50", "e", "\0", "zzz"):
        with pytest.raises(
            KeyError, match=r"got label .*, expected one of the 58 labels of .*v\.arrow"
        ):
            opened.ids(["e1", absent])
    assert opened.fingerprint == opened.computed_fingerprint() == made.fingerprint
    assert pd.read_feather(tmp_path / "v.arrow")["label"].tolist() == labels


def test_the_fingerprint_is_that_of_the_labels_and_their_order() -> None:
    lists = (["a", "b"], ["b", "a"], ["ab"], ["", "ab"], ["ab", ""], ["a", "b", "c"], [])
    assert len({Vocabulary(labels).fingerprint for labels in lists}) == len(lists)
    assert Vocabulary(["a", "b"]).fingerprint == Vocabulary(["a", "b"]).fingerprint


def test_labels_of_one_hash_are_told_apart(tmp_path: Path) -> None:
    """No two labels of the same MD5 half are known, so the file pretends.

    A run of equal hashes may span batches.
    """
    labels, absent = ["x", "y", "z", "w"], "v"
    one = digests([absent])[0, 0]
    hashes = np.array([one, one, one, one], dtype=np.uint64)
    columns = [pa.array(labels, pa.large_string()), pa.array(hashes), pa.array([2, 0, 3, 1])]
    batch = pa.record_batch(columns, schema=SCHEMA)
    write(tmp_path / "v.arrow", [batch.slice(0, 1), batch.slice(1, 2), batch.slice(3, 1)])
    opened = Vocabulary.load(tmp_path / "v.arrow")
    with pytest.raises(KeyError, match="'v'"):
        opened.ids([absent])
    assert [opened._id(label, int(one), 0) for label in labels] == [0, 1, 2, 3]


def test_a_file_is_linked_and_not_written_again(tmp_path: Path) -> None:
    first, second = tmp_path / "v.arrow", tmp_path / "run" / "v.arrow"
    second.parent.mkdir()
    Vocabulary(["a", "b"]).save(first)
    opened = Vocabulary.load(first)
    for _ in range(2):
        opened.save(second)
    assert second.samefile(first)
    assert [path.name for path in second.parent.iterdir()] == ["v.arrow"]
    elsewhere = (
        Path("/dev/shm") / f"shardemb-test-{os.getpid()}.arrow"
    )  # another file system, where there is one
    try:
        opened.save(elsewhere)
        assert Vocabulary.load(elsewhere).labels == ["a", "b"]
    finally:
        elsewhere.unlink(missing_ok=True)


def test_errors() -> None:
    with pytest.raises(ValueError, match="label 'b' stands twice, as ids 1 and 2"):
        Vocabulary(["a", "b", "b"])
    with pytest.raises(KeyError, match="nobody"):
        Vocabulary(["a"]).ids(["nobody"])
    for row in (-1, 1):
        with pytest.raises(IndexError, match=f"got id {row}, expected 0 <= id < 1"):
            Vocabulary(["a"]).label(row)


def test_files_that_are_no_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "entities.arrow"
    with pytest.raises(FileNotFoundError, match=r"entities\.arrow"):
        Vocabulary.load(path)
    kinds = [pa.large_string(), pa.uint64(), pa.int64()]
    for columns, text in (
        (
            {"name": pa.array(["a"])},
            (
                r": got columns 'name' \(string\), expected 'label' \(large_string\), 'hash'"
                r" \(uint64\), 'id'"
            ),
        ),
        ({"label": pa.array([0.5])}, r": got columns 'label' \(double\), expected"),
        (
            dict(zip(SCHEMA.names, (pa.array([None], kind) for kind in kinds), strict=True)),
            ": got nulls, expected labels",
        ),
    ):
        table = pa.table(columns)
        with path.open("wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        with pytest.raises(ValueError, match=f"{path}{text}"):
            Vocabulary.load(path)
    Vocabulary(["a", "b"]).save(path)
    for content in (b"", b"a\nb\n", path.read_bytes()[:-10], path.read_bytes()[:600]):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=f"{path}: got a file that is not Arrow's, or is damaged"
        ):
            Vocabulary.load(path)


def test_a_damaged_label_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "v.arrow"
    Vocabulary(["aaaaaaaa", "ññññññññ"]).save(path)
    path.write_bytes(path.read_bytes().replace("ññññññññ".encode(), b"\xff" * 16))
    opened = Vocabulary.load(path)
    assert opened.label(0) == "aaaaaaaa"
    with pytest.raises(ValueError, match=r"v\.arrow: the label of id 1 is damaged"):
        opened.label(1)
    assert opened.computed_fingerprint() != opened.fingerprint


def test_opening_costs_the_same_at_any_size(tmp_path: Path) -> None:
    """No Python object for each label.

    A process opens a million labels, asks for two, and has hardly grown.
    """
    Vocabulary.from_labels(f"http://example.org/entity/{i:020d}" for i in range(1_000_000)).save(
        tmp_path / "v.arrow"
    )
    script = """if True:
        import sys
        from pathlib import Path
        from shardemb.vocabulary import Vocabulary
        def peak():
            lines = open("/proc/self/status")
            return next(int(l.split()[1]) for l in lines if l.startswith("VmHWM")) / 1024
        before = peak()
        vocabulary = Vocabulary.load(Path(sys.argv[1]))
        label = "http://example.org/entity/00000000000000777777"
        assert vocabulary.label(int(vocabulary.ids([label])[0])) == label
        assert len(vocabulary.fingerprint) == 64
        print(peak() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "v.arrow"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (
        float(done.stdout) < 25
    )  # of 80 MB; the kernel maps more than the pages that are asked for
