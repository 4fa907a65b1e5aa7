import gzip
import os
import re
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from shardemb.kge import Triples
from shardemb.kge.reading import MAX_LINE
from shardemb.kge.reading import read as read_table
from shardemb.kge.splits import UNSEEN


def read(path: Path, literals: str = "error") -> tuple[list[str], ...]:
    return tuple(column.to_pylist() for column in read_table(path, literals).columns)


GOOD = b"a\tlikes\tb\nb\tlikes\tc\nc\tknows\ta\n"


def test_wordnet_comes_with_the_package() -> None:
    data = Triples.load("wordnet")
    assert (len(data.train), len(data.valid), len(data.test)) == (209_633, 4_367, 4_367)
    assert (len(data.entities), len(data.relations)) == (112_199, 11)
    assert len(data.all().unique(dim=0)) == 218_367
    # the load of 8 contiguous shards: ids are shuffled, so no shard gets all the popular synsets
    load = torch.bincount(data.train[:, [0, 2]].flatten() // -(-112_199 // 8), minlength=8).float()
    assert load.max() / load.mean() < 1.1
    notice = Path(__file__).parent.parent / "shardemb/data/wordnet/LICENSE"
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in notice.read_text()


@pytest.mark.parametrize("suffix", [".tsv", ".tsv.gz", ".txt", ".parquet"])
def test_own_files(tmp_path: Path, suffix: str) -> None:
    for split in ("train", "valid", "test"):
        path = tmp_path / f"{split}{suffix}"
        if suffix == ".parquet":
            columns = {"head": ["a", "b", "c"], "relation": ["likes", "likes", "knows"], "tail": ["b", "c", "a"]}
            pq.write_table(pa.table(columns), path)
        else:
            path.write_bytes(gzip.compress(GOOD) if suffix == ".tsv.gz" else GOOD)
    data = Triples.load(tmp_path)
    assert torch.equal(data.train[[2, 0, 1]], data.test)  # in another order
    names = [(data.entities.label(h), data.relations.label(r), data.entities.label(t)) for h, r, t in data.test.tolist()]
    assert names == [("a", "likes", "b"), ("b", "likes", "c"), ("c", "knows", "a")]


def test_one_file_is_split_by_a_seed(tmp_path: Path) -> None:
    path = tmp_path / "mine.tsv"
    path.write_text("".join(f"e{i % 50}\tr{i % 3}\te{i % 49}\n" for i in range(1000)))
    data, again = Triples.load(path), Triples.load(path)
    assert (len(data.train), len(data.valid), len(data.test)) == (900, 50, 50)
    assert torch.equal(data.train, again.train)
    assert len(data.entities) == 50


def test_pykeens_sets() -> None:
    pytest.importorskip("pykeen")
    data = Triples.load("pykeen:nations")
    assert (len(data.train), len(data.valid), len(data.test)) == (1592, 199, 201)
    with pytest.raises(FileNotFoundError, match=r"'pykeen:nope', expected one of .*'kinships', 'nations', 'umls'"):
        Triples.load("pykeen:nope")


MALFORMED = {
    "two fields": (b"a\tlikes\tb\nb\tc\n", "line 2: got 2 fields: 'b\\tc', expected three fields"),
    "four fields": (b"a\tlikes\tb\tc\n", "line 1: got 4 fields"),
    "spaces for tabs": (b"a likes b\n", "line 1: got 1 field: 'a likes b'"),
    "empty field": (b"a\tlikes\tb\n\tlikes\tb\n", "line 2: got the field '', expected a label"),
    "empty line": (b"a\tlikes\tb\n\na\tlikes\tc\n", "line 2: got an empty line"),
    "trailing space": (b"a\tlikes\tb \n", "line 1: got the field 'b '"),
    "NUL": (b"a\tli\0kes\tb\n", "line 1: got the field 'li\\x00kes'"),
    "a second BOM": (GOOD + b"\xef\xbb\xbfa\tlikes\tb\n", "line 4: got the field '\\ufeffa', expected a label"),
    "a lone CR in a label": (
        b"a\tli\rkes\tb\n",
        "line 1: got a CR within 'a\\tli\\rkes\\tb', expected lines that end in LF or CRLF",
    ),
    "lines that end in CR": (GOOD.replace(b"\n", b"\r"), "line 1: got a CR within 'a\\tlikes\\tb\\rb"),
    "two CR": (b"a\tlikes\tb\r\r\n", "line 1: got a CR within"),
    "an open quote": (b'a\tlikes\t"b\nb"\tc\n', "line 2: got 2 fields: 'b\"\\tc'"),
    "header": (b"head\trelation\ttail\n" + GOOD, "line 1: got the header 'head\\trelation\\ttail', expected a triple"),
    "header, other names": (b"\xef\xbb\xbf#Subject\tPREDICATE\tobject_id\r\n" + GOOD, "line 1: got the header"),
    "header, other order": (b'"source"\t"target"\t"type"\n' + GOOD, "line 1: got the header"),
    "header, suffixes": (b"head_entity\trelation_name\ttail_entity\n" + GOOD, "line 1: got the header"),
    "header, sides": (b"lhs\trel\trhs\n" + GOOD, "line 1: got the header"),
    "header of letters": (
        b"h\tr\tt\n" + GOOD,
        "line 1: got the header 'h\\tr\\tt', expected a triple, head TAB relation TAB tail: remove",
    ),
    "gzip without .gz": (
        gzip.compress(GOOD),
        "line 1: got byte 0x8b, expected UTF-8 text: this is gzip, give it a name that ends in .gz",
    ),
    "utf-16 without BOM": (GOOD.decode().encode("utf-16-le"), "line 1: got the field 'a\\x00'"),
    "latin-1": ("a\tlikes\tb\na\tlikes\té\n".encode("latin-1"), "line 2: got byte 0xe9, expected UTF-8 text"),
    "utf-16": (GOOD.decode().encode("utf-16"), "line 1: got byte 0xff, expected UTF-8 text: convert it, e.g. iconv -f UTF-16"),
    "huge line": (b"a" * (MAX_LINE + 5), "line 1: got more than 1,048,575 bytes"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_line_is_named(tmp_path: Path, kind: str) -> None:
    content, text = MALFORMED[kind]
    path = tmp_path / "train.tsv"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}, {text}")


def test_column_names_are_labels_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    for first in ("h_1\tr_1\tt_1\n", "head\ttype\tbody\n", "h\thas\tt\n", "head\trelation\thead\n", "subject\tis\tobject\n"):
        path.write_text(first + "a\tr\tb\nhead\trelation\ttail\n")
        assert [column[0] for column in read(path)] == first.split()
        assert [column[2] for column in read(path)] == ["head", "relation", "tail"]


def test_damaged_gzip_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(b"%d\tr\t%d\n" % (i, i * i) for i in range(20000)))
    for content in (whole[:-100], b"no gzip at all", whole[:5000] + b"\0" * 100 + whole[5100:], whole + b"more"):
        path = tmp_path / "train.tsv.gz"
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"train.tsv.gz, line \d+: got a damaged file \(.*\), expected a whole gzip file: fetch"
        ):
            read(path)


def test_harmless_differences(tmp_path: Path) -> None:
    """A BOM, CRLF, a quote, and a last line without an end are no part of a label."""
    path = tmp_path / "train.tsv"
    path.write_bytes(b'\xef\xbb\xbfa\tlikes\tb\r\n"b\tlikes\tc d')
    assert read(path) == (["a", '"b'], ["likes", "likes"], ["b", "c d"])


@pytest.mark.parametrize("suffix", [".tsv", ".tsv.gz", ".parquet"])
def test_a_file_without_triples_is_named(tmp_path: Path, suffix: str) -> None:
    for content in (b"", gzip.compress(b"")) if suffix == ".tsv.gz" else (b"",):
        path = tmp_path / f"test{suffix}"
        path.write_bytes(content)
        if suffix == ".parquet":
            pq.write_table(pa.table({name: pa.array([], pa.string()) for name in ("head", "relation", "tail")}), path)
        with pytest.raises(ValueError, match=rf"test{suffix}: got a file without triples, expected at least one"):
            read(path)


def test_files_that_cannot_be_read(as_nobody: Path) -> None:
    for name in ("train.tsv", "train.tsv.gz", "train.parquet"):
        path = as_nobody / name
        path.touch(0o000)
        with pytest.raises(PermissionError, match=name):
            read(path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    for split in ("valid", "test"):
        (tmp_path / f"{split}.tsv").write_bytes(GOOD)
    os.mkfifo(tmp_path / "train.tsv")
    with pytest.raises(ValueError, match=r"train\.tsv: got a pipe or a device, expected a file of triples"):
        Triples.load(tmp_path)


def test_a_file_that_breaks_off_is_named() -> None:
    text = r"^/proc/self/mem, line 1: got a damaged file \(.*Input/output error\), expected a file that can be read"
    with pytest.raises(ValueError, match=text):
        read(Path("/proc/self/mem"))  # its first page is not there


STRING_TYPES = [
    pa.string(),
    pa.large_string(),
    pa.dictionary(pa.int32(), pa.string()),
    pa.dictionary(pa.int8(), pa.large_string()),
]


def table(head: object = ("a",), relation: object = ("r",), tail: object = ("b",)) -> pa.Table:
    return pa.table([pa.array(x) if isinstance(x, tuple) else x for x in (head, relation, tail)], ["head", "relation", "tail"])


@pytest.mark.parametrize("kind", [*STRING_TYPES, pa.int64(), pa.uint8()], ids=str)
def test_parquet_types(tmp_path: Path, kind: pa.DataType) -> None:
    path = tmp_path / "train.parquet"
    labels = ["a", "b c", '"d'] if kind in STRING_TYPES else [1, 2, 250]
    heads = pa.array(labels, getattr(kind, "value_type", kind)).cast(kind)
    pq.write_table(table(heads, heads, heads).append_column("weight", pa.array([0.5, 1, 2])), path, row_group_size=2)
    assert pa.types.is_dictionary(pq.read_schema(path).field("head").type) == pa.types.is_dictionary(kind)
    assert read(path) == ([str(label) for label in labels],) * 3


NOT_UTF8 = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])

WRONG_TABLES = {
    "missing column": (
        table().rename_columns(["h", "relation", "tail"]),
        r"columns \['h', 'relation', 'tail'\], expected 'head', 'rel",
    ),
    "twice a column": (table().append_column("head", pa.array(["x"])), "expected 'head', 'relation', 'tail', each once"),
    "float": (table(head=(1.5,)), "column 'head' of type double, expected strings or integers"),
    "truth values": (table(tail=(True,)), "column 'tail' of type bool, expected"),
    "bytes": (table(head=(b"a",)), "column 'head' of type binary, expected"),
    "nested": (table(head=({"id": "a"},)), r"column 'head' of type struct<id: string>, expected"),
    "list": (table(relation=(["r"],)), "column 'relation' of type list<.*>, expected"),
    "only nulls": (table(relation=(None,)), "column 'relation' of type null, expected"),
    "null": (table(("a", None), ("r", "r"), ("b", "b")), "row 1, column 'head': got a null, expected a label"),
    "null integer": (table((1, 2), (1, 2), (1, None)), "row 1, column 'tail': got a null, expected a label"),
    "null in a dictionary": (table(head=pa.array([None], pa.string()).dictionary_encode()), "row 0, column 'head': got a null"),
    "empty": (table(relation=("",)), "row 0, column 'relation': got '', expected a label, not empty"),
    "NUL": (table(relation=("a\0",)), r"row 0, column 'relation': got 'a\\x00', expected a label"),
    "tab": (table(("a", "a\tb"), ("r", "r"), ("b", "b")), r"row 1, column 'head': got 'a\\tb', expected a label"),
    "line break": (table(tail=("a\nb",)), r"row 0, column 'tail': got 'a\\nb', expected a label"),
    "outer space": (table(tail=("b ",)), "row 0, column 'tail': got 'b ', expected a label"),
    "not UTF-8": (
        table(pa.chunked_array([["a"], NOT_UTF8]), ("r", "r"), ("b", "b")),
        r"row 1, column 'head': got b'\\xff', expected UTF-8 text",
    ),
}


@pytest.mark.parametrize("kind", WRONG_TABLES)
def test_parquet_of_another_schema(tmp_path: Path, kind: str) -> None:
    wrong, text = WRONG_TABLES[kind]
    path = tmp_path / "train.parquet"
    pq.write_table(wrong, path)
    with pytest.raises(ValueError, match=rf"{path}(:|, row \d+, column '\w+':) got .*") as caught:
        read(path)
    assert re.search(text, str(caught.value))


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    pq.write_table(table(*[tuple(f"label {i * i}" for i in range(5000))] * 3), path)
    whole = path.read_bytes()
    for content in (
        b"",
        b"no parquet",
        whole[:-1],
        whole[: len(whole) // 2],
        whole[:4] + b"\xff" * 50 + whole[54:],
        whole[:50] + b"\xff" * 3000 + whole[3050:],
        whole.replace(b"head", b"\xffead", 1),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"^{path}: got a file that is not Parquet, or is damaged \(.*\)$"):
            read(path)


def test_missing_and_doubtful_files(tmp_path: Path) -> None:
    for nowhere in (tmp_path / "nowhere", ""):
        with pytest.raises(FileNotFoundError, match="expected 'wordnet', 'pykeen:NAME', a folder"):
            Triples.load(nowhere)
    (tmp_path / "train.tsv").write_bytes(GOOD)
    with pytest.raises(FileNotFoundError, match=r"got 0 files for 'valid', expected one of valid\.tsv, "):
        Triples.load(tmp_path)
    (tmp_path / "valid.csv").write_bytes(GOOD)
    with pytest.raises(FileNotFoundError, match=r"got 0 files for 'valid' but \['valid.csv'\], expected one of valid\.tsv, "):
        Triples.load(tmp_path)
    (tmp_path / "valid.tsv").write_bytes(GOOD)
    (tmp_path / "test.parquet").mkdir()
    with pytest.raises(IsADirectoryError, match=r"test\.parquet: got a folder, expected a file of triples"):
        Triples.load(tmp_path)
    (tmp_path / "train.tsv.gz").write_bytes(gzip.compress(GOOD))
    text = "got 2 files for 'train', train.tsv and train.tsv.gz, expected one: remove the others"
    with pytest.raises(ValueError, match=text):
        Triples.load(tmp_path)
    with pytest.raises(ValueError, match="no training triples"):
        Triples.from_columns("t", ([], [], []), ([], [], []), ([], [], []))


UNTRAINED = (
    "2 of 3 valid triples hold entities (4: 'v', 'w', 'x', ...) and relations (1: 'q'), "
    "1 of 2 test triples hold relations (1: 'p') that no training triple holds"
)


def test_unseen_entities_and_relations(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_bytes(GOOD)
    (tmp_path / "valid.tsv").write_bytes(b"v\tlikes\tw\na\tlikes\tc\nx\tq\ty\n")
    (tmp_path / "test.tsv").write_bytes(b"a\tp\tb\na\tknows\tb\n")
    with pytest.warns(UserWarning, match="2 of 3 valid") as caught:
        kept = Triples.load(tmp_path)
    fate = "they stay untrained; unseen='drop' drops these triples"
    assert [str(warning.message) for warning in caught] == [f"{tmp_path}: {UNTRAINED}: {fate}"]
    assert (len(kept.valid), len(kept.test), len(kept.entities), len(kept.relations)) == (3, 2, 7, 4)
    with pytest.warns(UserWarning, match="2 of 3 valid") as caught:
        dropped = Triples.load(tmp_path, unseen="drop")
    assert [str(warning.message) for warning in caught] == [f"{tmp_path}: {UNTRAINED}: dropped these triples"]
    assert [len(part) for part in (dropped.train, dropped.valid, dropped.test, dropped.all())] == [3, 1, 1, 5]
    assert (sorted(dropped.entities.labels), sorted(dropped.relations.labels)) == (["a", "b", "c"], ["knows", "likes"])
    head, relation, tail = dropped.valid[0].tolist()
    assert (dropped.entities.labels[head], dropped.relations.labels[relation], dropped.entities.labels[tail]) == (
        "a",
        "likes",
        "c",
    )
    with pytest.raises(ValueError) as error:
        Triples.load(tmp_path, unseen="error")
    assert str(error.value).startswith(f"{tmp_path}: {UNTRAINED}, expected none: unseen='drop' drops these triples")
    with pytest.raises(ValueError, match="unseen: got 'dorp', expected one of 'keep', 'drop', 'error'"):
        Triples.load(tmp_path, unseen="dorp")


def test_unseen_labels_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.tsv"
    path.write_text("".join(f"a{i}\tr\tb{i}\n" for i in range(40)))  # what is held out shares no entity with the rest
    with pytest.warns(UserWarning, match=r"2 of 2 valid triples .*, 2 of 2 test triples .*: dropped these triples"):
        data = Triples.load(path, "drop")
    assert (len(data.train), len(data.valid), len(data.test), len(data.entities)) == (36, 0, 0, 72)


@pytest.mark.parametrize("unseen", UNSEEN)
def test_nothing_unseen_nothing_said(unseen: str) -> None:
    part = (["a", "b"], ["r", "r"], ["b", "a"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = Triples.from_columns("t", part, part, ([], [], []), unseen)
    assert torch.equal(data.train, data.valid)
