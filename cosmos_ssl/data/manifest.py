"""The manifest: where every sample of a list of shards lies, as memory-mapped columns made by one scan.

27 million samples are two columns (8 + 4 bytes each), never Python objects. A cached manifest is one file, replaced as
a whole; shards whose size or times changed are scanned again, the others are kept. A scan also hashes some of what each
shard holds: other pictures under the same names and sizes are another data set, copied files the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cosmos_ssl.data.cache import cache_root, digest, kept, open_head, save_columns
from cosmos_ssl.data.scan import EXAMPLES, Notes, Scan, expand, pool, scan
from cosmos_ssl.data.storage import (
    BLOCK_BYTES,
    UNMARKED,
    Reader,
    Stat,
    is_local,
    local_path,
    read_whole,
    shard_name,
    stat,
)
from cosmos_ssl.errors import DataError, listed
from cosmos_ssl.liveness import OnProgress, alive

_MAGIC = b"cosmos-manifest-2\n"
_SIZES_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard: its URL, its size in bytes and stamp, its samples, and what was odd in it."""

    url: str
    size: int
    stamp: str
    samples: int
    notes: Notes
    content: str = ""
    """Hash of some of its bytes."""
    full_hash: str = ""
    """SHA-256 of all of them, where that was asked for."""

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return shard_name(self.url)

    @property
    def stat(self) -> Stat:
        """Size and stamp."""
        return Stat(self.size, self.stamp)


class Manifest:
    """The columns of a list of shards. Pickled copies map the file again."""

    def __init__(
        self, shards: Sequence[Shard], offsets: NDArray[np.int64], lengths: NDArray[np.uint32], path: Path | None = None
    ) -> None:
        self.shards = tuple(shards)
        self.path = path
        self.sizes: NDArray[np.int64] = np.array([shard.samples for shard in shards], np.int64)
        """Samples of each shard, int64 [shards]."""
        self._ends = np.cumsum(self.sizes)
        self._offsets, self._lengths = offsets, lengths

    def __len__(self) -> int:
        return len(self._offsets)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is not None:
            return partial(Manifest.open, verify=False), (self.path, [s.url for s in self.shards])
        return Manifest, (self.shards, self._offsets, self._lengths)

    def shard_of(self, index: int) -> int:
        """Number of the shard that holds sample ``index``."""
        return int(np.searchsorted(self._ends, index, side="right"))

    def locate(self, index: int) -> tuple[Shard, int, int]:
        """Shard, offset and length in bytes of sample ``index``. Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.shards[self.shard_of(index)], int(self._offsets[index]), int(self._lengths[index])

    @classmethod
    def open(cls, path: Path, urls: Sequence[str], *, verify: bool = True) -> Self:
        """Map a manifest file, once it is read and found sound (``verify``).

        Raises OSError or ValueError where there is none of this form for these shards.
        """
        head, start = open_head(path, _MAGIC, verify=verify)
        if [shard_name(url) for url in urls] != [row.pop("name") for row in head]:
            raise ValueError(f"{path} is of other shards")
        shards = [Shard(url, notes=Notes(**row.pop("notes")), **row) for url, row in zip(urls, head, strict=True)]
        count = sum(shard.samples for shard in shards)
        if count == 0:
            return cls(shards, np.empty(0, np.int64), np.empty(0, np.uint32), path)
        offsets = np.memmap(path, np.int64, "r", start, (count,))
        lengths = np.memmap(path, np.uint32, "r", start + 8 * count, (count,))
        return cls(shards, offsets, lengths, path)

    def save(self, path: Path) -> None:
        """Write the manifest under a temporary name, then rename it."""
        rows = [{"name": shard.name, **asdict(shard)} for shard in self.shards]
        head = [{key: value for key, value in row.items() if key != "url"} for row in rows]
        save_columns(path, _MAGIC, head, (self._offsets, self._lengths), align=8)

    def part(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
        """Offsets and lengths of the samples of one shard."""
        end = int(self._ends[number])
        span = slice(end - int(self.sizes[number]), end)
        return self._offsets[span], self._lengths[span]


def load_manifest(
    urls: str | Sequence[str],
    *,
    cache_dir: str | Path | None = None,
    full_hash: bool = False,
    progress: OnProgress | None = None,
) -> Manifest:
    """The manifest of these shards: from its cache, or by a scan of what is new or changed, under a lock.

    The cache lies in ``cache_dir``; by default beside the first shard, and in the user's cache folder where that is
    another user's or cannot be written. With ``full_hash`` every byte of each shard is hashed, now and whenever it
    changes. Raises DataError for missing, cut, damaged or miscounted shards and where there is no sample at all,
    OSError where storage fails.
    """
    names = expand(urls)
    stats = stat_all(names)
    found = kept(
        _places(names, cache_dir),
        lambda path: _fresh(path, names, stats, full_hash),
        lambda path: _scan_all(names, stats, path, full_hash, progress or alive),
    )
    return _checked(found)


def is_indexed(urls: str | Sequence[str], *, cache_dir: str | Path | None = None) -> bool:
    """Return whether ``load_manifest`` would find a cached manifest, or fail at once because shards are missing."""
    names = expand(urls)
    try:
        stats = stat_all(names)
    except DataError:
        return True
    if any(found.stamp.startswith(UNMARKED) for found in stats):  # each run has to index these for itself
        return True
    return any(_fresh(path, names, stats) is not None for path in _places(names, cache_dir))


def check_shards_exist(urls: str | Sequence[str]) -> None:
    """Raise DataError unless all local shards, and of those on other storage the first, are there.

    Raises OSError where storage fails.
    """
    names = expand(urls)
    remote = [url for url in names if not is_local(url)]
    stat_all([url for url in names if is_local(url)] + remote[:1])


def stat_all(urls: Sequence[str]) -> list[Stat]:
    """Size and stamp of each shard. Raises DataError where some are missing or are no files."""
    with ThreadPoolExecutor(min(32, len(urls))) as threads:
        found = list(threads.map(_stat_or_none, urls))
    missing = [url for url, result in zip(urls, found, strict=True) if result is None]
    if missing:
        rest = f" ({len(missing)} of {len(urls)} shards are missing)" if len(urls) > 1 else ""
        raise DataError(f"data: no such shard: {missing[0]}{rest}")
    return [result for result in found if result is not None]


def _stat_or_none(url: str) -> Stat | None:
    try:
        return stat(url)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except DataError as error:
        if not local_path(url).is_dir():
            raise
        raise DataError(f"data: the folder {url} holds no shards (.tar files)") from error


def _places(urls: Sequence[str], cache_dir: str | Path | None) -> list[Path]:
    """Return where a manifest may lie, best first. Beside the shards its name survives a move of the folder."""
    by_url = f"manifest-{digest(urls)}.bin"
    if cache_dir is not None:
        return [Path(cache_dir).expanduser() / by_url]
    places = [cache_root() / "manifests" / by_url]
    if is_local(urls[0]):
        by_name = f"manifest-{digest(map(shard_name, urls))}.bin"
        places.insert(0, local_path(urls[0]).absolute().parent / ".cosmos_ssl" / by_name)
    return places


def _opened(path: Path | None, urls: Sequence[str]) -> Manifest | None:
    """The cached manifest of these shards, None where there is none."""
    try:
        return None if path is None else Manifest.open(path, urls)
    except (OSError, ValueError):
        return None


def _fresh(path: Path, urls: Sequence[str], stats: Sequence[Stat], full_hash: bool = False) -> Manifest | None:
    """The cached manifest if it is of these shards as they are now."""
    manifest = _opened(path, urls)
    if manifest is None or any(shard.stat != found for shard, found in zip(manifest.shards, stats, strict=True)):
        return None
    return manifest if all(shard.full_hash or not full_hash for shard in manifest.shards) else None


def _scan_all(
    urls: Sequence[str], stats: Sequence[Stat], path: Path | None, full_hash: bool, progress: OnProgress
) -> Manifest:
    """Scan every shard that the manifest at ``path`` does not know as it is now; hash it whole if that was ever asked
    for.
    """
    known = _opened(path, urls)
    found: dict[int, Scan] = {}
    hashes: dict[int, str] = {}
    for i, shard in enumerate(known.shards if known is not None else ()):
        full_hash = full_hash or bool(shard.full_hash)
        if known is not None and shard.stat == stats[i]:
            found[i] = Scan(*known.part(i), shard.notes, content=shard.content)
            hashes[i] = shard.full_hash
    order = range(len(urls))
    todo = [i for i in order if i not in found]
    unhashed = [i for i in order if full_hash and not hashes.get(i)]
    total = len(todo) + len(unhashed)
    with pool(len(todo), processes=len(todo) >= 64 and is_local(urls[0])) as executor:
        scans = executor.map(scan, [urls[i] for i in todo], [stats[i].size for i in todo])
        for done, (i, result) in enumerate(zip(todo, scans, strict=True), 1):
            found[i] = result
            progress(done, total)
    cut = [f"{shard_name(urls[i])}: {found[i].fault}" for i in order if found[i].fault]
    if cut:
        raise DataError(
            f"data: {len(cut)} of {len(urls)} shards are cut short or damaged ({listed(cut, limit=EXAMPLES)}). Fetch "
            "them again; 'cosmos-ssl data check' lists all"
        )
    with pool(len(unhashed), processes=False) as executor:  # threads: hashing and reading leave the interpreter
        digests = executor.map(_full_hash, [urls[i] for i in unhashed], [stats[i] for i in unhashed])
        for done, (i, hashed) in enumerate(zip(unhashed, digests, strict=True), len(todo) + 1):
            hashes[i] = hashed
            progress(done, total)
    shards = [
        Shard(urls[i], *stats[i], len(found[i].offsets), found[i].notes, found[i].content, hashes.get(i, ""))
        for i in order
    ]
    offsets, lengths = [found[i].offsets for i in order], [found[i].lengths for i in order]
    return Manifest(shards, np.concatenate(offsets), np.concatenate(lengths))


def _full_hash(url: str, found: Stat) -> str:
    whole, reader = hashlib.sha256(), Reader()
    for start in range(0, found.size, BLOCK_BYTES):
        whole.update(reader.read(url, found, start, min(BLOCK_BYTES, found.size - start)))
    return whole.hexdigest()


def _checked(manifest: Manifest) -> Manifest:
    """Raise DataError where there is no sample, or ``sizes.json`` beside the shards disagrees."""
    empty = [shard for shard in manifest.shards if shard.samples == 0]
    if len(manifest) == 0:
        what = "hold no image" if any(shard.notes.keys for shard in empty) else "are empty"
        names = listed((shard.name for shard in empty), limit=EXAMPLES)
        raise DataError(f"data: no samples: all {len(empty)} shards {what} ({names})")
    told = told_sizes([s.url for s in manifest.shards])
    wrong = [
        (s, told[s.url]) for s in manifest.shards if s.url in told and told[s.url] not in (s.samples, s.notes.keys)
    ]
    if wrong:
        shard, count = wrong[0]
        raise DataError(
            f"data: {shard.name} holds {shard.samples:,} samples, its sizes.json says {count:,} ({len(wrong)} of "
            f"{len(manifest.shards)} shards differ). Fetch these shards again, or correct or delete sizes.json"
        )
    return manifest


def told_sizes(urls: Sequence[str]) -> dict[str, int]:
    """Return what ``sizes.json`` beside the shards says of them, by URL."""
    told: dict[str, Mapping[str, int]] = {}
    found = {}
    for url in urls:
        name = shard_name(url)
        folder = url[: -len(name)]
        if folder not in told:
            told[folder] = _sizes_json(folder + "sizes.json")
        if name in told[folder]:
            found[url] = told[folder][name]
    return found


def _sizes_json(url: str) -> Mapping[str, int]:
    try:
        text = read_whole(url, _SIZES_BYTES)
    except OSError:  # none there
        return {}
    try:
        sizes = json.loads(text)
        return {str(name): int(count) for name, count in sizes.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"data: {url} is not a table of shard names and counts: {error}") from error


def notices(manifest: Manifest) -> list[str]:
    """Return what a person should know of these shards, one line each."""
    shards, lines = manifest.shards, list[str]()

    def odd(kind: str, words: str, hint: str = "") -> None:
        if count := sum(getattr(shard.notes, kind) for shard in shards):
            worst = max(shards, key=lambda shard: int(getattr(shard.notes, kind)))
            examples = ", ".join(getattr(worst.notes, f"{kind}_examples"))
            lines.append(f"data: {count:,} {words} ({worst.name}: {examples}){hint}")

    empty = [shard.name for shard in shards if shard.samples == 0]
    if empty:
        lines.append(f"data: {len(empty)} of {len(shards)} shards are empty ({listed(empty, limit=EXAMPLES)})")
    by_key = ". Members of a sample stand side by side and share their name up to the first dot"
    odd("imageless", "keys have no image and are left out", by_key)
    odd("repeated", "members have the name of an earlier one")
    unmarked = [shard.name for shard in shards if shard.stamp.startswith(UNMARKED)]
    if unmarked:
        lines.append(
            f"data: {len(unmarked):,} of {len(shards):,} shards come without ETag and time of change, so that each run "
            f"indexes and fetches them anew ({listed(unmarked, limit=EXAMPLES)})"
        )
    odd("bare", "images have no captions")
    return lines
