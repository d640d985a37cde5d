"""Caption schemas: lists stay lists, strings become sentences, nothing becomes characters."""

from __future__ import annotations

import logging

import pytest

from cosmos_ssl.data.captions import (
    DREAMLIP_FIELDS,
    caption_schema,
    check_captions,
    join_sentences,
    left_out,
    split_sentences,
)
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
    assert caption_schema("pixelprose")(table, None) == {
        "original_caption": ["Kept. Whole"],
        "caption": ["This is", "Cut"],
    }
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
    assert caplog.messages == [
        "captions: 'longIB_captions' holds strings, not lists; split at sentence ends (3 sentences on average)."
    ]


def test_no_captions_at_all_is_an_error_that_says_what_is_there() -> None:
    with pytest.raises(
        DataError,
        match=r"no captions by the schema 'dreamlip' in any of 2 samples of 2 shards \(found: text, the txt member\)",
    ):
        check_captions("dreamlip", [("a.tar", {"text": ["x"]}, "t"), ("b.tar", {}, "t")])


def test_all_takes_what_a_person_wrote() -> None:
    table = {
        "caption": "black and/or white",
        "original_caption": "Kept. Whole",
        "tags": [
            "a dog",
            "http://host/a b.png",
            "https://host/x",
            "my pictures/a b.JPG",
            "../here",
            "C:\\pics\\a",
            "cat.webp",
        ],
        "note": "d41d8cd9-8f00-b204-e980-0998ecf8427e",
        "mark": "0" * 64,
        "year": "2020",
        "number": 3,
        "vlm_model": "gemini",
    }
    kept = {"caption": ["black and/or white"], "original_caption": ["Kept. Whole"], "tags": ["a dog"], "year": ["2020"]}
    # img2dataset's own keys, those of LAION's, DataComp's and PixelProse's tables, and those of 'data prepare'
    names = (
        "key url image sha256 md5 status error_message exif license NSFW SAMPLE_ID URL pHash uid imageUrl "
        "__key__ file_name language"
    )
    assert caption_schema("all")(table | dict.fromkeys(names.split(), "any words"), None) == kept
    assert left_out(table | {"url": "any words", "width": 3}) == ["note", "mark", "vlm_model", "url"]
    for name in ["caption", "text", "TEXT", "title", "label", "description", "alt_text", "image_caption", "0", "é"]:
        assert caption_schema("all")({name: "any words"}, None) == {name: ["any words"]}


@pytest.mark.parametrize(
    ("sentences", "text"),
    [
        (["a cat", "B", "c"], "a cat. B. c"),  # as the authors' program joins them
        (["It is on white.", "It is plain."], "It is on white. It is plain."),
        (["Who?", 'He said "go!"', "(So.)", "end "], 'Who? He said "go!" (So.) end '),
        (["it is 3.5 ", "f. ", "\u732b\u3002", "b"], "it is 3.5 . f. \u732b\u3002 b"),
        (["one."], "one."),
        ([], ""),
    ],
)
def test_joined_sentences_have_one_full_stop_each(sentences: list[str], text: str) -> None:
    assert join_sentences(sentences) == text
