"""A projection or prediction head: an MLP on features, or on another head's output."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from torch import nn

from cosmos_ssl.api import Few, Modality, Need, Size, Spec
from cosmos_ssl_plugins.heads.per_group import BatchNorm, PerGroup, group_needs


class Projection(PerGroup):
    """An MLP, as SimCLR, BYOL, Barlow Twins, VICReg, SimSiam and MoCo v3 have behind the tower.

    One output a view group. SimCLR: 2 layers; Barlow Twins and VICReg: 3 layers of 8192; MoCo v3 and SimSiam: 3 layers
    and ``output_batch_norm``. The prediction head of BYOL (hidden 4096, output 256) or SimSiam (hidden 512, output
    2048) is a second one of 2 layers whose ``input`` is the first. Batch norm sees one view of all ranks at a time, as
    there.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        input: str = "pooled",
        modality: Modality = "image",
        hidden_dim: Size = 2048,
        output_dim: Size = 256,
        layers: Few = 2,
        batch_norm: bool = True,
        output_batch_norm: bool = False,
        activation: Literal["relu", "gelu"] = "relu",
    ) -> None:
        """Raises ValueError for an input or a tower that is not there.

        input: ``pooled`` or ``projected`` features of the tower, or the name of a head listed above this one.
        modality: whose features; a head as the input has its own.
        hidden_dim: width of the layers between.
        output_dim: width of the output.
        layers: linear maps.
        batch_norm: after each layer but the last, in place of its bias.
        output_batch_norm: after the last layer too, without scale and shift.
        activation: after each layer but the last; ``gelu`` in SimDINO.
        """
        from lightly.models.modules.heads import ProjectionHead

        width, needs = _input(spec, input, modality)
        super().__init__(needs, output_dim)
        self.mixes_samples = batch_norm or output_batch_norm
        widths = [width, *[hidden_dim] * (layers - 1), output_dim]
        act = nn.ReLU if activation == "relu" else nn.GELU
        blocks = [(a, b, BatchNorm(b) if batch_norm else None, act()) for a, b in pairwise(widths[:-1])]
        last = (widths[-2], output_dim, BatchNorm(output_dim, affine=False) if output_batch_norm else None, None)
        self.mlp = ProjectionHead([*blocks, last])


def _input(spec: Spec, name: str, modality: Modality) -> tuple[int, dict[str, Need]]:
    """The input's width, and what each output reads. Raises ValueError."""
    if name not in ("pooled", "projected"):
        if name not in spec.heads:
            able = ", ".join(["pooled", "projected", *spec.heads])
            raise ValueError(f"input: no head '{name}' is listed above this one. There are: {able}")
        widths = set(spec.heads[name].values())
        if len(widths) != 1:
            raise ValueError(f"input: the outputs of '{name}' differ in width, and one MLP cannot take them all")
        return widths.pop(), {output: Need(head=name, outputs=(output,)) for output in spec.heads[name]}
    tower = spec.image if modality == "image" else spec.text
    if tower is None:
        raise ValueError(f"modality: the config has no model.{modality}")
    projected = name == "projected"
    return spec.embed_dim if projected else tower.width, group_needs(spec, modality, projected=projected)
