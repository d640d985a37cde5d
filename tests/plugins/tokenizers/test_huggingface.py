"""Hugging Face tokenizers from small folders that the tests write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cosmos_ssl.api import Spec, UserError
from cosmos_ssl_plugins.tokenizers.huggingface import HuggingFaceTokenizer

SPEC = Spec(embed_dim=8)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "photo", "of", "cat", "##s", "dog", "[MASK]"]


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A BERT-like tokenizer of eleven word pieces."""
    from transformers import BertTokenizerFast

    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    folder = tmp_path / "bert"
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(folder)
    return folder


def plain(folder: Path, **special: str) -> str:
    """A tokenizer of whole words without start and end tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"[UNK]": 0, "<end>": 1, "a": 2, "cat": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", **special).save_pretrained(folder)
    return str(folder)


def test_ids_lengths_and_pads(bert: Path) -> None:
    tokenizer = HuggingFaceTokenizer(SPEC, name=str(bert), context_length=6)
    ids, lengths = tokenizer(["a photo of cats", "A dog", "a a a a a a a a"])
    assert ids.dtype == lengths.dtype == torch.int64
    assert ids.tolist() == [
        [2, 4, 5, 6, 7, 3],
        [2, 4, 9, 3, 0, 0],
        [2, 4, 4, 4, 4, 3],
    ]  # the first one is cut, its end kept
    assert lengths.tolist() == [6, 4, 6]
    assert (tokenizer.vocab_size, tokenizer.context_length, tokenizer.pad_id) == (11, 6, 0)
    assert tokenizer.decode([4, 9, 3]) == ["a", "dog", "[SEP]"]


def test_an_end_token_serves_for_pads(tmp_path: Path) -> None:
    """As GPT's has none; the lengths tell where the text ends."""
    tokenizer = HuggingFaceTokenizer(SPEC, name=plain(tmp_path, eos_token="<end>"), context_length=4)
    ids, lengths = tokenizer(["a cat", ""])
    assert ids.tolist() == [[2, 3, 1, 1], [1, 1, 1, 1]] and lengths.tolist() == [2, 1]


def test_nothing_to_pad_with_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a padding nor an end token"):
        HuggingFaceTokenizer(SPEC, name=plain(tmp_path))


def test_what_cannot_be_loaded_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unreachable hub (transformers' own error is raised here, no request made), and a folder without files."""
    import transformers

    def unreachable(name: str, **options: object) -> None:
        assert options == {"trust_remote_code": False}
        raise OSError("We couldn't connect to the hub to load the files.\nCheck your internet connection.")

    with pytest.raises(UserError) as empty:
        HuggingFaceTokenizer(SPEC, name=str(tmp_path))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(UserError) as offline:
        HuggingFaceTokenizer(SPEC, name="nobody/nothing")
    for error in (empty, offline):
        assert "\n" not in str(error.value) and "cannot be loaded" in str(error.value)
    assert "couldn't connect" in str(offline.value)


def test_too_short_a_context_is_refused() -> None:
    with pytest.raises(ValueError, match="context_length: 2"):
        HuggingFaceTokenizer(SPEC, name="any", context_length=2)
