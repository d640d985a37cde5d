"""What the check says of repeats, and shards without their faults."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cosmos_ssl.cli import main
from cosmos_ssl.data import open_shards
from cosmos_ssl.errors import EXIT_DONE, EXIT_FAULTS, EXIT_USER, UserError
from cosmos_ssl.shards.check import OTHER_CAPTIONS, OTHER_PICTURE, check_shards
from cosmos_ssl.shards.fix import fix_shards, fixed_folder

Make = Callable[..., str]


def faulty(number: int, members: dict[str, bytes]) -> None:
    if number == 1:
        members["png"] = b"no picture"
    if number == 2:
        members["json"] = json.dumps(
            {"raw_caption": "One. Two.", "longIB_captions": ["kept. whole"], "other": 3}
        ).encode()
    if number == 3:
        members["json"] = b"{}"


def test_fix_writes_what_is_good_beside(shards: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = shards(6, 4, change=faulty)
    first, second = tmp_path / "shards" / "a-000.tar", tmp_path / "shards" / "a-001.tar"
    with tarfile.open(first) as old, tarfile.open(tmp_path / "shards" / "a-002.tar", "w") as new:
        for member in old.getmembers()[-4:]:  # the last sample again
            new.addfile(member, old.extractfile(member))
    before = first.read_bytes()
    pattern = pattern.replace("001}", "002}")
    assert main(["data", "check", pattern, "--captions", "dreamlip", "--fix"]) == EXIT_FAULTS
    said = capsys.readouterr().out
    for words in (
        "undecodable",
        "captions not in lists",
        "no caption",
        "repeated",
        "sample 0 is sample 5 of a-000.tar",
    ):
        assert words in said
    fixed = tmp_path / "shards-fixed"
    assert f"2 shards, 8 samples in {fixed}" in said and first.read_bytes() == before
    assert (fixed / "a-001.tar").samefile(second), "shards without faults are linked"
    found = open_shards(f"{fixed}/a-00[01].tar".replace("[01]", "{0..1}"))
    assert [found.read(i).key for i in range(8)] == [f"key{n:05d}" for n in (0, 2, 4, 5, 6, 7, 8, 9)]
    table = found.read(1).extras["json"]
    assert table == {"raw_caption": ["One", "Two"], "longIB_captions": ["kept. whole"], "other": 3}
    assert "(1 shards had none)" in said and sorted(p.name for p in fixed.glob("*.tar")) == ["a-000.tar", "a-001.tar"]
    assert main(["data", "check", str(fixed), "--captions", "dreamlip"]) == EXIT_DONE
    with pytest.raises(UserError, match="is finished"):
        fix_shards(pattern, check_shards(pattern, captions="dreamlip"), fixed_folder(pattern), captions="dreamlip")


def test_same_picture_with_other_captions_is_no_repeat(shards: Make) -> None:
    same = shards(1)
    image = open_shards(same).read(0).image or b""

    def change(number: int, members: dict[str, bytes]) -> None:
        members["png"] = image
        if number != 3:
            del members["txt"]
        if number in (1, 2):
            members["json"] = json.dumps({"raw_caption": ["the same"], "key": str(number), "url": str(number)}).encode()

    pattern = shards(4, folder="b", change=change)
    report = check_shards(pattern, captions="dreamlip")[0]
    assert report.faults == {"repeated": 1} and report.notes[OTHER_CAPTIONS] == 2 and report.bad == [2]
    examples = {"repeated": "sample 2 is sample 1 of a-000.tar", OTHER_CAPTIONS: "sample 1 is sample 0 of a-000.tar"}
    found = check_shards(pattern)[0].examples
    assert found | examples == found


def test_equal_keys_of_other_pictures_are_told(
    shards: Make,
    tmp_path: Path,
    tar: Callable[..., Path],
    parts: Callable[[int], dict[str, bytes]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    a = tar(tmp_path / "keys" / "a.tar", [("one", parts(0)), ("two", parts(1)), ("three", parts(2))])
    tar(tmp_path / "keys" / "b.tar", [("two", parts(3)), ("three", parts(2) | {"txt": b"other"}), ("one", parts(0))])
    assert main(["data", "check", str(a.parent), "--json", str(tmp_path / "r.json")]) == EXIT_FAULTS
    said = capsys.readouterr().out
    assert f"no fault, {OTHER_PICTURE}: 1 (b.tar: sample 0 is sample 1 of a.tar)" in said
    assert f"no fault, {OTHER_CAPTIONS}: 1 (b.tar: sample 1 is sample 2 of a.tar)" in said
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["notes"][OTHER_CAPTIONS], report["notes"][OTHER_PICTURE]) == (1, 1) and report["faults"] == {
        "repeated": 1
    }


def test_fix_with_nothing_left(shards: Make, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", shards(2, change=lambda _, members: members.update(png=b"no")), "--fix"]) == EXIT_USER
    assert "no sample is left" in capsys.readouterr().err
