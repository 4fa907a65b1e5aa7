"""Makes dataset folders from files of triples of any size, in bounded memory.

DuckDB stores the MD5 of each label, and finds distinct labels, sorts and joins, on disk if
necessary. The result is bitwise that of :meth:`shardemb.kge.Triples.load`.
"""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from shardemb import __version__, vocabulary
from shardemb.exceptions import InputError, OutOfMemoryError
from shardemb.kge.data.dataset import DESCRIPTION, FORMAT, dtype_of
from shardemb.kge.data.splits import SPLITS, UNSEEN, Unseen, find, held_out, judge, mixed
from shardemb.kge.data.triple_files import BLOCK, COLUMNS, blocks, in_order
from shardemb.utils.files import fsync, sha256_of, write_json
from shardemb.utils.memory import available_bytes, resident_bytes
from shardemb.utils.progress import progress_bar
from shardemb.utils.validation import bytes_of, choice
from shardemb.vocabulary import column_of, numbers

#: rows read from DuckDB at once
PAGE = 1 << 18
#: columns with the labels of each vocabulary
_COLUMNS = {"entities": ("head", "tail"), "relations": ("relation",)}
#: DuckDB's function of a label whose value orders the ids
KEY = "md5_number"
#: bytes that allocators keep (measured), and the least for DuckDB and in total
_ASIDE, _OWN, _LEAST = 64 << 20, 64 << 20, 384 << 20


def ingest(
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    memory: str | int = "4GiB",
    threads: int | None = None,
    valid: int | None = None,
    test: int | None = None,
    unseen: str = "keep",
    literals: str = "error",
    progress: bool = False,
) -> Path:
    """Make a dataset folder from files of triples; :meth:`shardemb.kge.Triples.load` maps it.

    ``out`` appears when it is complete. Until then, ``OUT.tmp-PID`` beside it takes about as many
    bytes as the triples as text; after a kill, the next call for the same ``out`` removes it.

    Args:
        sources: a folder with train, valid and test; or files and folders of part files of one
            graph to split. Formats: see :meth:`shardemb.kge.Triples.load`.
        out: a new folder.
        memory: most bytes of the process, a number or text such as "4GiB" or "2GB"; at most three
            quarters of the free memory are used.
        threads: None for one per core.
        valid: triples to hold out as valid; None for a twentieth, at most 5,000.
        test: triples to hold out as test; default as ``valid``.
        unseen: see :meth:`shardemb.kge.Triples.load`.
        literals: see :meth:`shardemb.kge.Triples.load`.
        progress: show progress bars.

    Raises:
        FileExistsError: ``out`` exists, or another process is making it.
        FileNotFoundError: a source is missing.
        ValueError: a malformed file (names file and line or row), unseen labels with "error", or a
            setting out of range.
        MemoryError: ``memory`` is too small.
        OSError: a file cannot be opened, or the disk is full.
    """
    listed = [sources] if isinstance(sources, str | Path) else sources
    paths = [Path(source) for source in listed]
    out, limit = Path(out), _memory(memory)
    threads = len(os.sched_getaffinity(0)) if threads is None else threads
    choice("unseen", unseen, UNSEEN)
    if threads < 1:
        raise InputError(f"threads: got {threads}, expected at least 1")
    files = find(paths)
    if "" not in files and (valid is not None or test is not None):
        raise InputError(
            f"{paths[0]}: has valid and test files, so valid={valid}, test={test} split nothing:"
            " leave them out"
        )
    name = " ".join(map(str, paths))
    if out.exists():
        raise FileExistsError(f"{out} exists: give another name, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with _made_whole(out) as folder, _clear_errors(folder, limit):
        job = _Job(name, folder, limit, threads, progress)
        try:
            description = job.run(files, valid, test, unseen, literals)
        finally:
            job.close()
        write_json(folder / DESCRIPTION, description)
    return out


def _memory(text: str | int) -> int:
    size, free = bytes_of("memory", text, _LEAST), available_bytes()
    return size if free is None else min(size, free * 3 // 4)


@contextmanager
def _made_whole(out: Path) -> Iterator[Path]:
    """Yield a folder that becomes ``out`` on success; remove those of killed runs."""
    for left in out.parent.iterdir():
        if not re.fullmatch(rf"{re.escape(out.name)}\.tmp-\d+", left.name):
            continue
        with _locked(left) as free:
            if not free:
                raise FileExistsError(
                    f"{left}: another process is making {out}: wait for it, or give another name"
                )
            shutil.rmtree(left)
    folder = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    folder.mkdir()
    try:
        with _locked(folder):
            yield folder
            for written in [*folder.iterdir(), folder]:
                fsync(written)
            folder.rename(out)
            fsync(out.parent)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    descriptor, free = os.open(folder, os.O_RDONLY), True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        free = False
    except OSError:
        pass  # a file system without locks
    try:
        yield free
    finally:
        os.close(descriptor)


@contextmanager
def _clear_errors(folder: Path, limit: int) -> Iterator[None]:
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        reason = str(error).splitlines()[0]
        raise OutOfMemoryError(
            f"{folder}: got {limit >> 20:,} MiB of memory and what is free on its disk, expected"
            f" more: raise --memory, lower --threads or make room ({reason})"
        ) from error
    except (duckdb.IOException, OSError) as error:
        full = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
        if isinstance(error, OSError) and error.errno not in full:
            raise
        raise OSError(
            f"{folder}: cannot be written, make room on its disk ({str(error).splitlines()[0]})"
        ) from error


class _Job:
    def __init__(self, name: str, folder: Path, limit: int, threads: int, progress: bool) -> None:
        self.name, self.folder, self.progress = name, folder, progress
        self.work = folder / "work"
        self.work.mkdir()
        #: triples with literals
        self.dropped = 0
        # blocks being read and tables on their way into DuckDB; some exist twice
        self.readers, self.writers = min(threads, 16), min(threads, 4)
        self.group = max(BLOCK, min(limit >> 7, 32 << 20))
        ahead = 3 * BLOCK * (self.readers + 1) + 2 * self.group * (self.writers + 1) + _ASIDE
        held = resident_bytes()
        own = int((limit - held - ahead) * 0.75)  # DuckDB slightly exceeds its limit
        if own < _OWN:
            raise OutOfMemoryError(
                f"{name}: got {limit >> 20:,} MiB for {threads} threads, of which this process"
                f" holds {held >> 20:,} MiB, expected about {(_OWN - own) * 4 // 3 >> 20:,} MiB"
                " more: raise --memory or lower --threads"
            )
        config: Any = {
            "memory_limit": f"{own >> 10}KiB",
            "threads": threads,
            "temp_directory": str(self.work / "spilled"),
            "arrow_large_buffer_size": True,
            "checkpoint_threshold": "1TB",  # no log: tables are written once
        }
        self.database = duckdb.connect(str(self.work / "tables.duckdb"), config=config)
        shown = "SET enable_progress_bar = true; SET enable_progress_bar_print = false"
        self.database.execute(shown)
        self.pool = ThreadPoolExecutor(self.writers)

    def close(self) -> None:
        with suppress(duckdb.Error):
            self.database.interrupt()
        self.pool.shutdown(cancel_futures=True)
        self.database.close()
        shutil.rmtree(self.work, ignore_errors=True)

    def bar(self, **options: Any) -> Any:
        return progress_bar(**{"disable": not self.progress, **options})

    def run(
        self,
        files: dict[str, list[Path]],
        valid: int | None,
        test: int | None,
        unseen: str,
        literals: str,
    ) -> dict[str, Any]:
        self.read(files, literals)
        if "" in files:
            self.hold_out(valid, test)
        unseen_triples = self.settle_unseen(unseen)
        counts = {kind: self.collect(kind) for kind in _COLUMNS}
        fingerprints = {kind: self.write_labels(kind) for kind in _COLUMNS}
        dtype = dtype_of(*counts.values())
        self.number(dtype)
        triples = {s: self.write_triples(number, s, dtype) for number, s in enumerate(SPLITS)}
        duplicates = "SELECT split, sum(n - 1) FROM counted GROUP BY split"
        repeated = dict(self.query(duplicates, "finding duplicates"))
        stats = {path: path.stat() for paths in files.values() for path in paths}
        return {
            "format": FORMAT,
            "shardemb": __version__,
            "name": self.name,
            "sources": [
                {"path": str(path.absolute()), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
                for path, stat in stats.items()
            ],
            **counts,
            "triples": triples,
            "dtype": dtype,
            "duplicates": {s: int(repeated.get(number, 0)) for number, s in enumerate(SPLITS)},
            "unseen": {"fate": unseen, "triples": unseen_triples},
            "literals": {"fate": literals, "dropped": self.dropped},
            "fingerprints": fingerprints,
            "files": self.hashes(),
        }

    def hashes(self) -> dict[str, Any]:
        names = [f"{split}.npy" for split in SPLITS] + [f"{kind}.arrow" for kind in _COLUMNS]
        paths, entries = [self.folder / name for name in names], {}
        with self.bar(total=len(names), desc="hashing", unit=" files") as bar:
            for path, digest in zip(paths, self.pool.map(sha256_of, paths), strict=True):
                entries[path.name] = {"size": path.stat().st_size, "sha256": digest}
                bar.update()
        return entries

    def read(self, files: dict[str, list[Path]], literals: str) -> None:
        keys = ", ".join(f"{column} UHUGEINT" for column in COLUMNS)
        self.query(f"CREATE TABLE read (split TINYINT, row UBIGINT, mixed UBIGINT, {keys})")
        for kind in _COLUMNS:
            self.query(f"CREATE TABLE read_{kind} (key UHUGEINT, label VARCHAR)")
        for _ in in_order(self.insert, self.groups(files, literals), self.writers):
            pass
        pa.default_memory_pool().release_unused()

    def groups(
        self, files: dict[str, list[Path]], literals: str
    ) -> Iterator[tuple[str, int, pa.Table]]:
        """Yield triples of a split and the row of the first, for an insertion each."""
        sizes = {path: path.stat().st_size for paths in files.values() for path in paths}
        before = 0
        with self.bar(total=sum(sizes.values()), desc="reading", unit="B") as bar:
            for split, paths in files.items():
                row, held = 0, []
                for path in paths:
                    for block in blocks(path, literals, self.readers):
                        self.dropped += block.dropped
                        held.append(block.table)
                        bar.update(before + int(sizes[path] * block.part) - bar.n)
                        if sum(table.nbytes for table in held) >= self.group:
                            yield split, row, pa.concat_tables(held)
                            row, held = row + sum(map(len, held)), []
                    before += sizes[path]
                if held:
                    yield split, row, pa.concat_tables(held)

    def insert(self, group: tuple[str, int, pa.Table]) -> None:
        split, first, table = group
        rows = np.arange(first, first + len(table), dtype=np.uint64)
        table = table.append_column("row", column_of(rows))
        table = table.append_column("mixed", column_of(mixed(rows)))
        number = SPLITS.index(split or "train")
        with self.database.cursor() as cursor:
            cursor.register("block", table)
            keys = ", ".join(f"{KEY}({column})" for column in COLUMNS)
            cursor.execute(f"INSERT INTO read SELECT {number}, row, mixed, {keys} FROM block")
            for kind, columns in _COLUMNS.items():
                labels = " UNION ALL ".join(f"SELECT {c} AS label FROM block" for c in columns)
                cursor.execute(
                    f"INSERT INTO read_{kind} SELECT {KEY}(label), label FROM ({labels})"
                    " GROUP BY label"
                )
            cursor.unregister("block")

    def hold_out(self, valid: int | None, test: int | None) -> None:
        count = self.value("SELECT count(*) FROM read")
        num_valid, num_test = held_out(self.name, count, valid, test)
        first = f"SELECT mixed FROM read ORDER BY mixed LIMIT {num_valid + num_test}"
        self.query(f"CREATE TABLE first AS {first}", "splitting")
        last_test, last_valid = (
            f"(SELECT max(mixed) FROM first WHERE rowid < {count})"
            for count in (num_test, num_test + num_valid)
        )
        split = f"CASE WHEN mixed <= {last_test} THEN 2 ELSE 1 END"
        self.query(f"UPDATE read SET split = {split} WHERE mixed <= {last_valid}", "splitting")

    def settle_unseen(self, unseen: str) -> dict[str, int]:
        for kind, columns in _COLUMNS.items():
            held = " UNION ".join(f"SELECT {c} AS key FROM read WHERE split > 0" for c in columns)
            self.query(f"CREATE TABLE held_{kind} AS {held}")
            # the held-out keys are few and fit in memory
            seen = " UNION ".join(
                f"SELECT {column} AS key FROM read"
                f" WHERE split = 0 AND {column} IN (SELECT key FROM held_{kind})"
                for column in columns
            )
            self.query(
                f"CREATE TABLE unseen_{kind} AS (FROM held_{kind}) EXCEPT ({seen})",
                "looking for unseen labels",
            )
        is_unseen = " OR ".join(
            f"{column} IN (SELECT key FROM unseen_{kind})"
            for kind, columns in _COLUMNS.items()
            for column in columns
        )
        self.query(f"CREATE TABLE strange AS SELECT * FROM read WHERE split > 0 AND ({is_unseen})")
        reports = []
        counts = "SELECT split, count(*) FROM strange GROUP BY split ORDER BY split"
        for number, count in self.query(counts):
            total = self.value(f"SELECT count(*) FROM read WHERE split = {number}")
            labels = {kind: self.unseen_labels(number, kind) for kind in _COLUMNS}
            reports.append(Unseen(SPLITS[number], count, total, labels))
        judge(self.name, reports, unseen)
        if unseen == "drop" and reports:
            self.query(f"DELETE FROM read WHERE split > 0 AND ({is_unseen})")
            for kind in _COLUMNS:
                self.query(f"DELETE FROM read_{kind} WHERE key IN (SELECT key FROM unseen_{kind})")
        return {one.split: one.triples for one in reports}

    def unseen_labels(self, split: int, kind: str) -> tuple[int, list[str]]:
        places = " UNION ALL ".join(
            f"SELECT {column} AS key, 2 * row + {place} AS place FROM strange WHERE split = {split}"
            for place, column in enumerate(_COLUMNS[kind])
        )
        first = (
            f"SELECT key, min(place) AS place FROM ({places})"
            f" WHERE key IN (SELECT key FROM unseen_{kind}) GROUP BY key"
        )
        labels = self.query(
            f"SELECT any_value(label) FROM read_{kind}"
            f" JOIN ({first} ORDER BY place LIMIT 3) USING (key) GROUP BY key, place ORDER BY place"
        )
        return self.value(f"SELECT count(*) FROM ({first})"), [label for (label,) in labels]

    def collect(self, kind: str) -> int:
        """Sort the distinct labels by MD5: their row numbers are ids."""
        distinct = f"SELECT DISTINCT key, label FROM read_{kind} ORDER BY key, label"
        self.query(f"CREATE TABLE {kind} AS {distinct}", f"numbering {kind}")
        self.query(f"DROP TABLE read_{kind}")
        return self.value(f"SELECT count(*) FROM {kind}")

    def write_labels(self, kind: str) -> str:
        columns = f"label, (key >> 64)::UBIGINT AS hash, (key & {2**64 - 1})::UBIGINT AS lower"

        def batches() -> Iterator[pa.RecordBatch]:
            last = None
            for first, page in self.pages(kind, columns, vocabulary.BATCH, f"writing {kind}"):
                upper, lower = numbers(page["hash"]), numbers(page["lower"])
                same = (upper[1:] == upper[:-1]) & (lower[1:] == lower[:-1])
                if (upper[0], lower[0]) == last or same.any():  # which somebody has made to be so
                    raise InputError(f"{self.name}: got two {kind} of one MD5, expected none")
                last = upper[-1], lower[-1]
                ids = column_of(np.arange(first, first + len(page)))
                yield pa.record_batch([page["label"], page["hash"], ids], schema=vocabulary.SCHEMA)

        return vocabulary.write(self.folder / f"{kind}.arrow", batches())

    def number(self, dtype: str) -> None:
        sql = {"int32": "INTEGER", "int64": "BIGINT"}[dtype]
        ids = ", ".join(f"{column}.rowid::{sql} AS {column}" for column in COLUMNS)
        joins = " ".join(
            f"JOIN {kind} AS {column} ON read.{column} = {column}.key"
            for kind, columns in _COLUMNS.items()
            for column in columns
        )
        order = "split, CASE split WHEN 0 THEN mixed ELSE row END"
        self.query(
            f"CREATE TABLE numbered AS SELECT split, {ids} FROM read {joins} ORDER BY {order}",
            "numbering triples",
        )
        before, after = (self.value(f"SELECT count(*) FROM {t}") for t in ("read", "numbered"))
        if before != after:
            raise RuntimeError(f"DuckDB found ids for {after:,} of {before:,} triples")
        self.query("DROP TABLE read")
        self.query(
            "CREATE VIEW counted AS SELECT split, count(*) AS n FROM numbered"
            " GROUP BY split, head, relation, tail"
        )

    def write_triples(self, number: int, split: str, dtype: str) -> int:
        first, last = (
            self.value(f"SELECT count(*) FROM numbered WHERE split {sign} {number}")
            for sign in ("<", "<=")
        )
        descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
        header = {"descr": descr, "fortran_order": False, "shape": (last - first, 3)}
        columns, shown = ", ".join(COLUMNS), f"writing {split}"
        with (self.folder / f"{split}.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for _, page in self.pages("numbered", columns, PAGE, shown, first, last):
                rows = np.stack([numbers(page[column]) for column in COLUMNS], axis=1)
                file.write(rows.tobytes())
        return last - first

    def pages(
        self,
        table: str,
        columns: str,
        size: int,
        shown: str,
        first: int = 0,
        last: int | None = None,
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        if last is None:
            last = self.value(f"SELECT count(*) FROM {table}")
        with self.bar(total=last - first, desc=shown, unit=" rows") as bar:
            for start in range(first, last, size):
                end = min(start + size, last)
                rows = f"rowid BETWEEN {start} AND {end - 1}"
                query = f"SELECT {columns} FROM {table} WHERE {rows} ORDER BY rowid"
                (page,) = self.table(query).combine_chunks().to_batches()
                if len(page) != end - start:
                    raise RuntimeError(f"DuckDB gave {len(page)} of {table}[{start}:{end}]")
                yield start, page
                bar.update(len(page))

    def table(self, query: str) -> pa.Table:
        return self.wait(lambda: self.database.sql(query).to_arrow_table())

    def query(self, query: str, shown: str = "") -> list[tuple[Any, ...]]:
        return self.wait(lambda: self.database.execute(query).fetchall(), shown)

    def value(self, query: str) -> int:
        return self.query(query)[0][0]

    def wait(self, function: Callable[[], Any], shown: str = "") -> Any:
        """Run a query in a thread, with a progress bar; an interrupt ends it at once."""
        future = self.pool.submit(function)
        hidden = not (shown and self.progress)
        with self.bar(total=100, desc=shown, unit="%", delay=1, disable=hidden) as bar:
            while not wait([future], timeout=0.2).done:
                if shown:
                    bar.update(max(0.0, self.database.query_progress() - bar.n))
            return future.result()
