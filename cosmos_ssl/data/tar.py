"""Tar headers read by hand: where the members of an archive lie, without touching their bodies."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 512
HEADER_BYTES = 1 << 20
"""An extended header or a long name of more bytes than this is refused: readers hold them in memory."""

_FILES = b"\x00\x30\x37"  # NUL of old archives, 0, and 7: "contiguous", which all read as 0
_BODILESS = b"123456"  # links, devices, folders, pipes: whatever size they state, nothing follows
_LONG_NAME, _LONG_LINK, _FOR_ALL, _SPARSE = b"L", b"K", b"g", b"S"
_EXTENDED = b"xX"  # POSIX, and Solaris before it
_RECORD = re.compile(rb"(\d{1,20}) ([^=]+)=")
_KEPT = (b"path", b"size")
Read = Callable[[int, int], bytes]


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


def members(read: Read, size: int, *, whole: bool = True) -> Iterator[Member]:
    """Yield the regular files of the archive of ``size`` bytes that ``read(offset, count)`` gives.

    Knows the POSIX, GNU and pax forms. Raises TarFault at the first header that cannot be right, where the archive ends
    inside a member, and where a ``whole`` one lacks the zeros that every writer puts at the end, or goes on after them.
    Every header lies behind the one before it, and none of more than ``HEADER_BYTES`` is read.
    """
    position = 0
    start: int | None = None
    told: dict[bytes, bytes] = {}
    while position + BLOCK <= size:
        header = read(position, BLOCK)
        if header.count(0) == BLOCK and start is None:
            return _check_rest(read, position, size) if whole else None
        kind, body = _check(header, position), position + BLOCK
        count = 0 if kind in _BODILESS else _size(header, kind, told, position)
        if body + count > size:
            raise TarFault(f"{size:,} of at least {body + count:,} bytes")
        if kind in (_LONG_NAME, _LONG_LINK, _FOR_ALL) or kind in _EXTENDED:
            more = _extension(read, kind, body, count)
            if kind != _FOR_ALL:  # of several headers before a file the first one counts, as for Python
                start, told = position if start is None else start, {**more, **told}
        else:
            if kind in _FILES:
                yield Member(_name(header, told), position if start is None else start, body, count)
            start, told = None, {}
        position = _padded(body + count)
    if start is not None or position != size or (whole and size):
        raise TarFault(f"{size:,} of at least {position + 2 * BLOCK * whole:,} bytes")


def members_in(data: bytes) -> Iterator[Member]:
    """``members`` of a span of an archive that is in memory, such as a sample's."""
    return members(lambda at, count: data[at : at + count], len(data), whole=False)


def sample_key(name: str) -> tuple[str, str]:
    """Split a member's name at the first dot of its last part: (key, extension in lower case)."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _padded(position: int) -> int:
    return -(-position // BLOCK) * BLOCK


def _check_rest(read: Read, position: int, size: int) -> None:
    """Nothing but zeros may follow the end mark: what does would be left out without a word."""
    while position < size:
        rest = read(position, min(HEADER_BYTES, size - position))
        if not rest or rest.count(0) < len(rest):
            at = position + len(rest) - len(rest.lstrip(b"\0"))
            raise TarFault(f"more follows its end mark at byte {at:,}; archives put end to end are shards of their own")
        position += len(rest)


def _check(header: bytes, position: int) -> bytes:
    """The type flag of a header whose checksum holds."""
    try:
        holds = len(header) == BLOCK and _octal(header[148:156]) == sum(header[:148]) + 8 * 32 + sum(header[156:])
    except ValueError:
        holds = False
    if not holds:
        compressed = "no tar file (compressed shards must be unpacked first)"
        raise TarFault(f"damaged at byte {position:,}" if position else compressed)
    kind = header[156:157]
    if kind == _SPARSE:
        raise _sparse(position)
    is_folder = kind == b"\0" and header[:100].partition(b"\0")[0].endswith(b"/")  # as before folders had a type
    return b"5" if is_folder else kind


def _sparse(position: int) -> TarFault:
    return TarFault(f"a sparse file at byte {position:,}, whose holes are left out. Pack it without tar's -S")


def _size(header: bytes, kind: bytes, told: dict[bytes, bytes], position: int) -> int:
    """Bytes of a body: as its extended header says, where a file has one, else as its own does."""
    try:
        if b"size" in told and kind not in (_LONG_NAME, _LONG_LINK, _FOR_ALL) and kind not in _EXTENDED:
            return int(told[b"size"])
        field = header[124:136]
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else _octal(field)  # base 256: 8 GiB and more
    except ValueError as error:
        raise TarFault(f"the header at byte {position:,} states no size") from error


def _octal(field: bytes) -> int:
    """A number as headers hold it. Raises ValueError for all but octal digits (Python's ``int`` takes signs, too)."""
    digits = field.partition(b"\0")[0].strip(b" ")
    if not digits.isdigit() and digits:
        raise ValueError(field)
    return int(digits or b"0", 8)


def _name(header: bytes, told: dict[bytes, bytes]) -> str:
    name = told.get(b"path")
    if name is None:
        name = header[:100].partition(b"\0")[0]
        if header[257:263] == b"ustar\0":  # only POSIX headers have a prefix there
            prefix = header[345:500].partition(b"\0")[0]
            name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", "backslashreplace")


def _extension(read: Read, kind: bytes, body: int, count: int) -> dict[bytes, bytes]:
    """Return what an extended header tells of ``path`` and ``size`` of the file after it."""
    position = body - BLOCK
    if count > HEADER_BYTES:
        raise TarFault(f"the extended header at byte {position:,} would hold {count:,} bytes")
    found = read(body, _padded(count))
    if found[count:].strip(b"\0"):
        raise TarFault(f"the extended header at byte {position:,} is longer than it states")
    if kind == _LONG_LINK:
        return {}
    if kind == _LONG_NAME:
        return {b"path": found.partition(b"\0")[0]}
    records = _pax_records(found[:count], position)
    if any(key.startswith(b"GNU.sparse.") for key in records):
        raise _sparse(position)
    records = {key: records[key] for key in _KEPT if key in records}
    if b"size" in records and not records[b"size"].isdigit():
        raise _malformed(position)
    if kind == _FOR_ALL and records:
        given = " and one ".join(key.decode() for key in records)
        raise TarFault(f"the global header at byte {position:,} gives all files one {given}")
    return {key: value.rstrip(b"/") if key == b"path" else value for key, value in records.items()}


def _malformed(position: int) -> TarFault:
    return TarFault(f"the extended header at byte {position:,} is malformed")


def _pax_records(body: bytes, position: int) -> dict[bytes, bytes]:
    """The ``length key=value`` records of an extended header, each ended by a newline."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(body):
        found = _RECORD.match(body, at)
        end = at + int(found[1]) if found else 0
        if found is None or not found.end() < end <= len(body) or body[end - 1 : end] != b"\n":
            raise _malformed(position)
        records[found[2]] = body[found.end() : end - 1]
        at = end
    return records
