"""Where the images are: shards as img2dataset or a mirror of them wrote them, or the files of a folder."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosmos_ssl.data.cache import cache_root, digest
from cosmos_ssl.data.scan import IMAGE_EXTENSIONS, expand, folder_shards, grouped, header_reader
from cosmos_ssl.data.storage import BlockCache, Reader, Stat, local_path, stat
from cosmos_ssl.data.tar import TarFault, members, members_in, sample_key
from cosmos_ssl.errors import BadSample, DataError
from cosmos_ssl.files import written_whole
from cosmos_ssl.liveness import OnStage
from cosmos_ssl.pictures import FILE_BYTES, open_picture, read_regular, undecodable
from cosmos_ssl.shards.keys import KEY, hashed
from cosmos_ssl.shards.output import Output, in_processes

IMAGE = np.dtype(
    [("key", KEY), ("offset", "<i8"), ("length", "<u4"), ("body", "<i8"), ("size", "<u4"), ("picture", "?")]
)
"""One image of a part: hashed URL or path; where its sample (or its name in the list of names) lies; in a shard, where
its bytes lie; and whether its name is that of a picture."""
_JSON_BYTES = 1 << 22
_FILE_EXTENSIONS = (*IMAGE_EXTENSIONS, "bmp", "gif", "tif", "tiff")
_LISTED = 1 << 17
"""Names of a folder that are Python objects at a time."""
_OTHERS = {b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF"}


class Images(ABC):
    """Images in parts; a part has an index in the work folder, ``images-00000.npy``."""

    by_url: bool
    root = ""
    """The folder below which absolute paths are as good as relative ones."""

    @abstractmethod
    def identity(self) -> Any:
        """Return what makes these images these, in plain values."""

    @abstractmethod
    def index(self, output: Output, workers: int, progress: OnStage) -> list[dict[str, int]]:
        """Write the index of each part; of each, how many ``images`` it has, and how many more ``without a URL``.

        Raises DataError, OSError.
        """

    @abstractmethod
    def read(self, work: Path, part: int, image: Any) -> bytes:
        """The bytes of one image, a record of IMAGE.

        Raises BadSample where it is gone or too large, OSError where storage fails.
        """

    @abstractmethod
    def name(self, work: Path, part: int, image: Any) -> str:
        """URL or path of one image."""


def load_index(work: Path, part: int) -> NDArray[Any]:
    """The index of a part, records of IMAGE."""
    found: NDArray[Any] = np.load(_index_path(work, part))
    return found


def _index_path(work: Path, part: int) -> Path:
    return work / f"images-{part:05d}.npy"


def _new_index(names: Sequence[bytes]) -> NDArray[Any]:
    found = np.zeros(len(names), IMAGE)
    found["key"] = hashed(names)
    return found


def _save(work: Path, part: int, found: NDArray[Any]) -> None:
    with written_whole(_index_path(work, part)) as file:
        np.save(file, found)


class ShardImages(Images):
    """Tar shards whose samples have JSON with a ``url``; one shard is one part."""

    by_url = True

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls = list(urls)
        self._stats: dict[int, Stat] = {}
        self._reader = Reader(BlockCache(cache_root() / "blocks", 32 << 30))

    def _stat(self, part: int) -> Stat:
        if part not in self._stats:
            try:
                self._stats[part] = stat(self._urls[part])
            except (FileNotFoundError, NotADirectoryError) as error:
                raise DataError(f"--images: no such shard: {self._urls[part]}") from error
        return self._stats[part]

    def identity(self) -> Any:
        sizes = digest(f"{url} {self._stat(i).size}" for i, url in enumerate(self._urls))
        return [len(self._urls), self._urls[0], sizes]

    def index(self, output: Output, workers: int, progress: OnStage) -> list[dict[str, int]]:
        notes = [output.note(f"index/{part:05d}.json") for part in range(len(self._urls))]
        todo = [part for part, note in enumerate(notes) if note is None]
        done = len(notes) - len(todo)
        progress("image shards indexed", done, len(notes))
        for number, note in in_processes(workers, self._index_part, [(output.work, part) for part in todo]):
            output.put(f"index/{todo[number]:05d}.json", note)
            notes[todo[number]] = note
            done += 1
            progress("image shards indexed", done, len(notes))
        if not any(note["images"] for note in notes):
            without = sum(note["without a URL"] for note in notes)
            what = f"none of {without:,} images has a 'url' in its JSON" if without else "no images at all"
            raise DataError(
                f"--images: these shards hold {what}. Images in shards are joined by URL; else give a folder of images"
            )
        return notes

    def _index_part(self, work: Path, part: int) -> dict[str, int]:
        url, size = self._urls[part], self._stat(part).size
        read = header_reader(url, size)
        names: list[bytes] = []
        places: list[tuple[int, int, int, int]] = []
        without = 0
        try:
            for group in grouped(members(read, size)):
                by_extension = {sample_key(m.name)[1]: m for m in group}
                picture = next((m for extension, m in by_extension.items() if extension in IMAGE_EXTENSIONS), None)
                if picture is None:
                    continue
                told = by_extension.get("json")
                address = _url(read(told.data, told.size)) if told and told.size <= _JSON_BYTES else ""
                without += not address
                if address and group[-1].end - group[0].start <= FILE_BYTES:
                    names.append(address.encode("utf-8", "surrogatepass"))
                    places.append((group[0].start, group[-1].end - group[0].start, picture.data, picture.size))
        except TarFault as error:
            raise DataError(
                f"--images: {url} is cut short or damaged: {error}. Fetch it again, or leave it out"
            ) from error
        found = _new_index(names)
        found["picture"] = True
        if places:
            found["offset"], found["length"], found["body"], found["size"] = np.array(places).T
        _save(work, part, found)
        return {"images": len(names), "without a URL": without}

    def read(self, work: Path, part: int, image: Any) -> bytes:
        return self._reader.read(self._urls[part], self._stat(part), int(image["body"]), int(image["size"]))

    def name(self, work: Path, part: int, image: Any) -> str:
        found = self._reader.read(self._urls[part], self._stat(part), int(image["offset"]), int(image["length"]))
        try:
            for member in members_in(found):
                if sample_key(member.name)[1] == "json":
                    return _url(found[member.data : member.data + member.size])
        except TarFault as error:
            raise OSError(f"{self._urls[part]} has changed since it was indexed: {error}") from error
        return ""


def _url(body: bytes) -> str:
    """The URL in a sample's JSON, empty where there is none."""
    try:
        table = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    found = table.get("url") if isinstance(table, dict) else None
    return found.strip() if isinstance(found, str) else ""


class FolderImages(Images):
    """The files below a folder, listed once; a part is a span of that list."""

    by_url = False

    def __init__(self, root: Path) -> None:
        self._folder = root
        self.root = root.as_posix()

    def identity(self) -> Any:
        return str(self._folder)

    def index(self, output: Output, workers: int, progress: OnStage) -> list[dict[str, int]]:
        """The files of a folder, hidden ones left out.

        Names are sorted within each ``_LISTED`` of a folder, so that a folder of any size fits in memory.
        """
        notes: list[dict[str, int]] = []
        files = self._walk(b"", frozenset())
        while (names := list(islice(files, _LISTED))) or not notes:
            found, lengths = _new_index(names), np.array([len(name) for name in names], np.int64)
            found["length"], found["offset"] = lengths, np.cumsum(lengths) - lengths
            endings = [name.rpartition(b".")[2].lower().decode("ascii", "replace") for name in names]
            found["picture"] = [ending in _FILE_EXTENSIONS for ending in endings]
            with written_whole(self._names(output.work, len(notes))) as file:
                file.write(b"".join(names))
            _save(output.work, len(notes), found)
            notes.append({"images": int(found["picture"].sum()), "without a URL": 0})
        return notes

    def _walk(self, folder: bytes, above: frozenset[tuple[int, int]]) -> Iterator[bytes]:
        folders, files = list[bytes](), list[bytes]()
        found = (self._folder / os.fsdecode(folder)).stat()
        if (found.st_dev, found.st_ino) in above:  # a link back to where we came from
            return
        above |= {(found.st_dev, found.st_ino)}
        try:
            with os.scandir(os.fsencode(self._folder / os.fsdecode(folder))) as entries:
                for entry in entries:
                    name = bytes(entry.name)
                    if name.startswith(b"."):
                        continue
                    (folders if entry.is_dir() else files).append(folder + b"/" + name if folder else name)
                    if len(files) == _LISTED:
                        yield from sorted(files)
                        files = []
        except PermissionError as error:
            raise DataError(f"--images: {os.fsdecode(error.filename)} cannot be read: {error.strerror}") from error
        yield from sorted(files)
        for below in sorted(folders):
            yield from self._walk(below, above)

    def read(self, work: Path, part: int, image: Any) -> bytes:
        try:
            return read_regular(self._folder / os.fsdecode(self._bytes(work, part, image)))
        except (FileNotFoundError, PermissionError) as error:
            raise BadSample("unreadable file", str(error.strerror)) from error

    def name(self, work: Path, part: int, image: Any) -> str:
        return self._bytes(work, part, image).decode("utf-8", "backslashreplace")

    def _bytes(self, work: Path, part: int, image: Any) -> bytes:
        with self._names(work, part).open("rb", buffering=0) as names:
            return os.pread(names.fileno(), int(image["length"]), int(image["offset"]))

    def _names(self, work: Path, part: int) -> Path:
        return work / f"names-{part:05d}"


def open_images(given: Sequence[str]) -> Images:
    """The images that ``--images`` names. Raises DataError."""
    folders = [local_path(name) for name in given if "://" not in name and local_path(name).is_dir()]
    if folders and len(given) > 1:
        raise DataError(
            f"--images: {folders[0]} is a folder: give one folder of images, or shards such as '{folders[0]}/*.tar'"
        )
    if not folders:
        return ShardImages(expand(given))
    tars = folder_shards(folders[0])
    return ShardImages(tars) if tars else FolderImages(folders[0].absolute())


def check_picture(body: bytes, max_pixels: int, *, decode: bool) -> str:
    """The file extension that fits a picture's bytes: jpg, png or webp.

    Raises BadSample where it is another format or none, has more than ``max_pixels``, or (with ``decode``) is damaged.
    """
    if body.startswith(b"\xff\xd8\xff"):
        extension = "jpg"
    elif body.startswith(b"\x89PNG\r\n\x1a\n"):
        extension = "png"
    elif body[:4] == b"RIFF" and body[8:12] == b"WEBP":
        extension = "webp"
    else:
        other = next((name for start, name in _OTHERS.items() if body.startswith(start)), None)
        if other:
            raise BadSample("other format", f"{other}; shards hold JPEG, PNG and WebP")
        raise BadSample("not a picture", "0 bytes" if not body else "begins " + repr(body[:24])[1:])
    with undecodable():
        picture = open_picture(body, max_pixels=max_pixels, decode=False)
        if decode:
            picture.draft("RGB", (1, 1))  # JPEG: all of its data is read, an eighth of its pixels is made
            picture.load()
    return extension
