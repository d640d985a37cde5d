"""Our reading of tar headers agrees with Python's tarfile, in every form it writes."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cosmos_ssl.data.tar import HEADER_BYTES, TarFault, members, sample_key

LONG = "folder/" + "x" * 130


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_agree_with_tarfile(tmp_path: Path, tar: Callable[..., Path], form: int) -> None:
    names = ["plain", "dir.with.dot/key", "umläut"] + ([] if form == tarfile.USTAR_FORMAT else [LONG])
    path = tar(
        tmp_path / "x.tar",
        [(name, {"jpg": b"a" * (700 + i), "txt": b"", "mask.png": b"m" * 512}) for i, name in enumerate(names)],
        form,
    )
    data = path.read_bytes()
    found = list(members(lambda at, count: data[at : at + count], len(data)))
    with tarfile.open(path) as reference:
        expected = [(m.name, m.offset, m.offset_data, m.size) for m in reference if m.isfile()]
    assert [tuple(m) for m in found] == expected


def test_sizes_of_eight_gigabytes_and_more() -> None:
    info = tarfile.TarInfo("big.jpg")
    info.size = 9 << 30
    header = info.tobuf(tarfile.GNU_FORMAT)
    found = list(members(lambda at, count: header[at : at + count], (9 << 30) + 512, whole=False))
    assert found[0].size == 9 << 30


def test_folders_and_links_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as out:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        out.addfile(folder)
        link = tarfile.TarInfo("folder/a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "b.jpg"
        out.addfile(link)
        info = tarfile.TarInfo("folder/b.jpg")
        info.size = 3
        out.addfile(info, io.BytesIO(b"abc"))
    data = path.read_bytes()
    assert [m.name for m in members(lambda at, count: data[at : at + count], len(data))] == ["folder/b.jpg"]


@pytest.mark.parametrize(
    ("cut", "words"), [(600, "600 of at least"), (1100, "1,100 of at least"), (1800, "1,800 of at least")]
)
def test_a_cut_archive_is_told(tmp_path: Path, tar: Callable[..., Path], cut: int, words: str) -> None:
    data = tar(tmp_path / "x.tar", [("a", {"jpg": b"x" * 900, "txt": b"y" * 900})]).read_bytes()[:cut]
    with pytest.raises(TarFault, match=words):
        list(members(lambda at, count: data[at : at + count], len(data)))


def test_what_is_no_tar_file_is_told() -> None:
    page = b"<html>" + b"not found " * 200
    with pytest.raises(TarFault, match="no tar file"):
        list(members(lambda at, count: page[at : at + count], len(page)))


def test_keys_end_at_the_first_dot_of_the_last_part() -> None:
    assert sample_key("a.b/c.mask.PNG") == ("a.b/c", "mask.png")
    assert sample_key("c") == ("c", "")


def record(kind: bytes, body: bytes) -> bytes:
    """An extended header of any kind with any body."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, len(body)
    return info.tobuf(tarfile.USTAR_FORMAT) + body.ljust(-(-len(body) // 512) * 512, b"\0")


def sized(field: bytes) -> bytes:
    """The header of a file whose size is written so."""
    head = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT))
    head[124:136] = field
    head[148:156] = b"%06o\0 " % (sum(head[:148]) + 8 * 32 + sum(head[156:]))
    return bytes(head)


FILE = tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT)
END = bytes(1024)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (sized(b"-0000001000\0"), "the header at byte 512 states no size"),
        (sized(b"zzzzzzzzzzz\0"), "the header at byte 512 states no size"),
        (sized(b"\xff" * 12), "the header at byte 512 states no size"),
        (sized(b"\x80" + b"\xff" * 11), "2,048 of at least 309,485,009,821,345,068,724,782,079 bytes"),
        (record(b"x", b"0 path=a\n") + FILE, "the extended header at byte 512 is malformed"),
        (record(b"x", b"12 size=-512\n") + FILE, "the extended header at byte 512 is malformed"),
        (record(b"x", b"13 size=zzzz\n") + FILE, "the extended header at byte 512 is malformed"),
        (record(b"x", b"99 path=a\n") + FILE, "the extended header at byte 512 is malformed"),
        (record(b"x", b"\xff\xfe") + FILE, "the extended header at byte 512 is malformed"),
        (record(b"x", bytes(HEADER_BYTES + 1)) + FILE, "the extended header at byte 512 would hold 1,048,577 bytes"),
        (record(b"L", bytes(HEADER_BYTES + 1)) + FILE, "the extended header at byte 512 would hold 1,048,577 bytes"),
        (record(b"x", b"22 GNU.sparse.major=1\n") + FILE, "a sparse file at byte 512"),
        (record(b"S", b""), "a sparse file at byte 512"),
        (record(b"g", b"13 path=same\n") + FILE, "the global header at byte 512 gives all files one path"),
        (record(b"L", b"no file"), "damaged at byte 1,536"),
        (END + FILE + END, "more follows its end mark at byte 1,536;"),
    ],
)
def test_what_harms_is_a_fault_with_its_place(data: bytes, words: str) -> None:
    data = FILE + data + END
    with pytest.raises(TarFault, match=re.escape(words)):
        list(members(lambda at, count: data[at : at + count], len(data)))


def test_sizes_beyond_four_gigabytes_by_pax_and_names_that_are_no_utf8() -> None:
    head = record(b"x", b"19 size=9663676416\n" + b"15 path=\xff\xfe.jpg\n" + b"6 \xff=a\n") + FILE
    (found,) = members(lambda at, count: head[at : at + count], len(head) + (9 << 30), whole=False)
    assert found == (r"\xff\xfe.jpg", 0, len(head), 9 << 30)
