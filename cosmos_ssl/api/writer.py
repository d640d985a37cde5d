"""For authors of writers: where a run's numbers and pictures go.

A writer in full::

    from collections.abc import Mapping

    from cosmos_ssl.api import Aside, LineFile, RunInfo, Spec, Writer


    class Lowest(Writer):
        '''A line for every new low of one number, in a file of the run's folder.

        ``metric``: which number.
        '''

        def __init__(self, spec: Spec, *, metric: Aside[str] = "loss") -> None:
            self.metric = metric

        def start(self, run: RunInfo) -> None:
            self.file = LineFile(run.folder / f"{self.part_name}.txt")
            self.file.cut(lambda line: int(line.split()[0]) <= run.step)  # what comes again
            self.low = min((float(line.split()[1]) for line in self.file.lines()), default=float("inf"))

        def scalars(self, step: int, values: Mapping[str, float]) -> None:
            if values.get(self.metric, float("inf")) < self.low:
                self.low = values[self.metric]
                self.file.append(f"{step} {self.low:.6g}\\n".encode())

        def close(self) -> None:
            self.file.close()

A config then says ``logging: {writers: {low: {type: lowest}}}``. Where ``type`` is not given, the name stands for it:
``logging.writers.lowest.metric=lr`` on the command line. Options and ``spec``: ``cosmos_ssl.api.part``. Writers are
aside: a run goes on though they differ.

When: the constructor in the check before training too, where it raises ValueError for a package that is not installed
(and opens nothing). All else is called on the first rank alone: ``start`` once, and again after ``close`` if the run
goes back; ``scalars`` for each logged step and each evaluation; ``pictures`` for each evaluation; ``sync`` before a
checkpoint and at the end; ``close``.

What must hold: steps that a crash had cut off come again, and stand in the end once. A writer that can takes back what
it holds of later steps than ``run.step`` in ``start``; one that cannot says ``appends = True``, and is not given again
what it was given. Steps are replaced by others if a run goes back, or if it is extended from a step before its end. All
writers are then closed and started again. Those that append get another ``run.id`` and ``run.name``, so that the steps
after ``run.step`` are a run of their own. What a writer raises costs a warning, and never the run: it is called again,
and left alone after some failures in a row; a writer that has failed in ``start`` is started again.
``RUN/metrics.jsonl`` is written whatever befalls writers. ``cosmos_ssl.testing.check_writer`` tries all this.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from cosmos_ssl.api.part import Part


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """What a writer may know of the run that it writes for."""

    folder: Path
    name: str
    id: str
    """One per run, however often it is started: hexadecimal digits, kept in its folder. Writers that append get another
    id for each segment after the first: the same one with ``-2``, ``-3`` and so on."""
    step: int
    """Steps done: 0 for a run that begins; what was written of later steps comes again."""
    segment: int = 1
    """1 until steps are replaced by others: the run goes back (``training.rollback``), or is extended from a step
    before its end. Each time begins a new segment."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The whole config as plain values."""


class Writer(Part, ABC):
    """Takes what a run reports. ``step`` is the number of optimiser steps done."""

    appends: ClassVar[bool] = False
    """Whether nothing can be taken back, so that replayed steps must not come again."""

    def start(self, run: RunInfo) -> None:
        """Open what is written to; take back what is there of steps after ``run.step``."""
        return

    @abstractmethod
    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of one logged step, or of one evaluation; some may not be finite."""

    def pictures(self, step: int, pictures: Mapping[str, Tensor]) -> None:
        """Take the pictures of one evaluation, uint8 [3, H, W]."""
        return

    def sync(self) -> None:
        """Bring everything to the disk: a checkpoint follows."""
        return

    def close(self) -> None:
        """Finish: the run ends, for good or until it is started again."""
        return
