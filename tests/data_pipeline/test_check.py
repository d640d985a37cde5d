"""The check of whole shards and the commands of ``cosmos-ssl data``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cosmos_ssl.api import Spec
from cosmos_ssl.cli import main
from cosmos_ssl.data import Shards, expand, open_shards
from cosmos_ssl.data.check import check_shards
from cosmos_ssl.data.folder import load_folder, picture_folder
from cosmos_ssl.errors import EXIT_DONE, EXIT_FAULTS, EXIT_USER, DataError
from cosmos_ssl_plugins.datasets.webdataset import WebDataset

Make = Callable[..., str]


def faulty(number: int, members: dict[str, bytes]) -> None:
    if number == 1:
        members["png"] = b"no picture"
    if number == 2:
        members["json"] = b"[]"
    if number == 3:
        members["json"] = b"{}"
    if number == 4:
        del members["png"]


def test_faults_by_shard_and_reason(shards: Make, tmp_path: Path) -> None:
    pattern = shards(6, 5, 5, change=faulty).replace("002}", "003}")
    cut = tmp_path / "shards" / "a-001.tar"
    cut.write_bytes(cut.read_bytes()[:9000])
    (tmp_path / "shards" / "sizes.json").write_text(json.dumps({"a-000.tar": 6, "a-002.tar": 7}))
    reports = check_shards(pattern, captions="dreamlip")
    assert [r.faults for r in reports] == [
        {"no image": 1, "undecodable": 1, "unreadable json": 1, "no caption": 1},
        {"cut short or damaged": 1},
        {"miscounted": 1},
        {"missing": 1},
    ]
    assert reports[0].samples == 5 and reports[0].examples["no caption"] == "key00003"
    assert reports[1].samples == 2, "what stands before the cut is checked"
    assert "5 samples, sizes.json says 7" in reports[2].examples["miscounted"]


def test_captions_are_checked_when_asked_for(shards: Make) -> None:
    pattern = shards(4, change=lambda number, members: members.pop("json"))
    assert not check_shards(pattern)[0].faults
    assert check_shards(pattern, captions="dreamlip")[0].faults == {"no caption": 4}
    assert check_shards(pattern, max_pixels=10)[0].faults == {"too large": 4}


def test_check_command(shards: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    assert main(["data", "check", shards(5, 3), "--captions", "dreamlip"]) == EXIT_DONE
    assert "2 shards, 8 samples" in (said := capsys.readouterr().out) and "no faults" in said
    assert main(["data", "check", shards(6, change=faulty), "--json", str(report)]) == EXIT_FAULTS
    said = capsys.readouterr().out
    assert "undecodable" in said and "key00001" in said
    assert json.loads(report.read_text())["faults"] == {"no image": 1, "undecodable": 1}
    assert main(["data", "check", shards(2), "--captions", "dreamlib"]) == EXIT_USER
    assert "Did you mean 'dreamlip'" in capsys.readouterr().err


def test_index_command(shards: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = shards(5, 3)
    assert main(["data", "index", pattern, "--json", str(tmp_path / "i.json")]) == EXIT_DONE
    assert "2 shards, 8 samples" in capsys.readouterr().out
    assert [row["samples"] for row in json.loads((tmp_path / "i.json").read_text())["by_shard"]] == [5, 3]
    assert main(["data", "index", pattern.replace("001}", "002}")]) == EXIT_USER
    assert "a-002.tar" in capsys.readouterr().err


def test_scenes_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "data",
        "scenes",
        "--output",
        str(tmp_path / "s"),
        "--train-samples",
        "12",
        "--validation-samples",
        "4",
        "--image-size",
        "16",
    ]
    assert main(command) == EXIT_DONE
    assert f"{tmp_path}/s/train-{{0000..0000}}.tar  (12 samples)" in capsys.readouterr().out
    assert main(["data", "check", str(tmp_path / "s" / "*.tar"), "--captions", "dreamlip"]) == EXIT_DONE


def test_a_folder_of_shards_is_its_shards(shards: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern, folder = shards(5, 3), str(tmp_path / "shards")
    (tmp_path / "shards" / "b-000.parquet").write_text("")
    assert expand(folder) == expand(f"{folder}/") == expand(pattern)
    assert picture_folder(folder) is None and len(open_shards(folder)) == 8
    assert WebDataset(Spec(embed_dim=8), train_data=folder).identity() == Shards(pattern).identity()
    for command in (["index"], ["check"], ["stats", "--captions", "dreamlip"]):
        assert main(["data", *command, folder]) == EXIT_DONE
        assert "2 shards, 8 samples" in capsys.readouterr().out
    (tmp_path / "shards" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "shards" / "deep" / "er" / "1.JPG").write_text("")
    assert picture_folder(folder) == tmp_path / "shards", "pictures beside the archives that they were unpacked from"
    (tmp_path / "none").mkdir()
    assert main(["data", "split", str(tmp_path / "none"), "--output", str(tmp_path / "out")]) == EXIT_USER
    assert f"the folder {tmp_path}/none holds no shards" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"\.tar files may be shards: data\.type=webdataset"):
        load_folder(tmp_path / "shards", extensions=("bmp",))
