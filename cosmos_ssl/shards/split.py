"""Shards divided into training and held-out ones by a hash of each sample's picture or key."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cosmos_ssl.data.cache import cache_root, digest
from cosmos_ssl.data.manifest import stat_all
from cosmos_ssl.data.scan import IMAGE_EXTENSIONS, expand, grouped, header_reader
from cosmos_ssl.data.storage import BlockCache, Reader, Stat
from cosmos_ssl.data.tar import TarFault, members, sample_key
from cosmos_ssl.errors import DataError, UserError
from cosmos_ssl.files import written_whole
from cosmos_ssl.liveness import OnStage
from cosmos_ssl.pictures import FILE_BYTES
from cosmos_ssl.shards.output import TAR_END, Output, in_processes, numbers, schema_beside, spans

_SAMPLE = np.dtype([("offset", "<i8"), ("length", "<i8"), ("held_out", "?")])


def is_held_out(what: bytes, share: float) -> bool:
    """Return whether a sample of this picture (or key) belongs to the held-out ``share``.

    A pure function, so that equal pictures stay together, and that no repetition of a split differs.
    """
    number = int.from_bytes(hashlib.blake2b(what, digest_size=8).digest(), "big")
    return number < share * 2**64


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitOptions:
    """Raises UserError for values that make no sense."""

    urls: Sequence[str]
    output: Path
    share: float = 0.01
    by: Literal["content", "key"] = "content"
    """What decides on a sample's side: the bytes of its picture, or its key."""
    samples_per_shard: int = 5000
    workers: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UserError(f"--share: {self.share} is no share between 0 and 1, such as 0.01")
        for option in ("samples_per_shard", "workers"):
            if getattr(self, option) < 1:
                raise UserError(f"--{option.replace('_', '-')}: {getattr(self, option)} is not positive")


def split_shards(options: SplitOptions, progress: OnStage, *, resume: bool = False) -> dict[str, int]:
    """Write ``train-0000.tar`` ... (one for each shard, without its held-out samples) and ``val-0000.tar`` ...

    Samples are copied byte for byte. Returns samples and shards by split. Raises UserError, DataError, StorageError.
    """
    urls = expand(options.urls)
    stats = stat_all(urls)
    stamps = digest(f"{url} {found.size} {found.stamp}" for url, found in zip(urls, stats, strict=True))
    identity = {
        "shards": [len(urls), urls[0], stamps],
        "share": options.share,
        "samples_per_shard": options.samples_per_shard,
        **({"by": options.by} if options.by != "key" else {}),  # which is all that there once was
    }
    output = Output(options.output.absolute())
    with output.claimed(identity, resume=resume):
        if (report := output.report) is not None:
            return dict(report["counts"])
        shards = [
            (url, found, output.work / f"split-{number:05d}.npy")
            for number, (url, found) in enumerate(zip(urls, stats, strict=True))
        ]
        todo = [shard for shard in shards if not shard[-1].is_file()]
        _told("shards indexed", options, partial(_index_shard, options), todo, len(shards), progress)
        counts, sizes = _write_split(output, shards, options, progress)
        output.finish(sizes, {"identity": identity, "caption_schema": schema_beside(urls[0]), "counts": counts})
    return counts


_Shard = tuple[str, Stat, Path]
"""URL, size and stamp, and where the places of its samples are kept."""


def _told(
    what: str, options: SplitOptions, work: Callable[..., None], todo: Sequence[Any], total: int, progress: OnStage
) -> None:
    """Do what is left ``todo`` of ``total``."""
    progress(what, total - len(todo), total)
    for done, _ in enumerate(in_processes(options.workers, work, todo), total - len(todo) + 1):
        progress(what, done, total)


def _index_shard(options: SplitOptions, url: str, found: Stat, path: Path) -> None:
    """Where the samples of a shard lie, and which are held out."""
    rows: list[tuple[int, int, bool]] = []
    read = header_reader(url, found.size)
    try:
        for group in grouped(members(read, found.size)):
            picture = next((member for member in group if sample_key(member.name)[1] in IMAGE_EXTENSIONS), None)
            if picture is not None:
                key = sample_key(picture.name)[0].encode("utf-8", "surrogateescape")
                what = key if options.by == "key" else read(picture.data, min(picture.size, FILE_BYTES))
                rows.append((group[0].start, group[-1].end - group[0].start, is_held_out(what, options.share)))
    except TarFault as error:
        raise DataError(
            f"data: {url} is cut short or damaged: {error}. 'cosmos-ssl data check --fix' keeps what is whole"
        ) from error
    with written_whole(path) as file:
        np.save(file, np.array(rows, _SAMPLE))


def _write_split(
    output: Output, shards: Sequence[_Shard], options: SplitOptions, progress: OnStage
) -> tuple[dict[str, int], dict[str, int]]:
    """Write the shards of both sides that are not there yet; what they hold by side, and samples by shard."""
    total, held = list[int](), list[int]()
    for _, _, path in shards:
        side = np.load(path)["held_out"]
        total.append(len(side))
        held.append(int(side.sum()))
    if sum(held) in (0, sum(total)):
        raise DataError(f"--share: {options.share} of {sum(total):,} samples leaves one side empty. Give another share")
    starts = range(0, sum(held), options.samples_per_shard)
    parts_of = {
        "train": [[(n, 0, total[n] - held[n])] for n in range(len(shards)) if total[n] > held[n]],
        "val": [list(spans(held, start, min(start + options.samples_per_shard, sum(held)))) for start in starts],
    }
    plan = {
        f"{side}-{number}.tar": (side == "val", parts)
        for side, all_parts in parts_of.items()
        for number, parts in zip(numbers(len(all_parts)), all_parts, strict=True)
    }
    todo = [
        (output.folder / name, held_out, [(*shards[n], first, last) for n, first, last in parts])
        for name, (held_out, parts) in plan.items()
        if not (output.folder / name).is_file()
    ]
    _told("shards written", options, _write_shard, todo, len(plan), progress)
    counts = {
        "train_samples": sum(total) - sum(held),
        "train_shards": len(parts_of["train"]),
        "validation_samples": sum(held),
        "validation_shards": len(parts_of["val"]),
    }
    return counts, {name: sum(last - first for _, first, last in parts) for name, (_, parts) in plan.items()}


def _write_shard(path: Path, held_out: bool, parts: Sequence[tuple[str, Stat, Path, int, int]]) -> None:
    """Write one shard: of each part, the samples of one side, from the first to before the last."""
    reader = Reader(BlockCache(cache_root() / "blocks", 32 << 30))
    with written_whole(path) as file:
        for url, found, index, first, last in parts:
            rows = np.load(index)
            for row in rows[rows["held_out"] == held_out][first:last]:
                file.write(reader.read(url, found, int(row["offset"]), int(row["length"])))
        file.write(TAR_END)
