"""Sets of pictures with several captions each, in the layouts in which people have them: COCO and Flickr30k."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_ssl.api import BadSample, DataError, Sample
from cosmos_ssl.data.storage import retrying
from cosmos_ssl.evaluation.features import Job

COCO_CAPTIONS = "annotations/captions_val2017.json"
COCO_PICTURES = "val2017"
FLICKR_CAPTIONS = "dataset_flickr30k.json"
FLICKR_PICTURES = ("flickr30k-images", "flickr30k_images", "images")


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionSet:
    """Pictures of a folder and their captions, in the order of the set."""

    name: str
    """``coco`` or ``flickr30k``."""
    folder: Path
    entries: Sequence[tuple[str, Sequence[str]]]
    """File name and captions of each picture."""

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, index: int) -> Sample:
        """Picture ``index`` with its captions under ``txt``. Raises BadSample where the file is not there, OSError where storage fails."""
        file, captions = self.entries[index]
        path = self.folder / file
        if not path.is_file():
            raise BadSample("no file", str(path))
        return Sample(key=file, image=retrying(path.read_bytes, str(path)), captions={"txt": captions})

    def identity(self) -> Mapping[str, Any]:
        """Name, and a digest over files and captions."""
        return {"name": self.name, "digest": hashlib.sha256(json.dumps(self.entries).encode()).hexdigest()}

    def complete(self, job: Job) -> CaptionSet:
        """The set without pictures that have no file or no caption. Raises DataError for these unless they may be missing."""
        there = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        job.leave_out([file for file, _ in self.entries if file not in there], len(self), f"pictures are not in {self.folder}")
        job.leave_out([file for file, captions in self.entries if not captions], len(self), "pictures have no caption")
        whole = [(file, captions) for file, captions in self.entries if file in there and captions]
        if not whole:
            raise DataError(f"data: not one picture with a caption is in {self.folder}")
        return CaptionSet(name=self.name, folder=self.folder, entries=whole)


def find_caption_set(folder: Path) -> CaptionSet | None:
    """COCO's or Flickr30k's evaluation split, if its annotations lie in ``folder``. Raises DataError for unusable ones."""
    if (folder / COCO_CAPTIONS).is_file():
        return read_coco(folder)
    if (folder / FLICKR_CAPTIONS).is_file():
        return read_flickr30k(folder)
    if (folder / COCO_PICTURES).is_dir() and (folder / "annotations").is_dir():
        raise DataError(f"data: {folder} looks like COCO, and has no {COCO_CAPTIONS}")
    picture_folder = next((name for name in FLICKR_PICTURES[:2] if (folder / name).is_dir()), None)
    if picture_folder is not None:
        raise DataError(f"data: {folder} holds {picture_folder}, and not Karpathy's {FLICKR_CAPTIONS}, which tells the test split")
    return None


def read_coco(folder: Path) -> CaptionSet:
    """COCO val2017: ``annotations/captions_val2017.json`` and ``val2017/``, pictures by number, all captions of each."""
    table = _table(folder / COCO_CAPTIONS)
    try:
        captions: dict[int, list[str]] = {image["id"]: [] for image in table["images"]}
        for note in table["annotations"]:
            captions[note["image_id"]].append(" ".join(note["caption"].split()))
        files = {image["id"]: str(image["file_name"]) for image in table["images"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"data: {folder / COCO_CAPTIONS} is not COCO's form: {type(error).__name__} {error}") from error
    return CaptionSet(name="coco", folder=folder / COCO_PICTURES, entries=[(files[n], captions[n]) for n in sorted(files)])


def read_flickr30k(folder: Path, split: str = "test") -> CaptionSet:
    """Flickr30k by Karpathy's split: ``dataset_flickr30k.json`` and ``flickr30k-images/``, the 1,000 test pictures, all captions."""
    table = _table(folder / FLICKR_CAPTIONS)
    try:
        entries = [
            (str(image["filename"]), [" ".join(sentence["raw"].split()) for sentence in image["sentences"]])
            for image in table["images"]
            if image["split"] == split
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"data: {folder / FLICKR_CAPTIONS} is not Karpathy's form: {type(error).__name__} {error}") from error
    pictures = next((name for name in FLICKR_PICTURES if (folder / name).is_dir()), FLICKR_PICTURES[0])
    return CaptionSet(name="flickr30k", folder=folder / pictures, entries=entries)


def _table(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"data: {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"data: {path} is no JSON: {error}") from error
