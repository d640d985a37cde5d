"""Folders of pictures: what the index finds, when it is made again, how it says no, and what is read."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torchvision.datasets import ImageFolder as Torchvision

from cosmos_ssl.api import BadSample
from cosmos_ssl.cli import main
from cosmos_ssl.data.folder import EXTENSIONS, Folder, folder_notices, picture_folder
from cosmos_ssl.data.folder import content as folder_content
from cosmos_ssl.data.folder import scan as folder_scan
from cosmos_ssl.data.folder.index import FolderIndex
from cosmos_ssl.data.folder.scan import load_folder, scan_folder
from cosmos_ssl.errors import EXIT_DONE, EXIT_FAULTS, EXIT_USER, DataError, UserError
from cosmos_ssl.shards import check as check_module
from cosmos_ssl.shards.check import check_folder


@pytest.fixture(autouse=True)
def _soon_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders are taken for settled after hundredths of a second, not two."""
    for module in (folder_scan, folder_content):
        monkeypatch.setattr(module, "YOUNG", 20_000_000)


def picture(number: int, format: str = "png") -> bytes:
    """A picture whose colour tells its number."""
    buffer = io.BytesIO()
    Image.new("RGB", (24, 20), (number % 256, number // 256, 77)).save(buffer, format)
    return buffer.getvalue()


def settle(root: Path) -> Path:
    """Wait until changes of now can be told from changes to come."""
    time.sleep(0.04)
    return root


def write(root: Path, *names: str) -> Path:
    """Pictures of these names, numbered in this order; other names get no picture's content."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        format = {"jpg": "jpeg", "jpeg": "jpeg", "png": "png", "bmp": "bmp"}.get(name.rpartition(".")[2].lower())
        path.write_bytes(picture(number, format) if format else f"text {number}".encode())
    return settle(root)


ODD = [
    "b/z.png",
    "b/deep/er/y.JPG",
    "a b/ü.png",
    "a/1.jpeg",
    "a/Ω ω.PNG",
    "a/x/2.png",
    "a/10.png",
    "a/.hidden.png",
    "é/q.png",
    "Z/n.bmp",
]


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Classes with spaces, capitals and letters beyond ASCII, nested folders, and all that is left out."""
    (tmp_path / "odd" / "empty").mkdir(parents=True)
    return write(tmp_path / "odd", *ODD, ".git/no.png", "b/notes.md", "texts/readme.txt")


def listed(folder: Folder) -> list[tuple[str, Any]]:
    """Key and number of the class of every picture."""
    samples = [folder.read(i) for i in range(len(folder))]
    return [(s.key, s.extras.get("cls")) for s in samples]


def test_classes_and_order_are_torchvisions(odd: Path) -> None:
    found = Folder(odd)
    keep = lambda path: not Path(path).name.startswith(".") and path.lower().endswith(EXTENSIONS)  # noqa: E731
    (odd / ".git" / "no.png").unlink()
    (odd / ".git").rmdir()  # torchvision takes hidden folders for classes
    reference = Torchvision(str(odd), is_valid_file=keep, allow_empty=True)
    assert list(found.class_names) == reference.classes == ["Z", "a", "a b", "b", "empty", "texts", "é"]
    assert listed(found) == [(os.path.relpath(path, odd), number) for path, number in reference.samples]
    assert len(found) == 9 and found.shard_sizes.tolist() == [9]
    assert found.index.class_sizes().tolist() == [1, 4, 1, 2, 0, 0, 1]


def test_every_picture_is_read_as_written(odd: Path) -> None:
    found = Folder(odd)
    by_key = {sample.key: sample for sample in map(found.read, range(len(found)))}
    for number, name in enumerate(ODD):
        if name != "a/.hidden.png":
            assert by_key[name].image == (odd / name).read_bytes()
            assert by_key[name].extras["class_name"] == name.partition("/")[0] and not by_key[name].captions
            assert abs(int(by_key[name].decode()[0].float().mean()) - number) <= 3
    assert [found.describe(i) for i in (0, 4, 7)] == ["Z", "a/x", "b/deep/er"]
    with pytest.raises(IndexError):
        found.read(9)
    with pytest.raises(IndexError):
        found.read(-1)


def test_a_flat_folder_has_no_classes(tmp_path: Path) -> None:
    root = write(tmp_path / "flat", "b.png", "a.png", "C.png", "aa.png", "sub/notes.md")
    found = Folder(root)
    assert listed(found) == [("C.png", None), ("a.png", None), ("aa.png", None), ("b.png", None)]
    assert not found.class_names and found.describe(0) == "flat" and not found.read(0).extras
    assert folder_notices(found.index) == ["data: 1 files that are no pictures are left out (sub/notes.md)"]


def test_what_is_left_out_is_told(odd: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(odd, "loose.png", "b/broken.gif")
    (odd / "b" / "nowhere.png").symlink_to(tmp_path / "nothing")
    (odd / "b" / "itself.png").symlink_to("itself.png")
    with caplog.at_level(logging.WARNING, "cosmos_ssl.data"):
        Folder(odd, captions=False).prepare()
    told = [record.getMessage() for record in caplog.records]
    assert told[:2] == [
        "data: 1 pictures beside the 7 class folders are left out (loose.png)",
        "data: 2 of 7 class folders hold no picture (empty, texts)",
    ]
    assert told[2].startswith("data: 4 files that are no pictures are left out (b/")
    assert told[2].endswith(", and 1 more)")


def test_pipes_are_no_pictures_and_no_captions(tmp_path: Path) -> None:
    root = write(tmp_path / "odd", "a.png", "b.png", "a.txt")
    os.mkfifo(root / "pipe.png")
    os.mkfifo(root / "b.txt")
    (root / "zero.png").symlink_to("/dev/zero")
    found = Folder(root)
    assert [key for key, _ in listed(found)] == ["a.png", "b.png"]
    assert found.index.notes.texts == 1 and sorted(found.index.notes.other_examples) == [
        "b.txt",
        "pipe.png",
        "zero.png",
    ]
    (root / "b.png").unlink()
    os.mkfifo(root / "b.png")  # since it was listed
    with pytest.raises(BadSample, match="no regular file"):
        found.read(1)


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    folder = write(tmp_path / "raw", "ok/1.png") / os.fsdecode(b"\xff\xfe")
    folder.mkdir()
    (folder / os.fsdecode(b"\xe9.png")).write_bytes(picture(3))
    found = Folder(tmp_path / "raw")
    assert list(found.class_names) == ["ok", r"\xff\xfe"]
    assert found.read(1).key == r"\xff\xfe/\xe9.png" and found.read(1).decode()[0, 0, 0] == 3
    json.dumps(found.read(1).key)


def test_folders_behind_links_count_once(tmp_path: Path) -> None:
    store = write(tmp_path / "store", "cat/1.png", "cat/2.png", "dog/3.png")
    root = write(tmp_path / "subset", "own/4.png")
    (root / "cat").symlink_to(store / "cat")
    (root / "tac").symlink_to(store / "cat")
    (root / "own" / "loop").symlink_to("..")
    (root / "own" / "5.png").symlink_to(store / "dog" / "3.png")
    assert listed(Folder(settle(root))) == [("cat/1.png", 0), ("cat/2.png", 0), ("own/4.png", 1), ("own/5.png", 1)]
    (tmp_path / "link").symlink_to(root)
    assert len(Folder(tmp_path / "link")) == 4


def test_large_folders_are_sorted_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{'ü' * (n % 3)}{n}.png" for n in range(23)]
    root = tmp_path / "many"
    root.mkdir()
    for name in names:
        (root / name).touch()
    monkeypatch.setattr(folder_scan, "_AT_ONCE", 5)
    index = scan_folder(root)
    assert [index.locate(i)[1] for i in range(23)] == sorted(name.encode() for name in names)


# ---------------------------------------------------------------------------- the index and its cache


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were scanned."""
    seen: list[Path] = []
    scan = folder_scan.scan_folder

    def counted(root: Path, *args: Any) -> FolderIndex:
        seen.append(root)
        return scan(root, *args)

    monkeypatch.setattr(folder_scan, "scan_folder", counted)
    return seen


def test_the_index_is_kept_until_something_changes(odd: Path, scans: list[Path]) -> None:
    first, second = load_folder(odd), load_folder(odd)
    assert len(scans) == 1 and first.path == second.path == next((odd.parent / ".cosmos_ssl").glob("folder-*.bin"))
    (odd / "b" / "deep" / "er" / "new.png").write_bytes(picture(5))
    assert len(load_folder(odd)) == 10 and len(scans) == 2
    settle(odd)
    load_folder(odd)
    (odd / "a" / "10.png").rename(odd / "a" / "11.png")
    assert load_folder(odd).digest != first.digest
    settle(odd)
    load_folder(odd)
    times = (odd / "b").stat()
    (odd / "b" / "unpacked.png").write_bytes(picture(5))
    os.utime(odd / "b", ns=(times.st_atime_ns, times.st_mtime_ns))  # as tar does at the end of a folder
    assert len(load_folder(odd)) == 11
    settle(odd)
    load_folder(odd)
    (odd / "é" / "q.png").unlink()
    (odd / "é").rmdir()
    assert len(load_folder(odd).classes) == 6
    assert load_folder(odd, extensions=("bmp",)).path != first.path


def test_a_folder_changed_just_before_it_was_listed_is_listed_again(
    tmp_path: Path, scans: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_scan, "mark_of", lambda found: 1)  # a clock too coarse to tell two changes apart
    monkeypatch.setattr(folder_scan, "YOUNG", 60_000_000_000)
    root = write(tmp_path / "new", "a/1.png")
    load_folder(root)
    (root / "a" / "2.png").write_bytes(picture(2))
    assert len(load_folder(root)) == 2 and len(scans) == 2


def test_processes_that_wait_for_a_scan_take_its_result(
    tmp_path: Path, scans: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_scan, "YOUNG", 60_000_000_000)  # a later start would scan again
    root = write(tmp_path / "new", "a/1.png")
    begun, scan = threading.Barrier(4), folder_scan._fresh

    def fresh(path: Path, root: Path, began: int, full_hash: bool) -> FolderIndex | None:
        found = scan(path, root, began, full_hash)
        if threading.current_thread() not in met:
            met.add(threading.current_thread())
            begun.wait(10)  # all have looked in vain before one holds the lock
        return found

    met: set[threading.Thread] = set()
    monkeypatch.setattr(folder_scan, "_fresh", fresh)
    threads = [threading.Thread(target=load_folder, args=(root,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(scans) == 1


def test_a_moved_folder_is_the_same_data(odd: Path, tmp_path: Path, scans: list[Path]) -> None:
    before = Folder(odd).identity()
    assert before["samples"] == 9
    (tmp_path / "elsewhere").mkdir()
    odd.rename(tmp_path / "elsewhere" / "renamed")
    assert Folder(tmp_path / "elsewhere" / "renamed").identity() == before
    (tmp_path / "elsewhere" / "renamed" / "a" / "10.png").unlink()
    assert Folder(tmp_path / "elsewhere" / "renamed").identity() != before


def test_other_pictures_of_the_same_names_are_other_data(odd: Path, tmp_path: Path, scans: list[Path]) -> None:
    place = odd / "b" / "z.png"
    before, whole, times = Folder(odd).identity(), place.read_bytes(), place.stat()
    for body in (whole[:60] + bytes([whole[60] ^ 1]) + whole[61:], whole + b"\0"):
        place.write_bytes(body)
        os.utime(place, ns=(times.st_atime_ns, times.st_mtime_ns))
        now = Folder(settle(odd)).identity()
        assert now["content"] != before["content"] and now | {"content": ""} == before | {"content": ""}
    place.write_bytes(whole)
    shutil.copytree(odd, tmp_path / "copy")
    assert Folder(settle(odd)).identity() == Folder(tmp_path / "copy").identity() == before
    count = len(scans)
    assert Folder(odd).identity() == before and len(scans) == count


def test_equal_pictures_are_told_by_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check_module, "_PICTURES", 2)
    root = write(tmp_path / "some", *(f"{name}/{n}.png" for name in "ab" for n in range(3)))
    shutil.copy(root / "a" / "2.png", root / "b" / "1.png")
    assert main(["data", "check", str(root)]) == EXIT_DONE
    assert "no fault, picture of an earlier sample: 1 (b: sample 1 is sample 2 of a)" in capsys.readouterr().out


def test_other_captions_are_other_data_where_captions_are_read(tmp_path: Path) -> None:
    root = write(tmp_path / "both", "1.png", "2.png", "1.txt")
    before = [Folder(root, captions=read).identity() for read in (True, False)]
    (root / "1.txt").write_text("other")
    now = [Folder(settle(root), captions=read).identity() for read in (True, False)]
    assert now[0]["captions"] != before[0]["captions"] and now[1] == before[1] and "captions" not in now[1]


def test_what_is_not_looked_at_is_hashed_where_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, most in {"MARKED": 3, "HASHED": 2, "CHUNK": 2}.items():
        monkeypatch.setattr(folder_content, name, most)
    root = write(tmp_path / "many", *(f"{n}.bmp" for n in range(7)), "1.txt")
    before = Folder(root).identity()
    (root / "1.bmp").write_bytes(picture(9, "bmp"))  # of the same size, and neither marked nor hashed
    assert Folder(settle(root)).identity() == before
    assert main(["data", "index", str(root), "--hash"]) == EXIT_DONE and "hash: " in capsys.readouterr().out
    hashed = Folder(root).identity()
    assert {name: hashed[name] for name in before} == before and Folder(root, captions=False).identity()[
        "full_hash"
    ] in hashed["full_hash"]
    (root / "1.bmp").write_bytes(picture(10, "bmp"))
    now = Folder(settle(root)).identity()
    assert now["full_hash"] != hashed["full_hash"] and now | {"full_hash": ""} == hashed | {"full_hash": ""}


def test_where_the_index_lies(odd: Path, tmp_path: Path) -> None:
    assert load_folder(odd, cache_dir=tmp_path / "mine").path.parent == tmp_path / "mine"
    shared = tmp_path / "shared"
    shared.mkdir()
    odd.rename(shared / "odd")
    odd = shared / "odd"
    shared.chmod(0o555)
    assert load_folder(odd).path.is_relative_to(tmp_path / "xdg" / "cosmos_ssl") and list(shared.iterdir()) == [odd]
    (tmp_path / "file").write_text("")
    nowhere = load_folder(odd, cache_dir=tmp_path / "file" / "folder")
    copy = pickle.loads(pickle.dumps(nowhere))
    assert nowhere.path is None and [copy.locate(i) for i in range(9)] == [nowhere.locate(i) for i in range(9)]


def test_pickled_copies_map_the_same_file(odd: Path) -> None:
    found = Folder(odd)
    keys = listed(found)
    packed = pickle.dumps(found)
    assert len(packed) < 2000 and listed(pickle.loads(packed)) == keys
    write(odd, "b/more.png")
    load_folder(odd)
    with pytest.raises(ValueError, match="is of other pictures"):
        pickle.loads(packed)


def test_a_damaged_index_is_made_again(odd: Path) -> None:
    path = load_folder(odd).path
    whole = path.read_bytes()
    flipped = [
        whole[:n] + bytes([whole[n] ^ 1]) + whole[n + 1 :]
        for n in (20, 40, len(whole) // 2, len(whole) - 20, len(whole) - 1)
    ]
    for damage in (b"", b"rubbish", whole[:60], whole[:-8], *flipped):
        path.write_bytes(damage)
        assert len(load_folder(odd)) == 9


# ---------------------------------------------------------------------------- what cannot be used


def test_folders_without_pictures(tmp_path: Path) -> None:
    root = write(tmp_path / "texts", "a/1.gif", "a/1.txt", "train.tar")
    with pytest.raises(
        DataError,
        match=r"no pictures in .*/texts or below it \(looked for \.jpg, .*It holds 2 other files \(train.tar, "
        r"a/1.gif\)",
    ):
        load_folder(root)
    assert len(load_folder(root, extensions=("gif",))) == 1
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match=r"no pictures in .*\.tiff\)\.$"):
        load_folder(tmp_path / "bare")


def test_missing_folders(odd: Path) -> None:
    with pytest.raises(DataError, match=r"/ood does not exist\. Did you mean 'odd'\?"):
        load_folder(odd.parent / "ood")
    with pytest.raises(DataError, match=r"/ood/b/c does not exist\. Did you mean 'odd'\?"):
        load_folder(odd.parent / "ood" / "b" / "c")
    with pytest.raises(DataError, match=r"z\.png is no folder"):
        load_folder(odd / "b" / "z.png")
    with pytest.raises(DataError, match=r"pictures are read from one folder alone, 2 paths are given"):
        picture_folder([str(odd), "a.tar"])
    assert picture_folder("a.tar") is None and picture_folder("s3://x/y") is None and picture_folder([str(odd)]) == odd


def test_unreadable_folders_and_failing_storage(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir
    failures: list[OSError] = []

    def failing(path: Any) -> Any:
        if isinstance(path, bytes) and path.endswith(b"/deep") and failures:
            raise failures.pop()
        return scandir(path)

    monkeypatch.setattr(folder_scan.os, "scandir", failing)
    failures[:] = [PermissionError(13, "Permission denied")]
    with pytest.raises(DataError, match=r"the folder .*/b/deep cannot be read: Permission denied"):
        load_folder(odd)
    failures[:] = [OSError(5, "Input/output error")]
    assert len(load_folder(odd)) == 9, "a short failure is survived"
    failures[:] = [OSError(5, "Input/output error")] * 9
    with pytest.raises(OSError, match=r"/b/deep: Input/output error \(3 attempts\)"):
        scan_folder(odd)


def test_pictures_that_cannot_be_used(tmp_path: Path) -> None:
    root = write(tmp_path / "some", "a/1.png", "a/2.png", "a/3.png")
    (root / "a" / "1.png").write_bytes(b"no picture")
    found = Folder(root, max_pixels=100)
    with pytest.raises(BadSample, match="undecodable"):
        found.read(0).decode()
    with pytest.raises(BadSample, match="too large: 24x20 pixels"):
        found.read(1).decode()
    (root / "a" / "3.png").unlink()
    with pytest.raises(OSError, match=r"a/3\.png: No such file or directory \(3 attempts\)"):
        found.read(2)


@pytest.mark.parametrize("extensions", [[], ["txt"], ["a/b"], ["."]])
def test_extensions_that_are_none(extensions: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^extensions: "):
        Folder("anywhere", extensions=extensions)


def test_extensions_of_ones_own(tmp_path: Path) -> None:
    root = write(tmp_path / "own", "1.png", "2.PNG", "3.jpg")
    assert [key for key, _ in listed(Folder(root, extensions=[".PNG"]))] == ["1.png", "2.PNG"]


# ---------------------------------------------------------------------------- captions, classes of another folder


def test_captions_beside_the_pictures(odd: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DataError, match=r"no captions beside the pictures: looked for those of 9, such as .*/Z/n\.txt"):
        Folder(odd).prepare()  # a text that belongs to no picture is no caption
    (odd / "a" / "10.txt").write_text(" A red fox. In snow.\n")
    (odd / "a" / "1.txt").write_text(" \n")
    found = Folder(odd)
    with caplog.at_level(logging.WARNING, "cosmos_ssl.data"):
        found.prepare()
    assert "9 pictures, only 3 text files" in caplog.text
    captions = {found.read(i).key: found.read(i).captions for i in range(len(found))}
    assert (
        captions["a/10.png"] == {"txt": ["A red fox. In snow."]} and captions["a/1.jpeg"] == captions["b/z.png"] == {}
    )
    quiet = Folder(odd, captions=False)
    quiet.prepare()
    assert not any(quiet.read(i).captions for i in range(9))


def test_numbers_of_another_folders_classes(odd: Path, tmp_path: Path) -> None:
    val = write(tmp_path / "val", "é/1.png", "a/2.png")
    (val / "nobody").mkdir()
    found = Folder(val, classes=Folder(odd).class_names)
    assert listed(found) == [("a/2.png", 1), ("é/1.png", 6)] and len(found.class_names) == 7
    write(val, "a c/3.png")
    with pytest.raises(
        DataError, match=r"/val: the class folder 'a c' is none of the 7 known classes\. Did you mean 'a b'\?"
    ):
        Folder(val, classes=Folder(odd).class_names).read(0)


# ---------------------------------------------------------------------------- commands


def test_check_of_a_folder(odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (odd / "b" / "z.png").write_bytes(b"no picture")
    (odd / "a" / "1.txt").write_text("words")
    monkeypatch.setattr("cosmos_ssl.shards.check._PICTURES", 2)  # several parts a class, several processes
    reports = {report.name: report for report in check_folder(odd, captions="txt")}
    assert reports["a"].faults == {"no caption": 3} and reports["a"].samples == 4
    assert reports["b"].faults == {"undecodable": 1, "no caption": 1} and reports["b"].examples[
        "undecodable"
    ].startswith("b/z.png: ")
    assert reports["texts"].faults == {"empty": 1}
    assert reports["Z"].size == (odd / "Z" / "n.bmp").stat().st_size
    assert [(r.name, r.samples) for r in check_folder(write(tmp_path / "flat", "1.png", "2.png"))] == [("flat", 2)]
    with pytest.raises(UserError, match=r"captions: .*txt, not dreamlip"):
        check_folder(odd, captions="dreamlip")


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path / "data", "a/1.png", "a/2.png", "b/3.png")
    report = tmp_path / "report.json"
    assert main(["data", "index", str(root), "--json", str(report)]) == EXIT_DONE
    assert "3 pictures, 2 class folders, 3 folders in all" in capsys.readouterr().out
    assert json.loads(report.read_text())["by_class"] == [{"name": "a", "samples": 2}, {"name": "b", "samples": 1}]
    assert main(["data", "check", str(root)]) == EXIT_DONE
    assert "2 folders, 3 samples" in (said := capsys.readouterr().out) and "no faults" in said
    (root / "b" / "3.png").write_bytes(b"")
    assert main(["data", "check", str(root), "--json", str(report)]) == EXIT_FAULTS
    assert "FOLDER" in (said := capsys.readouterr().out) and "b/3.png" in said
    assert json.loads(report.read_text())["by_folder"][1]["faults"] == {"undecodable": 1}
    assert main(["data", "check", str(root), str(root / "a")]) == EXIT_USER


def test_progress_is_of_folders_and_parts(odd: Path) -> None:
    steps: list[tuple[int, int]] = []
    load_folder(odd, progress=lambda done, known: steps.append((done, known)))
    assert (
        [done for done, _ in steps] == list(range(1, len(steps) + 1))
        and steps[10] == (11, 11)
        and steps[-1] == (14, 14)
    )
