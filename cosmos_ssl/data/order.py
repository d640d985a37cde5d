"""The order of samples: a pure function (seed, epoch, position) -> sample, the same for any number of ranks and
workers.

Shards are shuffled and laid end to end, the tail is dropped, the sequence is cut into equal lanes and each lane is
shuffled within windows; every batch takes the same number of samples from each lane. All permutations sort
raw Philox numbers, whose stream NumPy guarantees, so that an order never changes with NumPy's version.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from cosmos_ssl.config.sections import default_lanes
from cosmos_ssl.errors import DataError, UserError

_SHARDS, _WHOLE, _WINDOWS, _SAMPLE, _REPLACE, _STEP = range(6)  # one stream of random numbers for each use
_DRAWS = 4  # of Philox for each count of its lowest word


def _philox(use: int, seed: int, *counter: int) -> np.random.Philox:
    """A stream of its own for every (use, seed, up to three numbers)."""
    words = (0, *counter, 0, 0)[:4]  # the lowest word counts the draws
    return np.random.Philox(key=np.array([seed, use], np.uint64), counter=np.array(words, np.uint64))


def _permutations(bits: np.random.Philox, rows: range, size: int) -> NDArray[np.int64]:
    """Independent permutations of ``size`` numbers, int64 [rows, size]; a row is the same whichever are asked for."""
    bits.advance(rows.start * size // _DRAWS)
    bits.random_raw(rows.start * size % _DRAWS)
    numbers: NDArray[np.uint64] = bits.random_raw(len(rows) * size).reshape(len(rows), size)
    return np.argsort(numbers, axis=1, kind="stable")


def sample_rng(seed: int, epoch: int, position: int, attempt: int = 0, *, text: bool = False) -> np.random.Generator:
    """The randomness of one sample's views. Images and texts have streams of their own.

    ``position`` counts samples of the epoch; ``attempt`` is not 0 for a replacement.
    """
    return np.random.Generator(_philox(_SAMPLE, seed, position, epoch, 2 * attempt + text))


def replacement(seed: int, epoch: int, position: int, attempt: int, samples: int) -> int:
    """The sample (of ``samples``) that stands in for a bad one, from ``attempt`` 1 on."""
    return int(_philox(_REPLACE, seed, position, epoch, attempt).random_raw() % samples)


def step_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """The seed of a device's randomness in one micro-batch of a step, below 2^63."""
    return int(_philox(_STEP, seed, step, micro_batch, rank).random_raw() >> 1)


class Order:
    """Which samples each step takes. Steps count from 0 over the whole run.

    ``lanes`` divide the batch, and ranks divide the lanes (``config.ranks``); windows hold ``shuffle_samples`` / lanes
    samples each, and a set of no more than ``shuffle_samples`` is permuted whole. Raises DataError where the samples do
    not fill one batch.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int] | NDArray[np.int64],
        batch_size: int,
        *,
        lanes: int | None = None,
        shuffle_samples: int = 262_144,
        seed: int,
        skipped: Sequence[tuple[int, int]] = (),
    ) -> None:
        """``skipped``: see the attribute."""
        sizes = np.asarray(shard_sizes, np.int64)
        self.samples = int(sizes.sum())
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = self.samples // batch_size
        if self.steps_per_epoch == 0:
            raise DataError(
                f"data: {self.samples:,} samples do not fill one batch (training.batch_size: {batch_size:,}). "
                "Give more or a smaller batch"
            )
        self.skipped = tuple(skipped)
        """(step, batches): from that step on the order is ahead by so many batches more, which no step takes. Steps and
        epochs count updates all the same.
        """
        self.lanes = lanes or default_lanes(batch_size)
        assert batch_size % self.lanes == 0, (batch_size, lanes)
        self._sizes, self._starts = sizes, np.cumsum(sizes) - sizes
        self._per_batch = batch_size // self.lanes
        self._lane_length = self.steps_per_epoch * self._per_batch
        # a window holds whole batches, so that a batch never lies across two
        self._window = max(shuffle_samples // self.lanes // self._per_batch, 1) * self._per_batch
        self._small = self.samples <= shuffle_samples
        # caches of the instance: a method's lru_cache would keep every instance alive
        self._laid_out = lru_cache(maxsize=2)(self._lay_out)
        self._whole_order = lru_cache(maxsize=2)(
            lambda epoch: _permutations(_philox(_WHOLE, seed, epoch), range(1), self.samples)[0]
        )
        self._window_order = lru_cache(maxsize=2)(self._shuffle_window)

    def __reduce__(self) -> tuple[object, ...]:
        shuffled = self.samples if self._small else self._window * self.lanes
        again = partial(Order, lanes=self.lanes, shuffle_samples=shuffled, seed=self.seed, skipped=self.skipped)
        return again, (self._sizes, self.batch_size)

    def epoch_of(self, step: int) -> tuple[int, int]:
        """Epoch of a step, and the number of the step within it."""
        return divmod(step, self.steps_per_epoch)

    def place(self, step: int) -> int:
        """The batch of the order, counted from its start, that ``step`` takes."""
        return step + sum(batches for begin, batches in self.skipped if begin <= step)

    def step_after(self, before: Order, step: int) -> int:
        """The step at which as much of the same data is behind as after ``step`` steps of ``before``.

        At an epoch's end that is as many epochs; within one it is the same samples, which takes the same sequence of
        samples and a batch that divides what is behind. Raises UserError where there is no such step.
        """
        epoch, inside = before.epoch_of(step)
        seen = inside * before.batch_size
        if self._sequence() != before._sequence() and inside:
            raise UserError(
                f"step {step:,} lies within an epoch, where the order of samples goes on only with "
                f"training.seed={before.seed}, loader.lanes={before.lanes}, the same loader.shuffle_samples and a "
                f"training.batch_size that leaves as many samples an epoch "
                f"({before.steps_per_epoch * before.batch_size:,}). Keep to these, or take a checkpoint of an "
                "epoch's end"
            )
        if seen % self.batch_size:
            raise UserError(
                f"after step {step:,}, {seen:,} samples of an epoch are behind, which training.batch_size="
                f"{self.batch_size} does not divide. Give one that does, or take a checkpoint of an epoch's end"
            )
        return epoch * self.steps_per_epoch + seen // self.batch_size

    def _sequence(self) -> tuple[int | None, ...]:
        """All that the sequence of samples of an epoch depends on, for the same shards."""
        return self.samples, self.seed, self.lanes, self._lane_length, None if self._small else self._window

    def batch(self, step: int) -> NDArray[np.int64]:
        """Sample indices of the global batch of ``step``, int64 [batch], lane after lane."""
        return self._taken(step, range(self.lanes))

    def rank_positions(self, step: int, rank: int, world: int) -> NDArray[np.int64]:
        """Positions within the epoch of the samples that ``rank`` takes in ``step``: int64 [batch / world].

        A rank owns whole lanes, so its share is one span of the global batch.
        """
        share = self.batch_size // world
        start = self.epoch_of(self.place(step))[1] * self.batch_size + rank * share
        return np.arange(start, start + share)

    def rank_batch(self, step: int, rank: int, world: int) -> NDArray[np.int64]:
        """The sample indices at ``rank_positions``. What it takes to find them does not grow with ``world``."""
        share = self.lanes // world
        return self._taken(step, range(rank * share, (rank + 1) * share))

    def _taken(self, step: int, lanes: range) -> NDArray[np.int64]:
        """The samples that these lanes give to a step."""
        epoch, step = self.epoch_of(self.place(step))
        first = step * self._per_batch
        starts = np.array(lanes)[:, None] * self._lane_length
        if self._small:
            places = starts + np.arange(first, first + self._per_batch)
            whole: NDArray[np.int64] = self._whole_order(epoch)[places.ravel()]
            return whole
        window = first // self._window
        inside = self._window_order(epoch, window, lanes)[:, first - window * self._window :][:, : self._per_batch]
        return self._resolve(epoch, (starts + window * self._window + inside).ravel())

    def _lay_out(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The epoch's order of shards, and where each of them ends in the sequence."""
        order = _permutations(_philox(_SHARDS, self.seed, epoch), range(1), len(self._sizes))[0]
        return order, np.cumsum(self._sizes[order])

    def _shuffle_window(self, epoch: int, window: int, lanes: range) -> NDArray[np.int64]:
        """A permutation of one window for each of the lanes, int64 [lanes, samples of the window]."""
        size = min(self._window, self._lane_length - window * self._window)
        return _permutations(_philox(_WINDOWS, self.seed, epoch, window), lanes, size)

    def _resolve(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Samples at these places of the epoch's sequence of shards."""
        order, ends = self._laid_out(epoch)
        at = np.searchsorted(ends, places, side="right")
        shard = order[at]
        found: NDArray[np.int64] = self._starts[shard] + places - (ends[at] - self._sizes[shard])
        return found
