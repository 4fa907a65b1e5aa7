import gzip
import os
import random
import re
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from shardemb.kge import Triples
from shardemb.kge.data import triple_files
from shardemb.kge.data.splits import UNSEEN, mixed
from shardemb.kge.data.triple_files import MAX_LINE
from shardemb.kge.data.triple_files import read as read_table


def read(path: Path, literals: str = "error") -> tuple[list[str], ...]:
    return tuple(column.to_pylist() for column in read_table(path, literals).columns)


GOOD = b"a\tlikes\tb\nb\tlikes\tc\nc\tknows\ta\n"


def test_wordnet_comes_with_the_package() -> None:
    data = Triples.load("wordnet")
    assert (len(data.train), len(data.valid), len(data.test)) == (209_633, 4_367, 4_367)
    assert (len(data.entities), len(data.relations)) == (112_199, 11)
    assert len(torch.cat(data.splits).unique(dim=0)) == 218_367
    # the load of 8 contiguous shards: ids are shuffled, so no shard gets all the popular synsets
    load = torch.bincount(data.train[:, [0, 2]].flatten() // -(-112_199 // 8), minlength=8).float()
    assert load.max() / load.mean() < 1.1
    notice = Path(__file__).parents[3] / "shardemb/kge/data/wordnet/LICENSE"
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in notice.read_text()


@pytest.mark.parametrize("suffix", [".tsv", ".tsv.gz", ".txt", ".parquet"])
def test_own_files(tmp_path: Path, suffix: str) -> None:
    for split in ("train", "valid", "test"):
        path = tmp_path / f"{split}{suffix}"
        if suffix == ".parquet":
            columns = {
                "head": ["a", "b", "c"],
                "relation": ["likes", "likes", "knows"],
                "tail": ["b", "c", "a"],
            }
            pq.write_table(pa.table(columns), path)
        else:
            path.write_bytes(gzip.compress(GOOD) if suffix == ".tsv.gz" else GOOD)
    data = Triples.load(tmp_path)
    assert torch.equal(data.train[[2, 0, 1]], data.test)  # in another order
    names = [
        (data.entities.label(h), data.relations.label(r), data.entities.label(t))
        for h, r, t in data.test.tolist()
    ]
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
    with pytest.raises(
        FileNotFoundError, match=r"'pykeen:nope', expected one of .*'kinships', 'nations', 'umls'"
    ):
        Triples.load("pykeen:nope")


MALFORMED = {
    "two fields": (b"a\tlikes\tb\nb\tc\n", "line 2: got 2 fields: 'b\\tc', expected three fields"),
    "four fields": (b"a\tlikes\tb\tc\n", "line 1: got 4 fields"),
    "spaces for tabs": (b"a likes b\n", "line 1: got 1 field: 'a likes b'"),
    "empty field": (b"a\tlikes\tb\n\tlikes\tb\n", "line 2: got the field '', expected a label"),
    "empty line": (b"a\tlikes\tb\n\na\tlikes\tc\n", "line 2: got an empty line"),
    "trailing space": (b"a\tlikes\tb \n", "line 1: got the field 'b '"),
    "NUL": (b"a\tli\0kes\tb\n", "line 1: got the field 'li\\x00kes'"),
    "a second BOM": (
        GOOD + b"\xef\xbb\xbfa\tlikes\tb\n",
        "line 4: got the field '\\ufeffa', expected a label",
    ),
    "a lone CR in a label": (
        b"a\tli\rkes\tb\n",
        "line 1: got a CR within 'a\\tli\\rkes\\tb', expected lines that end in LF or CRLF",
    ),
    "lines that end in CR": (
        GOOD.replace(b"\n", b"\r"),
        "line 1: got a CR within 'a\\tlikes\\tb\\rb",
    ),
    "two CR": (b"a\tlikes\tb\r\r\n", "line 1: got a CR within"),
    "an open quote": (b'a\tlikes\t"b\nb"\tc\n', "line 2: got 2 fields: 'b\"\\tc'"),
    "header": (
        b"head\trelation\ttail\n" + GOOD,
        "line 1: got the header 'head\\trelation\\ttail', expected a triple",
    ),
    "header, other names": (
        b"\xef\xbb\xbf#Subject\tPREDICATE\tobject_id\r\n" + GOOD,
        "line 1: got the header",
    ),
    "header, other order": (b'"source"\t"target"\t"type"\n' + GOOD, "line 1: got the header"),
    "header, suffixes": (
        b"head_entity\trelation_name\ttail_entity\n" + GOOD,
        "line 1: got the header",
    ),
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
    "latin-1": (
        "a\tlikes\tb\na\tlikes\té\n".encode("latin-1"),
        "line 2: got byte 0xe9, expected UTF-8 text",
    ),
    "utf-16": (
        GOOD.decode().encode("utf-16"),
        "line 1: got byte 0xff, expected UTF-8 text: convert it, e.g. iconv -f UTF-16",
    ),
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
    for first in (
        "h_1\tr_1\tt_1\n",
        "head\ttype\tbody\n",
        "h\thas\tt\n",
        "head\trelation\thead\n",
        "subject\tis\tobject\n",
    ):
        path.write_text(first + "a\tr\tb\nhead\trelation\ttail\n")
        assert [column[0] for column in read(path)] == first.split()
        assert [column[2] for column in read(path)] == ["head", "relation", "tail"]


def test_damaged_gzip_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(b"%d\tr\t%d\n" % (i, i * i) for i in range(20000)))
    for content in (
        whole[:-100],
        b"no gzip at all",
        whole[:5000] + b"\0" * 100 + whole[5100:],
        whole + b"more",
    ):
        path = tmp_path / "train.tsv.gz"
        path.write_bytes(content)
        with pytest.raises(
            ValueError,
            match=(
                r"train.tsv.gz, line \d+: got a damaged file \(.*\), expected a whole gzip file:"
                r" fetch"
            ),
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
            pq.write_table(
                pa.table(
                    {name: pa.array([], pa.string()) for name in ("head", "relation", "tail")}
                ),
                path,
            )
        with pytest.raises(
            ValueError, match=rf"test{suffix}: got a file without triples, expected at least one"
        ):
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
    with pytest.raises(
        ValueError, match=r"train\.tsv: got a pipe or a device, expected a file of triples"
    ):
        Triples.load(tmp_path)


def test_a_file_that_breaks_off_is_named() -> None:
    text = (
        r"^/proc/self/mem, line 1: got a damaged file \(.*Input/output error\), expected a file"
        r" that can be read"
    )
    with pytest.raises(ValueError, match=text):
        read(Path("/proc/self/mem"))  # its first page is not there


STRING_TYPES = [
    pa.string(),
    pa.large_string(),
    pa.dictionary(pa.int32(), pa.string()),
    pa.dictionary(pa.int8(), pa.large_string()),
]


def table(head: object = ("a",), relation: object = ("r",), tail: object = ("b",)) -> pa.Table:
    return pa.table(
        [pa.array(x) if isinstance(x, tuple) else x for x in (head, relation, tail)],
        ["head", "relation", "tail"],
    )


@pytest.mark.parametrize("kind", [*STRING_TYPES, pa.int64(), pa.uint8()], ids=str)
def test_parquet_types(tmp_path: Path, kind: pa.DataType) -> None:
    path = tmp_path / "train.parquet"
    labels = ["a", "b c", '"d'] if kind in STRING_TYPES else [1, 2, 250]
    heads = pa.array(labels, getattr(kind, "value_type", kind)).cast(kind)
    pq.write_table(
        table(heads, heads, heads).append_column("weight", pa.array([0.5, 1, 2])),
        path,
        row_group_size=2,
    )
    assert pa.types.is_dictionary(
        pq.read_schema(path).field("head").type
    ) == pa.types.is_dictionary(kind)
    assert read(path) == ([str(label) for label in labels],) * 3


NOT_UTF8 = pa.Array.from_buffers(
    pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]
)

WRONG_TABLES = {
    "missing column": (
        table().rename_columns(["h", "relation", "tail"]),
        r"columns \['h', 'relation', 'tail'\], expected 'head', 'rel",
    ),
    "twice a column": (
        table().append_column("head", pa.array(["x"])),
        "expected 'head', 'relation', 'tail', each once",
    ),
    "float": (table(head=(1.5,)), "column 'head' of type double, expected strings or integers"),
    "truth values": (table(tail=(True,)), "column 'tail' of type bool, expected"),
    "bytes": (table(head=(b"a",)), "column 'head' of type binary, expected"),
    "nested": (table(head=({"id": "a"},)), r"column 'head' of type struct<id: string>, expected"),
    "list": (table(relation=(["r"],)), "column 'relation' of type list<.*>, expected"),
    "only nulls": (table(relation=(None,)), "column 'relation' of type null, expected"),
    "null": (
        table(("a", None), ("r", "r"), ("b", "b")),
        "row 1, column 'head': got a null, expected a label",
    ),
    "null integer": (
        table((1, 2), (1, 2), (1, None)),
        "row 1, column 'tail': got a null, expected a label",
    ),
    "null in a dictionary": (
        table(head=pa.array([None], pa.string()).dictionary_encode()),
        "row 0, column 'head': got a null",
    ),
    "empty": (
        table(relation=("",)),
        "row 0, column 'relation': got '', expected a label, not empty",
    ),
    "NUL": (table(relation=("a\0",)), r"row 0, column 'relation': got 'a\\x00', expected a label"),
    "tab": (
        table(("a", "a\tb"), ("r", "r"), ("b", "b")),
        r"row 1, column 'head': got 'a\\tb', expected a label",
    ),
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
        with pytest.raises(
            ValueError, match=rf"^{path}: got a file that is not Parquet, or is damaged \(.*\)$"
        ):
            read(path)


def test_missing_and_doubtful_files(tmp_path: Path) -> None:
    for nowhere in (tmp_path / "nowhere", ""):
        with pytest.raises(FileNotFoundError, match="expected 'wordnet', 'pykeen:NAME', a folder"):
            Triples.load(nowhere)
    (tmp_path / "train.tsv").write_bytes(GOOD)
    with pytest.raises(
        FileNotFoundError, match=r"got 0 files for 'valid', expected one of valid\.tsv, "
    ):
        Triples.load(tmp_path)
    (tmp_path / "valid.csv").write_bytes(GOOD)
    with pytest.raises(
        FileNotFoundError,
        match=r"got 0 files for 'valid' but \['valid.csv'\], expected one of valid\.tsv, ",
    ):
        Triples.load(tmp_path)
    (tmp_path / "valid.tsv").write_bytes(GOOD)
    (tmp_path / "test.parquet").mkdir()
    with pytest.raises(
        IsADirectoryError, match=r"test\.parquet: got a folder, expected a file of triples"
    ):
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
    assert (len(kept.valid), len(kept.test), len(kept.entities), len(kept.relations)) == (
        3,
        2,
        7,
        4,
    )
    with pytest.warns(UserWarning, match="2 of 3 valid") as caught:
        dropped = Triples.load(tmp_path, unseen="drop")
    assert [str(warning.message) for warning in caught] == [
        f"{tmp_path}: {UNTRAINED}: dropped these triples"
    ]
    assert [len(part) for part in dropped.splits] == [3, 1, 1]
    assert (sorted(dropped.entities.labels), sorted(dropped.relations.labels)) == (
        ["a", "b", "c"],
        ["knows", "likes"],
    )
    head, relation, tail = dropped.valid[0].tolist()
    assert (
        dropped.entities.labels[head],
        dropped.relations.labels[relation],
        dropped.entities.labels[tail],
    ) == ("a", "likes", "c")
    with pytest.raises(ValueError) as error:
        Triples.load(tmp_path, unseen="error")
    assert str(error.value).startswith(
        f"{tmp_path}: {UNTRAINED}, expected none: unseen='drop' drops these, 'keep' keeps them"
    )
    with pytest.raises(
        ValueError, match="unseen: got 'dorp', expected one of 'keep', 'drop', 'error'"
    ):
        Triples.load(tmp_path, unseen="dorp")


def test_unseen_labels_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.tsv"
    path.write_text(
        "".join(f"a{i}\tr\tb{i}\n" for i in range(40))
    )  # what is held out shares no entity with the rest
    with pytest.warns(
        UserWarning, match=r"2 of 2 valid triples .*, 2 of 2 test triples .*: dropped these triples"
    ):
        data = Triples.load(path, "drop")
    assert (len(data.train), len(data.valid), len(data.test), len(data.entities)) == (36, 0, 0, 72)


@pytest.mark.parametrize("unseen", UNSEEN)
def test_nothing_unseen_nothing_said(unseen: str) -> None:
    part = (["a", "b"], ["r", "r"], ["b", "a"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = Triples.from_columns("t", part, part, ([], [], []), unseen)
    assert torch.equal(data.train, data.valid)


def outcome(path: Path, literals: str = "error") -> object:
    try:
        return read(path, literals)
    except ValueError as error:
        return str(error)


PIECES = [
    b"a",
    b"b c",
    b"\t",
    b"\t",
    b"\t",
    b"\n",
    b"\n",
    b"\r\n",
    b"\r",
    b" ",
    b"\0",
    b'"',
    b"'",
    b"\\",
    b",",
    b"#",
    b"head",
]
#: letters and spaces; then what is not UTF-8: cut, surrogate, too long, past the last
PIECES += [b"\xc3\xa9", b"\xef\xbb\xbf", b"\xc2\x85", b"\xe2\x80\x83", b"\x1c"]
PIECES += [b"\xff", b"\xef\xbb", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80"]
LINES = [b"a\tr\tb\n", b"\"\tr\t'\n", b"a\tr\tb\r\n", "é\tr\t\U0001f600\n".encode()]
LINES += [b"\xef\xbb\xbfa\tr\tb\n", b"NA\tnull\t1.0\n"]


@pytest.mark.parametrize("seed", range(4))
def test_arrow_accepts_what_the_line_by_line_reader_accepts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Mostly good lines with odd pieces between.

    The fast way gives the same triples, or the same error, block by block.
    """
    draw = random.Random(seed)
    path, fast, good = tmp_path / "x.tsv", triple_files._fast_tsv, 0
    for _ in range(400):
        lines = [
            draw.choice(LINES if draw.random() < 0.3 else LINES[:4])
            for _ in range(draw.randrange(1, 8))
        ]
        for _ in range(draw.randrange(3)):
            lines.insert(draw.randrange(len(lines) + 1), draw.choice(PIECES))
        path.write_bytes(b"".join(lines).removesuffix(draw.choice([b"", b"\n", b"\r\n"])))
        monkeypatch.setattr(triple_files, "BLOCK", draw.choice([1, 20, 1 << 22]))
        found = outcome(path)
        monkeypatch.setattr(triple_files, "_fast_tsv", lambda lines: None)
        assert outcome(path) == found, path.read_bytes()
        monkeypatch.setattr(triple_files, "_fast_tsv", fast)
        good += not isinstance(found, str)
    assert 50 < good < 350


@pytest.mark.parametrize("seed", range(4))
def test_arrow_accepts_the_n_triples_that_the_line_by_line_reader_accepts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    draw = random.Random(seed)
    path, fast, good = tmp_path / "x.nt", triple_files._fast_nt, 0
    terms = [
        *TERMS,
        *list(TERMS)[:2] * 5,
        *LITERALS,
        "<x:>",
        "<x:\xa0>",
        "<x:\u2003a>",
        "_:a.",
        ". # comment",
        "#",
    ]
    terms += ["", "<s>", "<x:a b>", "_:", "\ufeff", r"<x:\>", "<x:\0>", "<x:\r>"] * (seed % 2)
    for _ in range(300):
        lines = []
        for _ in range(draw.randrange(1, 6)):
            line = draw.choice([" ", "\t", ""]).join(
                [draw.choice(terms), "<x:p>", draw.choice(terms), "."]
            )
            lines.append(
                line.encode()
                if draw.random() < 0.95
                else draw.choice([b"", b"# comment", b"<x:\xff> <x:p> <x:o> ."])
            )
        path.write_bytes(
            draw.choice([b"", b"", b"\xef\xbb\xbf"])
            + draw.choice([b"\n", b"\r\n"]).join(lines)
            + draw.choice([b"", b"\n"])
        )
        monkeypatch.setattr(triple_files, "BLOCK", draw.choice([1, 60, 1 << 22]))
        literals = draw.choice(["keep", "drop"])
        found = outcome(path, literals)
        monkeypatch.setattr(
            triple_files,
            "_fast_nt",
            lambda text, bounds: (
                np.zeros(len(bounds) - 1, bool),
                triple_files.SCHEMA.empty_table(),
            ),
        )
        assert outcome(path, literals) == found, path.read_bytes()
        monkeypatch.setattr(triple_files, "_fast_nt", fast)
        good += not isinstance(found, str)
    assert 20 < good < 290


def test_arrow_knows_the_same_outer_spaces() -> None:
    chars = [*map(chr, range(0xD800)), *map(chr, range(0xE000, 0x110000))]
    none = [
        label
        for char in chars
        for label in (char, f"{char}a", f"a{char}")
        if not triple_files._is_label(label)
    ]
    assert len(none) > 3 * 25
    for label in none:
        column = pa.chunked_array([["x", label]], pa.large_string())
        assert not triple_files._surely_labels(column, triple_files._FORBIDDEN), repr(label)


def test_good_lines_take_the_fast_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(path: Path, number: int, line: str) -> list[str]:
        raise AssertionError(f"line {number} was read by itself")

    monkeypatch.setattr(triple_files, "_tsv_line", never)
    (tmp_path / "x.tsv").write_bytes(b"".join(LINES[:4]) * 3)
    assert len(read(tmp_path / "x.tsv")[0]) == 12


def test_numbers_of_lines_and_rows_count_over_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triple_files, "BLOCK", 50)
    monkeypatch.setattr(triple_files, "ROWS", 10)
    for name in ("x.tsv", "x.tsv.gz"):
        content = GOOD * 40 + b"a\tb\n" + GOOD * 20 + b"a\n"
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        with pytest.raises(ValueError, match=rf"{name}, line 121: got 2 fields"):  # the first one
            read(tmp_path / name)
    labels = [*map(str, range(100)), " a", ""]
    pq.write_table(
        pa.table(dict.fromkeys(("head", "relation", "tail"), labels)), tmp_path / "x.parquet"
    )
    with pytest.raises(
        ValueError, match=r"x\.parquet, row 100, column 'head': got ' a', expected a label"
    ):
        read(tmp_path / "x.parquet")
    whole = gzip.compress(GOOD * 5000)
    (tmp_path / "x.tsv.gz").write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=r"line \d{4,}: got a damaged file"):
        read(tmp_path / "x.tsv.gz")


TERMS = {
    "<http://a/b>": "http://a/b",
    "<urn:x>": "urn:x",
    r"<http://a/\u00e9\U0001F600>": "http://a/é\U0001f600",
    "_:b1": "_:b1",
    "_:a.b-c": "_:a.b-c",
    "_:é": "_:é",
}
LITERALS = {
    '"text"': '"text"',
    '""': '""',
    '"a b"@en-GB': '"a b"@en-GB',
    '"1"^^<http://www.w3.org/2001/XMLSchema#integer>': (
        '"1"^^<http://www.w3.org/2001/XMLSchema#integer>'
    ),
    r'"\u00e9\t\u0009\"\u0022\\\u005c\'"': r'"é\t\t\"\"\\\\' + "'\"",
    r'"\u0000\u007f\uFEFF\r\n\f\b"': r'"\u0000\u007F\uFEFF\r\n\f\b"',
    '"a\tb"': r'"a\tb"',
    '"> <"': '"> <"',
    '". # "': '". # "',
}


def test_n_triples(tmp_path: Path) -> None:
    path = tmp_path / "x.nt"
    lines = [
        "# a comment",
        "",
        " \t",
        "<x:s> <x:p> <x:o> . # and one",
        "\t<x:s>\t<x:p>\t<x:o>\t.",
        "<x:s><x:p><x:o>.",
    ]
    expected = [("x:s", "x:p", "x:o")] * 3
    for term, label in TERMS.items():
        lines.append(f"{term} <x:p> {term} .")
        expected.append((label, "x:p", label))
    text = "\n".join(lines) + "\r\n<x:s> <x:p> <x:o>."
    for content in (text, "\ufeff" + text):
        path.write_text(content, newline="")
        assert [*zip(*read(path), strict=True)] == [*expected, ("x:s", "x:p", "x:o")]
    (tmp_path / "y.nt.gz").write_bytes(gzip.compress(text.encode()))
    assert read(tmp_path / "y.nt.gz") == read(path)
    assert [len(part) for part in read(path)] == [len(expected) + 1] * 3


def test_literals_of_n_triples(tmp_path: Path) -> None:
    path = tmp_path / "x.nt"
    path.write_text(
        "<x:s> <x:p> <x:o> .\n" + "".join(f"<x:s> <x:p> {literal} .\n" for literal in LITERALS),
        newline="",
    )
    text = (
        r"x\.nt, line 2: got the literal 'text', expected an IRI or a blank node: .* \(shardemb"
        r" ingest --literals\)"
    )
    for how in (read, lambda path: Triples.load(path)):
        with pytest.raises(ValueError, match=text):
            how(path)
    assert read(path, "drop") == (["x:s"], ["x:p"], ["x:o"])
    assert read(path, "keep")[2] == ["x:o", *LITERALS.values()]
    assert len(Triples.load(path, literals="keep").entities) == 2 + len(LITERALS)
    with pytest.raises(
        ValueError, match="literals: got 'dorp', expected one of 'error', 'drop', 'keep'"
    ):
        read(path, "dorp")
    path.write_text('<x:s> <x:p> "a" .\n')
    with pytest.raises(
        ValueError, match="got a file without triples but 1 with literals, which are dropped"
    ):
        read(path, "drop")


WRONG_N_TRIPLES = [
    "<x:s> <x:p> <x:o>",
    "<x:s> <x:p> .",
    "<x:s> <x:p> <x:o> <x:g> .",
    "<x:s> <x:p> <x:o> . <x:s> <x:p> <x:o> .",
    "<x:s> _:p <x:o> .",
    '"s" <x:p> <x:o> .',
    '<x:s> "p" <x:o> .',
    "<x:s> <x:p> 'o' .",
    "<x:s> <x:p> 1 .",
    '<x:s> <x:p> "a"b" .',
    r'<x:s> <x:p> "\x" .',
    r'<x:s> <x:p> "\u12" .',
    r'<x:s> <x:p> "\ud800" .',
    r'<x:s> <x:p> "\U00110000" .',
    '<x:s> <x:p> "a"@ .',
    '<x:s> <x:p> "a"@1 .',
    '<x:s> <x:p> "a"^^"b" .',
    '<x:s> <x:p> "a"^^<b> .',
    "<s> <x:p> <x:o> .",
    "<> <x:p> <x:o> .",
    "<x:a b> <x:p> <x:o> .",
    r"<x:a\u0020b> <x:p> <x:o> .",
    r"<x:\u003e> <x:p> <x:o> .",
    r"<x:\n> <x:p> <x:o> .",
    "<x:{> <x:p> <x:o> .",
    "<x:s> <x:p> _: .",
    "<x:s> <x:p> _:-a .",
    "<x:s> <x:p> _:a. .x",
    "@prefix x: <y:> .",
    "x:s x:p x:o .",
    "a\tr\tb",
    "<x:\xa0> <x:p> <x:o> .".replace("x:\xa0", "x:a\xa0"),
    "<x:s> <x:p> <x:o> .\r<x:s> <x:p> <x:o> .",
]


@pytest.mark.parametrize("line", WRONG_N_TRIPLES)
def test_a_line_that_is_no_n_triples_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "x.nt"
    path.write_text(f"<x:s> <x:p> <x:o> .\n{line}\n", newline="")
    for literals in ("keep", "drop"):
        with pytest.raises(ValueError, match=r"x\.nt, line 2: got .*, expected"):
            read(path, literals)


def test_part_files(tmp_path: Path) -> None:
    """Parts are read by their names.

    A folder of parts is one graph, and one that might be three is refused.
    """
    for split, first in (("train", 0), ("valid", 4), ("test", 8)):
        (tmp_path / "three" / split).mkdir(parents=True)
        for part in (1, 0):
            lines = (f"e{i}\tr\te{i + 1}\n" for i in range(first + 2 * part, first + 2 * part + 2))
            (tmp_path / "three" / split / f"part-{part}.tsv").write_text("".join(lines))
        (tmp_path / "three" / split / "_SUCCESS").touch()
        (tmp_path / "three" / split / ".part-0.tsv.crc").touch()
    with pytest.warns(UserWarning, match="no training triple holds"):
        data = Triples.load(tmp_path / "three")
    assert [data.entities.label(i) for i in data.test[:, 0].tolist()] == ["e8", "e9", "e10", "e11"]
    one = tmp_path / "one"
    (tmp_path / "three" / "train").rename(one)
    assert len(Triples.load(one).train) == 4
    (one / "notes.md").touch()
    with pytest.raises(
        ValueError, match=r"notes\.md: got no part file, expected only \.tsv, .*: move it elsewhere"
    ):
        Triples.load(one)
    (one / "notes.md").unlink()
    for name in ("validation.tsv", "Train-00000-of-00002.parquet", "dev.tsv.gz"):
        (one / name).touch()
        with pytest.raises(ValueError, match=rf"{name}: got a file that is named like a split"):
            Triples.load(one)
        (one / name).unlink()
    (tmp_path / "three" / "train").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"train: got a folder without files, expected part files"
    ):
        Triples.load(tmp_path / "three")
    (tmp_path / "three" / "train.tsv").write_bytes(GOOD)
    with pytest.raises(
        ValueError, match=r"got 2 files for 'train', train\.tsv and train, expected one"
    ):
        Triples.load(tmp_path / "three")


def test_the_order_of_training_triples_depends_on_their_number_alone(tmp_path: Path) -> None:
    order = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        for split in ("train", "valid", "test"):
            (folder / f"{split}.tsv").write_text(
                "".join(f"{name}{i}\tr\t{name}{i}\n" for i in range(100))
            )
        data = Triples.load(folder)
        order.append([int(data.entities.label(i)[1:]) for i in data.train[:, 0].tolist()])
        assert [int(data.entities.label(i)[1:]) for i in data.valid[:, 0].tolist()] == [*range(100)]
    assert order[0] == order[1] == np.argsort(mixed(np.arange(100))).tolist() != [*range(100)]
    assert (
        int(mixed(np.arange(1))[0]) == 0xE220A8397B1DCDAF
    )  # splitmix64's first number for the seed 0
