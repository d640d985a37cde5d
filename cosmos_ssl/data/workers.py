"""What a loader's worker process needs: signals, death with its parent, errors handed over instead of raised."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import NamedTuple

from cosmos_ssl.errors import CosmosError, StorageError, TrainingError, first_line

_PR_SET_PDEATHSIG = 1
_POLITE = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@contextmanager
def held_signals() -> Iterator[None]:
    """Hold polite signals back while workers start: one sent to the whole group must not meet a worker that cannot
    ignore it yet.

    A worker inherits the hold and lifts it in :class:`WorkerStart`; this thread gets what came meanwhile at the end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _POLITE)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass(frozen=True, slots=True)
class WorkerStart:
    """Called in each new worker. The trainer decides what a signal means; a worker only dies with it."""

    parent: int = field(default_factory=os.getpid)
    # the kernel's notice comes when the *thread* that forked ends: of use from the main thread alone
    from_main_thread: bool = field(default_factory=lambda: threading.current_thread() is threading.main_thread())

    def __call__(self, worker: int) -> None:
        """Set up the process of worker number ``worker``."""
        for number in _POLITE:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _POLITE)
        gc.freeze()  # what it inherits is not its to finalise: threads, connections
        gc.enable()  # the trainer's has a schedule
        if sys.platform == "linux" and self.from_main_thread:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != self.parent:  # it died before the call above
                os._exit(1)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork


class StatusLines:
    """What each worker is at, a line of text each, in memory that all processes share."""

    WIDTH = 240

    def __init__(self, workers: int) -> None:
        self._lines = [multiprocessing.get_context().RawArray("c", self.WIDTH) for _ in range(workers)]

    def write(self, worker: int, text: str) -> None:
        """Replace the line of one worker."""
        self._lines[worker].value = text.encode()[: self.WIDTH - 1]

    def read(self) -> list[str]:
        """The lines of all workers."""
        return [line.value.decode(errors="replace") for line in self._lines]


class Failure(NamedTuple):
    """An error on its way from a worker to the trainer, with the traceback it had."""

    error: Exception
    trace: str

    @classmethod
    def of(cls, error: Exception | SystemExit, where: str) -> Failure:
        """The error as the trainer should see it: storage and our own errors keep their kind, others name the
        culprit.
        """
        if isinstance(error, OSError) and not isinstance(error, CosmosError):
            handed: Exception = OSError(error.errno, f"{where}: {error.strerror or error}")
        elif isinstance(error, CosmosError) and _survives(error):
            handed = error
        else:
            handed = TrainingError(f"{where}: {first_line(error)}")
        return cls(handed, traceback.format_exc())

    def raise_(self) -> None:
        """Raise the error in this process; the worker's traceback stays with it as a note."""
        self.error.add_note(self.trace)
        raise self.error


def _survives(error: Exception) -> bool:
    """Return whether an error can be pickled and made again; one that cannot would be lost and leave the trainer
    waiting.
    """
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a plugin's error class does
        return False
    return True


def lost_worker(workers: Sequence[BaseProcess], error: Exception) -> StorageError:
    """The error for a worker that is gone, with the signal that took it."""
    dead = [w for w in workers if w.exitcode]
    if not dead:
        return StorageError(f"data: the loader failed: {error}")
    code = dead[0].exitcode or 0
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    hint = {
        "SIGKILL": "; out of memory? Lower loader.workers",
        "SIGBUS": "; /dev/shm is full? Enlarge it, or lower loader.workers",
    }.get(name, "")
    return StorageError(f"data: a loader worker was lost (process {dead[0].pid}, {name}{hint})")
