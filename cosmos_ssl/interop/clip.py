"""A model with CLIP's towers as other libraries describe it: sizes, tensors, how pictures and texts are prepared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from cosmos_ssl.api import TowerSpec, UserError
from cosmos_ssl.errors import listed
from cosmos_ssl.interop.official import CLIP_VOCABULARY
from cosmos_ssl.models.contract import is_built_in, is_matching
from cosmos_ssl.models.encoder import ModelEncoder
from cosmos_ssl.models.transformer import Blocks

START_LOGIT_SCALE = math.log(1 / 0.07)
"""CLIP's start value of the log-scale, for models whose loss has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerSizes:
    """The transformer of one tower; ``hidden`` is the width inside its MLPs."""

    width: int
    layers: int
    heads: int
    hidden: int
    layer_scale: bool
    kind: Mapping[str, Any]
    """Other options than CLIP's that no size tells, such as the activation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipModel:
    """One role of a model, ready to be written in another library's form."""

    name: str
    role: str
    embed_dim: int
    image: TowerSizes
    pictures: TowerSpec
    """Sizes of pictures and patches, mean and deviation."""
    registers: int
    pre_norm: bool
    background: str
    """What transparent pictures were put on."""
    text: TowerSizes | None
    context_length: int
    vocab_size: int
    vocabulary: bool
    """Whether token ids are those of CLIP's vocabulary, end-of-text 49,407 among them."""
    state: Mapping[str, Tensor]
    """All tensors, by our names, in host memory."""
    contrastive: str | None
    """The loss that learned scale and bias of the logits."""
    logit_scale: Tensor
    """Of that loss, or CLIP's start value; a scalar."""
    logit_bias: Tensor | None
    matching: str | None
    """The head by whose rule pictures and texts match, if that is not the product of their features."""

    def tower(self, modality: str) -> dict[str, Tensor]:
        """The tensors of one tower, without its prefix."""
        return {
            name.removeprefix(f"{modality}."): value
            for name, value in self.state.items()
            if name.startswith(f"{modality}.")
        }

    def sizes(self) -> dict[str, int]:
        """Return what no tensor tells, by config keys (``official.SIZES``)."""
        text = {} if self.text is None else {"model.text.heads": self.text.heads}
        return {"model.image.heads": self.image.heads, "model.image.image_size": self.pictures.image_size, **text}

    def oddities(self) -> list[str]:
        """The config keys that make these towers other than CLIP's, each with its value."""
        found = [f"model.image.registers ({self.registers})"] if self.registers else []
        found += [] if self.pre_norm else ["model.image.pre_norm=false"]
        towers = {"image": self.image, "text": self.text}
        found += [f"model.{name}.layer_scale" for name, of in towers.items() if of is not None and of.layer_scale]
        return found

    def kinds(self, *known: str) -> list[str]:
        """The config keys of other options than CLIP's, each with its value, but those that a form knows."""
        towers = {"image": self.image, "text": self.text}
        found = [(name, option, of.kind[option]) for name, of in towers.items() if of is not None for option in of.kind]
        return [f"model.{name}.{option} ({value})" for name, option, value in found if option not in known]

    def left_out(self, *kept: str) -> list[str]:
        """For people: the parts, and the mask token, that a form with these towers alone has no use for."""
        known = {*kept, f"losses.{self.contrastive}"} if "text" in kept else set(kept)
        parts = {".".join(name.split(".")[: 2 if name.startswith(("heads.", "losses.")) else 1]) for name in self.state}
        masks = {"image.mask_token"} & self.state.keys()
        names = sorted((parts - known) | masks)
        return [f"left out: {', '.join(names)}"] if names else []

    def about_logits(self) -> list[str]:
        """For people: where logits differ from those of the model."""
        notes = [] if self.contrastive else ["logit_scale is CLIP's start value: the model has no loss clip or siglip"]
        if self.matching:
            notes.append(f"pictures and texts match by the product of their features, not by heads.{self.matching}")
        return notes


def describe(encoder: ModelEncoder, name: str, role: str, *, text: bool = True) -> ClipModel:
    """The towers of a model as CLIP's; without ``text`` the image tower alone is looked at.

    Raises UserError where a tower is not ``clip_vit`` or ``clip_text``, or where texts end by another rule than CLIP's.
    """
    model, spec = encoder.model, encoder.spec
    image, words = cast(Any, model.image), cast(Any, model.text) if text else None
    faults = [f"{what} is {found}" for what, found in _strangers(encoder, text)]
    if faults:
        raise UserError(f"this model has not CLIP's towers: {listed(faults, '; ')}")
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    contrastive, scale, bias = _logits(encoder)
    vocab_size = 0 if words is None else words.token_embedding.num_embeddings
    return ClipModel(
        name=name,
        role=role,
        embed_dim=spec.embed_dim,
        image=_sizes(image),
        pictures=image.spec,
        registers=image.prefix - 1,
        pre_norm="norm_pre.weight" in image.state_dict(),
        background=spec.background,
        text=None if words is None else _sizes(words),
        context_length=0 if words is None else len(words.position_embedding),
        vocab_size=vocab_size,
        vocabulary=encoder.tokenizer is not None and vocab_size >= CLIP_VOCABULARY,
        state=state,
        contrastive=contrastive,
        logit_scale=scale,
        logit_bias=bias,
        matching=next((key for key in model.heads if is_matching(model.head(key))), None),
    )


def refuse(library: str, faults: Iterable[str]) -> None:
    """Raise UserError with what a library's model cannot express, where there is anything."""
    found = list(faults)
    if found:
        raise UserError(f"{library} has no place for {listed(found, '; ', limit=8)}")


def _strangers(encoder: ModelEncoder, text: bool) -> list[tuple[str, str]]:
    """Places in the config where something else stands than CLIP has."""
    wanted: list[tuple[str, object, str, str]] = [("model.image", encoder.model.image, "towers", "clip_vit")]
    if text:
        wanted.append(("model.text", encoder.model.text, "towers", "clip_text"))
        if encoder.tokenizer is not None:
            wanted.append(("tokenizer", encoder.tokenizer, "tokenizers", "clip"))
    return [
        (place, "missing" if part is None else f"a {type(part).__name__}, not '{name}'")
        for place, part, group, name in wanted
        if part is None or not is_built_in(part, group, name)
    ]


def _sizes(tower: Any) -> TowerSizes:
    blocks = cast(Blocks, tower.blocks)
    first, usual = cast(Any, blocks[0]), type(tower).__init__.__kwdefaults__
    return TowerSizes(
        width=first.norm1.normalized_shape[0],
        layers=len(blocks),
        heads=first.attn.heads,
        hidden=first.mlp.fc1.out_features,
        layer_scale=bool(first.ls1.state_dict()),
        kind={option: value for option, value in tower.kind.items() if value != usual[option]},
    )


def _logits(encoder: ModelEncoder) -> tuple[str | None, Tensor, Tensor | None]:
    """Name, log-scale and bias of the contrastive loss."""
    name = encoder.model.contrastive
    if name is None:
        return None, torch.tensor(START_LOGIT_SCALE), None
    found = {key: value.detach().cpu() for key, value in encoder.model.loss(name).state_dict().items()}
    return name, found["logit_scale"], found.get("logit_bias")
