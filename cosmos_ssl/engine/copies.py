"""Copies the checkpoints of a run elsewhere behind the training loop, and tries again what has failed."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from cosmos_ssl.engine.remote import MANIFEST, RESULT, Remote
from cosmos_ssl.engine.signals import has_come
from cosmos_ssl.errors import CheckpointError
from cosmos_ssl.files import checkpoint_folder, checkpoint_folders, checkpoint_step

log = logging.getLogger(__name__)

WAITING = 4
"""So many checkpoints that the rules would remove wait to be copied; then the oldest of them goes uncopied."""
RETRY_SECONDS = (30.0, 1800.0)
"""The first and the longest wait after a failed copy; each is twice the one before, and a new checkpoint ends it."""
END_SECONDS = 600.0
"""A run that has ended tries for so long again what has failed."""
LEAVE_SECONDS = 5.0
"""A run that is told to leave, or fails, waits for so long: what is not copied then is at the next start."""


class Copies:
    """A thread that copies the checkpoints of ``run_dir`` to ``url``, the newest first.

    ``kept`` gives those of some steps that the rules keep, here as there; ``prune`` is called after each copy.
    """

    def __init__(
        self, run_dir: Path, url: str, kept: Callable[[Collection[int]], set[int]], prune: Callable[[], None]
    ) -> None:
        self.run_dir = run_dir
        self.remote = Remote(url)
        self.prunes = True
        """Whether older copies may go: not beside a checkpoint that stands on a step left out as not finite."""
        self._kept, self._prune = kept, prune
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._asked, self._ending, self._leaving, self._finished = True, float("inf"), False, False
        self._copied: set[int] | None = None  # not known yet
        self._others: set[int] = set()  # copies that are no longer this run's: it has gone back, or was prolonged
        self._turn = 0  # how often it has gone back meanwhile
        self._sick: set[int] = set()  # damaged here: not tried again
        self._busy: int | None = None
        self._told_full = False
        self._thread = threading.Thread(target=self._work, name="copies", daemon=True)
        self._thread.start()

    @contextmanager
    def held(self, steps: Collection[int]) -> Iterator[set[int]]:
        """Those of the checkpoints here that may not be removed; none is begun to be copied while entered."""
        with self._lock:
            copied = self._copied or set()
            newest = max(copied, default=-1)
            waiting = sorted(step for step in steps if step > newest and step not in self._sick)
            extra = [step for step in waiting if step not in self._kept(steps)]
            if len(extra) > WAITING and not self._told_full:
                self._told_full = True
                told = "%s: more than %s checkpoints wait to be copied to %s; the oldest are removed uncopied"
                log.warning(told, self.run_dir, WAITING, self.remote.url)
            yield {*extra[-WAITING:], *([] if self._busy is None else [self._busy])}

    def added(self, step: int) -> None:
        """Note that there is a new checkpoint of ``step``."""
        with self._changed:
            self._forget(lambda other: other == step)
            self._asked = True
            self._changed.notify()

    def go_back(self, step: int) -> None:
        """Note that the run goes on from ``step``: what is copied of later ones is no longer its."""
        with self._lock:
            self._turn += 1
            self._forget(lambda other: other > step)

    def _forget(self, which: Callable[[int], bool]) -> None:
        gone = set(filter(which, self._copied or ()))
        self._others |= gone
        if self._copied is not None:
            self._copied -= gone
        self._sick = {step for step in self._sick if not which(step)}

    def close(self, *, finished: bool) -> None:
        """Wait for what is left to be copied: where the run is ``finished`` until it is or a signal comes, else not for
        long.
        """
        with self._changed:
            self._ending = time.monotonic() + (END_SECONDS if finished else LEAVE_SECONDS)
            self._leaving, self._asked, self._finished = True, True, finished
            self._changed.notify()
        self._thread.join(1.0 if finished else LEAVE_SECONDS)
        if finished and self._thread.is_alive():
            log.info("waiting for the copies at %s, at most %.0f min", self.remote.url, END_SECONDS / 60)
            while self._thread.is_alive() and not has_come("the wait for the copies ends"):
                self._thread.join(0.1)
        with self._lock:
            left = self._left()
        if left or self._thread.is_alive():
            told = "%s: not all checkpoints are copied to %s (%s); the same command again copies them"
            which = ", ".join(f"step {step:,}" for step in left) or "the last is under way"
            log.warning(told, self.run_dir, self.remote.url, which)

    # ------------------------------------------------------------------ in the thread

    def _work(self) -> None:
        failures = 0
        while True:
            with self._changed:
                wait = (
                    min(RETRY_SECONDS[0] * 2 ** min(max(failures - 1, 0), 16), RETRY_SECONDS[1]) if failures else None
                )
                if self._leaving:  # the run waits
                    wait = min(wait or 0.0, max(self._ending - time.monotonic(), 0.0), RETRY_SECONDS[0])
                if not self._asked:
                    self._changed.wait(wait)
                self._asked = False
            try:
                self._copy_all()
                failures = 0
            except OSError as error:
                failures += 1
                told = "the checkpoints of %s could not be copied to %s (%s). They stay here, and it is tried again"
                log.warning(told, self.run_dir, self.remote.url, error.strerror or error)
            with self._lock:
                if self._leaving and not self._asked and (not failures or time.monotonic() >= self._ending):
                    return

    def _copy_all(self) -> None:
        """Copy what is left, the newest first. Raises OSError."""
        if self._copied is None:
            there = self.remote.whole()
            newest = max((checkpoint_step(path) or 0 for path in checkpoint_folders(self.run_dir)), default=-1)
            with self._lock:
                self._copied = {step for step, files in there.items() if step <= newest and self._is_same(step, files)}
                self._others = there.keys() - self._copied
        while (step := self._next()) is not None:
            try:
                began, turn = time.monotonic(), self._turn
                self.remote.send(checkpoint_folder(self.run_dir, step), self.run_dir)
                with self._lock:
                    (self._copied if turn == self._turn else self._others).add(step)
                    self._others -= self._copied
                    self._told_full = False
                told = "the checkpoint of step %s is copied to %s (%.1f s)"
                log.info(told, f"{step:,}", self.remote.url, time.monotonic() - began)
            except (CheckpointError, OSError) as error:
                if turn != self._turn:  # it was removed, since the run has gone back
                    continue
                if isinstance(error, OSError):
                    raise
                log.warning("%s; it is not copied", error)
                self._sick.add(step)
            finally:
                with self._lock:
                    self._busy = None
            if self.prunes:
                self._prune()
                self._prune_there()
        if self._finished and self._copied and (self.run_dir / RESULT).exists():
            self.remote.send_end(max(self._copied), self.run_dir)

    def _is_same(self, step: int, files: object) -> bool:
        """Whether a copy is of the checkpoint of that step here, or of one that is no longer here."""
        path = checkpoint_folder(self.run_dir, step) / MANIFEST
        try:
            return bool(json.loads(path.read_bytes())["files"] == files)
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # damaged here: the copy is the better one
            return True

    def _left(self) -> list[int]:
        """What is still to be copied, the newest first."""
        steps = [checkpoint_step(path) or 0 for path in checkpoint_folders(self.run_dir)]
        return sorted(self._kept(steps) - (self._copied or set()) - self._sick, reverse=True)

    def _next(self) -> int | None:
        with self._lock:
            if self._leaving and time.monotonic() >= self._ending:
                return None
            self._busy = next(iter(self._left()), None)
            return self._busy

    def _prune_there(self) -> None:
        """Remove the copies that the rules let go, and those that are no longer this run's once it has a newer one."""
        assert self._copied is not None
        others = {step for step in self._others if step < max(self._copied, default=-1)}
        for step in sorted(self._copied - self._kept(self._copied) | others):
            self.remote.remove(step)
            with self._lock:
                self._copied.discard(step)
                self._others.discard(step)
