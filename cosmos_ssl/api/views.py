"""The data types a batch passes through, from tar member to loss.

Shape letters: B samples on one rank, V views of one group, N image tokens, S text length,
W tower width, D shared width, P photometric parameters, M masked patches of a whole group.
Views are stacked view-major, [V, B, ...]. View groups are chosen by name, never by size or position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, Self, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from cosmos_ssl.errors import BadSample
from cosmos_ssl.pictures import BACKGROUND, MAX_PIXELS, open_rgb

Modality: TypeAlias = Literal["image", "text"]
Role: TypeAlias = Literal["student", "teacher"]
Kind: TypeAlias = Literal["pooled", "projected", "tokens", "masked_tokens"]
HeadOutput: TypeAlias = Mapping[str, Tensor]
ALL = "*"
"""In a ``Need``: every view group that the augmenter offers."""
_T = TypeVar("_T")


def check_shape(name: str, tensor: Tensor, shape: str, **sizes: int) -> None:
    """Raise ValueError unless ``tensor`` has the dimensions named in ``shape``, of the given sizes."""
    letters = shape.split()
    wrong = tensor.dim() != len(letters) or any(
        letter in sizes and sizes[letter] != size for letter, size in zip(letters, tensor.shape, strict=True)
    )
    if wrong:
        known = ", ".join(f"{k}={v}" for k, v in sizes.items())
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, expected [{', '.join(letters)}]"
            + (f" with {known}" if known else "")
        )


def map_tensors(value: _T, function: Callable[[Tensor], Tensor]) -> _T:
    """Apply ``function`` to every tensor inside dataclasses, mappings and sequences."""
    if isinstance(value, Tensor):
        return cast(_T, function(value))
    if isinstance(value, Mapping):
        return cast(_T, {key: map_tensors(item, function) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return cast(_T, type(value)(map_tensors(item, function) for item in value))
    if is_dataclass(value) and not isinstance(value, type):
        return cast(
            _T, replace(value, **{f.name: map_tensors(getattr(value, f.name), function) for f in fields(value)})
        )
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sample as its data set holds it: encoded image, captions by field, whatever else was there."""

    key: str
    image: bytes | None = None
    captions: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Sentences of each caption field, such as ``raw_caption``; a plain caption is the field ``txt``."""
    extras: Mapping[str, Any] = field(default_factory=dict)
    """Labels, boxes and the like, by name."""
    max_pixels: int = MAX_PIXELS
    """Larger pictures are refused before they are decoded."""
    background: str = BACKGROUND
    """What a transparent picture is put on; whoever decodes for a model says so by ``on``."""

    def sentences(self, caption_fields: Sequence[str] | None = None) -> list[str]:
        """All sentences of the named fields (default: of every field), in order."""
        chosen = self.captions if caption_fields is None else [f for f in caption_fields if f in self.captions]
        return [sentence for name in chosen for sentence in self.captions[name]]

    def on(self, background: str) -> Self:
        """The same sample, its picture put on this colour where it is transparent."""
        return self if self.background == background else replace(self, background=background)

    def decode(self) -> Tensor:
        """Decode the image: uint8 [3, H, W] in RGB, laid out channels-last in memory.

        Raises BadSample where there is none, it is too large, or it cannot be decoded.
        """
        if self.image is None:
            raise BadSample("no image")
        picture = open_rgb(self.image, max_pixels=self.max_pixels, background=self.background)
        data = bytearray(picture.tobytes())
        return torch.frombuffer(data, dtype=torch.uint8).view(picture.height, picture.width, 3).permute(2, 0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageCrops:
    """The image views of one group of one sample, as a worker makes them."""

    pixels: Tensor
    """uint8 [V, 3, H, W]."""
    params: Tensor
    """float32 [V, P], the photometric parameters that ``Augmenter.finish`` reads; P may be 0."""
    masks: Tensor | None = None
    """bool [V, N], True where a patch is hidden from the student."""

    def __post_init__(self) -> None:
        check_shape("pixels", self.pixels, "V C H W", C=3)
        check_shape("params", self.params, "V P", V=self.pixels.shape[0])
        if self.masks is not None:
            check_shape("masks", self.masks, "V N", V=self.pixels.shape[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleViews:
    """All views of one sample: crops by group, and strings by group before they are tokenised."""

    image: Mapping[str, ImageCrops] = field(default_factory=dict)
    text: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageGroup:
    """One group of image views of a batch: uint8 as loaded, float after ``Augmenter.finish``."""

    pixels: Tensor
    """[V, B, 3, H, W]."""
    params: Tensor
    """float32 [V, B, P], on the host."""
    masks: Tensor | None = None
    """bool [V, B, N], on the host; True where a patch is hidden."""

    def __post_init__(self) -> None:
        check_shape("pixels", self.pixels, "V B C H W", C=3)
        sizes = {"V": self.pixels.shape[0], "B": self.pixels.shape[1]}
        check_shape("params", self.params, "V B P", **sizes)
        if self.masks is not None:
            check_shape("masks", self.masks, "V B N", **sizes)

    @property
    def shape(self) -> tuple[int, int]:
        """(V, B)."""
        return self.pixels.shape[0], self.pixels.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextGroup:
    """One group of tokenised texts of a batch."""

    tokens: Tensor
    """int64 [V, B, S], padded."""
    lengths: Tensor
    """int64 [V, B], on the host: tokens up to and with the end-of-text token; the rest are pads."""

    def __post_init__(self) -> None:
        check_shape("tokens", self.tokens, "V B S")
        check_shape("lengths", self.lengths, "V B", V=self.tokens.shape[0], B=self.tokens.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(V, B)."""
        return self.tokens.shape[0], self.tokens.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Views:
    """A batch: keys and extras of its samples and all their views by group."""

    keys: Sequence[str]
    image: Mapping[str, ImageGroup] = field(default_factory=dict)
    text: Mapping[str, TextGroup] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = [(n, g.shape[1]) for n, g in self.image.items()] + [(n, g.shape[1]) for n, g in self.text.items()]
        for name, size in sizes:
            if size != len(self.keys):
                raise ValueError(f"group '{name}' holds {size} samples, the batch {len(self.keys)}")

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def device(self) -> torch.device:
        """Where the pixels and tokens are."""
        return next(
            x.device for x in (*(g.pixels for g in self.image.values()), *(g.tokens for g in self.text.values()))
        )

    def to(self, device: torch.device | str) -> Views:
        """The same batch on ``device``; asynchronous from pinned memory.

        Photometric parameters, masks and text lengths stay on the host, where they are read: a step waits for no copy.
        """
        moved = map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))
        return replace(
            moved,
            image={
                n: replace(group, params=self.image[n].params, masks=self.image[n].masks)
                for n, group in moved.image.items()
            },
            text={name: replace(group, lengths=self.text[name].lengths) for name, group in moved.text.items()},
        )

    def pin_memory(self) -> Views:
        """The same batch in page-locked memory (the name that PyTorch's loader looks for)."""
        return map_tensors(self, Tensor.pin_memory)

    def slice(self, start: int, stop: int) -> Views:
        """Samples ``start`` to ``stop`` of the batch."""
        return replace(
            self,
            keys=self.keys[start:stop],
            image={n: map_tensors(g, lambda t: t[:, start:stop]) for n, g in self.image.items()},
            text={n: map_tensors(g, lambda t: t[:, start:stop]) for n, g in self.text.items()},
            extras={n: v[start:stop] for n, v in self.extras.items()},
        )
