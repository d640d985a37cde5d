"""Ways from one number to another over a whole run, or over some of its steps."""

from __future__ import annotations

import math
from abc import abstractmethod

from cosmos_ssl.api import Count, Progress, Schedule, Spec, Strength


class Way(Schedule):
    """A way over the run, or with one of the options over its first steps, after which the end is kept."""

    def __init__(self, spec: Spec, *, over_steps: Count | None = None, over_epochs: Strength | None = None) -> None:
        """Raises ValueError where both are given.

        over_steps: how long it takes; without either, the whole run.
        over_epochs: the same in epochs.
        """
        if over_steps is not None and over_epochs is not None:
            raise ValueError("over_epochs: over_steps says the length already. Leave one out")
        self.steps, self.epochs = over_steps, over_epochs

    def left(self, progress: Progress, begin: int = 0) -> float:
        """By the share of the way that is done."""
        steps = self.steps if self.epochs is None else round(self.epochs * progress.steps_per_epoch)
        done = progress.step - begin
        if steps is None:
            return self.shape(done / max(1, progress.total_steps - begin))
        return self.shape(done / steps) if done < steps else 0.0

    def stable_steps(self, total_steps: int, begin: int = 0) -> int:
        """All, where the length is told."""
        return 0 if self.steps is None and self.epochs is None else total_steps

    @abstractmethod
    def shape(self, done: float) -> float:
        """What is left where this share is done."""


class Cosine(Way):
    """Half a cosine (SGDR, arXiv 1608.03983, equation 5, without restarts): slow, then quick, then slow."""

    def shape(self, done: float) -> float:
        """From 1 to 0."""
        return (1 + math.cos(math.pi * done)) / 2


class Linear(Way):
    """A straight line."""

    def shape(self, done: float) -> float:
        """From 1 to 0."""
        return 1 - done
