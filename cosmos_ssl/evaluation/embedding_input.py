"""What embeddings are made of: a folder, files, the lines of a file, tables, or shards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from cosmos_ssl.api import DataError, Sample
from cosmos_ssl.data.dataset import open_shards
from cosmos_ssl.data.folder import EXTENSIONS, Folder, picture_folder, similar
from cosmos_ssl.data.table import TableData, is_table
from cosmos_ssl.evaluation.picture_files import PictureFile, PictureFiles
from cosmos_ssl.evaluation.samples import Samples

What: TypeAlias = Literal["image", "text", "both"]


class WithSource(Samples, Protocol):
    """What is embedded: samples that tell where they are from."""

    def describe(self, index: int) -> str:
        """The shard, folder or file that it comes from."""
        ...


class _Files(PictureFiles):
    """Picture files, each named."""

    def describe(self, index: int) -> str:
        return str(self.files[index].path.parent)

    def identity(self) -> Mapping[str, Any]:
        told = (f"{file.path.name} {file.path.stat().st_size}" for file in self.files)
        return {"samples": len(self), "digest": _digest(told)}


def _named(paths: Sequence[Path]) -> _Files:
    _refuse_odd(paths)
    missing = [path for path in paths if not path.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more do" if len(missing) > 1 else " does"
        raise DataError(f"data: {missing[0]}{more} not exist.{similar(missing[0])}")
    return _Files(name="", files=[PictureFile(str(path), path) for path in paths])


class _Lines:
    """A text file, one text a line; a line without one is a bad sample."""

    def __init__(self, path: Path) -> None:
        _refuse_odd([path])
        try:
            self._lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError as error:
            raise DataError(f"data: {path} cannot be read: {error.strerror}.{similar(path)}") from error
        if self._lines[-1] == "":
            self._lines.pop()
        self._name = path.name

    def __len__(self) -> int:
        return len(self._lines)

    def read(self, index: int) -> Sample:
        line = self._lines[index].strip()
        return Sample(key=str(index + 1), captions={"txt": [line]} if line else {})

    def describe(self, index: int) -> str:
        return self._name

    def identity(self) -> Mapping[str, Any]:
        return {"samples": len(self), "digest": _digest(self._lines)}


def _refuse_odd(paths: Sequence[Path]) -> None:
    """Raise DataError for a folder, a pipe or a device, which would be waited for."""
    odd = next((path for path in paths if path.exists() and not path.is_file()), None)
    if odd is not None:
        raise DataError(f"data: {odd} is no regular file")


def open_samples(data: Sequence[str]) -> tuple[WithSource, What]:
    """A folder of pictures, picture files, a text file (``.txt``), tables or shards; and what is embedded of them
    unless told.

    Raises DataError where there is nothing to read, or kinds are mixed.
    """
    folder = picture_folder(data)
    if folder is not None:
        return Folder(folder), "image"
    if is_table(data):
        return TableData(data), "image"
    endings = {"pictures": tuple(f".{extension}" for extension in EXTENSIONS), "texts": (".txt",)}
    kinds = sorted(
        {next((kind for kind, ends in endings.items() if name.lower().endswith(ends)), "shards") for name in data}
    )
    if len(kinds) > 1:
        raise DataError(
            f"data: {' and '.join(kinds)} are mixed. Give a folder, picture files, one text file, or shards"
        )
    if kinds == ["pictures"]:
        return _named([Path(name).expanduser() for name in data]), "image"
    if kinds == ["texts"]:
        if len(data) > 1:
            raise DataError(f"data: {len(data)} text files. Give one, with one text a line")
        return _Lines(Path(data[0]).expanduser()), "text"
    return open_shards(data), "image"


def _digest(lines: Iterable[str]) -> str:
    found = hashlib.sha256()
    for line in lines:
        found.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return found.hexdigest()[:16]
