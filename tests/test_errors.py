"""What is shown of errors."""

from __future__ import annotations

import pytest

from cosmos_ssl.errors import listed, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc é 中 👩\u200d🚀 \u00a0", "a\tb\nc é 中 👩\u200d🚀 \u00a0"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("over\rwritten\x08\x07\x7f\x9b1m", "over\\rwritten\\x08\\x07\\x7f\\x9b1m"),
        ("gpj.\u202eexe", "gpj.\\u202eexe"),
        ("name\udc80", "name\\udc80"),
    ],
)
def test_what_acts_on_a_terminal_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    shown.encode()


def test_the_first_of_some_names_and_how_many_there_are_beside() -> None:
    names = [*"abcdef"]
    assert listed(names[:4]) == "a, b, c, d" and listed(names) == "a, b, c, d, and 2 more" and listed([]) == ""
    assert listed(iter(names), "; ", limit=5) == "a; b; c; d; e; and 1 more"
    assert listed("ab", total=1_002) == "a, b, and 1,000 more"
