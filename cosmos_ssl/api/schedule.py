"""For authors of schedules: how a number moves over a run: learning rate, weight decay, a momentum or temperature.

A schedule in full::

    from cosmos_ssl.api import Count, Progress, Schedule, Spec


    class Halving(Schedule):
        '''Half of what is left, again and again.

        ``every``: steps after which it is halved.
        '''

        def __init__(self, spec: Spec, *, every: Count = 1000) -> None:
            self.every = every

        def left(self, progress: Progress, begin: int = 0) -> float:
            return 0.5 ** ((progress.step - begin) // self.every)

        def stable_steps(self, total_steps: int, begin: int = 0) -> int:
            return total_steps

A config then says ``schedule: {type: halving, every: 500}`` for the learning rate, which goes from ``optimizer.lr`` to
``final_lr`` after a warm-up of ``warmup_steps``, and ``{type: halving, start: 0.1, end: 0.01, every: 500}`` for any
number whose option takes a ``Curve``: ``optimizer.weight_decay``, a teacher's momentum, a temperature. ``epochs``,
``max_steps``, ``warmup_steps`` and ``final_lr`` are the engine's.

In a part of your own such an option has the type ``Share | Curve[Share]``. Keep what is given as an attribute, and ask
``value_at(self.momentum, progress)`` in each step.

When: ``left`` once a step for each number, on every rank. What must hold: it is a function of its arguments alone,
between 0 and 1. A run may be prolonged (``max_steps`` grows, and it goes on as the same run) from any step up to
``stable_steps`` of all its curves, where a checkpoint is kept. What a part makes of ``Progress.total_steps`` by itself
is unknown to the engine: use a ``Curve``. ``cosmos_ssl.testing.check_schedule`` tries all this.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from cosmos_ssl.api.part import Part, Progress
from cosmos_ssl.bounds import Curve


class Schedule(Part, ABC):
    """The way from one number to another over a run."""

    @abstractmethod
    def left(self, progress: Progress, begin: int = 0) -> float:
        """Share of the way that is left at this step: 1 at the start, 0 at the end.

        ``begin`` is the step at which the way begins: the first after the learning rate's warm-up.
        """

    def stable_steps(self, total_steps: int, begin: int = 0) -> int:
        """How many steps of a run of ``total_steps`` would be the same in a longer run; 0 where it is none."""
        return 0


def value_at(value: float | Curve[float], progress: Progress) -> float:
    """The number at this step, whether it moves or not."""
    return value.at(progress) if isinstance(value, Curve) else value
