"""Lists of shards, held-out samples, fixed shards, statistics."""

from __future__ import annotations

import json
import math
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from cosmos_ssl.api import Spec
from cosmos_ssl.cli import main
from cosmos_ssl.data import expand, load_manifest, open_shards
from cosmos_ssl.errors import EXIT_DONE, EXIT_FAULTS, EXIT_USER, DataError, UserError
from cosmos_ssl.registry import find, load
from cosmos_ssl.shards.check import OTHER_CAPTIONS, OTHER_PICTURE, check_shards
from cosmos_ssl.shards.fix import fix_shards, fixed_folder
from cosmos_ssl.shards.merge import merge_shards
from cosmos_ssl.shards.split import SplitOptions, is_held_out, split_shards
from cosmos_ssl.shards.stats import Spread, collect_stats

Make = Callable[..., str]


def quiet(what: str, done: int, total: int) -> None:
    pass


def samples(pattern: str) -> dict[str, bytes]:
    """Image of each sample by key."""
    read = open_shards(pattern)
    found = [read.read(i) for i in range(len(read))]
    assert len({s.key for s in found}) == len(found)
    return {sample.key: sample.image or b"" for sample in found}


# ---------------------------------------------------------------------------- merge


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


# ---------------------------------------------------------------------------- split


@pytest.mark.parametrize("by", ["content", "key"])
def test_split_is_a_partition(shards: Make, tmp_path: Path, by: Literal["content", "key"]) -> None:
    pattern = shards(40, 60, 50)
    options = SplitOptions(urls=[pattern], output=tmp_path / "out", share=0.2, samples_per_shard=8, by=by)
    counts = split_shards(options, quiet)
    train, val = samples(f"{tmp_path}/out/train-*.tar"), samples(f"{tmp_path}/out/val-*.tar")
    assert train | val == samples(pattern) and not train.keys() & val.keys()
    assert val.keys() == {
        key for key, image in (train | val).items() if is_held_out(image if by == "content" else key.encode(), 0.2)
    }
    assert counts == {
        "train_samples": len(train),
        "train_shards": 3,
        "validation_samples": len(val),
        "validation_shards": -(-len(val) // 8),
    }
    sizes = json.loads((tmp_path / "out" / "sizes.json").read_text())
    assert sum(n for name, n in sizes.items() if name.startswith("val")) == len(val)
    assert not any(report.faults for report in check_shards(f"{tmp_path}/out/*.tar", captions="dreamlip"))


def test_the_share_is_what_was_asked_for() -> None:
    held = sum(is_held_out(b"%09d" % number, 0.05) for number in range(40_000))
    assert abs(held - 2000) < 5 * math.sqrt(2000)
    assert all(is_held_out(b"%d" % n, 0.3) for n in range(1000) if is_held_out(b"%d" % n, 0.1)), (
        "a larger share holds the smaller"
    )


def test_equal_pictures_stay_together(shards: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = shards(15, folder="first")
    images = list(samples(first).values())
    pattern = shards(30, 30, change=lambda number, members: members.update(png=images[number // 4]))
    assert (
        main(["data", "split", str(tmp_path / "shards"), "--share", "0.4", "--output", str(tmp_path / "out")])
        == EXIT_DONE
    )
    train, val = samples(f"{tmp_path}/out/train-*.tar"), samples(f"{tmp_path}/out/val-*.tar")
    assert not set(train.values()) & set(val.values()) and len(train) + len(val) == 60
    assert (
        main(["data", "split", pattern, "--share", "0.4", "--by", "key", "--output", str(tmp_path / "out")])
        == EXIT_USER
    )
    assert (
        main(["data", "split", pattern, "--share", "0.4", "--by", "key", "--output", str(tmp_path / "keys")])
        == EXIT_DONE
    )
    leaking = [set(samples(f"{tmp_path}/keys/{side}-*.tar").values()) for side in ("train", "val")]
    assert leaking[0] & leaking[1]


def test_split_goes_on_where_it_stopped(shards: Make, tmp_path: Path) -> None:
    options = SplitOptions(urls=[shards(30, 30)], output=tmp_path / "out", share=0.3, samples_per_shard=8)

    def stop(what: str, done: int, total: int) -> None:
        if what == "shards written" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        split_shards(options, stop)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    with pytest.raises(UserError, match="--continue"):
        split_shards(options, quiet)
    with pytest.raises(UserError, match='by: "content" -> null'):
        split_shards(replace(options, by="key"), quiet, resume=True)
    counts = split_shards(options, quiet, resume=True)
    assert all(path.stat().st_mtime_ns == at for path, at in before.items()) and len(before) >= 2
    assert counts["train_samples"] + counts["validation_samples"] == 60
    for share in (0.0, 1.0):
        with pytest.raises(UserError, match="--share"):
            SplitOptions(urls=["x"], output=tmp_path, share=share)
    with pytest.raises(DataError, match="leaves one side empty"):
        split_shards(SplitOptions(urls=options.urls, output=tmp_path / "o2", share=1e-9), quiet)


# ---------------------------------------------------------------------------- check and fix


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


# ---------------------------------------------------------------------------- statistics


def test_spread_has_the_percentiles_of_numpy() -> None:
    values = np.random.default_rng(0).integers(0, 1000, 4001)
    spread = Spread(values.tolist())
    found = spread.summary()
    assert found["count"] == 4001 and found["mean"] == pytest.approx(values.mean())
    for level in (0, 5, 50, 95, 100):
        assert found[f"p{level}"] == np.percentile(values, level, method="higher")
    assert spread.share_above(899) == pytest.approx((values > 899).mean())
    assert Spread().summary() == {"count": 0}


def test_stats_count_what_the_tower_would_cut(shards: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = " ".join(["red"] * 90)

    def change(number: int, members: dict[str, bytes]) -> None:
        captions = ["a cat", long] if number % 4 == 0 else ["a cat", "a dog"]
        members["json"] = json.dumps(
            {"raw_caption": captions, "url": "http://host/x", "about": "pictures/1.png", "width": 24}
        ).encode()
        if number == 7:
            members["png"] = b"no picture"

    pattern = shards(12, 8, change=change)
    tokenizer = load(find("tokenizers", "clip"))(Spec(embed_dim=1), context_length=256)
    stats = collect_stats(pattern, captions="dreamlip", tokenizer=tokenizer)
    found = stats.as_json(77)
    assert (stats.samples, stats.looked_at, dict(stats.unusable), dict(stats.formats)) == (
        20,
        20,
        {"undecodable": 1},
        {"PNG": 19},
    )
    assert found["width"]["p50"] == 24 and found["sentences"]["mean"] == 2
    raw = found["fields"]["raw_caption"]
    assert (
        raw["samples"] == 19
        and raw["captions_cut"] == pytest.approx(5 / 19)
        and raw["sentences_cut"] == pytest.approx(5 / 38)
    )
    assert raw["tokens_per_sentence"]["p100"] == 92 and raw["tokens_per_sentence"]["p0"] == 4, (
        "with start and end token"
    )
    assert main(["data", "stats", pattern, "--samples", "5", "--json", str(tmp_path / "s.json")]) == EXIT_DONE
    said = capsys.readouterr().out
    assert "20 samples" in said and "looked at 5" in said and "raw_caption: tokens a sentence" in said
    assert "captions are taken from: txt, raw_caption; not from (bookkeeping, addresses, hashes): url, about\n" in said
    written = json.loads((tmp_path / "s.json").read_text())
    assert written["looked_at"] == 5 and written["left_out"] == {"url": 5, "about": 5}
    assert main(["data", "split", pattern, "--share", "0.4", "--output", str(tmp_path / "out")]) == EXIT_DONE
    assert "val-*.tar" in capsys.readouterr().out
