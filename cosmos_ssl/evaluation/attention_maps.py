"""Where the cross-attention heads look: over the patches of a picture, and over the words of its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from cosmos_ssl.models.encoder import ModelEncoder


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMap:
    """Weights of one picture and its text, averaged over heads, each map scaled to 0..1."""

    patches: Tensor
    """[rows, columns]: where the text looks in the picture."""
    words: Sequence[tuple[str, float]]
    """What the picture looks at in the text: pieces of it between the start and the end token."""


def attention_maps(encoder: ModelEncoder, pixels: Tensor, texts: Sequence[str]) -> list[AttentionMap] | None:
    """One map for each picture [B, 3, H, W] (normalised) and its text; None where the model has no such head."""
    tokens = encoder.tokenize(texts)
    weights = encoder.cross_attention(pixels, tokens)
    if weights is None:
        return None
    assert encoder.spec.image is not None
    assert encoder.tokenizer is not None
    rows, columns = (side // encoder.spec.image.patch_size for side in pixels.shape[-2:])
    patches = weights["text"].cpu().unflatten(1, (rows, columns))
    words = weights["image"].cpu()
    maps = []
    for ids, length, over_patches, over_words in zip(tokens, encoder.lengths(tokens).tolist(), patches, words, strict=True):
        inner = slice(1, length - 1)
        pieces = encoder.tokenizer.decode(ids[inner].tolist())
        maps.append(AttentionMap(patches=scaled(over_patches), words=list(zip(pieces, scaled(over_words[inner]).tolist(), strict=True))))
    return maps


def scaled(weights: Tensor) -> Tensor:
    """Shifted and scaled so that the least is 0 and the greatest 1; all zeros where they are equal."""
    if not weights.numel():
        return weights
    low, high = weights.aminmax()
    return (weights - low) / (high - low).clamp_min(1e-12)
