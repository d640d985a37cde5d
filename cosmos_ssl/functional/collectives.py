"""Losses over the global batch and the collectives behind them, for authors of losses.

One process is the world of size one: the same functions, no communication. With several ranks each
computes the rows of its own samples only; the few views of one side are gathered (by the engine, for
every ``Need`` with ``gathered=True``), and the other direction costs one sum of exponentials.

Shape letters: V, U views; B samples on this rank; N samples of all ranks; D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from cosmos_ssl.functional.collective_time import collective_time

T = TypeVar("T")


def world_size() -> int:
    """Number of ranks; 1 where no process group was started."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 where no process group was started."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_sum(x: Tensor) -> Tensor:
    """Sum over ranks, without gradient (running statistics, counts)."""
    if world_size() == 1:
        return x.detach()
    total = x.detach().clone()
    with collective_time.during(total):
        dist.all_reduce(total)
    return total


def all_max(x: Tensor) -> Tensor:
    """Largest value over ranks, elementwise, without gradient."""
    if world_size() == 1:
        return x.detach()
    most = x.detach().clone()
    with collective_time.during(most):
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return most


def gather_objects(value: T) -> list[T]:
    """Return what each rank gives, in rank order, by way of pickle: for small things."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def _single(name: str, older: str) -> Any:
    """A collective on one tensor, by the name that PyTorch 2.13 gave it; before that by the older one, which warns
    there.
    """
    return getattr(dist, name, None) or getattr(dist, older)


class _Gather(torch.autograd.Function):
    """Concatenate over ranks along the first dimension; the gradient is summed over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.new_empty(world_size() * x.shape[0], *x.shape[1:])
        with collective_time.during(x):
            _single("all_gather_single", "all_gather_into_tensor")(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        rows = grad.shape[0] // world_size()
        with collective_time.during(grad):
            if grad.is_cuda:
                out = grad.new_empty(rows, *grad.shape[1:])
                _single("reduce_scatter_single", "reduce_scatter_tensor")(out, grad)
                return out
            dist.all_reduce(grad)  # gloo has no reduce-scatter
        return grad[rank() * rows : (rank() + 1) * rows]


def gather(x: Tensor, *, dim: int = 0) -> Tensor:
    """Concatenate ``x`` over ranks along ``dim``, in rank order; gradients reach every rank's share, summed."""
    return gather_many([x], dim=dim)[0]


def gather_many(tensors: Sequence[Tensor], *, dim: int = 0) -> list[Tensor]:
    """``gather`` for several tensors of equal length along ``dim`` in a single collective."""
    if world_size() == 1 or not tensors:
        return list(tensors)
    rows = [x.movedim(dim, 0) for x in tensors]
    flat = [x.reshape(x.shape[0], -1) for x in rows]
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in flat) else torch.float32
    merged = cast(Tensor, _Gather.apply(torch.cat([x.to(dtype) for x in flat], dim=1)))  # type: ignore[no-untyped-call]
    parts = merged.split([x.shape[1] for x in flat], dim=1)
    return [
        part.reshape(part.shape[0], *x.shape[1:]).to(x.dtype).movedim(0, dim)
        for part, x in zip(parts, rows, strict=True)
    ]
