"""The samples that evaluators work on: shards or a folder read, decoded and brought to size by a few threads."""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from cosmos_ssl.api import BadSample, DataError, Encoder, Sample
from cosmos_ssl.data import Shards, expand, open_shards
from cosmos_ssl.data.folder import Folder, picture_folder, similar
from cosmos_ssl.functional import gather_objects, rank, world_size

T = TypeVar("T")

_AHEAD = 2  # batches that are decoded while one is encoded
_log = logging.getLogger("cosmos_ssl.evaluation")


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples that could be decoded, and their normalised pictures [B, 3, H, W]."""

    samples: Sequence[Sample]
    pixels: Tensor
    indices: Sequence[int]
    """Where the samples lie in the data, for reading them again."""


class EvaluationData:
    """Shards of an evaluator, or a folder of pictures, indexed when first read.

    ``given`` is what the user names and ``fallback`` what the training set knows of; ``option`` is the key that a message
    names. ``max_samples`` takes evenly spread ones. Where this and ``numbered_by`` are folders, a class has the number that it
    has there, whichever classes this one holds.
    """

    def __init__(
        self,
        given: str | Sequence[str] | None,
        *,
        fallback: str | None = None,
        option: str = "data",
        workers: int | None = None,
        max_samples: int | None = None,
        numbered_by: EvaluationData | None = None,
    ) -> None:
        if max_samples is not None and max_samples < 1:
            raise ValueError(f"max_samples: {max_samples} is not above zero")
        if workers is not None and workers < 1:
            raise ValueError(f"workers: {workers} is not above zero")
        self.urls: str | Sequence[str] = given or fallback or ()
        self.option = option
        self.workers = workers or min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        self.max_samples = max_samples
        self._numbered_by = numbered_by

    @cached_property
    def samples(self) -> Shards | Folder:
        """The shards or the folder. Raises DataError."""
        folder = picture_folder(self.urls)
        if folder is None:
            return open_shards(self.urls)
        return Folder(folder, classes=None if self._numbered_by is None else self._numbered_by.class_names or None)

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the classes of a folder, in the order of their numbers; none for shards and for a folder without class folders."""
        return self.samples.class_names if isinstance(self.samples, Folder) else ()

    def check(self, *, label: str | None = None) -> None:
        """Raise DataError where there is no data, or local shards are missing; of a folder, where it cannot be used or has no ``label``."""
        if not self.urls:
            raise DataError(f"{self.option}: name the shards or the folder to evaluate on, since the training data has no validation data")
        try:
            if picture_folder(self.urls) is not None:
                sample = self.samples.read(0)
                if label is not None:
                    label_of(sample, label)
                return
            missing = [url for url in expand(self.urls) if "://" not in url and not Path(url).exists()]
        except DataError as error:
            raise DataError(f"{self.option}: {str(error).removeprefix('data: ')}") from error
        if missing:
            more = f" and {len(missing) - 1} more do" if len(missing) > 1 else " does"
            raise DataError(f"{self.option}: {missing[0]}{more} not exist.{similar(Path(missing[0]))}".removesuffix("."))

    @property
    def folder(self) -> Path:
        """The folder of pictures, or that of the first shard."""
        return picture_folder(self.urls) or Path(expand(self.urls)[0]).parent

    def read(self, index: int) -> Sample:
        """Sample ``index``."""
        return self.samples.read(index)

    def batches(self, encoder: Encoder, batch_size: int) -> Iterator[Batch]:
        """This rank's share of the samples, in order; bad ones are left out and told of. Raises DataError if none is left on any rank."""
        count = len(self.samples)
        chosen = range(count)
        if self.max_samples is not None and self.max_samples < count:
            chosen = np.linspace(0, count - 1, self.max_samples).round().astype(int).tolist()
        bad: Counter[str] = Counter()
        found = 0
        for batch in _decoded(self.samples, _share(chosen), encoder.preprocess, batch_size, self.workers, bad):
            found += len(batch.samples)
            yield batch
        bad = sum(gather_objects(bad), Counter())
        if bad:
            reasons = ", ".join(f"{number} {reason}" for reason, number in bad.most_common())
            _log.warning("%s: %d of %d samples left out of the evaluation (%s)", self._name, bad.total(), len(chosen), reasons)
        if not sum(gather_objects(found)):
            raise DataError(f"{self._name}: not one picture can be used. Run: cosmos-ssl data check")

    @property
    def _name(self) -> str:
        return self.urls if isinstance(self.urls, str) else self.urls[0]


def _decoded(
    data: Shards | Folder, chosen: Sequence[int], preprocess: Callable[[Tensor], Tensor], batch_size: int, workers: int, bad: Counter[str]
) -> Iterator[Batch]:
    """Batches of decoded samples; threads work a little ahead. Reasons of bad samples are counted in ``bad``."""

    def load(index: int) -> tuple[Sample, Tensor] | str:
        try:
            sample = data.read(index)
            return sample, preprocess(sample.decode())
        except BadSample as error:
            return error.reason

    threads = ThreadPoolExecutor(workers)
    ahead: deque[tuple[Sequence[int], list[Future[tuple[Sample, Tensor] | str]]]] = deque()
    starts = iter(range(0, len(chosen), batch_size))
    try:
        while True:
            while len(ahead) <= _AHEAD and (start := next(starts, None)) is not None:
                part = chosen[start : start + batch_size]
                ahead.append((part, [threads.submit(load, index) for index in part]))
            if not ahead:
                return
            part, futures = ahead.popleft()
            results = [(index, future.result()) for index, future in zip(part, futures, strict=True)]
            bad.update(result for _, result in results if isinstance(result, str))
            good = [(index, *result) for index, result in results if not isinstance(result, str)]
            if good:
                indices, samples, pixels = zip(*good, strict=True)
                yield Batch(samples, torch.stack(pixels), indices)
    finally:
        threads.shutdown(cancel_futures=True)


def encode_texts(encoder: Encoder, texts: Sequence[str], batch_size: int, *, to_match: bool = False) -> Tensor:
    """Strings -> unit features [n, D] on the encoder's device; ``to_match``: what ``encoder.match`` takes, [n, ...]."""
    encode = encoder.match_text if to_match else encoder.encode_text
    own = _share(texts)
    starts = range(0, len(own), batch_size)
    return rows_of_all([encode(encoder.tokenize(own[start : start + batch_size])) for start in starts], encoder.device)


def _share(items: Sequence[T]) -> Sequence[T]:
    """This rank's share of ``items``, which are the same on all ranks: shares in rank order are the whole in order."""
    return items[rank() * len(items) // world_size() : (rank() + 1) * len(items) // world_size()]


def items_of_all(items: list[T]) -> list[T]:
    """What all ranks have found in their shares, in order."""
    return [item for theirs in gather_objects(items) for item in theirs]


def rows_of_all(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    """The rows that all ranks have computed, in order, on ``device``; some ranks may have none."""
    if world_size() == 1:
        return torch.cat(list(parts))
    own = torch.cat(list(parts)).cpu() if parts else None
    return torch.cat([rows for rows in gather_objects(own) if rows is not None]).to(device)


def label_of(sample: Sample, name: str) -> object:
    """The label ``name`` of a sample: a member of its own, or a key of its JSON. Raises DataError without one."""
    table = sample.extras.get("json") or {}
    if name in sample.extras and name != "json":
        return sample.extras[name]
    if name not in table:
        there = sorted({*sample.extras, *table} - {"json"})
        raise DataError(f"sample {sample.key} has no label '{name}'. It has: {', '.join(there) or 'none'}")
    return table[name]


def check_positive(**sizes: float) -> None:
    """Raise ValueError for an option that is not above zero."""
    for name, size in sizes.items():
        if not size > 0:
            raise ValueError(f"{name}: {size:g} is not above zero")
