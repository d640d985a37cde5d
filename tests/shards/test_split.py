"""Shards divided into training and held-out ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from cosmos_ssl.cli import main
from cosmos_ssl.data import open_shards
from cosmos_ssl.errors import EXIT_DONE, EXIT_USER, DataError, UserError
from cosmos_ssl.shards.check import check_shards
from cosmos_ssl.shards.split import SplitOptions, is_held_out, split_shards

Make = Callable[..., str]


def quiet(what: str, done: int, total: int) -> None:
    pass


def samples(pattern: str) -> dict[str, bytes]:
    """Image of each sample by key."""
    read = open_shards(pattern)
    found = [read.read(i) for i in range(len(read))]
    assert len({s.key for s in found}) == len(found)
    return {sample.key: sample.image or b"" for sample in found}


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
