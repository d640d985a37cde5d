"""DINO's projection head."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

from torch import nn

from cosmos_ssl.api import Count, Need, ParameterRule, Size, Spec, Strength
from cosmos_ssl_plugins.heads.per_group import PATCHES, PerGroup, global_batch_norm, group_needs


class Prototypes(PerGroup):
    """What the heads of DINO and DINOv2 share: an MLP on pooled image features, masked patches and all patches, unit
    length, K prototypes.
    """

    def __init__(
        self,
        spec: Spec,
        make: Callable[..., nn.Module],
        *,
        freeze_last_layer: float,
        batch_norm: bool,
        **options: int | bool,
    ) -> None:
        """``make`` is the class of lightly's head. Raises ValueError where there is no image tower."""
        if spec.image is None:
            raise ValueError("this head needs model.image")
        needs = group_needs(spec)
        for name, view in spec.image_views.items():
            if view.masks:
                needs[name + PATCHES] = Need(modality="image", group=name, kind="tokens")
        super().__init__(needs, options["output_dim"])
        self.freeze_last_layer = freeze_last_layer
        self.mixes_samples = batch_norm
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # lightly's heads use weight_norm, which torch wants replaced
            self.mlp = global_batch_norm(make(input_dim=spec.image.width, batch_norm=batch_norm, **options))

    def parameter_rules(self) -> list[ParameterRule]:
        """The last layer rests for the first epochs; lengths of the prototypes that are fixed at 1 stay so."""
        rules = [ParameterRule(match="mlp.last_layer.*", frozen_epochs=self.freeze_last_layer)]
        fixed = [
            name
            for name, parameter in self.named_parameters()
            if name.endswith("weight_g") and not parameter.requires_grad
        ]
        return rules + [ParameterRule(match=name, frozen_epochs=math.inf) for name in fixed]


class DinoProjection(Prototypes):
    """A 3-layer MLP with GELU, unit length, and a weight-normalised linear map to K (DINO, arXiv 2104.14294, section
    3.1).

    One output a view group, from pooled image features before the projection. Where the augmenter draws masks there are
    also ``global_masked``, from masked patches (a head shared as in iBOT, arXiv 2111.07832, section 3.2), and
    ``global_patches``, from all patches.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        hidden_dim: Size = 2048,
        bottleneck_dim: Size = 256,
        output_dim: Count = 65536,
        batch_norm: bool = False,
        norm_last_layer: bool = True,
        freeze_last_layer: Strength = 1.0,
    ) -> None:
        """Raises ValueError where there is no image tower.

        hidden_dim: width of the two hidden layers.
        bottleneck_dim: width of the unit vectors before the last layer.
        output_dim: K, the number of prototypes.
        batch_norm: after each hidden layer, over one view of all ranks at a time.
        norm_last_layer: prototypes keep length 1: steadier, a little worse.
        freeze_last_layer: epochs in which the last layer rests.
        """
        from lightly.models.modules.heads import DINOProjectionHead

        super().__init__(
            spec,
            DINOProjectionHead,
            hidden_dim=hidden_dim,
            bottleneck_dim=bottleneck_dim,
            output_dim=output_dim,
            batch_norm=batch_norm,
            norm_last_layer=norm_last_layer,
            freeze_last_layer=freeze_last_layer,
        )
