"""Caption tables, CSV or parquet, read in batches of columns; rows that cannot be read are counted by reason."""

from __future__ import annotations

import csv
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

from cosmos_ssl.data.scan import EXAMPLES, expand
from cosmos_ssl.errors import DataError, UserError, did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 8192
RECORD_BYTES = 1 << 20
"""A quote that is open for longer than this was never meant to be."""
URL_NAMES = ("url", "image_url", "img_url")
IMAGE_NAMES = ("image", "image_path", "img_path", "path", "filepath", "file_path", "filename", "file_name")

OnRead: TypeAlias = Callable[[int], None]
"""Called with the bytes of the file that were read so far."""


def find_tables(patterns: Sequence[str]) -> list[Path]:
    """The files that these paths and patterns name, in order. Raises UserError where one names none or one twice."""
    found: list[Path] = []
    for pattern in patterns:
        try:
            paths = [Path(pattern)] if Path(pattern).is_dir() else [Path(name) for name in expand([pattern])]
        except DataError as error:
            raise UserError(f"--table {pattern}: no such file") from error
        for path in paths:
            if not path.exists():
                raise UserError(f"--table {path}: no such file")
            if not path.is_file() and not path.is_dir():  # a pipe would be waited for without end
                raise UserError(f"--table {path}: no regular file")
            found += sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not found:
        raise UserError(f"--table {patterns[0]}: this folder holds no parquet file")
    if len(set(found)) < len(found):
        raise UserError(f"--table: {next(p for i, p in enumerate(found) if p in found[:i])} is named twice")
    return found


def stamps(tables: Sequence[Path]) -> list[list[Any]]:
    """Return what tells these files from others, in plain values: path, size and time of each."""
    return [[str(p.absolute()), p.stat().st_size, p.stat().st_mtime_ns] for p in tables]


def open_table(path: Path) -> Table:
    """The table in this file. Raises UserError where it is none."""
    return ParquetTable(path) if path.suffix == ".parquet" else CsvTable(path)


class Table:
    """The rows of one file.

    ``faults`` counts those that could not be read, ``examples`` names the first of each reason.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self.columns = tuple(columns)
        self.rows = 0
        self.faults: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def batches(self, columns: Sequence[str], told: OnRead = lambda read: None) -> Iterator[pa.RecordBatch]:
        """The named columns in batches; CSV gives strings, parquet what it holds."""
        raise NotImplementedError

    def fault(self, reason: str, where: str) -> None:
        """Count a row that cannot be used."""
        self.faults[reason] += 1
        self.examples.setdefault(reason, [])
        if len(self.examples[reason]) < EXAMPLES:
            self.examples[reason].append(where)

    def missing(self, column: str) -> UserError:
        """The error for a column that is not there."""
        return UserError(
            f"{self.path}: no column '{column}'.{did_you_mean(column, self.columns)} It has: {', '.join(self.columns)}"
        )

    def choose(self, wanted: str | None, names: Sequence[str]) -> str | None:
        """The column ``wanted``, else the first whose name is one of ``names``.

        Raises UserError where ``wanted`` is not there.
        """
        if wanted is not None:
            if wanted not in self.columns:
                raise self.missing(wanted)
            return wanted
        plain = {column.lower().replace(" ", "_").replace("-", "_"): column for column in reversed(self.columns)}
        return next((plain[name] for name in names if name in plain), None)


class ParquetTable(Table):
    """A parquet file."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        try:
            self._file = parquet.ParquetFile(path)
        except pa.ArrowInvalid as error:
            raise UserError(f"{path}: no parquet file: {str(error).partition('.')[0]}") from error
        super().__init__(path, self._file.schema_arrow.names)

    def batches(self, columns: Sequence[str], told: OnRead = lambda read: None) -> Iterator[pa.RecordBatch]:
        """Raises DataError where the file is damaged."""
        import pyarrow as pa

        size, total = self.path.stat().st_size, max(self._file.metadata.num_rows, 1)
        try:
            for batch in self._file.iter_batches(BATCH_ROWS, columns=list(columns)):
                self.rows += len(batch)
                told(size * self.rows // total)
                yield pa.record_batch([_plain(batch.column(name)) for name in columns], names=list(columns))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.path}: damaged after row {self.rows:,}: {str(error).splitlines()[0]}") from error


def _plain(column: pa.Array) -> pa.Array:
    """A column without dictionary coding."""
    import pyarrow as pa

    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


class CsvTable(Table):
    """A file of values separated by commas, or by tabs where its head has no comma, quoted as RFC 4180 says.

    A quote that is never closed costs its own row alone: reading goes on at the next line.
    """

    def __init__(self, path: Path) -> None:
        csv.field_size_limit(sys.maxsize)
        with path.open("rb") as file:
            head = file.readline(RECORD_BYTES)
        try:
            text = head.decode("utf-8-sig")
            self._delimiter = "\t" if "\t" in text and "," not in text else ","
            columns = next(csv.reader([text], strict=True, delimiter=self._delimiter), [])
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path}: no CSV file: its first line cannot be read ({error})") from error
        if not any(columns):
            raise UserError(f"{path}: no CSV file: its first line names no columns")
        super().__init__(path, columns)

    def batches(self, columns: Sequence[str], told: OnRead = lambda read: None) -> Iterator[pa.RecordBatch]:
        """Raises OSError where storage fails."""
        import pyarrow as pa

        places = [self.columns.index(name) for name in columns]
        found: list[list[str]] = []

        def batch() -> pa.RecordBatch:
            return pa.record_batch(
                [pa.array([row[p] for row in found], pa.string()) for p in places], names=list(columns)
            )

        with self.path.open("rb", buffering=1 << 20) as file:
            file.readline()
            for row in self._parsed(file):
                found.append(row)
                if len(found) == BATCH_ROWS:
                    told(file.tell())
                    yield batch()
                    found.clear()
            if found:
                yield batch()

    def _parsed(self, file: BinaryIO) -> Iterator[list[str]]:
        back, number = deque[bytes](), 1  # lines that are read again; the number of the last one, the head's at first
        while first := back.popleft() if back else file.readline():
            number += 1
            record, quotes, size = [first], first.count(b'"'), len(first)
            while quotes % 2 and size < RECORD_BYTES and (more := back.popleft() if back else file.readline()):
                record.append(more)
                quotes += more.count(b'"')
                size += len(more)
            row, reason = self._parse(b"".join(record))
            if row is None and len(record) > 1:  # the quote was not meant to be one, or was never closed
                back.extendleft(reversed(record[1:]))
                row, reason = self._parse(first)
            else:
                number += len(record) - 1
            if row is not None:
                self.rows += 1
                yield row
            elif reason:
                self.rows += 1
                self.fault(reason, f"{self.path.name}:{number}")

    def _parse(self, record: bytes) -> tuple[list[str] | None, str]:
        if not record.strip():
            return None, ""
        try:
            rows = list(csv.reader([record.decode()], strict=True, delimiter=self._delimiter))
        except UnicodeDecodeError:
            return None, "not UTF-8"
        except csv.Error:
            return None, "broken quoting"
        good = len(rows) == 1 and len(rows[0]) == len(self.columns)
        return (rows[0], "") if good else (None, "wrong number of fields")
