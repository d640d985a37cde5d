"""One shard of the outcome: pictures as they are, captions as lists, under a temporary name until it is whole."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cosmos_ssl.errors import BadSample
from cosmos_ssl.files import written_whole
from cosmos_ssl.shards.prepare.images import Images, check_picture, load_index
from cosmos_ssl.shards.prepare.joining import open_mapped, spans
from cosmos_ssl.shards.prepare.rows import Rows
from cosmos_ssl.shards.prepare.sentences import SPLITTERS, sentences, whole

_HEAD = b"0000644\0" + b"0000000\0" * 2  # mode, owner, group
_TAIL = b"0" + bytes(100) + b"ustar\x0000" + bytes(80) + bytes(167)  # a plain file, POSIX form
_TAIL_SUM = sum(_TAIL) + 8 * ord(" ")  # the checksum itself counts as spaces


def tar_member(name: str, body: bytes) -> bytes:
    """A file of a tar archive (POSIX ustar, time 0): header, body, padding. ``name`` has at most 100 bytes of ASCII."""
    before = name.encode("ascii").ljust(100, b"\0") + _HEAD + b"%011o\0%011o\0" % (len(body), 0)
    total = sum(before) + _TAIL_SUM
    return b"".join((before, b"%06o\0 " % total, _TAIL, body, bytes(-len(body) % 512)))


TAR_END = bytes(1024)


class LeftOut(NamedTuple):
    """A row with an image that did not become a sample."""

    reason: str
    name: str
    detail: str


@dataclass(slots=True)
class ShardNote:
    """What went into a shard, and what did not."""

    name: str
    samples: int = 0
    size: int = 0
    left_out: list[LeftOut] = field(default_factory=list)
    listed: dict[str, int] = field(default_factory=dict)
    """Caption fields that held lists already, and in how many samples."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"left_out": [list(item) for item in self.left_out]}


@dataclass
class ShardJob:
    """All that the writing of any shard needs; sent to the workers once."""

    folder: Path
    work: Path
    images: Images
    stems: Sequence[Path]
    part_sizes: Sequence[int]
    starts: Sequence[int]
    """The image at which each shard begins, and the end of the last."""
    names: Sequence[str]
    fields: Sequence[str]
    whole_fields: frozenset[str]
    rule: str
    max_pixels: int
    decode: bool

    @cached_property
    def rows(self) -> Rows:
        """The rows of the tables."""
        return Rows(self.stems)

    @cached_property
    def row_of(self) -> NDArray[np.int64]:
        """The row of each image."""
        return open_mapped(self.work / "row_of", np.dtype(np.int64))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("rows", "row_of")}

    def write(self, shard: int) -> dict[str, Any]:
        """Write one shard and its note. Raises OSError where storage fails."""
        note = ShardNote(self.names[shard])
        start, stop = self.starts[shard], self.starts[shard + 1]
        begin = start
        with written_whole(self.folder / note.name) as file:
            for part, first, last in spans(self.part_sizes, start, stop):
                index = load_index(self.work, part)[first:last]
                rows = self.row_of[begin : begin + last - first]
                begin += last - first
                for place in np.flatnonzero(rows >= 0).tolist():
                    image = index[place]
                    try:
                        sample = self._sample(image, part, int(rows[place]), note)
                    except BadSample as error:
                        note.left_out.append(LeftOut(error.reason, self.rows.name(int(rows[place])), error.detail))
                        continue
                    file.write(sample)
                    note.samples += 1
                    note.size += len(sample)
            file.write(TAR_END)
            note.size += len(TAR_END)
        with written_whole(self.work / f"{note.name}.json") as file:
            file.write(json.dumps(note.as_json()).encode())
        return note.as_json()

    def _sample(self, image: Any, part: int, row: int, note: ShardNote) -> bytes:
        cells = self.rows.row(row)
        key = bytes(image["key"]).ljust(16, b"\0")[:8].hex()
        table: dict[str, Any] = {"key": key, "url" if self.images.by_url else "image": cells["key"]}
        if "url" in cells:
            table["url"] = cells["url"]
        captions = self._captions(cells, note)
        if not any(captions.values()):
            raise BadSample("no caption")
        body = self.images.read(self.work, part, image)
        extension = check_picture(body, self.max_pixels, decode=self.decode)
        text = json.dumps(table | captions, ensure_ascii=False).encode("utf-8", "replace")
        return tar_member(f"{key}.{extension}", body) + tar_member(f"{key}.json", text)

    def _captions(self, cells: Mapping[str, Any], note: ShardNote) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.fields:
            found[name], listed = sentences(cells[name], whole if name in self.whole_fields else SPLITTERS[self.rule])
            if listed:
                note.listed[name] = note.listed.get(name, 0) + 1
        return found


JOB: ShardJob | None = None
"""Set before the workers are forked, which inherit it."""


def write_shard(shard: int) -> dict[str, Any]:
    """``ShardJob.write`` in a worker."""
    assert JOB is not None
    return JOB.write(shard)
