"""Tar headers read by hand: where the members of an archive lie, without touching their bodies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 512


class TarFault(ValueError):
    """An archive that is cut short, damaged, or none at all; the message says which and where."""


class Member(NamedTuple):
    """One file of an archive. ``start`` is where its first header begins, long-name headers included."""

    name: str
    start: int
    data: int
    size: int

    @property
    def end(self) -> int:
        """Where the next header begins."""
        return _padded(self.data + self.size)


def members(read: Callable[[int, int], bytes], size: int, *, whole: bool = True) -> Iterator[Member]:
    """Yield the regular files of the archive of ``size`` bytes that ``read(offset, count)`` gives.

    Knows the POSIX, GNU and pax forms. Raises TarFault at the first header that cannot be right, where the archive
    ends inside a member, and where a ``whole`` one lacks the zeros that every writer puts at the end.
    """
    position = 0
    start: int | None = None
    pax: dict[str, str] = {}
    while position + BLOCK <= size:
        header = read(position, BLOCK)
        if header.count(0) == BLOCK:  # the end mark
            return
        kind, body = _check(header, position), position + BLOCK
        count = int(pax["size"]) if "size" in pax and kind in b"0\0" else _number(header[124:136])
        if body + count > size:
            raise TarFault(f"{size:,} of at least {body + count:,} bytes")
        if start is None:
            start = position
        if kind == b"L":
            pax["path"] = read(body, count).rstrip(b"\0").decode("utf-8", "replace")
        elif kind == b"x":
            pax |= _pax_records(read(body, count))
        else:
            if kind in (b"0", b"\0"):
                yield Member(pax.get("path") or _name(header), start, body, count)
            start, pax = None, {}
        position = _padded(body + count)
    if position != size or (whole and size):
        raise TarFault(f"{size:,} of at least {position + 2 * BLOCK * whole:,} bytes")


def sample_key(name: str) -> tuple[str, str]:
    """Split a member's name at the first dot of its last part: (key, extension in lower case)."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _padded(position: int) -> int:
    return -(-position // BLOCK) * BLOCK


def _check(header: bytes, position: int) -> bytes:
    """The type flag of a header whose checksum holds."""
    try:
        holds = int(header[148:156].strip(b" \0"), 8) == sum(header[:148]) + 8 * 32 + sum(header[156:])
    except ValueError:
        holds = False
    if not holds:
        raise TarFault("no tar file (compressed shards must be unpacked first)" if position == 0 else f"damaged at byte {position:,}")
    return header[156:157]


def _number(field: bytes) -> int:
    """A number as headers hold it: octal digits, or base 256 where the top bit is set (8 GiB and more)."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0":  # only POSIX headers have a prefix there
        prefix = header[345:500].partition(b"\0")[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", "replace")


def _pax_records(body: bytes) -> dict[str, str]:
    """The ``length key=value`` records of an extended header."""
    records: dict[str, str] = {}
    while body:
        length = int(body.partition(b" ")[0])
        key, _, value = body[:length].partition(b" ")[2].rstrip(b"\n").partition(b"=")
        records[key.decode()] = value.decode("utf-8", "replace")
        body = body[length:]
    return records
