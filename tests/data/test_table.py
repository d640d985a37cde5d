"""Tables of pictures and captions by index: every form of a file gives the same samples, what is kept and when it is
made anew, what is no use, and the commands and evaluators that read them.
"""

from __future__ import annotations

import csv
import io
import json
import pickle
import shlex
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from cosmos_ssl.api import BadSample, DataError
from cosmos_ssl.cli import main
from cosmos_ssl.data import TableData, open_shards
from cosmos_ssl.data.table import Columns, is_table
from cosmos_ssl.evaluation.embedding_input import open_samples
from cosmos_ssl.evaluation.samples import EvaluationData

ROWS = 12
COLUMNS = Columns(caption_columns=("caption", "long_caption"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (12, 16, 3), np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "png")
    return file.getvalue()


def rows(count: int = ROWS) -> list[dict[str, Any]]:
    """Paths, a text of two sentences, a list of sentences (none of every third row), and a class."""
    return [
        {
            "path": f"img/{n}.png",
            "caption": f"A square. Number {n}.",
            "long_caption": [f"sentence, {n}", "an\nother"] if n % 3 else [],
            "label": n % 4,
        }
        for n in range(count)
    ]


def write(folder: Path, form: str, count: int = ROWS) -> str:
    """A table in one of the forms, and its pictures."""
    (folder / "img").mkdir(parents=True, exist_ok=True)
    found = rows(count)
    for n in range(count):
        (folder / "img" / f"{n}.png").write_bytes(picture(n))
    path = folder / f"t.{form}"
    if form in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if form == "tsv" else ",")
            writer.writerow(found[0])
            writer.writerows([json.dumps(v) if isinstance(v, list) else v for v in row.values()] for row in found)
    elif form == "jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in found))
    elif form == "saved":
        return saved(folder / "saved", found)
    else:
        if form == "bytes.parquet":
            found = [row | {"path": picture(n)} for n, row in enumerate(found)]
        parquet.write_table(pa.Table.from_pylist(found), path, row_group_size=5)
    return str(path)


def saved(folder: Path, found: list[dict[str, Any]]) -> str:
    """As ``datasets`` 3.6 saves to disk: streams of record batches, and a state that names them."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    folder.mkdir()
    files = [f"data-{n:05d}-of-00002.arrow" for n in range(2)]
    for number, file in enumerate(files):
        part = found[number * 5 :][: 5 if number == 0 else None]
        images = [{"bytes": picture(n + number * 5), "path": None} for n in range(len(part))]
        table = pa.Table.from_pylist([{k: v for k, v in row.items() if k != "path"} for row in part])
        table = table.append_column("image", pa.array(images, kind))
        with pa.OSFile(str(folder / file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": file} for file in files]}))
    (folder / "dataset_info.json").write_text("{}")
    return str(folder)


@pytest.mark.parametrize("form", ["parquet", "csv", "tsv", "jsonl", "bytes.parquet", "saved"])
def test_every_form_gives_the_same_samples(tmp_path: Path, form: str) -> None:
    name = write(tmp_path, form)
    assert is_table(name) and is_table([name])
    data = TableData(name, columns=COLUMNS, texts=True)
    data.prepare()
    assert len(data) == ROWS
    for n, sample in enumerate(data.read(n) for n in range(ROWS)):
        assert sample.image == picture(n) and sample.extras == {}
        wanted = {"caption": ["A square", f"Number {n}"]}
        assert sample.captions == wanted | ({"long_caption": [f"sentence, {n}", "an\nother"]} if n % 3 else {})
    copy, again = pickle.loads(pickle.dumps(data)), TableData(name, columns=COLUMNS, texts=True)
    assert copy.read(7) == data.read(7) and again.identity() == data.identity()
    whole = TableData(name)  # as evaluators read
    assert whole.read(1).captions["caption"] == ["A square. Number 1."]
    assert whole.read(5).extras == {"cls": 1}
    assert TableData(name, columns=Columns(caption_columns=("caption",))).read(0).captions == {
        "txt": ["A square. Number 0."]
    }
    with pytest.raises(IndexError):
        data.read(ROWS)


def test_several_tables_with_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patterns, a root of pictures elsewhere, and columns behind the ``#``."""
    write(tmp_path / "a", "csv", 3)
    write(tmp_path / "b", "csv", 4)
    (tmp_path / "a" / "img").rename(tmp_path / "img")
    for name in ("a", "b"):
        (tmp_path / name / "t.csv").rename(tmp_path / f"{name}.csv")
    told = f"#caption_columns=caption&label_column=&image_root={tmp_path / 'b'}"
    for pattern in ("{a,b}.csv", "?.csv"):
        data = TableData(f"{tmp_path}/{pattern}{told}")
        assert data.shard_sizes.tolist() == [3, 4] and data.describe(3) == "b.csv"
        assert data.read(3).image == picture(0) and data.read(3).captions == {"txt": ["A square. Number 0."]}
        assert data.read(6).extras == {} and data.sources(6)[1] == str(tmp_path / "b" / "img" / "3.png")
    own = Columns(image_column="a b", caption_columns=("c", "d"), image_root="/x&y")
    assert Columns.of(own.address("t.csv").partition("#")[2]) == own
    write(tmp_path / "b", "csv", 4)
    monkeypatch.setattr("cosmos_ssl.data.table.index.YOUNG", 0)
    monkeypatch.setattr("cosmos_ssl.data.table.content.YOUNG", 0)
    training = TableData(str(tmp_path / "b" / "t.csv"), columns=Columns(caption_columns=("caption",)), texts=True)
    assert main(shlex.split(training.index_command)[1:]) == 0 and training.is_indexed


def test_bad_rows_are_bad_samples_that_name_their_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = write(tmp_path, "csv")
    (tmp_path / "img" / "4.png").unlink()
    (tmp_path / "img" / "5.png").unlink()
    (tmp_path / "img" / "5.png").mkdir()
    with Path(name).open("a", newline="") as file:
        file.write(",no path,[],0\nimg/1.png,too few\n\nimg/2.png,good again,,1\n")
    data = TableData(name, columns=COLUMNS, texts=True)
    data.prepare()
    assert "1 rows cannot be used: wrong number of fields" in caplog.text
    began = time.monotonic()
    for row, reason in {4: "missing picture", 5: "no regular file", 12: "no picture", 13: "no picture"}.items():
        with pytest.raises(BadSample, match=rf"{reason}.*row {row + 1} of t.csv"):
            data.read(row)
    assert time.monotonic() - began < 1, "what is not there is not asked for again and again"
    assert data.read(14).captions == {"caption": ["good again"]}
    Path(name).write_text("path,caption,label\nimg/0.png,one,\nimg/1.png,two,cat\n")
    assert [TableData(name).read(row).extras for row in (0, 1)] == [{}, {"cls": "cat"}]
    with pytest.raises(BadSample, match="no label"):
        TableData(name, columns=Columns(label_column="label")).read(0)
    strange = pa.array([b"img/0.png", b"img/1.png"]).view(pa.binary())
    texts = pa.array([b"fine", b"\xff\xfe"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"path": strange.cast(pa.string()), "caption": texts}), tmp_path / "u.parquet")
    data = TableData(str(tmp_path / "u.parquet"), texts=True)
    data.prepare()
    assert data.read(0).captions
    with pytest.raises(BadSample, match=r"not UTF-8.*row 2 of u.parquet"):
        data.read(1)


@pytest.mark.parametrize("form", ["csv", "bytes.parquet", "saved"])
def test_the_index_is_kept_until_something_changes(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("index", "content"):  # what was changed just now is relied on all the same
        monkeypatch.setattr(f"cosmos_ssl.data.table.{module}.YOUNG", 0)
    name = write(tmp_path, form)
    first = TableData(name)
    assert not first.is_indexed
    identity = dict(first.identity())
    assert TableData(name).is_indexed and TableData(name).identity() == identity
    kept = list(tmp_path.rglob(".cosmos_ssl/*"))
    assert {path.suffix for path in kept} == {".bin", ".lock"} | ({".arrow"} if form != "saved" else set())
    if form == "csv":  # another picture of the same name and size, elsewhere
        body = picture(3)
        (tmp_path / "img" / "3.png").write_bytes(body[:-1] + b"x")
        assert not TableData(name).is_indexed
        assert TableData(name).identity()["content"] != identity["content"]
        assert TableData(name).identity()["digest"] == identity["digest"]
        (tmp_path / "img" / "3.png").unlink()
        assert TableData(name).identity()["content"] != identity["content"]
        table = Path(name)
        table.write_text(table.read_text().replace("Number 7", "Number 8"))
        assert TableData(name).identity()["digest"] != identity["digest"]
        assert len(list(tmp_path.rglob(".cosmos_ssl/*.arrow"))) == 1, "rows of before are removed"
    else:
        other = tmp_path / "other"
        other.mkdir()
        assert TableData(write(other, form)).identity() == identity, "copies are the same data"
        assert "full_hash" not in identity
        data = TableData(name)
        data.load(full_hash=True)
        assert len(data.identity()["full_hash"]) == 16 and TableData(name).identity() == data.identity()


def test_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cosmos_ssl.data.cache._first_writable", lambda places: None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    data = TableData(write(tmp_path, "csv"))
    assert len(data) == ROWS
    assert pickle.loads(pickle.dumps(data)).read(2).image == picture(2)
    assert list(tmp_path.glob("cosmos-table-*"))
    del data
    assert not list(tmp_path.glob("cosmos-table-*"))


def test_mistakes(tmp_path: Path) -> None:
    name = write(tmp_path, "csv")

    def fails(match: str, urls: str = name, **options: Any) -> None:
        with pytest.raises(DataError, match=match) as caught:
            TableData(urls, columns=Columns(**options), texts=True).prepare()
        assert "\n" not in str(caught.value)

    columns = r"It has: path, caption, long_caption, label$"
    fails(rf"image_column: t.csv has no column 'pth'\. Did you mean 'path'\? {columns}", image_column="pth")
    fails(rf"caption_columns: t.csv has no column 'captoin'\. Did.*{columns}", caption_columns=("captoin",))
    fails(r"label_column: t.csv has no column 'x'", label_column="x")
    fails(r"image_root: .*/nowhere is no folder", image_root=str(tmp_path / "nowhere"))
    fails(
        rf"not one of {ROWS} pictures is there, such as .*/img/img/0.png \(row 1 of t.csv\)",
        image_root=f"{tmp_path}/img",
    )
    fails(r"t-0.csv does not exist", urls=f"{tmp_path}/t-0.csv")
    fails(r"no file matches", urls=f"{tmp_path}/z*.csv")
    fails(r"read from this machine's files alone", urls="https://example.com/t.csv")
    fails(r"'#imag=x': no 'imag'.*Known: image_column", urls=f"{name}#imag=x")
    (tmp_path / "empty.csv").write_text("path,caption\n")
    fails(r"data: no rows in empty.csv", urls=f"{tmp_path}/empty.csv")
    (tmp_path / "none.csv").write_text("")
    fails(r"none.csv: no CSV file", urls=f"{tmp_path}/none.csv")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no parquet")
    fails(r"bad.parquet: no parquet file", urls=f"{tmp_path}/bad.parquet")
    parquet.write_table(
        pa.Table.from_arrays([pa.array(["x"])] * 3, names=["path", "path", "caption"]), tmp_path / "two.parquet"
    )
    fails(r"two.parquet: 2 columns are called 'path'", urls=f"{tmp_path}/two.parquet")
    none = [{"bytes": None, "path": None}] * 2
    parquet.write_table(pa.table({"image": none, "caption": ["a", "b"]}), tmp_path / "nulls.parquet")
    fails(r"no pictures in any of 2 rows \(column: image\)", urls=f"{tmp_path}/nulls.parquet")
    (tmp_path / "long.csv").write_text(f"path,caption\n{'x' * 300},a\n")
    fails(r"not one of 1 pictures is there, such as .*/x+ \(row 1 of long.csv\)", urls=f"{tmp_path}/long.csv")
    (tmp_path / "bad.jsonl").write_text("no json\n")
    fails(r"bad.jsonl: none of its first lines is a JSON object", urls=f"{tmp_path}/bad.jsonl")
    (tmp_path / "odd.csv").write_text("a,b\n1,2\n")
    fails(r"image_column: which one holds the pictures\? odd.csv has: a, b", urls=f"{tmp_path}/odd.csv")
    fails(r"caption_columns: which ones hold.*odd.csv has: a, b", urls=f"{tmp_path}/odd.csv", image_column="a")
    (tmp_path / "void.csv").write_text("path,caption\nimg/0.png,\n")
    fails(r"no captions in any of 1 rows", urls=f"{tmp_path}/void.csv")
    parquet.write_table(pa.table({"image": [1, 2], "caption": ["a", "b"]}), tmp_path / "numbers.parquet")
    fails(r"image_column: 'image' of numbers.parquet holds int64, neither paths", urls=f"{tmp_path}/numbers.parquet")
    folder = Path(write(tmp_path, "saved"))
    (folder / "data-00001-of-00002.arrow").write_bytes(b"damaged")
    fails(r"data-00001-of-00002.arrow cannot be read as an Arrow file", urls=str(folder))
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    fails(r"splits holds splits: train, test\. Name one, such as .*/splits/train", urls=str(tmp_path / "splits"))


def test_evaluators_and_embeddings_read_tables(tmp_path: Path) -> None:
    name = write(tmp_path, "parquet")
    data = EvaluationData(name)
    data.check(label="cls", texts="caption")
    assert data.samples.read(5).extras["cls"] == 1 and data.class_file is None
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\n")
    assert data.class_file == tmp_path / "classes.txt"
    with pytest.raises(DataError, match=r"have no texts 'txt'\. They have: caption"):
        EvaluationData(name).check(texts="txt")
    EvaluationData(f"{name}#caption_columns=caption").check(texts="txt")
    with pytest.raises(DataError, match=r"^data: .*nothing.csv does not exist"):
        EvaluationData(str(tmp_path / "nothing.csv")).check()
    samples, what = open_samples([name])
    assert len(samples) == ROWS and what == "image" and samples.describe(3) == "t.parquet"
    both = tmp_path / "both"
    both.mkdir()
    (both / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for split, count in (("train", 8), ("test", 7)):
        saved(both / split, rows(count))
    assert len(EvaluationData(str(both)).samples) == 7
    assert len(EvaluationData(str(both), option="train_data").samples) == 8


def test_commands_read_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = write(tmp_path, "csv")
    (tmp_path / "img" / "4.png").unlink()
    (tmp_path / "img" / "6.png").write_bytes(picture(5))
    assert main(["data", "index", name, "--hash", "--json", str(tmp_path / "index.json")]) == 0
    said = capsys.readouterr().out
    assert "1 tables, 12 rows" in said and "pictures path, captions caption, long_caption, labels label" in said
    assert "of every byte" in said and json.loads((tmp_path / "index.json").read_text())["samples"] == ROWS
    assert main(["data", "check", name]) == 3
    said = capsys.readouterr().out
    assert "missing picture" in said and "row 5 of t.csv" in said and "picture of an earlier sample: 1" in said
    (tmp_path / "img" / "4.png").write_bytes(picture(4))
    assert main(["data", "check", name, "--captions", "all"]) == 0
    capsys.readouterr()
    assert main(["data", "check", name, "--fix"]) == 2
    assert "a table can be made into shards by 'data prepare captions'" in capsys.readouterr().err
    assert main(["data", "stats", name]) == 0
    assert f"{ROWS} samples" in capsys.readouterr().out
    lines, out = write(tmp_path, "jsonl"), tmp_path / "out"
    columns = ["--image-column", "path", "--caption-columns", "caption,long_caption"]
    made = ["data", "prepare", "captions", "--table", lines, *columns, "--images", str(tmp_path), "--output", str(out)]
    assert main(made) == 0
    samples = [open_shards(f"{out}/*.tar").read(n) for n in range(ROWS)]
    assert sorted(len(sample.sentences()) for sample in samples) == [2] * 4 + [4] * 8
    page = tmp_path / "show"
    assert main(["data", "show", name, "--config", "quickstart", "--samples", "2", "--output", str(page)]) == 0
    assert (page / "index.html").is_file()
