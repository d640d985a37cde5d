"""Tensors of which a rank holds a part (``training.parallel: fsdp`` or ``hsdp``), for those who keep copies of them.

Such a tensor is a ``DTensor``: its shape is that of the whole. Every function here takes plain tensors, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from cosmos_ssl.functional.collective_time import collective_time


def is_sharded(x: Tensor) -> bool:
    """Return whether a rank holds a part of ``x`` alone."""
    return hasattr(x, "full_tensor")  # asked so, since importing DTensor takes long


def local(x: Tensor) -> Tensor:
    """What this rank holds of ``x``, without gradient: the same memory."""
    if not is_sharded(x):
        return x.detach()
    with torch.no_grad():
        return cast(Tensor, cast(Any, x).to_local()).detach()


def whole(x: Tensor) -> Tensor:
    """All of ``x``, without gradient; a plain tensor as it is. A collective where it is sharded: all ranks call it."""
    if not is_sharded(x):
        return x.detach()
    found = x.detach()
    with collective_time.during(local(x)):
        return cast(Tensor, cast(Any, found).full_tensor())


def laid_out(x: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on all ranks, in the way that ``like`` lies: on its device, and of a sharded one this
    rank's part, or all of it where the shapes differ. A copy, of which no more is read than is kept.
    """
    if not is_sharded(like):
        return x.detach().to(like.device, copy=True)
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = cast(Any, like).device_mesh, cast(Any, like).placements
    if x.shape != like.shape:
        placements = [Replicate()] * mesh.ndim
    own = x.detach()
    for dim, placement in enumerate(placements):
        if placement.is_shard():
            parts, number = own.chunk(mesh.size(dim), placement.dim), mesh.get_local_rank(dim)
            own = parts[number] if number < len(parts) else own.narrow(placement.dim, 0, 0)
    own = own.to(like.device, copy=True)
    found = DTensor.from_local(own, mesh, placements, run_check=False, shape=x.shape, stride=x.stride())
    return cast(Tensor, found)


def sum_of_parts(x: Tensor, sharded: Sequence[Tensor]) -> Tensor:
    """``x`` summed over the ranks that share one copy of ``sharded``, which lie alike. A collective."""
    total = x.detach().clone()
    with collective_time.during(total):
        dist.all_reduce(total, group=cast(Any, sharded[0]).device_mesh.get_group("shard"))
    return total
