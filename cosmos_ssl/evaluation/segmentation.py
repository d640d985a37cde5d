"""Zero-shot segmentation without training: patch features against class vectors, in windows (SCLIP, arXiv 2312.01597).

Shape letters: Q names, C classes (several names may share one), H x W pixels, N patches, D shared width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from cosmos_ssl.api import TowerSpec, normalise
from cosmos_ssl.evaluation.bootstrap import Outcome
from cosmos_ssl.evaluation.features import check_finite

IGNORED = 255
"""The label of pixels that do not count."""
_LONG_SIDE = 2048


class DenseEncoder(Protocol):
    """What a model must offer for it: ``ModelEncoder`` does."""

    def dense(self, pixels: Tensor, *, csa: bool = False) -> tuple[Tensor, Tensor]:
        """Normalised pictures [B, 3, H, W] -> patch tokens in the shared space [B, N, D], and the pooled feature."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentationProtocol:
    """How a set is segmented. Sizes in pixels."""

    short_side: int = 336
    """The picture's shorter side is brought to this (bilinear), and its longer one to 2,048 at most."""
    scale: float = 40.0
    """The inverse temperature of the softmax over names."""
    prob_thd: float = 0.0
    """A pixel whose best class is less probable becomes class 0."""
    area_thd: float | None = None
    """Classes after the first that get no more than this share of the pixels of these classes get none."""
    window: int = 224
    stride: int = 112
    csa: bool = True
    """Correlative self-attention in the last block."""


def resized(picture: Tensor, protocol: SegmentationProtocol) -> Tensor:
    """uint8 [3, H, W] -> float 0..255 of the protocol's size, rounded to whole values as pictures have them."""
    height, width = picture.shape[1:]
    factor = min(protocol.short_side / min(height, width), _LONG_SIDE / max(height, width))
    size = [max(1, int(side * factor + 0.5)) for side in (height, width)]
    return F.interpolate(picture[None].float(), size=size, mode="bilinear", align_corners=False)[0].round_()


def model_input(picture: Tensor, protocol: SegmentationProtocol, tower: TowerSpec) -> Tensor:
    """uint8 [3, H, W] -> of the protocol's size and normalised as the tower wants it."""
    mean, std = (torch.tensor(values, device=picture.device)[:, None, None] for values in (tower.mean, tower.std))
    return (resized(picture, protocol) / 255 - mean) / std


def windows(length: int, window: int, stride: int) -> list[tuple[int, int]]:
    """First and last pixel (exclusive) of each window along one side; the last one ends at the border."""
    count = max(length - window + stride - 1, 0) // stride + 1
    ends = [min(n * stride + window, length) for n in range(count)]
    return [(max(end - window, 0), end) for end in ends]


def window_logits(
    encoder: DenseEncoder, pixels: Tensor, vectors: Tensor, protocol: SegmentationProtocol, patch_size: int
) -> Tensor:
    """Cosines of pixels and names [Q, H, W]: of a normalised picture [3, H, W] and vectors [Q, D], averaged over
    windows.

    Windows are encoded together; one that is no whole number of patches is filled up with zeros. Raises UserError for
    features that are not finite.
    """
    _, height, width = pixels.shape
    places = [
        (*y, *x)
        for y in windows(height, protocol.window, protocol.stride)
        for x in windows(width, protocol.window, protocol.stride)
    ]
    crops = torch.stack([pixels[:, y0:y1, x0:x1] for y0, y1, x0, x1 in places])
    rows, columns = crops.shape[-2:]
    crops = F.pad(crops, (0, -columns % patch_size, 0, -rows % patch_size))
    grid = [side // patch_size for side in crops.shape[-2:]]
    tokens, _ = encoder.dense(crops, csa=protocol.csa)
    check_finite(tokens, "windows")
    logits = (normalise(tokens) @ vectors.T).transpose(1, 2).unflatten(2, grid)
    total: Tensor = logits.new_zeros(len(vectors), height, width)
    count: Tensor = logits.new_zeros(height, width)
    for (y0, y1, x0, x1), part in zip(places, logits, strict=True):
        full = F.interpolate(part[None], size=crops.shape[-2:], mode="bilinear", align_corners=False)[0]
        total[:, y0:y1, x0:x1] += full[:, :rows, :columns]
        count[y0:y1, x0:x1] += 1
    return total / count


def decide(logits: Tensor, owners: Tensor, protocol: SegmentationProtocol) -> Tensor:
    """Class of each pixel int64 [H, W], of cosines [Q, H, W]; ``owners`` int64 [Q], from 0 and rising, is the class of
    each name.
    """
    probabilities = (logits * protocol.scale).softmax(0)
    shares: list[int] = owners.bincount().tolist()
    if len(shares) != len(owners):
        probabilities = torch.stack([part.amax(0) for part in probabilities.split(shares)])
    if protocol.area_thd is not None:
        areas = probabilities.argmax(0).flatten().bincount(minlength=len(shares))[1:]
        probabilities[1:] *= (areas > protocol.area_thd * areas.sum())[:, None, None]
    most, found = probabilities.max(0)
    return found.masked_fill(most < protocol.prob_thd, 0)


def segment(
    encoder: DenseEncoder,
    pixels: Tensor,
    vectors: Tensor,
    owners: Tensor,
    size: Sequence[int],
    protocol: SegmentationProtocol,
    patch_size: int,
) -> Tensor:
    """Classes int64 [height, width] of a normalised picture [3, H, W], brought to ``size`` (height, width) before they
    are decided.
    """
    logits = window_logits(encoder, pixels, vectors, protocol, patch_size)
    return decide(
        F.interpolate(logits[None], size=tuple(size), mode="bilinear", align_corners=False)[0], owners, protocol
    )


def areas(found: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Pixels of each class int64 [3, C]: found rightly, found, and labelled, where the label counts.

    Both inputs [H, W].
    """
    counts = labels != IGNORED
    found, labels = found[counts], labels[counts]
    return torch.stack([part.bincount(minlength=classes) for part in (found[found == labels], found, labels)])


def segmentation_outcomes(rows: Tensor) -> dict[str, Outcome]:
    """``miou`` as an outcome of pictures, from the ``areas`` [N, 3, C] of each."""
    right, found, labelled = rows.unbind(1)
    union = found + labelled - right
    units, groups = union.nonzero(as_tuple=True)
    return {"miou": Outcome(units, right[units, groups], union[units, groups], groups)}


def segmentation_metrics(total: Tensor) -> dict[str, float]:
    """``miou``, ``mean_accuracy`` and ``pixel_accuracy`` of summed ``areas`` [3, C], as shares.

    The mean is over classes that were found or labelled somewhere (of accuracies: labelled).
    """
    right, found, labelled = total.double()
    union = found + labelled - right
    return {
        "miou": (right / union)[union > 0].mean().item(),
        "mean_accuracy": (right / labelled)[labelled > 0].mean().item(),
        "pixel_accuracy": (right.sum() / labelled.sum()).item(),
    }
