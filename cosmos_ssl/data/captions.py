"""Caption schemas: from a sample's JSON and text members to lists of sentences by field."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from cosmos_ssl.errors import BadSample, DataError, UserError, did_you_mean

DREAMLIP_FIELDS = (
    "raw_caption",
    "shortIB_captions",
    "longIB_captions",
    "shortSV_captions",
    "longSV_captions",
    "shortLLA_captions",
    "longLLA_captions",
)
Captions: TypeAlias = Mapping[str, list[str]]
Schema: TypeAlias = Callable[[Mapping[str, Any], str | None], Captions]
"""JSON member ({} where there is none) and text member -> sentences by field, fields without any left out."""

_ENDS = re.compile(r"\n|</s>|(?<!\d)\.|\.(?!\d)")
MAX_TEXT, MAX_WORD = 1 << 16, 1 << 10
"""Letters that a text, and a word in it, may have: byte pairs of a longer word take a tokenizer minutes."""
_LONG_WORD = re.compile(rf"\w{{{MAX_WORD + 1}}}|[^\w\s]{{{MAX_WORD + 1}}}")
_HALF = re.compile(r"[\ud800-\udfff]")
"""Half of a pair, as JSON can spell it: no encoding takes it."""
_log = logging.getLogger("cosmos_ssl.data")


def split_sentences(text: str) -> list[str]:
    """Cut at newlines, ``</s>`` and full stops (not at decimal points); empties are dropped."""
    return [piece for part in _ENDS.split(text) if (piece := part.strip())]


def as_sentences(value: Any) -> list[str]:
    """A list's non-empty strings as they are; a string cut at sentence ends, never into characters."""
    if isinstance(value, str):
        return split_sentences(value)
    if isinstance(value, list):
        return [item for item in value if isinstance(item, str) and item.strip()]
    return []


def caption_schema(name: str | None) -> Schema:
    """The schema of this name.

    ``dreamlip`` (seven lists), ``pixelprose`` (``original_caption`` whole, ``caption`` cut into sentences), ``txt`` (the
    text member, one caption), ``json:KEY`` or ``json:KEY,KEY`` (lists under keys of the JSON), ``all`` (the text
    member and every string or list of strings in the JSON, strings whole: what evaluators read), None (no
    captions). Raises UserError for another name.
    """
    if name is None:
        return lambda table, text: {}
    if name == "txt":
        return lambda table, text: _filled({"txt": _whole(text)})
    if name == "all":
        return _everything
    if name == "pixelprose":
        return lambda table, text: _filled(
            {"original_caption": _whole_or_list(table.get("original_caption")), "caption": as_sentences(table.get("caption"))}
        )
    keys = schema_fields(name)
    return lambda table, text: _filled({key: as_sentences(table.get(key)) for key in keys})


def schema_fields(name: str) -> tuple[str, ...]:
    """The JSON fields in which a schema expects lists. Raises UserError for a name that is no schema."""
    if name == "dreamlip":
        return DREAMLIP_FIELDS
    if name in ("txt", "all", "pixelprose"):
        return ()
    keys = tuple(key.strip() for key in name.removeprefix("json:").split(",")) if name.startswith("json:") else ()
    if not keys or "" in keys:
        known = ["dreamlip", "pixelprose", "txt", "all", "json:KEY"]
        raise UserError(f"caption_schema: no schema '{name}'.{did_you_mean(name, known)} Known: {', '.join(known)}")
    return keys


def _everything(table: Mapping[str, Any], text: str | None) -> Captions:
    found = {key: _whole_or_list(value) for key, value in table.items()}
    return _filled({"txt": _whole(text), **found})


def _whole(text: Any) -> list[str]:
    return [text.strip()] if isinstance(text, str) and text.strip() else []


def _whole_or_list(value: Any) -> list[str]:
    return _whole(value) if isinstance(value, str) else as_sentences(value)


def _filled(fields: Mapping[str, list[str]]) -> Captions:
    return {name: sentences for name, sentences in fields.items() if sentences}


def text_fault(text: str) -> str:
    """Why a text is none that a tokenizer can take, in the words of a BadSample; empty for one that is."""
    if len(text) > MAX_WORD and (len(text) > MAX_TEXT or _LONG_WORD.search(text)):
        return "caption too long"
    if not text.isascii() and _HALF.search(text):
        return "caption not Unicode"
    return ""


def check_texts(captions: Mapping[str, Sequence[str]]) -> None:
    """Raise BadSample where a sample has a text that is too long, or none."""
    for name, texts in captions.items():
        for text in texts:
            if fault := text_fault(text):
                raise BadSample(fault, f"{len(text):,} letters in '{name}'")


def check_captions(name: str, looked_at: Iterable[tuple[str, Mapping[str, Any], str | None]]) -> None:
    """Look into some samples (shard, JSON, text member) before training starts.

    Logs one notice for each field that holds strings where lists are due. Raises DataError where not one of the
    samples has a caption by this schema.
    """
    read, fields = caption_schema(name), schema_fields(name)
    pieces: dict[str, list[int]] = defaultdict(list)
    shards, keys, filled, count = set(), set(), 0, 0
    for shard, table, text in looked_at:
        count += 1
        shards.add(shard)
        keys |= set(table) | ({"the txt member"} if text else set())
        filled += bool(read(table, text))
        for field in fields:
            if isinstance(table.get(field), str):
                pieces[field].append(len(split_sentences(table[field])))
    if count and not filled:
        raise DataError(_no_captions(name, count, len(shards), sorted(keys)))
    for field, counts in pieces.items():
        average = sum(counts) / len(counts)
        _log.warning("captions: '%s' holds strings, not lists; split at sentence ends (%.3g sentences on average).", field, average)


def _no_captions(name: str, count: int, shards: int, keys: Sequence[str]) -> str:
    found = f"found: {', '.join(keys[:12])}" if keys else "no JSON and no text member found"
    return f"data: no captions by the schema '{name}' in any of {count} samples of {shards} shards ({found}). Choose another caption_schema"
