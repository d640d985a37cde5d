"""Any number of view groups of a picture's texts, each drawn from caption fields of its own."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from cosmos_ssl.api import Augmenter, BadSample, Few, Modality, Sample, Spec, ViewSpec
from cosmos_ssl.data import join_sentences
from cosmos_ssl_plugins.augmenters.text_crop import draw_sentences


@dataclass(frozen=True, slots=True, kw_only=True)
class TextViews:
    """One group of texts: ``number`` of them, each of 1 to ``max_sentences`` sentences of ``caption_fields``."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid"}

    caption_fields: list[str] | None = None
    number: Few = 1
    max_sentences: Few = 1


class TextGroups(Augmenter):
    """View groups by name, such as the alt text of a picture and what a model says of it (TIPS, arXiv 2410.16512).

    A group's texts of a sample depend on its own name and options alone.
    """

    modality: ClassVar[Modality] = "text"

    def __init__(self, spec: Spec, *, groups: dict[str, TextViews | None]) -> None:
        """Raises ValueError where nothing is left to draw.

        groups: options of each group by its name; a null takes a group out (of a config that is extended).
        """
        self._groups = {name: group for name, group in groups.items() if group is not None}
        if not self._groups:
            raise ValueError("groups: no group is left; give at least one")
        for name, group in self._groups.items():
            if group.caption_fields == []:
                raise ValueError(f"groups.{name}.caption_fields: an empty list leaves no captions; leave it out")

    def offers(self) -> Mapping[str, ViewSpec]:
        """The groups, in the order of the config."""
        return {name: ViewSpec(views=group.number) for name, group in self._groups.items()}

    def crop(self, sample: Sample, rng: np.random.Generator) -> Mapping[str, Sequence[str]]:
        """The texts by group. Raises BadSample where the fields of one hold no sentence."""
        base = int(rng.integers(1 << 63))
        texts = {}
        for name, group in self._groups.items():
            own = np.random.default_rng((base, zlib.crc32(name.encode())))
            sentences = [sentence for sentence in sample.sentences(group.caption_fields) if sentence.strip()]
            if not sentences:
                raise BadSample(f"no caption for the texts '{name}'")
            counts = own.integers(1, group.max_sentences + 1, size=group.number)
            texts[name] = [join_sentences(draw_sentences(sentences, int(count), own)) for count in counts]
        return texts
