"""Reads files of triples strictly, in blocks, on all cores.

Arrow parses blocks for which it surely gives the result of the line-by-line parser, which parses
the others. A malformed line is an error that names file and line. Nothing is skipped unless the
user asks for it.
"""

import gzip
import os
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq

from shardemb.exceptions import InputError
from shardemb.utils.validation import choice
from shardemb.vocabulary import column_of, text_column

SUFFIXES = (".tsv", ".tsv.gz", ".txt", ".txt.gz", ".nt", ".nt.gz", ".parquet")
#: what to do with triples whose object is a literal
LITERALS = ("error", "drop", "keep")
#: most bytes of a triple's line
MAX_LINE = 1 << 20
#: bytes of lines, and rows of a Parquet file, read at once
BLOCK, ROWS = 1 << 22, 1 << 16
COLUMNS = ("head", "relation", "tail")
#: large strings, because labels may exceed 2 GiB
SCHEMA = pa.schema([(name, pa.large_string()) for name in COLUMNS])

T = TypeVar("T")
U = TypeVar("U")

_NO_LABEL = frozenset("\0\t\n\r\ufeff")
_LABEL = "a label, not empty, without NUL, tab, end of line, byte-order mark or outer spaces"
#: the same for Arrow
_FORBIDDEN = r"\x00\t\n\r\x{FEFF}"
_BOM = "\ufeff".encode()
#: common headers of the columns
_HEADER = (
    {"head", "h", "subject", "subj", "s", "source", "src", "from", "lhs", "entity1"},
    {"relation", "relationship", "rel", "r", "predicate", "pred", "p", "property", "edge"}
    | {"type", "label"},
    {"tail", "t", "object", "obj", "o", "target", "dst", "to", "rhs", "entity2"},
)
_UTF8 = "UTF-8 text: convert it, e.g. iconv -f LATIN1 -t UTF-8"
_UTF16 = _UTF8.replace("LATIN1", "UTF-16")
#: first bytes of other types of files
_MAGIC = {
    b"\xff\xfe": _UTF16,
    b"\xfe\xff": _UTF16,
    b"\x1f\x8b": "UTF-8 text: this is gzip, give it a name that ends in .gz",
}


class Block(NamedTuple):
    """Consecutive triples of a file."""

    #: string columns "head", "relation" and "tail"
    table: pa.Table
    #: dropped triples with literals
    dropped: int
    #: share of the file read so far
    part: float


def read(path: Path, literals: str = "error") -> pa.Table:
    """Read all triples of a file, as :func:`blocks`."""
    return pa.concat_tables([block.table for block in blocks(path, literals)])


def blocks(path: Path, literals: str = "error", threads: int | None = None) -> Iterator[Block]:
    """Read a file of triples in blocks: N-Triples, Parquet or tab-separated, also gzipped.

    Tab-separated lines are UTF-8, ``head TAB relation TAB tail``, without quoting. In N-Triples,
    labels of IRIs have no brackets, blank nodes are ``_:x``, and literals keep quotes, language and
    type; escapes are decoded unless a label needs them. Parquet has columns "head", "relation" and
    "tail" of strings or integers.

    Args:
        path: its suffix gives the format.
        literals: triples whose object is a literal: "error", "drop" or "keep".
        threads: None for one per core.

    Raises:
        ValueError: malformed, damaged or without triples; names file and line (from 1) or row (from
            0).
        OSError: the file cannot be opened.
    """
    choice("literals", literals, LITERALS)
    if path.is_dir():  # Arrow would read all files of a folder
        raise IsADirectoryError(f"{path}: got a folder, expected a file of triples")
    if path.exists() and not path.is_file():
        raise InputError(
            f"{path}: got a pipe or a device, expected a file of triples: every rank reads it"
        )
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    threads = threads or len(os.sched_getaffinity(0))
    if suffix == ".parquet":
        parsed = in_order(partial(_parquet_block, path), _parquet_batches(path), threads)
    else:
        parse = partial(_nt_block, path, literals) if suffix == ".nt" else partial(_tsv_block, path)
        parsed = in_order(parse, _lines(path), threads)
    count, dropped = 0, 0
    for block in parsed:
        count, dropped = count + len(block.table), dropped + block.dropped
        yield block
    if not count:
        but = f" but {dropped:,} with literals, which are dropped" if dropped else ""
        raise InputError(f"{path}: got a file without triples{but}, expected at least one")


def in_order(function: Callable[[T], U], items: Iterable[T], threads: int) -> Iterator[U]:
    """Apply a function in threads, a few items ahead, in order, errors included."""
    pending: deque[Future[U]] = deque()
    iterator, failure = iter(items), None
    with ThreadPoolExecutor(threads) as pool:
        while failure is None:
            try:
                pending.append(pool.submit(function, next(iterator)))
            except Exception as error:  # StopIteration too
                failure = error
            while pending and (failure is not None or len(pending) > threads):
                yield pending.popleft().result()
    if not isinstance(failure, StopIteration):
        raise failure


def _malformed(path: Path, number: int, got: str, expected: str) -> ValueError:
    return InputError(f"{path}, line {number}: got {got}, expected {expected}")


def _is_label(text: str) -> bool:
    trimmed = bool(text) and text == text.strip()
    return trimmed and (text.isprintable() or _NO_LABEL.isdisjoint(text))


def _surely_labels(column: pa.ChunkedArray, forbidden: str = "") -> bool:
    """Whether all are labels; False may be wrong."""
    if forbidden and pc.any(pc.match_substring_regex(column, f"[{forbidden}]")).as_py():
        return False
    lengths = pc.binary_length(column)
    trimmed = pc.binary_length(pc.utf8_trim_whitespace(column))
    return pc.min(lengths).as_py() > 0 and pc.sum(trimmed).as_py() == pc.sum(lengths).as_py()


def _is_header(fields: Sequence[str]) -> bool:
    suffix = re.compile(r"_(id|name|label|entity)$")
    names = [suffix.sub("", field.strip("#\"' ").casefold()) for field in fields]
    return any(
        all(name in known for name, known in zip(names, order, strict=True))
        for order in permutations(_HEADER)
    )


class _Lines(NamedTuple):
    #: number of the first line
    first: int
    #: whole lines
    text: bytes
    number: int
    #: share of the file read so far
    part: float


def _lines(path: Path) -> Iterator[_Lines]:
    number, held, damage, more = 1, bytearray(), None, True
    with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as file:
        size = os.fstat(raw.fileno()).st_size
        while more:
            try:
                piece = file.read1(1 << 18)  # a larger read loses the text before damage
            except (EOFError, OSError, zlib.error) as error:
                piece, damage = b"", error
            held += piece
            more = bool(piece)
            if more and len(held) < BLOCK:
                continue
            end = len(held) if not more and damage is None else held.rfind(b"\n") + 1
            end = end or len(held) * (len(held) > MAX_LINE)  # the line-by-line parser rejects it
            if end:
                count = held.count(b"\n", 0, end) + (held[end - 1] != 10)
                text, held = bytes(memoryview(held)[:end]), held[end:]
                yield _Lines(number, text, count, raw.tell() / max(1, size))
                number += count
    if damage is not None:
        expected = "a whole gzip file" if path.suffix == ".gz" else "a file that can be read"
        got = f"a damaged file ({damage})"
        raise _malformed(path, number, got, f"{expected}: fetch it anew") from damage


def _decoded(path: Path, lines: _Lines) -> Iterator[tuple[int, str]]:
    for number, raw in enumerate(lines.text.split(b"\n")[: lines.number], lines.first):
        if len(raw) >= MAX_LINE:
            got = f"more than {MAX_LINE - 1:,} bytes"
            raise _malformed(path, number, got, "a line of one triple")
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            expected = _MAGIC.get(raw[:2], _UTF8) if number == 1 else _UTF8
            got = f"byte {error.object[error.start]:#04x}"
            raise _malformed(path, number, got, expected) from error
        if "\r" in line:
            expected = "lines that end in LF or CRLF: convert the file"
            raise _malformed(path, number, f"a CR within {line[:80]!r}", expected)
        yield number, line


def _tsv_block(path: Path, lines: _Lines) -> Block:
    table = _fast_tsv(lines)
    if table is None:
        table = _table([_tsv_line(path, number, line) for number, line in _decoded(path, lines)])
    return Block(table, 0, lines.part)


def _table(rows: Sequence[Sequence[str]]) -> pa.Table:
    return pa.table([text_column([row[i] for row in rows]) for i in range(3)], schema=SCHEMA)


_PLAIN_FIELDS = dict.fromkeys(("quote_char", "double_quote", "escape_char"), False)
_PARSE = csv.ParseOptions(delimiter="\t", ignore_empty_lines=False, **_PLAIN_FIELDS)
_CONVERT = csv.ConvertOptions(column_types=SCHEMA, strings_can_be_null=False, check_utf8=True)


def _fast_tsv(lines: _Lines) -> pa.Table | None:
    """Parse lines with Arrow; None if the line-by-line parser might reject any."""
    text = lines.text.removeprefix(_BOM) if lines.first == 1 else lines.text
    # one byte is found many times faster than several
    inner_bom = b"\xef" in text and _BOM in text
    lone_cr = b"\r" in text and text.count(b"\r") != text.count(b"\r\n")
    if b"\0" in text or inner_bom or lone_cr:
        return None
    how = csv.ReadOptions(column_names=COLUMNS, use_threads=False, block_size=len(text) + 1)
    try:
        table = csv.read_csv(pa.BufferReader(text), how, _PARSE, _CONVERT)
    except pa.ArrowInvalid:
        return None
    lengths = [pc.max(pc.binary_length(column)).as_py() for column in table.columns]
    if len(table) != lines.number or max(lengths) > MAX_LINE // 4:
        return None
    if lines.first == 1 and _is_header([column[0].as_py() for column in table.columns]):
        return None
    return table if all(map(_surely_labels, table.columns)) else None


def _tsv_line(path: Path, number: int, line: str) -> list[str]:
    fields = line.split("\t")
    if len(fields) != 3:
        got = f"{len(fields)} field{'s' * (len(fields) != 1)}: {line[:80]!r}"
        got = got if line else "an empty line"
        raise _malformed(path, number, got, "three fields, head TAB relation TAB tail")
    for field in fields:
        if not _is_label(field):
            raise _malformed(path, number, f"the field {field[:80]!r}", _LABEL)
    if number == 1 and _is_header(fields):
        expected = (
            "a triple, head TAB relation TAB tail: remove the line (if it is a triple, let another"
            " be the first)"
        )
        raise _malformed(path, number, f"the header {line!r}", expected)
    return fields


_LETTER = (
    "A-Za-z\xc0-\xd6\xd8-\xf6\xf8-\u02ff\u0370-\u037d\u037f-\u1fff\u200c-\u200d\u2070-\u218f\u2c00-\u2fef\u3001-\ud7ff"
    "\uf900-\ufdcf\ufdf0-\ufffd\U00010000-\U000effff_:"
)
_UCHAR = r"\\u[0-9A-Fa-f]{4}|\\U[0-9A-Fa-f]{8}"
_PLAIN = r'[^\x00-\x20<>"{}|^`\\]*'
_IRI = rf"<({_PLAIN}(?:(?:{_UCHAR}){_PLAIN})*)>"
_INSIDE = rf"{_LETTER}0-9\xb7\u0300-\u036f\u203f-\u2040-"
_BLANK = rf"_:[{_LETTER}0-9](?:[.{_INSIDE}]*[{_INSIDE}])?"
_TEXT = rf"""([^"\\\n\r]*(?:(?:\\[tbnrf"'\\]|{_UCHAR})[^"\\\n\r]*)*)"""
_LITERAL = rf'"{_TEXT}"(?:\^\^{_IRI}|(@[A-Za-z]+(?:-[A-Za-z0-9]+)*))?'
_END = r"[ \t]*(?:#.*)?"
_NT_LINE = re.compile(
    rf"[ \t]*(?:{_IRI}|({_BLANK}))[ \t]*{_IRI}[ \t]*(?:{_IRI}|({_BLANK})|{_LITERAL})[ \t]*\.{_END}",
    re.DOTALL,
)
_NT_NOTHING = re.compile(_END, re.DOTALL)
_ESCAPE = re.compile(r"\\(?:u(.{4})|U(.{8})|(.))", re.DOTALL)
_SHORT = {"t": "\t", "b": "\b", "n": "\n", "r": "\r", "f": "\f", '"': '"', "'": "'", "\\": "\\"}
#: one form of each character, so that a literal has one label
_CANONICAL = {code: f"\\u{code:04X}" for code in (*range(32), 127, 0xFEFF)}
_CANONICAL |= {ord(char): f"\\{short}" for short, char in _SHORT.items() if short != "'"}
#: a decoded IRI; it has a scheme
_ABSOLUTE = re.compile(r'[A-Za-z][A-Za-z0-9+.-]*:[^\x00-\x20<>"{}|^`\\]*')


#: what Arrow parses: IRIs without escapes, blank nodes with simple names
_FAST_IRI = r'<(?P<{0}>[A-Za-z][A-Za-z0-9+.-]*:[^\x00-\x20<>"{{}}|^`\\]*)>'
_FAST_NODE = rf"(?:{_FAST_IRI}|(?P<{{0}}_blank>_:[A-Za-z0-9_]+))"
_FAST = r"[ \t]*".join(
    part.format(name)
    for part, name in zip((_FAST_NODE, _FAST_IRI, _FAST_NODE), COLUMNS, strict=True)
)
_FAST = rf"^[ \t]*{_FAST}[ \t]*\.[ \t]*\r?\n?$"


def _nt_block(path: Path, literals: str, lines: _Lines) -> Block:
    text = lines.text
    ends = np.flatnonzero(np.frombuffer(text, dtype=np.uint8) == ord("\n")) + 1
    bounds = np.concatenate([[0], ends, [len(text)]])[: lines.number + 1]
    fast, table = _fast_nt(text, bounds)
    rows, places, dropped = [], [], 0
    for place in np.flatnonzero(~fast).tolist():
        line = _Lines(lines.first + place, text[bounds[place] : bounds[place + 1]], 1, 0)
        ((number, decoded),) = _decoded(path, line)
        triple = _nt_line(path, number, decoded, literals)
        if triple is not None:
            rows.append(triple)
            places.append(place)
        elif _NT_NOTHING.fullmatch(decoded) is None:
            dropped += 1
    if rows:
        order = np.argsort(np.concatenate([np.flatnonzero(fast), places]))
        table = pa.concat_tables([table, _table(rows)]).take(column_of(order))
    return Block(table, dropped, lines.part)


def _fast_nt(text: bytes, bounds: np.ndarray) -> tuple[np.ndarray, pa.Table]:
    """Parse lines with Arrow; return which ones are surely triples, and these."""
    buffers = pa.py_buffer(bounds), pa.py_buffer(text)
    lines = pa.LargeStringArray.from_buffers(len(bounds) - 1, *buffers)
    none = np.zeros(len(lines), dtype=bool), SCHEMA.empty_table()
    try:
        lines.validate(full=True)
    except pa.ArrowInvalid:
        return none
    match = pc.extract_regex(lines, _FAST)
    triples, columns = match.drop_null(), []
    if not len(triples) or np.diff(bounds).max() >= MAX_LINE:
        return none
    for name in COLUMNS:
        column = pc.struct_field(triples, name)
        if name != "relation":
            blank = pc.struct_field(triples, f"{name}_blank")
            column = pc.if_else(pc.equal(blank, ""), column, blank)
        if not _surely_labels(column, _FORBIDDEN):
            return none
        columns.append(column)
    return np.array(match.is_valid().to_pylist()), pa.table(columns, schema=SCHEMA)


def _nt_line(path: Path, number: int, line: str, literals: str) -> tuple[Any, ...] | None:
    """Return a triple; None for comments, empty lines and dropped literals."""
    match = _NT_LINE.fullmatch(line)
    if match is None:
        if _NT_NOTHING.fullmatch(line):
            return None
        expected = (
            "N-Triples: <subject> <predicate> <object> and a full stop, a comment, or an empty line"
        )
        raise _malformed(path, number, repr(line[:80]), expected)
    head, blank_head, relation, tail, blank_tail, text, kind, language = match.groups()
    if text is not None and literals == "error":
        expected = (
            "an IRI or a blank node: literals 'drop' leaves such triples out, 'keep' makes"
            " entities of them (shardemb ingest --literals)"
        )
        raise _malformed(path, number, f"the literal {text[:80]!r}", expected)
    head, relation, tail, kind = (
        blank if iri is None else _iri(path, number, iri)
        for iri, blank in ((head, blank_head), (relation, None), (tail, blank_tail), (kind, None))
    )
    if text is not None:
        text = _unescaped(path, number, text).translate(_CANONICAL)
        if literals == "drop":
            return None
        tail = f'"{text}"{language or (f"^^<{kind}>" if kind is not None else "")}'
    return head, relation, tail


def _iri(path: Path, number: int, text: str) -> str:
    iri = _unescaped(path, number, text)
    if not (_ABSOLUTE.fullmatch(iri) and _is_label(iri)):
        expected = "an absolute one, such as http://a.b/c, no spaces"
        raise _malformed(path, number, f"the IRI {iri[:80]!r}", expected)
    return iri


def _unescaped(path: Path, number: int, text: str) -> str:
    def char(match: re.Match[str]) -> str:
        code = match[1] or match[2]
        if code is None:
            return _SHORT[match[3]]
        value = int(code, 16)
        if 0xD800 <= value < 0xE000 or value > 0x10FFFF:
            raise _malformed(path, number, f"the escape {match[0]}", "one of a character")
        return chr(value)

    return _ESCAPE.sub(char, text) if "\\" in text else text


def _parquet_batches(path: Path) -> Iterator[tuple[int, pa.RecordBatch, float]]:
    row = 0
    with path.open("rb"):  # for Python's error; Arrow opens the file itself
        try:
            with pq.ParquetFile(path) as parquet:
                schema = parquet.schema_arrow
                if any(schema.names.count(name) != 1 for name in COLUMNS):
                    expected = ", ".join(map(repr, COLUMNS))
                    raise InputError(
                        f"{path}: got columns {schema.names}, expected {expected}, each once:"
                        " rename or add columns"
                    )
                for name in COLUMNS:
                    kind = schema.field(name).type
                    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
                    names = ("integer", "string", "large_string", "string_view")
                    if not any(getattr(pa.types, f"is_{name}")(plain) for name in names):
                        raise InputError(
                            f"{path}: got column {name!r} of type {plain}, expected strings or"
                            " integers: cast it"
                        )
                for batch in parquet.iter_batches(ROWS, columns=list(COLUMNS), use_threads=False):
                    yield row, batch, (row + len(batch)) / parquet.metadata.num_rows
                    row += len(batch)
        except (pa.ArrowException, OSError, UnicodeError) as error:  # UnicodeError: damaged names
            reason = " ".join(str(error).split())  # Arrow's has several lines
            raise InputError(
                f"{path}: got a file that is not Parquet, or is damaged ({reason})"
            ) from error


def _parquet_block(path: Path, item: tuple[int, pa.RecordBatch, float]) -> Block:
    first, batch, part = item
    columns = []
    for name in COLUMNS:
        column = batch.column(name)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if column.null_count:
            row = first + pc.index(column.is_null(), True).as_py()
            raise InputError(f"{path}, row {row}, column {name!r}: got a null, expected a label")
        column = column.cast(pa.large_string())
        try:
            column.validate(full=True)
            sure = not len(column) or _surely_labels(column, _FORBIDDEN)
        except pa.ArrowInvalid:
            sure = False
        if not sure:
            for row, cell in enumerate(column.cast(pa.large_binary()).to_pylist(), first):
                _check_cell(f"{path}, row {row}, column {name!r}", cell)
        columns.append(column)
    return Block(pa.table(columns, schema=SCHEMA), 0, part)


def _check_cell(where: str, cell: bytes) -> None:
    try:
        label = cell.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: got {cell[:40]!r}, expected UTF-8 text") from error
    if not _is_label(label):
        raise InputError(f"{where}: got {label[:80]!r}, expected {_LABEL}")
