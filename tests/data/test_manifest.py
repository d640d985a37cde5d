"""The manifest: what it finds, where it is kept, when it is made again, and how it says no."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cosmos_ssl.cli import main
from cosmos_ssl.data import Shards, expand, load_manifest
from cosmos_ssl.data import manifest as manifest_module
from cosmos_ssl.data import scan as scan_module
from cosmos_ssl.data.manifest import notices
from cosmos_ssl.data.storage import filesystem
from cosmos_ssl.errors import BadSample, DataError

Make = Callable[..., str]


def test_expand_knows_braces_lists_and_patterns(shards: Make, tmp_path: Path) -> None:
    pattern = shards(1, 1, 1)
    names = [str(tmp_path / "shards" / f"a-00{i}.tar") for i in range(3)]
    assert (
        expand(pattern)
        == expand(str(tmp_path / "shards" / "*.tar"))
        == expand([names[0], f"{names[1]}::{names[2]}"])
        == names
    )
    assert expand("s3://b/{x,y}-{1..2}.tar") == ["s3://b/x-1.tar", "s3://b/x-2.tar", "s3://b/y-1.tar", "s3://b/y-2.tar"]


@pytest.mark.parametrize(
    ("urls", "words"),
    [("", "no shards are named"), ("nowhere/*.tar", "no file matches"), ("a::a", "named twice"), ("x{a", "braces")],
)
def test_expand_refuses(urls: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        expand(urls)


def test_counts_and_places(shards: Make) -> None:
    found = load_manifest(shards(3, 0, 5))
    assert found.sizes.tolist() == [3, 0, 5] and len(found) == 8
    assert [found.shard_of(i) for i in (0, 2, 3, 7)] == [0, 0, 2, 2]
    assert "1 of 3 shards are empty (a-001.tar)" in notices(found)[0]
    with pytest.raises(IndexError):
        found.locate(8)


def test_pickled_copies_map_the_same_file(shards: Make) -> None:
    found = load_manifest(shards(40, 50))
    copy = pickle.loads(pickle.dumps(found))
    assert len(pickle.dumps(found)) < 1000
    assert [copy.locate(i) for i in range(90)] == [found.locate(i) for i in range(90)]


def _count_scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    scanned: list[str] = []

    def counted(url: str, size: int) -> Any:
        scanned.append(Path(url).name)
        return scan_module.scan(url, size)

    monkeypatch.setattr(manifest_module, "scan", counted)
    return scanned


def test_only_changed_shards_are_scanned_again(
    shards: Make, tmp_path: Path, tar: Callable[..., Path], parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned = _count_scans(monkeypatch)
    pattern = shards(2, 3)
    load_manifest(pattern)
    load_manifest(pattern)
    assert sorted(scanned) == ["a-000.tar", "a-001.tar"]
    tar(tmp_path / "shards" / "a-001.tar", [(f"new{i}", parts(i)) for i in range(7)])
    found = load_manifest(pattern)
    assert scanned[2:] == ["a-001.tar"] and found.sizes.tolist() == [2, 7]


def test_a_moved_folder_keeps_its_manifest(shards: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = shards(2, 3)
    load_manifest(pattern)
    scanned = _count_scans(monkeypatch)
    (tmp_path / "shards").rename(tmp_path / "moved")
    assert len(load_manifest(pattern.replace("/shards/", "/moved/"))) == 5 and not scanned


def test_other_contents_are_another_set_and_copies_the_same(
    shards: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_module, "_SPREAD", 512)  # as of a shard that is too large to be hashed whole
    pattern, path = shards(5, 20), tmp_path / "shards" / "a-001.tar"
    before, times = Shards(pattern).identity(), path.stat()
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        places = [member.offset_data + member.size // 2 for member in archive.getmembers()[::13]]
    for place in places:  # of pictures, tables, texts, labels
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        now = Shards(pattern).identity()
        assert now["content"] != before["content"] and now | {"content": ""} == before | {"content": ""}
    path.write_bytes(whole)
    assert Shards(pattern).identity() == before, "another time alone changes nothing"
    (tmp_path / "copy").mkdir()
    for shard in (tmp_path / "shards").glob("*.tar"):
        (tmp_path / "copy" / shard.name).write_bytes(shard.read_bytes())
    assert Shards(pattern.replace("/shards/", "/copy/")).identity() == before
    filesystem("memory://set/a-000.tar")[0].pipe(
        {f"/set/{p.name}": p.read_bytes() for p in (tmp_path / "copy").glob("*.tar")}
    )
    assert Shards("memory://set/a-{000..001}.tar").identity() == before


def test_every_byte_is_hashed_where_asked_for(
    shards: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scan_module, "_SPREAD", 512)
    monkeypatch.setattr(scan_module, "_HEAD", 64)
    pattern, path = shards(5, 20), tmp_path / "shards" / "a-001.tar"
    assert "full_hash" not in Shards(pattern).identity()
    assert main(["data", "index", pattern, "--hash"]) == 0 and "hash: " in capsys.readouterr().out
    before, manifest = Shards(pattern).identity(), load_manifest(pattern)
    assert [shard.full_hash for shard in manifest.shards] == [
        hashlib.sha256((tmp_path / "shards" / f"a-00{i}.tar").read_bytes()).hexdigest() for i in (0, 1)
    ]
    whole = path.read_bytes()
    path.write_bytes(whole[:700] + bytes([whole[700] ^ 1]) + whole[701:])
    now = Shards(pattern).identity()  # by a scan that hashes the changed shard whole again
    assert now["content"] == before["content"] and now["full_hash"] != before["full_hash"]


def test_other_users_folders_are_left_alone(shards: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = shards(2)
    monkeypatch.setattr(os, "getuid", lambda: (tmp_path / "shards").stat().st_uid + 1)
    found = load_manifest(pattern)
    assert found.path is not None and found.path.is_relative_to(tmp_path / "xdg" / "cosmos_ssl")
    assert [p.name for p in (tmp_path / "shards").iterdir()] == ["a-000.tar"]
    assert load_manifest(pattern, cache_dir=tmp_path / "mine").path == tmp_path / "mine" / found.path.name


def test_a_read_only_folder_falls_back_to_the_cache(shards: Make, tmp_path: Path) -> None:
    pattern = shards(2)
    (tmp_path / "shards").chmod(0o555)
    found = load_manifest(pattern)
    assert found.path is not None and found.path.is_relative_to(tmp_path / "xdg" / "cosmos_ssl")
    assert [p.name for p in (tmp_path / "shards").iterdir()] == ["a-000.tar"]
    assert load_manifest(pattern, cache_dir=tmp_path / "mine").path == tmp_path / "mine" / found.path.name


def test_where_nothing_can_be_written_the_manifest_stays_in_memory(shards: Make, tmp_path: Path) -> None:
    pattern = shards(2)
    (tmp_path / "file").write_text("")
    found = load_manifest(pattern, cache_dir=tmp_path / "file" / "folder")
    assert found.path is None and len(pickle.loads(pickle.dumps(found))) == 2


def test_a_damaged_manifest_is_made_again(shards: Make) -> None:
    pattern = shards(4)
    manifest = load_manifest(pattern)
    places, path = [manifest.locate(n)[1:] for n in range(4)], manifest.path
    assert path is not None
    whole = path.read_bytes()
    flipped = [
        whole[:n] + bytes([whole[n] ^ 1]) + whole[n + 1 :]
        for n in (20, 40, len(whole) // 2, len(whole) - 20, len(whole) - 1)
    ]
    for damage in (b"", b"rubbish", whole[:60], *flipped):
        path.write_bytes(damage)
        made = load_manifest(pattern)
        assert [made.locate(n)[1:] for n in range(len(made))] == places


def test_a_missing_shard_is_named(shards: Make) -> None:
    pattern = shards(1, 1).replace("001}", "004}")
    with pytest.raises(DataError, match=r"no such shard: .*/a-002\.tar \(3 of 5 shards are missing\)"):
        load_manifest(pattern)


@pytest.mark.parametrize("size", [5000, 5120, 4096])  # inside padding, after a member, after a sample
def test_a_cut_shard_is_named(shards: Make, tmp_path: Path, size: int) -> None:
    pattern = shards(5, 5)
    path = tmp_path / "shards" / "a-001.tar"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=rf"1 of 2 shards are cut short or damaged \(a-001\.tar: {size:,} of at least"):
        load_manifest(pattern)


def test_empty_shards_are_named(shards: Make, tmp_path: Path, tar: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"no samples: all 2 shards are empty \(a-000\.tar, a-001\.tar\)"):
        load_manifest(shards(0, 0))
    path = tar(tmp_path / "texts.tar", [("a", {"txt": b"words"})])
    with pytest.raises(DataError, match=r"hold no image"):
        load_manifest(str(path))


def test_sizes_json_is_honoured(shards: Make, tmp_path: Path) -> None:
    pattern = shards(5, 6)
    sizes = tmp_path / "shards" / "sizes.json"
    sizes.write_text(json.dumps({"a-000.tar": 5, "a-001.tar": 6}))
    assert len(load_manifest(pattern)) == 11
    sizes.write_text(json.dumps({"a-000.tar": 5, "a-001.tar": 9}))
    with pytest.raises(DataError, match=r"a-001\.tar holds 6 samples, its sizes\.json says 9 \(1 of 2"):
        load_manifest(pattern)
    sizes.write_text("[1, 2]")
    with pytest.raises(DataError, match=r"sizes\.json is not a table"):
        load_manifest(pattern)


def test_misnamed_members_are_told(tmp_path: Path, tar: Callable[..., Path], parts: Any) -> None:
    sample = parts(0)
    apart = [("a", {"png": sample["png"]}), ("b", sample), ("a", {"json": sample["json"]})]
    found = load_manifest(str(tar(tmp_path / "m.tar", apart)))
    assert len(found) == 2
    lines = notices(found)
    assert "1 keys have no image and are left out (m.tar: a.json)" in lines[0] and "side by side" in lines[0]
    assert "1 images have no captions (m.tar: a.png)" in lines[1]


def test_repeated_names_are_told(tmp_path: Path, tar: Callable[..., Path], parts: Any) -> None:
    found = load_manifest(str(tar(tmp_path / "m.tar", [("a", parts(0)), ("b", parts(1)), ("a", parts(2))])))
    assert len(found) == 3, "each is a sample"
    (line,) = notices(found)
    assert "4 members have the name of an earlier one (m.tar: a.png at byte 8,192, a.json at byte" in line


def test_a_member_beyond_four_gigabytes_stops_nothing(tmp_path: Path, parts: Any) -> None:
    path = tmp_path / "big.tar"
    with path.open("wb") as file:
        for name, size in (("a.png", 10), ("b.png", 5 << 30), ("c.png", 10)):
            info = tarfile.TarInfo(name)
            info.size = size
            file.write(info.tobuf(tarfile.PAX_FORMAT if size > 10 else tarfile.GNU_FORMAT))
            file.seek(-(-size // 512) * 512, 1)  # a hole: nothing is written
        file.truncate(file.tell() + 1024)
    found = load_manifest(str(path))
    assert len(found) == 3 and found.locate(1)[2] == 2**32 - 1 and found.locate(2)[1] > 5 << 30
    with pytest.raises(BadSample, match="too large"):
        Shards(str(path), manifest=found).read(1)


def test_many_shards_are_scanned_by_processes(shards: Make) -> None:
    assert load_manifest(shards(*[1] * 70)).sizes.tolist() == [1] * 70
