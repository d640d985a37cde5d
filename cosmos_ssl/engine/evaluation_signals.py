"""Signals during an evaluation: a signal to one rank stops the evaluation on all ranks, at the same step."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from cosmos_ssl.engine.distributed import World
from cosmos_ssl.engine.signals import Interrupted, Signals
from cosmos_ssl.errors import is_lost_rank

T = TypeVar("T")

POLL_SECONDS = 0.5
"""Interval at which a rank asks the store whether a signal has come to another rank."""

STOPPING = timedelta(seconds=10)
"""How long a rank that has stopped waits for the others to stop. A rank that waits in a collective cannot stop."""

_evaluations = itertools.count()


class EvaluationSignals:
    """Stops an evaluation on all ranks after a signal to any of them.

    The number of batches differs between ranks, so ranks share a signal through the store instead of a collective. No
    rank starts the next step before all ranks have ended the evaluation.
    """

    def __init__(self, signals: Signals, world: World) -> None:
        self._signals = signals
        self._world = world
        self._key = ""
        self._next_poll = 0.0

    def check(self) -> None:
        """Raise Interrupted if a signal has come to any rank."""
        signal = self._signals.received
        if self._world.size > 1 and signal is not None:
            dist.distributed_c10d._get_default_store().set(f"{self._key}/signal", str(signal))
        elif self._world.size > 1 and time.monotonic() >= self._next_poll:
            self._next_poll = time.monotonic() + POLL_SECONDS
            signal = self._shared_signal()
        if signal:
            raise Interrupted(signal)

    def run(self, evaluate: Callable[[], T]) -> T:
        """Return the result of ``evaluate`` when it has ended on all ranks.

        Args:
            evaluate: Calls ``check`` between its batches. All ranks call it.

        Raises:
            Interrupted: A signal has stopped the evaluation. ``together`` tells whether all ranks have stopped.
        """
        if self._world.size == 1:
            return evaluate()
        self._key, self._next_poll = f"evaluation/{next(_evaluations)}", 0.0
        try:
            try:
                result, signal = evaluate(), 0
            except Interrupted as error:
                signal = error.number
            if not self._all_stopped(wait=signal > 0):
                raise Interrupted(signal)
            signal = int(self._world.most([signal])[0])
        except Exception as error:
            # the rank that stopped may be missing from a collective, which then fails on the other ranks
            if not is_lost_rank(error) or not (signal := self._shared_signal()):
                raise
            raise Interrupted(signal) from error
        if signal:
            raise Interrupted(signal, together=True)
        return result

    def _shared_signal(self) -> int:
        """Return the signal that has come to one of the ranks, or 0."""
        store, key = dist.distributed_c10d._get_default_store(), f"{self._key}/signal"
        return int(store.get(key)) if store.check([key]) else 0

    def _all_stopped(self, *, wait: bool) -> bool:
        """Record that this rank has stopped. With ``wait``, return whether all ranks stop in time."""
        store = dist.distributed_c10d._get_default_store()
        store.set(f"{self._key}/stopped/{self._world.rank}", "")
        if wait:
            try:
                store.wait([f"{self._key}/stopped/{rank}" for rank in range(self._world.size)], STOPPING)
            except (dist.DistError, RuntimeError):
                return False
        return True
