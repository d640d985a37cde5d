"""What is in shards: samples, sizes of images, sentences and tokens of captions, and how many a text tower would
cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Self

import numpy as np

from cosmos_ssl.api import BadSample, Tokenizer
from cosmos_ssl.data.captions import join_sentences, left_out
from cosmos_ssl.data.dataset import Shards
from cosmos_ssl.data.manifest import load_manifest
from cosmos_ssl.data.scan import pool, spread
from cosmos_ssl.data.table import TableData, is_table
from cosmos_ssl.liveness import OnProgress, alive
from cosmos_ssl.pictures import has_alpha, open_picture

_CHUNK = 256
_LEVELS = (0, 5, 50, 95, 100)


class Spread(Counter[int]):
    """Distribution of whole numbers: how often each occurs."""

    def share_above(self, limit: int) -> float:
        """Share of the values that are larger."""
        return sum(n for value, n in self.items() if value > limit) / max(1, self.total())

    def summary(self) -> dict[str, float]:
        """``count``, ``mean`` and the percentiles ``p0`` (least), ``p5``, ``p50``, ``p95``, ``p100`` (largest)."""
        if not self:
            return {"count": 0}
        values = np.array(sorted(self))
        ends = np.cumsum([self[int(value)] for value in values])
        places = [min(int(level / 100 * ends[-1]), int(ends[-1]) - 1) for level in _LEVELS]
        found = values[np.searchsorted(ends, places, side="right")]
        mean = sum(value * n for value, n in self.items()) / ends[-1]
        levels = {f"p{level}": int(value) for level, value in zip(_LEVELS, found, strict=True)}
        return {"count": int(ends[-1]), "mean": float(mean), **levels}


@dataclass(slots=True)
class _Counts:
    """Numbers, counters, and tables of counts by name."""

    def join(self, other: Self) -> None:
        """Add what was counted elsewhere."""
        for one in fields(self):
            mine, theirs = getattr(self, one.name), getattr(other, one.name)
            if isinstance(mine, Counter):
                mine.update(theirs)
            elif isinstance(mine, dict):
                for name, counts in theirs.items():
                    mine.setdefault(name, type(counts)()).join(counts)
            else:
                setattr(self, one.name, mine + theirs)


@dataclass(slots=True)
class FieldStats(_Counts):
    """One caption field."""

    samples: int = 0
    """Samples that have it."""
    sentences: Spread = field(default_factory=Spread)
    """Sentences by sample."""
    sentence_tokens: Spread = field(default_factory=Spread)
    """Tokens by sentence, start and end tokens included."""
    caption_tokens: Spread = field(default_factory=Spread)
    """Tokens of all sentences of the field joined into one text."""


@dataclass(slots=True)
class DataStats(_Counts):
    """What ``collect_stats`` found."""

    shards: int = 0
    samples: int = 0
    bytes: int = 0
    looked_at: int = 0
    unusable: Counter[str] = field(default_factory=Counter)
    width: Spread = field(default_factory=Spread)
    height: Spread = field(default_factory=Spread)
    image_bytes: Spread = field(default_factory=Spread)
    formats: Counter[str] = field(default_factory=Counter)
    with_alpha: int = 0
    """Pictures that can be transparent."""
    sentences: Spread = field(default_factory=Spread)
    """Sentences by sample, over all fields."""
    fields: dict[str, FieldStats] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    """Keys of the JSON whose strings the schema ``all`` takes for no captions, and in how many samples."""

    def as_json(self, context_length: int) -> dict[str, Any]:
        """Plain values, with the share of sentences and captions of more than ``context_length`` tokens."""
        fields = {
            name: {
                "samples": found.samples,
                "sentences": found.sentences.summary(),
                "tokens_per_sentence": found.sentence_tokens.summary(),
                "tokens_per_caption": found.caption_tokens.summary(),
                "sentences_cut": found.sentence_tokens.share_above(context_length),
                "captions_cut": found.caption_tokens.share_above(context_length),
            }
            for name, found in self.fields.items()
        }
        spreads = {name: getattr(self, name).summary() for name in ("width", "height", "image_bytes", "sentences")}
        counts = {name: getattr(self, name) for name in ("shards", "samples", "bytes", "looked_at", "with_alpha")}
        counters = {name: dict(getattr(self, name)) for name in ("formats", "unusable", "left_out")}
        return {**counts, **spreads, **counters, "fields": fields}


def collect_stats(
    urls: str | Sequence[str],
    *,
    captions: str,
    tokenizer: Tokenizer,
    samples: int = 20_000,
    progress: OnProgress = alive,
) -> DataStats:
    """Look at ``samples`` evenly spread samples (0: all of them); their number and bytes are of all.

    ``tokenizer`` should have room for texts longer than the model's, so that what it would cut is counted.
    Raises DataError, UserError for an unknown schema, OSError.
    """
    shards: Shards | TableData
    if is_table(urls):
        shards = TableData(urls)
        sizes = [piece.size for piece in shards.index.pieces]
    else:
        manifest = load_manifest(urls)
        shards = Shards(urls, caption_schema=captions, manifest=manifest, full=captions == "all")
        sizes = [shard.size for shard in manifest.shards]
    total = len(shards)
    looked_at = samples if 0 < samples < total else total
    chosen = spread(total, looked_at)
    stats = DataStats(len(sizes), total, sum(sizes))
    chunks = [chosen[start : start + _CHUNK] for start in range(0, len(chosen), _CHUNK)]
    progress(0, len(chosen))
    with pool(len(chunks), processes=len(chunks) > 1) as executor:
        for found in executor.map(partial(_look, shards, tokenizer), chunks):
            stats.join(found)
            progress(stats.looked_at, len(chosen))
    return stats


def _look(shards: Shards | TableData, tokenizer: Tokenizer, indices: Sequence[int]) -> DataStats:
    stats = DataStats(looked_at=len(indices))
    texts: list[tuple[FieldStats, bool, str]] = []
    for index in indices:
        try:
            sample = shards.read(int(index))
            body = sample.image or b""
            picture = open_picture(body, decode=False)
        except BadSample as error:
            stats.unusable[error.reason] += 1
            continue
        stats.width[picture.width] += 1
        stats.height[picture.height] += 1
        stats.image_bytes[len(body)] += 1
        stats.formats[str(picture.format)] += 1
        stats.with_alpha += has_alpha(picture)
        stats.sentences[len(sample.sentences())] += 1
        stats.left_out.update(left_out(sample.extras.get("json", {})))
        for name, sentences in sample.captions.items():
            found = stats.fields.setdefault(name, FieldStats())
            found.samples += 1
            found.sentences[len(sentences)] += 1
            texts += [(found, False, sentence) for sentence in sentences]
            texts.append((found, True, join_sentences(sentences)))
    for start in range(0, len(texts), _CHUNK):
        part = texts[start : start + _CHUNK]
        _, lengths = tokenizer([text for _, _, text in part])
        for (found, is_caption, _), length in zip(part, lengths.tolist(), strict=True):
            (found.caption_tokens if is_caption else found.sentence_tokens)[length] += 1
    return stats
