"""Captions of tables into lists of sentences, by the published rule or by a more careful one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from cosmos_ssl.data.captions import as_sentences, written_list

_PUBLISHED = re.compile(r"\n|</s>|\.")
_CAREFUL = re.compile(r"""\n|</s>|\.(?=["')\]]?(?:\s|$|</s>))""")
_WORD = re.compile(r"[^\s\"'(\[]*$")
_NEVER_LAST = frozenset(("mr", "mrs", "ms", "dr", "prof", "st", "mt", "capt", "col", "gen", "lt", "sgt", "rev", "hon"))
_NEVER_LAST |= {"fig", "no", "vs", "approx", "ca"}
"""Abbreviations that something always follows."""
_SELDOM_LAST = frozenset(("etc", "inc", "ltd", "co", "corp", "jr", "sr", "dept", "est", "min", "max", "ft", "in"))
_SELDOM_LAST |= {"lb", "oz"}
"""Abbreviations that end a sentence only before a capital letter."""


def split_published(text: str) -> list[str]:
    """Cut at newlines, ``</s>`` and every full stop, as the authors' program does; empties are dropped."""
    return [piece for part in _PUBLISHED.split(text) if (piece := part.strip())]


def split_careful(text: str) -> list[str]:
    """The same, but full stops inside numbers and addresses, after abbreviations and after initials do not cut."""
    pieces, start = [], 0
    for end in _CAREFUL.finditer(text):
        if end[0] != "." or _ends_sentence(text[start : end.start()], text[end.end() :]):
            pieces.append(text[start : end.start()])
            start = end.end()
    pieces.append(text[start:])
    return [piece for part in pieces if (piece := part.strip().rstrip(".").rstrip()).strip("\"')] ")]


def _ends_sentence(before: str, after: str) -> bool:
    found = _WORD.search(before)
    word = found[0] if found else ""
    following = after.lstrip("\"')] \t")[:1]
    if word.lower() in _NEVER_LAST:
        return word.lower() == "no" and not following.isdigit()
    if len(word) == 1 and word.isupper() and word != "I":  # an initial, where a name stands around it
        before_it = before[: -len(word)].split()
        return not (following.isupper() and (not before_it or before_it[-1][:1].isupper()))
    if word.lower() in _SELDOM_LAST or re.fullmatch(r"(?:[A-Za-z]\.)+[A-Za-z]", word):  # 'e.g', 'a.m', 'U.S'
        return not following or following.isupper()
    return True


SPLITTERS: Mapping[str, Callable[[str], list[str]]] = {"published": split_published, "careful": split_careful}


def whole(text: str) -> list[str]:
    """The text as its only sentence."""
    return [text.strip()] if text.strip() else []


def sentences(value: Any, split: Callable[[str], list[str]]) -> tuple[list[str], bool]:
    """Sentences of a cell, and whether it held a list already: a list, or the text of one as JSON or Python
    writes it.
    """
    if isinstance(value, str):
        listed = written_list(value)
        return (split(value), False) if listed is None else (as_sentences(listed), True)
    return as_sentences(value), isinstance(value, list)
