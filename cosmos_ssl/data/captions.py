"""Caption schemas: from a sample's JSON and text members to lists of sentences by field."""

from __future__ import annotations

import json
import logging
import re
from ast import literal_eval
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
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
_STOPPED = re.compile(r"""[.!?\u2026\u3002\uff01\uff1f]["'\u2019\u201d\u00bb)\]}]*\s*$""")
_BOOKKEEPING = re.compile(
    r"keys?|ids?|uu?id|guid|urls?|uri|link|images?|img|picture|photo|paths?|files?|filepath|file_?name|folder|dir|[adp]?hash|md5|sha\d+|etag"
    r"|width|height|size|bytes|resolution|format|mime|mime_type|content_type|status|error|error_message|exif|similarity|score|punsafe"
    r"|pwatermark|nsfw|licen[cs]e|language|lang|date|time|timestamp|datetime|created_at|updated_at|author|user|username|owner|credit|copyright"
    r"|source|dataset|split|subset|model|version"
)
"""Last words of keys under which programs (img2dataset, data prepare, published tables) keep what is no caption."""
_WORD = re.compile(r"[A-Z]*[a-z0-9]+|[A-Z]+")
_ADDRESS = re.compile(
    r"(?:[a-z][a-z0-9+.-]*:)?//.+|www\..+|data:.+"  # a URL
    r"|(?:~|\.\.?|[a-z]:)?[/\\].+"  # a path that begins at a root, at home, here
    r"|[0-9a-f]{16,128}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|sha\d+[:-].+",  # a hash
    re.IGNORECASE,
)
_FILE = re.compile(
    r"\.(?:jpe?g|png|webp|gif|bmp|tiff?|svg|heic|avif|tar|json|txt|csv|parquet|npy|npz|mp4)$", re.IGNORECASE
)
MAX_TEXT, MAX_WORD = 1 << 16, 1 << 10
"""Letters that a text, and a word in it, may have: byte pairs of a longer word take a tokenizer minutes."""
_LONG_WORD = re.compile(rf"\w{{{MAX_WORD + 1}}}|[^\w\s]{{{MAX_WORD + 1}}}")
_HALF = re.compile(r"[\ud800-\udfff]")
"""Half of a pair, as JSON can spell it: no encoding takes it."""
_log = logging.getLogger("cosmos_ssl.data")


def split_sentences(text: str) -> list[str]:
    """Cut at newlines, ``</s>`` and full stops (not at decimal points); empties are dropped."""
    return [piece for part in _ENDS.split(text) if (piece := part.strip())]


def join_sentences(sentences: Sequence[str]) -> str:
    """One text of several sentences, as the authors' program joins them: ``. `` between, or one's own full stop."""
    joined = "".join(f"{text.rstrip()} " if _STOPPED.search(text) else f"{text}. " for text in sentences[:-1])
    return joined + "".join(sentences[-1:])


def as_sentences(value: Any) -> list[str]:
    """A list's non-empty strings as they are; a string cut at sentence ends, never into characters."""
    if isinstance(value, str):
        return split_sentences(value)
    if isinstance(value, list):
        return [item for item in value if isinstance(item, str) and item.strip()]
    return []


def written_list(text: str) -> list[Any] | None:
    """The list of strings whose text this is, as JSON or Python writes it; None for another text."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]") and text[1:-1].strip()[:1] in ('"', "'", "")):
        return None
    for read in (json.loads, literal_eval):
        try:
            found = read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(found, list) and all(isinstance(item, str) for item in found):
            return found
    return None


def caption_schema(name: str | None) -> Schema:
    """The schema of this name.

    ``dreamlip`` (seven lists), ``pixelprose`` (``original_caption`` whole, ``caption`` cut into sentences), ``txt``
    (the text member, one caption), ``json:KEY`` or ``json:KEY,KEY`` (lists under keys of the JSON), ``all`` (the text
    member and every string or list of strings in the JSON that a person wrote, strings whole: what evaluators read; not
    what is under a key of bookkeeping, such as ``url`` or ``image_id``, nor URLs, paths of files and hashes under any
    key), None (no captions). Raises UserError for another name.
    """
    own = {None: _nothing, "txt": _text_member, "all": _everything, "pixelprose": _pixelprose}
    return own[name] if name in own else partial(_lists, schema_fields(name or ""))


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


def _nothing(table: Mapping[str, Any], text: str | None) -> Captions:
    return {}


def _text_member(table: Mapping[str, Any], text: str | None) -> Captions:
    return _filled({"txt": _whole(text)})


def _pixelprose(table: Mapping[str, Any], text: str | None) -> Captions:
    whole = _whole_or_list(table.get("original_caption"))
    return _filled({"original_caption": whole, "caption": as_sentences(table.get("caption"))})


def _lists(keys: Sequence[str], table: Mapping[str, Any], text: str | None) -> Captions:
    return _filled({key: as_sentences(table.get(key)) for key in keys})


def _everything(table: Mapping[str, Any], text: str | None) -> Captions:
    found = {key: _words(value) for key, value in table.items() if not is_bookkeeping(key)}
    return _filled({"txt": _whole(text), **found})


@lru_cache(1024)
def is_bookkeeping(key: str) -> bool:
    """Return whether a key of a sample's JSON is one under which programs keep what is no caption: addresses, hashes,
    sizes, states.
    """
    words = [word.lower() for word in _WORD.findall(key)]
    return any(_BOOKKEEPING.fullmatch("_".join(words[-count:])) for count in (1, 2))


def _is_address(text: str) -> bool:
    """Return whether a text is nothing but a URL, a path of a file or a hash."""
    one_word = not re.search(r"\s", text)
    named = one_word or "/" in text or "\\" in text
    return (one_word and _ADDRESS.fullmatch(text) is not None) or (named and _FILE.search(text) is not None)


def _words(value: Any) -> list[str]:
    return [text for text in _whole_or_list(value) if not _is_address(text.strip())]


def left_out(table: Mapping[str, Any]) -> list[str]:
    """The keys of a sample's JSON that hold strings, and nothing that the schema ``all`` takes for a caption."""
    return [key for key, value in table.items() if _whole_or_list(value) and (is_bookkeeping(key) or not _words(value))]


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
        found = f"found: {', '.join(sorted(keys)[:12])}" if keys else "no JSON and no text member found"
        raise DataError(
            f"data: no captions by the schema '{name}' in any of {count} samples of {len(shards)} shards ({found}). "
            "Choose another caption_schema"
        )
    for field, counts in pieces.items():
        words = "captions: '%s' holds strings, not lists; split at sentence ends (%.3g sentences on average)."
        _log.warning(words, field, sum(counts) / len(counts))
