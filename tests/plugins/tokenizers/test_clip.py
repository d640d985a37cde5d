"""CLIP's tokenizer against OpenCLIP's."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cosmos_ssl.api import Spec, UserError
from cosmos_ssl_plugins.tokenizers import clip
from cosmos_ssl_plugins.tokenizers.clip import ClipTokenizer

SPEC = Spec(embed_dim=8)
TEXTS = [
    "",
    "a photo of a cat",
    "Don't STOP!!  it's 12345 o'clock\n\tnew I'LL we'Re they'VE",
    "naïve café — “quotes” &amp;amp; <b>x</b> &lt;tag&gt; &nbsp;&copy; A&B",
    "日本語のテキスト 🎉👨‍👩‍👧 ＬＯＵＤ　ＮＯＩＳＥＳ",
    "âœ” No problems",
    "<start_of_text> hi <END_OF_TEXT> <|endoftext|>",
    "x" * 300,
    "word " * 100,
    "ﬂubberiﬁc İstanbul <ſtart_of_text> ẞ ٣٤ ½ ²",
    "\x1b[31mred\x1b[0m a\x00b \u1680x\x85y\x1cz a\u00a0b\u2003c\u200bd",
    "…... ,,,;;-- \ud83d lone",
]


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    return ClipTokenizer(SPEC)


def test_ids_equal_openclips(tokenizer: ClipTokenizer) -> None:
    """Hand-picked texts, and 1,500 of random letters of many alphabets."""
    from open_clip.tokenizer import SimpleTokenizer

    source = random.Random(0)
    blocks = [
        range(0x250),
        range(0x300, 0x330),
        range(0x390, 0x420),
        range(0x2000, 0x2070),
        range(0x4E00, 0x4E40),
        range(0x1F600, 0x1F640),
    ]
    rare, usual = [chr(code) for block in blocks for code in block], "abcdefghij klmnop '<>&;."
    words = [
        "".join(source.choice(rare if source.random() < 0.4 else usual) for _ in range(source.randrange(60)))
        for _ in range(1500)
    ]
    expected = SimpleTokenizer()(TEXTS + words)
    for _ in range(2):  # the second time from memory
        ids, lengths = tokenizer(TEXTS + words)
        assert torch.equal(ids, expected)
    assert torch.equal(lengths, expected.argmax(1) + 1)  # towers find the end as the largest id


def test_vocabulary_is_clips(tokenizer: ClipTokenizer) -> None:
    assert (tokenizer.vocab_size, tokenizer.context_length, tokenizer.pad_id) == (49408, 77, 0)
    ids, lengths = tokenizer(["a photo of a cat"])
    assert ids[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0] and lengths.tolist() == [7]


def test_a_cut_text_keeps_its_end() -> None:
    ids, lengths = ClipTokenizer(SPEC, context_length=5)(["one two three four five", "one"])
    assert ids[0, 0] == 49406 and ids[0, -1] == 49407 and lengths.tolist() == [5, 3]
    assert ids[1, 3:].tolist() == [0, 0]


def test_no_texts(tokenizer: ClipTokenizer) -> None:
    ids, lengths = tokenizer([])
    assert ids.shape == (0, 77) and lengths.shape == (0,)


def test_decode_shows_the_pieces(tokenizer: ClipTokenizer) -> None:
    ids, lengths = tokenizer(["A dog, café Rex 🎉"])
    assert tokenizer.decode(ids[0, : int(lengths)].tolist()) == [
        "<start_of_text>",
        "a",
        "dog",
        ",",
        "café",
        "rex",
        "🎉",
        "<end_of_text>",
    ]


def test_tokenizers_travel_to_workers_small(tokenizer: ClipTokenizer) -> None:
    sent = pickle.dumps(tokenizer)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent)(TEXTS)[0], tokenizer(TEXTS)[0])


def test_memory_of_words_is_bounded(tokenizer: ClipTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip, "KNOWN_WORDS", 10)
    words = [f"w{i}" for i in range(50)]
    first = tokenizer(words)[0]
    assert torch.equal(tokenizer(words)[0], first)
    assert len(clip._byte_pairs()._words) <= 10


def test_open_clip_itself_is_not_imported() -> None:
    """It takes seconds: timm and torchvision come with it."""
    code = """
import sys
from cosmos_ssl.api import Spec
from cosmos_ssl_plugins.tokenizers.clip import ClipTokenizer
ClipTokenizer(Spec(embed_dim=8))(["plain text"])
print(sorted({"open_clip", "timm", "torchvision", "transformers", "ftfy"} & set(sys.modules)))
"""
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_missing_vocabulary_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(clip, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^tokenizer clip: open_clip is not there\. Run: pip install open_clip_torch$"):
        clip._read_merges()


def test_too_short_a_context_is_refused() -> None:
    with pytest.raises(ValueError, match="context_length: 2"):
        ClipTokenizer(SPEC, context_length=2)
