"""A sign of life from work that takes long before training starts, for whoever watches over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

OnProgress: TypeAlias = Callable[[int, int], None]
"""Called with how much of some work is done, and how much there is in all."""
OnStage: TypeAlias = Callable[[str, int, int], None]
"""The same for work of several stages: what is done comes first."""

_listening: list[Callable[[], None]] = []


def alive(done: int = 0, total: int = 0) -> None:
    """Tell that work goes on; so much of it is done.

    To be called from time to time by what takes many minutes, from any thread.
    """
    for listen in tuple(_listening):
        listen()


_doing: list[str] = []


@contextmanager
def doing(what: str) -> Iterator[None]:
    """While entered, ``place`` says what is done; it is a sign of life too."""
    _doing.append(what)
    alive()
    try:
        yield
    finally:
        _doing.remove(what)


def place() -> str:
    """What is done now, of the work before training starts."""
    return _doing[-1] if _doing else "at the start"


@contextmanager
def on_alive(listen: Callable[[], None]) -> Iterator[None]:
    """While entered, ``listen`` is called by ``alive``."""
    _listening.append(listen)
    try:
        yield
    finally:
        _listening.remove(listen)
