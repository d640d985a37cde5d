"""How far what is predicted of hidden patches lies from what they hold: in the teacher's features, or in pixels.

Shape letters: V views, B samples, N patches of a view, W width of the image tower, K target blocks, p side of a patch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cosmos_ssl.api import Loss, LossOutput, Need, Spec, StepContext


class Ijepa(Loss):
    """I-JEPA (arXiv 2301.08243, section 3): the distance of predicted features from the teacher's, which saw all.

    The teacher's features of a patch are normalised to mean 0 and variance 1 (a LayerNorm without weights). The
    distance is a mean over a patch's features, then over the patches of a target block, over blocks and samples.
    """

    def __init__(self, spec: Spec, *, head: str, distance: Literal["l2", "smooth_l1"] = "l2") -> None:
        """Raises ValueError where the head is not there, or predicts something else.

        head: the head ``patch_predictor`` that predicts features.
        distance: the squared difference, as in the paper, or ``smooth_l1``: half of it below 1, linear above.
        """
        super().__init__()
        check_head(spec, head, "features")
        self.head, self.distance = head, distance

    def requires(self) -> list[Need]:
        """The head; the teacher's patches."""
        return [Need(head=self.head), Need(role="teacher", modality="image", group="global", kind="tokens")]

    def forward(self, ctx: StepContext) -> LossOutput:
        """The distance."""
        assert ctx.teacher is not None
        tokens = ctx.teacher.image["global"].tokens
        assert tokens is not None
        wanted = F.layer_norm(tokens.float(), tokens.shape[-1:])  # [V, B, N, W]
        distance = F.mse_loss if self.distance == "l2" else F.smooth_l1_loss
        return LossOutput(terms={"distance": mean_distance(ctx, self.head, wanted, distance)})


class Mae(Loss):
    """MAE (arXiv 2111.06377, section 3): the mean squared error of predicted pixels, of hidden patches alone.

    The mean is over a patch's 3 p^2 numbers, over the hidden patches of a picture, and over pictures.
    """

    def __init__(self, spec: Spec, *, head: str, normalise_patches: bool = True) -> None:
        """Raises ValueError where the head is not there, or predicts something else.

        head: the head ``patch_predictor`` that predicts pixels.
        normalise_patches: each patch is predicted at mean 0 and variance 1; False: as the tower sees it.
        """
        super().__init__()
        self.patch = check_head(spec, head, "pixels")
        self.head, self.normalise = head, normalise_patches

    def requires(self) -> list[Need]:
        """The head; pixels."""
        return [Need(head=self.head), Need(modality="image", group="global", kind="views")]

    def forward(self, ctx: StepContext) -> LossOutput:
        """The error."""
        wanted = patches(ctx.views.image["global"].pixels.float(), self.patch)
        if self.normalise:
            variance, mean = torch.var_mean(wanted, dim=-1, keepdim=True)
            wanted = (wanted - mean) / (variance + 1e-6).sqrt()
        return LossOutput(terms={"error": mean_distance(ctx, self.head, wanted, F.mse_loss)})


def check_head(spec: Spec, head: str, predicts: Literal["features", "pixels"]) -> int:
    """Return the side of a patch. Raises ValueError for a head that does not predict this."""
    assert spec.image is not None or not spec.heads.get(head), "no predictor is built without an image tower"
    side, width = (0, 0) if spec.image is None else (spec.image.patch_size, spec.image.width)
    given = spec.heads.get(head, {})
    if "targets" not in given or given["tokens"] != (width if predicts == "features" else 3 * side**2):
        raise ValueError(f"head: no head '{head}' of type patch_predictor with predicts: {predicts}")
    return side


def mean_distance(ctx: StepContext, head: str, wanted: Tensor, distance: Callable[..., Tensor]) -> Tensor:
    """The mean over the places to predict of each block, then over blocks, views and samples: a scalar.

    ``wanted`` [V, B, N, W] is held against the head's ``tokens``; a block without a place counts as 0.
    """
    found = ctx.student.heads[head]
    predicted = found["tokens"].float().unflatten(0, (-1, len(wanted)))  # [K, V, B, N, W]
    targets = found["targets"][..., 0].view(predicted.shape[:-1])
    each: Tensor = distance(predicted, wanted.expand_as(predicted), reduction="none").mean(-1) * targets
    return (each.sum(-1) / targets.sum(-1).clamp_min(1)).mean()


def patches(pixels: Tensor, side: int) -> Tensor:
    """Pictures [V, B, 3, H, W], cropped to whole patches, to the numbers of each patch, [V, B, N, 3 side^2]."""
    rows, columns = (length // side for length in pixels.shape[-2:])
    cut = pixels[..., : rows * side, : columns * side].unflatten(-1, (columns, side)).unflatten(-3, (rows, side))
    return torch.flatten(cut.permute(0, 1, 3, 5, 2, 4, 6).flatten(-3), 2, 3)
