"""One number of a run over its steps: last, best, and a few points that draw the same curve as all of them."""

from __future__ import annotations

import re
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_LOWER = re.compile(
    r"(^|[/_.])(loss|rank|perplexity|error|err|rmse|mse|mae|wait|memory|steps|samples|norm|lag|distance|seconds)$|^loss/"
)


def lower_is_better(name: str) -> bool:
    """Return whether less of a number is better, by its name: losses, ranks, errors, waits, what was skipped."""
    return bool(_LOWER.search(name)) and name != "samples_per_second"


@dataclass(slots=True)
class Series:
    """Values by rising step. A step that comes again replaces what was from there on."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def add(self, step: int, value: float) -> None:
        """Append a value."""
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            self.values.pop()
        self.steps.append(step)
        self.values.append(value)

    def last(self) -> tuple[int, float]:
        """Step and value of the last."""
        return self.steps[-1], self.values[-1]

    def best(self, *, lower: bool) -> tuple[int, float]:
        """Step and value of the least, or the greatest; the first of equals."""
        value = min(self.values) if lower else max(self.values)
        return self.steps[self.values.index(value)], value


@dataclass(frozen=True, slots=True)
class Curve:
    """Points of a series that are drawn. Of a long one the least and the greatest of each bucket, in their order, and
    beside them the mean of each bucket at its middle, which smoothing goes by.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    mean_steps: NDArray[np.float64] | None = None
    means: NDArray[np.float64] | None = None


def thinned(series: Series, buckets: int) -> Curve:
    """The points that show the same curve where it is drawn ``buckets`` or fewer columns of pixels wide."""
    import numpy as np

    steps, values = np.array(series.steps, np.int64), np.array(series.values, np.float64)
    if len(steps) <= 2 * buckets:
        return Curve(steps, values)
    starts = np.linspace(0, len(steps), buckets, endpoint=False).astype(np.int64)
    sizes = np.diff(np.append(starts, len(steps)))
    width = int(sizes.max())
    places = np.minimum(starts[:, None] + np.arange(width), (starts + sizes - 1)[:, None])  # short ones repeat the last
    blocks = values[places]
    rows = np.arange(buckets)
    both = np.sort(np.stack([places[rows, blocks.argmin(1)], places[rows, blocks.argmax(1)]], axis=1), axis=1)
    kept = np.unique(np.concatenate([[0], both.ravel(), [len(steps) - 1]]))
    means = np.add.reduceat(values, starts) / sizes
    middles = np.add.reduceat(steps.astype(np.float64), starts) / sizes
    return Curve(steps[kept], values[kept], middles, means)


def summary(series: Series, name: str) -> dict[str, Any]:
    """What a report says of a series."""
    (last_step, last), (best_step, best) = series.last(), series.best(lower=lower_is_better(name))
    return {"last": last, "last_step": last_step, "best": best, "best_step": best_step}
