"""Pictures and captions of tables by index."""

from __future__ import annotations

import logging
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosmos_ssl.api import BadSample, DataError, IndexedDataset, Sample
from cosmos_ssl.data.captions import as_sentences, text_fault, written_list
from cosmos_ssl.data.folder.scan import similar
from cosmos_ssl.data.scan import spread
from cosmos_ssl.data.storage import retrying
from cosmos_ssl.data.table.address import Columns, Source, check_root, find_sources, split_address, with_defaults
from cosmos_ssl.data.table.content import names_nothing
from cosmos_ssl.data.table.index import TableIndex, is_indexed, load_table
from cosmos_ssl.data.table.rows import Chosen, choose
from cosmos_ssl.errors import listed
from cosmos_ssl.liveness import OnProgress
from cosmos_ssl.pictures import FILE_BYTES, MAX_PIXELS, read_regular

_LOOK_SAMPLES = 256
_SHOWN = 200  # letters of a path that is none
_INTEGER = re.compile(r"-?\d{1,18}")
_log = logging.getLogger("cosmos_ssl.data")


class TableData(IndexedDataset):
    """The rows of tables with random access, in the order of the tables.

    ``urls`` are paths, patterns and addresses as in ``cosmos_ssl.data.table.address``; ``columns`` is what those
    do not tell. A picture is a path, bytes, or Hugging Face's ``{bytes, path}``; a caption a string or a list of
    strings (in CSV and JSON lines the text of one). With ``texts`` strings are cut into sentences and captions
    must be there; else, for evaluation and tools, strings stay whole, the only caption column is called ``txt`` and
    texts that no tokenizer takes are left out. A label is ``extras['cls']``. ``cache_dir`` holds the index.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        columns: Columns | None = None,
        texts: bool = False,
        cache_dir: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.urls = urls
        self._wanted, self._texts, self._cache_dir, self._max_pixels = (
            columns or Columns(),
            texts,
            cache_dir,
            max_pixels,
        )
        self._index: TableIndex | None = None
        self._labels_due = False

    def _found(self) -> tuple[list[Source], Chosen]:
        sources, told = find_sources(self.urls)
        wanted = with_defaults(told, self._wanted)
        self._labels_due = bool(wanted.label_column)
        check_root(wanted)
        if wanted.image_root is not None:
            sources = [source._replace(root=Path(wanted.image_root).expanduser()) for source in sources]
        return sources, choose(sources, wanted, texts=self._texts)

    def load(self, *, full_hash: bool = False, progress: OnProgress | None = None) -> TableIndex:
        """Index the tables where no index is of them. Raises DataError, OSError."""
        if self._index is None or full_hash:
            self._index = load_table(*self._found(), cache_dir=self._cache_dir, full_hash=full_hash, progress=progress)
        return self._index

    @property
    def index(self) -> TableIndex:
        """Which rows there are; made when first asked for."""
        return self.load()

    @property
    def is_indexed(self) -> bool:
        """False where no index is of the tables as they are now, so that ``prepare`` would read them."""
        return self._index is not None or is_indexed(*self._found(), cache_dir=self._cache_dir)

    @property
    def index_command(self) -> str:
        """The command that makes the index, with the columns that are read here."""
        _, chosen = self._found()
        told = Columns(
            image_column=chosen.image,
            caption_columns=chosen.captions,
            label_column=chosen.label or "",
            image_root=with_defaults(find_sources(self.urls)[1], self._wanted).image_root,
        )
        urls = [
            told.address(split_address(url)[0]) for url in ([self.urls] if isinstance(self.urls, str) else self.urls)
        ]
        where = [] if self._cache_dir is None else ["--cache-dir", self._cache_dir]
        return shlex.join(["cosmos-ssl", "data", "index", *urls, *where])

    def check_exists(self) -> bool:
        """Raise DataError where a table, a column or the folder of pictures is missing."""
        self._found()
        return True

    def prepare(self, progress: OnProgress | None = None) -> None:
        """Index the tables and look into some rows; what is odd is logged. Raises DataError, OSError."""
        for line in table_notices(self.load(progress=progress)):
            _log.warning(line)
        self._look()

    def _look(self) -> None:
        """Raise DataError where not one of some evenly spread rows has a picture, or none a caption."""
        index = self.index
        places = spread(len(index), _LOOK_SAMPLES)
        pictures = [index.picture(place) for place in places]
        if not any(isinstance(it, bytes) or (it is not None and os.path.isfile(it)) for it in pictures):  # noqa: PTH113
            files = [path for path in pictures if isinstance(path, str)]
            if not files:
                raise DataError(f"data: no pictures in any of {len(places):,} rows (column: {index.chosen.image})")
            first = index.where(places[pictures.index(files[0])])
            raise DataError(
                f"data: not one of {len(files):,} pictures is there, such as {files[0][:_SHOWN]} ({first})."
                f"{similar(Path(files[0]))} image_root names the folder that paths start from"
            )
        if not index.chosen.captions:
            return
        cut, filled = dict.fromkeys(index.chosen.captions, 0), 0
        for place in places:
            try:
                filled += bool(self._captions(place))
                values = {name: index.cell(place, name) for name in index.chosen.captions}
            except (BadSample, UnicodeDecodeError):  # counted when it is met
                continue
            for name, value in values.items():
                cut[name] += isinstance(value, str) and written_list(value) is None and bool(value.strip())
        if not filled:
            names = ", ".join(index.chosen.captions)
            raise DataError(f"data: no captions in any of {len(places):,} rows that were looked at (columns: {names})")
        strings = [name for name, count in cut.items() if count]
        if self._texts and strings:
            _log.warning("captions: %s hold strings, not lists; split at sentence ends.", ", ".join(strings))

    def __len__(self) -> int:
        return len(self.index)

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        """Rows of each table, int64 [tables]."""
        return np.array([piece.rows for piece in self.index.pieces], np.int64)

    def describe(self, index: int) -> str:
        """Name of the table that holds row ``index``."""
        return self.index.pieces[self.index.piece_of(index)[0]].name

    def sources(self, index: int) -> Sequence[str]:
        """The table that row ``index`` is read from, and the file of its picture."""
        picture = self.index.picture(index)
        table = self.index.pieces[self.index.piece_of(index)[0]].path
        return [table, picture] if isinstance(picture, str) else [table]

    def identity(self) -> Mapping[str, Any]:
        """Rows, and hashes of what they hold: nothing of where tables and pictures lie.

        ``digest`` is of all captions, labels and paths as they are written; ``content`` of the sizes of all pictures
        and the first bytes of some; ``full_hash``, where ``data index --hash`` was run, of every byte.
        """
        hashes = self.index.hashes
        found: dict[str, Any] = {"samples": len(self), "digest": hashes["values"], "content": hashes["pictures"]}
        return found | ({"full_hash": hashes["full_pictures"]} if "full_pictures" in hashes else {})

    def read(self, index: int) -> Sample:
        """Row ``index``; its key is the path of its picture as it is written, or its table and row.

        Raises BadSample for a picture that is not there and what is not UTF-8, OSError where storage fails, IndexError.
        """
        rows = self.index
        number, row = rows.piece_of(index)
        picture = rows.picture(index)
        if picture is None:
            raise BadSample("no picture", rows.where(index))
        key = f"{rows.pieces[number].name}#{row + 1}"
        if isinstance(picture, str):
            key, picture = self._key(index, key), self._file(picture, index)
        if len(picture) > FILE_BYTES:
            raise BadSample("too large", f"{len(picture):,} bytes in {rows.where(index)}")
        captions, extras = self._captions(index), self._label(index)
        return Sample(key=key, image=picture, captions=captions, extras=extras, max_pixels=self._max_pixels)

    def _label(self, index: int) -> Mapping[str, Any]:
        """The class, a whole number where it is written as one; nothing where none is asked for and none is there."""
        name = self.index.chosen.label
        try:
            value = None if name is None else self.index.cell(index, name)
        except UnicodeDecodeError as error:
            raise BadSample("not UTF-8", f"'{name}', {self.index.where(index)}") from error
        text = value.strip() if isinstance(value, str) else None
        if value is None or text == "":
            if self._labels_due:
                raise BadSample("no label", self.index.where(index))
            return {}
        return {"cls": value if text is None else int(text) if _INTEGER.fullmatch(text) else text}

    def _key(self, index: int, otherwise: str) -> str:
        value = self.index.cell(index, self.index.chosen.image)
        return value.strip() if isinstance(value, str) else otherwise

    def _file(self, path: str, index: int) -> bytes:
        def read() -> bytes:
            try:
                return read_regular(Path(path))
            except (OSError, ValueError) as error:
                if isinstance(error, BadSample) or not names_nothing(error):
                    raise
                reason = "no regular file" if isinstance(error, IsADirectoryError) else "missing picture"
                raise BadSample(reason, f"{path}, {self.index.where(index)}") from error

        return retrying(read, path)

    def _captions(self, index: int) -> Mapping[str, list[str]]:
        """Sentences by column, columns without any left out."""
        found: dict[str, list[str]] = {}
        names = self.index.chosen.captions
        for name in names:
            try:
                value = self.index.cell(index, name)
            except UnicodeDecodeError as error:
                raise BadSample("not UTF-8", f"'{name}', {self.index.where(index)}") from error
            listed_ = written_list(value) if isinstance(value, str) else value
            if listed_ is None and isinstance(value, str):
                texts = as_sentences(value) if self._texts else [value.strip()] if value.strip() else []
            else:
                texts = as_sentences(listed_)
            if not self._texts:  # whatever is text: not all of it was meant to be a caption
                texts = [text for text in texts if not text_fault(text)]
            if texts:
                found["txt" if len(names) == 1 and not self._texts else name] = texts
        return found


def table_notices(index: TableIndex) -> list[str]:
    """Return what a person should know of these tables, one line each."""
    return [
        f"data: {count:,} rows cannot be used: {reason} ({listed(index.examples[reason], total=count)})"
        for reason, count in index.faults.items()
    ]
