"""Sets of pictures with captions, in the layouts in which people have them: COCO and Flickr30k; long ones of Urban-1k
(arXiv 2403.15378), DCI (2312.08578) and DOCCI (2404.19753).

A layout is a table of captions, where the pictures may lie beside it, and how the table is read.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from cosmos_ssl.api import DataError
from cosmos_ssl.evaluation.features import Job
from cosmos_ssl.evaluation.picture_files import PictureFile, PictureFiles
from cosmos_ssl.evaluation.samples import check_set, only_set
from cosmos_ssl.evaluation.text_files import read_json, read_text

Entries: TypeAlias = list[tuple[str, list[str]]]
_LOOK = 50
_TEST_LISTS = ("test.txt", "flickr30k_test.txt")
_log = logging.getLogger("cosmos_ssl.evaluation")


@dataclass(frozen=True, kw_only=True)
class CaptionSet(PictureFiles):
    """Pictures of a folder and their captions, in the order of the set.

    Its name is ``coco``, ``coco_karpathy``, ``flickr30k`` (``flickr30k_all`` where its test split is not told), ...
    """

    folder: Path

    def complete(self, job: Job, what: str = "pictures are not in") -> CaptionSet:
        """The set without pictures that have no file or no caption.

        Raises DataError for these unless they may be missing, and where none is left.
        """
        there = super().complete(job, f"{what} {self.folder}")
        job.leave_out([file.key for file in self.files if not file.captions], len(self), "pictures have no caption")
        whole = [file for file in there.files if file.captions]
        if not whole:
            raise DataError(f"data: not one picture with a caption is in {self.folder}")
        return replace(self, files=whole)


# ---------------------------------------------------------------------------- how tables of captions are read


def _coco(path: Path) -> Entries:
    """COCO's own form: pictures by number, all captions of each."""
    table = read_json(path)
    try:
        captions: dict[int, list[str]] = {image["id"]: [] for image in table["images"]}
        for note in table["annotations"]:
            captions[note["image_id"]].append(_plain(note["caption"]))
        files = {image["id"]: str(image["file_name"]) for image in table["images"]}
        return [(files[n], captions[n]) for n in sorted(files)]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"data: {path} is not COCO's form: {type(error).__name__} {error}") from error


def _karpathy(path: Path, split: str = "test") -> Entries:
    """Karpathy's form: the pictures of a split, all captions of each."""
    table = read_json(path)
    try:
        return [
            (
                str(Path(image.get("filepath", ""), image["filename"])),
                [_plain(sentence["raw"]) for sentence in image["sentences"]],
            )
            for image in table["images"]
            if image["split"] == split
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"data: {path} is not Karpathy's form: {type(error).__name__} {error}") from error


def _table(path: Path, split: str = "test") -> Entries:
    """``flickr_annotations_30k.csv``: a picture a row, with its split and a JSON list of captions."""
    try:
        rows = csv.DictReader(io.StringIO(read_text(path), newline=""))
        return [
            (row["filename"], [_plain(one) for one in json.loads(row["raw"])]) for row in rows if row["split"] == split
        ]
    except DataError:
        raise
    except (csv.Error, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise DataError(
            f"data: {path} is no table of filename, split and raw: {type(error).__name__} {error}"
        ) from error


_LINE = re.compile(
    r"(?P<file>[^,|\t#]+\.jpe?g)(?:#\d+)?\s*[,|\t]\s*(?:\d+(?:\s*\|\s*|\s{3}))?(?P<caption>.*)", re.IGNORECASE
)


def _lines(path: Path) -> Entries:
    """A caption a line: ``NAME.jpg#0<tab>CAPTION``, or below a head ``NAME.jpg| 0| CAPTION``, ``NAME.jpg,CAPTION``."""
    found: dict[str, list[str]] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        match = _LINE.match(line)
        if match is not None:
            found.setdefault(match["file"], []).append(_plain(match["caption"]))
        elif number > 1 and line.strip():
            raise DataError(f"data: {path}: line {number} is no picture and its caption")
    return list(found.items())


def _files(path: Path) -> Entries:
    """Urban-1k: a folder of texts, ``N.txt`` of ``N.jpg``."""
    return [(f"{text.stem}.jpg", [_plain(read_text(text))]) for text in sorted(path.glob("*.txt"))]


def _dci(path: Path) -> Entries:
    """DCI: ``splits.json`` names the files of ``annotations/``, each of one picture with a short text and the rest of
    it. All splits together are the set, and both texts the caption.
    """
    splits = read_json(path)
    try:
        notes = [read_json(path.parent / "annotations" / name) for names in splits.values() for name in names]
        return [(note["image"], [_plain(f"{note['short_caption']} {note['extra_caption']}")]) for note in notes]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"data: {path} is not DCI's form: {type(error).__name__} {error}") from error


def _docci(path: Path, split: str = "test") -> Entries:
    """DOCCI: a picture a line, with its split and its description."""
    try:
        rows = [json.loads(line) for line in read_text(path).splitlines() if line.strip()]
        return [(row["image_file"], [_plain(row["description"])]) for row in rows if row["split"] == split]
    except DataError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise DataError(f"data: {path} is not DOCCI's form: {type(error).__name__} {error}") from error


def _plain(caption: str) -> str:
    return " ".join(caption.split())


# ---------------------------------------------------------------------------- where they lie


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """A table by its path from the folder, the folders in which its pictures may lie, and the set that they make."""

    name: str
    table: str
    pictures: Sequence[str]
    read: Callable[[Path], Entries]
    above: Sequence[str] = ("", "annotations", "karpathy")
    """Where the table may lie."""
    beside: str = ""
    """A folder that lies beside a table whose name alone tells nothing."""
    named: str = ""
    """How the folder with the table is called, where what lies there tells nothing."""
    whole: bool = False
    """The table holds all splits and does not tell them."""

    def find(self, folder: Path) -> Path | None:
        """The table, where it is there."""
        tables = (folder / above / self.table for above in self.above)
        return next(
            (
                path
                for path in tables
                if path.exists()
                and (path.parent / self.beside).is_dir()
                and self.named in ("", path.parent.resolve().name)
            ),
            None,
        )

    def open(self, folder: Path, path: Path) -> CaptionSet:
        """The set: its pictures lie in the first folder that holds one of the first few, else they are looked for in
        the first folder.

        Of a ``whole`` table it is the test split where a list of its pictures lies beside it; else all, under another
        name.
        """
        name, entries = self.name, self.read(path)
        if self.whole:
            listed = next((path.parent / name for name in _TEST_LISTS if (path.parent / name).is_file()), None)
            if listed is None:
                name = f"{name}_all"
                _log.warning(
                    "%s tells no split, so all %s pictures are taken; %s beside it may list those of the test "
                    "split, one a line",
                    path,
                    f"{len(entries):,}",
                    _TEST_LISTS[0],
                )
            else:
                names = {Path(line.strip()).stem for line in read_text(listed).splitlines()}
                entries = [(file, captions) for file, captions in entries if Path(file).stem in names]
        places = [folder / below for below in self.pictures]
        some = [file for file, _ in entries[:_LOOK]]
        place = next((place for place in places if any((place / file).is_file() for file in some)), places[0])
        files = [PictureFile(file, place / file, captions) for file, captions in entries]
        return CaptionSet(name=name, folder=place, files=files)


_FLICKR = ("flickr30k-images", "flickr30k_images", "flickr30k_images/flickr30k_images", "images")
_LAYOUTS = (
    _Layout(
        name="coco",
        table="captions_val2017.json",
        above=("annotations",),
        pictures=("val2017", "images/val2017"),
        read=_coco,
    ),
    _Layout(name="coco_karpathy", table="dataset_coco.json", pictures=("", "images"), read=_karpathy),
    _Layout(name="coco_karpathy", table="coco_test_karpathy.json", pictures=("val2014", "images/val2014"), read=_coco),
    _Layout(name="flickr30k", table="dataset_flickr30k.json", pictures=_FLICKR, read=_karpathy),
    _Layout(name="flickr30k", table="flickr_annotations_30k.csv", pictures=_FLICKR, read=_table),
    _Layout(name="flickr30k", table="flickr30k_test_karpathy.txt", pictures=_FLICKR, read=_lines),
    _Layout(name="flickr30k", table="results_20130124.token", pictures=_FLICKR, read=_lines, whole=True),
    _Layout(
        name="flickr30k",
        table="results.csv",
        above=("", "flickr30k_images"),
        beside="flickr30k_images",
        pictures=_FLICKR,
        read=_lines,
        whole=True,
    ),
    _Layout(
        name="urban1k",
        table="caption",
        above=("", "Urban1k"),
        named="Urban1k",
        pictures=("image", "Urban1k/image"),
        read=_files,
    ),
    _Layout(
        name="dci",
        table="splits.json",
        above=("", "densely_captioned_images"),
        beside="annotations",
        pictures=("photos", "densely_captioned_images/photos"),
        read=_dci,
    ),
    _Layout(name="docci", table="docci_descriptions.jsonlines", above=("",), pictures=("images",), read=_docci),
)
"""Of a set the first that is there is read."""
SETS = tuple(dict.fromkeys(layout.name for layout in _LAYOUTS))


def caption_sets_in(folder: Path) -> list[str]:
    """The sets whose captions lie in ``folder``."""
    return list(dict.fromkeys(layout.name for layout in _LAYOUTS if layout.find(folder) is not None))


def find_caption_set(folder: Path, wanted: str | None = None) -> CaptionSet | None:
    """The set whose captions lie in ``folder``, ``wanted`` where there are several.

    Raises DataError for unusable ones, UserError.
    """
    check_set(wanted, SETS)
    found: dict[str, tuple[_Layout, Path]] = {}
    for layout in _LAYOUTS:
        path = layout.find(folder)
        if path is not None and wanted in (None, layout.name):
            found.setdefault(layout.name, (layout, path))
    if one := only_set(found, f"{folder} holds several sets"):
        layout, path = one[1]
        return layout.open(folder, path)
    looked = ", ".join(layout.table for layout in _LAYOUTS if wanted in (None, layout.name))
    if wanted is not None:
        raise DataError(f"data: {folder} does not hold the captions of '{wanted}' (looked for {looked})")
    _check_no_set(folder)
    return None


def _check_no_set(folder: Path) -> None:
    """Raise DataError where the pictures of a set lie there without their captions."""
    if any((folder / name).is_dir() for name in ("val2017", "val2014")) and (folder / "annotations").is_dir():
        raise DataError(
            f"data: {folder} looks like COCO, and has no annotations/captions_val2017.json and no dataset_coco.json"
        )
    if any((folder / name).is_dir() for name in _FLICKR[:2]):
        tables = ", ".join(layout.table for layout in _LAYOUTS if layout.name == "flickr30k")
        raise DataError(f"data: {folder} holds Flickr30k's pictures, and none of {tables}")
