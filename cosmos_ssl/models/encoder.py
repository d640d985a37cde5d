"""A trained model as evaluators and users see it: pictures and strings in, features out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor

from cosmos_ssl.api import (
    AttendingHead,
    BadSample,
    DenseTower,
    Features,
    GroupFeatures,
    GroupPlan,
    ImageGroup,
    MatchingHead,
    Modality,
    Need,
    Part,
    Spec,
    TextGroup,
    Tokenizer,
    Tower,
    UserError,
    Views,
    ViewSpec,
    normalise,
)
from cosmos_ssl.models.contract import blaming, checked_features, is_matching
from cosmos_ssl.models.model import Model
from cosmos_ssl.models.plan import make_plan
from cosmos_ssl.pictures import BACKGROUND, open_rgb, to_rgb

_log = logging.getLogger("cosmos_ssl.models")
_GROUP = "global"  # the group that heads know as whole pictures and whole texts
_LONG = 16
"""Pictures longer than this many times their width are cut before they are resized, the others after it, as OpenCLIP
does.
"""


class ModelEncoder:
    """One role's model behind ``api.Encoder``; the methods are OpenCLIP's.

    Shape letters: B pictures or texts, S text length, N patches, W tower width, D shared width. No method
    records gradients, and a model in training mode is put back into it. Where token ids are taken, strings do as well.
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
        """``device``: where the model is put (default: where it is).

        ``dtype``: autocast to it (default: no autocast).
        """
        self.model = model if device is None else model.to(device)
        self.spec = spec
        self.tokenizer = tokenizer
        self.dtype = dtype
        self._told = False

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def logit_scale(self) -> float | None:
        """What cosines were multiplied by in training, the inverse temperature; None without a loss ``clip`` or
        ``siglip``.
        """
        name = self.model.contrastive
        return None if name is None else float(cast(Any, self.model.loss(name)).logit_scale.detach().exp())

    def to(self, device: torch.device | str) -> Self:
        """Move the model."""
        self.model.to(device)
        return self

    def eval(self) -> Self:
        """Put the model into evaluation mode, in which every method works anyway."""
        self.model.eval()
        return self

    def __repr__(self) -> str:
        """Towers with their sizes, the shared width, and where the model is."""
        sizes = {
            "image": lambda spec: f"{spec.image_size} px, patches of {spec.patch_size} px",
            "text": lambda spec: f"{self.spec.context_length} tokens",
        }
        towers = [
            f"{modality}: {type(tower).__name__}, width {tower.spec.width}, {sizes[modality](tower.spec)}"
            for modality, tower in self.model.towers.items()
        ]
        return f"{type(self).__name__}({'; '.join(towers)}; embed_dim {self.spec.embed_dim}; on {self.device})"

    # ------------------------------------------------------------------ features

    def encode_image(self, pixels: Tensor, *, normalize: bool = True) -> Tensor:
        """Normalised pictures [B, 3, H, W] -> [B, D], unit vectors unless told otherwise."""
        with self.reading():
            return _projected(self._encode("image", self._pixels(pixels), GroupPlan(views=(0,))), normalize)

    def encode_text(self, tokens: Tensor | str | Sequence[str], *, normalize: bool = True) -> Tensor:
        """Token ids [B, S], or strings -> [B, D], unit vectors unless told otherwise."""
        with self.reading():
            return _projected(self._encode("text", self._texts(tokens), GroupPlan(views=(0,))), normalize)

    def image_features(self, pixels: Tensor) -> Tensor:
        """Normalised pictures [B, 3, H, W] -> pooled features before the projection [B, W]."""
        with self.reading():
            pooled = self._encode("image", self._pixels(pixels), GroupPlan(views=(0,), projected=False)).pooled
        assert pooled is not None
        return pooled[0].float()

    def match_image(self, pixels: Tensor) -> Tensor:
        """Normalised pictures [B, 3, H, W] -> what ``match`` wants to know of each, [B, ...]."""
        return self._match_input("image", Views(keys=[""] * len(pixels), image={_GROUP: self._pixels(pixels)}))

    def match_text(self, tokens: Tensor | str | Sequence[str]) -> Tensor:
        """Token ids [T, S] -> what ``match`` wants to know of each text, [T, ...]."""
        texts = self._texts(tokens)
        return self._match_input("text", Views(keys=[""] * texts.shape[1], text={_GROUP: texts}))

    def match(self, images: Tensor, texts: Tensor) -> Tensor:
        """Return how well pictures [B, ...] and texts [T, ...] match, [B, T]: the head's rule, by default the dot
        product.
        """
        head = self._matching
        if head is None:
            return images @ texts.T
        with self.reading(), blaming(cast(Part, head), "the head that matches"):
            return head.match(images.to(self.device), texts.to(self.device)).float()

    @property
    def _matching(self) -> MatchingHead | None:
        return next((head for head in self.model.heads.values() if is_matching(head)), None)

    def _match_input(self, modality: Modality, views: Views) -> Tensor:
        head = self._matching
        needs = [Need(modality=modality)] if head is None else head.match_needs(modality)
        with self.reading():
            features = self._read(needs, views)
            return (
                normalise(features.stack(modality))[0] if head is None else head.match_input(features, modality).float()
            )

    def features(
        self,
        needs: Sequence[Need],
        *,
        pixels: Tensor | None = None,
        tokens: Tensor | str | Sequence[str] | None = None,
    ) -> Features:
        """Return what a loss would be given for these needs, of pictures [B, 3, H, W] and token ids [B, S].

        They are the one view of the group ``global``, and whole: tokens and outputs of heads are [1, B, ...].
        Raises PluginError for a need of something that is not there.
        """
        image = {} if pixels is None else {_GROUP: self._pixels(pixels)}
        text = {} if tokens is None else {_GROUP: self._texts(tokens)}
        given: list[ImageGroup | TextGroup] = [*image.values(), *text.values()]
        with self.reading():
            return self._read(needs, Views(keys=[""] * (given[0].shape[1] if given else 0), image=image, text=text))

    def respond(self, head: str, *args: Any, **kwargs: Any) -> Mapping[str, Tensor]:
        """Call a head's ``respond``, as a loss does by ``StepContext.head``. Raises UserError without such a head."""
        if head not in self.model.heads:
            raise UserError(f"this model has no head '{head}'. Heads: {', '.join(self.model.heads) or 'none'}")
        with self.reading():
            return self.model.respond(head, *args, **kwargs)

    def _read(self, needs: Sequence[Need], views: Views) -> Features:
        """Return the features that are needed of views, which are read as a teacher reads them: whole."""
        offered = {_GROUP: ViewSpec(views=1)}
        spec = replace(
            self.spec,
            image_views=offered if views.image else {},
            text_views=offered if views.text else {},
            has_teacher=True,
        )
        heads = {name: self.model.head(name) for name in self.model.heads}
        wanted = [replace(need, role="teacher") for need in needs]
        plan = make_plan(spec, self.model.towers, heads, {}, extra=wanted).teacher
        return Features() if plan is None else self.model.encode(views, plan)

    def dense(self, pixels: Tensor, *, csa: bool = False) -> tuple[Tensor, Tensor]:
        """Patch tokens in the shared space [B, N, D] and the pooled feature [B, D], neither normalised.

        Pictures [B, 3, H, W] of any size. ``csa`` replaces the last block's attention by correlative
        self-attention (SCLIP, arXiv 2312.01597). Raises UserError where the tower has no dense mode.
        """
        tower = self._tower("image")
        if "csa" not in tower.capabilities:
            raise UserError(f"the image tower '{tower.part_name}' has no dense inference; clip_vit has")
        dense = cast(DenseTower, tower)
        with self.reading():
            tokens, pooled = dense.dense(pixels.to(self.device), csa=csa)
            return (tokens @ dense.projection).float(), (pooled @ dense.projection).float()

    @property
    def attending(self) -> AttendingHead | None:
        """The head that can say where it looks, if there is one."""
        return next((head for head in self.model.heads.values() if isinstance(head, AttendingHead)), None)

    def cross_attention(self, pixels: Tensor, tokens: Tensor | str | Sequence[str]) -> dict[str, Tensor] | None:
        """Return where picture b looks in text b and the reverse, averaged over heads; None without a head that can
        say.

        Pictures [B, 3, H, W] and token ids [B, S] -> ``image``, over words [B, S], and ``text``, over
        patches [B, N]. Both are the head's own softmax, so a row sums to one.
        """
        head = self.attending
        if head is None:
            return None
        with self.reading():
            image, text = self._pixels(pixels), self._texts(tokens)
            plan = GroupPlan(views=(0,), tokens=(0,))
            encoded = self._encode("image", image, plan), self._encode("text", text, plan)
            features = Features(image={_GROUP: encoded[0]}, text={_GROUP: encoded[1]})
            views = Views(keys=[""] * len(pixels), image={_GROUP: image}, text={_GROUP: text})
            return {name: weight[0].float() for name, weight in head.attention_weights(features, views).items()}

    # ------------------------------------------------------------------ inputs

    def preprocess(self, image: Any) -> Tensor:
        """A picture's path, a PIL image, or uint8 [3, H, W]: resized as the tower's spec says (shorter side, bicubic,
        centre crop), normalised float [3, H, W].

        What is transparent is put on ``model.background``. Raises UserError for a file or a thing that is no picture,
        OSError.
        """
        tower = self._tower("image").spec
        squash, interpolation = tower.resize == "squash", tower.interpolation
        pixels = resize_crop(
            image, tower.image_size, background=self.spec.background, squash=squash, interpolation=interpolation
        )
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (tower.mean, tower.std))
        return pixels.float().div_(255).sub_(mean).div_(std)

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Strings -> token ids [n, S]. Raises UserError for anything else, and without a tokenizer."""
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer: give encode_text the token ids themselves")
        strings = [texts] if isinstance(texts, str) else texts
        if not isinstance(strings, Sequence) or not all(isinstance(text, str) for text in strings):
            raise UserError(f"texts are a string or a list of strings, not {_kind(texts)}")
        return self._folded(self.tokenizer(strings)[0], self.tokenizer.vocab_size)

    def _folded(self, ids: Tensor, vocabulary: int) -> Tensor:
        """Ids for a tower with fewer than its tokenizer's ``vocabulary``: its last ends a text, as in CLIP, the others
        wrap around.
        """
        known = self.model.text.spec.vocab_size if self.model.text is not None else 0
        if not known or known >= vocabulary or not ids.numel():
            return ids
        last = known - 1
        if not self._told:
            _log.warning(
                "this model has %s token ids, its tokenizer %s: words are folded into them and mean little",
                known,
                vocabulary,
            )
            self._told = True
        return torch.where(ids == ids.amax(-1, keepdim=True), last, ids % last)

    def decode(self, ids: Sequence[int]) -> list[str]:
        """The readable piece of text behind each id. Raises UserError without a tokenizer."""
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer: token ids are all that is known of its texts")
        return self.tokenizer.decode(ids)

    def lengths(self, tokens: Tensor) -> Tensor:
        """Tokens of each text [..., S] up to and with its end: the tokenizer's rule; without one CLIP's, the largest
        id.
        """
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

    def _pixels(self, pixels: Tensor) -> ImageGroup:
        if not isinstance(pixels, Tensor) or not pixels.is_floating_point() or pixels.dim() != 4:
            shape = (
                f"pixels has shape {list(pixels.shape)}" if isinstance(pixels, Tensor) else f"pixels is {_kind(pixels)}"
            )
            raise UserError(f"{shape}, expected float [B, 3, H, W]: torch.stack of what preprocess gives")
        return ImageGroup(pixels=pixels.to(self.device)[None], params=torch.empty(1, len(pixels), 0))

    def _texts(self, tokens: Tensor | str | Sequence[str]) -> TextGroup:
        if not isinstance(tokens, Tensor):
            tokens = self.tokenize(tokens)
        elif tokens.is_floating_point() or tokens.dim() != 2:
            raise UserError(f"token ids are whole numbers [B, S], not {_kind(tokens)}")
        return TextGroup(tokens=tokens.to(self.device)[None], lengths=self.lengths(tokens).cpu()[None])

    def _encode(self, modality: Modality, group: ImageGroup | TextGroup, plan: GroupPlan) -> GroupFeatures:
        tower, plans, samples = self._tower(modality), {_GROUP: plan}, group.shape[1]
        with blaming(tower, f"model.{modality}"):
            found = tower({_GROUP: group}, plans)
            return checked_features(tower, plans, samples, self.spec.embed_dim, self.device, found)[_GROUP]


def _projected(features: GroupFeatures, normalize: bool) -> Tensor:
    assert features.projected is not None
    return normalise(features.projected[0]) if normalize else features.projected[0].float()


def resize_crop(
    image: Any, size: int, *, background: str = BACKGROUND, squash: bool = False, interpolation: str = "bicubic"
) -> Tensor:
    """Return what ``ModelEncoder.preprocess`` takes: shorter side resized to ``size``, centre crop: uint8 [3, size,
    size]. With ``squash`` both sides are resized.

    The arithmetic of sizes and the resampling are those of OpenCLIP's test transform (torchvision's on PIL
    images), so that its features are ours; only the change to RGB comes first. Of a very long picture only what
    the crop keeps is resized: of 1 x 100,000 pixels the whole would take gigabytes.
    """
    from PIL import Image

    picture, by = _picture(image, background), Image.Resampling[interpolation.upper()]
    shorter, longer = sorted(picture.size)
    if not shorter:
        raise UserError("a picture without pixels")
    if squash:
        return _pixels(picture.resize((size, size), by))
    width, height = (size if side == shorter else int(size * side / shorter) for side in picture.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    if longer > _LONG * shorter:
        across, down = picture.width / width, picture.height / height
        box = (left * across, top * down, (left + size) * across, (top + size) * down)
        picture = picture.resize((size, size), by, box)
    elif shorter != size:
        picture = picture.resize((width, height), by)
    if picture.size != (size, size):
        picture = picture.crop((left, top, left + size, top + size))
    return _pixels(picture)


def _pixels(picture: Any) -> Tensor:
    """A picture of PIL's as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _picture(image: Any, background: str) -> Any:
    """A path, a PIL image or uint8 [3, H, W] as a PIL image in RGB. Raises UserError for anything else."""
    from PIL import Image

    try:
        if isinstance(image, str | Path):
            return open_rgb(Path(image).expanduser(), background=background)
        if isinstance(image, Image.Image):
            return to_rgb(image, background)
    except BadSample as error:
        raise UserError(f"{image}: no picture that can be read ({error.detail or error.reason})") from error
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.dim() != 3 or len(image) != 3:
        raise UserError(f"a picture is a path, a PIL image or uint8 [3, H, W], not {_kind(image)}")
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def _kind(value: Any) -> str:
    """Return what something is, for messages."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
