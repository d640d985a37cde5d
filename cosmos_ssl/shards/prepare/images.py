"""Where the images are: shards as img2dataset or a mirror of them wrote them, or the files of a folder."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosmos_ssl.data.scan import IMAGE_EXTENSIONS, expand, folder_shards, grouped, header_reader
from cosmos_ssl.data.storage import BlockCache, Reader, Stat, cache_root, local_path, stat
from cosmos_ssl.data.tar import TarFault, members, sample_key
from cosmos_ssl.errors import BadSample, DataError
from cosmos_ssl.files import written_whole
from cosmos_ssl.pictures import FILE_BYTES, open_picture, read_regular, undecodable
from cosmos_ssl.shards.prepare.rows import KEY, hashed

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

    @abstractmethod
    def index_part(self, work: Path, part: int) -> dict[str, int]:
        """Write the index of one part; counts of what was odd. Raises DataError, OSError."""

    @abstractmethod
    def read(self, work: Path, part: int, image: Any) -> bytes:
        """The bytes of one image, a record of IMAGE.

        Raises BadSample where it is gone or too large, OSError where storage fails.
        """

    @abstractmethod
    def name(self, work: Path, part: int, image: Any) -> str:
        """URL or path of one image."""


def index_path(work: Path, part: int) -> Path:
    """Where the index of a part lies."""
    return work / f"images-{part:05d}.npy"


def load_index(work: Path, part: int) -> NDArray[Any]:
    """The index of a part, records of IMAGE."""
    found: NDArray[Any] = np.load(index_path(work, part))
    return found


def _save(path: Path, found: NDArray[Any]) -> None:
    with written_whole(path) as file:
        np.save(file, found)


class ShardImages(Images):
    """Tar shards whose samples have JSON with a ``url``; one shard is one part."""

    by_url = True

    def __init__(self, urls: Sequence[str]) -> None:
        self.urls = list(urls)
        self._stats: dict[int, Stat] = {}
        self._reader = Reader(BlockCache(cache_root() / "blocks", 32 << 30))

    def stat(self, part: int) -> Stat:
        """Size and stamp of a shard. Raises DataError where it is missing."""
        if part not in self._stats:
            try:
                self._stats[part] = stat(self.urls[part])
            except (FileNotFoundError, NotADirectoryError) as error:
                raise DataError(f"--images: no such shard: {self.urls[part]}") from error
        return self._stats[part]

    def index_part(self, work: Path, part: int) -> dict[str, int]:
        url, size = self.urls[part], self.stat(part).size
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
        found = np.zeros(len(names), IMAGE)
        found["key"], found["picture"] = hashed(names), True
        if places:
            found["offset"], found["length"], found["body"], found["size"] = np.array(places).T
        _save(index_path(work, part), found)
        return {"images": len(names), "without a URL": without}

    def read(self, work: Path, part: int, image: Any) -> bytes:
        return self._reader.read(self.urls[part], self.stat(part), int(image["body"]), int(image["size"]))

    def name(self, work: Path, part: int, image: Any) -> str:
        length = int(image["length"])
        found = self._reader.read(self.urls[part], self.stat(part), int(image["offset"]), length)
        try:
            for member in members(lambda at, count: found[at : at + count], length, whole=False):
                if sample_key(member.name)[1] == "json":
                    return _url(found[member.data : member.data + member.size])
        except TarFault as error:
            raise OSError(f"{self.urls[part]} has changed since it was indexed: {error}") from error
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
        self.root = root

    def list_files(self, work: Path) -> int:
        """Write the parts' indices and lists of names; how many parts there are. Hidden files are left out.

        Names are sorted within each ``_LISTED`` of a folder, so that a folder of any size fits in memory.
        """
        part, names = -1, list[bytes]()
        for name in self._walk(b"", frozenset()):
            names.append(name)
            if len(names) == _LISTED:
                part += 1
                self._save(work, part, names)
                names = []
        if names or part < 0:
            part += 1
            self._save(work, part, names)
        return part + 1

    def _walk(self, folder: bytes, above: frozenset[tuple[int, int]]) -> Iterator[bytes]:
        folders, files = list[bytes](), list[bytes]()
        found = (self.root / os.fsdecode(folder)).stat()
        if (found.st_dev, found.st_ino) in above:  # a link back to where we came from
            return
        above |= {(found.st_dev, found.st_ino)}
        try:
            with os.scandir(os.fsencode(self.root / os.fsdecode(folder))) as entries:
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

    def _save(self, work: Path, part: int, names: Sequence[bytes]) -> None:
        found = np.zeros(len(names), IMAGE)
        if names:
            lengths = np.array([len(name) for name in names])
            found["key"], found["length"], found["offset"] = hashed(names), lengths, np.cumsum(lengths) - lengths
            found["picture"] = [
                name.rpartition(b".")[2].lower().decode("ascii", "replace") in _FILE_EXTENSIONS for name in names
            ]
        with written_whole(work / f"names-{part:05d}") as file:
            file.write(b"".join(names))
        _save(index_path(work, part), found)

    def index_part(self, work: Path, part: int) -> dict[str, int]:
        return {"images": int(load_index(work, part)["picture"].sum()), "without a URL": 0}

    def read(self, work: Path, part: int, image: Any) -> bytes:
        name = self._bytes(work, part, image)
        try:
            return read_regular(self.root / os.fsdecode(name))
        except (FileNotFoundError, PermissionError) as error:
            raise BadSample("unreadable file", str(error.strerror)) from error

    def name(self, work: Path, part: int, image: Any) -> str:
        return self._bytes(work, part, image).decode("utf-8", "backslashreplace")

    def _bytes(self, work: Path, part: int, image: Any) -> bytes:
        with (work / f"names-{part:05d}").open("rb", buffering=0) as names:
            return os.pread(names.fileno(), int(image["length"]), int(image["offset"]))


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
