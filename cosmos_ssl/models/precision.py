"""The arithmetic of a run: what ``training.precision`` means on a device, and where it has no fast path."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.nn import functional as F

DTYPES: Mapping[str, torch.dtype | None] = {"fp32": None, "amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}
"""Precision -> what autocast computes in; None is no autocast."""

_SIDE, _TRIES = 128, 4
_SLOW = 3.0
"""Times a float32 matrix product: with instructions of its own half precision takes 0.5 to 2, without them 5 and more.
"""


def resolve_precision(name: str, device: torch.device) -> str:
    """``name``, or what ``auto`` is on this device: ``amp_fp16`` on CUDA, in which the recipes' methods were published,
    else ``fp32``.
    """
    if name != "auto":
        return name
    return "amp_fp16" if device.type == "cuda" else "fp32"


def has_fast_path(precision: str, device: torch.device) -> bool:
    """Return whether the device has instructions for this precision; found on the CPU by trying (some milliseconds)."""
    dtype = DTYPES[precision]
    if dtype is None:
        return True
    if device.type == "cuda":
        return dtype != torch.bfloat16 or torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or _seconds(dtype) < _SLOW * _seconds(torch.float32)


@contextmanager
def coarse_products(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """While entered, under autocast to ``dtype`` on CUDA, products of float32 tensors round their factors to 10 bits of
    mantissa and add up in float32 (TF32): what losses compute of features that are no finer themselves.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    if device.type == "cuda" and dtype is not None:
        matmul.allow_tf32 = True
    try:
        yield
    finally:
        if matmul.allow_tf32 != before:
            matmul.allow_tf32 = before


def _seconds(dtype: torch.dtype) -> float:
    """Of a small matrix product, the shortest of a few."""
    x = torch.ones(_SIDE, _SIDE, dtype=dtype)
    found = []
    for _ in range(_TRIES):
        start = time.perf_counter()
        F.linear(x, x)
        found.append(time.perf_counter() - start)
    return min(found)
