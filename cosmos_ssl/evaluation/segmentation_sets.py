"""Pictures with a class for every pixel: eight known sets in their folders, and shards with masks.

The names of classes are in ``class_names/``: a line a class, its names separated by commas. The names are ours, the
words that stand for the background above all; another file in this form (such as SCLIP's) can be given in their place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosmos_ssl.api import BadSample, DataError, FileBacked, Sample
from cosmos_ssl.data import open_shards
from cosmos_ssl.data.folder import picture_folder
from cosmos_ssl.evaluation.picture_files import MASK, PictureFile, PictureFiles
from cosmos_ssl.evaluation.samples import CLASS_FILES, EvaluationData, Samples, check_set, only_set
from cosmos_ssl.evaluation.segmentation import IGNORED, SegmentationProtocol
from cosmos_ssl.evaluation.text_files import read_text
from cosmos_ssl.pictures import open_picture

Table = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentationData:
    """Samples with a mask, what the values of masks mean, and how they are segmented."""

    samples: Samples
    table: Table
    """Value of a mask -> class, or 255 where a pixel does not count: uint8 [256]."""
    names: Sequence[Sequence[str]]
    """The names of each class."""
    protocol: SegmentationProtocol | None
    """None: one window of the model's own size."""
    set_name: str = ""

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> Sample:
        """Sample ``index`` with ``labels``, the class of each pixel int64 [H, W].

        Raises BadSample, also for its mask.
        """
        sample = self.samples.read(index)
        return replace(sample, extras={"labels": self._labels(sample)})

    def identity(self) -> Mapping[str, Any]:
        """That of the samples, and what their masks mean."""
        return {**self.samples.identity(), "table": self.table.tolist()}

    def sources(self, index: int) -> Sequence[str]:
        """The files of sample ``index``."""
        return self.samples.sources(index) if isinstance(self.samples, FileBacked) else ()

    def _labels(self, sample: Sample) -> Tensor:
        if MASK not in sample.extras:
            raise BadSample("no mask", sample.key)
        try:
            values = np.array(open_picture(sample.extras[MASK]))
        except BadSample as error:
            raise BadSample("unreadable mask", f"{sample.key}: {error}") from error
        if values.ndim != 2 or values.dtype != np.uint8:
            raise BadSample(
                "unreadable mask", f"{sample.key}: {values.dtype}, {values.ndim} dimensions; one byte a pixel is due"
            )
        labels = torch.from_numpy(self.table[values]).long()
        most = int(labels.where(labels != IGNORED, 0).max())
        if most >= len(self.names):
            raise DataError(
                f"--class-names: {sample.key} has pixels of class {most + 1}, and {len(self.names)} classes are named"
            )
        return labels


# ---------------------------------------------------------------------------- what the values of masks mean

_NOT_COCO = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)  # numbers of COCO's 182 that no picture has
_CITYSCAPES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


def _meaning(pairs: Mapping[int, int] | Sequence[int], other: int = IGNORED) -> Table:
    """A table with these classes (of a sequence: value -> its place), ``other`` for all else, and 255 for itself."""
    table = np.full(256, other, np.uint8)
    for value, number in pairs.items() if isinstance(pairs, Mapping) else ((v, n) for n, v in enumerate(pairs)):
        table[value] = number
    return table


_COCO = [value for value in range(182) if value not in _NOT_COCO]
_OBJECTS = _meaning({value: number + 1 for number, value in enumerate(_COCO[:80])}, other=0)
_PLAIN = _meaning(range(255))
_FROM_ONE = _meaning(range(1, 255))  # 0 is no class

# ---------------------------------------------------------------------------- where the files are


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Folders of pictures and of masks, how their files end, and what masks hold there."""

    pictures: str
    masks: str
    ends: tuple[str, str] = (".jpg", ".png")
    split: str | None = None
    """A list of the pictures, without endings; None is all that are there."""
    table: Table

    def find(self, root: Path) -> list[PictureFile] | None:
        """Pictures and masks in order, where the masks of this layout are below ``root``."""
        picture_end, mask_end = self.ends
        pictures, masks = root / self.pictures, root / self.masks
        if not masks.is_dir() or next(masks.rglob(f"*{mask_end}"), None) is None:
            return None
        if self.split is None:
            names = [
                path.relative_to(pictures).as_posix().removesuffix(picture_end)
                for path in pictures.rglob(f"*{picture_end}")
            ]
        else:
            names = [line.split()[0] for line in read_text(root / self.split).splitlines() if line.strip()]
        paths = ((pictures / f"{name}{picture_end}", masks / f"{name}{mask_end}") for name in sorted(names))
        return [PictureFile(picture.name, picture, mask=mask) for picture, mask in paths]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """A known set: in which folders and how it may lie, how it is segmented, the names of its classes."""

    below: Sequence[str]
    layouts: Sequence[_Layout]
    protocol: SegmentationProtocol
    names: str
    """A file of ``class_names/``."""
    count: int | None = None
    """So many of the file's classes; None is all."""
    background: str | None = None
    """Class 0: ``words`` are those of the file ``background``, else this one word."""


def _voc(table: Table, kind: str = "") -> Sequence[_Layout]:
    split = f"ImageSets/Segmentation{kind}/val.txt"
    return [_Layout(pictures="JPEGImages", masks=f"SegmentationClass{kind}", split=split, table=table)]


def _coco(converted: str, raw: Table) -> Sequence[_Layout]:
    """MMSegmentation's folders with masks as it converts them, or as they were released, there or beside pictures."""
    pictures, masks = "images/val2017", "annotations/val2017"
    return [
        _Layout(pictures=pictures, masks=masks, ends=(".jpg", converted), table=_PLAIN),
        _Layout(pictures=pictures, masks=masks, table=raw),
        *(
            _Layout(pictures="val2017", masks=f"{folder}/val2017", table=raw)
            for folder in ("stuffthingmaps", "stuffthingmaps_trainval2017")
        ),
    ]


def _cityscapes(mask_end: str, table: Table) -> _Layout:
    # a mask is called as its picture but for the ending
    return _Layout(
        pictures="leftImg8bit/val",
        masks="gtFine/val",
        ends=("_leftImg8bit.png", f"_gtFine_{mask_end}.png"),
        table=table,
    )


_VOC2012 = ("", "VOC2012", "VOCdevkit/VOC2012")
_VOC2010 = ("", "VOC2010", "VOCdevkit/VOC2010")
_COCO_BELOW = ("", "coco_stuff164k", "coco_object")
KNOWN: Mapping[str, _Known] = {
    "voc20": _Known(below=_VOC2012, layouts=_voc(_FROM_ONE), protocol=SegmentationProtocol(), names="voc"),
    "voc21": _Known(
        below=_VOC2012,
        layouts=_voc(_PLAIN),
        protocol=SegmentationProtocol(scale=65, prob_thd=0.1, area_thd=0.1),
        names="voc",
        background="words",
    ),
    "context59": _Known(
        below=_VOC2010, layouts=_voc(_FROM_ONE, "Context"), protocol=SegmentationProtocol(), names="context"
    ),
    "context60": _Known(
        below=_VOC2010,
        layouts=_voc(_PLAIN, "Context"),
        protocol=SegmentationProtocol(scale=50, prob_thd=0.1),
        names="context",
        background="background",
    ),
    "coco_object": _Known(
        below=_COCO_BELOW,
        layouts=_coco("_instanceTrainIds.png", _OBJECTS),
        protocol=SegmentationProtocol(scale=50, prob_thd=0.1),
        names="coco",
        count=80,
        background="words",
    ),
    "coco_stuff": _Known(
        below=_COCO_BELOW,
        layouts=_coco("_labelTrainIds.png", _meaning(_COCO)),
        protocol=SegmentationProtocol(short_side=448),
        names="coco",
    ),
    "cityscapes": _Known(
        below=("", "cityscapes"),
        layouts=[_cityscapes("labelTrainIds", _PLAIN), _cityscapes("labelIds", _meaning(_CITYSCAPES))],
        protocol=SegmentationProtocol(short_side=560),
        names="cityscapes",
    ),
    "ade20k": _Known(
        below=("", "ADEChallengeData2016"),
        layouts=[_Layout(pictures="images/validation", masks="annotations/validation", table=_FROM_ONE)],
        protocol=SegmentationProtocol(),
        names="ade20k",
    ),
}
"""The eight sets. Where the background is no class, its pixels do not count."""


def segmentation_sets_in(folder: Path) -> list[str]:
    """The known sets that are read from ``folder``."""
    return [name for name, known in KNOWN.items() if _place(folder, known)]


def find_segmentation_data(data: str, *, wanted: str | None = None, names: str | None = None) -> SegmentationData:
    """Return what ``data`` holds: the known set ``wanted`` (asked for where several are read from it), or shards with
    ``mask.png``.

    ``names`` is a file to take the names of classes from. In shards a mask holds class + 1, and 0 where there is none.
    Raises DataError, UserError.
    """
    check_set(wanted, tuple(KNOWN))
    folder = picture_folder(data)
    if folder is None and wanted is None:
        return _shards(data, names)
    names_asked = KNOWN if wanted is None else (wanted,)
    places = {name: folder and _place(folder, KNOWN[name]) for name in names_asked}
    one = only_set({name: place for name, place in places.items() if place}, f"several sets are read from {data}")
    if one is None:
        layouts = [] if wanted is None else KNOWN[wanted].layouts
        where = ", ".join(f"{layout.pictures} and {layout.masks}" for layout in layouts)
        raise DataError(
            f"data: {data} holds no set that is known{f' as {wanted} (looked for {where})' if where else ''}"
        )
    name, (files, table) = one
    known = KNOWN[name]
    classes = _class_names(known)
    if names is not None and len(own := read_class_names(Path(names).expanduser())) != len(classes):
        raise DataError(f"--class-names: {names} holds {len(own)} classes, {name} has {len(classes)}")
    return SegmentationData(
        samples=PictureFiles(name=name, files=files),
        table=table,
        names=classes if names is None else own,
        protocol=known.protocol,
        set_name=name,
    )


def _place(folder: Path, known: _Known) -> tuple[list[PictureFile], Table] | None:
    """Files, and the meaning of masks, of the first layout that is there."""
    for below in known.below:
        for layout in known.layouts:
            if files := layout.find(folder / below):
                return files, layout.table
    return None


def _class_names(known: _Known) -> list[list[str]]:
    folder = resources.files("cosmos_ssl.evaluation") / "class_names"
    names = read_class_names(folder / f"{known.names}.txt")[: known.count]
    if known.background is None:
        return names
    return [
        read_class_names(folder / "background.txt")[0] if known.background == "words" else [known.background],
        *names,
    ]


def read_class_names(path: Any) -> list[list[str]]:
    """A line a class, its names separated by commas.

    Raises DataError where the file cannot be read or has an empty line.
    """
    lines = read_text(path, "--class-names").rstrip().splitlines()
    names = [[name.strip() for name in line.split(",") if name.strip()] for line in lines]
    if not all(names) or not names:
        raise DataError(f"--class-names: line {names.index([]) + 1 if names else 1} of {path} names no class")
    return names


def _shards(data: str, names: str | None) -> SegmentationData:
    found = EvaluationData(data)
    found.check()
    path = Path(names).expanduser() if names is not None else found.class_file
    if path is None:
        raise DataError(f"--class-names: give a file, since none of {', '.join(CLASS_FILES)} lies beside {found.name}")
    samples = open_shards(data)
    if MASK not in samples.read(0).extras:
        raise DataError(f"data: sample {samples.read(0).key} has no {MASK}, which tells the class of each pixel")
    return SegmentationData(samples=samples, table=_FROM_ONE, names=read_class_names(path), protocol=None)
