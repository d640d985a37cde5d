"""Hugging Face's text encoders as towers, offline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cosmos_ssl.api import GroupPlan, Spec, TextGroup, UserError
from cosmos_ssl_plugins.towers.huggingface import HuggingFaceText

SPEC = Spec(embed_dim=8, vocab_size=100, context_length=12)
CONFIG = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
LENGTHS = torch.tensor([[3, 4, 5], [9, 2, 4]])


def texts(seed: int = 0) -> TextGroup:
    ids = torch.randint(4, 100, (2, 3, 12), generator=torch.Generator().manual_seed(seed))
    return TextGroup(tokens=ids.masked_fill(torch.arange(12) >= LENGTHS[..., None], 0), lengths=LENGTHS)


def small(architecture: str = "bert", **options: Any) -> HuggingFaceText:
    torch.manual_seed(0)
    return HuggingFaceText(SPEC, architecture=architecture, config=CONFIG, **options).eval()


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_a_text_is_encoded_as_if_alone(architecture: str, pooling: str) -> None:
    tower = small(architecture, pooling=pooling)
    group = texts()
    features = tower({"global": group}, {"global": GroupPlan(views=(0, 1), tokens=(1,))})["global"]
    for view in range(2):
        for sample in range(3):
            length = int(LENGTHS[view, sample])
            alone = tower.model(input_ids=group.tokens[view, sample, :length][None]).last_hidden_state[0]
            pooled = alone[0] if pooling == "cls" else alone.mean(0)
            torch.testing.assert_close(features.pooled[view, sample], pooled, atol=1e-5, rtol=1e-4)
            if view == 1:
                torch.testing.assert_close(features.tokens[0, sample, :length], alone, atol=1e-5, rtol=1e-4)
                assert not features.tokens[0, sample, length:].any()
    torch.testing.assert_close(features.projected, features.pooled @ tower.projection)
    features.projected.square().sum().backward()
    assert [n for n, p in tower.named_parameters() if p.grad is None] == []


def test_masked_words() -> None:
    """The library's own model on the same embeddings; what a hidden word is changes nothing."""
    tower = small(mask_token=True)
    torch.nn.init.normal_(tower.mask_token)
    plain = texts()
    masks = (plain.tokens % 3 == 0) & (torch.arange(12) < LENGTHS[..., None])
    plan = {"global": GroupPlan(views=(0, 1), hide_masked=True, masked_tokens=True)}
    group = replace(plain, masks=masks)
    found = tower({"global": group}, plan)["global"]
    real = (torch.arange(12) < LENGTHS[..., None]).flatten(0, 1)
    words = tower.model.get_input_embeddings()(plain.tokens.flatten(0, 1))
    words = torch.where(masks.flatten(0, 1)[..., None], tower.mask_token, words)
    out = tower.model(inputs_embeds=words, attention_mask=real.long()).last_hidden_state
    torch.testing.assert_close(found.masked_tokens, out[masks.flatten(0, 1)], atol=1e-5, rtol=1e-4)
    other = tower({"global": replace(group, tokens=plain.tokens.where(~masks, 7))}, plan)["global"]
    assert torch.equal(other.pooled, found.pooled)
    assert tower.capabilities == {"tokens", "masks"} and small().capabilities == {"tokens"}


def test_pads_where_they_are_read() -> None:
    tower = small()
    features = tower({"global": texts()}, {"global": GroupPlan(views=(0,), tokens=(0,), pads=True, projected=False)})[
        "global"
    ]
    assert features.tokens.shape == (1, 3, 12, 32)
    assert features.tokens[0, 0, 3:].any()
    assert features.projected is None


def test_a_folder_gives_back_its_weights(tmp_path: Path) -> None:
    tower = small()
    tower.model.save_pretrained(tmp_path)
    group, plan = {"global": texts()}, {"global": GroupPlan(views=(0,))}
    again = HuggingFaceText(SPEC, model=str(tmp_path), pretrained=True).eval()
    torch.testing.assert_close(again(group, plan)["global"].pooled, tower(group, plan)["global"].pooled)
    fresh = HuggingFaceText(SPEC, model=str(tmp_path), config={"num_hidden_layers": 1}).eval()
    assert fresh.layer_count == 2
    assert not torch.equal(fresh(group, plan)["global"].pooled, tower(group, plan)["global"].pooled)


def test_depths_and_unread() -> None:
    tower = small()
    assert {tower.layer_of(n) for n, _ in tower.named_parameters()} == {0, 1, 2, 3}
    assert tower.layer_of("model.embeddings.LayerNorm.weight") == 0
    assert tower.layer_of("projection") == tower.layer_count == 3
    assert tower.unread({"global": GroupPlan(views=(0,), projected=False)}) == ("projection*",)


def test_gradient_checkpointing_gives_equal_gradients() -> None:
    grads = []
    for on in (False, True):
        tower = small(grad_checkpointing=on).train()
        for module in tower.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        tower({"global": texts()}, {"global": GroupPlan(views=(0, 1))})["global"].projected.square().sum().backward()
        grads.append(tower.model.embeddings.word_embeddings.weight.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either model"),
        ({"model": "a", "architecture": "bert"}, "give either model"),
        ({"architecture": "bert", "pretrained": True}, "pretrained: needs a model"),
        ({"architecture": "bert", "pooling": "max"}, "pooling: 'max' is neither"),
        ({"architecture": "brt"}, "architecture: transformers has no 'brt'. Did you mean 'bert'?"),
        (
            {"architecture": "bert", "config": {"hiden_size": 32}},
            "config: bert has no 'hiden_size'. Did you mean 'hidden_size'?",
        ),
        ({"architecture": "t5"}, "t5 is an encoder with a decoder"),
        (
            {"architecture": "bert", "config": CONFIG | {"vocab_size": 50}},
            "the tokenizer has 100 ids, the text encoder 50",
        ),
        (
            {"architecture": "roberta", "config": CONFIG | {"max_position_embeddings": 13}},
            "12 is more than the text encoder's 11",
        ),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HuggingFaceText(SPEC, **options)


def test_an_unreachable_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^model: the configuration of '.*nowhere' cannot be loaded: [^\n]*$"):
        HuggingFaceText(SPEC, model=str(tmp_path / "nowhere"), pretrained=True)
