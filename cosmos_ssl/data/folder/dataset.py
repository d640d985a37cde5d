"""Pictures in folders by index: one folder a class at any depth, or all in one folder; captions beside them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosmos_ssl.api import BadSample, DataError, IndexedDataset, Sample
from cosmos_ssl.data.captions import caption_schema
from cosmos_ssl.data.folder.index import FolderIndex, shown
from cosmos_ssl.data.folder.scan import EXTENSIONS, TEXT_EXTENSION, check_is_folder, is_indexed, load_folder
from cosmos_ssl.data.scan import folder_shards, saved_folder, spread
from cosmos_ssl.data.storage import is_local, local_path, retrying
from cosmos_ssl.errors import did_you_mean, listed
from cosmos_ssl.liveness import OnProgress
from cosmos_ssl.pictures import MAX_PIXELS, read_regular

_LOOK_SAMPLES = 256
_HELD_OUT = ("val", "valid", "validation", "test")
_log = logging.getLogger("cosmos_ssl.data")


class Folder(IndexedDataset):
    """The pictures below one folder with random access, sorted by class, folder and name in byte order.

    The folders directly below are the classes, whatever lies between them and their pictures; a picture's class is
    ``extras['cls']`` (its number by sorted name, or in ``classes`` where given) and ``extras['class_name']``. A folder
    that holds pictures alone has no classes. Hidden files are left out, and a folder that several links lead to counts
    once. With ``captions`` the text file of a picture's name (``KEY.txt``) is its caption, the field ``txt``.
    ``cache_dir`` holds the index.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        extensions: Sequence[str] = EXTENSIONS,
        captions: bool = True,
        classes: Sequence[str] | None = None,
        cache_dir: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.root = Path(root).expanduser()
        self._extensions = tuple(dict.fromkeys(extension.lower().removeprefix(".") for extension in extensions))
        wrong = [e for e in self._extensions if not e or "/" in e or "." in e or e == TEXT_EXTENSION]
        if wrong or not self._extensions:
            raise ValueError(
                f"extensions: {f'{wrong[0]!r} is none of a picture' if wrong else 'none are given'}, such as jpg"
            )
        self.captions = captions
        self._classes = classes
        self._cache_dir = cache_dir
        self._max_pixels = max_pixels
        self._index: FolderIndex | None = None

    @property
    def index(self) -> FolderIndex:
        """Which pictures there are; made when first asked for."""
        if self._index is None:
            self._index = load_folder(self.root, extensions=self._extensions, cache_dir=self._cache_dir)
        return self._index

    @cached_property
    def class_names(self) -> Sequence[str]:
        """Names of the classes in the order of their numbers; none for pictures without class folders."""
        return self._classes if self._classes is not None else self.index.classes

    @cached_property
    def _numbers(self) -> Sequence[int]:
        """The number of each of the index's classes.

        Raises DataError for one (with pictures) that ``classes`` does not know.
        """
        own = self.index.classes
        if self._classes is None:
            return range(len(own))
        known = {name: number for number, name in enumerate(self._classes)}
        sizes = self.index.class_sizes()
        unknown = [name for name, size in zip(own, sizes, strict=True) if size and name not in known]
        if unknown:
            more = f" and {len(unknown) - 1} more are" if len(unknown) > 1 else " is"
            what = f"the class folder '{unknown[0]}'{more} none of the {len(known)} known classes"
            raise DataError(f"data: {self.root}: {what}.{did_you_mean(unknown[0], self._classes)}")
        return [known.get(name, -1) for name in own]

    @property
    def is_indexed(self) -> bool:
        """False where no index is of the folder as it is now, so that ``prepare`` would scan it."""
        return self._index is not None or is_indexed(self.root, extensions=self._extensions, cache_dir=self._cache_dir)

    def check_exists(self) -> bool:
        """Raise DataError where there is no such folder."""
        check_is_folder(self.root)
        return True

    def prepare(self, progress: OnProgress | None = None) -> None:
        """Index the folder and look for captions; what is odd is logged. Raises DataError, OSError."""
        if (splits := splits_of(self.root)) is not None and self._classes is None:
            both = f"{splits[0].name}/ and {splits[1].name}/"
            raise DataError(f"data: {self.root} holds {both}: splits, no classes. Name one: {splits[0]}")
        if self._index is None:
            self._index = load_folder(
                self.root, extensions=self._extensions, cache_dir=self._cache_dir, progress=progress
            )
        for line in folder_notices(self._index):
            _log.warning(line)
        if self.captions:
            self._look()

    def _look(self) -> None:
        """Raise DataError where not one of some evenly spread pictures has a caption."""
        count = len(self.index)
        places = spread(count, _LOOK_SAMPLES)
        if not self.index.notes.texts or not any(self._caption(self._path(place)[0]) for place in places):
            name = self._path(0)[0].with_suffix(f".{TEXT_EXTENSION}")
            raise DataError(f"data: no captions beside the pictures: looked for those of {len(places)}, such as {name}")
        if self.index.notes.texts < count:
            _log.warning(
                "data: %s: %s pictures, only %s text files", self.root, f"{count:,}", f"{self.index.notes.texts:,}"
            )

    def __len__(self) -> int:
        return len(self.index)

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        """All pictures are one shard."""
        return np.array([len(self)], np.int64)

    def sources(self, index: int) -> Sequence[str]:
        """The files that picture ``index`` is read from."""
        path = self._path(index)[0]
        return (
            [str(path), str(path.with_suffix(f".{TEXT_EXTENSION}"))]
            if self.captions and self.index.notes.texts
            else [str(path)]
        )

    def describe(self, index: int) -> str:
        """The folder that holds picture ``index``, from the root."""
        return shown(self.index.locate(index)[0]) or self.root.name

    def identity(self) -> Mapping[str, Any]:
        """Pictures, a digest over the names of files, folders and classes, and hashes of what they hold: nothing of
        where the root is.

        ``content`` is of all sizes and the first bytes of some pictures, ``captions`` of captions, where these are
        read; ``full_hash``, where ``data index --hash`` was run, is of every byte of both.
        """
        found: dict[str, Any] = {"samples": len(self), "digest": self.index.digest}
        hashes = self.index.hashes
        read = ("pictures", "captions") if self.captions and hashes["captions"] else ("pictures",)
        found |= {"content" if name == "pictures" else name: hashes[name] for name in read}
        if hashes["full_pictures"]:
            found["full_hash"] = "-".join(hashes[f"full_{name}"] for name in read)
        return found

    def read(self, index: int) -> Sample:
        """Picture ``index``, in sorted order; its key is its path from the root.

        Raises BadSample for what is no regular file, OSError where storage fails, IndexError.
        """
        path, key, number = self._path(index)
        image = retrying(lambda: read_regular(path), str(path))
        extras = {"cls": self._numbers[number], "class_name": self.index.classes[number]} if number >= 0 else {}
        captions = self._caption(path) if self.captions and self.index.notes.texts else {}
        return Sample(key=key, image=image, captions=captions, extras=extras, max_pixels=self._max_pixels)

    def _path(self, index: int) -> tuple[Path, str, int]:
        folder, name, number = self.index.locate(index)
        key = folder + b"/" + name if folder else name
        return self.root / os.fsdecode(key), shown(key), number

    def _caption(self, picture: Path) -> Mapping[str, Sequence[str]]:
        """The caption beside a picture, if there is one."""
        path = picture.with_suffix(f".{TEXT_EXTENSION}")

        def read() -> bytes:
            try:
                return read_regular(path)
            except (FileNotFoundError, BadSample):  # a pipe is none
                return b""

        return caption_schema("txt")({}, retrying(read, str(path)).decode("utf-8", "replace"))


def splits_of(root: Path) -> tuple[Path, Path] | None:
    """``train`` and ``val`` (or ``valid``, ``validation``, ``test``) below a folder that holds both: splits, which are
    no classes.
    """
    held_out = next((root / name for name in _HELD_OUT if (root / name).is_dir()), None)
    return (root / "train", held_out) if held_out is not None and (root / "train").is_dir() else None


def folder_notices(index: FolderIndex) -> list[str]:
    """Return what a person should know of these folders, one line each."""
    notes, classes = index.notes, f"{len(index.classes):,} class folders"
    odd = (
        (notes.loose, f"pictures beside the {classes} are left out", notes.loose_examples),
        (notes.empty, f"of {classes} hold no picture", notes.empty_examples),
        (notes.others, "files that are no pictures are left out", notes.other_examples),
    )
    return [f"data: {count:,} {what} ({listed(examples, total=count)})" for count, what, examples in odd if count]


def picture_folder(urls: str | Path | Sequence[str]) -> Path | None:
    """The folder of pictures that ``urls`` names, or None where they name something else: shards, tables, or folders
    that hold shards and no picture. Raises DataError for several folders of pictures."""
    names = [str(urls)] if isinstance(urls, str | Path) else list(urls)
    folders = [local_path(name) for name in names if is_local(name) and local_path(name).is_dir()]
    folders = [folder for folder in folders if not saved_folder(folder)]
    folders = [folder for folder in folders if not folder_shards(folder) or _has_picture(folder)]
    if folders and len(names) > 1:
        raise DataError(
            f"data: {folders[0]} is a folder: pictures are read from one folder alone, {len(names)} paths are given"
        )
    return folders[0] if folders else None


def _has_picture(folder: Path) -> bool:
    """Return whether there is a picture anywhere below, as beside the archives that a data set was unpacked from."""
    endings = tuple(f".{extension}" for extension in EXTENSIONS)
    return any(name.lower().endswith(endings) for _, _, names in os.walk(folder) for name in names)
