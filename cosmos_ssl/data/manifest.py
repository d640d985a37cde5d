"""The manifest: where every sample of a list of shards lies, as memory-mapped columns made by one scan.

27 million samples are two columns (8 + 4 bytes each), never Python objects. A cached manifest is one file, replaced as
a whole; shards whose size or times changed are scanned again, the others are kept. A scan also hashes some of what each
shard holds: other pictures under the same names and sizes are another data set, copied files the same.
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
from cosmos_ssl.data.storage import (
    BLOCK_BYTES,
    UNMARKED,
    Reader,
    Stat,
    cache_root,
    first_writable,
    is_local,
    local_path,
    lock,
    read_whole,
    shard_name,
    stat,
)
from cosmos_ssl.errors import DataError, listed
from cosmos_ssl.files import check_seal, seal, written_whole
from cosmos_ssl.functional.pulse import alive

_MAGIC = b"cosmos-manifest-2\n"
_SIZES_BYTES = 1 << 28

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
    content: str = ""
    """Hash of some of its bytes."""
    full_hash: str = ""
    """SHA-256 of all of them, where that was asked for."""

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return shard_name(self.url)


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
            return _reopened, (self.path, [s.url for s in self.shards])
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
        if verify:
            check_seal(path)
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise ValueError(f"{path} is no manifest")
            head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            start = -(-file.tell() // 64) * 64
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
        head = json.dumps([{key: value for key, value in row.items() if key != "url"} for row in rows]).encode()
        lead = _MAGIC + len(head).to_bytes(8, "little") + head
        with written_whole(path) as file:
            file.write(lead + bytes(-len(lead) % 64))
            file.write(np.ascontiguousarray(self._offsets).data)
            file.write(np.ascontiguousarray(self._lengths).data)
            seal(file)

    def part(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
        """Offsets and lengths of the samples of one shard."""
        end = int(self._ends[number])
        span = slice(end - int(self.sizes[number]), end)
        return self._offsets[span], self._lengths[span]


def _reopened(path: Path, urls: Sequence[str]) -> Manifest:
    return Manifest.open(path, urls, verify=False)


def load_manifest(
    urls: str | Sequence[str],
    *,
    cache_dir: str | Path | None = None,
    full_hash: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """The manifest of these shards: from its cache, or by a scan of what is new or changed, under a lock.

    The cache lies in ``cache_dir``; by default beside the first shard, and in the user's cache folder where that is
    another user's or cannot be written. With ``full_hash`` every byte of each shard is hashed, now and whenever it
    changes. Raises DataError for missing, cut, damaged or miscounted shards and where there is no sample at all,
    OSError where storage fails.
    """
    progress = progress or alive
    names = expand(urls)
    stats = stat_all(names)
    places = _places(names, cache_dir)
    for path in places:
        cached = _fresh(path, names, stats, full_hash)
        if cached is not None:
            return _checked(cached)
    kept = first_writable(places)
    if kept is None:
        return _checked(_scan_all(names, stats, None, full_hash, progress))
    with lock(kept.with_suffix(".lock")):
        manifest = _fresh(kept, names, stats, full_hash)
        if manifest is None:
            manifest = _scan_all(names, stats, kept, full_hash, progress)
            manifest.save(kept)
            manifest = Manifest.open(kept, names)
    return _checked(manifest)


def is_indexed(urls: str | Sequence[str], *, cache_dir: str | Path | None = None) -> bool:
    """Whether ``load_manifest`` would find a cached manifest, or fail at once because shards are missing."""
    names = expand(urls)
    try:
        stats = stat_all(names)
    except DataError:
        return True
    if any(found.stamp.startswith(UNMARKED) for found in stats):  # each run has to index these for itself
        return True
    return any(_fresh(path, names, stats) is not None for path in _places(names, cache_dir))


def check_shards(urls: str | Sequence[str]) -> None:
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
    """Where a manifest may lie, best first. Beside the shards its name survives a move of the folder."""
    by_url = f"manifest-{_name_digest(urls)}.bin"
    if cache_dir is not None:
        return [Path(cache_dir).expanduser() / by_url]
    places = [cache_root() / "manifests" / by_url]
    if is_local(urls[0]):
        by_name = _name_digest([shard_name(url) for url in urls])
        places.insert(0, local_path(urls[0]).absolute().parent / ".cosmos_ssl" / f"manifest-{by_name}.bin")
    return places


def _name_digest(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _fresh(path: Path, urls: Sequence[str], stats: Sequence[Stat], full_hash: bool = False) -> Manifest | None:
    """The cached manifest if it is of these shards as they are now."""
    try:
        manifest = Manifest.open(path, urls)
    except (OSError, ValueError):
        return None
    same = all(s.size == found.size and s.stamp == found.stamp for s, found in zip(manifest.shards, stats, strict=True))
    return manifest if same and all(shard.full_hash or not full_hash for shard in manifest.shards) else None


def _scan_all(
    urls: Sequence[str], stats: Sequence[Stat], path: Path | None, full_hash: bool, progress: Progress | None
) -> Manifest:
    """Scan every shard that the manifest at ``path`` does not know as it is now; hash it whole if that was ever asked
    for.
    """
    try:
        known: Manifest | None = Manifest.open(path, urls) if path is not None else None
    except (OSError, ValueError):
        known = None
    found: dict[int, Scan] = {}
    hashes: dict[int, str] = {}
    if known is not None:
        full_hash = full_hash or any(shard.full_hash for shard in known.shards)
        for i, (shard, now) in enumerate(zip(known.shards, stats, strict=True)):
            if shard.size == now.size and shard.stamp == now.stamp:
                found[i] = Scan(*known.part(i), shard.notes, content=shard.content)
                hashes[i] = shard.full_hash
    todo = [i for i in range(len(urls)) if i not in found]
    unhashed = [i for i in range(len(urls)) if full_hash and not hashes.get(i)]
    total = len(todo) + len(unhashed)
    with pool(len(todo), processes=len(todo) >= 64 and is_local(urls[0])) as executor:
        scans = executor.map(scan, [urls[i] for i in todo], [stats[i].size for i in todo])
        for done, (i, result) in enumerate(zip(todo, scans, strict=True), 1):
            found[i] = result
            if progress is not None:
                progress(done, total)
    cut = [(urls[i], found[i].fault) for i in sorted(found) if found[i].fault]
    if cut:
        raise DataError(_cut_words(cut, len(urls)))
    with pool(len(unhashed), processes=False) as executor:  # threads: hashing and reading leave the interpreter
        digests = executor.map(_full_hash, [urls[i] for i in unhashed], [stats[i] for i in unhashed])
        for done, (i, digest) in enumerate(zip(unhashed, digests, strict=True), len(todo) + 1):
            hashes[i] = digest
            if progress is not None:
                progress(done, total)
    order = range(len(urls))
    shards = [
        Shard(urls[i], *stats[i], len(found[i].offsets), found[i].notes, found[i].content, hashes.get(i, ""))
        for i in order
    ]
    return Manifest(
        shards, np.concatenate([found[i].offsets for i in order]), np.concatenate([found[i].lengths for i in order])
    )


def _full_hash(url: str, found: Stat) -> str:
    digest, reader = hashlib.sha256(), Reader()
    for start in range(0, found.size, BLOCK_BYTES):
        digest.update(reader.read(url, found, start, min(BLOCK_BYTES, found.size - start)))
    return digest.hexdigest()


def _cut_words(cut: Sequence[tuple[str, str]], total: int) -> str:
    shown = listed((f"{shard_name(url)}: {fault}" for url, fault in cut), limit=EXAMPLES)
    return (
        f"data: {len(cut)} of {total} shards are cut short or damaged ({shown}). Fetch them again; "
        "'cosmos-ssl data check' lists all"
    )


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
            f"{len(manifest.shards)}"
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
        text = read_whole(url, _SIZES_BYTES)
    except OSError:  # none there
        return {}
    try:
        sizes = json.loads(text)
        return {str(name): int(count) for name, count in sizes.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"data: {url} is not a table of shard names and counts: {error}") from error


def notices(manifest: Manifest) -> list[str]:
    """What a person should know of these shards, one line each."""
    lines = []
    empty = [s.name for s in manifest.shards if s.samples == 0]
    if empty:
        lines.append(f"data: {len(empty)} of {len(manifest.shards)} shards are empty ({listed(empty, limit=EXAMPLES)})")
    imageless = sum(s.notes.imageless for s in manifest.shards)
    bare = sum(s.notes.bare for s in manifest.shards)
    if imageless:
        shard = max(manifest.shards, key=lambda s: s.notes.imageless)
        lines.append(
            f"data: {imageless:,} keys have no image and are left out ({shard.name}: "
            f"{', '.join(shard.notes.imageless_examples)})."
            " Members of a sample stand side by side and share their name up to the first dot"
        )
    repeated = sum(s.notes.repeated for s in manifest.shards)
    if repeated:
        shard = max(manifest.shards, key=lambda s: s.notes.repeated)
        lines.append(
            f"data: {repeated:,} members have the name of an earlier one ({shard.name}: "
            f"{', '.join(shard.notes.repeated_examples)})"
        )
    unmarked = [s.name for s in manifest.shards if s.stamp.startswith(UNMARKED)]
    if unmarked:
        lines.append(
            f"data: {len(unmarked):,} of {len(manifest.shards):,} shards come without ETag and time of change, "
            "so that each run indexes and"
            f" fetches them anew ({listed(unmarked, limit=EXAMPLES)})"
        )
    if bare:
        shard = max(manifest.shards, key=lambda s: s.notes.bare)
        lines.append(f"data: {bare:,} images have no captions ({shard.name}: {', '.join(shard.notes.bare_examples)})")
    return lines
