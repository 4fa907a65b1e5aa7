import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from shardemb.kge import Triples
from shardemb.kge.triples import MAX_LINE, read

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
    assert torch.equal(data.train, data.test)
    names = [(data.entities.labels[h], data.relations.labels[r], data.entities.labels[t]) for h, r, t in data.train]
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
    "empty field": (b"a\tlikes\tb\n\tlikes\tb\n", "line 2: got the field '', expected a label, not empty"),
    "empty line": (b"a\tlikes\tb\n\na\tlikes\tc\n", "line 2: got an empty line"),
    "trailing space": (b"a\tlikes\tb \n", "line 1: got the field 'b '"),
    "NUL": (b"a\tli\0kes\tb\n", "line 1: got the field 'li\\x00kes'"),
    "latin-1": ("a\tlikes\tb\na\tlikes\té\n".encode("latin-1"), "line 2: got byte 0xe9, expected UTF-8 text"),
    "utf-16": (GOOD.decode().encode("utf-16"), "line 1: got byte 0xff, expected UTF-8 text"),
    "truncated utf-8": (b"a\tlikes\tb\na\tlikes\t\xc3", "line 2: got byte 0xc3, expected UTF-8 text"),
    "lone CR": (b"a\tlikes\tb\rb\tlikes\tc\r", "line 1: got 5 fields"),
    "CR within": (b"a\tli\rkes\tb\n", "line 1: got the field 'li\\rkes'"),
    "header": (
        b"head\trelation\ttail\na\tlikes\tb\n",
        "line 1: got a header, 'head\\trelation\\ttail', expected a triple",
    ),
    "header with BOM": (b"\xef\xbb\xbfSubject\tPredicate\tObject\r\n", "line 1: got a header"),
    "header of four": (b"head\trelation\ttail\tweight\n", "line 1: got 4 fields"),
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


def test_damaged_gzip_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(b"%d\tr\t%d\n" % (i, i * i) for i in range(20000)))
    for content in (whole[:-100], b"no gzip at all", whole[:5000] + b"\0" * 100 + whole[5100:]):
        path = tmp_path / "train.tsv.gz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"train.tsv.gz, line \d+: got"):
            read(path)


def test_harmless_differences(tmp_path: Path) -> None:
    """A BOM and CRLF are no part of a label, a quote is; a last line needs no end; a word of a header may be in a triple."""
    path = tmp_path / "train.tsv"
    path.write_bytes(b'\xef\xbb\xbfa\tlikes\tb\r\n"b\tlikes\tc d')
    assert read(path) == (["a", '"b'], ["likes", "likes"], ["b", "c d"])
    path.write_bytes(b"head\tpart of\tbody\nhead\trelation\ttail\n")
    assert read(path) == (["head", "head"], ["part of", "relation"], ["body", "tail"])
    path.write_bytes(b"")
    assert read(path) == ([], [], [])


def test_parquet_errors(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="not Parquet"):
        read(path)
    for columns, text in (
        ({"h": ["a"], "relation": ["r"], "tail": ["b"]}, r"got columns \['h', 'relation', 'tail'\], expected 'head'"),
        ({"head": [1.5], "relation": ["r"], "tail": ["b"]}, "column 'head' of type double"),
        ({"head": ["a", None], "relation": ["r", "r"], "tail": ["b", "b"]}, "row 1, column 'head': got None"),
        ({"head": ["a"], "relation": [""], "tail": ["b"]}, "row 0, column 'relation': got ''"),
        ({"head": ["a"], "relation": ["r"], "tail": [" b"]}, "row 0, column 'tail': got ' b', expected a label"),
        ({"head": ["a", "a\0"], "relation": ["r"] * 2, "tail": ["b"] * 2}, r"row 1, column 'head': got 'a\\x00'"),
        ({"head": ["a\tb"], "relation": ["r"], "tail": ["b"]}, r"row 0, column 'head': got 'a\\tb'"),
        ({"head": [["a"]], "relation": ["r"], "tail": ["b"]}, "column 'head' of type list"),
    ):
        pq.write_table(pa.table(columns), path)
        with pytest.raises(ValueError, match=text):
            read(path)
    pq.write_table(pa.table({"head": [1, 2], "relation": [0, 0], "tail": [2, 3]}), path)
    assert read(path) == (["1", "2"], ["0", "0"], ["2", "3"])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"train\.parquet: got a file that is not Parquet"):
        read(path)
    encoded = {name: pa.array(["a", "b", "a"]).dictionary_encode() for name in ("head", "relation", "tail")}
    pq.write_table(pa.table(encoded), path)
    assert read(path) == (["a", "b", "a"],) * 3
    pq.write_table(pa.table({name: pa.array([], pa.string()) for name in encoded}), path)
    assert read(path) == ([], [], [])


def test_missing_files_and_untrained_entities(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected 'wordnet', 'pykeen:NAME', a folder"):
        Triples.load(tmp_path / "nowhere")
    (tmp_path / "train.tsv").write_bytes(GOOD)
    with pytest.raises(FileNotFoundError, match=r"got 0 files for 'valid', expected one of valid\.tsv, "):
        Triples.load(tmp_path)
    (tmp_path / "valid.tsv").write_bytes(GOOD)
    (tmp_path / "valid.tsv.gz").write_bytes(gzip.compress(GOOD))
    with pytest.raises(FileNotFoundError, match=r"got 2 files for 'valid', expected one of valid\.tsv, "):
        Triples.load(tmp_path)
    with pytest.raises(ValueError, match="no training triples"):
        Triples.from_columns("t", ([], [], []), ([], [], []), ([], [], []))


UNSEEN = (
    (["a", "b"], ["r", "r"], ["b", "c"]),
    (["a", "a", "z"], ["r", "new", "r"], ["c", "b", "y"]),
    (["b", "x1", "x2", "x3", "x4"], ["r"] * 5, ["a"] * 5),
)


def test_what_no_training_triple_holds_is_counted() -> None:
    text = (
        r"t: 2 of 3 valid triples hold 2 entities \('y', 'z'\) and 1 relations \('new'\); 4 of 5 test triples hold 4 entities "
        r"\('x1', 'x2', 'x3', ...\) that no training triple holds: "
    )
    with pytest.warns(UserWarning, match=text + "they stay untrained; unseen='drop' leaves these triples out"):
        kept = Triples.from_columns("t", *UNSEEN)
    assert (len(kept.valid), len(kept.test), len(kept.entities), len(kept.relations)) == (3, 5, 9, 2)
    with pytest.warns(UserWarning, match=text + "they are dropped"):
        dropped = Triples.from_columns("t", *UNSEEN, unseen="drop")
    assert (len(dropped.valid), len(dropped.test), len(dropped.entities), len(dropped.relations)) == (1, 1, 3, 1)
    assert [dropped.entities.labels[i] for i in dropped.test[0, [0, 2]]] == ["b", "a"]
    with pytest.raises(ValueError, match=text + "add training triples, or take unseen='drop' or 'keep'"):
        Triples.from_columns("t", *UNSEEN, unseen="error")
    with pytest.raises(ValueError, match="got unseen='hide', expected 'keep', 'drop' or 'error'"):
        Triples.from_columns("t", *UNSEEN, unseen="hide")
