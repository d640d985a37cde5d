"""Rows of tables by number: Arrow files, mapped and not read. Tables of other forms are written as such, once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cosmos_ssl.data.captions import is_bookkeeping
from cosmos_ssl.data.table.address import Columns, Source
from cosmos_ssl.data.table.files import IMAGE_NAMES, cell_or_bytes, holds_pictures, open_table
from cosmos_ssl.errors import DataError, UserError, did_you_mean
from cosmos_ssl.files import written_whole

if TYPE_CHECKING:
    import pyarrow as pa

_PICTURES = (*IMAGE_NAMES, "picture", "jpg", "png", "webp")
_LABELS = ("cls", "label")
_CAPTION = re.compile(r"caption|text|txt|sentence|description|title", re.IGNORECASE)


class Chosen(NamedTuple):
    """The columns that are read."""

    image: str
    captions: tuple[str, ...]
    label: str | None

    @property
    def names(self) -> list[str]:
        """Each once."""
        return list(dict.fromkeys(name for name in (self.image, *self.captions, self.label) if name is not None))


class Converted(NamedTuple):
    """What became of one table's rows."""

    rows: int
    faults: Counter[str]
    examples: dict[str, list[str]]


def columns_of(source: Source) -> list[str]:
    """The names of a table's columns. Raises DataError where it is none."""
    if source.is_arrow:
        return list(_open(source.path).schema.names)
    try:
        return list(open_table(source.path).columns)
    except OSError as error:
        raise DataError(f"data: {source.path} cannot be read: {error.strerror or error}") from error
    except UserError as error:
        raise DataError(f"data: {error}") from error


def choose(sources: Sequence[Source], wanted: Columns, *, texts: bool) -> Chosen:
    """The columns of these tables that hold pictures, captions and labels: as named, else by their names.

    Raises DataError for one that is not there in each, and where none is named or known (of captions with ``texts``).
    """
    there = columns_of(sources[0])
    lower = {name.lower().replace(" ", "_").replace("-", "_"): name for name in reversed(there)}
    image = wanted.image_column or next((lower[name] for name in _PICTURES if name in lower), None)
    if image is None:
        raise DataError(f"data: image_column: which one holds the pictures? {sources[0].name} has: {', '.join(there)}")
    captions = wanted.caption_columns
    if captions is None:
        captions = tuple(n for n in there if n != image and _CAPTION.search(n) and not is_bookkeeping(n))
        if texts and not captions:
            raise DataError(
                f"data: caption_columns: which ones hold the captions? {sources[0].name} has: {', '.join(there)}"
            )
    label = wanted.label_column
    if label is None and not texts:
        label = next((lower[name] for name in _LABELS if name in lower), None)
    chosen = Chosen(image, captions, label or None)
    options = dict.fromkeys(captions, "caption_columns") | {image: "image_column"}
    for source in sources:
        has = there if source is sources[0] else columns_of(source)
        for name in chosen.names:
            if name not in has:
                option = options.get(name, "label_column")
                raise DataError(
                    f"data: {option}: {source.name} has no column '{name}'.{did_you_mean(name, has)} "
                    f"It has: {', '.join(has)}"
                )
    return chosen


def convert(source: Source, target: Path, chosen: Chosen, told: Callable[[], None]) -> Converted:
    """Write the chosen columns as an Arrow file that can be mapped. A row that cannot be read has nulls.

    Raises DataError where the table is damaged, OSError where storage fails.
    """
    import pyarrow as pa

    table, writer, rows = open_table(source.path), None, 0
    table.keeps_faults = True
    with written_whole(target) as file:
        try:
            for batch in table.batches(chosen.names, lambda read: told()):
                if writer is None:
                    writer = pa.ipc.new_file(file, batch.schema)
                writer.write_batch(batch)
                rows += len(batch)
                told()
        except UserError as error:
            raise DataError(f"data: {error}") from error
        if writer is not None:
            writer.close()
    return Converted(rows, table.faults, table.examples)


def _open(path: Path) -> Any:
    """A reader of an Arrow file, of either form. Raises DataError where it is none."""
    import pyarrow as pa

    try:
        try:
            return pa.ipc.open_file(pa.memory_map(str(path)))
        except pa.ArrowInvalid:
            return pa.ipc.open_stream(pa.memory_map(str(path)))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"data: {path} cannot be read as an Arrow file: {str(error).splitlines()[0]}") from error


def mapped(path: Path, names: Sequence[str]) -> dict[str, pa.ChunkedArray]:
    """Columns as views of the mapped file, which hold no memory of their own. Raises DataError where it is damaged."""
    import pyarrow as pa

    reader = _open(path)
    try:
        table = reader.read_all()
        for name in names:
            if (count := table.column_names.count(name)) > 1:
                raise DataError(f"data: {path}: {count} columns are called '{name}'")
        table = table.select(list(names))
        table.validate()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"data: {path} is damaged: {str(error).splitlines()[0]}") from error
    return {name: table.column(name) for name in names}


def check_kinds(columns: dict[str, pa.ChunkedArray], chosen: Chosen, name: str) -> bool:
    """Return whether pictures lie in the table itself. Raises DataError where a column holds something else than
    paths or pictures, or texts or lists of them.
    """
    kind = columns[chosen.image].type
    if not (_is_text(kind) or holds_pictures(kind)):
        raise DataError(
            f"data: image_column: '{chosen.image}' of {name} holds {kind}, neither paths nor bytes of pictures"
        )
    for caption in chosen.captions:
        kind_of = columns[caption].type
        if not _is_text(getattr(kind_of, "value_type", None) or kind_of):
            raise DataError(
                f"data: caption_columns: '{caption}' of {name} holds {kind_of}, neither texts nor lists of them"
            )
    return holds_pictures(kind)


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return any(is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_null))


def cells(column: pa.ChunkedArray, size: int = 8192) -> Iterator[list[Any]]:
    """The values of a column in pieces; bytes for what says that it is a string and is none."""
    for start in range(0, len(column), size):
        part = column.slice(start, size)
        try:
            yield part.to_pylist()
        except UnicodeDecodeError:  # files hold whatever their writer put there
            yield [cell_or_bytes(cell) for cell in part]
