"""Attention by words, and classes of patches, against plain arithmetic on what the encoder gives."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cosmos_ssl.api import Spec, Tokenizer, TowerSpec, UserError, normalise
from cosmos_ssl.evaluation.attention_maps import attention_maps, has_attention, patch_scores
from cosmos_ssl.models.encoder import ModelEncoder
from cosmos_ssl.models.model import Model
from cosmos_ssl_plugins.heads.cross_attention import CrossAttention
from cosmos_ssl_plugins.tokenizers.clip import ClipTokenizer
from cosmos_ssl_plugins.towers.clip_text import ClipText
from cosmos_ssl_plugins.towers.clip_vit import ClipViT


def make(*, heads: bool = True, tokenizer: Tokenizer | None = None) -> ModelEncoder:
    torch.manual_seed(0)
    tokenizer = tokenizer or ClipTokenizer(Spec(embed_dim=16), context_length=12)
    spec = Spec(
        embed_dim=16,
        context_length=12,
        vocab_size=tokenizer.vocab_size,
        image=TowerSpec(width=24, image_size=32, patch_size=8),
        text=TowerSpec(width=16),
    )
    towers = {
        "image": ClipViT(spec, width=24, layers=2, heads=2, patch_size=8, image_size=32),
        "text": ClipText(spec, width=16, heads=2),
    }
    return ModelEncoder(
        Model(towers, {"cross": CrossAttention(spec, num_heads=4)} if heads else {}, {}, 16), spec, tokenizer
    )


@pytest.fixture(scope="module")
def encoder() -> ModelEncoder:
    return make()


def scaled(weights: Sequence[float]) -> list[float]:
    low, high = min(weights), max(weights)
    return [(weight - low) / (high - low) for weight in weights]


def test_words_sum_over_their_tokens(encoder: ModelEncoder) -> None:
    pixels = torch.randn(2, 3, 32, 32)
    texts = ["Isn't it  ephemerality, red?", "a (cat)"]
    found = attention_maps(encoder, pixels, texts)
    assert found is not None
    assert [[word for word, _ in one.words] for one in found] == [
        ["Isn't", "it", "ephemerality", ",", "red", "?"],
        ["a", "(", "cat", ")"],
    ]
    weights = encoder.cross_attention(pixels, encoder.tokenize(texts))
    assert weights is not None
    # tokens: start, isn 't, it, ephe mer ality, ",", red, ?, end
    row = weights["image"][0].tolist()
    sizes, at, sums = [2, 1, 3, 1, 1, 1], 1, []
    for size in sizes:
        sums.append(sum(row[at : at + size]))
        at += size
    assert encoder.lengths(encoder.tokenize(texts))[0] == at + 1
    assert [weight for _, weight in found[0].words] == pytest.approx(scaled(sums), abs=1e-5)
    expected = scaled(weights["text"][1].tolist())
    assert found[1].patches.shape == (4, 4) and found[1].patches.flatten().tolist() == pytest.approx(expected, abs=1e-5)


def test_words_of_odd_texts(encoder: ModelEncoder) -> None:
    texts = ["", "one two three four five six seven eight nine ten eleven", "日本 ok", "x <end_of_text> y", "🙂..."]
    found = attention_maps(encoder, torch.randn(5, 3, 32, 32), texts)
    assert found is not None
    words = [[word for word, _ in one.words] for one in found]
    # the text that is too long keeps 10 tokens between start and end; the end token spelt out ends a text
    assert words == [[], texts[1].split()[:10], ["日本", "ok"], ["x"], ["🙂..."]]


def test_a_tokenizer_whose_tokens_cross_words() -> None:
    class Pairs(Tokenizer):
        """Two letters a token, spaces too: no word has the tokens alone that it has in a text."""

        vocab_size, context_length, pad_id = 128 * 128, 12, 0

        def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
            rows = [
                [1, *(ord(t[i]) * 128 + ord(t[i + 1 : i + 2] or " ") for i in range(0, len(t), 2)), 2] for t in texts
            ]
            ids = torch.zeros(len(rows), 12, dtype=torch.int64)
            for n, row in enumerate(rows):
                ids[n, : len(row)] = torch.tensor(row)
            return ids, torch.tensor([len(row) for row in rows])

        def decode(self, ids: Sequence[int]) -> list[str]:
            return [chr(i // 128) + chr(i % 128) for i in ids]

    found = attention_maps(make(tokenizer=Pairs()), torch.randn(1, 3, 32, 32), ["ab cde"])
    assert found is not None
    assert [word for word, _ in found[0].words] == ["ab", " c", "de"]


def test_models_without_such_a_head(encoder: ModelEncoder) -> None:
    plain = make(heads=False)
    assert has_attention(encoder) and not has_attention(plain)
    assert attention_maps(plain, torch.randn(1, 3, 32, 32), ["a"]) is None


@pytest.mark.parametrize("csa", [True, False])
def test_patch_scores_are_cosines(encoder: ModelEncoder, csa: bool) -> None:
    pixels, classes = torch.randn(2, 3, 16, 32), normalise(torch.randn(3, 16))
    scores = patch_scores(encoder, pixels, classes, csa=csa)
    assert scores.shape == (2, 3, 2, 4)
    tokens, _ = encoder.dense(pixels, csa=csa)
    one = torch.nn.functional.cosine_similarity(tokens[1, 1 * 4 + 2], classes[0], dim=0)  # row 1, column 2
    torch.testing.assert_close(scores[1, 0, 1, 2], one)


def test_towers_without_a_dense_mode() -> None:
    encoder = make()
    encoder.model.towers["image"].capabilities = frozenset()
    with pytest.raises(UserError, match="no dense inference"):
        patch_scores(encoder, torch.randn(1, 3, 32, 32), torch.randn(2, 16))
