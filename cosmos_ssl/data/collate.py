"""From the crops and texts of single samples to the tensors of a batch."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from cosmos_ssl.api import (
    Augmenter,
    CropGroup,
    ImageCrops,
    Modality,
    PluginError,
    Sample,
    TextGroup,
    Tokenizer,
    ViewSpec,
)
from cosmos_ssl.api.part import describe
from cosmos_ssl.api.views import CroppedViews


class Collator:
    """Writes the views of one sample after another into the tensors of a batch of ``size`` samples."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.samples: list[Sample] = []
        self.image: dict[str, CropGroup] = {}
        self.text: dict[str, list[Sequence[str]]] = {}
        self.draws: list[np.random.Generator | None] = []

    def add(
        self,
        sample: Sample,
        views: Mapping[Modality, Mapping[str, Any]],
        rng: np.random.Generator | None = None,
    ) -> None:
        """Put in what the augmenters made of the next sample; ``rng`` draws the masks of its texts.

        Raises PluginError where it is of another shape than that of the first one.
        """
        slot = len(self.samples)
        self.samples.append(sample)
        self.draws.append(rng)
        for name, crops in views.get("image", {}).items():
            if slot == 0:
                self.image[name] = self._room(crops)
            room = self.image[name]
            for whole, part in ((room.pixels, crops.pixels), (room.params, crops.params), (room.masks, crops.masks)):
                if whole is None or part is None:
                    continue
                if whole[:, slot].shape != part.shape:
                    raise PluginError(
                        f"image views '{name}' are {list(part.shape)}, those of the batch's first sample "
                        f"{list(whole[:, 0].shape)}"
                    )
                whole[:, slot] = part
        for name, texts in views.get("text", {}).items():
            self.text.setdefault(name, []).append(texts)

    def _room(self, crops: ImageCrops) -> CropGroup:
        def like(tensor: Tensor) -> Tensor:
            return _empty((tensor.shape[0], self.size, *tensor.shape[1:]), tensor.dtype)

        masks = None if crops.masks is None else like(crops.masks)
        return CropGroup(pixels=like(crops.pixels), params=like(crops.params), masks=masks)

    def batch(self, tokenizer: Tokenizer | None, masker: Augmenter | None = None) -> CroppedViews:
        """The batch, once all samples are in; ``masker`` is asked for the masks of texts, where it offers any.

        Raises PluginError where extras cannot travel between processes.
        """
        shared = set.intersection(*(set(sample.extras) for sample in self.samples))
        extras = {name: [sample.extras[name] for sample in self.samples] for name in sorted(shared)}
        try:
            pickle.dumps(extras)  # what cannot be sent would be lost on the way, and the trainer left waiting
        except Exception as error:
            raise PluginError(f"the data set's extras ({', '.join(extras)}) cannot be pickled: {error}") from error
        text = self._tokens(tokenizer) if self.text else {}
        for name, offered in (masker.offers() if masker is not None and self.text else {}).items():
            if masker is not None and offered.masks:
                text[name] = replace(text[name], masks=text_masks(masker, name, text[name], self.draws))
        return CroppedViews(keys=[sample.key for sample in self.samples], image=self.image, text=text, extras=extras)

    def _tokens(self, tokenizer: Tokenizer | None) -> dict[str, TextGroup]:
        """All texts of all groups in one call, view-major."""
        if tokenizer is None:
            raise PluginError("a text augmenter needs a tokenizer")
        groups = {
            name: [text for view in zip(*texts, strict=True) for text in view] for name, texts in self.text.items()
        }
        texts = [text for texts in groups.values() for text in texts]
        tokens, lengths = _checked_tokens(tokenizer, len(texts), tokenizer(texts))
        counts = [len(texts) for texts in groups.values()]
        return {
            name: TextGroup(tokens=ids.reshape(-1, self.size, ids.shape[1]), lengths=length.reshape(-1, self.size))
            for name, ids, length in zip(groups, tokens.split(counts), lengths.split(counts), strict=True)
        }


def text_masks(masker: Augmenter, name: str, group: TextGroup, draws: Sequence[np.random.Generator | None]) -> Tensor:
    """What an augmenter hides of a group's tokens, bool [V, B, S], of each sample by its own draws; pads never are.

    Raises PluginError for masks of another shape or kind.
    """
    views, _, context = group.tokens.shape
    masks = _empty((views, len(draws), context), torch.bool)
    for slot, rng in enumerate(draws):
        assert rng is not None, "texts with masks are added with what draws them"
        found = masker.mask(name, group.tokens[:, slot], group.lengths[:, slot], rng)
        if not isinstance(found, Tensor) or found.dtype != torch.bool or found.shape != (views, context):
            shown = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            whose = describe(masker, "augmenters.text")
            raise PluginError(f"{whose} gave the masks of '{name}' as {shown}, expected bool [{views}, {context}]")
        masks[:, slot] = found & (torch.arange(context) < group.lengths[:, slot, None])
    return masks


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Room for a tensor; in a worker in shared memory from the start, so that nothing is copied to send it."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    empty = torch.empty(0, dtype=dtype)
    storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(math.prod(shape) * empty.element_size())
    return empty.set_(storage).view(shape)


# ---------------------------------------------------------------------------- what augmenters and tokenizers give


def checked_crops(given: Any, offers: Mapping[str, ViewSpec], modality: Modality, whose: str) -> Mapping[str, Any]:
    """Return what ``Augmenter.crop`` made of a sample. Raises PluginError where it is not what the augmenter offers."""
    if not isinstance(given, Mapping) or given.keys() != offers.keys():
        shown = list(given) if isinstance(given, Mapping) else type(given).__name__
        raise PluginError(f"{whose} gave the groups {shown}, expected those that it offers, {list(offers)}")
    fault = _text_fault if modality == "text" else _picture_fault
    for name, spec in offers.items():
        if wrong := fault(name, given[name], spec):
            raise PluginError(f"{whose} gave {wrong}")
    return given


def _text_fault(name: str, found: Any, spec: ViewSpec) -> str:
    """Return what is wrong with the texts of a group; empty where nothing is."""
    good = isinstance(found, Sequence) and len(found) == spec.views and all(isinstance(text, str) for text in found)
    return "" if good else f"'{name}' as {repr(found)[:60]}, expected {spec.views} strings"


def _picture_fault(name: str, found: Any, spec: ViewSpec) -> str:
    """Return what is wrong with the crops of a group; empty where nothing is."""
    side = "H, W" if spec.size is None else f"{spec.size}, {spec.size}"
    wanted = f"ImageCrops of uint8 [{spec.views}, 3, {side}] {'with' if spec.masks else 'without'} masks"
    if not isinstance(found, ImageCrops):
        return f"'{name}' as {type(found).__name__}, expected {wanted}"
    pixels, params, masks = found.pixels, found.params, found.masks
    sized = len(pixels) == spec.views and (spec.size is None or pixels.shape[-2:] == (spec.size, spec.size))
    if pixels.dtype != torch.uint8 or not sized or spec.masks != (masks is not None):
        shown = f"{pixels.dtype} {list(pixels.shape)}{' with masks' * (masks is not None)}"
        return f"'{name}' as {shown}, expected {wanted}"
    if not params.is_floating_point():
        return f"params of '{name}' as {params.dtype}, expected float32"
    return "" if masks is None or masks.dtype == torch.bool else f"masks of '{name}' as {masks.dtype}, expected bool"


def _checked_tokens(tokenizer: Tokenizer, count: int, given: Any) -> tuple[Tensor, Tensor]:
    """Token ids and lengths of ``count`` texts. Raises PluginError."""
    whose, most = describe(tokenizer, "tokenizer"), tokenizer.context_length
    wanted = f"expected ids int64 [{count}, at most {most}] and lengths int64 [{count}]"
    if not isinstance(given, tuple | list) or len(given) != 2 or not all(isinstance(x, Tensor) for x in given):
        raise PluginError(f"{whose} gave {type(given).__name__}, {wanted}")
    ids, lengths = given
    integers = all(x.dtype in (torch.int64, torch.int32) and x.device.type == "cpu" for x in given)
    shaped = ids.dim() == 2 and len(ids) == count and 1 <= ids.shape[1] <= most and lengths.shape == (count,)
    if not integers or not shaped:
        shown = " and ".join(f"{x.dtype} {list(x.shape)} on {x.device}" for x in given)
        raise PluginError(f"{whose} gave {shown}, {wanted}")
    for what, values, low, high in (("ids", ids, 0, tokenizer.vocab_size - 1), ("lengths", lengths, 1, ids.shape[1])):
        if count and not low <= int(values.min()) <= int(values.max()) <= high:
            raise PluginError(
                f"{whose} gave {what} from {int(values.min())} to {int(values.max())}, expected {low} to {high}"
            )
    return ids, lengths
