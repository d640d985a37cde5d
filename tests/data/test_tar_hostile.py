"""Archives that are damaged or made to harm: one fault, no loop, little memory; where tarfile reads them too, the same
members.
"""

from __future__ import annotations

import io
import random
import tarfile
from typing import Any

import pytest

from cosmos_ssl.data.tar import BLOCK, HEADER_BYTES, Member, TarFault, members

MAGIC = range(257, 265)
"""Neither this nor the prefix is bent: tarfile takes the prefix of every header, we (as GNU tar) that of POSIX ones
alone.
"""
PREFIX = range(345, 500)
NUMBERS = [
    b"zzzzzzzzzzz\0",
    b"-0000001000\0",
    b"00000001000\0",
    b"77777777777\0",
    b"0o17\0",
    b"1_0\0",
    b"+17 \0",
    b" \0",
    b"\0" * 12,
]
NUMBERS += [
    b"\x80" + bytes(7) + b"\1" + bytes(3),
    b"\x80" + b"\xff" * 11,
    b"\xff" * 12,
    b"\x81" + bytes(11),
    b"\xff" * 10 + b"\xfe\0",
]
RECORDS = [
    b"0 path=a\n",
    b"5 a=\n",
    b"11 size=-1\n",
    b"11 size=1x\n",
    b"11 path=aa\n",
    b"12 path=\xff\xfe\n",
    b"10 size=7\n",
]
RECORDS += [b"99 path=a\n", b"-9 path=a\n", b"9 path=a", b"8 path=\n", b"path=a\n", b"25 size=99999999999999999\n"]
RECORDS += [b"25 GNU.sparse.realsize=9\n", b"7 \xff=a\n"]


def archives() -> list[bytes]:
    """Small archives of every form, with long names, folders and links."""
    found = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as out:
            for number, name in enumerate(
                ("a.jpg", "a.json", "f/" + "x" * 90 + ".jpg", *["y" * 130] * (form != tarfile.USTAR_FORMAT))
            ):
                info = tarfile.TarInfo(name)
                info.size = (0, 700, 513, 1024)[number]
                if form == tarfile.PAX_FORMAT:
                    info.pax_headers = {"comment": "ü", "mtime": "1.5"}
                out.addfile(info, io.BytesIO(b"body" * 300))
                for kind, other in ((tarfile.DIRTYPE, "folder/"), (tarfile.SYMTYPE, "link"), (tarfile.LNKTYPE, "hard")):
                    info = tarfile.TarInfo(f"{other}{number}")
                    info.type, info.linkname = kind, "z" * (150 if form != tarfile.USTAR_FORMAT else 20)
                    out.addfile(info)
        found.append(file.getvalue()[: file.tell() // BLOCK * BLOCK + 2 * BLOCK])
    return found


def sealed(header: bytes) -> bytes:
    """The header with the checksum that it ought to have."""
    total = sum(header[:148]) + 8 * 32 + sum(header[156:])
    return header[:148] + b"%06o\0 " % total + header[156:]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """An archive with one to three things wrong that leave most checksums right."""
    blocks = [data[i : i + BLOCK] for i in range(0, len(data), BLOCK)]
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(blocks))
        block, way = bytearray(blocks[at]), rng.randrange(8)
        if way == 0:  # whatever a body or a header may hold
            block[rng.randrange(BLOCK)] ^= 1 << rng.randrange(8)
        elif way == 1:
            place = rng.choice([i for i in range(500) if i not in MAGIC and i not in PREFIX])
            block[place] = rng.randrange(256)
        elif way == 2:
            number = rng.choice(NUMBERS)
            block[124 : 124 + len(number)] = number
        elif way == 3:
            block[156:157] = rng.choice([b"0", b"\0", b"1", b"5", b"7", b"L", b"K", b"x", b"X", b"g", b"S", b"Z", b"D"])
        elif way == 4:
            record = rng.choice(RECORDS)
            block[: len(record)] = record
        elif way == 5:
            blocks.insert(rng.randrange(len(blocks)), bytes(block))
        elif way == 6:
            del blocks[at]
            continue
        else:
            size = rng.choice(RECORDS)  # a whole extended header more
            head = bytearray(blocks[0])
            head[124:136], head[156:157] = b"%011o\0" % len(size), rng.choice([b"x", b"X", b"g", b"L"])
            blocks[at:at] = [sealed(bytes(head)), size.ljust(BLOCK, b"\0")]
            continue
        blocks[at] = sealed(bytes(block)) if way in (1, 2, 3) else bytes(block)
        blocks = blocks or [bytes(BLOCK)]
    joined = b"".join(blocks)
    return joined[: rng.randrange(len(joined) + 1)] if rng.random() < 0.1 else joined


def ours(data: bytes) -> list[Member] | None:
    """The members, or None for a fault.

    Nothing is read twice, in pieces of more than a header may be, or without end.
    """
    reads = 0

    def read(offset: int, count: int) -> bytes:
        nonlocal reads
        reads += 1
        assert 0 <= offset <= len(data) and 0 <= count <= HEADER_BYTES + BLOCK
        assert reads <= 2 * len(data) // BLOCK + 2, "it loops"
        return data[offset : offset + count]

    try:
        return list(members(read, len(data)))
    except TarFault:
        return None


class _Bounded(io.BytesIO):
    """Python 3.11's tarfile goes back by negative sizes, for ever."""

    reads = 0

    def read(self, *args: Any) -> bytes:
        self.reads += 1
        if self.reads > 5000:
            raise OSError("no end")
        return super().read(*args)


def theirs(data: bytes) -> list[tuple[str, int, int, int]] | None:
    """The same by tarfile, None where it raises whatever it raises, or stops at a header that it cannot read without a
    word.
    """
    try:
        with tarfile.open(fileobj=_Bounded(data), mode="r:", encoding="utf-8") as tar:
            found = [(_name(m.name), m.offset, m.offset_data, m.size) for m in tar if m.isfile()]
            return found if data[tar.offset :][:BLOCK] == bytes(BLOCK) else None
    except Exception:
        return None


def _name(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def compare(count: int, seed: int) -> tuple[int, int]:
    """How many mutated archives both read, and how many we refuse."""
    rng, sound = random.Random(seed), archives()
    both = refused = 0
    for _ in range(count):
        data = mutated(rng.choice(sound), rng)
        mine = ours(data)
        if mine is None:
            refused += 1
        elif (reference := theirs(data)) is not None:
            both += 1
            assert [tuple(m) for m in mine] == reference
    return both, refused


def test_mutated_archives_are_refused_or_read_as_tarfile_reads_them() -> None:
    assert all([tuple(m) for m in ours(data) or ()] == theirs(data) for data in archives())
    both, refused = compare(2000, seed=0)
    assert both > 300 and refused > 300


@pytest.mark.slow
def test_many_more_mutated_archives() -> None:
    assert compare(100_000, seed=1)[0] > 15_000
