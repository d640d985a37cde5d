"""Our reading of tar headers agrees with Python's tarfile, in every form it writes."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cosmos_ssl.data.tar import TarFault, members, sample_key

LONG = "folder/" + "x" * 130


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_agree_with_tarfile(tmp_path: Path, tar: Callable[..., Path], form: int) -> None:
    names = ["plain", "dir.with.dot/key", "umläut"] + ([] if form == tarfile.USTAR_FORMAT else [LONG])
    path = tar(
        tmp_path / "x.tar", [(name, {"jpg": b"a" * (700 + i), "txt": b"", "mask.png": b"m" * 512}) for i, name in enumerate(names)], form
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


@pytest.mark.parametrize(("cut", "words"), [(600, "600 of at least"), (1100, "1,100 of at least"), (1800, "1,800 of at least")])
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
