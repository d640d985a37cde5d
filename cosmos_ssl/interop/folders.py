"""Folders with a ``config.json``, as on the hub: Hugging Face's CLIPModel and SiglipModel, and models of timm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosmos_ssl.errors import CheckpointError
from cosmos_ssl.interop import openclip, siglip
from cosmos_ssl.interop.files import check_weights, read_json, read_tensor_file, weights_of
from cosmos_ssl.interop.huggingface import ACTIVATIONS
from cosmos_ssl.interop.official import CLIP_VOCABULARY, MAX_SIZE, ForeignCheckpoint
from cosmos_ssl.interop.openclip_settings import CONFIG as OPENCLIP

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_RENAMED = (
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding", "visual.conv1"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm", "visual.ln_pre"),
    ("vision_model.post_layernorm", "visual.ln_post"),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
    ("visual_projection.weight", "visual.proj"),
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm", "ln_final"),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("text_projection.weight", "text_projection"),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".self_attn.", ".attn."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)
"""Names of CLIPModel, and of OpenCLIP's models."""


def is_folder(path: Path) -> bool:
    """Return whether a folder may hold such a model."""
    return (path / CONFIG).is_file() and not (path / OPENCLIP).is_file()


def read_folder(folder: Path, *, partial: bool = False) -> ForeignCheckpoint:
    """The model in a folder with ``config.json``. Raises CheckpointError for others than those."""
    told = read_json(folder / CONFIG)
    if "architecture" in told:
        return _read_timm(folder, told)
    vision, words = [told.get(name) or {} for name in ("vision_config", "text_config")]
    kind = told.get("model_type")
    if kind not in ("clip", "siglip") or not isinstance(vision, dict) or not isinstance(words, dict):
        raise CheckpointError(
            f"{folder} is a model of another kind than CLIPModel, SiglipModel and timm's: its model_type is {kind}"
        )
    weights = weights_of(folder, CONFIG, WEIGHTS)
    pictures = read_json(path) if (path := folder / "preprocessor_config.json").is_file() else {}
    model = (_settings if kind == "clip" else siglip.settings)(vision, words, folder)
    settings = {"model_cfg": model, "preprocess_cfg": _preprocessing(pictures)}
    tensors = _tensors(read_tensor_file(weights)[0], folder)
    if kind == "clip":
        return openclip.read_tensors(_as_openclip(tensors), folder, settings, partial=partial)
    found = openclip.read_tensors(siglip.as_openclip(tensors), folder, settings, partial=partial)
    found.config["model"]["image"]["activation"] = "gelu_tanh"  # of which OpenCLIP tells for texts alone
    return found


def _tensors(content: Mapping[str, Any], source: Path) -> dict[str, Tensor]:
    """The tensors of a model of transformers'. Raises CheckpointError."""
    tensors = {name: value for name, value in content.items() if not name.endswith("position_ids")}
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{source} holds no model of transformers': not all in its file are tensors")
    check_weights(tensors, source)
    return tensors


def _preprocessing(pictures: Mapping[str, Any]) -> dict[str, Any]:
    """A ``preprocessor_config.json`` as OpenCLIP has it."""
    size = pictures.get("size")
    squash = isinstance(size, dict) and "shortest_edge" not in size and not pictures.get("do_center_crop")
    return {
        **{name: value for name in ("mean", "std") if (value := pictures.get(f"image_{name}"))},
        "resize_mode": "squash" if squash else "shortest",
        "interpolation": {"2": "bilinear", "3": "bicubic"}.get(str(pictures.get("resample", 3)), "another"),
    }


# ---------------------------------------------------------------------------- CLIPModel


def _as_openclip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CLIPModel's tensors by OpenCLIP's names."""
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        ours = name
        for theirs, mine in _RENAMED:
            ours = ours.replace(theirs, mine)
        found[ours] = value.movedim(0, -1) if ours in ("visual.proj", "text_projection") and value.dim() else value
    for name in [name for name in found if ".attn.q_proj." in name]:
        parts = [found.pop(name.replace(".q_proj.", f".{letter}_proj."), torch.empty(0)) for letter in "qkv"]
        if all(part.dim() and part.shape == parts[0].shape for part in parts):
            found[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    return found


def _settings(image: Mapping[str, Any], text: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return what CLIPModel's configuration means, as an OpenCLIP config has it (``model_cfg``).

    Raises CheckpointError.
    """
    vision, words = {**_USUAL, **image}, {**_USUAL, "hidden_size": 512, "num_attention_heads": 8, **text}
    names = {theirs: ours for ours, theirs in ACTIVATIONS.items()}
    activations = [names.get(str(tower["hidden_act"])) for tower in (vision, words)]
    sizes = (vision["hidden_size"], vision["num_attention_heads"], words["num_attention_heads"])
    if None in activations or activations.count("quick_gelu") == 1:
        raise CheckpointError(f"{folder}: its activations are {vision['hidden_act']} and {words['hidden_act']}")
    if not all(type(size) is int and 0 < size < MAX_SIZE for size in sizes):
        raise CheckpointError(f"{folder}: its {CONFIG} has no sizes (width and heads {sizes})")
    act = {"act_kwargs": {"approximate": "tanh"}}
    blocks = [
        {"norm_kwargs": {"eps": tower["layer_norm_eps"]}, **(act if kind == "gelu_tanh" else {})}
        for tower, kind in zip((vision, words), activations, strict=True)
    ]
    other = words.get("vocab_size", CLIP_VOCABULARY) != CLIP_VOCABULARY and (folder / "tokenizer.json").is_file()
    return {
        "quick_gelu": "quick_gelu" in activations,
        "vision_cfg": {
            "image_size": vision.get("image_size", 224),
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            **blocks[0],
        },
        "text_cfg": {
            "heads": words["num_attention_heads"],
            **({"hf_tokenizer_name": str(folder)} if other else {}),
            **blocks[1],
        },
    }


_USUAL: Mapping[str, Any] = {
    "hidden_size": 768,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
"""CLIPVisionConfig's own, of what a ``config.json`` may leave out."""


# ---------------------------------------------------------------------------- timm


def _read_timm(folder: Path, told: Mapping[str, Any]) -> ForeignCheckpoint:
    """A timm model as image tower alone, with the features that it feeds its classifier, which stays behind."""
    content, _ = read_tensor_file(weights_of(folder, CONFIG, WEIGHTS))
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    check_weights(tensors, folder)
    known = told.get("pretrained_cfg") or told
    classifier = known.get("classifier") if isinstance(known, dict) else None
    left = tuple(name for name in tensors if name.startswith(f"{classifier or 'head'}."))
    width = told.get("num_features")
    if type(width) is not int or not 0 < width**2 <= max(1 << 20, sum(x.numel() for x in tensors.values())):
        raise CheckpointError(f"{folder}: the width of its features (num_features: {width}) is not that of its tensors")
    state = {f"image.model.{name}": value for name, value in tensors.items() if name not in left}
    image = {"type": "timm", "model": f"local-dir:{folder.absolute()}"}
    pool = told.get("global_pool")
    if pool in ("token", "avg", "avgmax", "max", "map"):
        image["pooling"] = pool
    config = {
        "name": folder.name,
        "model": {"embed_dim": width, "image": image},
        "augmenters": {"image": {"type": "resize_crop", "size": 224}},
        "losses": {"koleo": {"type": "koleo"}},
    }
    return ForeignCheckpoint(state={**state, "image.projection": torch.eye(width)}, config=config, unexpected=left)
