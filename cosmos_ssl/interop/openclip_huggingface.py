"""The text tower of an OpenCLIP model that is one of Hugging Face's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cosmos_ssl.errors import CheckpointError
from cosmos_ssl.interop.files import check_weights

_MODEL, _HEAD = "transformer.", "proj."
_IDLE = ("embeddings.position_ids", "embeddings.token_type_ids")
"""Buffers of older versions of transformers."""
_CONTEXT = 77
"""OpenCLIP's own where none is told."""


def take(tensors: Mapping[str, Tensor], source: object) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The text tower's tensors by our names, and all others. The projection is a linear map, or two with GELU between
    them; the identity where there is none.

    Raises CheckpointError where there is no such tower.
    """
    found = {name: value for name, value in tensors.items() if name.startswith((_MODEL, _HEAD))}
    others = {name: value for name, value in tensors.items() if name not in found}
    # a pooler comes with some, and the poolings that we have do not read it
    model = {
        f"text.model.{name.removeprefix(_MODEL)}": value
        for name, value in found.items()
        if name.startswith(_MODEL) and not name.endswith(_IDLE) and not name.startswith(f"{_MODEL}pooler.")
    }
    words = model.get("text.model.embeddings.word_embeddings.weight")
    if words is None or words.dim() != 2:
        raise CheckpointError(f"{source} has no text tower that reads words as BERT does: no {_MODEL}embeddings.word_*")
    hidden, last = found.get(f"{_HEAD}0.weight"), found.get(f"{_HEAD}2.weight", found.get(f"{_HEAD}weight"))
    check_weights({name: value for name, value in found.items() if not name.endswith(_IDLE)}, source)
    if any(value is not None and value.dim() != 2 for value in (hidden, last)):
        raise CheckpointError(f"{source}: the projection of its text tower is no matrix")
    model["text.projection"] = torch.eye(words.shape[1]) if last is None else last.t().contiguous()
    if hidden is not None:
        model["text.projection_hidden.weight"] = hidden
    return model, others


def tower(state: Mapping[str, Tensor], words: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The section of a config for the tower with these tensors, by OpenCLIP's ``text_cfg``; and tokens of a text."""
    hidden = state.get("text.projection_hidden.weight")
    tower = {
        "type": "huggingface",
        "model": words["hf_model_name"],
        "pooling": "mean" if words.get("hf_pooler_type", "mean_pooler") == "mean_pooler" else "cls",
        **({} if hidden is None else {"projection_hidden": len(hidden)}),
    }
    return tower, words.get("context_length", _CONTEXT)
