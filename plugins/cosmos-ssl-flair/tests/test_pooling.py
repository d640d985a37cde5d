"""The pooling head against PyTorch's own multi-head attention with an empty token, and its scores against a loop."""

from __future__ import annotations

import math

import pytest
import torch
from cosmos_ssl_flair.pooling import FlairPool
from torch import Tensor, nn
from torch.nn import functional as F

from cosmos_ssl.api import Features, GroupFeatures, Spec, TowerSpec, Views, ViewSpec

IMAGES, PATCHES, TEXTS, WIDTH, D, HEADS = 3, 7, 11, 12, 16, 4


def spec(**changes: object) -> Spec:
    sizes = {"image": TowerSpec(width=WIDTH), "text": TowerSpec(width=20), "attention": "sdpa"}
    return Spec(
        embed_dim=D,
        image_views={"global": ViewSpec(views=1)},
        text_views={"global": ViewSpec(views=3)},
        **sizes | changes,
    )


@pytest.fixture
def head() -> FlairPool:
    torch.manual_seed(0)
    head = FlairPool(spec(), num_heads=HEADS).double()
    for norm in (head.norm_q, head.norm_k, head.norm_v):  # so that a norm in another's place is seen
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    nn.init.normal_(head.qkv.bias)
    nn.init.normal_(head.proj.bias)
    return head


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pooled(head: FlairPool, tokens: Tensor, text: Tensor) -> Tensor:
    """One image [P, W] pooled by one text [D], by torch.nn.MultiheadAttention."""
    reference = nn.MultiheadAttention(D, HEADS, batch_first=True, add_zero_attn=True).double()
    reference.in_proj_weight, reference.in_proj_bias = head.qkv.weight, head.qkv.bias
    reference.out_proj.weight, reference.out_proj.bias = head.proj.weight, head.proj.bias
    patches = head.image_tokens(tokens)[None]
    found: Tensor = reference(
        head.norm_q(text)[None, None], head.norm_k(patches), head.norm_v(patches), need_weights=False
    )[0]
    return found[0, 0]


def scores(head: FlairPool, tokens: Tensor, texts: Tensor) -> Tensor:
    """[B, P, W], [T, D] -> [B, T], a pair at a time."""
    rows = [
        torch.stack([F.cosine_similarity(pooled(head, image, text), text, dim=0) for text in texts]) for image in tokens
    ]
    return torch.stack(rows)


def gradients(head: FlairPool, value: Tensor, *inputs: Tensor) -> list[Tensor]:
    weights = draw(*value.shape, seed=9)
    return list(torch.autograd.grad((weights * value).sum(), (*inputs, *head.parameters())))


def inputs() -> tuple[Tensor, Tensor]:
    return draw(IMAGES, PATCHES, WIDTH).requires_grad_(), draw(TEXTS, D, seed=1).requires_grad_()


@pytest.mark.parametrize("chunk", [1, 4 * IMAGES * D, 1 << 24])
def test_scores_and_gradients_are_those_of_a_loop(head: FlairPool, chunk: int) -> None:
    head.chunk = chunk
    tokens, texts = inputs()
    ours, plain = head.respond(tokens, texts)["score"], scores(head, tokens, texts)
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-11)
    for a, b in zip(gradients(head, ours, tokens, texts), gradients(head, plain, tokens, texts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 2 * IMAGES * D, 1 << 24])
def test_each_image_may_be_asked_about_texts_of_its_own(head: FlairPool, chunk: int) -> None:
    head.chunk = chunk
    tokens, texts = inputs()
    asked = torch.tensor([[0, 3, 3, 10, 7], [1, 2, 3, 4, 5], [10, 9, 0, 0, 0]])
    ours, plain = head.respond(tokens, texts, asked)["score"], scores(head, tokens, texts).gather(1, asked)
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-11)
    for a, b in zip(gradients(head, ours, tokens, texts), gradients(head, plain, tokens, texts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 1 << 24])
def test_match_scores_a_picture_and_a_text(head: FlairPool, chunk: int) -> None:
    head.chunk = chunk
    tokens, texts = draw(IMAGES, PATCHES, WIDTH), draw(TEXTS, D, seed=1)
    features = Features(
        image={"global": GroupFeatures(views=(0,), tokens=tokens[None], token_views=(0,))},
        text={"global": GroupFeatures(views=(0,), projected=texts[None])},
    )
    with torch.no_grad():
        images = head.match_input(features, "image")
        assert images.shape == (IMAGES, PATCHES, D)
        assert torch.equal(head.match_input(features, "text"), texts)
        torch.testing.assert_close(head.match(images, texts), scores(head, tokens, texts), rtol=1e-9, atol=1e-11)
    assert head.matches and {need.kind for m in ("image", "text") for need in head.match_needs(m)} == {
        "tokens",
        "projected",
    }


def test_output_is_the_image_pooled_by_its_own_texts(head: FlairPool) -> None:
    tokens, texts = draw(IMAGES, PATCHES, WIDTH), draw(3, IMAGES, D, seed=1)
    features = Features(
        image={"global": GroupFeatures(views=(0,), tokens=tokens[None], token_views=(0,))},
        text={"global": GroupFeatures(views=(0, 1, 2), projected=texts)},
    )
    found = head(features, Views(keys=[""] * IMAGES), ("pooled",))
    assert found.keys() == head.outputs().keys() and head(features, Views(keys=[""] * IMAGES), ()) == {}
    plain = torch.stack(
        [torch.stack([pooled(head, image, text) for image, text in zip(tokens, view, strict=True)]) for view in texts]
    )
    torch.testing.assert_close(found["pooled"], plain, rtol=1e-9, atol=1e-11)


def test_a_text_may_turn_to_the_empty_token(head: FlairPool) -> None:
    """A text whose queries point away from every key finds zeros: the projection's bias alone."""
    with torch.no_grad():
        head.norm_q.weight.zero_()
        head.qkv.weight[: 2 * D] = 0
        head.qkv.bias[:D], head.qkv.bias[D : 2 * D] = 100, -100
    q, (k, v) = head._queries(draw(1, 1, D)), head._memory(draw(1, PATCHES, D))
    torch.testing.assert_close(head._pool(q, k, v)[0, 0], head.proj.bias)


@pytest.mark.parametrize("asking", ["all texts", "texts of its own"])
def test_pooled_features_do_not_outlive_their_chunk(asking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph over many texts holds on to is a few numbers a pair, far from D of them."""
    torch.manual_seed(0)
    head = FlairPool(spec(), num_heads=HEADS)
    tokens, texts = torch.randn(2, PATCHES, WIDTH), torch.randn(600, D)
    asked = None if asking == "all texts" else torch.randint(600, (2, 600))

    def held(chunk: int) -> int:
        """Elements kept for the backward pass, storages counted once."""
        head.chunk = chunk
        kept: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            head.respond(tokens, texts, asked)["score"].sum()
        return sum(kept.values())

    pairs = 2 * len(texts)
    assert held(1 << 24) > 2 * D * pairs
    assert held(32 * D) < 5 * D * len(texts) + 2 * pairs + 10 * D * D  # texts, weights and the texts asked about


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_float32_under_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head = FlairPool(spec(), num_heads=HEADS)
    tokens, texts = torch.randn(IMAGES, PATCHES, WIDTH), torch.randn(TEXTS, D)
    with torch.autocast("cpu", dtype=dtype):
        found = head.respond(tokens, texts)["score"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, head.respond(tokens, texts)["score"], rtol=0, atol=0.05)


def test_starts_as_pytorch_s_attention() -> None:
    head = FlairPool(spec(), num_heads=HEADS)
    bound = math.sqrt(6 / (D + 3 * D))
    assert 0.9 * bound < float(head.qkv.weight.detach().abs().max()) <= bound
    assert not head.qkv.bias.any() and not head.proj.bias.any()


@pytest.mark.parametrize(
    ("changes", "heads", "message"),
    [
        ({}, 3, "num_heads: "),
        ({}, 0, "num_heads: "),
        ({"image": None}, 4, "needs both"),
        ({"text": None}, 4, "needs both"),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, object], heads: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlairPool(spec(**changes), num_heads=heads)
