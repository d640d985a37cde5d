"""A check of whole shards or of a folder: every sample read and decoded, what is wrong counted by shard or class folder and reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cosmos_ssl.data.captions import schema_fields
from cosmos_ssl.data.dataset import Shards
from cosmos_ssl.data.folder import Folder
from cosmos_ssl.data.manifest import Manifest, Progress, Shard, told_sizes
from cosmos_ssl.data.scan import expand, pool, scan
from cosmos_ssl.data.storage import is_local, shard_name, stat
from cosmos_ssl.errors import BadSample, UserError

_PICTURES = 512
"""Pictures of a folder that one process checks at a time."""


@dataclass(slots=True)
class ShardReport:
    """What was found in one shard or class folder."""

    name: str
    samples: int = 0
    size: int = 0
    """Bytes."""
    faults: dict[str, int] = field(default_factory=dict)
    """How often each reason was met."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first case of each reason."""

    def add(self, reason: str, example: str, count: int = 1) -> None:
        """Count a fault."""
        self.faults[reason] = self.faults.get(reason, 0) + count
        self.examples.setdefault(reason, example)


def check_shards(
    urls: str | Sequence[str], *, captions: str | None = None, max_pixels: int = 1 << 26, progress: Progress | None = None
) -> list[ShardReport]:
    """Decode every sample of every shard, several shards at once; with ``captions`` a schema must find some in each.

    Raises DataError for a list that names no shard, UserError for an unknown schema, OSError where storage fails.
    """
    names = expand(urls)
    if captions is not None:
        schema_fields(captions)
    told = told_sizes(names)
    reports = []
    with pool(len(names), processes=len(names) > 1 and is_local(names[0])) as executor:
        tasks = [executor.submit(_check, name, captions, max_pixels, told.get(name)) for name in names]
        for done, task in enumerate(tasks, 1):
            reports.append(task.result())
            if progress is not None:
                progress(done, len(names))
    return reports


def check_folder(
    root: Path, *, captions: str | None = None, max_pixels: int = 1 << 26, progress: Progress | None = None
) -> list[ShardReport]:
    """Decode every picture below a folder; one report for each of its classes, or one for a folder without.

    Raises DataError as ``load_folder`` does, UserError for captions other than ``txt``, OSError where storage fails.
    """
    if captions not in (None, "txt"):
        raise UserError(f"captions: pictures in folders have theirs in text files beside them: txt, not {captions}")
    folder = Folder(root, captions=captions is not None, max_pixels=max_pixels)
    sizes = folder.index.class_sizes() if folder.class_names else np.array([len(folder)])
    reports = [ShardReport(name) for name in folder.class_names or [root.name]]
    ends = np.cumsum(sizes)
    tasks = []
    with pool(len(folder), processes=len(folder) > _PICTURES) as executor:
        for number, (end, size) in enumerate(zip(ends.tolist(), sizes.tolist(), strict=True)):
            for start in range(end - size, end, _PICTURES):
                tasks.append((number, executor.submit(_check_pictures, folder, range(start, min(start + _PICTURES, end)))))
        for done, (number, task) in enumerate(tasks, 1):
            found = task.result()
            reports[number].samples += found.samples
            reports[number].size += found.size
            for reason, count in found.faults.items():
                reports[number].add(reason, found.examples[reason], count)
            if progress is not None:
                progress(done, len(tasks))
    for report in reports:
        if report.samples == 0:
            report.add("empty", "no pictures")
    return reports


def _check_pictures(folder: Folder, indices: range) -> ShardReport:
    report = ShardReport("", samples=len(indices))
    for index in indices:
        _check_sample(folder, index, folder.captions, report)
    return report


def _check(url: str, captions: str | None, max_pixels: int, told: int | None) -> ShardReport:
    report = ShardReport(shard_name(url))
    try:
        found = stat(url)
    except (FileNotFoundError, NotADirectoryError):
        report.add("missing", url)
        return report
    headers = scan(url, found.size)
    notes, count = headers.notes, len(headers.offsets)
    report.samples, report.size = count, found.size
    if headers.fault:
        report.add("cut short or damaged", headers.fault)
    elif told not in (None, count, notes.keys):
        report.add("miscounted", f"{count:,} samples, sizes.json says {told:,}")
    if notes.imageless:
        report.add("no image", notes.imageless_examples[0], notes.imageless)
    if count == 0:
        report.add("empty", "no samples")
    manifest = Manifest([Shard(url, found.size, found.stamp, count, notes)], headers.offsets, headers.lengths)
    shards = Shards(url, caption_schema=captions, max_pixels=max_pixels, manifest=manifest)
    for index in range(count):
        _check_sample(shards, index, captions is not None, report)
    return report


def _check_sample(data: Shards | Folder, index: int, wants_caption: bool, report: ShardReport) -> None:
    key = f"sample {index}"
    try:
        sample = data.read(index)
        key = sample.key
        if isinstance(data, Folder):
            report.size += len(sample.image or b"")
        sample.decode()
        if wants_caption and not sample.captions:
            raise BadSample("no caption")
    except BadSample as error:
        report.add(error.reason, f"{key}: {error.detail}" if error.detail else key)
