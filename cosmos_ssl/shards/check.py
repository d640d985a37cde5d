"""A check of whole shards, a folder or tables: every sample read and decoded, what is wrong counted by shard, class
folder or table, and reason.
"""

from __future__ import annotations

import json
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosmos_ssl.api import Sample
from cosmos_ssl.data.captions import check_texts, schema_fields
from cosmos_ssl.data.dataset import Shards
from cosmos_ssl.data.folder import Folder
from cosmos_ssl.data.manifest import Manifest, Shard, told_sizes
from cosmos_ssl.data.scan import expand, pool, scan
from cosmos_ssl.data.storage import is_local, shard_name, stat
from cosmos_ssl.data.table import TableData
from cosmos_ssl.errors import BadSample, UserError
from cosmos_ssl.liveness import OnProgress, alive
from cosmos_ssl.pictures import has_alpha, open_picture
from cosmos_ssl.shards.keys import FILES, KEY, deal, digest, entries, repeats

SAME_PICTURE = "picture of an earlier sample"
OTHER_CAPTIONS, OTHER_PICTURE = f"{SAME_PICTURE}, other captions", "key of an earlier sample, other picture"
"""What is no fault by itself: a sample may have several captions, and merged sets the same keys."""
TRANSPARENT, ONE_COLOUR = "transparent, put on model.background", "of one colour all over"
_DIGESTS = ("picture and captions", "picture", "key", "key and picture")
"""Of what there is a digest of each good sample of shards; of pictures in folders there is one."""
_PICTURES = 512
"""Pictures of a folder that one process checks at a time."""


@dataclass(slots=True)
class ShardReport:
    """What was found in one shard, class folder or table."""

    name: str
    samples: int = 0
    size: int = 0
    """Bytes."""
    faults: dict[str, int] = field(default_factory=dict)
    """How often each reason was met."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first case of each reason, and of each note."""
    bad: list[int] = field(default_factory=list)
    """Samples that cannot be used or repeat others, by their place in the shard, in the order found."""
    strings: list[int] = field(default_factory=list)
    """Samples whose captions are strings where lists are due."""
    notes: dict[str, int] = field(default_factory=dict)
    """How often what is worth knowing and no fault was met."""

    def note(self, what: str, example: str, count: int = 1) -> None:
        """Count what is no fault."""
        self.notes[what] = self.notes.get(what, 0) + count
        self.examples.setdefault(what, example)

    def add(self, reason: str, example: str, count: int = 1) -> None:
        """Count a fault."""
        self.faults[reason] = self.faults.get(reason, 0) + count
        self.examples.setdefault(reason, example)

    def join(self, part: ShardReport) -> None:
        """Add what was found in a part of it; the samples before it have been added."""
        self.bad += [self.samples + place for place in part.bad]
        self.strings += [self.samples + place for place in part.strings]
        self.samples += part.samples
        self.size += part.size
        for what, example in part.examples.items():
            (self.add if what in part.faults else self.note)(what, example, (part.faults | part.notes)[what])


_Checked = tuple[ShardReport, NDArray[np.bytes_]]
"""What is wrong in some samples, and the digests of each good one, [samples, kinds]; empty ones of bad samples."""


def check_shards(
    urls: str | Sequence[str], *, captions: str | None = None, max_pixels: int = 1 << 26, progress: OnProgress = alive
) -> list[ShardReport]:
    """Decode every sample of every shard, several shards at once; samples that repeat an earlier one are faults.

    With ``captions`` a schema must find some in each sample, in lists where it reads fields. Samples of equal picture
    and captions (of equal picture and whatever may be captions, without a schema) are repeats; equal pictures with
    other captions, and equal keys of other pictures, are noted. Raises DataError for a list that names no shard,
    UserError for an unknown schema, OSError where storage fails.
    """
    names = list(dict.fromkeys(expand(urls)))  # a list file may repeat shards
    if captions is not None:
        schema_fields(captions)
    told = told_sizes(names)
    reports = [ShardReport(shard_name(name)) for name in names]
    jobs = [(report, (name, captions, max_pixels, told.get(name))) for report, name in zip(reports, names, strict=True)]
    processes = len(names) > 1 and is_local(names[0])
    samples, pictures, keys, keys_of_pictures = _check_all(_check_shard, jobs, len(_DIGESTS), processes, progress)
    for report, index, example in _named(samples, reports):
        report.add("repeated", example)
        report.bad.append(index)
    for what, repeated, known in ((OTHER_CAPTIONS, pictures, samples), (OTHER_PICTURE, keys, keys_of_pictures)):
        for report, _, example in _named(repeated[~np.isin(repeated[:, 0], known[:, 0])], reports):
            report.note(what, example)
    return reports


def check_folder(
    root: Path, *, captions: str | None = None, max_pixels: int = 1 << 26, progress: OnProgress = alive
) -> list[ShardReport]:
    """Decode every picture below a folder; one report for each of its classes, or one for a folder without. Equal ones
    are noted.

    Raises DataError as ``load_folder`` does, UserError for captions other than ``txt``, OSError where storage fails.
    """
    if captions not in (None, "txt"):
        raise UserError(f"captions: pictures in folders have theirs in text files beside them: txt, not {captions}")
    folder = Folder(root, captions=captions is not None, max_pixels=max_pixels)
    sizes = folder.index.class_sizes().tolist() if folder.class_names else [len(folder)]
    reports = [ShardReport(name) for name in folder.class_names or [root.name]]
    jobs, end = list[tuple[ShardReport, tuple[Any, ...]]](), 0
    for report, size in zip(reports, sizes, strict=True):
        start, end = end, end + size
        parts = (range(first, min(first + _PICTURES, end)) for first in range(start, end, _PICTURES))
        jobs += [(report, (folder, part, folder.captions)) for part in parts]
    [pictures] = _check_all(_check_pictures, jobs, 1, len(folder) > _PICTURES, progress)
    for report, _, example in _named(pictures, reports):
        report.note(SAME_PICTURE, example)
    for report in reports:
        if report.samples == 0:
            report.add("empty", "no pictures")
    return reports


def check_table(
    urls: str | Sequence[str], *, captions: str | None = None, max_pixels: int = 1 << 26, progress: OnProgress = alive
) -> list[ShardReport]:
    """Decode the picture of every row; one report for each table. Equal pictures are noted.

    With ``captions``, ``all``, each row must have one. Raises DataError for tables that cannot be read, UserError for
    other captions, OSError where storage fails.
    """
    if captions not in (None, "all"):
        raise UserError(f"captions: columns of tables are named behind #caption_columns=: all, not {captions}")
    table = TableData(urls, max_pixels=max_pixels)
    reports, jobs, end = list[ShardReport](), list[tuple[ShardReport, tuple[Any, ...]]](), 0
    for piece in table.index.pieces:
        start, end = end, end + piece.rows
        reports.append(report := ShardReport(piece.name))
        parts = (range(first, min(first + _PICTURES, end)) for first in range(start, end, _PICTURES))
        jobs += [(report, (table, part, captions is not None)) for part in parts]
        if start == end:
            report.add("empty", "no rows")
    [pictures] = _check_all(_check_pictures, jobs, 1, len(table) > _PICTURES, progress)
    for report, _, example in _named(pictures, reports):
        report.note(SAME_PICTURE, example)
    return reports


def _check_all(
    check: Callable[..., _Checked],
    jobs: Sequence[tuple[ShardReport, tuple[Any, ...]]],
    kinds: int,
    processes: bool,
    progress: OnProgress,
) -> list[NDArray[np.int64]]:
    """Check each part and add what is found to its report.

    By kind of digest, the samples that repeat an earlier one, and which, by their numbers over all reports, [n, 2].
    """

    def digests() -> Iterator[NDArray[np.bytes_]]:
        tasks = deque((report, executor.submit(check, *job)) for report, job in jobs)
        while tasks:
            report, task = tasks.popleft()  # not kept: 64 bytes a sample are much for 30 million
            part, found = task.result()
            report.join(part)
            progress(len(jobs) - len(tasks), len(jobs))
            yield found.ravel()

    with pool(len(jobs), processes=processes) as executor, tempfile.TemporaryDirectory() as folder:
        deal(Path(folder), digests())
        return [_repeats(Path(folder), kind, kinds) for kind in range(kinds)]


def _repeats(folder: Path, kind: int, kinds: int) -> NDArray[np.int64]:
    """The samples whose digest of a kind an earlier one has, and the first of these, [n, 2]; a sample's digests were
    dealt together.
    """
    pairs = [np.empty((0, 2), np.int64)]
    for number in range(FILES):
        found = entries(folder, number)
        found = found[(found["key"] != b"") & (found["number"] % kinds == kind)]
        pairs.append(np.stack([found["number"][places] // kinds for places in repeats(found)], 1))
    together = np.concatenate(pairs)
    return together[np.argsort(together[:, 0])]


def _named(pairs: NDArray[np.int64], reports: Sequence[ShardReport]) -> Iterator[tuple[ShardReport, int, str]]:
    """The report and place of each of these samples, and which earlier one it is like."""
    ends = np.cumsum([report.samples for report in reports])
    for pair in pairs.tolist():
        (report, index), (first_report, first) = (
            (reports[n], int(number - ends[n] + reports[n].samples))
            for number, n in zip(pair, np.searchsorted(ends, pair, side="right").tolist(), strict=True)
        )
        yield report, index, f"sample {index} is sample {first} of {first_report.name}"


def _check_pictures(folder: Folder | TableData, indices: range, captions: bool) -> _Checked:
    """Some pictures of one class or table."""
    report, digests = ShardReport("", samples=len(indices)), np.zeros(len(indices), KEY)
    for place, index in enumerate(indices):
        sample = _check_sample(folder, index, captions, report)
        if sample is not None:
            digests[place] = digest(sample.image or b"")
    return report, digests


def _check_shard(url: str, captions: str | None, max_pixels: int, told: int | None) -> _Checked:
    report = ShardReport("")
    try:
        found = stat(url)
    except (FileNotFoundError, NotADirectoryError):
        report.add("missing", url)
        return report, np.empty((0, len(_DIGESTS)), KEY)
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
    digests = np.zeros((count, len(_DIGESTS)), KEY)
    for index in range(count):
        sample = _check_sample(shards, index, captions is not None, report)
        if sample is None:
            report.bad.append(index)
            continue
        strings = [name for name in fields if isinstance(sample.extras["json"].get(name), str)]
        if strings:
            report.add("captions not in lists", f"{sample.key}: {', '.join(strings)}")
            report.strings.append(index)
        texts = sample.captions if captions is not None else _texts(everything, index)
        picture, key = digest(sample.image or b""), sample.key.encode("utf-8", "surrogateescape")
        both = digest(picture, json.dumps(sorted(texts.items())).encode())
        digests[index] = both, picture, digest(key), digest(key, picture)
    return report, digests


def _texts(shards: Shards, index: int) -> Mapping[str, Sequence[str]]:
    """All that may be captions of a sample."""
    try:
        return shards.read(index).captions
    except BadSample:  # unreadable JSON is no fault where nobody asked for captions
        return {}


def _check_sample(
    data: Shards | Folder | TableData, index: int, wants_caption: bool, report: ShardReport
) -> Sample | None:
    """The sample, None where it is bad."""
    key = f"sample {index}"
    try:
        sample = data.read(index)
        key = sample.key
        if not isinstance(data, Shards):
            report.size += len(sample.image or b"")
        pixels = sample.decode()
        if has_alpha(open_picture(sample.image or b"", max_pixels=sample.max_pixels, decode=False)):
            report.note(TRANSPARENT, key)
        some_first = (pixels[:, ::16, ::16], pixels)  # most end there
        if all(bool((part == pixels[:, :1, :1]).all()) for part in some_first):
            report.note(ONE_COLOUR, key)
        if wants_caption and not sample.captions:
            raise BadSample("no caption")
        check_texts(sample.captions)
        return sample
    except BadSample as error:
        report.add(error.reason, f"{key}: {error.detail}" if error.detail else key)
        return None
