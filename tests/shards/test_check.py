"""The check of whole shards and the commands of ``cosmos-ssl data``."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from cosmos_ssl.api import Spec
from cosmos_ssl.cli import main
from cosmos_ssl.data import Shards, expand, open_shards
from cosmos_ssl.data.folder import load_folder, picture_folder
from cosmos_ssl.errors import EXIT_DONE, EXIT_FAULTS, EXIT_USER, DataError
from cosmos_ssl.shards.check import ONE_COLOUR, TRANSPARENT, check_folder, check_shards
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


def test_transparent_and_one_coloured_pictures_are_counted(
    shards: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(number: int, members: dict[str, bytes]) -> None:
        image = Image.effect_noise((70, 60), 90)
        if number == 1:
            image.putalpha(Image.new("L", image.size, 128))
        if number in (2, 3):
            image = Image.new("LA", (40, 30), (number, 0))
        if number == 4:
            image = Image.new("RGB", (40, 30), "red")
            image.putpixel((33, 5), (255, 0, 1))
        if number == 5:
            image = Image.new("RGB", (1, 50_000), "red")
        file = io.BytesIO()
        image.save(file, "png")
        members["png"] = file.getvalue()

    pattern = shards(4, 2, change=change)
    assert [(r.notes, r.faults) for r in check_shards(pattern)] == [
        ({TRANSPARENT: 3, ONE_COLOUR: 2}, {}),
        ({ONE_COLOUR: 1}, {}),
    ]
    assert main(["data", "check", pattern, "--json", str(tmp_path / "r.json")]) == EXIT_DONE
    told = capsys.readouterr().out
    assert f"no fault, {TRANSPARENT}: 3 (" in told and f"no fault, {ONE_COLOUR}: 3 (" in told
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["notes"], report["by_shard"][0]["notes"][TRANSPARENT]) == ({TRANSPARENT: 3, ONE_COLOUR: 3}, 3)
    assert main(["data", "stats", pattern]) == EXIT_DONE
    assert "3 pictures with transparency" in capsys.readouterr().out
    for number in range(2):
        (tmp_path / "clips").mkdir(exist_ok=True)
        Image.new("LA", (9, 9), (number, 128)).save(tmp_path / f"clips/{number}.png")
    assert [r.notes for r in check_folder(tmp_path / "clips")] == [{TRANSPARENT: 2, ONE_COLOUR: 2}]


def test_pictures_larger_than_pil_likes_are_admitted(shards: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    pattern = shards(2)
    assert not check_shards(pattern)[0].faults
    assert check_shards(pattern, max_pixels=24 * 24 - 1)[0].faults == {"too large": 2}


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
