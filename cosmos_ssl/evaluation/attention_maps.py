"""What words and patches say of one another: where the cross-attention heads look, and which class each patch is
nearest to.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cosmos_ssl.api import Tokenizer, normalise
from cosmos_ssl.models.encoder import ModelEncoder

_PUNCTUATION = re.compile(r"^(\W*)(.*?)(\W*)$", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMap:
    """Weights of one picture and its text, averaged over heads, each map scaled to 0..1."""

    patches: Tensor
    """[rows, columns]: where the text looks in the picture."""
    words: Sequence[tuple[str, float]]
    """What the picture looks at in the text: its words between the start and the end token, pads left out.

    A word's weight is the sum over its tokens. Where a text cannot be cut into words as the tokenizer cuts it, these
    are the pieces behind its tokens.
    """


def has_attention(encoder: ModelEncoder) -> bool:
    """Return whether a head of the model can say where it looks."""
    return encoder.attending is not None


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
    for text, ids, length, over_patches, over_words in zip(
        texts, tokens, encoder.lengths(tokens).tolist(), patches, words, strict=True
    ):
        inner = slice(1, length - 1)
        found = _words(encoder.tokenizer, text, ids[inner].tolist())
        sums = (
            torch.stack([part.sum() for part in over_words[inner].split([size for _, size in found])])
            if found
            else torch.empty(0)
        )
        named = zip((word for word, _ in found), scaled(sums).tolist(), strict=True)
        maps.append(AttentionMap(patches=scaled(over_patches), words=list(named)))
    return maps


def scaled(weights: Tensor) -> Tensor:
    """Shifted and scaled so that the least is 0 and the greatest 1; all zeros where they are equal."""
    if not weights.numel():
        return weights
    low, high = weights.aminmax()
    return (weights - low) / (high - low).clamp_min(1e-12)


def patch_scores(encoder: ModelEncoder, pixels: Tensor, classes: Tensor, *, csa: bool = True) -> Tensor:
    """Cosine of each patch of pictures [B, 3, H, W] with class vectors [C, D]: [B, C, rows, columns].

    Training-free segmentation after SCLIP (arXiv 2312.01597), the whole picture in one window. Raises UserError where
    the tower has no dense mode.
    """
    assert encoder.spec.image is not None
    tokens, _ = encoder.dense(pixels, csa=csa)
    rows, columns = (side // encoder.spec.image.patch_size for side in pixels.shape[-2:])
    scores: Tensor = (normalise(tokens) @ classes.T).transpose(1, 2).unflatten(2, (rows, columns))
    return scores


def _words(tokenizer: Tokenizer, text: str, ids: Sequence[int]) -> list[tuple[str, int]]:
    """The words of a text with the number of tokens of each, which add up to ``ids``; or else the piece behind each
    token.

    A word's tokens are those that it has alone. Punctuation around a word stands by itself where that changes no token.
    """
    found: list[tuple[str, int]] = []
    said: list[int] = []
    for word, own in _alone(tokenizer, text.split()):
        parts = _alone(tokenizer, [part for match in _PUNCTUATION.findall(word) for part in match if part])
        split = [number for _, numbers in parts for number in numbers] == own
        for part, numbers in parts if split else [(word, own)]:
            size = min(len(numbers), len(ids) - len(said))
            if size:
                found.append((part, size))
                said += numbers[:size]
    return found if said == list(ids) else [(piece, 1) for piece in tokenizer.decode(ids)]


def _alone(tokenizer: Tokenizer, texts: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Texts, each with its tokens between start and end."""
    if not texts:
        return []
    rows = zip(texts, *(x.tolist() for x in tokenizer(texts)), strict=True)
    return [(text, ids[1 : length - 1]) for text, ids, length in rows]
