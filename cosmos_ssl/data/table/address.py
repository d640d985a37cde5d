"""What names tables: paths and patterns, and behind ``#`` which of their columns hold what.

``t-{00..09}.parquet#image_column=file&caption_columns=short,long&image_root=pictures`` is an address wherever one
string names data. A folder that Hugging Face's ``save_to_disk`` wrote is a table of Arrow files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qsl, quote

from cosmos_ssl.data.scan import SAVED, SAVED_SPLITS, expand, saved_folder
from cosmos_ssl.data.storage import is_local, local_path
from cosmos_ssl.errors import DataError, did_you_mean

EXTENSIONS = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson")


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which column holds what; None is what its name tells."""

    image_column: str | None = None
    caption_columns: tuple[str, ...] | None = None
    """Empty for pictures alone."""
    label_column: str | None = None
    """Empty for none."""
    image_root: str | None = None
    """The folder that paths start from; None is the folder of the table."""

    @classmethod
    def of(cls, told: str) -> Self:
        """The columns behind the ``#`` of an address. Raises DataError for an unknown key."""
        values: dict[str, Any] = dict(parse_qsl(told, keep_blank_values=True))
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise DataError(f"data: '#{told}': no '{key}'.{did_you_mean(key, known)} Known: {', '.join(known)}")
        if "caption_columns" in values:
            values["caption_columns"] = tuple(filter(None, values["caption_columns"].split(",")))
        return cls(**values)

    def address(self, table: str) -> str:
        """The address of a table with these columns; one that tells its own is left as it is."""
        names = self.caption_columns
        told = asdict(self) | {"caption_columns": None if names is None else ",".join(names)}
        text = "&".join(f"{key}={quote(value, safe='/,')}" for key, value in told.items() if value is not None)
        return table if not text or split_address(table)[1] else f"{table}#{text}"


class Source(NamedTuple):
    """One file of a table."""

    path: Path
    name: str
    """What people call it: the file, or the saved folder and its file."""
    is_arrow: bool
    root: Path
    """The folder that paths of pictures start from."""


def split_address(text: str) -> tuple[str, str]:
    """Paths and patterns of an address, and what is told of columns; a ``#`` without ``=`` is part of a name."""
    before, _, told = text.rpartition("#")
    return (before, told) if before and "=" in told else (text, "")


def is_table(urls: str | Path | Sequence[str]) -> bool:
    """Return whether these paths and patterns name tables: by their endings, or as folders saved to disk."""
    texts = [str(urls)] if isinstance(urls, str | Path) else list(urls)
    parts = [part.strip() for text in texts for part in split_address(text)[0].split("::") if part.strip()]
    return bool(parts) and all(
        part.endswith(EXTENSIONS) or (is_local(part) and saved_folder(local_path(part))) for part in parts
    )


def find_sources(urls: str | Sequence[str]) -> tuple[list[Source], Columns]:
    """The files of the tables in order, and what their address tells of columns. Raises DataError where there are
    none, one is missing, or several addresses tell different things.
    """
    texts = [urls] if isinstance(urls, str) else list(urls)
    told = {part for text in texts if (part := split_address(text)[1])}
    if len(told) > 1:
        raise DataError(
            f"data: tables that are read together have the same columns, not '#{'and #'.join(sorted(told))}'"
        )
    columns = Columns.of(told.pop()) if told else Columns()
    found: list[Source] = []
    for name in expand([split_address(text)[0] for text in texts]):
        path = local_path(name)
        if not is_local(name):
            raise DataError(f"data: {name}: tables are read from this machine's files alone; copy it here first")
        if path.is_dir():
            found += _of_folder(path)
        elif path.is_file():
            found.append(Source(path, path.name, False, path.parent))
        else:
            raise DataError(f"data: {path} {'is no regular file' if path.exists() else 'does not exist'}")
    return found, columns


def tables_of(urls: str | Sequence[str]) -> list[Path]:
    """The files of the tables in order. Raises DataError as ``find_sources`` does."""
    return [source.path for source in find_sources(urls)[0]]


def check_root(columns: Columns) -> None:
    """Raise DataError where ``image_root`` is no folder."""
    if columns.image_root is not None and not Path(columns.image_root).expanduser().is_dir():
        raise DataError(f"data: image_root: {columns.image_root} is no folder")


def with_defaults(told: Columns, own: Columns) -> Columns:
    """What an address tells, before what a config does."""
    return replace(own, **{key: value for key, value in asdict(told).items() if value is not None})


def _of_folder(folder: Path) -> list[Source]:
    if (folder / SAVED_SPLITS).is_file() and not (folder / SAVED).is_file():
        splits = _read(folder / SAVED_SPLITS).get("splits")
        names = [str(split) for split in splits] if isinstance(splits, list) else []
        raise DataError(
            f"data: {folder} holds splits: {', '.join(names) or 'none'}. Name one, such as "
            f"{folder / (names[0] if names else 'train')}"
        )
    if not (folder / SAVED).is_file():
        raise DataError(f"data: {folder} is no folder that save_to_disk wrote. Name its tables: {folder}/*.parquet")
    files = _read(folder / SAVED).get("_data_files")
    try:
        paths = [folder / Path(item["filename"]).name for item in files or ()]
    except (TypeError, KeyError) as error:
        raise DataError(f"data: {folder / SAVED} names no files of data") from error
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        raise DataError(f"data: {missing[0]} does not exist" if missing else f"data: no rows: {folder} names no files")
    return [Source(path, f"{folder.name}/{path.name}", True, folder) for path in paths]


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"data: {path} is damaged: {error}") from error
    return found if isinstance(found, dict) else {}
