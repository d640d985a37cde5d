"""Rows of the tables in a form that gives any row at once: Arrow files, mapped and not read, and a column of hashed
keys.
"""

from __future__ import annotations

import bisect
import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from cosmos_ssl.data.table.files import IMAGE_NAMES, URL_NAMES, OnRead, Table, cell_or_bytes, open_table
from cosmos_ssl.errors import BadSample, UserError
from cosmos_ssl.files import written_whole
from cosmos_ssl.shards.keys import KEY, hashed

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is read from each table."""

    captions: Mapping[str, str]
    """Column -> field of the sample's JSON."""
    by_url: bool
    """Join by URL; else by the path of the image."""
    url_column: str | None = None
    image_column: str | None = None
    root: str = ""
    """The folder of the images: absolute paths below it are as good as relative ones."""


@dataclass(slots=True)
class TableNote:
    """What one table held."""

    name: str
    rows: int = 0
    """All rows, also those that cannot be used."""
    usable: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, stem: Path) -> Self:
        """The note that ``store_rows`` wrote."""
        return cls(**json.loads(stem.with_suffix(".json").read_bytes()))


def plain_path(name: str, root: str = "") -> str:
    """A path relative to ``root`` as the listing of that folder has it."""
    name = posixpath.normpath(name.strip())
    return name.removeprefix(root.rstrip("/") + "/") if root and name.startswith("/") else name


def key_columns(table: Table, wanted: Wanted) -> tuple[str, str | None]:
    """The column that is joined by, and one of URLs to keep beside it. Raises UserError where there is none."""
    url = table.choose(wanted.url_column, URL_NAMES)
    if wanted.by_url:
        key = url or table.choose(wanted.image_column, (*IMAGE_NAMES, "image_url"))
        option, what = "--url-column", "URLs, by which images in shards are found"
    else:
        key, option, what = table.choose(wanted.image_column, IMAGE_NAMES), "--image-column", "image paths"
    if key is None:
        raise UserError(
            f"{table.path}: which column holds {what}? Name it by {option}. The table has: {', '.join(table.columns)}"
        )
    return key, url if url != key else None


def check_table(path: Path, wanted: Wanted) -> None:
    """Raise UserError where this is no table or lacks a column."""
    table = open_table(path)
    key_columns(table, wanted)
    for column in wanted.captions:
        if column not in table.columns:
            raise table.missing(column)


def store_rows(
    path: Path, stem: Path, wanted: Wanted, *, captions: bool = True, told: OnRead = lambda read: None
) -> None:
    """Write the rows that name an image to ``STEM.arrow`` and their keys to ``STEM.keys``; ``STEM.json``, written last,
    is a TableNote.

    Without ``captions`` the names alone are kept. Raises UserError, DataError, OSError.
    """
    import pyarrow as pa

    table = open_table(path)
    key, url = key_columns(table, wanted)
    columns = [key, *([url] if url else []), *(wanted.captions if captions else ())]
    names = ["key", *(["url"] if url else []), *(wanted.captions.values() if captions else ())]
    note, writer = TableNote(path.name), None
    with written_whole(stem.with_suffix(".arrow")) as file, written_whole(stem.with_suffix(".keys")) as keys:
        for batch in table.batches(list(dict.fromkeys(columns)), told):
            # a column may be there twice, under two names: the image's path may be a caption too
            batch = pa.record_batch([batch.column(name) for name in columns], names=names)
            found, batch = _named(batch, wanted, table)
            if writer is None:
                writer = pa.ipc.new_file(file, batch.schema)
            writer.write_batch(batch)
            keys.write(hashed(found).tobytes())
            note.usable += len(batch)
        if writer is not None:
            writer.close()
    note.rows, note.faults, note.examples = table.rows, dict(table.faults), table.examples
    with written_whole(stem.with_suffix(".json")) as file:
        file.write(json.dumps(asdict(note)).encode())


def _named(batch: pa.RecordBatch, wanted: Wanted, table: Table) -> tuple[list[bytes], pa.RecordBatch]:
    """The names of the images of a batch, and its rows that have one."""
    import pyarrow as pa

    found: list[bytes] = []
    kept: list[int] = []
    first = table.rows - len(batch)
    for place, value in enumerate(_cells(batch.column(0))):
        if isinstance(value, str) and value.strip():
            name = value.strip() if wanted.by_url else plain_path(value, wanted.root)
            found.append(name.encode("utf-8", "surrogatepass"))
            kept.append(place)
        else:
            table.fault(
                "not UTF-8" if isinstance(value, bytes) else "names no image",
                f"{table.path.name} near row {first + place + 1:,}",
            )
    return found, batch if len(kept) == len(batch) else batch.take(pa.array(kept, pa.int64()))


def _cells(column: pa.Array) -> list[Any]:
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:  # parquet files hold whatever their writer put there
        return [cell_or_bytes(cell) for cell in column]


class Rows:
    """Rows by number over all tables."""

    def __init__(self, stems: Sequence[Path]) -> None:
        self._stems = stems
        self._ends = np.cumsum([TableNote.of(stem).usable for stem in stems]).tolist()
        self._tables: dict[int, dict[str, pa.ChunkedArray]] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def row(self, index: int) -> dict[str, Any]:
        """Cells by name: ``key``, perhaps ``url``, and caption fields.

        Raises BadSample for strings that are no UTF-8.
        """
        columns, place = self._find(index)
        try:
            return {name: column[place].as_py() for name, column in columns.items()}
        except UnicodeDecodeError as error:
            raise BadSample("not UTF-8", self.name(index)) from error

    def name(self, index: int) -> str:
        """URL or path of the image that a row names."""
        columns, place = self._find(index)
        return str(cell_or_bytes(columns["key"][place]))

    def _find(self, index: int) -> tuple[dict[str, pa.ChunkedArray], int]:
        number = bisect.bisect_right(self._ends, index)
        if number not in self._tables:  # views of the mapped file, which hold no memory of their own
            import pyarrow as pa

            file = pa.memory_map(str(self._stems[number].with_suffix(".arrow")))
            table = pa.ipc.open_file(file).read_all()
            self._tables[number] = dict(zip(table.column_names, table.columns, strict=True))
        return self._tables[number], index - (self._ends[number - 1] if number else 0)

    def keys(self) -> Iterator[NDArray[np.bytes_]]:
        """The keys of all rows in order, in pieces."""
        for stem in self._stems:
            yield from pieces(stem.with_suffix(".keys"), KEY)


def pieces(path: Path, kind: np.dtype[Any], count: int = 1 << 16) -> Iterator[NDArray[Any]]:
    """A column that is too large for memory, piece after piece."""
    with path.open("rb") as file:
        while len(found := np.frombuffer(file.read(kind.itemsize * count), kind)):
            yield found
