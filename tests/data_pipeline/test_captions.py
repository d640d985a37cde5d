"""Caption schemas: lists stay lists, strings become sentences, nothing becomes characters."""

from __future__ import annotations

import logging

import pytest

from cosmos_ssl.data.captions import DREAMLIP_FIELDS, caption_schema, check_captions, split_sentences
from cosmos_ssl.errors import DataError, UserError


def test_strings_are_cut_at_sentence_ends() -> None:
    text = "A cat of 3.5 kilos. It sits\non a mat</s>.  . The end.Really"
    assert split_sentences(text) == ["A cat of 3.5 kilos", "It sits", "on a mat", "The end", "Really"]


def test_dreamlip_joins_seven_lists() -> None:
    table = {name: [f"{name} one", "", f"{name} two"] for name in DREAMLIP_FIELDS} | {"other": ["no"]}
    found = caption_schema("dreamlip")(table, "text")
    assert list(found) == list(DREAMLIP_FIELDS) and all(len(v) == 2 for v in found.values())


def test_dreamlip_strings_are_split() -> None:
    found = caption_schema("dreamlip")({"longIB_captions": "One thing. Another thing.", "raw_caption": 7}, None)
    assert found == {"longIB_captions": ["One thing", "Another thing"]}


def test_other_schemas() -> None:
    table = {"caption": "This is. Cut", "original_caption": "Kept. Whole", "mine": ["x", "y"], "n": 3}
    assert caption_schema("pixelprose")(table, None) == {"original_caption": ["Kept. Whole"], "caption": ["This is", "Cut"]}
    assert caption_schema("txt")(table, " words. more ") == {"txt": ["words. more"]}
    assert caption_schema("json:mine,caption")(table, None) == {"mine": ["x", "y"], "caption": ["This is", "Cut"]}
    assert caption_schema("all")(table, "t") == {
        "txt": ["t"],
        "caption": ["This is. Cut"],
        "original_caption": ["Kept. Whole"],
        "mine": ["x", "y"],
    }
    assert caption_schema(None)(table, "t") == {}


def test_an_unknown_schema_is_refused() -> None:
    with pytest.raises(UserError, match=r"no schema 'dreamlib'\. Did you mean 'dreamlip'"):
        caption_schema("dreamlib")
    with pytest.raises(UserError):
        caption_schema("json:")


def test_one_notice_for_strings_where_lists_are_due(caplog: pytest.LogCaptureFixture) -> None:
    table = {"longIB_captions": "One. Two. Three", "raw_caption": ["fine"]}
    with caplog.at_level(logging.WARNING, "cosmos_ssl.data"):
        check_captions("dreamlip", [("a.tar", table, None)] * 5)
    assert caplog.messages == ["captions: 'longIB_captions' holds strings, not lists; split at sentence ends (3 sentences on average)."]


def test_no_captions_at_all_is_an_error_that_says_what_is_there() -> None:
    with pytest.raises(
        DataError, match=r"no captions by the schema 'dreamlip' in any of 2 samples of 2 shards \(found: text, the txt member\)"
    ):
        check_captions("dreamlip", [("a.tar", {"text": ["x"]}, "t"), ("b.tar", {}, "t")])
