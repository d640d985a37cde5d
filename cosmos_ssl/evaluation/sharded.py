"""Rows of features of which each rank holds a share: blocks of them travel, and no rank needs to hold them all.

Shape letters: N rows of all ranks, R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from cosmos_ssl.functional import gather_objects, rank

BLOCK = 1 << 24
"""Numbers of a block that travels, about."""


class Sharded:
    """Rows [N, ...], of which rank r holds those from ``ends[r]`` up to ``ends[r + 1]``: ``own`` of this rank.

    With two ends each rank has them all, and nothing travels. Rows travel by way of the host, unchanged. What says so
    is called by all ranks alike.
    """

    def __init__(self, own: Tensor, ends: Sequence[int] | None = None) -> None:
        self.own = own
        self.ends = (0, len(own)) if ends is None else tuple(ends)

    @classmethod
    def gathered(cls, parts: Sequence[Tensor]) -> Sharded:
        """What each rank has computed, in rank order; some ranks may have nothing. Called by all ranks."""
        own = torch.cat(list(parts)) if parts else None
        told = gather_objects(None if own is None else (own.shape, own.dtype))
        shape, dtype = next((one for one in told if one is not None), (torch.Size([0]), torch.float32))
        ends = [0]
        for one in told:
            ends.append(ends[-1] + (0 if one is None else one[0][0]))
        return cls(torch.empty(0, *shape[1:], dtype=dtype) if own is None else own, ends)

    def __len__(self) -> int:
        """N."""
        return self.ends[-1]

    @property
    def shared(self) -> bool:
        """Whether ranks hold different rows."""
        return len(self.ends) > 2

    @property
    def bounds(self) -> tuple[int, int]:
        """Where this rank's rows begin and end."""
        at = rank() if self.shared else 0
        return self.ends[at], self.ends[at + 1]

    def to(self, device: torch.device | str) -> Sharded:
        """The same on a device."""
        return Sharded(self.own.to(device), self.ends)

    def block(self, start: int, stop: int) -> Tensor:
        """Rows from ``start`` up to ``stop``. Called by all ranks."""
        if not self.shared:
            return self.own[start:stop]
        block = torch.empty(max(0, min(stop, len(self)) - start), *self.own.shape[1:], dtype=self.own.dtype)
        first, last = self.bounds
        if first < start + len(block) and start < last:
            own = self.own[max(0, start - first) : start + len(block) - first]
            block[max(0, first - start) :][: len(own)] = own.cpu()
        for source in range(len(self.ends) - 1):
            begin, end = max(start, self.ends[source]), min(start + len(block), self.ends[source + 1])
            if begin < end and block[0].numel():
                part = block[begin - start : end - start]
                dist.broadcast(part.view(-1).view(torch.uint8), src=source)
        return block.to(self.own.device)

    def blocks(self, size: int | None = None, beyond: int = 0) -> Iterator[tuple[int, Tensor]]:
        """Each block's first row and its rows, ``size`` (default: about ``BLOCK`` numbers) and up to ``beyond`` more,
        which are the next block's too. Called by all ranks.
        """
        size = max(1, BLOCK // max(1, math.prod(self.own.shape[1:]))) if size is None else size
        for start in range(0, len(self), size if self.shared else max(1, len(self))):
            yield start, self.block(start, start + size + beyond if self.shared else len(self))

    def whole(self) -> Tensor:
        """All rows, on every rank. Called by all ranks."""
        if not self.shared:
            return self.own
        found = self.own.new_empty(len(self), *self.own.shape[1:])
        for start, block in self.blocks():
            found[start : start + len(block)] = block
        return found

    def moved(self, ends: Sequence[int]) -> Sharded:
        """The same rows with other ends. Called by all ranks."""
        if not self.shared or tuple(ends) == self.ends:
            return self
        found = Sharded(self.own, ends)
        first, last = found.bounds
        found.own = self.own.new_empty(last - first, *self.own.shape[1:])
        for start, block in self.blocks():
            part = block[max(0, first - start) : max(0, last - start)]
            found.own[max(0, start - first) :][: len(part)] = part
        return found
