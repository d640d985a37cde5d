"""Vision transformers of timm as image towers, run as they are: one pass for each view group."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cosmos_ssl.api import (
    GroupFeatures,
    GroupPlan,
    ImageGroup,
    Modality,
    Pixels,
    Share,
    Spec,
    Tower,
    TowerSpec,
    UserError,
    ViewSpec,
)
from cosmos_ssl.models.transformer import pick_views


class TimmImage(Tower):
    """A vision transformer by its timm name (ViT, DeiT, EVA, DINOv2, BEiT, ...), with a projection behind it.

    ``pooled`` is what timm feeds its classifier.

    ``model``: its name, such as ``vit_base_patch16_224``.
    ``pretrained``: start from its published weights, which are fetched.
    ``image_size``: side of a picture in pixels; None is the model's own.
    ``drop_path``: timm's rate of the last block.
    ``grad_checkpointing``: compute blocks again in the backward pass instead of keeping what they need.

    Raises UserError where the name is unknown, the model has no patch tokens, or the weights cannot be fetched.
    """

    modality: ClassVar[Modality] = "image"
    capabilities = frozenset({"tokens"})

    def __init__(
        self,
        spec: Spec,
        *,
        model: str,
        pretrained: bool = False,
        image_size: Pixels | None = None,
        drop_path: Share = 0.0,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.model_name = model
        options: dict[str, Any] = {"num_classes": 0, "drop_path_rate": drop_path}
        if image_size is not None:
            options["img_size"] = image_size
        # a plan built on the meta device only asks for shapes
        self.model, self.dynamic = _create(model, pretrained and torch.get_default_device().type != "meta", options)
        if getattr(self.model, "num_prefix_tokens", None) is None:
            raise UserError(
                f"model: timm's '{model}' has no patch tokens of one size; choose a vision transformer such as "
                "vit_base_patch16_224"
            )
        if grad_checkpointing:
            self.model.set_grad_checkpointing()
        width = int(self.model.num_features)
        known = self.model.pretrained_cfg
        self.spec = TowerSpec(
            width=width,
            image_size=image_size or known["input_size"][-1],
            patch_size=self.model.patch_embed.patch_size[0],
            mean=tuple(known["mean"]),
            std=tuple(known["std"]),
        )
        self.projection = nn.Parameter(nn.init.normal_(torch.empty(width, spec.embed_dim), std=width**-0.5))
        self._depths = _depths(self.model)
        self.layer_count = max(self._depths.values()) + 1

    def check_inputs(self, views: Mapping[str, ViewSpec]) -> None:
        """Raise ValueError for sizes that the model cannot take: others than its own, or no multiples of its
        patches.
        """
        size, patch = self.spec.image_size, self.spec.patch_size
        for name, view in views.items():
            if view.size is not None and (view.size % patch if self.dynamic else view.size != size):
                takes = f"multiples of {patch}" if self.dynamic else f"{size} alone"
                raise ValueError(
                    f"the views '{name}' of augmenters.image are {view.size} pixels wide: timm's "
                    f"'{self.model_name}' takes {takes}"
                )

    def forward(self, groups: Mapping[str, ImageGroup], plan: Mapping[str, GroupPlan]) -> dict[str, GroupFeatures]:
        """Encode the views in ``plan``; pixels float [V, B, 3, H, W].

        Raises UserError for a size that the model cannot take.
        """
        return {
            name: self._encode(pick_views(groups[name].pixels, wanted.views), wanted) for name, wanted in plan.items()
        }

    def _encode(self, pixels: Tensor, wanted: GroupPlan) -> GroupFeatures:
        views, batch, _, height, width = pixels.shape
        size = self.spec.image_size
        if not self.dynamic and (height, width) != (size, size):
            raise UserError(
                f"model: timm's '{self.model_name}' takes images of {size}x{size} alone, not {height}x{width}"
            )
        out = self.model.forward_features(pixels.flatten(0, 1))
        pooled = self.model.forward_head(out, pre_logits=True).view(views, batch, -1)
        tokens = None
        if wanted.tokens:
            patches = out[:, self.model.num_prefix_tokens :]
            tokens = patches.view(views, batch, *patches.shape[1:])[wanted.token_places]
        return GroupFeatures(
            views=wanted.views,
            pooled=pooled,
            projected=pooled @ self.projection if wanted.projected else None,
            tokens=tokens,
            token_views=wanted.tokens,
        )

    def unread(self, plan: Mapping[str, GroupPlan]) -> Sequence[str]:
        """The projection, where no group reads it."""
        return () if any(wanted.projected for wanted in plan.values()) else ("projection",)

    def layer_of(self, name: str) -> int:
        """The depth of a parameter as timm groups them: 0 embeddings, then the blocks, ``layer_count`` the
        projection.
        """
        return self._depths.get(name.removeprefix("model."), self.layer_count)


def _create(name: str, pretrained: bool, options: dict[str, Any]) -> tuple[Any, bool]:
    """The model, and whether it takes images of any size."""
    import timm

    if ":" not in name and not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=1)
        raise UserError(f"model: timm has no '{name}'." + (f" Did you mean '{close[0]}'?" if close else ""))
    try:
        try:
            return timm.create_model(name, pretrained=pretrained, dynamic_img_size=True, **options), True
        except TypeError as error:
            if "dynamic_img_size" not in str(error):
                raise
            return timm.create_model(name, pretrained=pretrained, **options), False
    except TypeError as error:
        raise UserError(f"model: timm's '{name}' cannot be built as a vision transformer: {error}") from error
    except Exception as error:  # the hub's client, sockets and files raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"model: timm's '{name}' cannot be fetched: {reason}. Reach the hub once, or set pretrained: false"
        ) from error


def _depths(model: Any) -> dict[str, int]:
    """The depth of each parameter, from timm's own grouping for layer-wise learning rates."""
    from timm.models import group_parameters

    return {name: int(depth) for name, depth in group_parameters(model, model.group_matcher(), reverse=True).items()}
