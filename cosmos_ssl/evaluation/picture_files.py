"""Pictures by path, as most known sets have them: with captions, a class, or a mask for each."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

from cosmos_ssl.api import BadSample, Sample
from cosmos_ssl.data.storage import retrying
from cosmos_ssl.evaluation.features import Job
from cosmos_ssl.pictures import open_rgb, read_regular

MASK = "mask.png"


class PictureFile(NamedTuple):
    """One picture and what belongs to it."""

    key: str
    path: Path
    captions: Sequence[str] = ()
    label: int | None = None
    mask: Path | None = None
    box: tuple[int, int, int, int] | None = None
    """The part that is the sample: left, top, right, bottom in pixels; None is all."""

    @property
    def paths(self) -> list[Path]:
        """The picture, and its mask where it has one."""
        return [self.path] if self.mask is None else [self.path, self.mask]


@dataclass(frozen=True, kw_only=True)
class PictureFiles:
    """Samples of a known set, each from files of its own."""

    name: str
    files: Sequence[PictureFile]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Sample:
        """Picture ``index`` with its captions as ``txt``, its class as ``cls``, its mask as ``mask.png``.

        Raises BadSample where a file is not there or cannot be one, OSError where storage fails.
        """
        file = self.files[index]
        image, *masks = map(_content, file.paths)
        image = image if file.box is None else _cut(image, file.box)
        extras: dict[str, Any] = {} if file.label is None else {"cls": file.label}
        extras |= {MASK: masks[0]} if masks else {}
        captions = {"txt": file.captions} if file.captions else {}
        return Sample(key=file.key, image=image, captions=captions, extras=extras)

    def sources(self, index: int) -> Sequence[str]:
        """The files of picture ``index``."""
        return list(map(str, self.files[index].paths))

    def identity(self) -> Mapping[str, Any]:
        """Name, size, and a digest over keys, names of files, captions and classes."""
        told = [
            [file.key, file.captions, file.label, *(path.name for path in file.paths), *(file.box or ())]
            for file in self.files
        ]
        return {
            "name": self.name,
            "samples": len(self),
            "digest": hashlib.sha256(json.dumps(told).encode()).hexdigest(),
        }

    def complete(self, job: Job, what: str) -> Self:
        """The set without pictures of which a file is not there.

        Raises DataError for these unless they may be missing; ``what`` says of what is missing that it is.
        """
        folders = {path.parent for file in self.files for path in file.paths}
        there = {path for folder in folders if folder.is_dir() for path in folder.iterdir()}
        missing = {n: gone for n, file in enumerate(self.files) if (gone := [p for p in file.paths if p not in there])}
        names = [self.files[n].key if gone[0] == self.files[n].path else gone[0].name for n, gone in missing.items()]
        job.leave_out(names, len(self), what)
        return replace(self, files=[file for n, file in enumerate(self.files) if n not in missing])


def _cut(image: bytes, box: tuple[int, int, int, int]) -> bytes:
    open_rgb(image).crop(box).save(file := io.BytesIO(), "png")
    return file.getvalue()


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise BadSample("no file", str(path))
    return retrying(lambda: read_regular(path), str(path))
