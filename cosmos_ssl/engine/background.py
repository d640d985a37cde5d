"""Writes checkpoints behind the training loop, and removes the old ones."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from cosmos_ssl.engine.checkpoint import Snapshot, checkpoint_folders, checkpoint_step, save_checkpoint
from cosmos_ssl.errors import StorageError

log = logging.getLogger(__name__)


class CheckpointWriter:
    """One write at a time, in a thread. The newest sound checkpoint is never removed."""

    def __init__(self, run_dir: Path, *, keep_last: int, keep: Callable[[int], bool], sound: int | None = None) -> None:
        """``keep`` tells the steps whose checkpoint stays for good; ``sound`` is the step of the one resumed from."""
        self.run_dir = run_dir
        self.keep_last = keep_last
        self.keep = keep
        self.sound = sound
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.seconds = 0.0
        """How long the last write took."""
        self._writing: Future[None] | None = None
        self._step = -1
        _set_aside(run_dir, newer_than=-1 if sound is None else sound)

    @property
    def busy(self) -> bool:
        """True while a checkpoint is being written; reports the outcome of one that is done."""
        if self._writing is not None and self._writing.done():
            self._collect()
        return self._writing is not None

    def has(self, step: int) -> bool:
        """Whether the checkpoint of ``step`` is written or being written."""
        return self.sound == step or (self._writing is not None and self._step == step)

    def write(self, snapshot: Snapshot) -> None:
        """Start writing; waits only for one that is still under way."""
        self._collect()
        self._step = snapshot.step
        self._writing = self._thread.submit(self._write, snapshot)

    def wait(self, step: int) -> None:
        """Wait for what is being written. Raises StorageError unless the checkpoint of ``step`` is on the disk."""
        fault = self._collect()
        if self.sound != step:
            last = "there is none" if self.sound is None else f"the last one is of step {self.sound:,}"
            raise StorageError(f"{self.run_dir}: the checkpoint of step {step:,} could not be written ({fault}); {last}")

    def close(self) -> None:
        """Wait, and end the thread."""
        self._collect()
        self._thread.shutdown()

    def _write(self, snapshot: Snapshot) -> None:
        start = time.monotonic()
        save_checkpoint(self.run_dir, snapshot)
        self.seconds = time.monotonic() - start
        self.sound = snapshot.step
        self._prune()

    def _prune(self) -> None:
        steps = [checkpoint_step(path) or 0 for path in checkpoint_folders(self.run_dir)]
        kept = {step for step in steps if self.keep(step)} | set(steps[-self.keep_last :]) | {self.sound}
        for path in checkpoint_folders(self.run_dir):
            if checkpoint_step(path) not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def _collect(self) -> OSError | None:
        """Wait for the write under way and report its failure, which the run survives."""
        writing, self._writing = self._writing, None
        if writing is None:
            return None
        error = writing.exception()
        if error is None:
            return None
        if not isinstance(error, OSError):
            raise error
        last = "there is none yet" if self.sound is None else f"the last sound one is of step {self.sound:,}"
        log.warning("the checkpoint of step %s could not be written: %s; training goes on, %s", f"{self._step:,}", error, last)
        return error


def _set_aside(run_dir: Path, newer_than: int) -> None:
    """Rename checkpoints that were passed over as damaged, so that they neither hide nor outlive sound ones; drop unfinished ones."""
    for path in checkpoint_folders(run_dir):
        if (checkpoint_step(path) or 0) > newer_than:
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            log.warning("%s was set aside as %s", path, aside.name)
    for path in (run_dir / "checkpoints").glob(".step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
