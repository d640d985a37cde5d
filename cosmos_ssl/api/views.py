"""The data types a batch passes through, from tar member to loss.

Shape letters: B samples on one rank, V views of one group, N image tokens, S text length,
W tower width, D shared width, P photometric parameters, M masked patches of a whole group.
Views are stacked view-major, [V, B, ...]. View groups are chosen by name, never by size or position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Generic, Literal, Self, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from cosmos_ssl.errors import BadSample
from cosmos_ssl.pictures import BACKGROUND, MAX_PIXELS, open_rgb

Modality: TypeAlias = Literal["image", "text"]
Role: TypeAlias = Literal["student", "teacher"]
Kind: TypeAlias = Literal["pooled", "projected", "tokens", "masked_tokens", "views"]
Hidden: TypeAlias = Literal[True, False, "drop"]
"""What a reader wants of masked patches: hidden behind the mask token, seen, or left out."""
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


def tensors_in(value: object) -> list[Tensor]:
    """Every tensor inside dataclasses, mappings and sequences, in a fixed order."""
    found: list[Tensor] = []
    map_tensors(value, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


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
class _PictureGroup:
    """What groups of pictures have in common, before and after ``Augmenter.finish``."""

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

    def finished(self, pixels: Tensor) -> ImageGroup:
        """The views that these crops become: ``pixels`` float [V, B, 3, H, W], parameters and masks as they are."""
        return ImageGroup(pixels=pixels, params=self.params, masks=self.masks)


@dataclass(frozen=True, slots=True, kw_only=True)
class CropGroup(_PictureGroup):
    """One group of crops of a batch, as loaded: ``pixels`` are uint8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageGroup(_PictureGroup):
    """One group of image views of a batch, as models read them: ``pixels`` are floats, normalised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextGroup:
    """One group of tokenised texts of a batch."""

    tokens: Tensor
    """int64 [V, B, S], padded."""
    lengths: Tensor
    """int64 [V, B], on the host: tokens up to and with the end-of-text token; the rest are pads."""
    masks: Tensor | None = None
    """bool [V, B, S], on the host; True where a token is hidden."""

    def __post_init__(self) -> None:
        check_shape("tokens", self.tokens, "V B S")
        sizes = dict(zip("VBS", self.tokens.shape, strict=True))
        check_shape("lengths", self.lengths, "V B", V=sizes["V"], B=sizes["B"])
        if self.masks is not None:
            check_shape("masks", self.masks, "V B S", **sizes)

    @property
    def shape(self) -> tuple[int, int]:
        """(V, B)."""
        return self.tokens.shape[0], self.tokens.shape[1]


_G = TypeVar("_G", bound=_PictureGroup)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch(Generic[_G]):
    """Keys and extras of the samples of a batch, and all their views by group."""

    keys: Sequence[str]
    image: Mapping[str, _G] = field(default_factory=dict)
    text: Mapping[str, TextGroup] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)
    """What came with the samples beside pictures and captions, by name: a list of B each."""

    def __post_init__(self) -> None:
        sizes = [(n, g.shape[1]) for n, g in self.image.items()] + [(n, g.shape[1]) for n, g in self.text.items()]
        for name, size in sizes:
            if size != len(self.keys):
                raise ValueError(f"group '{name}' holds {size} samples, the batch {len(self.keys)}")

    def __len__(self) -> int:
        return len(self.keys)

    def of(self, modality: Modality) -> Mapping[str, _G | TextGroup]:
        """The groups of one modality."""
        return self.image if modality == "image" else self.text

    @property
    def device(self) -> torch.device:
        """Where the pixels and tokens are."""
        return next(
            x.device for x in (*(g.pixels for g in self.image.values()), *(g.tokens for g in self.text.values()))
        )

    def to(self, device: torch.device | str) -> Self:
        """The same batch on ``device``; asynchronous from pinned memory.

        Photometric parameters, masks and text lengths stay on the host, where they are read: a step waits for no copy.
        """

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            image={name: replace(group, pixels=move(group.pixels)) for name, group in self.image.items()},
            text={name: replace(group, tokens=move(group.tokens)) for name, group in self.text.items()},
            extras=map_tensors(self.extras, move),
        )

    def pin_memory(self) -> Self:
        """The same batch in page-locked memory (the name that PyTorch's loader looks for)."""
        return map_tensors(self, Tensor.pin_memory)

    def slice(self, start: int, stop: int) -> Self:
        """Samples ``start`` to ``stop`` of the batch."""

        def cut(tensor: Tensor) -> Tensor:
            return tensor[:, start:stop]

        return replace(
            self,
            keys=self.keys[start:stop],
            image=map_tensors(self.image, cut),
            text=map_tensors(self.text, cut),
            extras={name: values[start:stop] for name, values in self.extras.items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CroppedViews(_Batch[CropGroup]):
    """A batch as loaded: crops of the pictures, which the augmenter finishes on the device, and tokens of the texts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Views(_Batch[ImageGroup]):
    """A batch as models, heads and losses read it: finished pictures, and tokens of the texts."""
