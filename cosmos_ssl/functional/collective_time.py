"""How long this process has been in collectives: what tells a slow rank from those that wait for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class CollectiveTime:
    """Adds up the time spent in collectives: of the process for host tensors, of its stream for those on a CUDA
    device.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def during(self, x: Tensor) -> Iterator[None]:
        """A collective on ``x``."""
        if not x.is_cuda:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
            return
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        yield
        end.record()
        self._running.append((start, end))
        while self._running and self._running[0][1].query():
            self._add()

    def total(self) -> float:
        """Seconds since the process began; waits for the device."""
        while self._running:
            self._running[0][1].synchronize()
            self._add()
        return self._seconds

    def _add(self) -> None:
        start, end = self._running.popleft()
        self._seconds += start.elapsed_time(end) / 1000


collective_time = CollectiveTime()
"""Of this process."""
