"""Text-cropping: short and long texts drawn from a picture's sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from cosmos_ssl.api import Augmenter, BadSample, Few, Modality, Sample, Share, Spec, ViewSpec
from cosmos_ssl.data import join_sentences


class TextCrop(Augmenter):
    """Groups ``global`` and ``local`` of texts, as COSMOS draws them (arXiv 2412.01814).

    ``num_sampled_captions`` texts in all, ``num_global_captions`` of them global (fewer if there are not as many).
    A global text joins 1 to ``max_sentences`` sentences; a local text is one sentence, no sentence twice. With
    ``join: false`` all texts together are single sentences drawn so. ``caption_fields`` (default: every field) name
    the captions to draw from. One caption a picture and one text, as CLIP has it: 1 text and ``join: false``.
    ``consecutive_prob`` is the probability that the sentences of a joined text follow one another in the captions.
    Otherwise they are drawn at random places.
    """

    modality: ClassVar[Modality] = "text"

    def __init__(
        self,
        spec: Spec,
        *,
        num_sampled_captions: Few = 8,
        num_global_captions: Few = 2,
        max_sentences: Few = 5,
        caption_fields: list[str] | None = None,
        join: bool = True,
        consecutive_prob: Share = 0.0,
    ) -> None:
        numbers = {
            "num_sampled_captions": num_sampled_captions,
            "num_global_captions": num_global_captions,
            "max_sentences": max_sentences,
        }
        for option, number in numbers.items():
            if number < 1:
                raise ValueError(f"{option}: {number} leaves no text; give at least 1")
        if caption_fields is not None and not caption_fields:
            raise ValueError("caption_fields: an empty list leaves no captions; leave it out to use all of them")
        self.globals = min(num_sampled_captions, num_global_captions)
        self.locals = num_sampled_captions - self.globals
        self.max_sentences, self.caption_fields, self.join = max_sentences, caption_fields, join
        self.consecutive_prob = consecutive_prob

    def offers(self) -> Mapping[str, ViewSpec]:
        """``global``, and ``local`` unless all texts are global."""
        counts = {"global": self.globals, "local": self.locals}
        return {name: ViewSpec(views=count) for name, count in counts.items() if count}

    def crop(self, sample: Sample, rng: np.random.Generator) -> Mapping[str, Sequence[str]]:
        """The texts by group. Raises BadSample where the fields hold no sentence."""
        sentences = [sentence for sentence in sample.sentences(self.caption_fields) if sentence.strip()]
        if not sentences:
            raise BadSample("no caption")
        if self.join:
            counts = rng.integers(1, self.max_sentences + 1, size=self.globals)
            long = [join_sentences(self._sentences(sentences, int(count), rng)) for count in counts]
            short = draw_sentences(sentences, self.locals, rng)
        else:
            drawn = draw_sentences(sentences, self.globals + self.locals, rng)
            long, short = drawn[: self.globals], drawn[self.globals :]
        return {"global": long, "local": short} if self.locals else {"global": long}

    def _sentences(self, sentences: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
        """The sentences of one joined text."""
        if self.consecutive_prob and rng.random() < self.consecutive_prob and count <= len(sentences):
            start = int(rng.integers(len(sentences) - count + 1))
            return list(sentences[start : start + count])
        return draw_sentences(sentences, count, rng)


def draw_sentences(sentences: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """``count`` sentences without replacement; of too few, the whole list as often as it fits, then a draw for the
    rest.
    """
    times, rest = divmod(count, len(sentences))
    return list(sentences) * times + [sentences[i] for i in rng.permutation(len(sentences))[:rest]]
