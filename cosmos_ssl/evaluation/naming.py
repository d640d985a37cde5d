"""The names of classes: as a prompt says them, and which of them belongs to which folder."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cosmos_ssl.api import DataError
from cosmos_ssl.errors import listed

_WNID = re.compile(r"n\d{8}")


def spoken(name: str) -> str:
    """A folder's name as words: ``red_fox`` is a red fox."""
    return " ".join(name.replace("_", " ").split()) or name


def wordnet(folders: Sequence[str]) -> bool:
    """Return whether class folders are called by WordNet numbers, which are no words for a prompt."""
    return any(map(_WNID.fullmatch, folders))


def repeated(names: Sequence[str]) -> str:
    """Return what is to be said of names that stand for several classes, or an empty string."""
    places: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        places.setdefault(name, []).append(number)
    found = [
        f"'{name}' is the name of classes {' and '.join(map(str, own))}" for name, own in places.items() if len(own) > 1
    ]
    if not found:
        return ""
    return f"{listed(found, limit=3)}: their scores are equal, and the first of them counts"


def in_order_of_folders(names: Sequence[str], folders: Sequence[str], source: str) -> list[str]:
    """``names``, which ``source`` holds, put into the order of the class folders; names of further classes follow.

    They are matched by name (with spaces or underscores, in any case) where each folder's is among them, by number
    where the folders are called by numbers (from 0, or from 1 to the last), and else by place. Raises DataError where
    the counts differ, and where a name stands in another folder's place: a list in another order shifts no label.
    """
    said, wanted = list(map(_key, names)), list(map(_key, folders))
    chosen = _by_name(said, wanted) or _by_number(len(names), folders, source)
    if chosen is not None:
        return [names[place] for place in [*chosen, *(n for n in range(len(names)) if n not in set(chosen))]]
    if len(names) != len(folders):
        raise DataError(f"{source}: {len(names)} class names are given for {len(folders)} classes")
    for place, (name, own) in enumerate(zip(said, wanted, strict=True)):
        if name != own and name in wanted:
            told = f"name {place + 1}, '{names[place]}', stands in the place of the class folder '{folders[place]}'"
            way = "Give every folder's name, in any order, or other names in the order of the folders"
            raise DataError(f"{source}: {told}. {way}")
    return list(names)


def _key(name: str) -> str:
    return spoken(name).casefold()


def _by_name(said: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    """The place of each folder's name, where all are there once."""
    places = {name: place for place, name in enumerate(said)}
    if len(places) < len(said) or len(set(wanted)) < len(wanted) or not places.keys() >= set(wanted):
        return None
    return [places[name] for name in wanted]


def _by_number(count: int, folders: Sequence[str], source: str) -> list[int] | None:
    """The number that each folder is called by, where all are; they are in byte order, in which 10 precedes 2."""
    if not all(folder.isascii() and folder.isdecimal() and len(folder) < 10 for folder in folders):
        return None
    numbers = list(map(int, folders))
    first = 1 if 0 not in numbers and max(numbers) == count else 0
    if max(numbers) - first >= count or len(set(numbers)) < len(numbers):
        raise DataError(
            f"{source}: {count} class names are given, and class folders are called by numbers up to {max(numbers)}"
        )
    return [number - first for number in numbers]
