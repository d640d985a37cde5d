"""What is in shards, in numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cosmos_ssl.api import Spec
from cosmos_ssl.cli import main
from cosmos_ssl.errors import EXIT_DONE
from cosmos_ssl.registry import find, load
from cosmos_ssl.shards.stats import Spread, collect_stats

Make = Callable[..., str]


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
