"""What is in shards: samples, sizes of images, sentences and tokens of captions, and how many a text tower would
cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cosmos_ssl.api import BadSample, Tokenizer
from cosmos_ssl.data.captions import join_sentences, left_out
from cosmos_ssl.data.dataset import Shards
from cosmos_ssl.data.manifest import load_manifest
from cosmos_ssl.data.scan import pool
from cosmos_ssl.functional.pulse import OnProgress
from cosmos_ssl.pictures import has_alpha, open_picture

_CHUNK = 256
_LEVELS = (0, 5, 50, 95, 100)


@dataclass(slots=True)
class Spread:
    """Distribution of whole numbers, kept as how often each occurs."""

    counts: Counter[int] = field(default_factory=Counter)

    def add(self, values: Sequence[int]) -> None:
        """Count values."""
        self.counts.update(values)

    def share_above(self, limit: int) -> float:
        """Share of the values that are larger."""
        return sum(n for value, n in self.counts.items() if value > limit) / max(1, self.counts.total())

    def summary(self) -> dict[str, float]:
        """``count``, ``mean`` and the percentiles ``p0`` (least), ``p5``, ``p50``, ``p95``, ``p100`` (largest)."""
        if not self.counts:
            return {"count": 0}
        values = np.array(sorted(self.counts))
        ends = np.cumsum([self.counts[int(value)] for value in values])
        places = [min(int(level / 100 * ends[-1]), int(ends[-1]) - 1) for level in _LEVELS]
        found = values[np.searchsorted(ends, places, side="right")]
        mean = sum(value * n for value, n in self.counts.items()) / ends[-1]
        return {"count": int(ends[-1]), "mean": float(mean)} | {
            f"p{lv}": int(v) for lv, v in zip(_LEVELS, found, strict=True)
        }


@dataclass(slots=True)
class FieldStats:
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
class DataStats:
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
    progress: OnProgress | None = None,
) -> DataStats:
    """Look at ``samples`` evenly spread samples (0: all of them); their number and bytes are of all.

    ``tokenizer`` should have room for texts longer than the model's, so that what it would cut is counted.
    Raises DataError, UserError for an unknown schema, OSError.
    """
    manifest = load_manifest(urls)
    shards = Shards(urls, caption_schema=captions, manifest=manifest, full=captions == "all")
    total = len(manifest)
    chosen = (
        np.arange(total)
        if samples in (0, total) or samples > total
        else np.linspace(0, total - 1, samples).astype(np.int64)
    )
    stats = DataStats(len(manifest.shards), total, sum(shard.size for shard in manifest.shards))
    chunks = [chosen[start : start + _CHUNK] for start in range(0, len(chosen), _CHUNK)]
    if progress is not None:
        progress(0, len(chosen))
    with pool(len(chunks), processes=len(chunks) > 1) as executor:
        for done, found in enumerate(executor.map(partial(_look, shards, tokenizer), chunks), 1):
            _join(stats, found)
            if progress is not None:
                progress(min(done * _CHUNK, len(chosen)), len(chosen))
    return stats


def _look(shards: Shards, tokenizer: Tokenizer, indices: Sequence[int]) -> DataStats:
    stats = DataStats(looked_at=len(indices))
    texts: list[tuple[FieldStats, bool, str]] = []
    for index in indices:
        try:
            sample = shards.read(int(index))
            _picture(sample.image or b"", stats)
        except BadSample as error:
            stats.unusable[error.reason] += 1
            continue
        stats.sentences.add([len(sample.sentences())])
        stats.left_out.update(left_out(sample.extras.get("json", {})))
        for name, sentences in sample.captions.items():
            found = stats.fields.setdefault(name, FieldStats())
            found.samples += 1
            found.sentences.add([len(sentences)])
            texts += [(found, False, sentence) for sentence in sentences]
            texts.append((found, True, join_sentences(sentences)))
    for start in range(0, len(texts), _CHUNK):
        part = texts[start : start + _CHUNK]
        _, lengths = tokenizer([text for _, _, text in part])
        for (found, is_caption, _), length in zip(part, lengths.tolist(), strict=True):
            (found.caption_tokens if is_caption else found.sentence_tokens).add([length])
    return stats


def _picture(body: bytes, stats: DataStats) -> None:
    picture = open_picture(body, decode=False)
    stats.width.add([picture.width])
    stats.height.add([picture.height])
    stats.image_bytes.add([len(body)])
    stats.formats[str(picture.format)] += 1
    stats.with_alpha += has_alpha(picture)


def _join(into: DataStats, found: DataStats) -> None:
    into.looked_at += found.looked_at
    into.with_alpha += found.with_alpha
    into.unusable.update(found.unusable)
    into.formats.update(found.formats)
    into.left_out.update(found.left_out)
    for mine, theirs in _spreads(into, found):
        mine.counts.update(theirs.counts)
    for name, theirs_field in found.fields.items():
        into.fields.setdefault(name, FieldStats()).samples += theirs_field.samples


def _spreads(into: DataStats, found: DataStats) -> Iterator[tuple[Spread, Spread]]:
    yield from ((getattr(into, name), getattr(found, name)) for name in ("width", "height", "image_bytes", "sentences"))
    for name, theirs in found.fields.items():
        mine = into.fields.setdefault(name, FieldStats())
        yield from (
            (getattr(mine, kind), getattr(theirs, kind)) for kind in ("sentences", "sentence_tokens", "caption_tokens")
        )


def default_schema(urls: str | Sequence[str]) -> str | None:
    """The schema that a report beside the first of these shards names, None where there is none."""
    from cosmos_ssl.data.scan import expand
    from cosmos_ssl.shards.prepare import schema_beside

    return schema_beside(str(Path(expand(urls)[0])))
