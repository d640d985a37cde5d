"""Schedules that stay where they are for long, so that a run can be prolonged."""

from __future__ import annotations

from typing import Literal

from cosmos_ssl.api import Count, Progress, Schedule, Share, Spec


class Constant(Schedule):
    """The start, for the whole run: the end is never approached."""

    def __init__(self, spec: Spec) -> None:
        pass

    def left(self, progress: Progress, begin: int = 0) -> float:
        """All."""
        return 1.0

    def stable_steps(self, total_steps: int, begin: int = 0) -> int:
        """All."""
        return total_steps


class Step(Schedule):
    """A factor at each of some steps: on the way to an end of 0, the number is multiplied by it.

    ``at``: the steps, counted from the start of the run.
    ``factor``: what is left after each, of what was left before.
    """

    def __init__(self, spec: Spec, *, at: list[Count], factor: Share = 0.1) -> None:
        self.at, self.factor = at, factor

    def left(self, progress: Progress, begin: int = 0) -> float:
        """The factors so far."""
        return self.factor ** sum(progress.step >= step for step in self.at)

    def stable_steps(self, total_steps: int, begin: int = 0) -> int:
        """All: the steps are told."""
        return total_steps


class WarmupStableDecay(Schedule):
    """The start until the last steps, which go to the end (MiniCPM, arXiv 2404.06395, section 4).

    The checkpoint at which the decay begins is kept: from it the run can be prolonged.

    ``decay_share``: share of the run's steps that decay, at least one.
    ``decay_steps``: the same in steps.
    ``decay``: ``sqrt``, 1 - sqrt(share done), which arXiv 2405.18392 (section 4) found best; ``linear``; or
    ``at_once``, the end from the first of these steps on.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        decay_share: Share = 0.2,
        decay_steps: Count | None = None,
        decay: Literal["sqrt", "linear", "at_once"] = "sqrt",
    ) -> None:
        self.share, self.steps = decay_share, decay_steps
        self.power = {"sqrt": 0.5, "linear": 1.0, "at_once": 0.0}[decay]

    def left(self, progress: Progress, begin: int = 0) -> float:
        """All, and then less at each of the last steps; the end would be reached one step after the last."""
        first = self.stable_steps(progress.total_steps, begin)
        done = progress.step - first + 1
        return 1 - (done / (progress.total_steps - first + 1)) ** self.power if done > 0 else 1.0

    def stable_steps(self, total_steps: int, begin: int = 0) -> int:
        """All before the decay."""
        decaying = max(1, round(self.share * total_steps)) if self.steps is None else self.steps
        return min(total_steps, max(begin, total_steps - decaying))
