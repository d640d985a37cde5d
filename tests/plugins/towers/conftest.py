"""The recorded values of the official program, and our two towers with its start weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cosmos_ssl.api import Spec
from cosmos_ssl_plugins.towers.clip_text import ClipText
from cosmos_ssl_plugins.towers.clip_vit import ClipViT

GOLDEN = Path(__file__).parents[2] / "data" / "golden"

RENAMED = {
    "resblocks": "blocks",
    "ln_1": "norm1",
    "ln_2": "norm2",
    "in_proj_weight": "qkv.weight",
    "in_proj_bias": "qkv.bias",
    "out_proj": "proj",
    "c_fc": "fc1",
    "c_proj": "fc2",
    "ln_pre": "norm_pre",
    "ln_post": "norm",
    "ln_final": "norm",
    "conv1": "patch_embed",
    "class_embedding": "class_token",
    "positional_embedding": "position_embedding",
    "proj": "projection",
    "text_projection": "projection",
}


def ours(official: dict[str, Tensor], visual: bool) -> dict[str, Tensor]:
    """One tower's part of an official state, by our names."""
    state = {}
    for name, tensor in official.items():
        name = name.removeprefix("module.")
        if name.startswith("visual.") != visual or any(
            word in name for word in ("cross_pool", "token_mapping", "logit_scale")
        ):
            continue
        parts = name.removeprefix("visual.").removeprefix("transformer.").split(".")
        state[".".join(RENAMED.get(part, part) for part in parts)] = tensor
    return state


@pytest.fixture(scope="session")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="session")
def official_towers() -> Callable[..., tuple[ClipViT, ClipText]]:
    """A function (role, **options of the vit) -> both towers of that role."""
    meta = json.loads((GOLDEN / "meta.json").read_text())
    states = torch.load(GOLDEN / "official_checkpoint.pt", weights_only=True)

    def build(role: str, attention: str = "auto", **options: Any) -> tuple[ClipViT, ClipText]:
        vision, text = meta["vision_cfg"], meta["text_cfg"]
        spec = Spec(
            embed_dim=meta["embed_dim"],
            attention=attention,
            context_length=text["context_length"],
            vocab_size=text["vocab_size"],
        )
        sizes = {name: vision[name] for name in ("width", "layers", "patch_size", "image_size")}
        vit = ClipViT(spec, **sizes, heads=vision["width"] // vision["head_width"], **options)
        tower = ClipText(spec, width=text["width"], layers=text["layers"], heads=text["heads"])
        vit.load_state_dict(ours(states[role], visual=True))
        tower.load_state_dict(ours(states[role], visual=False))
        return vit, tower

    return build
