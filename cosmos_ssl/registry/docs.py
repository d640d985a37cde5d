"""What the docstrings of a part say of its options."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection
from itertools import takewhile
from typing import Any

_NAME = r"(?:``\w+``|`\w+`|\w+)(?:\s*\([^)]*\))?"
_LINE = re.compile(rf"[\s*-]*({_NAME}(?:(?:,| and) {_NAME})*):\s+(\S.*)$")


def option_docs(cls: type[Any], options: Collection[str]) -> dict[str, str]:
    """The text on each option in the docstrings of a class and its constructor; options without any are left out.

    A line ``name: text``, or ``a``, ``b``: text, with the deeper lines after it and to the end of its sentence; failing
    that, the sentences that hold the name in double backquotes (``name`` or ``name: value``).
    """
    text = "\n\n".join(inspect.cleandoc(doc) for doc in (cls.__doc__, cls.__init__.__doc__) if doc)
    docs = _of_lines(text, options)
    for paragraph in re.split(r"\n\s*\n", text):
        sentences = _sentences(" ".join(paragraph.split()))
        for name in options:
            found = [sentence for sentence in sentences if f"``{name}``" in sentence or f"``{name}: " in sentence]
            if found and name not in docs:
                docs[name] = " ".join(found).replace("``", "")
    return docs


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+(?=[A-Z`*])", text)


def _of_lines(text: str, options: Collection[str]) -> dict[str, str]:
    """The docs in lines ``name: text``."""
    docs: dict[str, str] = {}
    names: list[str] = []
    indent = 0
    for line in text.splitlines():
        depth = len(line) - len(line.lstrip())
        match = _LINE.match(line)
        found = re.findall(r"\w+", re.sub(r"\([^)]*\)|\band\b", "", match[1])) if match else []
        if match and found and set(found) <= set(options):
            names, indent = [name for name in found if name not in docs], depth
            docs |= dict.fromkeys(names, match[2].strip())
        elif names and line.strip() and (depth > indent or not docs[names[0]].endswith((".", "!", "?"))):
            docs |= {name: f"{docs[name]} {line.strip()}" for name in names}
        else:
            names = []
    return {name: _own(doc) for name, doc in docs.items()}


def _own(doc: str) -> str:
    """The sentences up to the one that turns to another option."""
    first, *more = _sentences(doc)
    return " ".join([first, *takewhile(lambda sentence: not sentence.startswith("``"), more)]).replace("``", "")
