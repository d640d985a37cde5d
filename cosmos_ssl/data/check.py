"""A check of whole shards or of a folder: every sample read and decoded, what is wrong counted by shard or class folder and reason."""

from __future__ import annotations

import json
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cosmos_ssl.api import Sample
from cosmos_ssl.data.captions import check_texts, schema_fields
from cosmos_ssl.data.dataset import Shards
from cosmos_ssl.data.folder import Folder
from cosmos_ssl.data.manifest import Manifest, Progress, Shard, told_sizes
from cosmos_ssl.data.prepare.joining import FILES, deal, entries, repeats
from cosmos_ssl.data.prepare.rows import KEY
from cosmos_ssl.data.scan import expand, pool, scan
from cosmos_ssl.data.storage import is_local, shard_name, stat
from cosmos_ssl.errors import BadSample, UserError

_NO_CAPTIONS = frozenset({"key", "url", "image", "sha256", "exif"})
"""Strings in a sample's JSON that differ between copies of it."""
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
    bad: list[int] = field(default_factory=list)
    """Samples that cannot be used or repeat others, by their place in the shard, in the order found."""
    strings: list[int] = field(default_factory=list)
    """Samples whose captions are strings where lists are due."""

    def add(self, reason: str, example: str, count: int = 1) -> None:
        """Count a fault."""
        self.faults[reason] = self.faults.get(reason, 0) + count
        self.examples.setdefault(reason, example)


def check_shards(
    urls: str | Sequence[str], *, captions: str | None = None, max_pixels: int = 1 << 26, progress: Progress | None = None
) -> list[ShardReport]:
    """Decode every sample of every shard, several shards at once; samples that repeat an earlier one are faults.

    With ``captions`` a schema must find some in each sample, in lists where it reads fields. Samples of equal picture
    and captions (of equal picture and whatever may be captions, without a schema) are repeats.
    Raises DataError for a list that names no shard, UserError for an unknown schema, OSError where storage fails.
    """
    names = list(dict.fromkeys(expand(urls)))  # a list file may repeat shards
    if captions is not None:
        schema_fields(captions)
    told = told_sizes(names)
    reports: list[ShardReport] = []

    def digests() -> Iterator[NDArray[np.bytes_]]:
        with pool(len(names), processes=len(names) > 1 and is_local(names[0])) as executor:
            tasks = deque(executor.submit(_check, name, captions, max_pixels, told.get(name)) for name in names)
            while tasks:
                report, found = tasks.popleft().result()  # not kept: 16 bytes a sample are much for 30 million
                reports.append(report)
                if progress is not None:
                    progress(len(reports), len(names))
                yield found

    with tempfile.TemporaryDirectory() as folder:
        deal(Path(folder), digests())
        _find_repeats(Path(folder), reports)
    return reports


def _find_repeats(folder: Path, reports: Sequence[ShardReport]) -> None:
    ends = np.cumsum([report.samples for report in reports])
    for number in range(FILES):
        found = entries(folder, number)
        found = found[found["key"] != b""]
        places, firsts = repeats(found)
        for place, first in zip(found["number"][places].tolist(), found["number"][firsts].tolist(), strict=True):
            shard, other = np.searchsorted(ends, [place, first], side="right").tolist()
            report = reports[shard]
            index, first_index = (int(at - ends[n] + reports[n].samples) for at, n in ((place, shard), (first, other)))
            report.add("repeated", f"sample {index} is sample {first_index} of {reports[other].name}")
            report.bad.append(index)


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


def _check(url: str, captions: str | None, max_pixels: int, told: int | None) -> tuple[ShardReport, NDArray[np.bytes_]]:
    """What is wrong in one shard, and a digest of each sample that is good."""
    report = ShardReport(shard_name(url))
    try:
        found = stat(url)
    except (FileNotFoundError, NotADirectoryError):
        report.add("missing", url)
        return report, np.empty(0, KEY)
    headers = scan(url, found.size)
    notes, count = headers.notes, len(headers.offsets)
    report.samples, report.size = count, found.size
    if headers.fault:
        report.add("cut short or damaged", headers.fault)
    elif told not in (None, count, notes.keys):
        report.add("miscounted", f"{count:,} samples, sizes.json says {told:,}")
    if notes.imageless:
        report.add("no image", notes.imageless_examples[0], notes.imageless)
    if notes.repeated:
        report.add("repeated name", notes.repeated_examples[0], notes.repeated)
    if count == 0:
        report.add("empty", "no samples")
    manifest = Manifest([Shard(url, found.size, found.stamp, count, notes)], headers.offsets, headers.lengths)
    shards = Shards(url, caption_schema=captions, max_pixels=max_pixels, full=captions is not None, manifest=manifest)
    fields = schema_fields(captions) if captions is not None else ()
    everything = Shards(url, caption_schema="all", manifest=manifest)
    digests = np.zeros(count, KEY)
    for index in range(count):
        sample = _check_sample(shards, index, captions is not None, report)
        if sample is None:
            report.bad.append(index)
            continue
        strings = [name for name in fields if isinstance(sample.extras["json"].get(name), str)]
        if strings:
            report.add("captions not in lists", f"{sample.key}: {', '.join(strings)}")
            report.strings.append(index)
        digest = blake2b(sample.image or b"", digest_size=KEY.itemsize)
        texts = sample.captions if captions is not None else _texts(everything, index)
        digest.update(json.dumps(sorted(texts.items())).encode())
        digests[index] = digest.digest()
    return report, digests


def _texts(shards: Shards, index: int) -> Mapping[str, Sequence[str]]:
    """All that may be captions of a sample."""
    try:
        return {name: found for name, found in shards.read(index).captions.items() if name not in _NO_CAPTIONS}
    except BadSample:  # unreadable JSON is no fault where nobody asked for captions
        return {}


def _check_sample(data: Shards | Folder, index: int, wants_caption: bool, report: ShardReport) -> Sample | None:
    """The sample, None where it is bad."""
    key = f"sample {index}"
    try:
        sample = data.read(index)
        key = sample.key
        if isinstance(data, Folder):
            report.size += len(sample.image or b"")
        sample.decode()
        if wants_caption and not sample.captions:
            raise BadSample("no caption")
        check_texts(sample.captions)
        return sample
    except BadSample as error:
        report.add(error.reason, f"{key}: {error.detail}" if error.detail else key)
        return None
