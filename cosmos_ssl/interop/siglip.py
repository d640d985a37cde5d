"""Hugging Face's SiglipModel (SigLIP, and SigLIP 2 of fixed sizes) as an OpenCLIP model on one of timm's towers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosmos_ssl.errors import CheckpointError
from cosmos_ssl.interop.official import MAX_SIZE

_TOWERS = {
    (768, 12, 12, 16): "vit_base_patch16",
    (768, 12, 12, 32): "vit_base_patch32",
    (1024, 24, 16, 16): "vit_large_patch16",
    (1152, 27, 16, 14): "vit_so400m_patch14",
    (1152, 27, 16, 16): "vit_so400m_patch16",
    (1536, 40, 16, 16): "vit_giantopt_patch16",
}
"""Width, layers, heads and side of a patch -> the start of timm's name."""
_VISION = (
    ("vision_model.embeddings.patch_embedding.", "patch_embed.proj."),
    ("vision_model.embeddings.position_embedding.weight", "pos_embed"),
    ("vision_model.post_layernorm.", "norm."),
    ("vision_model.head.probe", "attn_pool.latent"),
    ("vision_model.head.attention.in_proj_", "attn_pool.in_proj_"),
    ("vision_model.head.attention.out_proj.", "attn_pool.proj."),
    ("vision_model.head.layernorm.", "attn_pool.norm."),
    ("vision_model.head.mlp.", "attn_pool.mlp."),
    ("vision_model.encoder.layers.", "blocks."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
    (".self_attn.out_proj.", ".attn.proj."),
    (".self_attn.", ".attn."),
)
"""Names of SiglipModel's image tower, and of timm's."""
_TEXT = (
    ("text_model.head.", "text_projection."),
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm", "ln_final"),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".self_attn.", ".attn."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)
"""Names of its text tower, and of OpenCLIP's."""


def as_openclip(content: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """SiglipModel's tensors by OpenCLIP's names: one of timm's towers as ``visual.trunk``, and a text tower."""
    found: dict[str, Tensor] = {}
    for name, value in content.items():
        vision = name.startswith("vision_model.")
        ours = name
        for theirs, mine in _VISION if vision else _TEXT:
            ours = ours.replace(theirs, mine)
        found[f"visual.trunk.{ours}" if vision else ours] = value
    for name in [name for name in found if ".attn.q_proj." in name]:
        parts = [found.pop(name.replace(".q_proj.", f".{letter}_proj."), torch.empty(0)) for letter in "qkv"]
        if all(part.dim() and part.shape == parts[0].shape for part in parts):
            vision = name.startswith("visual.")
            found[name.replace(".q_proj.", ".qkv." if vision else ".in_proj_")] = torch.cat(parts)
    for leaf in ("weight", "bias"):
        whole = found.pop(f"visual.trunk.attn_pool.in_proj_{leaf}", None)
        if whole is not None and whole.dim() and len(whole) % 3 == 0:
            parts = whole.split([len(whole) // 3, len(whole) // 3 * 2])
            for part, value in zip(("q", "kv"), parts, strict=True):
                found[f"visual.trunk.attn_pool.{part}.{leaf}"] = value
    positions = found.get("visual.trunk.pos_embed")
    if positions is not None:
        found["visual.trunk.pos_embed"] = positions[None]
    return found


def settings(vision: Mapping[str, Any], words: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return what SiglipModel's configuration means, as an OpenCLIP config has it (``model_cfg``).

    Raises CheckpointError for an image tower that is none of the published sizes, and where no tokenizer lies beside.
    """
    usual: dict[str, Any] = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "layer_norm_eps": 1e-6,
    }
    usual |= {"hidden_act": "gelu_pytorch_tanh"}
    vision, words = {**usual, "image_size": 224, "patch_size": 16, **vision}, {**usual, **words}
    sizes = [vision[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size")]
    start = _TOWERS.get((*sizes,)) if all(type(size) is int for size in sizes) else None
    name = f"{start}_siglip_{vision['image_size']}"
    if start is None or not _is_timm(name):
        what = "width, layers, heads, patch"
        raise CheckpointError(
            f"{folder}: timm has no SigLIP tower of its sizes ({what} {sizes}, pictures of {vision['image_size']})"
        )
    odd = [
        f"vision_config.{key}: {vision[key]}" for key in ("hidden_act", "layer_norm_eps") if vision[key] != usual[key]
    ]
    odd += [f"text_config.hidden_act: {words['hidden_act']}"] if words["hidden_act"] != usual["hidden_act"] else []
    odd += ["vision_config.vision_use_head: false"] if vision.get("vision_use_head") is False else []
    if odd:
        raise CheckpointError(f"{folder} is a model of another kind than SigLIP: {', '.join(odd)}")
    heads = words["num_attention_heads"]
    if type(heads) is not int or not 0 < heads < MAX_SIZE:
        raise CheckpointError(f"{folder}: its text tower has no heads ({heads})")
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
        raise CheckpointError(f"{folder} holds no tokenizer (tokenizer.json, tokenizer_config.json). Fetch it, too")
    return {
        "embed_dim": vision["hidden_size"],
        "vision_cfg": {
            "image_size": vision["image_size"],
            "timm_model_name": name,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            "heads": heads,
            "no_causal_mask": True,
            "pool_type": "last",
            "proj_bias": True,
            "hf_tokenizer_name": str(folder),
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "norm_kwargs": {"eps": words["layer_norm_eps"]},
            "act_kwargs": {"approximate": "tanh"},
        },
    }


def _is_timm(name: str) -> bool:
    from timm import is_model

    return bool(is_model(name))
