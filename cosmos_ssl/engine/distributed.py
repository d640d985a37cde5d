"""Where a process stands: its device and memory, and its place among the ranks."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass

import torch

from cosmos_ssl.errors import UserError
from cosmos_ssl.functional import rank, world_size


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process's place among the ranks of a run."""

    rank: int
    size: int


def find_world() -> World:
    """The world this process belongs to; of size one where no process group was started."""
    return World(rank=rank(), size=world_size())


def pick_device(wanted: str) -> torch.device:
    """The device of this process for ``training.device``. Raises UserError where it is not there."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("training.device: cuda was asked for, and this machine has no CUDA device. Set it to auto or cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def be_deterministic() -> None:
    """Refuse every CUDA kernel whose result depends on timing (``training.deterministic``); before CUDA's first use."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next step instead of giving it back, for training on the CPU.

    A step allocates the same activations again and again; fetched anew from the kernel they come as zeroed pages,
    one fault each. Elsewhere than on glibc nothing happens.
    """
    if sys.platform != "linux":
        return
    mmap_threshold, trim_threshold, top_pad = -3, -1, -2  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, (1 << 31) - 1)
    mallopt(top_pad, 1 << 28)
