"""Samples of shards by index: one read of a sample's neighbouring members."""

from __future__ import annotations

import json
import logging
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosmos_ssl.api import BadSample, IndexedDataset, Sample
from cosmos_ssl.data.cache import cache_root, digest
from cosmos_ssl.data.captions import caption_schema as schema_named
from cosmos_ssl.data.captions import check_captions, text_fault
from cosmos_ssl.data.manifest import Manifest, check_shards_exist, is_indexed, load_manifest, notices
from cosmos_ssl.data.scan import IMAGE_EXTENSIONS, spread
from cosmos_ssl.data.storage import BlockCache, Reader
from cosmos_ssl.data.tar import TarFault, members_in, sample_key
from cosmos_ssl.liveness import OnProgress

_LOOK_SHARDS, _LOOK_SAMPLES = 256, 3
_SAMPLE_BYTES, _JSON_BYTES = 1 << 30, 1 << 22
"""What a sample may have in all, and in its JSON, which becomes a hundred times as much when it is read."""
_NO_EXTRAS = frozenset((*IMAGE_EXTENSIONS, "json", "txt", "cls"))
_INTEGER = re.compile(r"-?\d{1,18}")
_log = logging.getLogger("cosmos_ssl.data")


class Shards(IndexedDataset):
    """Webdataset shards with random access.

    ``caption_schema`` as in ``cosmos_ssl.data.captions``. With ``full`` a sample also carries the whole JSON in
    ``extras['json']``; ``extras['cls']`` is there whenever the shards hold one. ``cache_dir`` holds manifests
    and blocks of remote shards (at most ``cache_gib``).
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        caption_schema: str | None = "all",
        cache_dir: str | None = None,
        cache_gib: float = 32.0,
        max_pixels: int = 1 << 26,
        full: bool = False,
        manifest: Manifest | None = None,
    ) -> None:
        self._urls = urls
        self._schema_name = caption_schema
        self._cache_dir = cache_dir
        self._max_pixels = max_pixels
        self._full = full
        self._manifest = manifest
        self._captions = schema_named(caption_schema)
        blocks = (Path(cache_dir).expanduser() if cache_dir else cache_root()) / "blocks"
        self._reader = Reader(BlockCache(blocks, int(cache_gib * 2**30)))

    @property
    def manifest(self) -> Manifest:
        """Where every sample lies; made when first asked for."""
        if self._manifest is None:
            self._manifest = load_manifest(self._urls, cache_dir=self._cache_dir)
        return self._manifest

    @property
    def is_indexed(self) -> bool:
        """False where the shards lie there and no manifest is of them as they are now, so that ``prepare`` would scan
        them.
        """
        return self._manifest is not None or is_indexed(self._urls, cache_dir=self._cache_dir)

    @property
    def index_command(self) -> str:
        """The command that makes the manifest."""
        urls = [self._urls] if isinstance(self._urls, str) else self._urls
        where = [] if self._cache_dir is None else ["--cache-dir", self._cache_dir]
        return shlex.join(["cosmos-ssl", "data", "index", *urls, *where])

    def check_exists(self) -> bool:
        """Raise DataError where a local shard, or the first one elsewhere, is missing; OSError where storage fails."""
        check_shards_exist(self._urls)
        return True

    def prepare(self, progress: OnProgress | None = None) -> None:
        """Index the shards and look into captions; what is odd is logged. Raises DataError, OSError."""
        if self._manifest is None:
            self._manifest = load_manifest(self._urls, cache_dir=self._cache_dir, progress=progress)
        for line in notices(self._manifest):
            _log.warning(line)
        if self._schema_name is not None:
            check_captions(self._schema_name, self._look())

    def _look(self) -> Iterator[tuple[str, Mapping[str, Any], str | None]]:
        """Shard, JSON and text of a few samples of each shard (of evenly spread ones, where there are very many)."""
        sizes = self.manifest.sizes
        filled = np.flatnonzero(sizes)
        chosen = filled[list(spread(len(filled), _LOOK_SHARDS))]
        starts = np.cumsum(sizes) - sizes
        inside = {s: spread(int(sizes[s]), _LOOK_SAMPLES) for s in chosen.tolist()}
        indices = [int(starts[s] + i) for s, places in inside.items() for i in places]
        with ThreadPoolExecutor(16) as threads:
            for index, found in zip(indices, threads.map(self._members, indices), strict=True):
                try:
                    yield self.describe(index), _table(found[1]), _text(found[1])
                except BadSample:  # counted when it is met in training
                    continue

    def __len__(self) -> int:
        return len(self.manifest)

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        """Samples of each shard, int64 [shards]."""
        return self.manifest.sizes

    def describe(self, index: int) -> str:
        """Name of the shard that holds sample ``index``."""
        return self.manifest.shards[self.manifest.shard_of(index)].name

    def sources(self, index: int) -> Sequence[str]:
        """The shard that sample ``index`` is read from."""
        return [self.manifest.shards[self.manifest.shard_of(index)].url]

    def identity(self) -> Mapping[str, Any]:
        """Samples, shards, a digest over name, size and count of each shard, and one of what they hold.

        ``content`` is of some bytes of each shard; ``full_hash``, where ``data index --hash`` was run, is of all.
        """
        shards = self.manifest.shards
        found: dict[str, Any] = {"samples": len(self), "shards": len(shards)}
        found["digest"] = digest(f"{shard.name} {shard.size} {shard.samples}" for shard in shards)
        found["content"] = digest(shard.content for shard in shards)
        if all(shard.full_hash for shard in shards):
            found["full_hash"] = digest(shard.full_hash for shard in shards)
        return found

    def read(self, index: int) -> Sample:
        """Sample ``index``.

        Raises BadSample for what cannot be parsed or is too large, OSError where storage fails, IndexError.
        """
        key, parts = self._members(index)
        image = next((parts[e] for e in parts if e in IMAGE_EXTENSIONS), None)
        table = _table(parts) if self._full or self._schema_name not in (None, "txt") else {}
        extras: dict[str, Any] = {"cls": _label(parts["cls"])} if "cls" in parts else {}
        if self._full:
            extras["json"] = table
            extras |= {name: body for name, body in parts.items() if name not in _NO_EXTRAS}
        captions = self._captions(table, _text(parts))
        if self._schema_name == "all":  # whatever is text: not all of it was meant to be a caption
            fit = {name: [text for text in texts if not text_fault(text)] for name, texts in captions.items()}
            captions = {name: texts for name, texts in fit.items() if texts}
        return Sample(key=key, image=image, captions=captions, extras=extras, max_pixels=self._max_pixels)

    def _members(self, index: int) -> tuple[str, dict[str, bytes]]:
        """Key and members of one sample by extension, in one read."""
        shard, offset, length = self.manifest.locate(index)
        if length > _SAMPLE_BYTES:
            raise BadSample("too large", f"at least {length:,} bytes at byte {offset:,} of {shard.name}")
        data = self._reader.read(shard.url, shard.stat, offset, length)
        try:
            found = [(*sample_key(m.name), data[m.data : m.data + m.size]) for m in members_in(data)]
        except TarFault as error:
            raise OSError(f"{shard.url} has changed since it was indexed ({error} at sample {index})") from error
        if not found:
            raise OSError(f"{shard.url} has changed since it was indexed (zeros at sample {index})")
        parts = {extension: body for _, extension, body in found}
        if len(parts) < len(found):
            raise BadSample("repeated member", f"{found[0][0]} has more than one of .{', .'.join(parts)}")
        return found[0][0], parts


def open_shards(
    urls: str | Sequence[str],
    *,
    caption_schema: str | None = "all",
    cache_dir: str | None = None,
    max_pixels: int = 1 << 26,
) -> Shards:
    """Shards for evaluation and tools: ``len``, ``read(i)``, with every caption field and extra of a sample.

    Captions by the schema ``all``: field ``txt`` from the text member, and every string or list of strings of the JSON
    under its key. Extras: ``cls`` (int, or the string that stands there), ``json``, and the bytes of other members
    (``mask.png``). Raises DataError as ``load_manifest`` does.
    """
    shards = Shards(urls, caption_schema=caption_schema, cache_dir=cache_dir, max_pixels=max_pixels, full=True)
    len(shards)  # indexes them: a mistake shows here
    return shards


def _table(parts: Mapping[str, bytes]) -> Mapping[str, Any]:
    if "json" not in parts:
        return {}
    if len(parts["json"]) > _JSON_BYTES:
        raise BadSample("too large", f"{len(parts['json']):,} bytes of JSON")
    try:
        table = json.loads(parts["json"])
    except ValueError as error:
        raise BadSample("unreadable json", str(error)) from error
    except RecursionError as error:
        raise BadSample("unreadable json", "nested too deeply") from error
    if not isinstance(table, dict):
        raise BadSample("unreadable json", "not a table")
    return table


def _text(parts: Mapping[str, bytes]) -> str | None:
    return parts["txt"].decode("utf-8", "replace") if "txt" in parts else None


def _label(body: bytes) -> int | str:
    text = body.decode("utf-8", "replace").strip()
    if not text.lstrip("-").isdecimal():
        return text
    if not _INTEGER.fullmatch(text):
        raise BadSample("unreadable label", text[:40])
    return int(text)
