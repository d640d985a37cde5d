"""Tokenizers of Hugging Face, by name or from a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from cosmos_ssl.api import Location, Spec, Tokenizer, UserError


class HuggingFaceTokenizer(Tokenizer):
    """The tokenizer ``name`` (of the hub, or a folder with its files), cut and padded to ``context_length``.

    Lengths count what the attention mask counts, special tokens included. Code that comes with a tokenizer is
    never run.

    ``clean``: what OpenCLIP does with a text first: mend encodings, HTML and white space, then make it lower-case, or
    take its punctuation away as well (SigLIP); None is nothing.
    ``strip_sep``: the separator's id becomes 0, as in CLIPA.

    Raises UserError where it cannot be loaded or has nothing to pad with.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        name: Location,
        context_length: int = 77,
        clean: Literal["whitespace", "lower", "canonicalize"] | None = None,
        strip_sep: bool = False,
    ) -> None:
        if context_length < 3:
            raise ValueError(f"context_length: {context_length} leaves no room between the special tokens")
        self.context_length = context_length
        self.library = _load(name)
        self._clean = None if clean is None else _cleaning(clean)
        self._stripped = self.library.sep_token_id if strip_sep else None
        if self.library.pad_token_id is None:
            if self.library.eos_token_id is None:
                raise UserError(
                    f"name: the tokenizer '{name}' has neither a padding nor an end token. Name another one."
                )
            self.library.pad_token = self.library.eos_token
        self.library.padding_side = self.library.truncation_side = "right"
        self.pad_id = int(self.library.pad_token_id)
        self.vocab_size = len(self.library)

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ids int64 [n, S] and lengths int64 [n]; a text without any token counts one pad."""
        clean = list(texts) if self._clean is None else [self._clean(text) for text in texts]
        batch = self.library(clean, padding="max_length", truncation=True, max_length=self.context_length)
        lengths = torch.tensor(batch["attention_mask"], dtype=torch.int64).sum(dim=1).clamp(min=1)
        ids = torch.tensor(batch["input_ids"], dtype=torch.int64)
        return ids if self._stripped is None else ids.masked_fill(ids == self._stripped, 0), lengths

    def decode(self, ids: Sequence[int]) -> list[str]:
        """The piece of text behind each id."""
        return [str(self.library.decode([int(number)])).strip() for number in ids]


def _cleaning(kind: str) -> Callable[[str], str]:
    """OpenCLIP's own function of this name."""
    from open_clip.tokenizer import get_clean_fn

    return cast(Callable[[str], str], get_clean_fn(kind))


def _load(name: str) -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the fork of loader workers
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, ImportError and more: whatever keeps it from loading
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"name: the tokenizer '{name}' cannot be loaded ({reason}). Give a folder with its files, or a name "
            "on the hub."
        ) from error
