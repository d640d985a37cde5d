"""CLIP's byte-pair tokenizer, from the vocabulary file that ships in open_clip_torch."""

from __future__ import annotations

import gzip
import html
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cosmos_ssl.api import Spec, Tokenizer, UserError

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
MERGES = 48_894
"""Merge rules that CLIP uses of the file: 2 x 256 bytes, these, start and end make 49,408 tokens."""

KNOWN_WORDS = 1 << 16
"""Words whose ids are remembered; past this number all are forgotten."""

START, END = "<start_of_text>", "<end_of_text>"


class ClipTokenizer(Tokenizer):
    """Lower-cased byte pairs between a start and an end token, cut and padded to ``context_length``.

    The ids are those of OpenCLIP's tokenizer. A text that is too long keeps its end token, as in CLIP.
    Raises UserError where open_clip_torch, which holds the vocabulary, is not installed.
    """

    pad_id = 0

    def __init__(self, spec: Spec, *, context_length: int = 77) -> None:
        if context_length < 3:
            raise ValueError(f"context_length: {context_length} leaves no room between the start and the end token")
        self.context_length = context_length
        self.vocab_size = len(_byte_pairs().vocabulary)  # also reads the file here, before workers start

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ids int64 [n, S] and lengths int64 [n] up to and with the end token."""
        pairs = _byte_pairs()
        ids = np.zeros((len(texts), self.context_length), dtype=np.int64)
        lengths = np.zeros(len(texts), dtype=np.int64)
        for row, text in enumerate(texts):
            tokens = [pairs.start, *pairs.encode(text)[: self.context_length - 2], pairs.end]
            ids[row, : len(tokens)] = tokens
            lengths[row] = tokens.index(pairs.end) + 1  # a text that spells the end token ends there
        return torch.from_numpy(ids), torch.from_numpy(lengths)

    def lengths(self, ids: Tensor) -> Tensor:
        """The end token has the largest id: this holds whatever another tokenizer of this vocabulary pads with."""
        return ids.argmax(-1) + 1

    def decode(self, ids: Sequence[int]) -> list[str]:
        """The piece of text behind each id; bytes that are no character by themselves become U+FFFD."""
        pairs = _byte_pairs()
        return [pairs.piece(int(number)) for number in ids]


@cache
def _byte_pairs() -> _BytePairs:
    """The one table of this process (tokenizers stay small, so that they can be sent to workers)."""
    return _BytePairs()


class _BytePairs:
    def __init__(self) -> None:
        import regex

        self._letters = _byte_letters()
        self._bytes = {letter: byte for byte, letter in self._letters.items()}
        merges = _read_merges()
        ends = [letter + "</w>" for letter in self._bytes]
        self.vocabulary = [*self._bytes, *ends, *map("".join, merges), START, END]
        self._ids = {token: number for number, token in enumerate(self.vocabulary)}
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._words: dict[str, list[int]] = {}
        self._parts = regex.compile(
            rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+", regex.IGNORECASE
        )
        self.start, self.end = self._ids[START], self._ids[END]

    def encode(self, text: str) -> list[int]:
        """The ids of a text of any length, without start and end."""
        ids: list[int] = []
        for word in _clean(text).lower().split():
            known = self._words.get(word)
            ids += self._encode_word(word) if known is None else known
        return ids

    def piece(self, number: int) -> str:
        token = self.vocabulary[number]
        if token in (START, END):
            return token
        return bytes(self._bytes[letter] for letter in token.removesuffix("</w>")).decode(errors="replace")

    def _encode_word(self, word: str) -> list[int]:
        """The ids of what stands between two spaces: its neighbours never change them."""
        ids: list[int] = []
        for part in self._parts.findall(word):
            symbols = [part] if part in (START, END) else self._merge([self._letters[byte] for byte in part.encode()])
            ids += [self._ids[symbol] for symbol in symbols]
        if len(self._words) >= KNOWN_WORDS:
            self._words.clear()
        self._words[word] = ids
        return ids

    def _merge(self, letters: Sequence[str]) -> list[str]:
        """Join the pair of lowest rank, wherever it stands, until no pair has one (Sennrich et al., arXiv
        1508.07909).
        """
        word = [*letters[:-1], letters[-1] + "</w>"]
        while len(word) > 1:
            pair = min(pairwise(word), key=lambda pair: self._ranks.get(pair, MERGES))
            if pair not in self._ranks:
                break
            joined: list[str] = []
            at = 0
            while at < len(word):
                step = 2 if tuple(word[at : at + 2]) == pair else 1
                joined.append("".join(word[at : at + step]))
                at += step
            word = joined
        return word


def _clean(text: str) -> str:
    """Mend encodings and HTML entities; plain text, most of all there is, needs no look."""
    if text.isascii() and text.isprintable() and "&" not in text:
        return text
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text)))


def _byte_letters() -> dict[int, str]:
    """A visible letter for each byte, in the order of the vocabulary: visible bytes as they are, others from
    U+0100 on.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def _read_merges() -> list[tuple[str, str]]:
    package = find_spec("open_clip")  # found, not imported: that takes seconds
    path = Path(package.origin).with_name(VOCABULARY) if package is not None and package.origin else None
    if path is None or not path.is_file():
        raise UserError(f"tokenizer clip: {path or 'open_clip'} is not there. Run: pip install open_clip_torch")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [line.split() for line in islice(lines, 1, MERGES + 1)]
    return [(first, second) for first, second in rows]
