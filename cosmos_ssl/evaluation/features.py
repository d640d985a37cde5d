"""Features of all samples of a set, computed once: ranks share the batches, and what is computed is kept until all is done.

A piece is one batch. Its file has a name that tells model, data and batch, so that an evaluation that was ended, in whatever
way and on however many ranks, goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from cosmos_ssl.api import BadSample, DataError, Encoder, Sample
from cosmos_ssl.data.storage import written_whole
from cosmos_ssl.evaluation.samples import items_of_all, rows_of_all
from cosmos_ssl.functional import rank, world_size

Loaded: TypeAlias = tuple[Sample, Tensor]
"""A sample, and its picture as the model wants it."""
Compute: TypeAlias = Callable[[Sequence[Loaded]], tuple[Tensor, Sequence[Any]]]
"""Some samples -> a row [n, ...] and a note (strings, numbers, lists of these) for each."""

EXAMPLES = 5
_AHEAD = 2  # batches that are decoded while one is encoded
_log = logging.getLogger("cosmos_ssl.evaluation")


class Samples(Protocol):
    """What is evaluated on: shards, a folder, or a reader of a known layout."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Sample:
        """Sample ``index``. Raises BadSample for a faulty one."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """What makes this set this set."""
        ...


class Store:
    """Pieces of one evaluation as files of a folder; None keeps nothing. A damaged file counts as none."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, name: str) -> dict[str, Any] | None:
        """The piece of this name, if it is there and whole."""
        if self.folder is None:
            return None
        try:
            found: dict[str, Any] = torch.load(self.folder / f"{name}.pt", map_location="cpu", weights_only=True)
        except Exception:  # torch.load raises many kinds for a cut file; each means that the piece is computed again
            return None
        return found

    def put(self, name: str, piece: Mapping[str, Any]) -> None:
        """Keep a piece; where the folder cannot be written nothing is kept, and that is told once."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with written_whole(self.folder / f"{name}.pt") as file:
                torch.save(dict(piece), file)
        except OSError as error:
            _log.warning("%s cannot be written (%s): an interrupted evaluation will start again", self.folder, error.strerror or error)
            self.folder = None

    def clear(self) -> None:
        """Remove the folder: the evaluation is finished."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _no_progress(what: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """How an evaluation goes through its samples."""

    store: Store = field(default_factory=lambda: Store(None))
    batch_size: int = 256
    workers: int = 1
    """Threads that decode."""
    max_samples: int | None = None
    """So many evenly spread samples; None is all."""
    allow_missing: bool = False
    """Leave out what cannot be used instead of raising DataError."""
    progress: Callable[[str, int, int], None] = _no_progress
    """Told what is done, how much of it, and of how much."""

    def leave_out(self, missing: Sequence[str], count: int, what: str) -> None:
        """Warn of what is missing among ``count``, the first few by name; raise DataError unless it may be missing."""
        if not missing:
            return
        some = ", ".join(missing[:EXAMPLES]) + (", ..." if len(missing) > EXAMPLES else "")
        told = f"data: {len(missing):,} of {count:,} {what} ({some})"
        if not self.allow_missing:
            raise DataError(f"{told}. Go on without them: --allow-missing")
        if rank() == 0:
            _log.warning("%s; left out", told)


def features_of(
    data: Samples, preprocess: Callable[[Tensor], Tensor], compute: Compute, job: Job, *, name: str
) -> tuple[Tensor, list[Any]]:
    """The row and the note of each sample, in order, on every rank; rows on the host.

    ``preprocess`` takes uint8 [3, H, W] and works in threads; ``name`` tells what is computed. Raises DataError for samples that
    cannot be used (unless they may be missing), or where none is left.
    """
    count = len(data)
    wanted = count if job.max_samples is None else min(job.max_samples, count)
    chosen = np.linspace(0, count - 1, wanted).round().astype(int).tolist()
    about = {"name": name, "data": data.identity(), "samples": wanted, "batch": job.batch_size}

    def load(index: int) -> Loaded | list[str]:
        sample = None
        try:
            sample = data.read(index)
            return sample, preprocess(sample.decode())
        except BadSample as error:
            return [f"sample {index}" if sample is None else sample.key, str(error)]

    def work(loaded: Sequence[Loaded | list[str]]) -> dict[str, Any]:
        good = [item for item in loaded if isinstance(item, tuple)]
        bad = [item for item in loaded if isinstance(item, list)]
        rows, notes = compute(good) if good else (None, [])
        return {"rows": None if rows is None else rows.cpu(), "notes": list(notes), "bad": bad}

    pieces = list(_pieces(chosen, load, work, job, about, "pictures"))
    bad = items_of_all([f"{key}: {reason}" for piece in pieces for key, reason in piece["bad"]])
    notes = items_of_all([note for piece in pieces for note in piece["notes"]])
    job.leave_out(bad, wanted, "pictures cannot be used")
    if not notes:
        raise DataError("data: not one picture can be used. Run: cosmos-ssl data check")
    return rows_of_all([piece["rows"] for piece in pieces if piece["rows"] is not None], torch.device("cpu")), notes


def text_features(encoder: Encoder, texts: Sequence[str], job: Job, *, to_match: bool = False) -> Tensor:
    """Strings -> unit features [n, D] on the host; ``to_match``: what ``encoder.match`` takes, [n, ...]. Ranks share them."""
    encode = encoder.match_text if to_match else encoder.encode_text
    about = {"texts": hashlib.sha256("\0".join(texts).encode()).hexdigest(), "match": to_match, "batch": job.batch_size}

    def work(some: Sequence[str]) -> dict[str, Any]:
        return {"rows": encode(encoder.tokenize(list(some))).cpu()}

    pieces = _pieces(range(len(texts)), texts.__getitem__, work, job, about, "texts")
    return rows_of_all([piece["rows"] for piece in pieces], torch.device("cpu"))


def _pieces(
    chosen: Sequence[int],
    load: Callable[[int], Any],
    work: Callable[[Sequence[Any]], dict[str, Any]],
    job: Job,
    about: Mapping[str, Any],
    what: str,
) -> Iterator[dict[str, Any]]:
    """This rank's batches of ``chosen``, from the store where they are there; threads load a little ahead."""
    starts = list(range(0, len(chosen), job.batch_size))
    own = starts[rank() * len(starts) // world_size() : (rank() + 1) * len(starts) // world_size()]
    waiting = iter(own)
    threads = ThreadPoolExecutor(job.workers)
    ahead: deque[tuple[str, dict[str, Any] | None, list[Future[Any]]]] = deque()
    done = 0
    try:
        while True:
            while len(ahead) <= _AHEAD and (start := next(waiting, None)) is not None:
                name = digest({**about, "start": start})
                kept = job.store.get(name)
                part = chosen[start : start + job.batch_size] if kept is None else ()
                ahead.append((name, kept, [threads.submit(load, index) for index in part]))
            if not ahead:
                return
            name, piece, futures = ahead.popleft()
            if piece is None:
                piece = work([future.result() for future in futures])
                job.store.put(name, piece)
            done += 1
            job.progress(what, done, len(own))
            yield piece
    finally:
        threads.shutdown(cancel_futures=True)


def digest(value: Any) -> str:
    """A short name for what JSON can tell."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def weights_digest(model: nn.Module) -> str:
    """A hash of all tensors of a model, by name, type, shape and value."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def numbered(labels: Sequence[Hashable]) -> dict[Hashable, int]:
    """A number for each different label, in the order in which they come."""
    return {label: number for number, label in enumerate(dict.fromkeys(labels))}


def threads_of_this_process() -> int:
    """Threads that decode where nothing else is asked for."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
