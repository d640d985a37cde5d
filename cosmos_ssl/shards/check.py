"""A check of whole shards or of a folder: every sample read and decoded, what is wrong counted by shard or class folder
and reason.
"""

from __future__ import annotations

import json
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cosmos_ssl.api import Sample
from cosmos_ssl.data.captions import check_texts, schema_fields
from cosmos_ssl.data.dataset import Shards
from cosmos_ssl.data.folder import Folder
from cosmos_ssl.data.manifest import Manifest, Shard, told_sizes
from cosmos_ssl.data.scan import expand, pool, scan
from cosmos_ssl.data.storage import is_local, shard_name, stat
from cosmos_ssl.errors import BadSample, UserError
from cosmos_ssl.functional.pulse import OnProgress
from cosmos_ssl.pictures import has_alpha, open_picture
from cosmos_ssl.shards.prepare.joining import FILES, deal, entries, repeats
from cosmos_ssl.shards.prepare.rows import KEY

SAME_PICTURE = "picture of an earlier sample"
OTHER_CAPTIONS, OTHER_PICTURE = f"{SAME_PICTURE}, other captions", "key of an earlier sample, other picture"
"""What is no fault by itself: a sample may have several captions, and merged sets the same keys."""
TRANSPARENT, ONE_COLOUR = "transparent, put on model.background", "of one colour all over"
_DIGESTS = ("picture and captions", "picture", "key", "key and picture")
"""Of what there is a digest of each good sample of shards."""
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


def check_shards(
    urls: str | Sequence[str],
    *,
    captions: str | None = None,
    max_pixels: int = 1 << 26,
    progress: OnProgress | None = None,
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
    reports: list[ShardReport] = []

    def digests() -> Iterator[NDArray[np.bytes_]]:
        with pool(len(names), processes=len(names) > 1 and is_local(names[0])) as executor:
            tasks = deque(executor.submit(_check, name, captions, max_pixels, told.get(name)) for name in names)
            while tasks:
                report, found = tasks.popleft().result()  # not kept: 64 bytes a sample are much for 30 million
                reports.append(report)
                if progress is not None:
                    progress(len(reports), len(names))
                yield found

    with tempfile.TemporaryDirectory() as folder:
        deal(Path(folder), (found.ravel() for found in digests()))
        found = [_repeats(Path(folder), kind, len(_DIGESTS)) for kind in range(len(_DIGESTS))]
    samples, pictures, keys, keys_of_pictures = found
    for report, index, example in _named(samples, reports):
        report.add("repeated", example)
        report.bad.append(index)
    for what, repeated, known in ((OTHER_CAPTIONS, pictures, samples), (OTHER_PICTURE, keys, keys_of_pictures)):
        for report, _, example in _named(repeated[~np.isin(repeated[:, 0], known[:, 0])], reports):
            report.note(what, example)
    return reports


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


def check_folder(
    root: Path, *, captions: str | None = None, max_pixels: int = 1 << 26, progress: OnProgress | None = None
) -> list[ShardReport]:
    """Decode every picture below a folder; one report for each of its classes, or one for a folder without. Equal ones
    are noted.

    Raises DataError as ``load_folder`` does, UserError for captions other than ``txt``, OSError where storage fails.
    """
    if captions not in (None, "txt"):
        raise UserError(f"captions: pictures in folders have theirs in text files beside them: txt, not {captions}")
    folder = Folder(root, captions=captions is not None, max_pixels=max_pixels)
    sizes = folder.index.class_sizes() if folder.class_names else np.array([len(folder)])
    reports = [ShardReport(name) for name in folder.class_names or [root.name]]
    ends = np.cumsum(sizes)
    tasks = deque[tuple[int, Future[tuple[ShardReport, NDArray[np.bytes_]]]]]()

    def digests() -> Iterator[NDArray[np.bytes_]]:
        total = len(tasks)
        for done in range(1, total + 1):
            number, task = tasks.popleft()
            found, pictures = task.result()
            reports[number].samples += found.samples
            reports[number].size += found.size
            for reason, count in found.faults.items():
                reports[number].add(reason, found.examples[reason], count)
            for what, count in found.notes.items():
                reports[number].note(what, found.examples[what], count)
            if progress is not None:
                progress(done, total)
            yield pictures

    with pool(len(folder), processes=len(folder) > _PICTURES) as executor, tempfile.TemporaryDirectory() as temporary:
        for number, (end, size) in enumerate(zip(ends.tolist(), sizes.tolist(), strict=True)):
            for start in range(end - size, end, _PICTURES):
                tasks.append(
                    (number, executor.submit(_check_pictures, folder, range(start, min(start + _PICTURES, end))))
                )
        deal(Path(temporary), digests())
        pairs = _repeats(Path(temporary), 0, 1)
    for report, _, example in _named(pairs, reports):
        report.note(SAME_PICTURE, example)
    for report in reports:
        if report.samples == 0:
            report.add("empty", "no pictures")
    return reports


def _check_pictures(folder: Folder, indices: range) -> tuple[ShardReport, NDArray[np.bytes_]]:
    """What is wrong with some pictures of one class, and the digest of each good one."""
    report, digests = ShardReport("", samples=len(indices)), np.zeros(len(indices), KEY)
    for place, index in enumerate(indices):
        sample = _check_sample(folder, index, folder.captions, report)
        if sample is not None:
            digests[place] = _digest(sample.image or b"")
    return report, digests


def _check(url: str, captions: str | None, max_pixels: int, told: int | None) -> tuple[ShardReport, NDArray[np.bytes_]]:
    """What is wrong in one shard, and the digests of each sample that is good, [samples, kinds]."""
    report = ShardReport(shard_name(url))
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
        picture, key = _digest(sample.image or b""), sample.key.encode("utf-8", "surrogateescape")
        digests[index] = (
            _digest(picture, json.dumps(sorted(texts.items())).encode()),
            picture,
            _digest(key),
            _digest(key, picture),
        )
    return report, digests


def _digest(*parts: bytes) -> bytes:
    return blake2b(b"\0".join(parts), digest_size=KEY.itemsize).digest()


def _texts(shards: Shards, index: int) -> Mapping[str, Sequence[str]]:
    """All that may be captions of a sample."""
    try:
        return shards.read(index).captions
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
        pixels = sample.decode()
        if has_alpha(open_picture(sample.image or b"", max_pixels=sample.max_pixels, decode=False)):
            report.note(TRANSPARENT, key)
        if all(
            bool((part == pixels[:, :1, :1]).all()) for part in (pixels[:, ::16, ::16], pixels)
        ):  # some first: most end there
            report.note(ONE_COLOUR, key)
        if wants_caption and not sample.captions:
            raise BadSample("no caption")
        check_texts(sample.captions)
        return sample
    except BadSample as error:
        report.add(error.reason, f"{key}: {error.detail}" if error.detail else key)
        return None
