"""What ranks do together beside losses: one does it for all, or each takes the next piece of the work."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch.distributed as dist

from cosmos_ssl.errors import CosmosError
from cosmos_ssl.functional.collectives import rank, world_size

T = TypeVar("T")

_worlds_of_turns = itertools.count()


def from_first(make: Callable[[], T]) -> T:
    """Return what ``make`` returns on the first rank, on all; an error of ours or of storage that it raises there is
    raised on all.
    """
    if world_size() == 1:
        return make()
    told: list[Any] = [None, None]
    error: BaseException | None = None
    if rank() == 0:
        try:
            told[0] = make()
        except (CosmosError, OSError) as caught:
            error = told[1] = caught
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise error or told[1]
    return cast(T, told[0])


def turns(count: int) -> Iterator[int]:
    """The numbers from 0 to ``count`` - 1, each on one of the ranks: on whichever asks next.

    So a slow rank takes less of the work, and none waits for another. Called by all ranks.
    """
    if world_size() == 1:
        return iter(range(count))
    store, key = dist.distributed_c10d._get_default_store(), f"turns/{next(_worlds_of_turns)}"
    return itertools.takewhile(lambda number: number < count, (store.add(key, 1) - 1 for _ in itertools.count()))
