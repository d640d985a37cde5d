"""Photometric work on image views: drawn per view in the workers, applied to whole batches on the device.

Every operation works on 8-bit values (held as whole numbers in float32) and cuts or rounds its result to 8-bit
values again, as a chain of transforms over 8-bit pictures does. Shape letters: V views of one sample, N views of
a batch in any order, 3 channels, H x W pixels.

The result of a view never depends on the other views of its batch: every kernel below rounds each element once
and by itself, or sums whole numbers that float32 and float64 hold exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

FLIP, JITTER, ORDER, FACTORS, GREY, BLUR, SOLARIZE, COLUMNS = 0, 1, 2, 6, 10, 11, 12, 13
"""Columns of a parameter row: flip and jitter (0 or 1), the order of the four jitter operations, their factors
(brightness, contrast, saturation, hue), grey (0 or 1), blur radius (0: none), solarise threshold (256: none)."""

CPU_BYTES, DEVICE_BYTES = 1 << 20, 1 << 28
"""Float pixels worked on at once: a part of a core's cache, or a bound on the device memory taken."""

MAX_BLUR = 100.0
"""Pixels; a wider blur leaves nothing of a view."""

_TIE = 2.0**-12
"""Added before values are cut: more than float32 loses here, so that whole results stay whole."""

_BYTE = 255.999 / 255
"""From [0, 255] to what is cut to 8 bits, as torchvision converts a float picture."""

_Operation = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Strengths:
    """How often and how strongly one view is changed: probabilities, and what the factors are drawn from."""

    flip: float
    jitter: float
    factors: tuple[float, float, float, float]
    """Brightness, contrast, saturation: uniform in 1 +- x, not below 0; hue: in +- x turns."""
    grey: float
    blur: float
    blur_radius: tuple[float, float]
    solarize: float
    solarize_threshold: float


class Draw:
    """Draws the parameter rows of one sample's views: float32 [V, COLUMNS].

    Fourteen uniform numbers a view, whatever comes of them, so that a view's parameters depend on nothing else.
    """

    def __init__(self, views: Sequence[Strengths]) -> None:
        spread = np.array([view.factors for view in views])
        centre = np.array([1.0, 1.0, 1.0, 0.0])
        self._low = np.where(centre > 0, np.maximum(0.0, centre - spread), -spread)
        self._range = centre + spread - self._low
        self._odds = np.array([[view.flip, view.jitter, view.grey, view.blur, view.solarize] for view in views])
        radius = np.array([view.blur_radius for view in views])
        self._radius, self._radius_range = radius[:, 0], radius[:, 1] - radius[:, 0]
        self._threshold = np.array([view.solarize_threshold for view in views])

    def __call__(self, rng: np.random.Generator) -> Tensor:
        """One row for each view, all randomness from ``rng``."""
        uniform = rng.random((len(self._odds), 14))
        happens = uniform[:, :5] < self._odds
        rows = np.empty((len(self._odds), COLUMNS), dtype=np.float32)
        rows[:, FLIP], rows[:, JITTER], rows[:, GREY] = happens[:, 0], happens[:, 1], happens[:, 2]
        rows[:, ORDER:FACTORS] = uniform[:, 5:9].argsort(axis=1)
        rows[:, FACTORS:GREY] = self._low + self._range * uniform[:, 9:13]
        rows[:, BLUR] = happens[:, 3] * (self._radius + self._radius_range * uniform[:, 13])
        rows[:, SOLARIZE] = np.where(happens[:, 4], self._threshold, 256.0)
        return torch.from_numpy(rows)


def finish(pixels: Tensor, params: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Change each view as its row says, scale to [0, 1] and normalise.

    ``pixels`` uint8 [N, 3, H, W] and ``params`` float32 [N, COLUMNS] -> float32 [N, 3, H, W] on the pixels' device.
    The parameters are read on the host: where they lie on another device, this waits for it once.
    """
    rows = params.cpu().numpy()
    out = torch.empty(pixels.shape, dtype=torch.float32, device=pixels.device)
    # Views of one order lie side by side, so that most operations take a whole piece in place.
    order = np.lexsort(tuple((rows[:, ORDER:FACTORS].T + 1) * rows[:, JITTER]))
    size = max(1, (CPU_BYTES if pixels.device.type == "cpu" else DEVICE_BYTES) // (4 * pixels.shape[1:].numel()))
    for start in range(0, len(order), size):
        part = order[start : start + size]
        index = torch.from_numpy(part).to(pixels.device, non_blocking=True)
        views = photometric(pixels.index_select(0, index), rows[part])
        out.index_copy_(0, index, standardise(views, mean, std))
    return out


def standardise(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Bring 0..255, uint8 or float32, to ([0, 1] - mean) / std: [N, 3, H, W], in place for float32."""
    scale = torch.tensor([1 / (255 * s) for s in std]).to(x.device, non_blocking=True).view(3, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).to(x.device, non_blocking=True).view(3, 1, 1)
    return x.float().mul_(scale).add_(shift)


def photometric(pixels: Tensor, rows: NDArray[np.float32]) -> Tensor:
    """The operations of ``rows`` [N, COLUMNS] on uint8 views [N, 3, H, W]: whole numbers 0..255 in float32."""
    x = change(pixels.float(), rows[:, FLIP] > 0, _flip)
    jittered = rows[:, JITTER] > 0
    for turn in range(4):
        for number, operation in enumerate((_brightness, _contrast, _saturation, _hue)):
            x = change(x, jittered & (rows[:, ORDER + turn] == number), operation, rows[:, FACTORS + number])
    x = change(x, rows[:, GREY] > 0, _grey)
    radius = box_radius(rows[:, BLUR])
    inner = np.where(rows[:, BLUR] > 0, np.floor(radius), -1)
    for whole in np.unique(inner[inner >= 0]):
        x = change(x, inner == whole, partial(_blur, inner=int(whole)), radius)
    return change(x, rows[:, SOLARIZE] < 256, _solarize, rows[:, SOLARIZE])


def change(
    x: Tensor, chosen: NDArray[np.bool_], operation: _Operation, values: NDArray[np.float32] | None = None
) -> Tensor:
    """Apply ``operation(views, values [n, 1, 1, 1])`` to the chosen views of ``x``; works in place on ``x``."""
    which = np.flatnonzero(chosen)
    if not len(which):
        return x
    chosen_values = np.ones(len(which), dtype=np.float32) if values is None else values[which]
    value = torch.from_numpy(chosen_values).to(x.device, non_blocking=True).view(-1, 1, 1, 1)
    if len(which) == len(x):
        return operation(x, value)
    index = torch.from_numpy(which).to(x.device, non_blocking=True)
    return x.index_copy_(0, index, operation(x.index_select(0, index), value))


def mirror(x: Tensor, flipped: Tensor) -> Tensor:
    """Mirror the views of ``x`` [N, 3, H, W] marked in ``flipped`` [N], in place."""
    return change(x, flipped.cpu().numpy() > 0, _flip)


def luma(x: Tensor) -> Tensor:
    """0.2989 R + 0.587 G + 0.114 B (ITU-R BT.601), cut to whole numbers: [N, 1, H, W]. The sum is exact."""
    r, g, b = x.split(1, dim=1)
    weighted: Tensor = r.mul(2989).add_(g, alpha=5870).add_(b, alpha=1140)
    return weighted.mul_(1e-4).floor_()


def box_radius(radius: NDArray[np.float32]) -> NDArray[np.float32]:
    """Radius of the extended box blur that, three times over, stands for a Gaussian of this radius (standard
    deviation).

    Gwosdek et al., Theoretical Foundations of Gaussian Convolution by Extended Box Filtering, 2011; the sizes of PIL.
    """
    variance = radius.astype(np.float64) ** 2 / 3
    inner = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    edge = (2 * inner + 1) * (inner * (inner + 1) - 3 * variance) / (6 * (variance - (inner + 1) ** 2))
    boxes: NDArray[np.float32] = (inner + edge).astype(np.float32)
    return boxes


def _flip(x: Tensor, _: Tensor) -> Tensor:
    return x.flip(-1)


def _cut(x: Tensor) -> Tensor:
    return x.clamp_(0, 255).floor_()


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return _cut(x.mul_(factor))


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    total = luma(x).sum(-1, keepdim=True).double().sum(-2, keepdim=True)  # exact, so in any order
    level = (total / x.shape[-2:].numel()).float()
    return _cut(x.mul_(factor).add_((1 - factor) * level + _TIE))


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    grey = luma(x).mul_(1 - factor).add_(_TIE)
    return _cut(x.mul_(factor).add_(grey))


def _hue(x: Tensor, factor: Tensor) -> Tensor:
    """Turn the hue by ``factor`` of a full circle; value and saturation (of HSV) stay.

    A channel is lowest + span w, where w falls from 1 to 0 between a sixth and a third of a turn away from the
    hue of the pure channel (red 0, green 1/3, blue 2/3).
    """
    r, g, b = x.split(1, dim=1)
    high = torch.maximum(r, g).maximum(b)
    span = high - torch.minimum(r, g).minimum(b)
    turn: Tensor = (r - g).add_(span, alpha=4)  # in sixths times span, blue highest
    turn.lerp_((b - r).add_(span, alpha=2), torch.eq(g, high, out=torch.empty_like(g)))
    turn.lerp_(g - b, torch.eq(r, high, out=torch.empty_like(r)))
    turn.div_(span.clamp(min=1).mul_(6))
    away = turn + (factor - torch.tensor([0, 1 / 3, 2 / 3]).to(x.device, non_blocking=True).view(3, 1, 1))
    away.sub_(away.round()).abs_().clamp_(1 / 6, 1 / 3)
    return away.mul_(span * (-6 * _BYTE)).add_(high.add_(span).mul_(_BYTE).add_(_TIE)).floor_()


def _grey(x: Tensor, _: Tensor) -> Tensor:
    return x.copy_(luma(x))


def _blur(x: Tensor, radius: Tensor, inner: int) -> Tensor:
    """Three box blurs along each axis, edges repeated and values rounded after each, as PIL's GaussianBlur does.

    The box's ``inner`` pixels on each side count in full, the next ones by the fraction of ``radius`` [n, 1, 1, 1].
    Pictures lie in a frame, flat in memory: shifting one by k pixels, or by k rows, is an offset into it.
    """
    frame, margin = F.pad(x, [inner + 1] * 4), inner + 1
    other = torch.empty_like(frame)
    edge, share = (radius - inner).view(-1, 1), (1 / (2 * radius + 1)).view(-1, 1)
    for axis, stride in ((3, 1), (2, frame.shape[3])):
        for _ in range(3):
            size = frame.shape[axis]
            frame.narrow(axis, 0, margin).copy_(frame.narrow(axis, margin, 1).expand_as(frame.narrow(axis, 0, margin)))
            frame.narrow(axis, size - margin, margin).copy_(
                frame.narrow(axis, size - margin - 1, 1).expand_as(frame.narrow(axis, 0, margin))
            )
            flat, reach = frame.view(len(x), -1), margin * stride
            length = flat.shape[1] - 2 * reach
            line = torch.add(flat[:, :length], flat[:, 2 * reach :], out=other.view(len(x), -1)[:, reach:-reach]).mul_(
                edge
            )
            for step in range(-inner, inner + 1):
                line.add_(flat.narrow(1, reach + step * stride, length))
            line.mul_(share).round_()
            frame, other = other, frame
    return frame[:, :, margin:-margin, margin:-margin]


def _solarize(x: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(x >= threshold, 255 - x, x)
