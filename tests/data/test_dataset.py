"""Samples by index, from local shards and through the block cache of remote ones."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from cosmos_ssl.api import BadSample
from cosmos_ssl.data import Shards, open_shards, storage
from cosmos_ssl.errors import DataError

Make = Callable[..., str]


def test_every_sample_is_read_as_written(shards: Make, parts: Any) -> None:
    data = open_shards(shards(3, 4))
    for i in range(7):
        sample = data.read(i)
        assert sample.key == f"key{i:05d}" and sample.image == parts(i)["png"]
        assert sample.captions["txt"] == [f"text {i}"] and sample.captions["longIB_captions"] == [
            f"long {i} a",
            f"long {i} b",
        ]
        assert sample.extras["cls"] == i % 5 and sample.extras["json"]["number"] == i
        assert sample.decode()[:, 0, 0].tolist() == [i, 0, 77]
    assert data.describe(3) == "a-001.tar"


def test_training_reads_only_its_captions(shards: Make) -> None:
    sample = Shards(shards(1), caption_schema="dreamlip").read(0)
    assert list(sample.captions) == ["raw_caption", "longIB_captions"] and dict(sample.extras) == {"cls": 0}


def test_identity_is_of_names_sizes_and_counts(shards: Make, tmp_path: Path) -> None:
    one = Shards(shards(2, 2)).identity()
    assert Shards(shards(2, 2, folder="elsewhere")).identity() == one
    assert Shards(shards(2, 3, folder="third")).identity() != one


def test_pickled_copies_and_threads_read_the_same(shards: Make) -> None:
    data = Shards(shards(30, 30, 30))
    keys = [data.read(i).key for i in range(90)]
    assert [pickle.loads(pickle.dumps(data)).read(i).key for i in (0, 45, 89)] == [keys[i] for i in (0, 45, 89)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda i: data.read(i % 90).key, range(900))) == keys * 10


def test_more_shards_than_open_files(shards: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_OPEN_FILES", 2)
    data = Shards(shards(*[2] * 6))
    assert [data.read(i).key for i in (0, 4, 8, 11, 1, 5)] == [f"key{i:05d}" for i in (0, 4, 8, 11, 1, 5)]


def test_faulty_samples_are_bad_samples(shards: Make) -> None:
    def change(number: int, members: dict[str, bytes]) -> None:
        if number == 0:
            members["json"] = b"{not json"
        if number == 1:
            members["png"] = b"no picture"
        if number == 2:
            members["cls"] = b"a name"

    data = Shards(shards(3, change=change), max_pixels=100)
    with pytest.raises(BadSample, match="unreadable json"):
        data.read(0)
    with pytest.raises(BadSample, match="undecodable"):
        data.read(1).decode()
    with pytest.raises(BadSample, match="too large: 24x24 pixels"):
        data.read(2).decode()
    assert data.read(2).extras["cls"] == "a name"


def test_what_cannot_be_parsed_is_a_bad_sample(shards: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = [
        ("json", b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        ("json", b'{"a": ' + b"9" * 5000 + b"}", "unreadable json"),
        ("json", b" " * (1 << 22) + b"{}", "too large: 4,194,306 bytes of JSON"),
        ("cls", b"--5", "unreadable label: --5"),
        ("cls", b"7" * 5000, "unreadable label: 777"),
        ("JSON", b"{}", "repeated member: key00005 has more than one of"),
    ]

    def change(number: int, members: dict[str, bytes]) -> None:
        if number < len(bad):
            extension, body, _ = bad[number]
            members[extension] = body

    data = open_shards(shards(len(bad) + 1, change=change))
    for number, (_, _, words) in enumerate(bad):
        with pytest.raises(BadSample, match=words):
            data.read(number)
    assert data.read(len(bad)).extras["cls"] == len(bad) % 5
    monkeypatch.setattr("cosmos_ssl.data.dataset._SAMPLE_BYTES", 1000)
    with pytest.raises(BadSample, match=r"too large: at least 4,096 bytes at byte [\d,]+ of a-000\.tar"):
        data.read(len(bad))


def test_what_is_no_caption_is_left_out_where_all_text_is_read(shards: Make) -> None:
    def change(number: int, members: dict[str, bytes]) -> None:
        members["json"] = b'{"mask": "' + b"x" * 2000 + b'", "half": "\\ud83d", "good": "a dog"}'

    assert set(open_shards(shards(1, change=change)).read(0).captions) == {"txt", "good"}


def test_a_shard_that_changes_under_a_run_is_a_storage_error(shards: Make, tmp_path: Path) -> None:
    data = Shards(shards(3))
    data.read(0)
    path = tmp_path / "shards" / "a-000.tar"
    body = path.read_bytes()
    path.write_bytes(body[:1000])
    with pytest.raises(OSError, match=r"a-000\.tar.*byte .* was indexed and is not there .3 attempts"):
        data.read(2)
    path.write_bytes(b"x" * len(body))
    with pytest.raises(OSError, match="has changed since it was indexed"):
        data.read(2)
    path.write_bytes(bytes(len(body)))
    with pytest.raises(OSError, match="has changed since it was indexed"):
        data.read(2)


def test_a_short_failure_is_survived(shards: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Shards(shards(2))
    data.manifest
    calls = []
    pread = storage.os.pread

    def flaky(*args: Any) -> bytes:
        calls.append(args)
        if len(calls) < 3:
            raise OSError(5, "Input/output error")
        return pread(*args)

    monkeypatch.setattr(storage.os, "pread", flaky)
    assert data.read(1).key == "key00001" and len(calls) == 3


def test_prepare_looks_into_the_captions(shards: Make, caplog: pytest.LogCaptureFixture) -> None:
    pattern = shards(2, change=lambda number, members: members.update(json=b'{"raw_caption": "One. Two"}'))
    with caplog.at_level(logging.WARNING, "cosmos_ssl.data"):
        Shards(pattern, caption_schema="dreamlip").prepare()
    assert "'raw_caption' holds strings" in caplog.text
    with pytest.raises(DataError, match="no captions by the schema 'json:mine'"):
        Shards(pattern, caption_schema="json:mine").prepare()
    Shards(pattern, caption_schema=None).prepare()


# ---------------------------------------------------------------------------- remote shards


@pytest.fixture
def remote(shards: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[tuple[int, int]]]:
    """Shards in fsspec's memory, blocks of 4 KiB, and a list of the spans that were asked for."""
    shards(20, 20)
    system = fsspec.filesystem("memory")
    for path in (tmp_path / "shards").glob("*.tar"):
        system.pipe_file(f"/{tmp_path.name}/{path.name}", path.read_bytes())
    requests: list[tuple[int, int]] = []
    cat_file = type(system).cat_file

    def counted(self: Any, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        requests.append((start or 0, end or 0))
        return cat_file(self, path, start=start, end=end, **kwargs)

    monkeypatch.setattr(type(system), "cat_file", counted)
    monkeypatch.setattr(storage, "BLOCK_BYTES", 4096)
    return f"memory://{tmp_path.name}/a-*.tar", requests


def test_remote_shards_come_in_whole_blocks_once(remote: tuple[str, list[tuple[int, int]]], tmp_path: Path) -> None:
    url, requests = remote
    data = Shards(url)
    assert len(data) == 40
    requests.clear()
    assert [data.read(i).key for i in range(40)] == [f"key{i:05d}" for i in range(40)]
    assert all(start % 4096 == 0 for start, _ in requests)
    assert len(requests) <= sum(-(-shard.size // 4096) for shard in data.manifest.shards)
    done = len(requests)
    assert Shards(url).read(7).key == "key00007" and len(requests) == done, "a second run reads from the cache"


def test_the_block_cache_is_bounded(remote: tuple[str, list[tuple[int, int]]], tmp_path: Path) -> None:
    url, _ = remote
    limit = 10 * 4096
    data = Shards(url, cache_dir=str(tmp_path / "cache"), cache_gib=limit / 2**30)
    for i in range(40):
        data.read(i)
        assert sum(p.stat().st_size for p in (tmp_path / "cache" / "blocks").glob("*.block")) <= limit


def test_blocks_that_cannot_be_kept_are_still_read(remote: tuple[str, list[tuple[int, int]]], tmp_path: Path) -> None:
    url, _ = remote
    (tmp_path / "file").write_text("")
    data = Shards(url, cache_dir=str(tmp_path / "file" / "cache"))
    assert data.read(11).key == "key00011"


def test_a_missing_remote_shard_and_an_unknown_protocol() -> None:
    with pytest.raises(DataError, match=r"no such shard: memory://nowhere/a\.tar"):
        Shards("memory://nowhere/a.tar").prepare()
    with pytest.raises(DataError, match=r"nosuch://a\.tar"):
        Shards("nosuch://a.tar").prepare()
