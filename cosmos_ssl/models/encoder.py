"""A trained model as evaluators and users see it: pictures and strings in, features out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from cosmos_ssl.api import (
    Features,
    GroupFeatures,
    GroupPlan,
    Head,
    ImageGroup,
    Modality,
    Need,
    Spec,
    TextGroup,
    Tokenizer,
    Tower,
    TowerSpec,
    UserError,
    Views,
    ViewSpec,
    normalise,
)
from cosmos_ssl.models.contract import blaming, checked_features
from cosmos_ssl.models.model import Model
from cosmos_ssl.models.plan import make_plan

_GROUP = "global"  # the group that heads know as whole pictures and whole texts


class ModelEncoder:
    """One role's model behind ``api.Encoder``; the methods are OpenCLIP's.

    Shape letters: B pictures or texts, S text length, N patches, W tower width, D shared width. No method
    records gradients, and a model in training mode is put back into it.
    """

    def __init__(
        self,
        model: Model,
        spec: Spec,
        tokenizer: Tokenizer | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """``device``: where the model is put (default: where it is). ``dtype``: autocast to it (default: no autocast)."""
        self.model = model if device is None else model.to(device)
        self.spec = spec
        self.tokenizer = tokenizer
        self.dtype = dtype

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    # ------------------------------------------------------------------ features

    def encode_image(self, pixels: Tensor, *, normalize: bool = True) -> Tensor:
        """Normalised pictures [B, 3, H, W] -> [B, D], unit vectors unless told otherwise."""
        with self.reading():
            return _projected(self._image(self._pixels(pixels), GroupPlan(views=(0,))), normalize)

    def encode_text(self, tokens: Tensor, *, normalize: bool = True) -> Tensor:
        """Token ids [B, S] -> [B, D], unit vectors unless told otherwise."""
        with self.reading():
            return _projected(self._text(self._texts(tokens), GroupPlan(views=(0,))), normalize)

    def image_features(self, pixels: Tensor) -> Tensor:
        """Normalised pictures [B, 3, H, W] -> pooled features before the projection [B, W]."""
        with self.reading():
            pooled = self._image(self._pixels(pixels), GroupPlan(views=(0,), projected=False)).pooled
        assert pooled is not None
        return pooled[0].float()

    def match_image(self, pixels: Tensor) -> Tensor:
        """Normalised pictures [B, 3, H, W] -> what ``match`` wants to know of each, [B, ...]."""
        return self._match_input("image", Views(keys=[""] * len(pixels), image={_GROUP: self._pixels(pixels)}))

    def match_text(self, tokens: Tensor) -> Tensor:
        """Token ids [T, S] -> what ``match`` wants to know of each text, [T, ...]."""
        return self._match_input("text", Views(keys=[""] * len(tokens), text={_GROUP: self._texts(tokens)}))

    def match(self, images: Tensor, texts: Tensor) -> Tensor:
        """How well pictures [B, ...] and texts [T, ...] match, [B, T]: the head's rule, by default the dot product."""
        head = self._matching
        if head is None:
            return images @ texts.T
        with self.reading(), blaming(head, "the head that matches"):
            return head.match(images.to(self.device), texts.to(self.device)).float()

    @property
    def _matching(self) -> Head | None:
        heads = (self.model.head(name) for name in self.model.heads)
        return next((head for head in heads if head.matches), None)

    def _match_input(self, modality: Modality, views: Views) -> Tensor:
        head = self._matching
        needs = [Need(modality=modality)] if head is None else head.match_needs(modality)
        offered = {_GROUP: ViewSpec(views=1)}
        spec = replace(self.spec, image_views=offered, text_views=offered, has_teacher=False)
        heads = {name: self.model.head(name) for name in self.model.heads}
        plan = make_plan(spec, self.model.towers, heads, {}, extra=needs)
        with self.reading():
            features = self.model.encode(views, plan.student)
            return features.of(modality)[_GROUP].unit[0] if head is None else head.match_input(features, modality).float()

    def dense(self, pixels: Tensor, *, csa: bool = False) -> tuple[Tensor, Tensor]:
        """Patch tokens in the shared space [B, N, D] and the pooled feature [B, D], neither normalised.

        Pictures [B, 3, H, W] of any size. ``csa`` replaces the last block's attention by correlative
        self-attention (SCLIP, arXiv 2312.01597). Raises UserError where the tower has no dense mode.
        """
        tower = cast(Any, self._tower("image"))
        if "csa" not in tower.capabilities:
            raise UserError(f"the image tower '{tower.part_name}' has no dense inference; clip_vit has")
        with self.reading():
            tokens, pooled = tower.dense(pixels.to(self.device), csa=csa)
            return (tokens @ tower.projection).float(), (pooled @ tower.projection).float()

    def cross_attention(self, pixels: Tensor, tokens: Tensor) -> dict[str, Tensor] | None:
        """Where picture b looks in text b and the reverse, averaged over heads; None without a head that can say.

        Pictures [B, 3, H, W] and token ids [B, S] -> ``image``, over words [B, S], and ``text``, over
        patches [B, N]. Both are the head's own softmax, so a row sums to one.
        """
        head = next((head for head in self.model.heads.values() if hasattr(head, "attention_weights")), None)
        if head is None:
            return None
        with self.reading():
            image, text = self._pixels(pixels), self._texts(tokens)
            plan = GroupPlan(views=(0,), tokens=(0,))
            features = Features(image={_GROUP: self._image(image, plan)}, text={_GROUP: self._text(text, plan)})
            views = Views(keys=[""] * len(pixels), image={_GROUP: image}, text={_GROUP: text})
            weights = cast(Any, head).attention_weights(features, views)
        return {name: cast(Tensor, weight[0]).float() for name, weight in weights.items()}

    # ------------------------------------------------------------------ inputs

    def preprocess(self, image: Any) -> Tensor:
        """A PIL image, or uint8 [3, H, W]: shorter side resized bicubic, centre crop, normalised float [3, H, W]."""
        tower = self._image_spec()
        pixels = resize_crop(image, tower.image_size)
        return pixels.float().div_(255).sub_(torch.tensor(tower.mean).view(3, 1, 1)).div_(torch.tensor(tower.std).view(3, 1, 1))

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Strings -> token ids [n, S]."""
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer: give encode_text the token ids themselves")
        return self.tokenizer([texts] if isinstance(texts, str) else texts)[0]

    def lengths(self, tokens: Tensor) -> Tensor:
        """Tokens of each text [..., S] up to and with its end: the tokenizer's rule; without one CLIP's, the largest id."""
        return tokens.argmax(-1) + 1 if self.tokenizer is None else self.tokenizer.lengths(tokens)

    # ------------------------------------------------------------------ what these stand on

    @contextmanager
    def reading(self) -> Iterator[None]:
        """What every method works in: evaluation mode, no gradients, the precision asked for."""
        training = self.model.training
        if training:
            self.model.eval()
        try:
            with torch.no_grad(), torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
                yield
        finally:
            if training:
                self.model.train()

    def _tower(self, modality: Modality) -> Tower:
        tower = self.model.towers.get(modality)
        if tower is None:
            raise UserError(f"this model has no {modality} tower")
        return tower

    def _image_spec(self) -> TowerSpec:
        return self._tower("image").spec

    def _pixels(self, pixels: Tensor) -> ImageGroup:
        return ImageGroup(pixels=pixels.to(self.device)[None], params=torch.empty(1, len(pixels), 0))

    def _texts(self, tokens: Tensor) -> TextGroup:
        return TextGroup(tokens=tokens.to(self.device)[None], lengths=self.lengths(tokens).cpu()[None])

    def _image(self, pictures: ImageGroup, plan: GroupPlan) -> GroupFeatures:
        return self._encoded("image", pictures, plan, pictures.shape[1])

    def _text(self, texts: TextGroup, plan: GroupPlan) -> GroupFeatures:
        return self._encoded("text", texts, plan, texts.shape[1])

    def _encoded(self, modality: Modality, group: ImageGroup | TextGroup, plan: GroupPlan, samples: int) -> GroupFeatures:
        tower = self._tower(modality)
        with blaming(tower, f"model.{modality}"):
            found = tower({_GROUP: group}, {_GROUP: plan})
            return checked_features(tower, {_GROUP: plan}, samples, self.spec.embed_dim, self.device, found)[_GROUP]


def _projected(features: GroupFeatures, normalize: bool) -> Tensor:
    assert features.projected is not None
    return normalise(features.projected[0]) if normalize else features.projected[0].float()


def resize_crop(image: Any, size: int) -> Tensor:
    """A PIL image, or uint8 [3, H, W]: shorter side resized to ``size`` (bicubic), centre crop: uint8 [3, size, size].

    The arithmetic of sizes and the resampling are those of OpenCLIP's test transform (torchvision's on PIL
    images), so that its features are ours; only the change to RGB comes first.
    """
    from PIL import Image

    if isinstance(image, Tensor):
        image = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    image = image.convert("RGB")
    width, height = image.size
    shorter = min(width, height)
    if shorter != size:
        width, height = (size if side == shorter else int(size * side / shorter) for side in (width, height))
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    if (width, height) != (size, size):
        image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
