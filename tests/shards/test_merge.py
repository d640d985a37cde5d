"""Sets of shards joined in lists."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cosmos_ssl.cli import main
from cosmos_ssl.data import expand, load_manifest, open_shards
from cosmos_ssl.errors import EXIT_DONE, DataError, UserError
from cosmos_ssl.shards.check import check_shards
from cosmos_ssl.shards.merge import merge_shards

Make = Callable[..., str]


def test_merge_lists_sets_a_whole_number_of_times(shards: Make, tmp_path: Path) -> None:
    a, b = shards(4, 3, folder="a"), shards(5, folder="b")
    path = tmp_path / "all.list"
    counts = merge_shards([[a], [b]], [1, 3], path)
    assert (counts.shards, counts.samples, counts.distinct_shards, counts.distinct_samples) == (5, 22, 3, 12)
    assert (
        counts.fields[0] == counts.fields[1] == ["txt", "raw_caption", "longIB_captions"]
        and counts.common_schema is None
    )
    assert expand(str(path)) == [
        str(tmp_path / n) for n in ("a/a-000.tar", "a/a-001.tar", "b/a-000.tar", "b/a-000.tar", "b/a-000.tar")
    ]
    assert load_manifest(str(path)).sizes.tolist() == [4, 3, 5, 5, 5]
    assert len(check_shards(str(path))) == 3
    read = open_shards(str(path))
    assert read.read(7).key == read.read(12).key == read.read(17).key
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("a", "b", "all.list"):
        (tmp_path / name).rename(moved / name)
    assert expand(str(moved / "all.list"))[0] == str(moved / "a" / "a-000.tar")


def test_lists_tell_mistakes(shards: Make, tmp_path: Path) -> None:
    a = shards(2, folder="a")
    for groups, repeats, path, error, word in [
        ([[a]], [1], "x.txt", UserError, r"end in \.list"),
        ([[a]], [0], "x.list", UserError, "--repeat"),
        ([[a]], [1, 2], "x.list", UserError, "--repeat"),
        ([[a], [a]], [1, 1], "x.list", DataError, "named twice"),
        ([[str(tmp_path / "no-*.tar")]], [1], "x.list", DataError, "no file matches"),
    ]:
        with pytest.raises(error, match=word):
            merge_shards(groups, repeats, tmp_path / path)
    assert not (tmp_path / "x.list").exists()
    with pytest.raises(DataError, match="no such list"):
        expand(str(tmp_path / "no.list"))
    (tmp_path / "e.list").write_text("# nothing\n\n")
    with pytest.raises(DataError, match="names no shard"):
        expand(str(tmp_path / "e.list"))


def test_merge_command(shards: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "data",
        "merge",
        shards(4, folder="a"),
        shards(5, folder="b"),
        "--repeat",
        "2",
        "1",
        "--output",
        str(tmp_path / "m.list"),
    ]
    assert main(command) == EXIT_DONE
    assert "3 shards, 13 samples (2 and 9 without repetition)" in capsys.readouterr().out
    assert main(["data", "index", str(tmp_path / "m.list")]) == EXIT_DONE
    assert "3 shards, 13 samples" in capsys.readouterr().out


def test_merge_tells_other_captions(shards: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def other(number: int, members: dict[str, bytes]) -> None:
        del members["txt"]
        members["json"] = json.dumps(
            {"raw_caption": ["x"], "mine": "A text.", "url": "http://host/x"} if number else {}
        ).encode()

    a, b, c = (
        shards(4, folder="a", change=lambda _, members: members.pop("txt")),
        shards(5, folder="b", change=other),
        shards(2, folder="c"),
    )
    command = ["data", "merge", "--json", str(tmp_path / "m.json"), "--output"]
    assert main([*command, str(tmp_path / "ab.list"), a, b]) == EXIT_DONE
    said = capsys.readouterr().out
    assert f"captions of {a}: raw_caption, longIB_captions\ncaptions of {b}: raw_caption, mine\n" in said
    schema = "json:raw_caption,longIB_captions,mine"
    assert (
        f'"data.caption_schema={schema}"' in said
        and json.loads((tmp_path / "m.json").read_text())["caption_schema"] == schema
    )
    assert (
        main([*command, str(tmp_path / "bc.list"), b, c]) == EXIT_DONE
        and "data.caption_schema=all" in capsys.readouterr().out
    )
