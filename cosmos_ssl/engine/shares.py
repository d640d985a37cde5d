"""What ranks that write files of one checkpoint tell the first of them, behind the training loop: by the store that the
world was started with, since collectives are the loop's.
"""

from __future__ import annotations

import errno
import itertools
import json
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from cosmos_ssl.errors import TrainingError

LEAVE_SECONDS = 20.0
"""A run that fails waits for so long for ranks that may be gone."""
_LOOK_SECONDS = 0.05
_worlds = itertools.count()


class Shares:
    """``number`` is that of the checkpoint, the same on all ranks."""

    def __init__(self) -> None:
        self._world: int | None = None
        self._leaving: float | None = None

    def join(self) -> None:
        """On all ranks together, before any tells or hears."""
        if self._world is None:
            self._world = next(_worlds)

    def leave(self) -> None:
        """Wait at most ``LEAVE_SECONDS`` from now on."""
        self._leaving = self._leaving or time.monotonic()

    def tell(self, rank: int, number: int, *, files: Mapping[str, Any], fault: BaseException | None = None) -> None:
        """Tell the first rank which files are written, with sizes and hashes, or why they are not."""
        told = {"files": files, "fault": fault and str(fault), "finite": not isinstance(fault, TrainingError)}
        with suppress(RuntimeError):  # nobody listens any more: the first rank has gone
            self._store().set(self._key(rank, number), json.dumps(told))

    def hear(self, ranks: Collection[int], number: int) -> dict[str, Any]:
        """On the first rank: wait for what these tell; all their files. Raises OSError, TrainingError as they did."""
        files: dict[str, Any] = {}
        for rank in sorted(ranks):
            told = self._told(rank, number)
            if not told["finite"]:
                raise TrainingError(told["fault"])
            if told["fault"]:
                raise OSError(errno.EIO, f"rank {rank}: {told['fault']}")
            files |= told["files"]
        return files

    def _told(self, rank: int, number: int) -> dict[str, Any]:
        key = self._key(rank, number)
        try:
            while not self._store().check([key]):
                if self._leaving is not None and time.monotonic() - self._leaving > LEAVE_SECONDS:
                    raise OSError(errno.EIO, f"rank {rank} has not written its files")
                time.sleep(_LOOK_SECONDS)
            told: dict[str, Any] = json.loads(self._store().get(key))
            self._store().delete_key(key)
        except RuntimeError as error:  # of the store
            raise OSError(errno.EIO, f"rank {rank} cannot be heard of") from error
        return told

    def _key(self, rank: int, number: int) -> str:
        return f"checkpoint/{self._world}/{number}/{rank}"

    def _store(self) -> Any:
        return dist.distributed_c10d._get_default_store()
