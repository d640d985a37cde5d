"""DINOv2's projection head."""

from __future__ import annotations

from cosmos_ssl.api import Count, Size, Spec, Strength
from cosmos_ssl_plugins.heads.dino_projection import Prototypes


class DinoV2Projection(Prototypes):
    """DINO's head with prototypes of learned length and half-precision-safe unit vectors (DINOv2, arXiv 2304.07193,
    section 4).

    One output a view group, ``global_masked`` and ``global_patches``, as ``dino_projection``. DINOv2 unties the heads:
    one is read by the loss of images, another by the loss of patches.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        hidden_dim: Size = 2048,
        bottleneck_dim: Size = 256,
        output_dim: Count = 65536,
        batch_norm: bool = False,
        freeze_last_layer: Strength = 1.0,
    ) -> None:
        """Raises ValueError where there is no image tower.

        hidden_dim: width of the two hidden layers.
        bottleneck_dim: width of the unit vectors before the last layer.
        output_dim: K, the number of prototypes.
        batch_norm: after each hidden layer, over one view of all ranks at a time.
        freeze_last_layer: epochs in which the last layer rests.
        """
        from lightly.models.modules.heads import DINOv2ProjectionHead

        super().__init__(
            spec,
            DINOv2ProjectionHead,
            hidden_dim=hidden_dim,
            bottleneck_dim=bottleneck_dim,
            output_dim=output_dim,
            batch_norm=batch_norm,
            freeze_last_layer=freeze_last_layer,
        )
