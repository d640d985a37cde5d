"""Shards divided into training and held-out ones by a hash of each sample's picture or key; lists of shards merged."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cosmos_ssl.data.dataset import Shards
from cosmos_ssl.data.manifest import load_manifest, stat_all
from cosmos_ssl.data.scan import IMAGE_EXTENSIONS, LIST_EXTENSION, expand, grouped, header_reader
from cosmos_ssl.data.storage import BlockCache, Reader, Stat, cache_root, is_local, local_path
from cosmos_ssl.data.tar import TarFault, members, sample_key
from cosmos_ssl.errors import BadSample, DataError, UserError
from cosmos_ssl.files import written_whole
from cosmos_ssl.functional.pulse import OnStage
from cosmos_ssl.pictures import FILE_BYTES
from cosmos_ssl.shards.prepare.joining import spans
from cosmos_ssl.shards.prepare.output import Output, in_processes
from cosmos_ssl.shards.prepare.pipeline import schema_beside
from cosmos_ssl.shards.prepare.writing import TAR_END

_SAMPLE = np.dtype([("offset", "<i8"), ("length", "<i8"), ("held_out", "?")])
_LOOK_SAMPLES = 16


def is_held_out(what: bytes, share: float) -> bool:
    """Whether a sample of this picture (or key) belongs to the held-out ``share``.

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
    lines = "\n".join(f"{url} {found.size} {found.stamp}" for url, found in zip(urls, stats, strict=True))
    identity = {
        "shards": [len(urls), urls[0], hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()[:16]],
        "share": options.share,
        "samples_per_shard": options.samples_per_shard,
        **({"by": options.by} if options.by != "key" else {}),  # which is all that there once was
    }
    output = Output(options.output.absolute())
    with output.claimed(identity, resume=resume):
        if (report := output.report) is not None:
            return dict(report["counts"])
        todo = [i for i in range(len(urls)) if not _index(output.work, i).is_file()]
        progress("shards indexed", len(urls) - len(todo), len(urls))
        jobs = [(urls[i], stats[i], options.share, options.by, _index(output.work, i)) for i in todo]
        for done, _ in enumerate(in_processes(options.workers, _index_shard, jobs), len(urls) - len(todo) + 1):
            progress("shards indexed", done, len(urls))
        counts, sizes = _write_split(output, urls, stats, options, progress)
        output.finish(sizes, {"identity": identity, "caption_schema": schema_beside(urls[0]), "counts": counts})
    return counts


def _index(work: Path, number: int) -> Path:
    return work / f"split-{number:05d}.npy"


def _index_shard(url: str, found: Stat, share: float, by: str, path: Path) -> None:
    """Where the samples of a shard lie, and which are held out."""
    rows: list[tuple[int, int, bool]] = []
    read = header_reader(url, found.size)
    try:
        for group in grouped(members(read, found.size)):
            picture = next((member for member in group if sample_key(member.name)[1] in IMAGE_EXTENSIONS), None)
            if picture is not None:
                key = sample_key(picture.name)[0].encode("utf-8", "surrogateescape")
                what = key if by == "key" else read(picture.data, min(picture.size, FILE_BYTES))
                rows.append((group[0].start, group[-1].end - group[0].start, is_held_out(what, share)))
    except TarFault as error:
        raise DataError(
            f"data: {url} is cut short or damaged: {error}. 'cosmos-ssl data check --fix' keeps what is whole"
        ) from error
    with written_whole(path) as file:
        np.save(file, np.array(rows, _SAMPLE))


def _write_split(
    output: Output, urls: Sequence[str], stats: Sequence[Stat], options: SplitOptions, progress: OnStage
) -> tuple[dict[str, int], dict[str, int]]:
    held = [int(np.load(_index(output.work, i))["held_out"].sum()) for i in range(len(urls))]
    total = [len(np.load(_index(output.work, i))) for i in range(len(urls))]
    if sum(held) in (0, sum(total)):
        raise DataError(f"--share: {options.share} of {sum(total):,} samples leaves one side empty. Give another share")
    plan: list[tuple[str, list[tuple[int, int, int]], bool, int]] = []
    kept = [n for n in range(len(urls)) if total[n] > held[n]]
    for number, shard in enumerate(kept):
        count = total[shard] - held[shard]
        plan.append((f"train-{number:0{_digits(len(kept))}d}.tar", [(shard, 0, count)], False, count))
    n_val = -(-sum(held) // options.samples_per_shard)
    for number in range(n_val):
        start = number * options.samples_per_shard
        stop = min(start + options.samples_per_shard, sum(held))
        plan.append((f"val-{number:0{_digits(n_val)}d}.tar", list(spans(held, start, stop)), True, stop - start))
    jobs = [
        (output.folder / name, [(urls[s], stats[s], _index(output.work, s), a, b) for s, a, b in parts], side)
        for name, parts, side, _ in plan
        if not (output.folder / name).is_file()
    ]
    progress("shards written", len(plan) - len(jobs), len(plan))
    for done, _ in enumerate(in_processes(options.workers, _write_part, jobs), len(plan) - len(jobs) + 1):
        progress("shards written", done, len(plan))
    counts = {
        "train_samples": sum(total) - sum(held),
        "train_shards": len(kept),
        "validation_samples": sum(held),
        "validation_shards": n_val,
    }
    return counts, {name: count for name, _, _, count in plan}


def _digits(count: int) -> int:
    return max(4, len(str(count - 1)))


def _write_part(path: Path, parts: Sequence[tuple[str, Stat, Path, int, int]], held_out: bool) -> None:
    """Write one shard: of each part, the samples of one side, from the first to before the last."""
    with written_whole(path) as file:
        for url, found, index, first, last in parts:
            rows = np.load(index)
            file.writelines(sample_bytes(url, found, rows[rows["held_out"] == held_out][first:last]))
        file.write(TAR_END)


def sample_bytes(url: str, found: Stat, rows: NDArray[Any]) -> Iterable[bytes]:
    """The headers and members of the samples at ``offset`` and ``length`` of each row. Raises OSError."""
    reader = Reader(BlockCache(cache_root() / "blocks", 32 << 30))
    for row in rows:
        yield reader.read(url, found, int(row["offset"]), int(row["length"]))


@dataclass(frozen=True, slots=True)
class Merged:
    """What a list holds: shards and samples, as listed and as they are; for each set, the fields in which captions were
    found.
    """

    shards: int
    samples: int
    distinct_shards: int
    distinct_samples: int
    fields: Sequence[Sequence[str]]

    @property
    def common_schema(self) -> str | None:
        """The caption schema that reads the captions of all sets, None where each has the same fields."""
        if len({frozenset(own) for own in self.fields}) == 1:
            return None
        together = list(dict.fromkeys(name for own in self.fields for name in own))
        return "all" if "txt" in together else f"json:{','.join(together)}"


def merge_shards(groups: Sequence[Sequence[str]], repeats: Sequence[int], path: Path) -> Merged:
    """Write a list file of all shards of the groups, each as often as its number says, and their manifest.

    Shards are named relative to the list where they lie below its folder. Raises UserError, DataError, OSError.
    """
    if path.suffix != LIST_EXTENSION:
        raise UserError(f"--output {path}: lists of shards end in {LIST_EXTENSION}")
    if path.exists():
        raise UserError(f"--output {path} exists. Give another name, or delete it")
    if len(repeats) != len(groups) or min(repeats) < 1:
        raise UserError(f"--repeat: give one whole number from 1 on for each of the {len(groups)} sets of shards")
    names = [expand(group) for group in groups]
    single = [name for group in names for name in group]
    if len(set(single)) < len(single):
        raise DataError(
            f"data: {next(n for i, n in enumerate(single) if n in single[:i])} is named twice. Repeat a set by --repeat"
        )
    sets = [Shards(group, manifest=load_manifest(group)) for group in names]  # a mistake in one set shows as its own
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        for group, times, given in zip(names, repeats, groups, strict=True):
            file.write(
                f"# {' '.join(given)}: {len(group):,} shards, {times} times\n".encode("utf-8", "surrogateescape")
            )
            lines = "".join(f"{_beside(name, path)}\n" for name in group)
            file.writelines([lines.encode("utf-8", "surrogateescape")] * times)
    manifest = load_manifest([str(path)])
    fields = [_fields(found) for found in sets]
    return Merged(len(manifest.shards), len(manifest), len(single), sum(map(len, sets)), fields)


def _fields(shards: Shards) -> list[str]:
    """The fields in which some evenly spread samples have captions."""
    found: dict[str, None] = {}
    for number in range(min(len(shards), _LOOK_SAMPLES)):
        try:
            found |= dict.fromkeys(shards.read(number * len(shards) // min(len(shards), _LOOK_SAMPLES)).captions)
        except BadSample:  # a fault of its own
            continue
    return list(found)


def _beside(url: str, path: Path) -> str:
    if not is_local(url):
        return url
    return str(local_path(url).absolute()).removeprefix(f"{path.absolute().parent}/")
