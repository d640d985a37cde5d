"""The image tower of ours as a timm vision transformer, the projection as its head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosmos_ssl.interop.clip import ClipModel, refuse
from cosmos_ssl.interop.files import write_json, write_safetensors
from cosmos_ssl.interop.official import mlp_ratio

_FAMILY = "vit_base_patch16_clip_224"  # pre-norm, a class token with a position, LayerNorms of 1e-5


def write(model: ClipModel, folder: Path) -> list[str]:
    """Write a folder in the hub's layout for ``timm.create_model("local-dir:...")``; returns what stays behind."""
    refuse("timm", model.kinds("mean", "std"))
    write_safetensors(folder / "model.safetensors", tensors(model))
    write_json(folder / "config.json", config(model))
    return model.left_out("image")


def loading(model: ClipModel) -> str:
    """Lines that load the folder that they are run in."""
    return (
        "import timm\n\n"
        'model = timm.create_model("local-dir:.", pretrained=True).eval()  # num_classes=0: before the projection\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
    )


def architecture(model: ClipModel) -> str:
    """timm's name of this model, where its sizes have one of the base family; else one that is told all sizes."""
    from timm import is_model

    own = f"vit_base_patch{model.pictures.patch_size}_clip_{model.pictures.image_size}"
    return own if is_model(own) else _FAMILY


def arguments(model: ClipModel) -> dict[str, Any]:
    """Return what makes ``timm.create_model(architecture)`` a model of these sizes."""
    return {
        "img_size": model.pictures.image_size,
        "patch_size": model.pictures.patch_size,
        "embed_dim": model.image.width,
        "depth": model.image.layers,
        "num_heads": model.image.heads,
        "mlp_ratio": mlp_ratio(model.image.hidden, model.image.width),
        "reg_tokens": model.registers,
        "pre_norm": model.pre_norm,
        **({"init_values": 1.0} if model.image.layer_scale else {}),
    }


def config(model: ClipModel) -> dict[str, Any]:
    """The ``config.json`` of a timm model: its name, its sizes, and how its pictures are prepared."""
    return {
        "architecture": architecture(model),
        "num_classes": model.embed_dim,
        "num_features": model.image.width,
        "global_pool": "token",
        "model_args": arguments(model),
        "pretrained_cfg": {
            "tag": model.name,
            "custom_load": False,
            "input_size": [3, model.pictures.image_size, model.pictures.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(model.pictures.mean),
            "std": list(model.pictures.std),
            "num_classes": model.embed_dim,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def tensors(model: ClipModel) -> dict[str, Tensor]:
    """The state of that model. timm gives a position to every token before the patches: registers get zeros."""
    image = model.tower("image")
    width, positions = model.image.width, image["position_embedding"]
    blank = positions.new_zeros(model.registers, width)
    found = {name: value for name, value in image.items() if name.startswith(("blocks.", "norm.", "norm_pre."))}
    found |= {
        "cls_token": image["class_token"].view(1, 1, width),
        "pos_embed": torch.cat([positions[:1], blank, positions[1:]])[None],
        "patch_embed.proj.weight": image["patch_embed.weight"],
        "head.weight": image["projection"].t().contiguous(),
        "head.bias": positions.new_zeros(model.embed_dim),
    }
    if model.registers:
        found["reg_token"] = image["register_tokens"][None]
    if not model.pre_norm:  # timm then has a bias here
        found["patch_embed.proj.bias"] = positions.new_zeros(width)
    return found
