"""The settings of an OpenCLIP model as options of our towers and tokenizers, and those that none of ours has."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cosmos_ssl.api import TowerSpec
from cosmos_ssl.errors import CheckpointError, listed
from cosmos_ssl.interop.official import MAX_SIZE

log = logging.getLogger(__name__)

CONFIG = "open_clip_config.json"

_CLIP = TowerSpec(width=1)
"""Whose mean and deviation are meant where none are told."""
_TOP = (
    "embed_dim",
    "vision_cfg",
    "text_cfg",
    "custom_text",
    "init_logit_scale",
    "init_logit_bias",
    "nonscalar_logit_scale",
    "quick_gelu",
)
_READ = frozenset(
    ("width", "layers", "head_width", "heads", "mlp_ratio", "patch_size", "image_size", "context_length", "vocab_size")
)
_READ |= {"ls_init_value", "no_ln_pre", "final_ln_after_pool", "no_causal_mask", "proj_bias", "norm_kwargs"}
_READ |= {"act_kwargs", "timm_model_name", "timm_proj_bias", "hf_tokenizer_name", "tokenizer_kwargs", "eos_id"}
_READ |= {"hf_model_name"}
_VALUES: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "vision_cfg": {
        "pool_type": ("tok", "avg"),
        "pos_embed_type": ("learnable", "sin_cos_2d"),
        "block_type": ("default",),
        "timm_pool": ("token", "avg", "avgmax", "max", "map"),
        "timm_proj": ("linear", "mlp", "none"),
    },
    "text_cfg": {
        "pool_type": ("argmax", "eos", "first", "last"),
        "proj_type": ("linear", "none"),
        "hf_pooler_type": ("mean_pooler", "cls_last_hidden_state_pooler"),
        "hf_proj_type": ("mlp", "linear"),
        "block_type": ("default",),
    },
}
"""What settings may be, beside nothing."""
_IDLE = frozenset(
    (
        "patch_dropout",
        "attn_pooler_queries",
        "attn_pooler_heads",
        "output_tokens",
        "pad_id",
        "tokenizer_mode",
        "timm_model_pretrained",
        "timm_drop",
        "timm_drop_path",
    )
)
_IDLE |= {"hf_model_pretrained"}
"""Settings that act in training, or with others that are refused."""
_CLEAN = ("lower", "whitespace", "canonicalize")
_PICTURES: Mapping[str, Mapping[str, str]] = {
    "interpolation": {"bicubic": "bicubic", "bilinear": "bilinear"},
    "resize_mode": {"shortest": "crop", "squash": "squash"},
}


def image_options(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the model's own settings tell of an image tower: activation, norms, pooling, and its pictures."""
    model, pictures = told.get("model_cfg", {}), told.get("preprocess_cfg", {})
    if not told:
        return {}
    vision = model.get("vision_cfg", {})
    found = {name: pictures.get(name) or list(getattr(_CLIP, name)) for name in ("mean", "std")}
    for name, option in (("interpolation", "interpolation"), ("resize_mode", "resize")):
        found |= {option: _PICTURES[name][pictures[name]]} if pictures.get(name) in (*_PICTURES[name],) else {}
    if vision.get("timm_model_name"):
        return found
    mean = vision.get("pool_type") == "avg"
    late = {"norm_after_pool": bool(vision.get("final_ln_after_pool"))} if mean else {}
    return {**_block(model, vision), "pooling": "mean" if mean else "class", **late, **found}


def text_options(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the model's own settings tell of a text tower: activation, norms, mask and pooling."""
    model = told.get("model_cfg", {})
    words = model.get("text_cfg", {})
    if not model or words.get("hf_model_name"):
        return {}
    pooling = words["pool_type"] if words.get("pool_type") in ("first", "last") else "end"
    return {**_block(model, words), "causal": not words.get("no_causal_mask"), "pooling": pooling}


def tokenizer_options(told: Mapping[str, Any], source: str | Path) -> dict[str, Any]:
    """Return the type and options of the tokenizer, but for its length; one of Hugging Face lies in a folder that is
    local.
    """
    words = told.get("model_cfg", {}).get("text_cfg", {})
    name = words.get("hf_tokenizer_name")
    if not name:
        return {"type": "clip"}
    local = Path(source)
    there = (local / "tokenizer_config.json").is_file() or (local / "tokenizer.json").is_file()
    options = words.get("tokenizer_kwargs") or {}
    return {
        "type": "huggingface",
        "name": str(local) if there else name,
        "clean": options.get("clean", "whitespace"),
        **({"strip_sep": True} if options.get("strip_sep_token") else {}),
    }


KNOWN = (
    "activation",
    "norm_eps",
    "pooling",
    "norm_after_pool",
    "causal",
    "projection_bias",
    *("mean", "std", "resize", "interpolation"),
)
"""Options of our towers that OpenCLIP has."""


def settings(kind: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``image_options`` and ``text_options`` read, of a tower's ``kind`` other than CLIP's."""
    told: Mapping[str, Mapping[str, Any]] = {
        "activation": {"act_kwargs": {"approximate": "tanh"}} if kind.get("activation") == "gelu_tanh" else {},
        "norm_eps": {"norm_kwargs": {"eps": kind.get("norm_eps")}},
        "pooling": {"pool_type": {"mean": "avg"}.get(kind.get("pooling", ""), kind.get("pooling"))},
        "norm_after_pool": {"final_ln_after_pool": True},
        "causal": {"no_causal_mask": True},
        "projection_bias": {"proj_bias": True},
    }
    return {name: value for option in kind if option in told for name, value in told[option].items()}


def _block(model: Mapping[str, Any], tower: Mapping[str, Any]) -> dict[str, Any]:
    """Activation and norms of a tower's blocks."""
    tanh = (tower.get("act_kwargs") or {}).get("approximate") == "tanh"
    return {
        "activation": "quick_gelu" if model.get("quick_gelu") else "gelu_tanh" if tanh else "gelu",
        "norm_eps": (tower.get("norm_kwargs") or {}).get("eps", 1e-5),
    }


# ---------------------------------------------------------------------------- what cannot be


def check(told: Mapping[str, Any], source: object, partial: bool) -> None:
    """Raise CheckpointError for settings that our towers do not have; with ``partial`` they are logged instead."""
    bent = list(_bent(told))
    if bent:
        raise CheckpointError(f"{source}: its {CONFIG} cannot be used: {listed(bent, '; ')}")
    faults = list(_faults(told.get("model_cfg", {}), told.get("preprocess_cfg", {})))
    if not faults:
        return
    what = listed(faults, "; ", limit=6)
    if not partial:
        raise CheckpointError(f"{source} is a model of another kind than our towers: {what}")
    log.warning("%s is a model of another kind, and its weights are taken all the same: %s", source, what)


def _bent(told: Mapping[str, Any]) -> Iterator[str]:
    """What in an OpenCLIP config is no table, no number or no name where one must be."""
    model, pictures = told.get("model_cfg", {}), told.get("preprocess_cfg", {})
    towers = {key: model.get(key, {}) for key in ("vision_cfg", "text_cfg")} if isinstance(model, dict) else {}
    inner = {
        f"{key}.{name}": tower.get(name) or {}
        for key, tower in towers.items()
        if isinstance(tower, dict)
        for name in ("norm_kwargs", "act_kwargs", "tokenizer_kwargs")
    }
    tables = {"model_cfg": model, "preprocess_cfg": pictures, **towers, **inner}
    yield from (f"{key} is no table" for key, value in tables.items() if not isinstance(value, dict))
    if not all(isinstance(value, dict) for value in tables.values()):
        return
    for key, name in (("vision_cfg", "head_width"), ("text_cfg", "heads")):
        value = towers[key].get(name, 1)
        if type(value) is not int or not 0 < value < MAX_SIZE:
            yield f"{key}.{name}: {value}"
    names = (("vision_cfg", "timm_model_name"), ("text_cfg", "hf_tokenizer_name"), ("text_cfg", "hf_model_name"))
    for key, name in names:
        if not isinstance(towers[key].get(name) or "", str):
            yield f"{key}.{name}: {towers[key][name]}"
    for key in towers:
        eps = inner[f"{key}.norm_kwargs"].get("eps", 0.0)
        if not _is_share(eps):
            yield f"{key}.norm_kwargs.eps: {eps}"
    for name in ("mean", "std"):
        value = pictures.get(name, [0.5] * 3)
        if not isinstance(value, list | tuple) or len(value) != 3 or not all(map(_is_share, value)):
            yield f"preprocess_cfg.{name}: {value}"


def _is_share(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1  # type: ignore[operator]


def _faults(model: Mapping[str, Any], pictures: Mapping[str, Any]) -> Iterator[str]:
    """What an OpenCLIP config asks for that our towers do not do."""
    yield from (key for key, value in model.items() if key not in _TOP and value)
    for tower in ("vision_cfg", "text_cfg"):
        for key, value in model.get(tower, {}).items():
            known = value in _VALUES[tower][key] if key in _VALUES[tower] else key in _READ or key in _IDLE
            if value and not known:
                yield f"{tower}.{key}: {value}"
        yield from _odd_blocks(model, tower)
    vision, words = model.get("vision_cfg", {}), model.get("text_cfg", {})
    if isinstance(vision.get("layers"), list):
        yield f"vision_cfg.layers: {vision['layers']} (a ModifiedResNet)"
    for key in ("image_size", "patch_size"):
        if vision.get(key) is not None and side(vision[key]) is None:
            yield f"vision_cfg.{key}: {vision[key]}"
    if ":" in (vision.get("timm_model_name") or ""):
        yield f"vision_cfg.timm_model_name: {vision['timm_model_name']} (fetched by timm)"
    if words.get("hf_model_name") and not words.get("hf_tokenizer_name"):
        yield f"text_cfg.hf_model_name: {words['hf_model_name']} (without its hf_tokenizer_name)"
    if words.get("hf_model_name") and words.get("hf_pooler_type", "mean_pooler") is None:
        yield "text_cfg.hf_pooler_type: None"
    if words.get("pool_type") == "first" and not words.get("no_causal_mask"):
        yield "text_cfg.pool_type: first (of causal texts)"
    tokens = words.get("tokenizer_kwargs") or {}
    odd = {key: value for key, value in tokens.items() if key != "strip_sep_token" and (key, value) not in _cleaning()}
    if odd or (tokens and not words.get("hf_tokenizer_name")):
        yield f"text_cfg.tokenizer_kwargs: {odd or tokens}"
    for key, values in _PICTURES.items():
        if pictures.get(key) is not None and pictures[key] not in (*values,):
            yield f"preprocess_cfg.{key}: {pictures[key]}"


def _cleaning() -> tuple[tuple[str, str], ...]:
    return tuple(("clean", how) for how in _CLEAN)


def _odd_blocks(model: Mapping[str, Any], tower: str) -> Iterator[str]:
    """Norms and activations with other arguments than ours."""
    told = model.get(tower, {})
    if odd := [key for key in told.get("norm_kwargs") or {} if key != "eps"]:
        yield f"{tower}.norm_kwargs: {', '.join(map(str, odd))}"
    acts = told.get("act_kwargs") or {}
    if acts and (model.get("quick_gelu") or acts not in ({"approximate": "tanh"}, {"approximate": "none"})):
        yield f"{tower}.act_kwargs: {acts}"


def side(size: Any) -> int | None:
    """The side of a square; None for other sizes."""
    first, *others = size if isinstance(size, list | tuple) and size else [size]
    return first if type(first) is int and all(side == first for side in others) else None
