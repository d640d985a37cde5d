"""A loss that has risen for good: how that is told, and what a run does then.

The remedy is the one that large runs were steered by in person: back to a checkpoint of some 100 steps before the
spike, and past the 200 to 500 batches seen around it, since the same batches did no harm from another state (PaLM,
arXiv 2204.02311, section 5.1); OPT-175B was restarted so as well (arXiv 2205.01068, section 2.5).
"""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from cosmos_ssl.config.sections import RollbackConfig
from cosmos_ssl.data.order import Order
from cosmos_ssl.engine.checkpoint import latest_checkpoint
from cosmos_ssl.engine.distributed import World
from cosmos_ssl.errors import CheckpointError, TrainingError, UserError
from cosmos_ssl.files import read_object, written_whole

log = logging.getLogger(__name__)

FILE = "rollbacks.json"
BEFORE = 4
"""The level before is that of so many times ``patience`` steps, of as many as there are but ``patience`` at least."""
BACK = 2
"""So many times ``patience`` steps are undone: those of the rise, and as many before it."""
_USUAL = 0.9
"""A risen loss lies above this share of those before: what scatters about 0 rises by any factor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rise:
    """A loss that has risen."""

    loss: float
    """The median over the last ``patience`` steps; infinite where most of these were not finite."""
    level: float
    """The median over those before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A way back: found after ``found`` steps; from step ``at`` on the order of samples is ahead by ``batches``."""

    found: int
    at: int
    batches: int
    loss: float | None = None
    """None where it is not finite, and where a fork took over what was passed over before."""
    level: float | None = None


def reach_of(settings: RollbackConfig | None) -> int:
    """How many steps back a checkpoint must be, at the least; 0 where none is needed."""
    return BACK * settings.patience if settings else 0


class Rollback:
    """Watches a run's loss, and keeps what its order of samples has passed over. All ranks come to the same."""

    def __init__(self, settings: RollbackConfig | None, order: Order) -> None:
        """``settings``: None for a run that does not go back; what it has passed over before still holds."""
        self.settings = settings
        self.order = order
        self.records: list[Record] = []
        self._losses: deque[float] = deque(maxlen=(BEFORE + 1) * settings.patience if settings else 0)

    @property
    def reach(self) -> int:
        """As ``reach_of``."""
        return reach_of(self.settings)

    @property
    def numbers(self) -> dict[str, float]:
        """What a row tells of it."""
        return {"rollbacks": float(self.count)} if self.settings else {}

    @property
    def count(self) -> int:
        """How often this run has gone back."""
        return sum(record.level is not None for record in self.records)

    def observe(self, loss: float) -> None:
        """Take in this rank's loss of the step that has been made. A collective."""
        if self.settings is not None:
            self._losses.append(World().mean({"loss": loss})["loss"])

    def rise(self) -> Rise | None:
        """Return the rise that the losses up to now end in, or None.

        The median of the last ``patience`` losses lies above ``factor`` times the median of those before (by as much of
        its size, where that is negative), and above nine tenths of them. A loss that is not finite counts as a high
        one, and is no part of what was before.
        """
        if self.settings is None or len(self._losses) < 2 * self.settings.patience:
            return None
        losses = np.array(self._losses)
        before, last = losses[: -self.settings.patience], losses[-self.settings.patience :]
        before, last = before[np.isfinite(before)], np.where(np.isfinite(last), last, math.inf)
        if not len(before):
            return None
        level, loss = float(np.median(before)), float(np.sort(last)[(len(last) - 1) // 2])  # more than half are as high
        threshold = max(level + (self.settings.factor - 1) * abs(level), float(np.quantile(before, _USUAL)))
        return Rise(loss=loss, level=level) if loss > threshold else None

    def plan(self, rise: Rise, step: int, run_dir: Path) -> tuple[Path, Record]:
        """On the first rank: the checkpoint to go back to from ``step``, and what is to be noted.

        Raises TrainingError where the run may not go back once more, or nothing is there to go back to.
        """
        assert self.settings is not None
        told = f"step {step:,}: the loss has risen from {rise.level:.4g} to {rise.loss:.4g} (training.rollback)"
        if self.count >= self.settings.most:
            raise TrainingError(
                f"{told}, after the run has gone back {self.count:,} times, as often as training.rollback.most allows. "
                "A lower learning rate (optimizer.lr) or clipped gradients (training.clip_grad_norm) may hold it"
            )
        # not to before what was passed over last: until there all is as it was, and checkpoints of before may be gone
        at = max([step - self.reach, *(begin for begin, _ in self.order.skipped if begin <= step)])
        source = latest_checkpoint(run_dir, at)
        if source is None:
            raise TrainingError(f"{told}, and {run_dir} has no sound checkpoint of its first {at:,} steps for that")
        kept = [(begin, ahead) for begin, ahead in self.order.skipped if begin <= at]
        batches = self.order.place(step) - at - sum(ahead for _, ahead in kept)
        loss = rise.loss if math.isfinite(rise.loss) else None
        return source, Record(found=step, at=at, batches=batches, loss=loss, level=rise.level)

    def note(self, record: Record) -> None:
        """Pass over what a record says, from now on, and say so."""
        assert self.settings is not None
        self.take([*self.records, record])
        loss = "not finite" if record.loss is None else f"{record.loss:.4g}"
        log.warning(
            "the loss has risen: over the last %s steps its median is %s, before it was %s. The run goes back from "
            "step %s; from step %s on the samples of %s batches are passed over (rollback %s of at most %s)",
            *(f"{self.settings.patience:,}", loss, f"{record.level:.4g}", f"{record.found:,}", f"{record.at:,}"),
            *(f"{record.batches:,}", f"{self.count:,}", f"{self.settings.most:,}"),
        )

    def take(self, records: Sequence[Record]) -> None:
        """Make these the records of the run, by which its order goes."""
        self.records = list(records)
        self.order.skipped = _skipped(records)

    # ------------------------------------------------------------------ state

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it; nothing for a run that has nothing to do with it."""
        if self.settings is None and not self.records:
            return {}
        losses = [loss if math.isfinite(loss) else None for loss in self._losses]
        return {"rollback": {"losses": losses, "records": [asdict(record) for record in self.records]}}

    def restore(self, saved: Mapping[str, Any], records: Sequence[Record] | None) -> None:
        """Become what ``state`` told in ``saved``; ``records``: what the run folder tells, which may know more.

        Raises CheckpointError.
        """
        losses, own = _told(saved)
        self._losses.clear()
        self._losses.extend(losses)
        self.take(own if records is None else records)

    def fork(self, step: int, skipped: int) -> None:
        """Begin at ``step`` of another run's order, which was ahead by ``skipped`` batches."""
        self._losses.clear()
        self.take([Record(found=step, at=step, batches=skipped)] if skipped else [])


def _skipped(records: Sequence[Record]) -> tuple[tuple[int, int], ...]:
    """``Order.skipped``; a later record counts from the step that it went to, past all that was seen then."""
    skipped: list[tuple[int, int]] = []
    for record in records:
        skipped = [(at, batches) for at, batches in skipped if at <= record.at] + [(record.at, record.batches)]
    return tuple(skipped)


def _told(saved: Mapping[str, Any]) -> tuple[list[float], list[Record]]:
    """Losses and records in a checkpoint's state. Raises CheckpointError."""
    told = saved.get("rollback") or {"losses": [], "records": []}
    try:
        losses = [math.inf if loss is None else float(loss) for loss in told["losses"]]
        return losses, [_record(each) for each in told["records"]]
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"state.json tells no losses and rollbacks: {error}") from error


def ahead(saved: Mapping[str, Any]) -> int:
    """How many batches the order of samples is ahead of a checkpoint's step, by its state. Raises CheckpointError."""
    return sum(batches for at, batches in _skipped(_told(saved)[1]) if at <= saved["step"])


def _record(told: Mapping[str, Any]) -> Record:
    """A record as JSON gave it. Raises TypeError."""
    record = Record(**told)
    for field in fields(record):
        value = getattr(record, field.name)
        measured = field.name in ("loss", "level")
        if not (isinstance(value, float | int | None) if measured else type(value) is int and value >= 0):
            raise TypeError(f"{field.name} is {str(value)[:40]}")
    return record


# ---------------------------------------------------------------------------- the run folder's file


def read_records(run_dir: Path) -> list[Record] | None:
    """What ``rollbacks.json`` tells, None where there is none. Raises UserError for a damaged one."""
    path = run_dir / FILE
    if not path.exists():
        return None
    advice = "It tells which samples the run has passed over: delete it, and the newest checkpoint tells what it knew"
    found = read_object(path, {"rollbacks": list}, advice)["rollbacks"]
    try:
        return [_record(each) for each in found]
    except TypeError as error:
        raise UserError(f"{path} is damaged: {error}. {advice}") from error


def write_records(run_dir: Path, records: Sequence[Record]) -> None:
    """Write them down, whole. Raises OSError."""
    with written_whole(run_dir / FILE) as file:
        told = {"rollbacks": [asdict(record) for record in records]}
        file.write(json.dumps(told, indent=1).encode() + b"\n")


def keep_records(run_dir: Path, last: int) -> None:
    """Forget what was found after step ``last``: a longer run goes on from there. Raises UserError, OSError."""
    records = read_records(run_dir) or []
    kept = [record for record in records if record.found <= last]
    if kept != records:
        write_records(run_dir, kept)


def later_than(saved: Mapping[str, Any], records: Sequence[Record]) -> bool:
    """Return whether a checkpoint of this state is of a way that was left: by ``records`` that it knows nothing of.

    Raises CheckpointError.
    """
    known = _told(saved)[1]
    return any(record not in known and saved["step"] > record.at for record in records)


def parsed(content: bytes) -> list[Record]:
    """The records in the content of a ``rollbacks.json``; none in a damaged one."""
    try:
        return [_record(each) for each in json.loads(content)["rollbacks"]]
    except (ValueError, LookupError, TypeError):
        return []


def needed(steps: Sequence[int], reach: int) -> set[int]:
    """Those of the checkpoints of a run that a way back of ``reach`` steps may need, now or later.

    That is the newest of those that are old enough now, and the oldest of the others, which takes its place in time.
    """
    if not reach or not steps:
        return set()
    end = max(steps) - reach
    return {max((step for step in steps if step <= end), default=max(steps)), min(step for step in steps if step > end)}
