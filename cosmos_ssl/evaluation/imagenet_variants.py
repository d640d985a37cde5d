"""ImageNet's other test sets: V2 (arXiv 1902.10811), A (1907.07174), R (2006.16241), Sketch (1905.13549); ObjectNet.

Which classes a set has is what it brings: its folders are called by numbers (V2), by WordNet numbers (A, R, Sketch), or
as its own tables say (ObjectNet). Pictures are classified among the set's classes alone, as published figures are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cosmos_ssl.api import DataError
from cosmos_ssl.data import Folder
from cosmos_ssl.evaluation.classification import load_class_names
from cosmos_ssl.evaluation.naming import wordnet
from cosmos_ssl.evaluation.picture_files import PictureFile, PictureFiles
from cosmos_ssl.evaluation.samples import Samples
from cosmos_ssl.evaluation.text_files import read_json

_SIZES = {"imagenet_v2": 1000, "imagenet_a": 200, "imagenet_r": 200, "imagenet_sketch": 1000}
"""Classes of each."""
VARIANT_FOLDERS: Mapping[str, Sequence[str]] = {
    "imagenet_v2": ("imagenetv2-matched-frequency-format-val", "ImageNetV2-matched-frequency"),
    "imagenet_a": ("imagenet-a",),
    "imagenet_r": ("imagenet-r",),
    "imagenet_sketch": ("sketch", "imagenet-sketch"),
    "objectnet": ("objectnet-1.0",),
}
"""As the archives unpack, or readers call them."""
VARIANTS = tuple(VARIANT_FOLDERS)


class Variant(NamedTuple):
    """A set that was read."""

    samples: Samples
    folders: Sequence[str]
    """Those of the classes, in the order of the labels."""
    class_names: Sequence[str]


def variants_in(folder: Path) -> dict[str, Path]:
    """The sets that lie in ``folder``, or that it is, each with its folder."""
    at = folder.resolve().name
    places = {
        name: [folder / below for below in known] + ([folder] if at in known else [])
        for name, known in VARIANT_FOLDERS.items()
    }
    return {name: next(p for p in own if p.is_dir()) for name, own in places.items() if any(p.is_dir() for p in own)}


def read_variant(name: str, place: Path) -> Variant:
    """The set ``name`` of the folder ``place``. Raises DataError where it has not all its classes."""
    if name == "objectnet":
        return _objectnet(place)
    from timm.data import ImageNetInfo

    wnids, names = ImageNetInfo("imagenet-1k").label_names(), load_class_names("imagenet")
    of_folder = dict(zip(map(str, range(len(names))) if name == "imagenet_v2" else wnids, names, strict=True))
    there = {path.name for path in place.iterdir() if path.is_dir()}
    strange = sorted(one for one in there if (wordnet([one]) or one.isdecimal()) and one not in of_folder)
    folders = [one for one in of_folder if one in there]
    if strange or len(folders) != _SIZES[name]:
        told = f"the folder {strange[0]} is none of them" if strange else f"{len(folders)} are there"
        raise DataError(f"data: {place} does not hold the {_SIZES[name]} class folders of {name}: {told}")
    samples = Folder(place, captions=False, classes=folders)
    return Variant(samples, folders, [of_folder[one] for one in folders])


def _objectnet(place: Path) -> Variant:
    """Those of ObjectNet's classes that ImageNet has too, under ObjectNet's names."""
    tables = place / "mappings"
    labels = read_json(tables / "folder_to_objectnet_label.json")
    shared = read_json(tables / "objectnet_to_imagenet_1k.json")
    if not isinstance(labels, dict) or not isinstance(shared, dict):
        raise DataError(f"data: {tables} does not hold ObjectNet's tables of folders and classes")
    folders = sorted(folder for folder, label in labels.items() if label in shared)
    if gone := [folder for folder in folders if not (place / "images" / folder).is_dir()]:
        raise DataError(f"data: {place / 'images'} lacks {len(gone)} class folders of objectnet, such as {gone[0]}")
    files = [
        PictureFile(f"{folder}/{path.name}", path, label=number)
        for number, folder in enumerate(folders)
        for path in sorted((place / "images" / folder).glob("*.png"))
    ]
    names = [str(labels[folder]).lower() for folder in folders]
    return Variant(PictureFiles(name="objectnet", files=files), folders, names)
