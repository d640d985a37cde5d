"""Labelled pictures with the names of their classes: ImageNet and its variants, ten known sets, folders with one folder
a class, shards.

The ten sets are read by torchvision's readers (Caltech101 by clip-benchmark's), with clip-benchmark's templates and,
where the readers have none fit to be read, its class names.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from cosmos_ssl.api import DataError, Sample, UserError
from cosmos_ssl.data import Folder
from cosmos_ssl.data.folder import picture_folder, splits_of
from cosmos_ssl.evaluation.classification import load_class_names
from cosmos_ssl.evaluation.imagenet_variants import VARIANT_FOLDERS, VARIANTS, read_variant, variants_in
from cosmos_ssl.evaluation.naming import in_order_of_folders, spoken, wordnet
from cosmos_ssl.evaluation.picture_files import PictureFile, PictureFiles
from cosmos_ssl.evaluation.samples import CLASS_FILES, EvaluationData, Samples, check_set, only_set

IMAGENET = "imagenet"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassData:
    """Labelled pictures; the label of a sample is its ``cls``, a number or a name."""

    samples: Samples
    set_name: str = ""
    """``imagenet``, ``food101``, ...; empty where the set is none that is known."""
    classes: int | None = None
    """Number of classes that the labels count, where it is known and they are no folders."""
    folders: Sequence[str] | None = None
    """The class folders in the order of the labels, where classes are folders."""
    class_names: Sequence[str] | None = None
    """Those that are known of the set, or of the folders."""
    class_file: Path | None = None
    """The file of names that lies beside the samples."""
    templates: str | Sequence[str] | None = None
    train: Callable[[], Samples] | None = None
    """The training split, where it is known to belong to these."""

    def names(self, given: str | Sequence[str] | None = None) -> list[str]:
        """The name of each class in the order of the labels: as ``given`` (see ``load_class_names``), else those that
        come with the data.

        Raises ValueError, and DataError where there are none, or where they do not fit the classes.
        """
        source = "--class-names" if given is not None else str(self.class_file)
        given = given if given is not None or self.class_file is None else str(self.class_file)
        if given is None and self.class_names is None:
            why = f"none of {', '.join(CLASS_FILES)} comes with the data"
            if wordnet(self.folders or ()):
                why = f"class folders are called by WordNet numbers that are not all ImageNet's, and {why}"
            raise DataError(f"--class-names: give a file with one a line, since {why}")
        if given is None:
            return list(self.class_names or ())
        names = load_class_names(given)
        if self.folders is not None:
            return in_order_of_folders(names, self.folders, source)
        if self.classes not in (None, len(names)):
            raise DataError(f"{source}: {len(names)} class names are given for {self.classes} classes")
        return names


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """One of the ten sets: the reader's class, where its files lie below the root, and its splits."""

    reader: str
    marker: str
    test: Mapping[str, Any]
    train: Mapping[str, Any] | None
    module: str = "torchvision.datasets"


def _split(reader: str, marker: str, train: str = "train") -> _Known:
    return _Known(reader=reader, marker=marker, test={"split": "test"}, train={"split": train})


KNOWN = {
    "food101": _split("Food101", "food-101/meta"),
    "cifar10": _Known(reader="CIFAR10", marker="cifar-10-batches-py", test={"train": False}, train={"train": True}),
    "cifar100": _Known(reader="CIFAR100", marker="cifar-100-python", test={"train": False}, train={"train": True}),
    "sun397": _Known(reader="SUN397", marker="SUN397/ClassName.txt", test={}, train=None),
    "cars": _split("StanfordCars", "stanford_cars/devkit"),
    "fgvc_aircraft": _split("FGVCAircraft", "fgvc-aircraft-2013b/data", "trainval"),
    "dtd": _split("DTD", "dtd/dtd/labels"),
    "pets": _split("OxfordIIITPet", "oxford-iiit-pet/annotations", "trainval"),
    "flowers": _split("Flowers102", "flowers-102/jpg"),
    "caltech101": _Known(
        reader="Caltech101",
        marker="caltech101/101_ObjectCategories",
        test={},
        train=None,
        module="clip_benchmark.datasets.caltech101",
    ),
}
"""The ten sets.

SUN397 and Caltech101 (with its background class) have no split in these readers: all pictures are evaluated on.
"""


class HeldPictures:
    """Pictures that a reader of torchvision's holds itself (CIFAR's), as samples."""

    def __init__(self, name: str, data: Any) -> None:
        self.name = name
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def read(self, index: int) -> Sample:
        """Picture ``index`` and its ``cls``."""
        picture, label = self.data[index]
        picture.save(file := io.BytesIO(), "png")
        return Sample(key=f"{self.name}/{index}", image=file.getvalue(), extras={"cls": int(label)})

    def identity(self) -> Mapping[str, Any]:
        """Name, size, and a digest of the pictures."""
        digest = hashlib.sha256(self.data.data.tobytes()).hexdigest()
        return {"name": self.name, "samples": len(self), "digest": digest}


def as_samples(name: str, data: Any) -> Samples:
    """A data set of torchvision's form as samples.

    Where it names its files they are opened here, by the rules for all pictures; those of a list without order are
    sorted.
    """
    named = _named(data)
    if named is None:
        return HeldPictures(name, data)
    named = sorted(named, key=lambda one: str(one[0])) if hasattr(data, "_image_files") else named
    files = [PictureFile(f"{name}/{n}", path, label=int(label)) for n, (path, label) in enumerate(named)]
    return PictureFiles(name=name, files=files)


def _named(data: Any) -> list[tuple[Path, int]] | None:
    """File and label of each picture, as these readers keep them; None for those that hold pixels (CIFAR)."""
    if hasattr(data, "categories"):  # Caltech101
        folder = Path(data.root) / "101_ObjectCategories"
        return [
            (folder / data.categories[y] / f"image_{n:04d}.jpg", y) for n, y in zip(data.index, data.y, strict=True)
        ]
    if hasattr(data, "_samples"):  # StanfordCars
        return [(Path(file), label) for file, label in data._samples]
    files = getattr(data, "_image_files", getattr(data, "_images", None))
    return None if files is None else list(zip(map(Path, files), data._labels, strict=True))


def class_sets_in(folder: Path) -> list[str]:
    """The known sets that lie in ``folder``."""
    found = [name for name, known in KNOWN.items() if (folder / known.marker).exists()]
    found += variants_in(folder)
    imagenet = _imagenet(folder) if folder not in variants_in(folder).values() else None
    return found if imagenet is None or not imagenet.set_name else [*found, imagenet.set_name]


def find_class_data(data: str, *, wanted: str | None = None) -> ClassData:
    """Return what ``data`` holds; ``wanted`` names one of the known sets where several lie there.

    Raises DataError, UserError.
    """
    check_set(wanted, (*KNOWN, IMAGENET, *VARIANTS))
    folder = picture_folder(data)
    if folder is not None:
        found = _known_below(folder, wanted)
        if found is not None:
            return _read_known(*found)
        variants = {name: place for name, place in variants_in(folder).items() if wanted in (None, name)}
        if (variant := only_set(variants, f"{folder} holds several sets")) is not None:
            samples, folders, names = read_variant(*variant)
            return ClassData(
                samples=samples, set_name=variant[0], folders=folders, class_names=names, templates="openai"
            )
        if wanted in (None, IMAGENET) and (imagenet := _imagenet(folder)) is not None:
            return imagenet
    if wanted is not None:
        places = {IMAGENET: "val/n01440764", **{name: known.marker for name, known in KNOWN.items()}}
        where = (places.get(wanted) or VARIANT_FOLDERS[wanted][0]) + "/"
        raise DataError(f"data: {data} does not hold the set '{wanted}': there is no {where} in it")
    return _plain(data, folder)


def _plain(data: str, folder: Path | None) -> ClassData:
    """Shards, or a folder with one folder a class: its ``val`` (or ``test``) where it has that and ``train``."""
    own = EvaluationData(data)
    own.check()
    splits = splits_of(folder) if folder is not None else None
    return ClassData(
        samples=own.samples,
        folders=own.class_names or None,
        class_names=None if wordnet(own.class_names) else list(map(spoken, own.class_names)) or None,
        class_file=own.class_file,
        train=partial(Folder, splits[0], captions=False) if splits is not None else None,
    )


def _known_below(folder: Path, wanted: str | None) -> tuple[str, Path] | None:
    """The known set that lies in ``folder``, or that ``folder`` is, and its root. Raises DataError where several do."""
    found = {}
    for name, known in KNOWN.items():
        top, _, _ = known.marker.partition("/")
        roots = [folder, folder.resolve().parent] if folder.resolve().name == top else [folder]
        root = next((root for root in roots if (root / known.marker).exists()), None)
        if root is not None and wanted in (None, name):
            found[name] = root
    return only_set(found, f"{folder} holds several sets")


def _read_known(name: str, root: Path) -> ClassData:
    known, folder = KNOWN[name], _clip_benchmark()
    train = known.train
    templates = json.loads((folder / "en_zeroshot_classification_templates.json").read_text(encoding="utf-8"))[name]
    names = json.loads((folder / "en_classnames.json").read_text(encoding="utf-8")).get(name)
    data = _open(name, root, known.test)
    if names is None:
        names = [re.sub(r"[_/]", " ", each) for each in data.classes]
    return ClassData(
        samples=as_samples(name, data),
        set_name=name,
        classes=len(getattr(data, "classes", names)),
        class_names=names,
        templates=[template.replace("{c}", "{}") for template in templates],
        train=None if train is None else lambda: as_samples(name, _open(name, root, train)),
    )


def _open(name: str, root: Path, split: Mapping[str, Any]) -> Any:
    from importlib import import_module

    known = KNOWN[name]
    reader = getattr(import_module(known.module), known.reader)
    try:
        data = reader(str(root), download=False, **split)
        if not len(data):
            raise DataError(f"data: {name} in {root} holds no picture")
        return data
    except DataError:
        raise
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise DataError(f"data: {name} in {root} cannot be read: {str(error).splitlines()[0]}") from error


def _clip_benchmark() -> Any:
    """The folder of clip-benchmark's class names and templates."""
    try:
        return resources.files("clip_benchmark.datasets")
    except ImportError as error:
        raise UserError(
            "class names and templates of this set are clip-benchmark's. Run: pip install 'cosmos-ssl[eval]'"
        ) from error


def _imagenet(folder: Path) -> ClassData | None:
    """ImageNet where ``folder``, or its ``val``, holds one folder a WordNet number of its 1,000."""
    place = folder / "val" if (folder / "val").is_dir() else folder
    there = sorted(path.name for path in place.iterdir() if wordnet([path.name]))
    if not there:
        return None
    from timm.data import ImageNetInfo

    wnids = ImageNetInfo("imagenet-1k").label_names()
    if not set(there) <= set(wnids):
        return None
    train = place.parent / "train"
    return ClassData(
        samples=Folder(place, captions=False, classes=wnids),
        set_name=IMAGENET if len(there) == len(wnids) else "",
        folders=wnids,
        class_names=load_class_names("imagenet"),
        templates="openai",
        train=partial(Folder, train, captions=False, classes=wnids) if train.is_dir() else None,
    )
