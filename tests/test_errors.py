"""What is shown of errors."""

from __future__ import annotations

import pytest

from cosmos_ssl.errors import printable


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
