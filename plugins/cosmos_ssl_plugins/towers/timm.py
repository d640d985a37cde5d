"""Models of timm as image towers: plain vision transformers in one packed pass over all views, others as they are, one
pass for each view group.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cosmos_ssl.api import (
    GroupFeatures,
    GroupPlan,
    ImageGroup,
    Modality,
    Pixels,
    Share,
    Size,
    Spec,
    Tower,
    TowerSpec,
    UserError,
    ViewSpec,
)
from cosmos_ssl.functional import upload
from cosmos_ssl.models.attention import take_rows
from cosmos_ssl.models.transformer import Layout, pick_views, project
from cosmos_ssl_plugins.towers.reads import Read


class TimmImage(Tower):
    """A model by its timm name (ViT, EVA, DINOv3, SigLIP, ConvNeXt, ...), with a projection behind it.

    ``pooled`` is what timm feeds its classifier. Models other than vision transformers have no patch tokens.

    ``model``: its name, such as ``vit_base_patch16_224``; or ``local-dir:FOLDER``, where timm wrote one.
    ``pretrained``: start from its published weights, which are fetched, or from those of the folder.
    ``image_size``: side of a picture in pixels; None is the model's own.
    ``drop_path``: timm's rate of the last block.
    ``grad_checkpointing``: compute blocks again in the backward pass instead of keeping what they need.
    ``mask_token``: a learned token for hidden patches (masked image modelling).
    ``pooling``: timm's, such as ``map`` for SigLIP's attention pooling; None is the model's own.
    ``activation``: of the MLPs, for vision transformers: GELU or that by tanh (SigLIP as Hugging Face has it); None is
    the model's own.
    ``projection_bias``: the projection adds a bias.
    ``projection_hidden``: width of a layer with GELU before the projection; None is no such layer.
    ``mean``, ``std``: by which the channels of pictures are normalised; None is the model's own.
    ``resize``: how evaluation makes a picture square: it cuts the middle out, or squashes it.
    ``interpolation``: by which evaluation resizes.

    Raises UserError where the name is unknown, patches are to be hidden and the model has none, or the weights cannot
    be fetched.
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
        mask_token: bool = False,
        pooling: Literal["token", "avg", "avgmax", "max", "map"] | None = None,
        activation: Literal["gelu", "gelu_tanh"] | None = None,
        projection_bias: bool = False,
        projection_hidden: Size | None = None,
        mean: tuple[Share, Share, Share] | None = None,
        std: tuple[Share, Share, Share] | None = None,
        resize: Literal["crop", "squash"] = "crop",
        interpolation: Literal["bicubic", "bilinear"] = "bicubic",
    ) -> None:
        # timm takes seconds, which those who only ask for options save
        from cosmos_ssl_plugins.towers import packed_timm

        super().__init__()
        self.model_name = model
        options: dict[str, Any] = {"num_classes": 0, "drop_path_rate": drop_path}
        options |= {} if pooling is None else {"global_pool": pooling}
        options |= {} if activation is None else {"act_layer": activation}
        # a plan built on the meta device only asks for shapes
        fetch = pretrained and torch.get_default_device().type != "meta"
        self.model, self.dynamic = _create(model, fetch, options, image_size)
        patches = getattr(self.model, "num_prefix_tokens", None) is not None
        if mask_token and not patches:
            raise UserError(
                f"model: timm's '{model}' has no patch tokens of one size to hide; choose a vision transformer such as "
                "vit_base_patch16_224"
            )
        self.capabilities = frozenset(("tokens",) * patches + ("masks",) * mask_token)
        self.packs = packed_timm.pack_blocks(self.model)
        if grad_checkpointing:
            self.model.set_grad_checkpointing()
        width, known = int(self.model.num_features), self.model.pretrained_cfg
        self.spec = TowerSpec(
            width=width,
            image_size=image_size or known["input_size"][-1],
            patch_size=_patch_size(self.model),
            mean=mean or tuple(known["mean"]),
            std=std or tuple(known["std"]),
            resize=resize,
            interpolation=interpolation,
        )
        self.mask_token = nn.Parameter(torch.zeros(int(self.model.embed_dim))) if mask_token else None
        self.projection_hidden = None if projection_hidden is None else nn.Linear(width, projection_hidden)
        inner = projection_hidden or width
        self.projection = nn.Parameter(nn.init.normal_(torch.empty(inner, spec.embed_dim), std=inner**-0.5))
        self.projection_bias = nn.Parameter(torch.zeros(spec.embed_dim)) if projection_bias else None
        self.attention = spec.attention
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
        if self.packs and plan and not torch.compiler.is_compiling():  # what packs rows plans on the host
            return self._encode_packed(groups, plan)
        return {name: self._encode(groups[name], wanted) for name, wanted in plan.items()}

    def _encode_packed(
        self, groups: Mapping[str, ImageGroup], plan: Mapping[str, GroupPlan]
    ) -> dict[str, GroupFeatures]:
        from cosmos_ssl_plugins.towers import packed_timm

        parts, reads, start = [], [], 0
        for name, wanted in plan.items():
            pixels, masks, hidden = self._picked(groups[name], wanted)
            with self._hiding(hidden):
                x = packed_timm.embed(self.model, pixels.flatten(0, 1))
            reads.append(Read(wanted, pixels.shape[1], x.shape[1], self.model.num_prefix_tokens, start, masks))
            parts.append(x.flatten(0, 1))
            start += len(parts[-1])
        packed = torch.cat(parts)
        alone = packed_timm.pools_class_token(self.model)
        layout = packed_timm.lay_out_reads(
            reads, start, pooled_alone=alone, device=packed.device, backend=self.attention
        )
        out = packed_timm.encode_rows(self.model, packed, layout)
        return {name: self._features(out, layout, read, alone) for name, read in zip(plan, reads, strict=True)}

    def _features(self, out: Tensor, layout: Layout, read: Read, alone: bool) -> GroupFeatures:
        """What a group's plan asks for, of the rows that the last block answered."""
        wanted, shape = read.wanted, (len(read.wanted.views), read.batch)
        rows = read.pooled[:, None] + np.arange(1 if alone else read.lengths[0])
        images = take_rows(out, layout.rows(rows.ravel())).view(*rows.shape, -1)
        pooled = self.model.forward_head(images, pre_logits=True).view(*shape, -1)
        tokens = None
        if wanted.tokens:
            tokens = take_rows(out, layout.rows(read.tokens)).view(len(wanted.tokens), read.batch, read.count, -1)
        masked = take_rows(out, layout.rows(read.masked)) if wanted.masked_tokens else None
        return self._given(wanted, pooled, tokens, masked)

    def _given(self, wanted: GroupPlan, pooled: Tensor, tokens: Tensor | None, masked: Tensor | None) -> GroupFeatures:
        return GroupFeatures(
            views=wanted.views,
            pooled=pooled,
            projected=self._project(pooled) if wanted.projected else None,
            tokens=tokens,
            token_views=wanted.tokens,
            masked_tokens=masked,
        )

    def _picked(self, group: ImageGroup, wanted: GroupPlan) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Pixels [V, B, 3, H, W] of the views, their masks [V, B, N] on the host, and on the device where those hide.

        Raises UserError for a size that the model cannot take.
        """
        pixels = pick_views(group.pixels, wanted.views)
        height, width = pixels.shape[-2:]
        size = self.spec.image_size
        if not self.dynamic and (height, width) != (size, size):
            raise UserError(
                f"model: timm's '{self.model_name}' takes images of {size}x{size} alone, not {height}x{width}"
            )
        masks = group.masks if wanted.hide_masked or wanted.masked_tokens else None
        masks = None if masks is None else pick_views(masks, wanted.views)
        return pixels, masks, upload(pixels.device, masks)[0] if masks is not None and wanted.hide_masked else None

    def _encode(self, group: ImageGroup, wanted: GroupPlan) -> GroupFeatures:
        pixels, masks, hidden = self._picked(group, wanted)
        views, batch = pixels.shape[:2]
        with self._hiding(hidden):
            out = self.model.forward_features(pixels.flatten(0, 1))
        pooled = self.model.forward_head(out, pre_logits=True).view(views, batch, -1)
        tokens = masked = None
        if wanted.tokens or wanted.masked_tokens:
            patches = out[:, self.model.num_prefix_tokens :]
            patches = patches.view(views, batch, *patches.shape[1:])
            tokens = pick_views(patches, wanted.token_places) if wanted.tokens else None
            if wanted.masked_tokens:
                assert masks is not None
                (rows,) = upload(pixels.device, masks.flatten().nonzero().flatten())
                masked = patches.flatten(0, 2)[rows]
        return self._given(wanted, pooled, tokens, masked)

    def _hiding(self, masks: Tensor | None) -> Any:
        """While entered, patches that ``masks`` [V, B, N] marks are the mask token, as soon as they are embedded."""
        if masks is None:
            return nullcontext()

        def hide(module: nn.Module, inputs: Any, x: Tensor) -> Tensor:
            assert self.mask_token is not None
            return torch.where(masks.reshape(*x.shape[:-1], 1), self.mask_token.to(x.dtype), x)

        return self.model.patch_embed.register_forward_hook(hide)

    def _project(self, pooled: Tensor) -> Tensor:
        inner = pooled if self.projection_hidden is None else F.gelu(self.projection_hidden(pooled))
        return project(inner, self.projection, self.projection_bias)

    def unread(self, plan: Mapping[str, GroupPlan]) -> Sequence[str]:
        """The projection and the mask token, where no group reads them."""
        projected = any(wanted.projected for wanted in plan.values())
        hides = self.mask_token is None or any(wanted.hide_masked for wanted in plan.values())
        return (*(() if projected else ("projection*",)), *(() if hides else ("mask_token",)))

    def layer_of(self, name: str) -> int:
        """The depth of a parameter as timm groups them: 0 embeddings, then the blocks, ``layer_count`` the
        projection.
        """
        return 0 if name == "mask_token" else self._depths.get(name.removeprefix("model."), self.layer_count)


def _create(name: str, pretrained: bool, options: dict[str, Any], image_size: int | None) -> tuple[Any, bool]:
    """The model, and whether it takes images of any size. What its family has no argument for, it needs not."""
    import timm

    if ":" not in name and not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=1)
        raise UserError(f"model: timm has no '{name}'." + (f" Did you mean '{close[0]}'?" if close else ""))
    sizes: dict[str, Any] = {"dynamic_img_size": True, **({} if image_size is None else {"img_size": image_size})}
    try:
        while True:
            try:
                model = timm.create_model(name, pretrained=pretrained, **sizes, **options)
            except TypeError as error:
                unknown = next((key for key in sizes if f"'{key}'" in str(error)), None)
                if unknown is None:
                    raise
                del sizes[unknown]
            else:
                return model, "dynamic_img_size" in sizes or not model.pretrained_cfg.get("fixed_input_size")
    except TypeError as error:
        raise UserError(f"model: timm's '{name}' cannot be built as an image tower: {error}") from error
    except Exception as error:  # the hub's client, sockets and files raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"model: timm's '{name}' cannot be fetched: {reason}. Reach the hub once, or set pretrained: false"
        ) from error


def _patch_size(model: Any) -> int:
    """Side of a patch in pixels; of a model without such, of what a place of its last map of features stands for."""
    size = getattr(getattr(model, "patch_embed", None), "patch_size", None) or model.feature_info[-1]["reduction"]
    return int(size[0] if isinstance(size, tuple | list) else size)


def _depths(model: Any) -> dict[str, int]:
    """The depth of each parameter, from timm's own grouping for layer-wise learning rates."""
    from timm.models import group_parameters

    return {name: int(depth) for name, depth in group_parameters(model, model.group_matcher(), reverse=True).items()}
