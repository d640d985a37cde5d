"""Small models with CLIP's towers, no tensor of which is at its start value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cosmos_ssl.build import Builder
from cosmos_ssl.config import load_config
from cosmos_ssl.models.encoder import ModelEncoder

CONFIG: dict[str, Any] = {
    "name": "small",
    "model": {
        "embed_dim": 24,
        "image": {"type": "clip_vit", "width": 48, "layers": 2, "heads": 3, "patch_size": 8, "image_size": 32},
        "text": {"type": "clip_text", "width": 32, "layers": 2, "heads": 2},
    },
    "tokenizer": {"type": "clip", "context_length": 16},
    "augmenters": {
        "image": {"type": "multi_crop", "global_crops_size": 32, "local_crops_size": 16},
        "text": {"type": "text_crop"},
    },
    "losses": {"clip": {"type": "clip"}},
}

Make = Callable[..., ModelEncoder]


@pytest.fixture
def make() -> Make:
    """``make("model.image.heads=6", ...)``: a model in evaluation mode, with the overrides given."""

    def make(*overrides: str) -> ModelEncoder:
        assembly = Builder(load_config(CONFIG, overrides)).assemble("measure")
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in assembly.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        assembly.model.requires_grad_(False).eval()
        return ModelEncoder(assembly.model, assembly.spec, assembly.tokenizer)

    return make


@pytest.fixture
def pixels() -> Callable[[ModelEncoder], torch.Tensor]:
    """Three random pictures of a model's size."""
    return lambda encoder: torch.randn(
        3, 3, *[encoder.spec.image.image_size] * 2, generator=torch.Generator().manual_seed(2)
    )


@pytest.fixture
def words() -> Callable[[ModelEncoder], torch.Tensor]:
    """Token ids: of texts short, empty and too long; random ones, each ended by the largest, where the vocabulary is
    not CLIP's.
    """

    def words(encoder: ModelEncoder) -> torch.Tensor:
        rows = encoder.model.text.token_embedding.num_embeddings
        if rows >= encoder.tokenizer.vocab_size:
            return encoder.tokenize(["a red circle", "", "many words " * 60, "it's a blue star!"])
        ids = torch.randint(1, rows - 1, (4, encoder.spec.context_length), generator=torch.Generator().manual_seed(3))
        ids[torch.arange(4), torch.tensor([3, 5, 9, 15])] = rows - 1
        return ids

    return words


@pytest.fixture
def write_tokenizer() -> Callable[[Path], None]:
    """Write into a folder: words by white space between a start and an end, pads last, as XLM-V has them."""

    def write(folder: Path) -> None:
        special = ["<s>", "<pad>", "</s>", "<unk>"]
        words = [*special, "a", "red", "heart", "two", "blue", "stars"]
        tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            **dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), special, strict=True)),
            sep_token="</s>",
        ).save_pretrained(folder)

    return write
