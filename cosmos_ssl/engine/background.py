"""Writes checkpoints behind the training loop, has them copied elsewhere, and removes the old ones."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from cosmos_ssl.config import CheckpointsConfig
from cosmos_ssl.engine.checkpoint import Snapshot, begin_checkpoint, save_checkpoint, save_share
from cosmos_ssl.engine.copies import Copies
from cosmos_ssl.engine.rollback import needed
from cosmos_ssl.engine.shares import Shares
from cosmos_ssl.errors import CosmosError, StorageError, TrainingError
from cosmos_ssl.files import checkpoint_folders, checkpoint_step, set_aside
from cosmos_ssl.functional import rank

log = logging.getLogger(__name__)


class CheckpointWriter:
    """One write at a time, in a thread. The newest sound checkpoint is never removed."""

    def __init__(
        self,
        run_dir: Path,
        settings: CheckpointsConfig,
        steps_per_epoch: int,
        total_steps: int,
        *,
        sound: int | None,
        stable: int = 0,
        reach: int = 0,
        writes: bool = True,
    ) -> None:
        """``sound`` is the step of the checkpoint that the run goes on from, ``stable`` the last from which it can be
        prolonged, kept for good; without ``writes`` none is ever due: other ranks write their files of the first's.
        ``reach``: how many steps the run may go back.
        """
        self.run_dir = run_dir
        self.settings = settings
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = total_steps
        self.sound = sound
        self.stable = stable
        self.reach = reach
        self.writes = writes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.seconds = 0.0
        """How long the last write took."""
        self._fault: CosmosError | None = None
        self._writing: Future[None] | None = None
        self._step = -1
        self._owed, self._begun = False, time.monotonic()
        self.copies: Copies | None = None
        self._shares, self._number = Shares(), 0
        if writes:
            _set_aside(run_dir, newer_than=-1 if sound is None else sound)
            if settings.copy_to is not None:
                self.copies = Copies(run_dir, settings.copy_to, self._kept, self._prune)

    def due(self, step: int) -> bool:
        """Return whether to write after ``step``. One that is due by its step is never passed over, and waits for a
        write under way; one that is due by the clock is then owed to a later step.
        """
        if not self.writes:
            return False
        settings = self.settings
        on_time = settings.every_minutes is not None and time.monotonic() - self._begun >= 60 * settings.every_minutes
        self._owed |= on_time
        by_step = settings.every_steps is not None and step % settings.every_steps == 0
        must = step == self.total_steps or by_step or self._stays(step)
        return must or (self._owed and not self._busy())

    @property
    def fault(self) -> bool:
        """Whether a write has failed that nobody was told of."""
        self._busy()
        return self._fault is not None

    def take_fault(self) -> CosmosError:
        """Hand over the fault, and forget it: StorageError, or TrainingError where a tensor is not finite."""
        assert self._fault is not None
        fault, self._fault = self._fault, None
        return fault

    def has(self, step: int) -> bool:
        """Return whether the checkpoint of ``step`` is written or being written."""
        return self.sound == step or (self._writing is not None and self._step == step)

    def prepare(self) -> None:
        """Before ranks that share weights take a snapshot, on all: wait for a write that is under way, so that none
        holds two copies.
        """
        self._collect()
        self._shares.join()
        self._number += 1

    def begin(self, step: int) -> None:
        """On the first rank, before any writes: make the folder that several may write in."""
        if self.writes:
            try:
                begin_checkpoint(self.run_dir, step)
            except OSError as error:  # which writing there will tell
                log.debug("%s", error)

    def write(self, snapshot: Snapshot) -> None:
        """Start writing; waits only for one that is still under way."""
        self._collect()
        self._step = snapshot.step
        self._owed, self._begun = False, time.monotonic()
        if self.writes:
            self._writing = self._thread.submit(self._write, snapshot)
        elif rank() in snapshot.others:
            self._writing = self._thread.submit(self._write_share, snapshot, self._number)

    def leave(self) -> None:
        """Wait no longer for ranks that may be gone."""
        self._shares.leave()

    def wait(self, step: int) -> None:
        """Wait for what is being written. Raises ``take_fault`` unless the checkpoint of ``step`` is on the disk."""
        self._collect()
        if self.sound != step:
            raise self.take_fault()

    def settle(self) -> None:
        """Wait for what is being written; a failure is told later."""
        self._collect()

    def go_back(self, step: int) -> None:
        """Remove what is newer than the sound checkpoint of ``step``, from which the run goes on. Raises OSError."""
        if isinstance(self._fault, TrainingError):  # of the way that is left
            self._fault = None
        with nullcontext() if self.copies is None else self.copies.held(()):
            if self.copies is not None:
                self.copies.go_back(step)
            newer = [path for path in checkpoint_folders(self.run_dir) if (checkpoint_step(path) or 0) > step]
            for path in reversed(newer):  # no name stays of one whose files are going
                gone = path.with_name(f".{path.name}.tmp")
                shutil.rmtree(gone, ignore_errors=True)
                path.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)
        self.sound = step
        self._owed, self._begun = False, time.monotonic()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close(finished=kind is None)

    def close(self, *, finished: bool = True) -> None:
        """Wait, of copies where the run is ``finished``, and end the thread."""
        if not finished:
            self.leave()
        self._collect()
        self._thread.shutdown()
        if self._fault is not None:
            log.warning("%s", self.take_fault())
        if self.copies is not None:
            self.copies.close(finished=finished)

    def _write(self, snapshot: Snapshot) -> None:
        start = time.monotonic()
        others, number = snapshot.others, self._number
        save_checkpoint(self.run_dir, snapshot, partial(self._shares.hear, others, number) if others else None)
        self.seconds = time.monotonic() - start
        self.sound = snapshot.step
        if self.copies is not None:
            self.copies.prunes = snapshot.settled
        if snapshot.settled:
            self._prune()
        if self.copies is not None:
            self.copies.added(snapshot.step)

    def _write_share(self, snapshot: Snapshot, number: int) -> None:
        """On another rank than the first: write its files and tell it so."""
        try:
            self._shares.tell(rank(), number, files=save_share(self.run_dir, snapshot))
        except (OSError, TrainingError) as error:
            self._shares.tell(rank(), number, files={}, fault=error)

    def _prune(self) -> None:
        """Remove what the rules let go, but nothing that is still to be copied."""
        steps = [checkpoint_step(path) or 0 for path in checkpoint_folders(self.run_dir)]
        kept = self._kept(steps) | {self.sound}
        with nullcontext(set[int]()) if self.copies is None else self.copies.held(steps) as held:
            for path in checkpoint_folders(self.run_dir):
                if checkpoint_step(path) not in kept | held:
                    shutil.rmtree(path, ignore_errors=True)

    def _kept(self, steps: Collection[int]) -> set[int]:
        """Return those of the checkpoints of these steps that the rules keep."""
        last = set(sorted(steps)[-self.settings.keep_last :])
        return {step for step in steps if self._stays(step)} | last | needed(list(steps), self.reach)

    def _stays(self, step: int) -> bool:
        """Return whether the checkpoint of ``step`` is kept for good."""
        every = self.settings.keep_every_epochs
        return step == self.stable or (every is not None and step % (every * self.steps_per_epoch) == 0)

    def _busy(self) -> bool:
        """Return whether a checkpoint is being written; notes the outcome of one that is done."""
        if self._writing is not None and self._writing.done():
            self._collect()
        return self._writing is not None

    def _collect(self) -> None:
        """Wait for the write under way and note its failure, which the run may survive."""
        writing, self._writing = self._writing, None
        error = None if writing is None else writing.exception()
        if error is None:
            return
        last = "there is none yet" if self.sound is None else f"the last sound one is of step {self.sound:,}"
        told = f"{self.run_dir}: the checkpoint of step {self._step:,}"
        if isinstance(error, OSError):
            self._fault = StorageError(f"{told} could not be written ({error}), {last}")
        elif isinstance(error, TrainingError):
            hint = "Too high a learning rate does this (optimizer.lr)"
            self._fault = TrainingError(f"{told} was not written, since {error}; {last}. {hint}")
        else:
            raise error


def _set_aside(run_dir: Path, newer_than: int) -> None:
    """Rename checkpoints that were passed over as damaged, so that they neither hide nor outlive sound ones; drop
    unfinished ones.
    """
    for path in checkpoint_folders(run_dir):
        if (checkpoint_step(path) or 0) > newer_than:
            log.warning("%s was set aside as %s", path, set_aside(path).name)
    for path in (run_dir / "checkpoints").glob(".step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
