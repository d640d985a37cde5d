"""A sign of life from work that takes long before training starts, for whoever watches over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

OnProgress = Callable[[int, int], None]
"""Told how much is done, and of how much (0 where that is not known)."""
OnStage = Callable[[str, int, int], None]
"""Told what is done, how much of it, and of how much."""
_listening: list[Callable[[], None]] = []


def alive(done: int = 0, total: int = 0) -> None:
    """Tell that work goes on; so much of it is done.

    To be called from time to time by what takes many minutes, from any thread.
    """
    for listen in tuple(_listening):
        listen()


@contextmanager
def heard(listen: Callable[[], None]) -> Iterator[None]:
    """While entered, ``listen`` is called by ``alive``."""
    _listening.append(listen)
    try:
        yield
    finally:
        _listening.remove(listen)
