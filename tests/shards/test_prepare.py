"""Caption tables joined with images: the published forms, what is left out and why, work that is cut off and
continued.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

import cosmos_ssl
from cosmos_ssl.cli import main
from cosmos_ssl.data import open_shards
from cosmos_ssl.data.captions import DREAMLIP_FIELDS
from cosmos_ssl.data.dataset import Shards
from cosmos_ssl.errors import EXIT_DONE, EXIT_LOST, EXIT_USER, DataError, UserError
from cosmos_ssl.shards.check import check_shards
from cosmos_ssl.shards.prepare import Counts, Preparation, PrepareOptions
from cosmos_ssl.shards.prepare.sentences import sentences, split_careful, split_published

WriteTar = Callable[..., Path]
Parts = Callable[[int], dict[str, bytes]]


def picture(number: int, side: int = 32) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)).save(buffer, "jpeg")
    return buffer.getvalue()


def url(number: int) -> str:
    return f"https://example.com/{number}.jpg?w=600&h={number}"


@pytest.fixture
def images(tmp_path: Path, tar: WriteTar) -> Callable[..., list[Path]]:
    """Shards as img2dataset writes them: jpg, json with url and key, txt; a parquet and stats beside.

    Images by number.
    """

    def make(*numbers: Sequence[int], folder: str = "images") -> list[Path]:
        found = []
        for shard, members in enumerate(numbers):
            samples = []
            for place, number in enumerate(members):
                key = f"{shard:05d}{place:04d}"
                table = {"caption": f"alt {number}", "url": url(number), "key": key, "status": "success", "width": 32}
                samples.append((key, {"jpg": picture(number), "json": json.dumps(table).encode(), "txt": b"alt"}))
            found.append(tar(tmp_path / folder / f"{shard:05d}.tar", samples))
            (tmp_path / folder / f"{shard:05d}_stats.json").write_text("{}")
        return found

    return make


def dreamlip_row(number: int) -> dict[str, str]:
    row = {"Image Path": url(number), "raw_caption": f"raw {number}"}
    return row | {name: f"A {name} of {number}. It is good.\nTwo lines</s>" for name in DREAMLIP_FIELDS[1:]}


def write_csv(path: Path, rows: Sequence[Mapping[str, str]], columns: Sequence[str] | None = None) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns or list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_folder(root: Path, numbers: Sequence[int]) -> Path:
    for number in numbers:
        path = root / f"{number % 3}" / f"im.{number}.JPG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    return root


def prepare(
    tables: Sequence[Path], images: Sequence[Path], output: Path, schema: str = "dreamlip", **options: Any
) -> Counts:
    resume, missing = options.pop("resume", False), options.pop("missing", None)
    made = PrepareOptions(
        schema=schema, tables=list(map(str, tables)), images=list(map(str, images)), output=output, **options
    )
    return Preparation(made).run(resume=resume, missing=missing)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def tables_of(folder: Path) -> dict[str, dict[str, Any]]:
    """JSON of each sample by its URL or image, read by Python's own tar reader."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive.getmembers():
                if member.name.endswith(".json"):
                    table = json.load(archive.extractfile(member))  # type: ignore[arg-type]
                    assert member.name == f"{table['key']}.json"
                    found[table.get("url") or table["image"]] = table
    return found


# ---------------------------------------------------------------------------- sentences


def test_the_published_rule_cuts_at_every_full_stop() -> None:
    assert split_published("A 2.5 m wall. Red\n\nblue</s>. ") == ["A 2", "5 m wall", "Red", "blue"]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("A 2.5 m wall. It is red.", ["A 2.5 m wall", "It is red"]),
        ("Dr. Smith and Mr. J. Doe wave. They smile.", ["Dr. Smith and Mr. J. Doe wave", "They smile"]),
        ("Dogs, cats, etc. play at 5 p.m. today. Then rain.", ["Dogs, cats, etc. play at 5 p.m. today", "Then rain"]),
        ("Made in the U.S. The end.", ["Made in the U.S", "The end"]),
        (
            'He says "no." Then he goes. See example.com for more.',
            ['He says "no', "Then he goes", "See example.com for more"],
        ),
        ("Wait... what? One\ntwo</s>three.", ["Wait", "what? One", "two", "three"]),
        ("Shirt No. 7 is vitamin C. The next.", ["Shirt No. 7 is vitamin C", "The next"]),
    ],
)
def test_the_careful_rule_knows_numbers_and_abbreviations(text: str, pieces: list[str]) -> None:
    found = [piece.replace('" Then', "Then") for piece in split_careful(text)]
    assert [piece.lstrip('" ') for piece in found] == [piece.lstrip('" ') for piece in pieces]


@pytest.mark.parametrize("value", [["A cat", "a dog", " "], '["A cat", "a dog"]', "['A cat', 'a dog']"])
def test_lists_are_taken_as_they_are(value: Any) -> None:
    assert sentences(value, split_published) == (["A cat", "a dog"], True)


def test_brackets_in_text_are_no_list() -> None:
    assert sentences("[A cat. b]", split_published) == (["[A cat", "b]"], False)
    assert sentences(None, split_published) == ([], False)


# ---------------------------------------------------------------------------- the published forms


def test_dreamlip_joins_by_url_and_writes_seven_lists(images: Callable[..., list[Path]], tmp_path: Path) -> None:
    shards = images([3, 1, 4], [15, 9, 2])
    table = write_csv(tmp_path / "t.csv", [dreamlip_row(n) for n in range(12)])
    counts = prepare([table], shards, tmp_path / "out", samples_per_shard=2)
    assert (counts.rows, counts.images, counts.matched, counts.samples, counts.shards) == (12, 6, 5, 5, 3)
    assert (counts.rows_without_image, counts.images_without_row, counts.bad) == (7, 1, {})
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()) == {
        "train-0000.tar": 2,
        "train-0001.tar": 2,
        "train-0002.tar": 1,
    }
    read = Shards(f"{tmp_path}/out/train-*.tar", caption_schema="dreamlip", full=True)
    assert [read.read(i).extras["json"]["url"] for i in range(5)] == [url(n) for n in (3, 1, 4, 9, 2)]
    for index, number in enumerate((3, 1, 4, 9, 2)):
        sample = read.read(index)
        assert sample.image == picture(number), "the bytes of the picture are kept"
        assert list(sample.captions) == list(DREAMLIP_FIELDS)
        assert sample.captions["raw_caption"] == [f"raw {number}"]
        assert sample.captions["longSV_captions"] == [f"A longSV_captions of {number}", "It is good", "Two lines"]
        assert all(isinstance(sample.extras["json"][name], list) for name in DREAMLIP_FIELDS)
    assert not any(report.faults for report in check_shards(f"{tmp_path}/out/*.tar", captions="dreamlip"))
    assert not (tmp_path / "out" / ".work").exists()


def test_parquet_gives_what_csv_gives_with_any_number_of_workers(
    images: Callable[..., list[Path]], tmp_path: Path
) -> None:
    images(range(40), range(40, 70))
    rows = [dreamlip_row(n) for n in range(0, 80, 2)]
    prepare([write_csv(tmp_path / "t.csv", rows)], [tmp_path / "images"], tmp_path / "a", samples_per_shard=7)
    for part in (0, 1):
        half = rows[part * 20 : part * 20 + 20]
        columns = {name: pa.array([r[name] for r in half]) for name in rows[0]}
        columns["shortSV_captions"] = columns["shortSV_captions"].dictionary_encode()
        parquet.write_table(pa.table({"other": range(20), **columns}), tmp_path / f"t-{part}.parquet", row_group_size=6)
    prepare([tmp_path / "t-*.parquet"], [tmp_path / "images" / "*.tar"], tmp_path / "b", samples_per_shard=7, workers=3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != {}


def test_pixelprose_keeps_the_alt_text_whole(images: Callable[..., list[Path]], tmp_path: Path) -> None:
    columns = {
        "uid": ["a", "b"],
        "url": [url(0), url(1)],
        "original_caption": ["St. Mary's, 2.5 km. Buy now", ""],
        "vlm_caption": ["This image displays: a church. It is old.", "A dog."],
        "toxicity": [0.1, 0.2],
    }
    parquet.write_table(pa.table(columns), tmp_path / "p.parquet")
    prepare([tmp_path / "p.parquet"], images([0, 1]), tmp_path / "out", "pixelprose")
    read = Shards(f"{tmp_path}/out/*.tar", caption_schema="pixelprose")
    assert read.read(0).captions == {
        "original_caption": ["St. Mary's, 2.5 km. Buy now"],
        "caption": ["This image displays: a church", "It is old"],
    }
    assert read.read(1).captions == {"caption": ["A dog"]}
    assert open_shards(f"{tmp_path}/out/*.tar").read(0).extras["json"]["original_caption"] == [
        "St. Mary's, 2.5 km. Buy now"
    ]


def test_any_table_and_a_folder(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "img", range(9))
    (root / ".hidden.jpg").write_bytes(picture(3))
    (root / "0" / "back").symlink_to(root)
    paths = [f"{n % 3}/im.{n}.JPG" for n in range(9)]
    paths[1], paths[2] = f"./{paths[1]}", str(root.absolute() / paths[2])
    rows = [
        {"file": p, "short": f"Short {i}", "long one": f"A {i} m wall e.g. red. Ok {i}.", "url": url(i)}
        for i, p in enumerate(paths)
    ]
    table = write_csv(tmp_path / "t.tsv", rows[:7])
    table.write_text(table.read_text().replace(",", "\t"))
    columns = {"caption_columns": ["short", "long one"], "image_column": "file"}
    counts = prepare([table], [root], tmp_path / "out", "captions", name="my-set", **columns)
    assert (counts.samples, counts.images, counts.images_without_row) == (7, 9, 2)
    found = tables_of(tmp_path / "out")
    assert {t["image"] for t in found.values()} == set(paths[:7])
    assert found[url(4)]["long one"] == ["A 4 m wall e.g. red", "Ok 4"] and found[url(4)]["short"] == ["Short 4"]
    assert (tmp_path / "out" / "my-set-0000.tar").is_file()


# ---------------------------------------------------------------------------- what is left out


def test_bad_images_are_counted_by_reason(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "img", [0])
    whole = picture(1, 200)
    gif = io.BytesIO()
    Image.new("L", (4, 4)).save(gif, "gif")
    bad = {"cut.jpg": whole[: len(whole) // 2], "page.jpg": b"<!DOCTYPE html><p>gone", "none.jpg": b""}
    bad |= {"a.gif": gif.getvalue(), "t.txt": b"text"}
    for name, body in (bad | {"huge.jpg": picture(2, 65), "png.jpg": b"\x89PNG\r\n\x1a\n" + b"broken"}).items():
        (root / name).write_bytes(body)
    os.mkfifo(root / "pipe.jpg")
    rows = [{"image": name, "a": "x"} for name in ("0/im.0.JPG", *bad, "huge.jpg", "png.jpg", "nowhere.jpg", " ")]
    options: dict[str, Any] = {"caption_columns": ["a"], "max_pixels": 64 * 64, "missing": tmp_path / "missing.tsv"}
    counts = prepare(
        [write_csv(tmp_path / "t.csv", rows)],
        [root],
        tmp_path / "out",
        "captions",
        **options | {"max_pixels": 64 * 1000},
    )
    assert counts.bad == {"not a picture": 3, "undecodable": 2, "other format": 1, "names no image": 1}
    counts = prepare([tmp_path / "t.csv"], [root], tmp_path / "o2", "captions", **options, decode=False)
    assert counts.bad == {"not a picture": 3, "too large": 2, "undecodable": 1, "other format": 1, "names no image": 1}
    assert counts.samples == 1 and counts.rows_without_image == 1
    assert "begins '<!DOCTYPE html><p>gone'" in (tmp_path / "missing.tsv").read_text()
    listed = [line.split("\t") for line in (tmp_path / "missing.tsv").read_text().splitlines()]
    assert ["row", "nowhere.jpg", "no image"] in listed and ["image", "pipe.jpg", "no row"] in listed
    assert sum(line[0] == "sample" for line in listed) == 7


CSV = b'''image,a,b
1.jpg,good one,x
2.jpg,"never closed,x
3.jpg,good three,x
4.jpg,"two
lines, ""quoted""",x
5.jpg,too,many,x
6.jpg,\xff\xfe,x
7.jpg,a 5" pipe,x

8.jpg,few
9.jpg,"closed" late,x
10.jpg,,
11.jpg,"the end"",x
12.jpg,good twelve,x'''


def test_a_broken_row_costs_itself_alone(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(CSV)
    (tmp_path / "img").mkdir()
    for number in range(1, 13):
        (tmp_path / "img" / f"{number}.jpg").write_bytes(picture(number))
    counts = prepare([tmp_path / "t.csv"], [tmp_path / "img"], tmp_path / "out", "captions", caption_columns=["a", "b"])
    found = tables_of(tmp_path / "out")
    assert sorted(found) == sorted(f"{n}.jpg" for n in (1, 3, 4, 7, 12))
    assert found["4.jpg"]["a"] == ["two", 'lines, "quoted"'] and found["7.jpg"]["a"] == ['a 5" pipe']
    assert counts.bad == {"broken quoting": 3, "wrong number of fields": 2, "not UTF-8": 1, "no caption": 1}
    assert (
        counts.examples["broken quoting"] == "t.csv:3, t.csv:12, t.csv:14" and counts.examples["not UTF-8"] == "t.csv:8"
    )
    assert counts.rows == 12


def test_parquet_strings_that_are_no_utf8(images: Callable[..., list[Path]], tmp_path: Path) -> None:
    raw = pa.Array.from_buffers(pa.string(), 2, pa.array([b"good.", b"\xff\xfe"], pa.binary()).buffers())
    parquet.write_table(pa.table({"url": [url(0), url(1)], "a": raw}), tmp_path / "p.parquet")
    counts = prepare([tmp_path / "p.parquet"], images([0, 1]), tmp_path / "out", "captions", caption_columns=["a"])
    assert counts.bad == {"not UTF-8": 1} and counts.samples == 1


def test_lists_and_repeats_are_counted(images: Callable[..., list[Path]], tmp_path: Path) -> None:
    columns = {
        "url": [url(0), url(1), url(0)],
        "a": pa.array([["A. B", "C"], ["D"], ["later"]]),
        "b": ["x", '["y. z"]', "w"],
    }
    parquet.write_table(pa.table(columns), tmp_path / "p.parquet")
    counts = prepare(
        [tmp_path / "p.parquet"], images([0, 1], [1, 0]), tmp_path / "out", "captions", caption_columns=["a", "b"]
    )
    found = tables_of(tmp_path / "out")
    assert found[url(0)]["a"] == ["A. B", "C"] and found[url(1)]["b"] == ["y. z"]
    assert counts.listed == {"a": 2, "b": 1}
    assert (counts.rows_repeated, counts.images_repeated, counts.samples) == (1, 2, 2)


def test_careful_sentences(images: Callable[..., list[Path]], tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", [{"url": url(0), "a": "A 2.5 m wall. Red."}])
    prepare([table], images([0]), tmp_path / "out", "captions", caption_columns=["a"], rule="careful")
    assert tables_of(tmp_path / "out")[url(0)]["a"] == ["A 2.5 m wall", "Red"]


# ---------------------------------------------------------------------------- mistakes


def test_mistakes_are_told_in_one_line(images: Callable[..., list[Path]], tar: WriteTar, tmp_path: Path) -> None:
    shards = images([0, 1])
    row = dreamlip_row(0)
    table = write_csv(tmp_path / "t.csv", [row])
    short = write_csv(tmp_path / "s.csv", [{"link": url(0), "raw_caption": "x", "longIB_caption": "y"}])
    bare = tar(tmp_path / "bare" / "0.tar", [("a", {"jpg": picture(0), "json": b"{}"})])
    cut = tmp_path / "cut.tar"
    cut.write_bytes(shards[0].read_bytes()[:3000])
    (tmp_path / "x.parquet").write_text("no parquet")
    (tmp_path / "empty").mkdir()
    one: dict[str, Any] = {"caption_columns": ["raw_caption"]}
    empty = tmp_path / "empty"
    other = write_csv(tmp_path / "o.csv", [row | {"Image Path": "https://example.org/"}])
    listed = "link, raw_caption, longIB_caption"
    for words, error, call in [
        (["no column 'shortIB_captions'", listed], UserError, lambda o: prepare([short], shards, o, url_column="link")),
        (
            ["which column holds URLs", "--url-column"],
            UserError,
            lambda o: prepare([short], shards, o, "captions", **one),
        ),
        (
            ["which column holds image paths", "--image-column"],
            UserError,
            lambda o: prepare([short], [empty], o, "captions", **one),
        ),
        (["no column 'urls'", "link"], UserError, lambda o: prepare([short], shards, o, url_column="urls")),
        (["no such file", "q.csv"], UserError, lambda o: prepare([tmp_path / "q.csv"], shards, o)),
        (["no parquet file"], UserError, lambda o: prepare([tmp_path / "x.parquet"], shards, o)),
        (["named twice"], UserError, lambda o: prepare([table, table], shards, o)),
        (["no such shard"], DataError, lambda o: prepare([table], [tmp_path / "9.tar"], o)),
        (["cut short"], DataError, lambda o: prepare([table], [cut], o)),
        (["none of 1 images has a 'url'"], DataError, lambda o: prepare([table], [bare], o)),
        (["not one of 1 rows", "example.org", url(0)], DataError, lambda o: prepare([other], shards, o)),
        (["--samples-per-shard"], UserError, lambda o: prepare([table], shards, o, samples_per_shard=0)),
        (["--caption-columns"], UserError, lambda o: prepare([table], shards, o, "captions")),
        (
            ["'url' is the name of something else"],
            UserError,
            lambda o: prepare([table], shards, o, "captions", caption_columns=["url"]),
        ),
    ]:
        with pytest.raises(error) as caught:
            call(tmp_path / "out")
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert "\n" not in str(caught.value)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_output_is_claimed(images: Callable[..., list[Path]], tmp_path: Path) -> None:
    shards = images([0, 1])
    table = write_csv(tmp_path / "t.csv", [dreamlip_row(0)])

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr("cosmos_ssl.shards.prepare.pipeline.join", stop)
        prepare([table], shards, tmp_path / "out")
    with pytest.raises(UserError, match=r"was begun\. Give another folder or go on with it by --continue"):
        prepare([table], shards, tmp_path / "out")
    with pytest.raises(UserError, match="samples_per_shard: 5000 -> 3"):
        prepare([table], shards, tmp_path / "out", samples_per_shard=3, resume=True)
    counts = prepare([table], shards, tmp_path / "out", resume=True)
    assert counts.samples == 1
    with pytest.raises(UserError, match="is finished"):
        prepare([table], shards, tmp_path / "out")
    assert prepare([table], shards, tmp_path / "out", resume=True) == counts
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    for resume in (False, True):
        with pytest.raises(UserError, match="Give another folder"):
            prepare([table], shards, tmp_path / "mine", resume=resume)


# ---------------------------------------------------------------------------- the command


def command(table: Path, images: Path, output: Path, *more: str) -> list[str]:
    given = ["--table", str(table), "--images", str(images), "--output", str(output), "--caption-columns", "a"]
    return ["data", "prepare", "captions", *given, *more]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_folder(tmp_path / "img", range(6))
    table = write_csv(tmp_path / "t.csv", [{"image": f"{n % 3}/im.{n}.JPG", "a": f"It is {n}."} for n in range(1, 8)])
    out, report, listed = tmp_path / "out", tmp_path / "r.json", tmp_path / "l.tsv"
    assert main(command(table, root, out, "--dry-run", "--list-missing", str(listed))) == EXIT_DONE
    said = capsys.readouterr().out
    assert (
        "7 rows, 6 images: 5 match" in said and "2  rows without an image" in said and "1  images without a row" in said
    )
    assert not out.exists() and sorted(p.name for p in tmp_path.iterdir()) == ["img", "l.tsv", "t.csv"]
    assert listed.read_text().splitlines() == [
        "row\t0/im.6.JPG\tno image",
        "row\t1/im.7.JPG\tno image",
        "image\t0/im.0.JPG\tno row",
    ]
    assert main(command(table, root, out, "--json", str(report), "--workers", "2")) == EXIT_DONE
    said = capsys.readouterr().out
    assert "5 samples in 1 shards" in said and "data.caption_schema=json:a" in said
    told = json.loads(report.read_text())
    assert told["samples"] == 5 and told["bytes"] == sum(path.stat().st_size for path in out.glob("*.tar"))
    assert main(["data", "check", str(out / "*.tar")]) == EXIT_DONE
    assert main(["data", "prepare", "dreamlip", "--table", str(table), "--output", str(out)]) == EXIT_USER
    assert "--images" in capsys.readouterr().err


RUN = "import sys\nfrom cosmos_ssl.cli import main\nsys.exit(main(sys.argv[1:]))"


def test_killed_work_goes_on_and_repeats_nothing(images: Callable[..., list[Path]], tmp_path: Path) -> None:
    images(*(range(n, n + 150) for n in range(0, 600, 150)))
    table = write_csv(tmp_path / "t.csv", [{"url": url(n), "a": f"It is {n}."} for n in range(600)])
    options = ["--samples-per-shard", "20", "--workers", "2"]
    arguments = command(table, tmp_path / "images", tmp_path / "out", *options)
    process = subprocess.Popen([sys.executable, "-c", RUN, *arguments])
    try:
        while len(list((tmp_path / "out").glob("*.tar"))) < 3:
            assert process.poll() is None
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 20
    while mine := [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in _read(p)]:
        assert time.monotonic() < deadline, f"workers outlive the command: {mine}"
        time.sleep(0.01)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert 3 <= len(done) < 30
    for path in done:
        with tarfile.open(path) as archive:
            assert len(archive.getmembers()) == 40, "what bears a shard's name is whole"
    assert main([*arguments, "--continue"]) == EXIT_DONE
    noted = [path for path, at in done.items() if path.stat().st_mtime_ns == at]
    assert len(noted) >= len(done) - 2, "at most the shards whose note was not written yet are made again"
    assert main(command(table, tmp_path / "images", tmp_path / "whole", *options)) == EXIT_DONE
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_full_disk(images: Callable[..., list[Path]], tmp_path: Path) -> None:
    images(range(60))
    table = write_csv(tmp_path / "t.csv", [{"url": url(n), "a": f"It is {n}."} for n in range(60)])
    arguments = command(table, tmp_path / "images", tmp_path / "out", "--workers", "1")
    # files may not grow further
    limited = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))\n{RUN}"
    done = subprocess.run([sys.executable, "-c", limited, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_LOST and done.stderr.count("\n") == 1 and "--continue" in done.stderr, done.stderr
    assert not list((tmp_path / "out").glob("*.tar"))
    assert main([*arguments, "--continue"]) == EXIT_DONE
    assert len(open_shards(f"{tmp_path}/out/*.tar")) == 60


@pytest.mark.parametrize("schema", ["dreamlip", "json:a,b"])
def test_the_outcome_trains(images: Callable[..., list[Path]], tmp_path: Path, schema: str) -> None:
    shards = images(range(24))
    if schema == "dreamlip":
        prepare([write_csv(tmp_path / "t.csv", [dreamlip_row(n) for n in range(24)])], shards, tmp_path / "out")
    else:
        table = write_csv(tmp_path / "t.csv", [{"url": url(n), "a": f"It is {n}. Good.", "b": "x"} for n in range(24)])
        prepare([table], shards, tmp_path / "out", "captions", caption_columns=["a", "b"])
    small = ["model.embed_dim=32", "tokenizer.context_length=24"]
    small += ["augmenters.image.global_crops_size=32", "augmenters.image.local_crops_size=16"]
    small += [
        f"model.image.{key}={value}"
        for key, value in {"width": 64, "layers": 1, "patch_size": 8, "image_size": 32}.items()
    ]
    small += [f"model.text.{key}={value}" for key, value in {"width": 64, "layers": 1, "heads": 1}.items()]
    small += [
        "heads.cross.num_heads=2",
        "loader.workers=0",
        "evaluators=null",
        "training.batch_size=8",
        "training.precision=fp32",
    ]
    small += ["training.device=cpu", "schedule.max_steps=2", "schedule.warmup_steps=1", f"output_dir={tmp_path}/run"]
    small += [f"data.train_data={tmp_path}/out/train-{{0000..0000}}.tar", f"data.caption_schema={schema}"]
    metrics = cosmos_ssl.train("cosmos/vitb16_cc3m.yaml", small)
    assert metrics["loss"] > 0
    shard = tmp_path / "out" / "train-0000.tar"
    body = bytearray(shard.read_bytes())
    shard.touch()
    assert cosmos_ssl.train("cosmos/vitb16_cc3m.yaml", small) == metrics, (
        "the same bytes at another time: the same data, a finished run"
    )
    body[body.index(b"jpg") + 700] ^= 1
    shard.write_bytes(body)
    with pytest.raises(UserError, match=r"belongs to another data set \(data, content: '\w+' -> '\w+'\)"):
        cosmos_ssl.train("cosmos/vitb16_cc3m.yaml", small)
