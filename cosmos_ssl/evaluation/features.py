"""Features of all samples of a set, computed once: ranks share the batches, and what is computed is kept until all is
done.

A piece is one batch. Its file has a name that tells model, data and batch, so that an evaluation that was ended, in
whatever way and on however many ranks, goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from cosmos_ssl.api import BadSample, DataError, Encoder, Sample, UserError
from cosmos_ssl.errors import listed
from cosmos_ssl.evaluation.samples import (
    Samples,
    Sources,
    check_positive,
    items_of_all,
    read_ahead,
    rows_of_all,
    share,
    threads_of_this_process,
)
from cosmos_ssl.files import written_whole
from cosmos_ssl.functional import rank, world_size
from cosmos_ssl.pictures import BACKGROUND

KEPT_DAYS = 7
"""So long an evaluation that was ended waits to be gone on with."""
_log = logging.getLogger("cosmos_ssl.evaluation")


class Loaded(NamedTuple):
    """A sample that could be read, and its picture as the model wants it."""

    place: int
    """Where it lies in the data."""
    sample: Sample
    pixels: Tensor


Compute: TypeAlias = Callable[[Sequence[Loaded]], tuple[Tensor | None, Sequence[Any]]]
"""Some samples -> rows [n, ...], and notes (strings, numbers, lists of these): of each sample, or of those that it
takes.
"""


class Store:
    """Pieces of one evaluation as files of a folder; None keeps nothing. A damaged file counts as none."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._writable = folder is not None

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
        if self.folder is None or not self._writable:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with written_whole(self.folder / f"{name}.pt") as file:
                torch.save(dict(piece), file)
        except OSError as error:
            _log.warning(
                "%s cannot be written (%s): an interrupted evaluation will start again",
                self.folder,
                error.strerror or error,
            )
            self._writable = False

    def clear(self) -> None:
        """Remove the folder: the evaluation is finished."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def clear_old(self) -> None:
        """Remove the folders beside this one that nothing was put into for a week: evaluations that were ended for
        good.
        """
        for folder in self.folder.parent.glob("*") if self.folder is not None else ():
            with suppress(OSError):  # another process may be removing it
                if folder != self.folder and time.time() - folder.stat().st_mtime > KEPT_DAYS * 86_400:
                    shutil.rmtree(folder, ignore_errors=True)


def _no_progress(what: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """How an evaluation goes through its samples. Raises ValueError for numbers below one."""

    store: Store = field(default_factory=lambda: Store(None))
    batch_size: int = 256
    workers: int | None = None
    """Threads that decode; None is one a core, at most 8."""
    max_samples: int | None = None
    """So many evenly spread samples; None is all."""
    allow_missing: bool = False
    """Leave out what cannot be used instead of raising DataError."""
    data: str = "data"
    """What messages call the samples."""
    progress: Callable[[str, int, int], None] = _no_progress
    """Told what is done, how much of it, and of how much."""

    def __post_init__(self) -> None:
        check_positive(batch_size=self.batch_size, workers=self.workers, max_samples=self.max_samples)

    def leave_out(self, missing: Sequence[str], count: int, what: str) -> None:
        """Warn of what is missing among ``count``, the first few by name; raise DataError unless it may be missing."""
        if not missing:
            return
        told = f"{self.data}: {len(missing):,} of {count:,} {what} ({listed(missing)})"
        if not self.allow_missing:
            raise DataError(f"{told}. Go on without them: --allow-missing")
        if rank() == 0:
            _log.warning("%s; left out", told)


def features_of(
    data: Samples,
    preprocess: Callable[[Tensor], Tensor],
    compute: Compute,
    job: Job,
    *,
    name: str,
    background: str = BACKGROUND,
) -> tuple[Tensor, list[Any]]:
    """What ``compute`` makes of all samples, in order, on every rank: rows on the host, and notes.

    ``preprocess`` takes uint8 [3, H, W] and works in threads; ``name`` tells what is computed; transparent pictures are
    put on ``background``. Raises DataError for samples that cannot be used (unless they may be missing), where none is
    left, or where files change while they are read and kept; UserError for rows that are not finite.
    """
    count = len(data)
    sources = Sources(data)
    wanted = count if job.max_samples is None else min(job.max_samples, count)
    chosen = range(count) if wanted == count else np.linspace(0, count - 1, wanted).round().astype(int).tolist()

    def load(index: int) -> Loaded | list[Any]:
        sample = None
        try:
            sample = data.read(index)
            return Loaded(index, sample, preprocess(sample.on(background).decode()))
        except BadSample as error:
            return [index, f"sample {index}" if sample is None else sample.key, str(error)]

    def work(loaded: Sequence[Loaded | list[Any]]) -> dict[str, Any]:
        good = [item for item in loaded if isinstance(item, Loaded)]
        bad = [item for item in loaded if not isinstance(item, Loaded)]
        rows, notes = compute(good) if good else (None, [])
        return {"rows": None if rows is None else rows.cpu(), "notes": list(notes), "bad": bad}

    stamp = sources.stamp if job.store.folder is not None else _no_stamp
    about = {"name": name, "background": background, "data": data.identity()}
    pieces = list(_pieces(_cut(chosen, job.batch_size), load, work, job, about, "pictures", stamp))
    if changed := items_of_all(sources.changed()):
        raise DataError(
            f"{job.data}: {len(changed):,} files were changed while they were evaluated on ({listed(changed)}). "
            "Run the same command again"
        )
    bad = items_of_all([f"{key}: {reason}" for piece in pieces for _, key, reason in piece["bad"]])
    notes = items_of_all([note for piece in pieces for note in piece["notes"]])
    job.leave_out(bad, wanted, "pictures cannot be used")
    if not notes:
        raise DataError(f"{job.data}: not one picture can be used. Run: cosmos-ssl data check")
    rows = rows_of_all([piece["rows"] for piece in pieces if piece["rows"] is not None])
    check_finite(rows, "pictures")
    return rows, notes


def _no_stamp(item: Any) -> list[str]:
    return []


def check_finite(rows: Tensor, what: str) -> None:
    """Raise UserError where one of the rows [n, ...] is not finite: nothing true comes of such features."""
    finite = rows.isfinite()
    if not finite.all():
        wrong = len(rows) - int(finite.flatten(1).all(1).sum())
        raise UserError(
            f"the model's features of {wrong:,} of {len(rows):,} {what} are not finite numbers: its weights are "
            "damaged, "
            "or the precision is too low for them"
        )


def text_features(
    encoder: Encoder, texts: Sequence[str], job: Job, *, to_match: bool = False, templates: Sequence[str] = ("{}",)
) -> Tensor:
    """Strings -> unit features [n, D] on the host; ``to_match``: what ``encoder.match`` takes, [n, ...]. Ranks share
    them.

    With ``templates`` a string is put into each of them, and its row is the mean of theirs (which is no unit vector).
    """
    encode = encoder.match_text if to_match else encoder.encode_text

    def work(parts: Sequence[Sequence[str]]) -> dict[str, Any]:
        said = [template.replace("{}", text) for part in parts for text in part for template in templates]
        starts = range(0, len(said), job.batch_size)
        rows = torch.cat([encode(encoder.tokenize(said[start : start + job.batch_size])).cpu() for start in starts])
        return {"rows": rows.unflatten(0, (-1, len(templates))).mean(1)}

    parts = [[part] for part in _cut(texts, max(1, job.batch_size // len(templates)))]
    about = {"match": to_match, "templates": list(templates)}
    rows = rows_of_all([piece["rows"] for piece in _pieces(parts, lambda part: part, work, job, about, "texts")])
    check_finite(rows, "texts")
    return rows


def _cut(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Parts of ``size`` items, or smaller ones where some rank would have none."""
    size = max(1, min(size, -(-len(items) // world_size())))
    return [items[start : start + size] for start in range(0, len(items), size)]


def _pieces(
    parts: Sequence[Sequence[Any]],
    load: Callable[[Any], Any],
    work: Callable[[Sequence[Any]], dict[str, Any]],
    job: Job,
    about: Mapping[str, Any],
    what: str,
    stamp: Callable[[Any], list[str]] = _no_stamp,
) -> Iterator[dict[str, Any]]:
    """What ``work`` makes of this rank's share of ``parts``, or the store holds of it.

    What it holds is good while the ``stamp`` of each item is what it was before the item was read, and no sample that
    was bad can be used.
    """
    own, all_about = share(parts), digest(about)

    def to_load() -> Iterator[tuple[tuple[Sequence[Any], str, dict[str, Any] | None], Sequence[Any]]]:
        for part in own:
            name = digest([all_about, list(part)])
            kept = job.store.get(name)
            if kept is not None and kept.get("stamps") != [stamp(item) for item in part]:
                kept = None
            yield (part, name, kept), part if kept is None else [index for index, *_ in kept.get("bad", ())]

    def stamped(item: Any) -> tuple[list[str], Any]:
        return stamp(item), load(item)

    with closing(read_ahead(to_load(), stamped, job.workers or threads_of_this_process())) as loaded:
        for done, ((part, name, piece), items) in enumerate(loaded, 1):
            if piece is None or any(isinstance(item, Loaded) for _, item in items):
                stamps, read = zip(*(items if piece is None else map(stamped, part)), strict=True)
                piece = {**work(read), "stamps": list(stamps)}
                job.store.put(name, piece)
            job.progress(what, done, len(own))
            yield piece


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
