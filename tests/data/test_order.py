"""The order of samples: everything once an epoch, nothing that depends on ranks, few shards at a time."""

from __future__ import annotations

import pickle
import time

import numpy as np
import pytest
from numpy.typing import NDArray

from cosmos_ssl.data import Order, sample_rng
from cosmos_ssl.data.order import replacement
from cosmos_ssl.errors import DataError, UserError

SIZES = [301, 0, 97, 512, 290, 333, 404, 151]


def epoch(order: Order, number: int) -> NDArray[np.int64]:
    """All samples of one epoch in order."""
    first = number * order.steps_per_epoch
    return np.concatenate([order.batch(step) for step in range(first, first + order.steps_per_epoch)])


@pytest.mark.parametrize("shuffle_samples", [64, 600, 10_000])
@pytest.mark.parametrize("lanes", [1, 8, 32])
def test_every_sample_at_most_once_an_epoch(shuffle_samples: int, lanes: int) -> None:
    order = Order(SIZES, 32, lanes=lanes, shuffle_samples=shuffle_samples, seed=3)
    assert order.steps_per_epoch == sum(SIZES) // 32
    first, second = epoch(order, 0), epoch(order, 1)
    for found in (first, second):
        assert found.dtype == np.int64 and len(found) == order.steps_per_epoch * 32
        assert len(np.unique(found)) == len(found) and found.min() >= 0 and found.max() < sum(SIZES)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, epoch(Order(SIZES, 32, lanes=lanes, shuffle_samples=shuffle_samples, seed=4), 0))


def test_the_tail_that_is_dropped_changes() -> None:
    order = Order(SIZES, 64, lanes=64, shuffle_samples=256, seed=0)
    dropped = [frozenset(range(sum(SIZES))) - set(epoch(order, e).tolist()) for e in range(4)]
    assert len(set(dropped)) > 2 and all(len(d) == sum(SIZES) % 64 for d in dropped)


@pytest.mark.parametrize("shuffle_samples", [100, 10_000])
def test_ranks_share_one_global_order(shuffle_samples: int) -> None:
    order = Order(SIZES, 36, lanes=12, shuffle_samples=shuffle_samples, seed=1)  # 3 of a lane: no multiple of 4
    for step in (0, 5, order.steps_per_epoch, 3 * order.steps_per_epoch + 7):
        whole, places = order.batch(step), order.rank_positions(step, 0, 1)
        assert places[0] == step % order.steps_per_epoch * 36
        for world in (1, 2, 3, 4, 6, 12):
            assert np.array_equal(np.concatenate([order.rank_batch(step, r, world) for r in range(world)]), whole)
            assert np.array_equal(np.concatenate([order.rank_positions(step, r, world) for r in range(world)]), places)


@pytest.mark.parametrize("shuffle_samples", [100, 10_000])
def test_any_step_can_be_asked_first(shuffle_samples: int) -> None:
    def new() -> Order:
        return Order(SIZES, 16, lanes=16, shuffle_samples=shuffle_samples, seed=9)

    order = new()
    steps = [order.batch(step) for step in range(2 * order.steps_per_epoch)]
    for step in (97, 3, len(steps) - 1):
        assert np.array_equal(new().batch(step), steps[step])
        assert np.array_equal(pickle.loads(pickle.dumps(order)).batch(step), steps[step])


def test_a_lane_stays_within_its_window() -> None:
    order = Order([100] * 50, 20, lanes=4, shuffle_samples=400, seed=0)  # lanes of 1250, windows of 100
    lane = np.stack([order.rank_batch(step, 2, 4) for step in range(order.steps_per_epoch)]).ravel()
    for start in range(0, len(lane), 100):
        assert len(np.unique(lane[start : start + 100] // 100)) <= 2, "a window lies across two shards at most"
    assert len(np.unique(lane // 100)) <= 14
    assert not np.array_equal(lane, np.sort(lane))


def test_the_order_is_the_recorded_one() -> None:
    """Recorded when it was written: a run that resumes under a later version must meet the same samples."""
    assert Order([50, 30, 20], 8, shuffle_samples=16, lanes=2, seed=7).batch(13).tolist() == RECORDED_WINDOWS
    assert Order([50, 30, 20], 8, lanes=8, seed=7).batch(13).tolist() == RECORDED_WHOLE


RECORDED_WINDOWS = [84, 86, 87, 82, 3, 5, 2, 1]
RECORDED_WHOLE = [16, 95, 79, 66, 93, 9, 77, 53]


def test_27_million_samples_cost_little() -> None:
    start = time.process_time()
    order = Order(np.full(6000, 4483), 4096, seed=0)
    assert order.lanes == 256 and order.steps_per_epoch == 6566
    order.batch(4000)
    assert time.process_time() - start < 1


def test_samples_fill_a_batch() -> None:
    with pytest.raises(DataError, match="40 samples do not fill one batch"):
        Order([40], 64, lanes=64, seed=0)


def test_randomness_is_keyed_by_sample() -> None:
    def draw(*key: int, text: bool = False) -> float:
        return float(sample_rng(*key, text=text).random())

    keys = [(0, 0, 5), (1, 0, 5), (0, 1, 5), (0, 0, 6), (0, 0, 5, 1)]
    values = [draw(*key, text=text) for key in keys for text in (False, True)]
    assert len(set(values)) == len(values) and draw(0, 0, 5) == values[0]
    chosen = [replacement(0, 0, position, 1, 1000) for position in range(200)]
    assert len(set(chosen)) > 150 and max(chosen) < 1000


@pytest.mark.parametrize("shuffle_samples", [10**6, 96])
def test_another_batch_size_goes_on_with_the_same_samples(shuffle_samples: int) -> None:
    """Wherever a step is named, what is behind in that epoch is the same set of samples."""
    old = Order(SIZES, 32, lanes=4, shuffle_samples=shuffle_samples, seed=3)
    found = 0
    for batch in (8, 16, 64, 96):
        new = Order(SIZES, batch, lanes=4, shuffle_samples=shuffle_samples, seed=3)
        assert new.step_after(old, 2 * old.steps_per_epoch) == 2 * new.steps_per_epoch
        for step in range(old.steps_per_epoch + 1, old.steps_per_epoch + 6):
            try:
                epoch, inside = new.epoch_of(new.step_after(old, step))
            except UserError:
                continue
            behind = np.sort(np.concatenate([old.batch(s) for s in range(old.steps_per_epoch, step)]))
            first = epoch * new.steps_per_epoch
            assert epoch == 1
            assert np.array_equal(behind, np.sort(np.concatenate([new.batch(s) for s in range(first, first + inside)])))
            found += 1
    assert found >= 5
