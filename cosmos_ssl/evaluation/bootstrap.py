"""How sure a figure is: the bootstrap's percentile intervals over resampled samples, of one model and of differences.

Shape letters: N samples, E entries, G groups, B resamples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

RESAMPLES = 1000
_HELD = 1 << 24  # weights of entries at a time


class Outcome(NamedTuple):
    """A metric as the mean over groups of one sum over another: of a recall, hits over questions."""

    units: Tensor
    """The sample, 0..N-1, of each entry, int64 [E]. A sample is drawn whole: a picture with all its texts."""
    over: Tensor
    """[E]"""
    under: Tensor
    """[E]"""
    groups: Tensor | None = None
    """The group of each entry, int64 [E]; None is one of all."""

    def of(self, counts: Tensor) -> Tensor:
        """The metric [B] where each sample is there ``counts`` [B, N] times; an empty group does not count."""
        groups = torch.zeros_like(self.units) if self.groups is None else self.groups
        weights, size = counts[:, self.units].double(), int(groups.max()) + 1
        over, under = (
            weights.new_zeros(len(counts), size).index_add_(1, groups, weights * part.double())
            for part in (self.over, self.under)
        )
        there = under > 0
        return (over / under.where(there, 1)).where(there, 0).sum(1) / there.sum(1)


def resampled(
    outcomes: Mapping[str, Outcome], count: int, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Tensor]:
    """Each metric [B] of ``resamples`` draws with replacement from ``count`` samples.

    Equal ``count`` and ``seed`` draw the same samples, so that differences of what this returns are paired.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, _HELD // max(count, *(len(outcome.units) for outcome in outcomes.values())))
    found: dict[str, list[Tensor]] = {name: [] for name in outcomes}
    for start in range(0, resamples, rows):
        drawn = torch.randint(count, (min(rows, resamples - start), count), generator=generator)
        counts = torch.zeros_like(drawn).scatter_add_(1, drawn, torch.ones_like(drawn))
        for name, outcome in outcomes.items():
            found[name].append(outcome.of(counts))
    return {name: torch.cat(parts) for name, parts in found.items()}


def interval(values: Tensor, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of a metric's values [B] over resamples."""
    low, high = values.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=values.dtype)).tolist()
    return low, high
