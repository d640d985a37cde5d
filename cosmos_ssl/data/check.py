"""A check of whole shards: every sample read and decoded, what is wrong counted by shard and reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cosmos_ssl.data.captions import schema_fields
from cosmos_ssl.data.dataset import Shards
from cosmos_ssl.data.manifest import Manifest, Progress, Shard, told_sizes
from cosmos_ssl.data.scan import expand, pool, scan
from cosmos_ssl.data.storage import is_local, shard_name, stat
from cosmos_ssl.errors import BadSample


@dataclass(slots=True)
class ShardReport:
    """What was found in one shard."""

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


def _check_sample(shards: Shards, index: int, wants_caption: bool, report: ShardReport) -> None:
    key = f"sample {index}"
    try:
        sample = shards.read(index)
        key = sample.key
        sample.decode()
        if wants_caption and not sample.captions:
            raise BadSample("no caption")
    except BadSample as error:
        report.add(error.reason, f"{key}: {error.detail}" if error.detail else key)
