"""One shard of the outcome: pictures as they are, captions as lists, under a temporary name until it is whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosmos_ssl.errors import BadSample
from cosmos_ssl.files import written_whole
from cosmos_ssl.shards.output import TAR_END, spans, tar_member
from cosmos_ssl.shards.prepare.images import Images, check_picture, load_index
from cosmos_ssl.shards.prepare.rows import Rows
from cosmos_ssl.shards.prepare.sentences import sentences


@dataclass(slots=True)
class ShardNote:
    """What went into a shard, and what did not."""

    name: str
    samples: int = 0
    size: int = 0
    left_out: list[tuple[str, str, str]] = field(default_factory=list)
    """Rows with an image that did not become samples: reason, name, detail."""
    listed: dict[str, int] = field(default_factory=dict)
    """Caption fields that held lists already, and in how many samples."""


@dataclass(kw_only=True)
class ShardWriter:
    """All that the writing of any shard needs."""

    folder: Path
    work: Path
    images: Images
    rows: Rows
    row_of: NDArray[np.int64]
    """The row of each image."""
    part_sizes: Sequence[int]
    starts: Sequence[int]
    """The image at which each shard begins, and the end of the last."""
    names: Sequence[str]
    splitters: Mapping[str, Callable[[str], list[str]]]
    """Caption field -> how it is cut into sentences."""
    max_pixels: int
    decode: bool

    def write(self, shard: int) -> dict[str, Any]:
        """Write one shard and its note, a ShardNote in plain values. Raises OSError where storage fails."""
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
                        note.left_out.append((error.reason, self.rows.name(int(rows[place])), error.detail))
                        continue
                    file.write(sample)
                    note.samples += 1
                    note.size += len(sample)
            file.write(TAR_END)
            note.size += len(TAR_END)
        with written_whole(self.work / f"{note.name}.json") as file:
            file.write(json.dumps(asdict(note)).encode())
        return asdict(note)

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
        for name, split in self.splitters.items():
            found[name], listed = sentences(cells[name], split)
            if listed:
                note.listed[name] = note.listed.get(name, 0) + 1
        return found
