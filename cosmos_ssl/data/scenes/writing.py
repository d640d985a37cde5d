"""Scenes as real shards, written once: how many, where they lie, how they are drawn."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cosmos_ssl.data.cache import cache_root, lock
from cosmos_ssl.data.scan import pool
from cosmos_ssl.data.scenes.pictures import CLASS_NAMES, COLOURS, SHAPES, caption, draw, make_scene, sentences
from cosmos_ssl.errors import DataError, UserError
from cosmos_ssl.files import storage_error
from cosmos_ssl.liveness import alive

_VERSION = 2
"""Raised when the same options would give other shards than before."""
_NOTE = "scenes.json"
_SPLITS = ("train", "val")
Split = Literal["train", "val"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneOptions:
    """What the shards hold. Raises UserError for values that make no sense."""

    train_samples: int = 4096
    validation_samples: int = 512
    image_size: int = 64
    colours: int = len(COLOURS)
    """The first so many of the eight are used. The fewer, the more do shapes tell scenes apart."""
    seed: int = 0
    shard_samples: int = 1024

    def __post_init__(self) -> None:
        if not 16 <= self.image_size <= 4096:
            raise UserError(f"scenes: image_size: {self.image_size} is not among 16 to 4096")
        for name in ("train_samples", "validation_samples", "shard_samples"):
            if not 1 <= getattr(self, name) <= 10**9:
                raise UserError(f"scenes: {name}: {getattr(self, name)} is not among 1 to 1,000,000,000")
        if self.seed < 0:
            raise UserError(f"scenes: seed: {self.seed} is below zero")
        if not 2 <= self.colours <= len(COLOURS):
            raise UserError(f"scenes: colours: {self.colours} is not among 2 to {len(COLOURS)}")

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes that scenes have."""
        return CLASS_NAMES[: self.colours * len(SHAPES)]

    def pattern(self, folder: Path, split: Split) -> str:
        """The URL pattern of one split's shards."""
        samples = self.train_samples if split == "train" else self.validation_samples
        return str(folder / f"{split}-{{0000..{(samples - 1) // self.shard_samples:04d}}}.tar")


def default_folder(options: SceneOptions) -> Path:
    """Return where scenes of these options lie in the cache folder."""
    digest = hashlib.sha256(json.dumps([_VERSION, asdict(options)]).encode()).hexdigest()[:12]
    return cache_root() / "scenes" / digest


def write_scenes(folder: Path, options: SceneOptions) -> Path:
    """Write the shards ``train-*.tar`` and ``val-*.tar`` into ``folder``, unless they are there; all or nothing.

    Raises DataError where the folder holds something else, UserError or StorageError where it cannot be written.
    """
    if is_written(folder, options):
        return folder
    part = folder.parent / f".{folder.name}.{os.getpid()}.part"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with lock(folder.parent / f".{folder.name}.lock"):
            if is_written(folder, options):
                return folder
            shutil.rmtree(part, ignore_errors=True)  # of a killed process that had our number
            part.mkdir()
            _write_all(part, options)
            part.replace(folder)
    except OSError as error:
        if is_written(folder, options):  # another process was quicker, where the file system has no locks
            return folder
        raise storage_error(error, f"scenes: {folder} cannot be written") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def is_written(folder: Path, options: SceneOptions) -> bool:
    """Return whether the shards of these options lie in ``folder``. Raises DataError where something else does."""
    note = {"version": _VERSION, **asdict(options)}
    if (folder / _NOTE).exists():
        with suppress(ValueError):  # damaged
            if json.loads((folder / _NOTE).read_text()) == note:
                return True
    elif not folder.is_dir() or not any(folder.iterdir()):
        return False
    raise DataError(f"scenes: {folder} holds something else. Give another folder, or delete it")


def _write_all(folder: Path, options: SceneOptions) -> None:
    tries: dict[Split, Sequence[int]] = {"train": [0] * options.train_samples, "val": _distinct(options)}
    size = options.shard_samples
    jobs = [
        (folder / f"{split}-{shard:04d}.tar", split, first, drawn[first : first + size], options)
        for split, drawn in tries.items()
        for shard, first in enumerate(range(0, len(drawn), size))
    ]
    with pool(len(jobs), processes=len(jobs) > 1) as executor:
        for _ in executor.map(_write_shard, *zip(*jobs, strict=True)):
            alive()
    sizes = {path.name: len(drawn) for path, _, _, drawn, _ in jobs}
    (folder / "sizes.json").write_text(json.dumps(sizes, indent=1))
    (folder / "classes.txt").write_text("\n".join(options.class_names) + "\n")
    (folder / _NOTE).write_text(json.dumps({"version": _VERSION, **asdict(options)}))


def _rng(options: SceneOptions, split: str, index: int, attempt: int) -> np.random.Generator:
    key = np.array([options.seed, _SPLITS.index(split)], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, index, attempt, 0], np.uint64)))


def _distinct(options: SceneOptions) -> list[int]:
    """Return which draw of each validation scene to use, so that no two scenes have one caption."""
    seen: set[str] = set()
    tries, classes = [], len(options.class_names)
    for index in range(options.validation_samples):
        attempt = 0
        while (text := caption(make_scene(_rng(options, "val", index, attempt), classes))) in seen:
            attempt += 1
        seen.add(text)
        tries.append(attempt)
    return tries


def _write_shard(path: Path, split: Split, first: int, tries: Sequence[int], options: SceneOptions) -> None:
    from webdataset import TarWriter

    with path.open("wb") as file, TarWriter(file, mtime=0, encoder=False) as writer:
        for index, attempt in enumerate(tries, first):
            writer.write(_sample(f"{split}-{index:07d}", _rng(options, split, index, attempt), options))
        writer.close()
        file.flush()
        os.fsync(file.fileno())


def _sample(key: str, rng: np.random.Generator, options: SceneOptions) -> dict[str, Any]:
    scene = make_scene(rng, len(options.class_names))
    picture, mask = draw(scene, options.image_size)
    return {
        "__key__": key,
        "png": _png(picture),
        "mask.png": _png(mask),
        "json": json.dumps(sentences(scene, rng)).encode(),
        "txt": caption(scene).encode(),
        "cls": str(scene.things[0].label).encode(),
    }


def _png(pixels: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", compress_level=4)
    return buffer.getvalue()
