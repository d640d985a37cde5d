"""Cards whose peak rates are known."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

USABLE = 0.9
"""Share of a card's memory that tensors can fill, beside contexts, workspaces and gaps."""


@dataclass(frozen=True, slots=True)
class Card:
    """Peak rates of a card, dense."""

    name: str
    half: float
    """TFLOP/s of bfloat16 and float16."""
    tf32: float
    single: float
    """Of float32."""
    memory: float
    """TB/s."""
    gib: float
    host: float
    """GB/s from and to the host, one way."""
    link: float
    """GB/s to the other cards of the node, one way."""
    network: float
    """GB/s to other nodes, one way."""

    def peak(self, precision: str) -> float:
        """FLOP/s of products in a run's precision."""
        full = self.tf32 if torch.backends.cuda.matmul.allow_tf32 else self.single
        return 1e12 * (self.half if precision.startswith("amp") else full)


CARDS: Mapping[str, Card] = {
    "a100": Card("A100 SXM 80 GB", 312, 156, 19.5, 2.04, 79.2, 32, 300, 25),
    "h100": Card("H100 SXM 80 GB", 989, 494, 67, 3.35, 79.1, 64, 450, 50),
    "h200": Card("H200 SXM 141 GB", 989, 494, 67, 4.8, 139.8, 64, 450, 50),
    "b200": Card("B200 SXM 180 GB", 2250, 1125, 75, 8.0, 178.4, 64, 900, 50),
}
"""By NVIDIA's data sheets; a network of 400 Gb/s a card (200 for the A100)."""


def card_of(name: str) -> Card | None:
    """The card of CUDA's name for a device (``NVIDIA H100 80GB HBM3``), or None: slices of one and those of lower rates
    are others.
    """
    if re.search(r"MIG|H100 (PCIe|NVL)", name):
        return None
    return next((card for key, card in CARDS.items() if re.search(rf"\b{key}\b", name, re.IGNORECASE)), None)
