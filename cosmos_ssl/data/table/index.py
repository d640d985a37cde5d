"""The index of a table: which files its rows lie in, what they hold, and where they were written as mapped Arrow files.

It is one small file that is kept in the cache, and beside it an Arrow file of each table that is none (parquet, CSV,
JSON lines), of the chosen columns alone; ten million rows are never Python objects. Of tables with pictures in them
that is a copy of the pictures. It is good as long as no table was changed, which sizes and times tell, and no picture
in a file of its own, which those of some tell.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from cosmos_ssl.data.cache import cache_root, digest, kept, open_head, save_columns
from cosmos_ssl.data.folder.content import YOUNG, mark_of
from cosmos_ssl.data.table.address import Source
from cosmos_ssl.data.table.content import is_unchanged, look_into
from cosmos_ssl.data.table.rows import Chosen, cells, check_kinds, convert, mapped
from cosmos_ssl.errors import DataError
from cosmos_ssl.liveness import OnProgress, alive

if TYPE_CHECKING:
    import pyarrow as pa

_MAGIC = b"cosmos-table-1\n"


@dataclass(frozen=True, slots=True)
class Piece:
    """The rows of one table."""

    name: str
    path: str
    """The Arrow file that they are mapped from."""
    root: str
    """The folder that paths of pictures start from."""
    rows: int
    size: int
    """Bytes of the table."""


class TableIndex:
    """The rows of some tables. Pickled copies map the files again."""

    def __init__(
        self, head: Mapping[str, Any], marks: NDArray[np.int64], sources: Sequence[Source], folder: Path | None
    ) -> None:
        self._head, self.marks, self._sources, self.folder = head, marks, sources, folder
        self.path: Path | None = None
        self.chosen = Chosen(head["image"], tuple(head["captions"]), head["label"])
        self.hashes: Mapping[str, str] = head["hashes"]
        self.faults: Mapping[str, int] = head["faults"]
        """Rows that could not be read, by reason."""
        self.examples: Mapping[str, list[str]] = head["examples"]
        self.pieces = [
            Piece(source.name, str(folder / file if folder and file else source.path), str(source.root), rows, size)
            for source, (file, rows, size) in zip(sources, head["pieces"], strict=True)
        ]
        self._ends: NDArray[np.int64] = np.cumsum([piece.rows for piece in self.pieces])
        self._mapped: dict[int, dict[str, pa.ChunkedArray]] = {}
        self.embedded: bool = head["embedded"]
        """Whether pictures lie in the table itself."""

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(TableIndex._again, path=self.path), (self._head, self.marks, self._sources, self.folder)

    @classmethod
    def _again(cls, *state: Any, path: Path | None) -> Self:
        index = cls(*state)
        index.path = path
        return index

    def piece_of(self, index: int) -> tuple[int, int]:
        """Number of the table that holds row ``index``, and its row there. Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - int(self._ends[number] - self.pieces[number].rows)

    def columns(self, number: int) -> dict[str, pa.ChunkedArray]:
        """The mapped columns of one table."""
        if number not in self._mapped:
            self._mapped[number] = mapped(Path(self.pieces[number].path), self.chosen.names)
        return self._mapped[number]

    def cell(self, index: int, name: str) -> Any:
        """One value. Raises UnicodeDecodeError for what says that it is a string and is none."""
        number, row = self.piece_of(index)
        return self.columns(number)[name][row].as_py()

    def where(self, index: int) -> str:
        """``row 17 of t.csv``, counted from 1 and without its head."""
        number, row = self.piece_of(index)
        return f"row {row + 1:,} of {self.pieces[number].name}"

    def picture(self, row: int) -> bytes | str | None:
        """The picture of a row, or the path of its file, or None where it names none."""
        try:
            value = self.cell(row, self.chosen.image)
        except UnicodeDecodeError:
            return None
        if isinstance(value, dict):
            value = value["bytes"] if value["bytes"] is not None else value.get("path")
        if not isinstance(value, str):
            return value if isinstance(value, bytes) and value else None
        name = value.strip()
        return os.path.join(self.pieces[self.piece_of(row)[0]].root, name) if name else None  # noqa: PTH118

    def sizes(self) -> Iterator[NDArray[np.int64]]:
        """Sizes of pictures that lie in the table, in pieces; -1 where there is none."""
        import pyarrow as pa
        from pyarrow import compute

        for number, piece in enumerate(self.pieces):
            for chunk in self.columns(number)[self.chosen.image].chunks if piece.rows else ():
                found = compute.struct_field(chunk, "bytes") if pa.types.is_struct(chunk.type) else chunk
                if pa.types.is_null(found.type):  # paths alone
                    found = found.cast(pa.binary())
                lengths = compute.fill_null(compute.cast(compute.binary_length(found), pa.int64()), -1)
                yield lengths.to_numpy(zero_copy_only=False)

    def values(self) -> Iterator[list[Any]]:
        """All cells but pictures, in pieces, column by column of each table."""
        for number, piece in enumerate(self.pieces):
            columns = self.columns(number) if piece.rows else {}
            for name, column in columns.items():
                if name != self.chosen.image or not self.embedded:
                    yield [name, piece.rows]
                    yield from cells(column)

    @classmethod
    def open(cls, path: Path, sources: Sequence[Source]) -> Self:
        """The index in this file, of these tables. Raises OSError or ValueError where there is none of this form."""
        head, start = open_head(path, _MAGIC, verify=True)
        if [source.name for source in sources] != head["names"]:
            raise ValueError(f"{path} is of other tables")
        marks = np.fromfile(path, np.int64, head["marks"], offset=start)
        index = cls(head, marks, sources, path.parent)
        index.path = path
        return index

    def save(self, path: Path) -> None:
        """Write the index under a temporary name, rename it, and remove the rows of the one before."""
        save_columns(path, _MAGIC, {**self._head, "marks": len(self.marks)}, (self.marks,))
        ours = {file for file, _, _ in self._head["pieces"]}
        for other in path.parent.glob(f"{path.stem}-*.arrow"):
            if other.name not in ours:
                other.unlink(missing_ok=True)  # who maps it keeps it

    def is_fresh(self, began: int) -> bool:
        """Return whether it is of the tables and pictures as they are now."""
        if not all(Path(piece.path).is_file() for piece in self.pieces if piece.rows):
            return False
        if self._head["written"] >= began:  # another process made it while this one waited
            return True
        return self._head["stamps"] == _stamps(self._sources) and is_unchanged(self, self.marks)


def load_table(
    sources: Sequence[Source],
    chosen: Chosen,
    *,
    cache_dir: str | Path | None = None,
    full_hash: bool = False,
    progress: OnProgress | None = None,
) -> TableIndex:
    """The index of tables: from its cache, or by reading them under a lock.

    The cache lies in ``cache_dir``; by default in ``.cosmos_ssl`` beside the first table, and in the user's cache
    folder where that is another user's or cannot be written. With ``full_hash`` every byte of the pictures is hashed.
    Raises DataError for tables that cannot be read or have no rows, OSError where storage fails.
    """
    began = time.time_ns()
    return kept(
        _places(sources, chosen, cache_dir),
        lambda path: _fresh(path, sources, began, full_hash),
        lambda path: _made(sources, chosen, path, full_hash, progress or alive),
    )


def is_indexed(sources: Sequence[Source], chosen: Chosen, *, cache_dir: str | Path | None = None) -> bool:
    """Return whether ``load_table`` would find a cached index."""
    began = time.time_ns()
    return any(_fresh(path, sources, began) is not None for path in _places(sources, chosen, cache_dir))


def _places(sources: Sequence[Source], chosen: Chosen, cache_dir: str | Path | None) -> list[Path]:
    paths = [source.path.resolve() for source in sources]
    what = [chosen.image, *chosen.captions, f"label {chosen.label}", *(str(source.root) for source in sources[:1])]
    by_path = f"table-{digest([*map(str, paths), *what])}.bin"
    if cache_dir is not None:
        return [Path(cache_dir).expanduser() / by_path]
    beside = paths[0].parent.parent if sources[0].is_arrow else paths[0].parent
    return [beside / ".cosmos_ssl" / by_path, cache_root() / "manifests" / by_path]


def _fresh(path: Path, sources: Sequence[Source], began: int, full_hash: bool = False) -> TableIndex | None:
    """The cached index if it is of the tables as they are now."""
    try:
        index = TableIndex.open(path, sources)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return index if index.is_fresh(began) and (not full_hash or "full_pictures" in index.hashes) else None


def _stamps(sources: Sequence[Source], now: int | None = None) -> list[list[int]]:
    """Size and times of each table; -1 for one that may change after ``now`` without another time."""
    found = [source.path.stat() for source in sources]
    return [
        [one.st_size, -1 if now is not None and abs(now - one.st_ctime_ns) < YOUNG else mark_of(one)] for one in found
    ]


def _made(
    sources: Sequence[Source], chosen: Chosen, path: Path | None, full_hash: bool, progress: OnProgress
) -> TableIndex:
    """Read the tables; rows of those that are no Arrow files are written beside ``path``, or as temporary files."""
    folder = Path(tempfile.mkdtemp(prefix="cosmos-table-")) if path is None else path.parent
    stem = f"{'rows' if path is None else path.stem}-{(now := time.time_ns()):x}"
    stamps, faults, examples = _stamps(sources, now), dict[str, int](), dict[str, list[str]]()
    pieces: list[tuple[str, int, int]] = []
    kinds = set[bool]()
    try:
        for number, source in enumerate(sources):
            size, file = source.path.stat().st_size, "" if source.is_arrow else f"{stem}-{number:05d}.arrow"
            if file:
                done = convert(source, folder / file, chosen, lambda: progress(0, 1))
                rows = done.rows
                for reason, count in done.faults.items():
                    faults[reason] = faults.get(reason, 0) + count
                    examples.setdefault(reason, []).extend(done.examples[reason])
            if not file or rows:
                columns = mapped(folder / file if file else source.path, chosen.names)
                kinds.add(check_kinds(columns, chosen, source.name))
                rows = len(columns[chosen.image])
            pieces.append((file, rows, size))
        if not sum(rows for _, rows, _ in pieces):
            raise DataError(f"data: no rows in {', '.join(source.name for source in sources[:4])}")
        if len(kinds) > 1:
            raise DataError(f"data: image_column: '{chosen.image}' holds paths in some tables and pictures in others")
        head: dict[str, Any] = {
            "names": [source.name for source in sources],
            "stamps": stamps,
            "pieces": pieces,
            **chosen._asdict(),
            "embedded": kinds.pop(),
            "faults": faults,
            "examples": examples,
            "hashes": {},
        }
        looked = TableIndex({**head, "written": 0}, np.empty(0, np.int64), sources, folder)
        hashes, marks = look_into(looked, full_hash=full_hash, progress=progress)
        index = TableIndex({**head, "hashes": hashes, "written": time.time_ns()}, marks, sources, folder)
    except BaseException:
        for other in folder.glob(f"{stem}-*"):
            other.unlink(missing_ok=True)
        raise
    if path is None:
        weakref.finalize(index, _remove, folder, os.getpid())
    return index


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a fork's copy is not the last one
        shutil.rmtree(folder, ignore_errors=True)
