"""The image tower of an OpenCLIP model that is one of timm's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cosmos_ssl.errors import CheckpointError
from cosmos_ssl.interop.files import check_weights
from cosmos_ssl.interop.openclip_settings import image_options, side

_TRUNK, _HEAD = "visual.trunk.", "visual.head."


def take(
    tensors: Mapping[str, Tensor], model: Mapping[str, Any], source: object
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The image tower's tensors by our names, and all others. The projection of a model that has none is the identity.

    Raises CheckpointError where it cannot be found.
    """
    vision = model["vision_cfg"]
    found = {name: value for name, value in tensors.items() if name.startswith("visual.")}
    check_weights(found, source)
    others = {name: value for name, value in tensors.items() if name not in found}
    projection = vision.get("timm_proj", "linear")
    if projection == "none":
        matrix, prefix = identity(torch.empty(_width(model)), tensors, source), None
    else:
        prefix = {"linear": f"{_HEAD}proj", "mlp": f"{_HEAD}mlp.fc2"}.get(projection, _TRUNK + _classifier(vision))
        weight = found.pop(f"{prefix}.weight", None)
        if weight is None or weight.dim() != 2:
            raise CheckpointError(f"{source}: its image tower has no projection {prefix}.weight")
        matrix = weight.t()
    state = {"image.projection": matrix}
    renamed = {f"{prefix}.bias": "image.projection_bias"}
    renamed |= {f"{_HEAD}mlp.fc1.{leaf}": f"image.projection_hidden.{leaf}" for leaf in ("weight", "bias")}
    for name, value in found.items():
        state[renamed.get(name) or f"image.model.{name.removeprefix(_TRUNK)}"] = value
    return state, others


def tower(state: Mapping[str, Tensor], told: Mapping[str, Any]) -> dict[str, Any]:
    """The section of a config for the tower with these tensors."""
    vision = told["model_cfg"]["vision_cfg"]
    hidden = state.get("image.projection_hidden.weight")
    size, pool = side(vision.get("image_size", 224)), vision.get("timm_pool", "avg")
    return {
        "type": "timm",
        "model": vision["timm_model_name"],
        **({"image_size": size} if size is not None else {}),
        **({"pooling": pool} if pool else {}),
        **({"projection_bias": True} if "image.projection_bias" in state else {}),
        **({} if hidden is None else {"projection_hidden": len(hidden)}),
        **image_options(told),
    }


def identity(like: Tensor | None, tensors: Mapping[str, Tensor], source: object) -> Tensor:
    """The projection [W, W] of a tower without one, whose width a tensor [W] has; no larger than its file is.

    Raises CheckpointError.
    """
    width = 0 if like is None or like.dim() != 1 else len(like)
    if not 0 < width**2 <= sum(tensor.numel() for tensor in tensors.values()):
        raise CheckpointError(f"{source}: the width of a tower without a projection cannot be told from its tensors")
    return torch.eye(width)


def _width(model: Mapping[str, Any]) -> int:
    width = model.get("embed_dim")
    return width if type(width) is int and 0 < width < 1 << 16 else 0


def _classifier(vision: Mapping[str, Any]) -> str:
    """The name of the last map of a timm model."""
    from timm.models import get_pretrained_cfg

    known = get_pretrained_cfg(vision["timm_model_name"])
    return str(getattr(known, "classifier", None) or "head")
