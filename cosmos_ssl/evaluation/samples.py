"""What is evaluated on, by index: shards or a folder; read ahead by threads, shared among ranks, gathered."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from cosmos_ssl.api import BadSample, DataError, FileBacked, Sample, UserError
from cosmos_ssl.data import Shards, TableData, expand, open_shards
from cosmos_ssl.data.folder import Folder, picture_folder, similar, splits_of
from cosmos_ssl.data.scan import cores, spread
from cosmos_ssl.data.storage import is_local, local_path, stat
from cosmos_ssl.data.table import is_table, tables_of
from cosmos_ssl.errors import did_you_mean
from cosmos_ssl.functional import gather_objects, rank, world_size
from cosmos_ssl.identity import fingerprint

K = TypeVar("K")
T = TypeVar("T")

CLASS_FILES = ("classes.txt", "classnames.txt")
"""Files beside samples in which class names are sought, one a line (clip-benchmark's sets have the second)."""
_AHEAD = 2  # batches that are read while one is encoded
_STATS = 16  # files that are looked at together
_LOOKED_AT = 16


class Samples(Protocol):
    """What is evaluated on: shards, a folder, or a reader of a known layout."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Sample:
        """Sample ``index``. Raises BadSample for a faulty one, OSError where storage fails."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """Return what makes this set this set."""
        ...


class EvaluationData:
    """Shards of an evaluator, or a folder of pictures, indexed when first read.

    ``given`` is what the user names and ``fallback`` what the training set knows of; ``option`` is the key that a
    message names. Of a folder that holds ``train`` and ``val`` (or ``test``) the first is read as ``train_data``, else
    the second. Where this and ``numbered_by`` are folders, a class has the number that it has there, whichever classes
    this one holds.
    """

    def __init__(
        self,
        given: str | Sequence[str] | None,
        *,
        fallback: str | None = None,
        option: str = "data",
        numbered_by: EvaluationData | None = None,
    ) -> None:
        self.urls: str | Sequence[str] = given or fallback or ()
        self.option = option
        self._numbered_by = numbered_by

    @cached_property
    def samples(self) -> Shards | Folder | TableData:
        """The shards, the folder or the table. Raises DataError."""
        if is_table(self.urls):
            return TableData(self._table)
        folder = self._split
        if folder is None:
            return open_shards(self.urls)
        return Folder(folder, classes=None if self._numbered_by is None else self._numbered_by.class_names or None)

    @property
    def _table(self) -> str | Sequence[str]:
        """The tables that are read: of a folder that was saved with its splits, one."""
        name = self.urls if isinstance(self.urls, str) else "".join(self.urls[:1])
        splits = splits_of(local_path(name)) if is_local(name) else None
        return self.urls if splits is None else str(splits[0 if self.option == "train_data" else 1])

    @property
    def _split(self) -> Path | None:
        """The folder of pictures that is read, or None for shards. Raises DataError."""
        folder = picture_folder(self.urls)
        splits = splits_of(folder) if folder is not None else None
        return folder if splits is None else splits[0 if self.option == "train_data" else 1]

    @property
    def class_file(self) -> Path | None:
        """The file of class names beside the shards or in the folder (or above its split), if there is one."""
        if is_table(self.urls):
            above: Path | None = tables_of(self._table)[0].parent
        else:
            above = picture_folder(self.urls)
        places = [Path(expand(self.urls)[0]).parent] if above is None else dict.fromkeys((self._split or above, above))
        return next((path for place in places for name in CLASS_FILES if (path := place / name).is_file()), None)

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the class folders, in the order of their numbers; none for shards and for pictures in one folder."""
        return self.samples.class_names if isinstance(self.samples, Folder) else ()

    def check(self, *, label: str | None = None, texts: str | None = None) -> None:
        """Raise DataError where there is no data, local shards are missing or a folder cannot be used.

        Of what lies here also where a few samples have no ``label``, or none of them ``texts``.
        """
        if not self.urls:
            told = "name the shards or the folder to evaluate on, since the training data has no validation data"
            raise DataError(f"{self.option}: {told}")
        missing: list[str] = []
        seen: list[Sample] = []
        try:
            folder = picture_folder(self.urls)
            table = is_table(self.urls)
            local = [url for url in expand(self.urls) if "://" not in url] if folder is None and not table else []
            missing = [url for url in local if not Path(url).exists()]
            if not missing and (local or folder is not None or table):
                seen = self._few()
            for sample in seen if label is not None else ():
                label_of(sample, label or "")
        except DataError as error:
            raise DataError(f"{self.option}: {str(error).removeprefix('data: ')}") from error
        if missing:
            more = f" and {len(missing) - 1} more do" if len(missing) > 1 else " does"
            told = f"{missing[0]}{more} not exist.{similar(Path(missing[0]))}".removesuffix(".")
            raise DataError(f"{self.option}: {told}")
        if texts is not None and seen and not any(sample.captions.get(texts) for sample in seen):
            raise no_texts(seen[0].key, texts, seen[0].captions)

    def picture(self, place: int, background: str) -> Tensor:
        """The picture of sample ``place`` on ``background``, uint8 [3, H, W]."""
        return self.samples.read(place).on(background).decode()

    def _few(self) -> list[Sample]:
        """Evenly spread samples; bad ones are left out, as when all are read."""
        found = []
        for index in range(0, len(self.samples), max(1, len(self.samples) // _LOOKED_AT)):
            with suppress(BadSample):
                found.append(self.samples.read(index))
        return found

    @property
    def name(self) -> str:
        """What messages call it: the path, or the first of several."""
        return self.urls if isinstance(self.urls, str) else next(iter(self.urls), self.option)


class Sources:
    """Sizes, times and contents of the files that samples are read from, as they were when each was first looked at;
    threads may share one.

    A part's own data set that is not ``FileBacked`` has none.
    """

    def __init__(self, data: Samples) -> None:
        self._data = data
        self._of: Callable[[int], Sequence[str]] = data.sources if isinstance(data, FileBacked) else lambda index: ()
        self._seen: dict[str, str] = {}

    def stamp(self, index: int) -> list[str]:
        """Of each file of one sample."""
        urls = self._of(index)
        for url in urls:
            if url not in self._seen:
                self._seen[url] = _stamp(url)
        return [self._seen[url] for url in urls]

    def changed(self) -> list[str]:
        """The files that are no longer as they were."""
        return [url for (url, was), now in zip(self._seen.items(), _stamps(self._seen), strict=True) if now != was]

    def digest(self) -> str:
        """Of all files as they are now."""
        shards = self._data.manifest.shards if isinstance(self._data, Shards) else None
        every = (
            (url for n in range(len(self._data)) for url in self._of(n))
            if shards is None
            else (shard.url for shard in shards)
        )
        found = hashlib.sha256()
        for stamp in _stamps(every):
            found.update(stamp.encode() + b"\n")
        return found.hexdigest()[:16]


def _stamps(urls: Iterable[str]) -> Iterator[str]:
    left = iter(urls)
    with ThreadPoolExecutor(_STATS) as threads:  # each is waited for on a network file system
        while some := list(islice(left, 4096)):
            yield from threads.map(_stamp, some)


def _stamp(url: str) -> str:
    """Size and time of a file, and of one of this machine a hash of its contents; nothing where there is none."""
    try:
        told = " ".join(map(str, stat(url)))
        return f"{told} {fingerprint(str(local_path(url)))}" if is_local(url) else told
    except (OSError, DataError):
        return ""


def read_ahead(
    batches: Iterable[tuple[K, Sequence[Any]]], load: Callable[[Any], T], workers: int
) -> Generator[tuple[K, list[T]]]:
    """Each batch's key, and what ``load`` makes of its indices, in order; ``workers`` threads are two batches ahead."""
    threads = ThreadPoolExecutor(workers)
    started = ((key, [threads.submit(load, index) for index in indices]) for key, indices in batches)
    try:
        ahead = deque(islice(started, _AHEAD))
        while ahead:
            ahead.extend(islice(started, 1))
            key, futures = ahead.popleft()
            yield key, [future.result() for future in futures]
    finally:
        threads.shutdown(cancel_futures=True)


def threads_of_this_process() -> int:
    """Threads that decode where nothing else is asked for."""
    return min(8, cores())


def evenly_spread(count: int, wanted: int | None) -> Sequence[int]:
    """The places of ``wanted`` among ``count`` samples; None, or more than there are, is all."""
    return spread(count, count if wanted is None else wanted)


def share(items: Sequence[T]) -> Sequence[T]:
    """This rank's share of ``items``, which are the same on all ranks: shares in rank order are the whole in order."""
    return items[rank() * len(items) // world_size() : (rank() + 1) * len(items) // world_size()]


def items_of_all(items: Sequence[T]) -> list[T]:
    """Return what all ranks have found in their shares, in order."""
    return [item for theirs in gather_objects(list(items)) for item in theirs]


def check_set(wanted: str | None, sets: Sequence[str]) -> None:
    """Raise UserError for a set that is none of ``sets``."""
    if wanted is not None and wanted not in sets:
        raise UserError(f"--set: no set named '{wanted}'.{did_you_mean(wanted, sets)} Sets: {', '.join(sets)}")


def only_set(found: Mapping[str, T], several: str) -> tuple[str, T] | None:
    """The one set that was found, if any. Raises DataError, which says ``several``, where there are more."""
    if len(found) > 1:
        raise DataError(f"data: {several}. Say which, such as --set {min(found)}. They are: {', '.join(sorted(found))}")
    return next(iter(found.items()), None)


def no_texts(key: str, texts: str, there: Iterable[str]) -> DataError:
    """Return what is raised where no sample has the texts that were asked for."""
    return DataError(f"texts: samples such as {key} have no texts '{texts}'. They have: {', '.join(there) or 'none'}")


def label_of(sample: Sample, name: str) -> object:
    """The label ``name`` of a sample: a member of its own, or a key of its JSON. Raises DataError without one."""
    table = sample.extras.get("json") or {}
    if name in sample.extras and name != "json":
        return sample.extras[name]
    if name not in table:
        there = sorted({*sample.extras, *table} - {"json"})
        raise DataError(f"sample {sample.key} has no label '{name}'. It has: {', '.join(there) or 'none'}")
    return table[name]


def class_of(sample: Sample, name: str) -> Hashable:
    """The label ``name`` of a sample, of which there are few.

    Raises DataError without one, and for a list or a table.
    """
    label = label_of(sample, name)
    if not isinstance(label, Hashable):
        raise DataError(f"{name}: sample {sample.key} has a list or a table where a label is due")
    return label


def check_positive(**sizes: float | None) -> None:
    """Raise ValueError for an option that is given and not above zero."""
    for name, size in sizes.items():
        if size is not None and not size > 0:
            raise ValueError(f"{name}: {size:g} is not above zero")
