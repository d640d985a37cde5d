"""The manifest: where every sample of a list of shards lies, as memory-mapped columns made by one scan.

27 million samples are two columns (8 + 4 bytes each), never Python objects. A cached manifest is one
file, replaced as a whole; shards whose size or time changed are scanned again, the others are kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cosmos_ssl.data.scan import EXAMPLES, Notes, Scan, expand, pool, scan
from cosmos_ssl.data.storage import Stat, cache_root, fetch, is_local, is_writable, local_path, lock, shard_name, stat, written_whole
from cosmos_ssl.errors import DataError

_MAGIC = b"cosmos-manifest-1\n"

Progress = Callable[[int, int], None]
"""Called with shards done and shards in all."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard: its URL, its size in bytes and stamp, its samples, and what was odd in it."""

    url: str
    size: int
    stamp: str
    samples: int
    notes: Notes

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return shard_name(self.url)


class Manifest:
    """The columns of a list of shards. Pickled copies map the file again."""

    def __init__(self, shards: Sequence[Shard], offsets: NDArray[np.int64], lengths: NDArray[np.uint32], path: Path | None = None) -> None:
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
            return Manifest.open, (self.path, [s.url for s in self.shards])
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
    def open(cls, path: Path, urls: Sequence[str]) -> Self:
        """Map a manifest file. Raises OSError or ValueError where there is none of this form for these shards."""
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise ValueError(f"{path} is no manifest")
            head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            start = -(-file.tell() // 64) * 64
        if [shard_name(url) for url in urls] != [row["name"] for row in head]:
            raise ValueError(f"{path} is of other shards")
        shards = [Shard(url, row["size"], row["stamp"], row["samples"], Notes(**row["notes"])) for url, row in zip(urls, head, strict=True)]
        count = sum(shard.samples for shard in shards)
        if count == 0:
            return cls(shards, np.empty(0, np.int64), np.empty(0, np.uint32), path)
        offsets = np.memmap(path, np.int64, "r", start, (count,))
        lengths = np.memmap(path, np.uint32, "r", start + 8 * count, (count,))
        return cls(shards, offsets, lengths, path)

    def save(self, path: Path) -> None:
        """Write the manifest under a temporary name, then rename it."""
        head = json.dumps(
            [{"name": s.name, "size": s.size, "stamp": s.stamp, "samples": s.samples, "notes": asdict(s.notes)} for s in self.shards]
        ).encode()
        lead = _MAGIC + len(head).to_bytes(8, "little") + head
        with written_whole(path) as file:
            file.write(lead + bytes(-len(lead) % 64))
            file.write(np.ascontiguousarray(self._offsets).data)
            file.write(np.ascontiguousarray(self._lengths).data)

    def part(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
        """Offsets and lengths of the samples of one shard."""
        end = int(self._ends[number])
        span = slice(end - int(self.sizes[number]), end)
        return self._offsets[span], self._lengths[span]


def load_manifest(urls: str | Sequence[str], *, cache_dir: str | Path | None = None, progress: Progress | None = None) -> Manifest:
    """The manifest of these shards: from its cache, or by a scan of what is new or changed, under a lock.

    The cache lies in ``cache_dir``; by default beside the first shard, and in the user's cache folder where that
    cannot be written. Raises DataError for missing, cut, damaged or miscounted shards and where there is no sample
    at all, OSError where storage fails.
    """
    names = expand(urls)
    stats = _stat_all(names)
    places = _places(names, cache_dir)
    for path in places:
        cached = _fresh(path, names, stats)
        if cached is not None:
            return _checked(cached)
    writable = [path for path in places if is_writable(path.parent)]
    if not writable:
        return _checked(_scan_all(names, stats, None, progress))
    path = writable[0]
    with lock(path.with_suffix(".lock")):
        manifest = _fresh(path, names, stats)
        if manifest is None:
            manifest = _scan_all(names, stats, path, progress)
            manifest.save(path)
            manifest = Manifest.open(path, names)
    return _checked(manifest)


def is_indexed(urls: str | Sequence[str], *, cache_dir: str | Path | None = None) -> bool:
    """Whether ``load_manifest`` would find a cached manifest, or fail at once because shards are missing."""
    names = expand(urls)
    try:
        stats = _stat_all(names)
    except DataError:
        return True
    return any(_fresh(path, names, stats) is not None for path in _places(names, cache_dir))


def check_shards(urls: str | Sequence[str]) -> None:
    """Raise DataError unless all local shards, and of those on other storage the first, are there. Raises OSError where storage fails."""
    names = expand(urls)
    remote = [url for url in names if not is_local(url)]
    _stat_all([url for url in names if is_local(url)] + remote[:1])


def _stat_all(urls: Sequence[str]) -> list[Stat]:
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


def _places(urls: Sequence[str], cache_dir: str | Path | None) -> list[Path]:
    """Where a manifest may lie, best first. Beside the shards its name survives a move of the folder."""
    by_url = f"manifest-{hashlib.sha256(chr(10).join(urls).encode()).hexdigest()[:16]}.bin"
    if cache_dir is not None:
        return [Path(cache_dir).expanduser() / by_url]
    places = [cache_root() / "manifests" / by_url]
    if is_local(urls[0]):
        by_name = hashlib.sha256("\n".join(map(shard_name, urls)).encode()).hexdigest()[:16]
        places.insert(0, local_path(urls[0]).absolute().parent / ".cosmos_ssl" / f"manifest-{by_name}.bin")
    return places


def _fresh(path: Path, urls: Sequence[str], stats: Sequence[Stat]) -> Manifest | None:
    """The cached manifest if it is of these shards as they are now."""
    try:
        manifest = Manifest.open(path, urls)
    except (OSError, ValueError):
        return None
    same = all(s.size == found.size and s.stamp == found.stamp for s, found in zip(manifest.shards, stats, strict=True))
    return manifest if same else None


def _scan_all(urls: Sequence[str], stats: Sequence[Stat], path: Path | None, progress: Progress | None) -> Manifest:
    """Scan every shard that the manifest at ``path`` does not know as it is now."""
    try:
        known: Manifest | None = Manifest.open(path, urls) if path is not None else None
    except (OSError, ValueError):
        known = None
    found: dict[int, Scan] = {}
    if known is not None:
        for i, (shard, now) in enumerate(zip(known.shards, stats, strict=True)):
            if shard.size == now.size and shard.stamp == now.stamp:
                found[i] = Scan(*known.part(i), shard.notes)
    todo = [i for i in range(len(urls)) if i not in found]
    with pool(len(todo), processes=len(todo) >= 64 and is_local(urls[0])) as executor:
        for done, (i, result) in enumerate(
            zip(todo, executor.map(scan, [urls[i] for i in todo], [stats[i].size for i in todo]), strict=True)
        ):
            found[i] = result
            if progress is not None:
                progress(done + 1, len(todo))
    cut = [(urls[i], found[i].fault) for i in sorted(found) if found[i].fault]
    if cut:
        raise DataError(_cut_words(cut, len(urls)))
    shards = [
        Shard(url, s.size, s.stamp, len(found[i].offsets), found[i].notes) for i, (url, s) in enumerate(zip(urls, stats, strict=True))
    ]
    order = range(len(urls))
    return Manifest(shards, np.concatenate([found[i].offsets for i in order]), np.concatenate([found[i].lengths for i in order]))


def _cut_words(cut: Sequence[tuple[str, str]], total: int) -> str:
    shown = ", ".join(f"{shard_name(url)}: {fault}" for url, fault in cut[:EXAMPLES]) + (", ..." if len(cut) > EXAMPLES else "")
    return f"data: {len(cut)} of {total} shards are cut short or damaged ({shown}). Fetch them again; 'cosmos-ssl data check' lists all"


def _checked(manifest: Manifest) -> Manifest:
    """Raise DataError where there is no sample, or ``sizes.json`` beside the shards disagrees."""
    empty = [shard for shard in manifest.shards if shard.samples == 0]
    if len(manifest) == 0:
        what = "hold no image" if any(shard.notes.keys for shard in empty) else "are empty"
        names = ", ".join(shard.name for shard in empty[:EXAMPLES]) + (", ..." if len(empty) > EXAMPLES else "")
        raise DataError(f"data: no samples: all {len(empty)} shards {what} ({names})")
    told = told_sizes([s.url for s in manifest.shards])
    wrong = [(s, told[s.url]) for s in manifest.shards if s.url in told and told[s.url] not in (s.samples, s.notes.keys)]
    if wrong:
        shard, count = wrong[0]
        raise DataError(
            f"data: {shard.name} holds {shard.samples:,} samples, its sizes.json says {count:,} ({len(wrong)} of {len(manifest.shards)}"
            " shards differ). Fetch these shards again, or correct or delete sizes.json"
        )
    return manifest


def told_sizes(urls: Sequence[str]) -> dict[str, int]:
    """What ``sizes.json`` beside the shards says of them, by URL."""
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
        size = stat(url).size
        text = local_path(url).read_bytes() if is_local(url) else fetch(url, 0, size)
    except OSError:  # none there
        return {}
    try:
        sizes = json.loads(text)
        return {str(name): int(count) for name, count in sizes.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"data: {url} is not a table of shard names and counts: {error}") from error


def notices(manifest: Manifest) -> list[str]:
    """What a person should know of these shards, one line each."""
    lines = []
    empty = [s.name for s in manifest.shards if s.samples == 0]
    if empty:
        lines.append(f"data: {len(empty)} of {len(manifest.shards)} shards are empty ({', '.join(empty[:EXAMPLES])})")
    imageless = sum(s.notes.imageless for s in manifest.shards)
    bare = sum(s.notes.bare for s in manifest.shards)
    if imageless:
        shard = max(manifest.shards, key=lambda s: s.notes.imageless)
        lines.append(
            f"data: {imageless:,} keys have no image and are left out ({shard.name}: {', '.join(shard.notes.imageless_examples)})."
            " Members of a sample stand side by side and share their name up to the first dot"
        )
    if bare:
        shard = max(manifest.shards, key=lambda s: s.notes.bare)
        lines.append(f"data: {bare:,} images have no captions ({shard.name}: {', '.join(shard.notes.bare_examples)})")
    return lines
