"""Features of all samples of a set: ranks share the batches, and what is computed is kept until all is done."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from cosmos_ssl.api import BadSample, DataError, Encoder, Sample, UserError
from cosmos_ssl.errors import listed
from cosmos_ssl.evaluation.feature_store import FeatureStore, Piece
from cosmos_ssl.evaluation.samples import (
    Samples,
    Sources,
    check_positive,
    evenly_spread,
    items_of_all,
    read_ahead,
    share,
    threads_of_this_process,
)
from cosmos_ssl.evaluation.sharded import Sharded
from cosmos_ssl.functional import gather_objects, rank, world_size
from cosmos_ssl.functional.together import turns
from cosmos_ssl.liveness import OnStage
from cosmos_ssl.pictures import BACKGROUND

T = TypeVar("T")

PIECES = 1024
"""So many pieces at most are kept of a set: more files than this slow a shared file system down."""
_log = logging.getLogger("cosmos_ssl.evaluation")


class Loaded(NamedTuple):
    """A sample that could be read, and its picture as the model wants it."""

    place: int
    """Where it lies in the data."""
    sample: Sample
    pixels: Tensor


Compute: TypeAlias = Callable[[Sequence[Loaded]], tuple[Tensor | None, Sequence[Any]]]
"""Some samples -> rows [n, ...] and notes (strings, numbers, lists of these), of all of them or of those it takes."""


class Bad(NamedTuple):
    """A sample that cannot be used."""

    place: int
    key: str
    reason: str


class Made(NamedTuple):
    """A piece that this rank has made or found."""

    number: int
    """Of all pieces, in the order of the items."""
    name: str
    piece: Piece
    held: bool
    """The store held it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """How an evaluation goes through its samples. Raises ValueError for numbers below one."""

    store: FeatureStore = field(default_factory=lambda: FeatureStore(None))
    batch_size: int = 256
    workers: int | None = None
    """Threads that decode; None is one a core, at most 8."""
    max_samples: int | None = None
    """So many evenly spread samples; None is all."""
    allow_missing: bool = False
    """Leave out what cannot be used instead of raising DataError."""
    data: str = "data"
    """What messages call the samples."""
    progress: OnStage = lambda what, done, total: None
    """Told of batches."""

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


def sharded_features(
    data: Samples,
    preprocess: Callable[[Tensor], Tensor],
    compute: Compute,
    job: Job,
    *,
    name: str,
    background: str = BACKGROUND,
) -> tuple[Sharded, list[Any]]:
    """Return what ``compute`` makes of all samples, in order: rows on the host of the rank that has computed them, and
    the notes of all.

    ``preprocess`` takes uint8 [3, H, W] and works in threads; ``name`` tells what is computed; transparent pictures are
    put on ``background``. Raises DataError for samples that cannot be used (unless they may be missing), where none is
    left, or where files change while they are read and kept; UserError for rows that are not finite.
    """
    sources = Sources(data)
    chosen = evenly_spread(len(data), job.max_samples)

    def load(index: int) -> Loaded | Bad:
        key = f"sample {index}"
        try:
            sample = data.read(index)
            key = sample.key
            return Loaded(index, sample, preprocess(sample.on(background).decode()))
        except BadSample as error:
            return Bad(index, key, str(error))

    stamp = sources.stamp if job.store.folder is not None else _no_stamp
    about = {"name": name, "background": background, "data": data.identity()}
    size = _batch_size(len(chosen), job.batch_size)
    found = [one.piece for one in pieces(job, about, chosen, size, load, compute, what="pictures", stamp=stamp)]
    if changed := items_of_all(sources.changed()):
        told = f"{job.data}: {len(changed):,} files were changed while they were evaluated on ({listed(changed)})"
        raise DataError(f"{told}. Run the same command again")
    bad = items_of_all([f"{key}: {reason}" for piece in found for _, key, reason in piece.bad])
    notes = items_of_all([note for piece in found for note in piece.notes])
    job.leave_out(bad, len(chosen), "pictures cannot be used")
    if not notes:
        raise DataError(f"{job.data}: not one picture can be used. Run: cosmos-ssl data check")
    rows = Sharded.gathered([piece.rows for piece in found if piece.rows is not None])
    check_finite(rows, "pictures")
    return rows, notes


def check_finite(rows: Tensor | Sharded, what: str) -> None:
    """Raise UserError where one of the rows [n, ...] is not finite: nothing true comes of such features.

    Of ``Sharded`` rows it is called by all ranks.
    """
    own = rows.own if isinstance(rows, Sharded) else rows
    finite = own.isfinite()
    wrong = 0 if finite.all() else len(own) - int(finite.flatten(1).all(1).sum())
    if isinstance(rows, Sharded):
        wrong = sum(gather_objects(wrong))
    if wrong:
        told = f"the model's features of {wrong:,} of {len(rows):,} {what} are not finite numbers"
        raise UserError(f"{told}: its weights are damaged, or the precision is too low for them")


def text_features(
    encoder: Encoder, texts: Sequence[str], job: Job, *, to_match: bool = False, templates: Sequence[str] = ("{}",)
) -> Tensor:
    """``sharded_texts``, but with all rows on every rank."""
    return sharded_texts(encoder, texts, job, to_match=to_match, templates=templates).whole()


def sharded_texts(
    encoder: Encoder, texts: Sequence[str], job: Job, *, to_match: bool = False, templates: Sequence[str] = ("{}",)
) -> Sharded:
    """Strings -> unit features [n, D] on the host of the rank that has computed them; ``to_match``: what
    ``encoder.match`` takes, [n, ...].

    With ``templates`` a string is put into each of them, and its row is the mean of theirs (which is no unit vector).
    """
    encode = encoder.match_text if to_match else encoder.encode_text

    def compute(batches: Sequence[Sequence[str]]) -> tuple[Tensor, list[Any]]:
        said = [template.replace("{}", text) for batch in batches for text in batch for template in templates]
        starts = range(0, len(said), job.batch_size)
        rows = torch.cat([encode(encoder.tokenize(said[start : start + job.batch_size])).cpu() for start in starts])
        return rows.unflatten(0, (-1, len(templates))).mean(1), []

    size = _batch_size(len(texts), max(1, job.batch_size // len(templates)))
    batches = _batches(texts, size)
    about = {"match": to_match, "templates": list(templates)}
    found = pieces(job, about, batches, 1, lambda batch: batch, compute, what="texts")
    rows = Sharded.gathered([one.piece.rows for one in found if one.piece.rows is not None])
    check_finite(rows, "texts")
    return rows


def _batch_size(count: int, size: int) -> int:
    """The size of batches of ``count`` items: ``size``, or less where some rank would have none."""
    return max(1, min(size, -(-count // world_size())))


def _no_stamp(item: Any) -> list[str]:
    return []


def pieces(
    job: Job,
    about: Mapping[str, Any],
    items: Sequence[Any],
    size: int,
    load: Callable[[Any], T | Bad],
    compute: Callable[[Sequence[T]], tuple[Tensor | None, Sequence[Any]]],
    *,
    what: str,
    stamp: Callable[[Any], list[str]] = _no_stamp,
    in_turns: bool = False,
) -> Iterator[Made]:
    """What ``compute`` makes of this rank's share of ``items``, ``size`` at a time, or the store holds of it.

    ``load`` works in threads. What is held is good while the ``stamp`` of each item is what it was before the item was
    read, and no sample that was bad can be used. Shares are in rank order, or, ``in_turns``, what each rank is ready
    for next.
    """
    every = _batches(items, part_size(len(items), size))
    own = range(len(every)) if in_turns else share(range(len(every)))
    done, total, all_about = 0, sum(len(_batches(every[number], size)) for number in own), digest(about)

    def to_load() -> Iterator[tuple[tuple[int, str, Piece | None], Sequence[Any]]]:
        for number in turns(len(every)) if in_turns else own:
            name = digest([all_about, list(every[number])])
            kept = job.store.get(name)
            if kept is not None and kept.stamps == [stamp(item) for item in every[number]]:
                yield (number, name, kept), [place for place, _, _ in kept.bad]
            else:
                yield from (((number, name, None), batch) for batch in _batches(every[number], size))

    def stamped(item: Any) -> tuple[list[str], T | Bad]:
        return stamp(item), load(item)

    def computed(read: Sequence[tuple[list[str], T | Bad]]) -> Piece:
        good = [item for _, item in read if not isinstance(item, Bad)]
        rows, notes = compute(good) if good else (None, [])
        bad = [(*item,) for _, item in read if isinstance(item, Bad)]
        return Piece(None if rows is None else rows.cpu(), list(notes), bad, [stamps for stamps, _ in read])

    made: list[Piece] = []
    with closing(read_ahead(to_load(), stamped, job.workers or threads_of_this_process())) as loaded:
        for (number, name, kept), read in loaded:
            part = every[number]
            if kept is None:
                made.append(computed(read))
                if sum(len(piece.stamps) for piece in made) < len(part):
                    continue
            elif not all(isinstance(item, Bad) for _, item in read):  # one was mended
                made = [computed(list(map(stamped, batch))) for batch in _batches(part, size)]
            if made or kept is None:
                kept = _joined(made)
                job.store.put(name, kept)
            done += len(_batches(part, size))
            job.progress(what, done, total)
            yield Made(number, name, kept, not made)
            made = []


def part_size(count: int, size: int) -> int:
    """Items of a piece: a batch of ``size``, or several where ``count`` items would make more than ``PIECES``."""
    return size * max(1, -(-count // (size * PIECES)))


def _batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _joined(made: Sequence[Piece]) -> Piece:
    rows = [piece.rows for piece in made if piece.rows is not None]
    return Piece(
        torch.cat(rows) if rows else None,
        [note for piece in made for note in piece.notes],
        [one for piece in made for one in piece.bad],
        [stamps for piece in made for stamps in piece.stamps],
    )


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
