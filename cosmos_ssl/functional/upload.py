"""Small arrays of the host on their way to the device."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNED = 16
"""Bytes: where any type of number may begin."""


def upload(device: torch.device | str, *arrays: NDArray[Any] | Tensor) -> list[Tensor]:
    """The arrays as tensors on ``device``: to CUDA all by one copy from pinned memory, for which nothing waits.

    On the host they share the arrays' memory.
    """
    tensors = [torch.as_tensor(array) for array in arrays]
    if torch.device(device).type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    sizes = [-(-tensor.nbytes // _ALIGNED) * _ALIGNED for tensor in tensors]
    host = torch.empty(sum(sizes), dtype=torch.uint8)
    for tensor, part in zip(tensors, host.split(sizes), strict=True):
        part[: tensor.nbytes].view(tensor.dtype).copy_(tensor.reshape(-1))
    parts = host.pin_memory().to(device, non_blocking=True).split(sizes)
    return [
        part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape) for tensor, part in zip(tensors, parts, strict=True)
    ]
