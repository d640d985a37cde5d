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
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from cosmos_ssl.functional import upload
from cosmos_ssl_plugins.augmenters.fused import KERNELS, fused, normalised

FLIP, JITTER, ORDER, FACTORS, GREY, BLUR, SOLARIZE, COLUMNS = 0, 1, 2, 6, 10, 11, 12, 13
"""Columns of a parameter row: flip and jitter (0 or 1), the order of the four jitter operations, their factors
(brightness, contrast, saturation, hue), grey (0 or 1), blur radius (0: none), solarise threshold (256: none)."""

CPU_BYTES, DEVICE_BYTES = 1 << 20, 1 << 29
"""Float pixels worked on at once: a part of a core's cache, or a bound on the device memory taken."""

MAX_BLUR = 100.0
"""Pixels; a wider blur leaves nothing of a view."""

_TIE = 2.0**-12
"""Added before values are cut: more than float32 loses here, so that whole results stay whole."""

_BYTE = 255.999 / 255
"""From [0, 255] to what is cut to 8 bits, as torchvision converts a float picture."""

_PURE = np.array([0, 1 / 3, 2 / 3], dtype=np.float32)
"""Hues of red, green and blue."""


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


def finish(
    pixels: Tensor, params: Tensor, mean: Sequence[float], std: Sequence[float], kernels: str = "auto"
) -> Tensor:
    """Change each view as its row says, scale to [0, 1] and normalise.

    ``pixels`` uint8 [N, 3, H, W] and ``params`` float32 [N, COLUMNS] -> float32 [N, 3, H, W] on the pixels' device.
    The parameters are read on the host: where they lie on another device, this waits for it once. ``kernels`` is
    ``training.kernels``.
    """
    rows = params.cpu().numpy()
    if _fusible(pixels, kernels):
        return fused(pixels, *upload(pixels.device, table(rows), _scales(mean, std)))
    out = torch.empty(pixels.shape, dtype=torch.float32, device=pixels.device)
    # Views whose colours turn at the same place, and of one order, lie side by side: operations take them in place.
    order = np.lexsort((*(rows[:, ORDER:FACTORS].T + 1) * rows[:, JITTER], _hue_place(rows)))
    size = max(1, (CPU_BYTES if pixels.device.type == "cpu" else DEVICE_BYTES) // (4 * pixels.shape[1:].numel()))
    for start in range(0, len(order), size):
        part = order[start : start + size]
        (index,) = upload(pixels.device, part)
        views = photometric(pixels.index_select(0, index), rows[part])
        out.index_copy_(0, index, standardise(views, mean, std, kernels))
    return out


def standardise(x: Tensor, mean: Sequence[float], std: Sequence[float], kernels: str = "auto") -> Tensor:
    """Bring 0..255, uint8 or float32, to ([0, 1] - mean) / std: [..., 3, H, W], in place for float32."""
    if x.dtype == torch.uint8 and _fusible(x, kernels):
        views, rows = x.flatten(0, -4), np.zeros((x.shape[:-3].numel(), COLUMNS), np.float32)
        rows[:, SOLARIZE] = 256
        return normalised(views, *upload(x.device, table(rows), _scales(mean, std))).view(x.shape)
    scale, shift = upload(x.device, _scales(mean, std).view(2, 3, 1, 1))[0]
    return x.float().mul_(scale).add_(shift)


def _fusible(x: Tensor, kernels: str) -> bool:
    return kernels == "auto" and x.is_cuda and KERNELS.fault(x.device, x.dtype) is None


def _scales(mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Factors and summands of the channels: [2, 3]."""
    return torch.tensor([[1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]])


def photometric(pixels: Tensor, rows: NDArray[np.float32]) -> Tensor:
    """The operations of ``rows`` [N, COLUMNS] on uint8 views [N, 3, H, W]: whole numbers 0..255 in float32."""
    return change(pixels.float(), _plan(rows))


def _plan(rows: NDArray[np.float32]) -> list[_Change]:
    """Return what happens to the views, one after the other: one turn of the hue, and what comes before it and
    after it.
    """
    place, turns, drawn = _hue_place(rows), np.arange(4), _drawn(rows)
    before = np.where(turns < place[:, None], drawn, -1)
    after = np.take_along_axis(np.pad(drawn, ((0, 0), (0, 5)), constant_values=-1), place[:, None] + 1 + turns, 1)
    radius = box_radius(rows[:, BLUR])
    inner = np.where(rows[:, BLUR] > 0, np.floor(radius), -1)
    return [
        _Change(_flip, rows[:, FLIP] > 0),
        *(_tones(rows, operations) for operations in before.T),
        _Change(_hue, place < 4, rows[:, FACTORS + 3, None] - _PURE),
        *(_tones(rows, operations) for operations in after.T),
        _Change(_grey, rows[:, GREY] > 0),
        *(_Change(partial(_blur, inner=int(n)), inner == n, radius) for n in np.unique(inner[inner >= 0])),
        _Change(_solarize, rows[:, SOLARIZE] < 256, rows[:, SOLARIZE]),
    ]


def table(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same for the kernels, float32 [N, kernels.COLUMNS].

    Flip, turns, the hue's turn (4: none), contrast's (-1: none), hue less that of each pure channel, grey, blur as
    inner pixels (-1: none), share of the edge and of the box, solarise threshold, and what ``_tone`` takes by turn.
    """
    drawn, radius = _drawn(rows), box_radius(rows[:, BLUR])
    inner, contrast = np.floor(radius), drawn == 1
    columns = [
        rows[:, FLIP],
        4 * rows[:, JITTER],
        _hue_place(rows),
        np.where(contrast.any(1), contrast.argmax(1), -1),
        *(rows[:, FACTORS + 3, None] - _PURE).T,
        rows[:, GREY],
        np.where(rows[:, BLUR] > 0, inner, -1),
        radius - inner,
        1 / (2 * radius + 1),
        rows[:, SOLARIZE],
        *(value for operations in drawn.T for value in _tone_values(rows, operations)),
    ]
    return np.stack(columns, axis=1, dtype=np.float32, casting="same_kind")


def _drawn(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """The jitter's operations, turn by turn [N, 4]; -1: none."""
    return np.where(rows[:, JITTER, None] > 0, rows[:, ORDER:FACTORS], np.float32(-1))


def _hue_place(rows: NDArray[np.float32]) -> NDArray[np.int64]:
    """The turn at which each view's hue is changed; 4 where it stays."""
    hue = np.pad(rows[:, ORDER:FACTORS] == 3, ((0, 0), (0, 1)), constant_values=True)
    return np.where(rows[:, JITTER] > 0, hue.argmax(1), 4)


def _tones(rows: NDArray[np.float32], operations: NDArray[np.float32]) -> _Change:
    """One of brightness, contrast and saturation for each view, or none: factor x + own grey + mean grey + tie."""
    contrast, saturation = operations == 1, operations == 2
    chosen = (operations == 0) | contrast | saturation
    values = _tone_values(rows, operations)
    members = np.flatnonzero(chosen)
    if len(members):
        chosen[members[0] : members[-1] + 1] = True  # a whole piece; the others' numbers change nothing
    return _Change(partial(_tone, greys=bool(saturation.any()), level=bool(contrast.any())), chosen, *values)


def _tone_values(rows: NDArray[np.float32], operations: NDArray[np.float32]) -> list[NDArray[Any]]:
    """Factor, own grey, mean grey and tie of each view; they change nothing where there is no such operation."""
    contrast, saturation = operations == 1, operations == 2
    kept = np.ones(len(rows), dtype=np.float32)
    for number in range(3):
        kept = np.where(operations == number, rows[:, FACTORS + number], kept)
    lost = 1 - kept
    return [kept, lost * saturation, lost * contrast, _TIE * (contrast | saturation)]


class _Change:
    """An operation ``(views, values [n, 1 or 3, 1, 1]...)`` on the chosen views; it may work in place."""

    def __init__(self, operation: Callable[..., Tensor], chosen: NDArray[np.bool_], *values: NDArray[Any]) -> None:
        self.operation = operation
        self.which: NDArray[Any] = np.flatnonzero(chosen)
        self.values: list[NDArray[Any]] = [value[self.which].astype(np.float32) for value in values]


def change(x: Tensor, changes: Sequence[_Change]) -> Tensor:
    """Make the changes in their order, to ``x`` [N, 3, H, W] in place; all their numbers go to the device at once."""
    changes = [each for each in changes if len(each.which)]
    sent = iter(upload(x.device, *(array for each in changes for array in (each.which, *each.values))))
    for each in changes:
        index, *values = (next(sent) for _ in range(1 + len(each.values)))
        first, count = int(each.which[0]), len(each.which)
        side_by_side = int(each.which[-1]) - first + 1 == count
        views = x.narrow(0, first, count) if side_by_side else x.index_select(0, index)
        made = each.operation(views, *(value.view(count, -1, 1, 1) for value in values))
        if not side_by_side:
            x.index_copy_(0, index, made)
        elif count == len(x):
            x = made
        elif made is not views:
            views.copy_(made)
    return x


def mirror(x: Tensor, flipped: Tensor) -> Tensor:
    """Mirror the views of ``x`` [N, 3, H, W] marked in ``flipped`` [N], in place."""
    return change(x, [_Change(_flip, flipped.cpu().numpy() > 0)])


def luma(x: Tensor) -> Tensor:
    """0.2989 R + 0.587 G + 0.114 B (ITU-R BT.601), cut to whole numbers: [N, 1, H, W]. The sum is exact."""
    r, g, b = x.split(1, dim=1)
    weighted: Tensor = r.mul(2989).add_(g, alpha=5870).add_(b, alpha=1140)
    return weighted.div_(10_000, rounding_mode="trunc")


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


def _flip(x: Tensor) -> Tensor:
    return x.flip(-1)


def _tone(x: Tensor, kept: Tensor, own: Tensor, mean: Tensor, tie: Tensor, *, greys: bool, level: bool) -> Tensor:
    """kept x + own grey + mean grey + tie, cut; ``greys`` and ``level`` say whether any view needs the two."""
    if greys or level:
        grey = luma(x)
        if level:
            total = grey.sum((-2, -1), keepdim=True, dtype=torch.float64)  # exact, so in any order
            tie = (total / x.shape[-2:].numel()).float().mul_(mean).add_(tie)
        tie = grey.mul_(own).add_(tie) if greys else tie
        return x.mul_(kept).add_(tie).clamp_(0, 255).floor_()
    return x.mul_(kept).clamp_(0, 255).floor_()


def _hue(x: Tensor, turned: Tensor) -> Tensor:
    """Turn the hue by a part of a full circle, less each channel's own [n, 3, 1, 1]; value and saturation stay.

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
    away = turn + turned
    away.sub_(away.round()).abs_().clamp_(1 / 6, 1 / 3)
    return away.mul_(span * (-6 * _BYTE)).add_(high.add_(span).mul_(_BYTE).add_(_TIE)).floor_()


def _grey(x: Tensor) -> Tensor:
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
            _repeat_edges(frame, axis, margin)
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


def _repeat_edges(frame: Tensor, axis: int, margin: int) -> None:
    """Fill both margins of an axis with the pixels beside them, by one copy."""
    size, step = frame.shape[axis], frame.stride(axis)
    shape, strides = list(frame.shape), list(frame.stride())
    del shape[axis], strides[axis]
    margins = frame.as_strided([*shape, 2, margin], [*strides, (size - margin) * step, step])
    edges = frame.as_strided([*shape, 2, 1], [*strides, (size - 2 * margin - 1) * step, 0], margin * step)
    margins.copy_(edges)


def _solarize(x: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(x >= threshold, 255 - x, x)
