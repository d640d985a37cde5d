"""Which file of a checkpoint holds which tensor of a role, and which rank writes it: one file a role, or several with
an index, named as Hugging Face's libraries name them.

``student.safetensors``, or ``student-00001-of-00004.safetensors`` and so on and ``student.safetensors.index.json``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from cosmos_ssl.errors import CheckpointError
from cosmos_ssl.interop.files import read_json

TENSORS = ".safetensors"
INDEX = ".safetensors.index.json"
LARGE = 32 << 30
"""Bytes of a role that ``checkpoints.shards: auto`` leaves in one file at most."""
PIECE = 4 << 30
"""Bytes of each file, about, where ``auto`` makes several."""
_PIECE = re.compile(r"(?P<role>.+)-\d{5}-of-\d{5}\.safetensors")


class File(NamedTuple):
    """A file of a role."""

    name: str
    rank: int
    """Who writes it."""
    tensors: tuple[str, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class Split:
    """How the tensors of each role are shared out to files, and these to ranks; the same on all ranks."""

    shards: int | Literal["auto"] = 1
    ranks: int = 1
    """So many take part, where they share one copy of the weights; else the first alone."""
    memory: int = 1 << 62
    """Bytes of the smallest host: ``auto`` fills half of it at most."""

    def files(self, roles: Mapping[str, Mapping[str, int]]) -> dict[str, list[File]]:
        """The files of each role, given the bytes of its tensors by name.

        Neighbours by name lie in one file, files of a role are about as large as each other, and those of several ranks
        are spread evenly, so that no host holds all.
        """
        numbers = self._numbers(roles)
        total, made = sum(numbers.values()), 0
        found: dict[str, list[File]] = {}
        for role, sizes in roles.items():
            found[role], of = [], numbers[role]
            for number, names in enumerate(_divide(sizes, of)):
                name = f"{role}-{number + 1:05d}-of-{of:05d}{TENSORS}" if of > 1 else f"{role}{TENSORS}"
                rank = made * self.ranks // total if total > len(roles) else 0
                found[role].append(File(name, rank, tuple(names), sum(sizes[each] for each in names)))
                made += 1
        return found

    def _numbers(self, roles: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
        """How many files each role has."""
        bytes_of = {role: sum(sizes.values()) for role, sizes in roles.items()}
        if self.shards == "auto":
            full = 2 * sum(bytes_of.values()) > self.memory
            numbers = {role: -(-size // PIECE) if full or size > LARGE else 1 for role, size in bytes_of.items()}
        else:
            numbers = dict.fromkeys(roles, self.shards)
        return {role: max(1, min(number, len(roles[role]))) for role, number in numbers.items()}


def _divide(sizes: Mapping[str, int], pieces: int) -> list[list[str]]:
    """The names in so many runs of neighbours, none of them empty, of about as many bytes each."""
    names, total = sorted(sizes), sum(sizes.values())
    found: list[list[str]] = [[] for _ in range(pieces)]
    here, behind = 0, 0
    for number, name in enumerate(names):
        left, empty = len(names) - number, pieces - here - 1
        middle = behind + sizes[name] / 2
        if found[here] and empty and (left <= empty or middle * pieces > total * (here + 1)):
            here += 1
        found[here].append(name)
        behind += sizes[name]
    return found


def host_memory() -> int:
    """Bytes of memory that this host has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def index(files: list[File]) -> dict[str, object]:
    """The index of a role in several files."""
    where = {name: file.name for file in files for name in file.tensors}
    return {"metadata": {"total_size": sum(file.bytes for file in files)}, "weight_map": dict(sorted(where.items()))}


# ---------------------------------------------------------------------------- of what is there


def role_of(name: str) -> str | None:
    """The role that a file stands for, by its name: all its tensors, or their index; None of all other files."""
    for ending in (INDEX, TENSORS):
        if name.endswith(ending) and not _PIECE.fullmatch(name):
            return name.removesuffix(ending)
    return None


def roles_in(path: Path) -> list[str]:
    """The roles of a checkpoint folder, in order of their names: ``optimizer``, ``student``, ..."""
    return sorted({role for file in path.glob("*") if (role := role_of(file.name)) is not None})


def files_of(path: Path, role: str) -> dict[Path, set[str] | None]:
    """The files of a role in a checkpoint folder, with the names of the tensors that the index, if there is one,
    promises in each. Raises CheckpointError.
    """
    whole, told = path / f"{role}{TENSORS}", path / f"{role}{INDEX}"
    if whole.exists():
        return {whole: None}
    if not told.exists():
        raise CheckpointError(f"{path} holds no {role}. It holds {', '.join(roles_in(path)) or 'no tensors at all'}")
    where = read_json(told).get("weight_map")
    found: dict[Path, set[str] | None] = {}
    for name, file in where.items() if isinstance(where, dict) else ():
        piece = _PIECE.fullmatch(file) if isinstance(file, str) else None
        if piece is None or piece["role"] != role or "/" in file:
            raise CheckpointError(f"{told} cannot be used: {str(file)[:80]!r} is no file of the {role}")
        names = found.setdefault(path / file, set())
        assert names is not None
        names.add(name)
    if not found:
        raise CheckpointError(f"{told} cannot be used: it tells of no tensors")
    return dict(sorted(found.items()))
