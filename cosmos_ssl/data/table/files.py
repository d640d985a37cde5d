"""Tables of captions, CSV, TSV, parquet or JSON lines, read in batches of columns; rows that cannot be read are counted
by reason.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

from cosmos_ssl.data.scan import EXAMPLES
from cosmos_ssl.errors import DataError, UserError, did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS, PICTURE_ROWS = 8192, 64
"""Rows of a batch, and of one that holds pictures."""
RECORD_BYTES = 1 << 20
"""A quote that is open for longer than this was never meant to be."""
_JSON_LINE_BYTES = 1 << 26
_LOOKED_AT = 1024
JSON_EXTENSIONS = (".jsonl", ".ndjson")
URL_NAMES = ("url", "image_url", "img_url")
IMAGE_NAMES = ("image", "image_path", "img_path", "path", "filepath", "file_path", "filename", "file_name")

OnRead: TypeAlias = Callable[[int], None]
"""Called with the bytes of the file that were read so far."""


def open_table(path: Path) -> Table:
    """The table in this file. Raises UserError where it is none."""
    if path.suffix == ".parquet":
        return ParquetTable(path)
    return JsonLinesTable(path) if path.suffix in JSON_EXTENSIONS else CsvTable(path)


class Table:
    """The rows of one file.

    ``faults`` counts those that could not be read, ``examples`` names the first of each reason. They are left out, or
    with ``keeps_faults`` stand as rows of nulls, so that rows keep their numbers.
    """

    keeps_faults = False

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self.columns = tuple(columns)
        self.rows = 0
        self.faults: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def batches(self, columns: Sequence[str], told: OnRead = lambda read: None) -> Iterator[pa.RecordBatch]:
        """The named columns in batches; CSV gives strings, parquet what it holds.

        Raises DataError where a name is that of several columns or the file is damaged, OSError where storage fails.
        """
        for name in columns:
            if (count := self.columns.count(name)) > 1:
                raise DataError(f"{self.path}: {count} columns are called '{name}'")
        return self._batches(columns, told)

    def _batches(self, columns: Sequence[str], told: OnRead) -> Iterator[pa.RecordBatch]:
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

    def _batches(self, columns: Sequence[str], told: OnRead) -> Iterator[pa.RecordBatch]:
        import pyarrow as pa

        size, total = self.path.stat().st_size, max(self._file.metadata.num_rows, 1)
        try:
            schema = self._file.schema_arrow
            heavy = any(holds_pictures(schema.field(name).type) for name in columns)
            for batch in self._file.iter_batches(PICTURE_ROWS if heavy else BATCH_ROWS, columns=list(columns)):
                self.rows += len(batch)
                told(size * self.rows // total)
                yield pa.record_batch([_plain(batch.column(name)) for name in columns], names=list(columns))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.path}: damaged after row {self.rows:,}: {str(error).splitlines()[0]}") from error


def holds_pictures(kind: pa.DataType) -> bool:
    """Return whether cells of this type are pictures themselves: bytes, or a table of ``bytes`` and ``path``."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and (pa.types.is_null(kind.field(place).type) or holds_pictures(kind.field(place).type))
    return any(is_kind(kind) for is_kind in (pa.types.is_binary, pa.types.is_large_binary))


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
            tabs = path.suffix == ".tsv" or ("\t" in text and "," not in text)
            self._delimiter = "\t" if tabs else ","
            columns = next(csv.reader([text], strict=True, delimiter=self._delimiter), [])
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path}: no CSV file: its first line cannot be read ({error})") from error
        if not any(columns):
            raise UserError(f"{path}: no CSV file: its first line names no columns")
        super().__init__(path, columns)

    def _batches(self, columns: Sequence[str], told: OnRead) -> Iterator[pa.RecordBatch]:
        places = [self.columns.index(name) for name in columns]
        with self.path.open("rb", buffering=1 << 20) as file:
            file.readline()
            rows = ([row[p] for p in places] for row in self._parsed(file))
            yield from _in_batches(rows, columns, file, told)

    def _parsed(self, file: BinaryIO) -> Iterator[list[str] | list[None]]:
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
                if self.keeps_faults:
                    yield [None] * len(self.columns)

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


class JsonLinesTable(Table):
    """A file of JSON objects, one a line; the columns are the keys of the first ones. Lists become JSON texts."""

    def __init__(self, path: Path) -> None:
        columns: dict[str, None] = {}
        with path.open("rb", buffering=1 << 20) as file:
            for line, _ in zip(_lines(file), range(_LOOKED_AT), strict=False):
                columns |= dict.fromkeys(_object(line) or ())
        if not columns:
            raise UserError(f"{path}: none of its first lines is a JSON object")
        super().__init__(path, list(columns))

    def _batches(self, columns: Sequence[str], told: OnRead) -> Iterator[pa.RecordBatch]:
        with self.path.open("rb", buffering=1 << 20) as file:
            rows = ([_text(row.get(name)) for name in columns] for row in self._parsed(file))
            yield from _in_batches(rows, columns, file, told)

    def _parsed(self, file: BinaryIO) -> Iterator[dict[str, Any]]:
        for line in _lines(file):
            self.rows += 1
            row = _object(line)
            if row is None:
                self.fault("no JSON object", f"{self.path.name} row {self.rows:,}")
            if row is not None or self.keeps_faults:
                yield row or {}


def _in_batches(
    rows: Iterator[list[str | None]], columns: Sequence[str], file: BinaryIO, told: OnRead
) -> Iterator[pa.RecordBatch]:
    """Rows of strings, which are read from ``file``, as batches of columns."""
    import pyarrow as pa

    while found := list(islice(rows, BATCH_ROWS)):
        if len(found) == BATCH_ROWS:
            told(file.tell())
        cells = [pa.array(column, pa.string()) for column in zip(*found, strict=True)]
        yield pa.record_batch(cells, names=list(columns))


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines that are not empty; one that is too long is cut, and so no JSON."""
    while line := file.readline(_JSON_LINE_BYTES):
        if line.strip():
            yield line


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _text(value: Any) -> str | None:
    """A cell as text without halves of pairs, which no encoding takes."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def cell_or_bytes(cell: pa.Scalar) -> Any:
    """The value of a cell; bytes where it says that it is a string and is none."""
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return b""
