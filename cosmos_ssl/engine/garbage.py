"""Python's garbage collector on a schedule: all ranks pause after the same steps, and not each whenever it likes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY = 50
"""Steps."""


@contextmanager
def collected_on_schedule() -> Iterator[Callable[[int], None]]:
    """While entered nothing is collected but by what is yielded, to be called after each step with the steps of the run
    so far.

    It collects after the first call and every ``EVERY`` steps. What is there after the first stays out of it: the
    model, and all modules; unless the caller has frozen what it holds, which stays frozen, and that alone.
    """
    was_enabled, theirs = gc.isenabled(), gc.get_freeze_count() > 0
    gc.disable()
    first = True

    def stepped(step: int) -> None:
        nonlocal first
        if first or step % EVERY == 0:
            gc.collect()
        if first and not theirs:
            gc.freeze()
        first = False

    try:
        yield stepped
    finally:
        if not theirs:
            gc.unfreeze()
        if was_enabled:
            gc.enable()


@contextmanager
def collected_at_will() -> Iterator[None]:
    """While entered it is collected whenever Python likes, as outside of a run: an evaluation may take minutes."""
    was_enabled = gc.isenabled()
    gc.enable()
    try:
        yield
    finally:
        if not was_enabled:
            gc.disable()
