"""Which picture a row is, also where samples were left out; the cache; what embeddings tell; what is refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cosmos_ssl
from cosmos_ssl.api import BadSample, Sample
from cosmos_ssl.errors import DataError, UserError
from cosmos_ssl.models.encoder import ModelEncoder
from cosmos_ssl.search.index import Index
from cosmos_ssl.search.nearest import Plain
from cosmos_ssl.search.opening import Opening, open_index
from cosmos_ssl.search.searcher import Searcher

ROWS = 40


class Left:
    """Samples of which some were left out, as an index of the others sees them."""

    def __init__(self, keys: list[str], gone: set[int]) -> None:
        self.keys, self.gone, self.reads = keys, gone, 0

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> Sample:
        self.reads += 1
        if index in self.gone and index % 2:  # some cannot be read, some only not be decoded
            raise BadSample("unreadable json")
        return Sample(key=self.keys[index], image=b"", captions={"txt": [f"caption {index}"]})

    def describe(self, index: int) -> str:
        return f"shard {index}"

    def identity(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("gone", [set(), {0, 1, 2}, {ROWS - 1}, {3, 4, 9, 10, 11, 12, 30}, set(range(1, ROWS, 2))])
def test_rows_are_their_pictures(gone: set[int]) -> None:
    samples = Left([f"key {number}" for number in range(ROWS)], gone)
    kept = [number for number in range(ROWS) if number not in gone]
    keys = [samples.keys[number] for number in kept]
    index = Index(Plain(np.eye(len(kept), dtype=np.float32)), keys, samples=samples, left_out=len(gone), captions="txt")
    for row, number in enumerate(kept):
        entry = index.entry(row)
        assert (entry.key, entry.file, entry.caption) == (f"key {number}", f"shard {number}", f"caption {number}")


def test_keys_that_repeat_show_no_wrong_picture() -> None:
    """Where samples were left out and keys repeat, a picture may be missing, never be another's."""
    samples = Left([f"key {number // 3}" for number in range(ROWS)], {2, 7, 8})
    kept = [number for number in range(ROWS) if number not in samples.gone]
    index = Index(
        Plain(np.eye(len(kept), dtype=np.float32)),
        [samples.keys[number] for number in kept],
        samples=samples,
        left_out=3,
    )
    for row, number in enumerate(kept):
        entry = index.entry(row)
        assert entry.key == samples.keys[number] and entry.file in (None, f"shard {number}")


def folder_of(path: Path, colours: list[str]) -> Path:
    path.mkdir()
    for number, colour in enumerate(colours):
        Image.new("RGB", (30, 40 + number), colour).save(path / f"{number}.png")
    return path


def rows_of(searcher: Searcher, text: str) -> list[str]:
    hits = searcher.nearest(searcher.words_vector(text), 100)
    return [searcher.index.entry(hit.row).key for hit in hits]


def plain_order(encoder: ModelEncoder, pictures: list[Path], text: str) -> list[str]:
    """Names of files by the cosine of what the model makes of each."""
    said = encoder.encode_text(text)[0]
    scores = [float(encoder.encode_image(encoder.preprocess(path)[None])[0] @ said) for path in pictures]
    return [pictures[n].name for n in np.argsort([-score for score in scores])]


@pytest.mark.usefixtures("own_cache")
def test_a_folder_and_embeddings_of_it_find_the_same(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(tmp_path / "pictures", ["red", "blue", "green", "black"])
    (folder / "1.png").write_bytes(b"no picture")
    encoder = cosmos_ssl.load(run)
    opened = open_index(encoder, [str(folder)], Opening())
    assert "1 of 4 samples left out: undecodable, such as 1.png" in caplog.text
    expected = plain_order(encoder, [folder / f"{n}.png" for n in (0, 2, 3)], "a blue star")
    assert rows_of(Searcher(encoder, opened), "a blue star") == expected
    for name in ("e.npy", "e.parquet"):
        out = tmp_path / name.replace(".", "_") / name
        cosmos_ssl.embed(run, folder, out, dtype="float16" if name == "e.npy" else "float32")
        (out.parent / "other.npy").write_bytes(b"none of ours")
        for engine, given in (("plain", out), ("faiss", out.parent)):
            index = open_index(encoder, [str(given)], Opening(engine=engine))
            assert rows_of(Searcher(encoder, index), "a blue star") == expected
            assert [index.picture(row, "white").height for row in range(3)] == [40, 42, 43]
    caplog.clear()
    shutil.rmtree(folder)
    gone = Searcher(encoder, open_index(encoder, [str(out)], Opening()))
    assert rows_of(gone, "a blue star") == expected and not gone.index.has_pictures
    assert "hits are shown by key" in caplog.text
    with pytest.raises(BadSample):
        gone.index.picture(0, "white")
    moved = folder_of(tmp_path / "moved", ["red", "blue", "green"])
    with pytest.raises(UserError, match=r"--pictures .*not the pictures that were embedded"):
        open_index(encoder, [str(out)], Opening(), pictures=[str(moved)])


@pytest.mark.usefixtures("own_cache")
def test_embeddings_of_texts_and_pictures(run: Path, tmp_path: Path) -> None:
    """Texts of a file that holds both are what is told of pictures, by the same products."""
    encoder, out = cosmos_ssl.load(run), tmp_path / "both.parquet"
    data = [str(run.parent / "scenes" / "val-0000.tar")]
    cosmos_ssl.embed(run, data, out, what="both", texts="raw_caption")
    searcher = Searcher(encoder, open_index(encoder, [str(out)], Opening(texts="raw_caption")))
    assert len(searcher.index) == 24 and searcher.index.entry(3).file == data[0]
    texts = list(dict.fromkeys(searcher.index.texts.texts))  # type: ignore[union-attr]
    scores = (encoder.encode_text(texts) @ encoder.encode_image(
        encoder.preprocess(searcher.index.picture(5, "white"))[None])[0]).tolist()  # fmt: skip
    found = searcher.texts(searcher.vector_of(5), 6)
    assert [score for _, score in found] == pytest.approx(sorted(scores, reverse=True)[:6], abs=1e-5)
    assert len(searcher.texts(searcher.vector_of(5), 10_000)) == len(texts)


KILLED = """
import os, pathlib, signal, sys
from cosmos_ssl.cli import main
from cosmos_ssl.models.encoder import ModelEncoder
encode, cache = ModelEncoder.encode_image, pathlib.Path(os.environ["XDG_CACHE_HOME"])
def watched(self, pixels):
    if len(list(cache.rglob("*.pt"))) >= 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, pixels)
ModelEncoder.encode_image = watched
main(sys.argv[1:])
"""


@pytest.mark.usefixtures("own_cache")
def test_a_killed_search_goes_on(
    command: Callable[..., tuple[int, str, str]], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 while it embeds; the same command embeds the rest alone, and another one nothing at all."""
    argv = ["search", "--checkpoint", str(run), "--data", f"{run.parent}/scenes/val-0000.tar", "--top", "3"]
    argv += ["--text", "a <b>red</b> circle", "--batch-size", "1", "--output", str(tmp_path / "hits")]
    done = subprocess.run([sys.executable, "-c", KILLED, *argv], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    there = len(list((tmp_path / "xdg").rglob("*.pt")))
    assert 3 <= there < 24
    calls: list[int] = []
    encode = ModelEncoder.encode_image
    monkeypatch.setattr(ModelEncoder, "encode_image", lambda self, x: calls.append(len(x)) or encode(self, x))  # type: ignore[func-returns-value]
    code, said, err = command(*argv)
    assert (code, sum(calls)) == (0, 24 - there), err
    assert f"{there} of 24 samples had been embedded before" in err
    picture = tmp_path / "asked.png"
    Image.new("RGB", (20, 20), "red").save(picture)
    assert command(*argv, "--image", str(picture))[0] == 0 and sum(calls) == 24 - there + 1
    rows = json.loads((tmp_path / "hits" / "hits.json").read_text())
    assert [(row["query"], row["rank"]) for row in rows] == [
        *(("a <b>red</b> circle", rank) for rank in (1, 2, 3)),
        *(("asked.png", rank) for rank in (1, 2, 3)),
    ]
    assert said.splitlines()[2].split()[2] == rows[0]["key"] and rows[0]["file"].endswith("val-0000.tar")
    page = (tmp_path / "hits" / "index.html").read_text()
    assert page.count("<img ") == 7 and "<b>red" not in page and 'src="http' not in page


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "{d}"], "--text, --image or --serve: say what to look for"),
        (["--data", "{d}", "--text", " "], "--text: an empty text finds nothing"),
        (["--data", "{t}/none.npy", "--text", "x"], "data: {t}/none.npy: there is no such file"),
        (["--data", "{t}/none", "--text", "x"], "data: "),
        (["--data", "{t}/a.txt", "--text", "x"], "data: {t}/a.txt holds texts"),
        (["--data", "{t}/bad.npy", "--text", "x"], "data: {t}/bad.npy is no file that cosmos-ssl embed has written"),
        (["--data", "{d}", "--text", "x", "--pictures", "{t}"], "--pictures: only for --data that is a file of"),
        (["--data", "{d}", "--text", "x", "--texts", "no"], "--texts no: samples have no such captions. They have: "),
        (["--data", "{d}", "--image", "{t}/bad.npy"], "--image {t}/bad.npy: no picture that can be read"),
        (
            ["--data", "{d}", "--text", "x", "--output", "{t}/a.txt"],
            "--output {t}/a.txt: cannot be written: {t}/a.txt is no folder",
        ),
        (["--data", "{t}/teacher.npy", "--text", "x"], "data: {t}/teacher.npy holds embeddings of {r}/checkpoints/"),
    ],
)
def test_bad_input(
    command: Callable[..., tuple[int, str, str]],
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    """It is found before anything is embedded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "bad.npy").write_bytes(b"no array")
    data = f"{run.parent}/scenes/val-0000.tar"
    if "teacher" in words[1]:
        cosmos_ssl.embed(run, data, tmp_path / "teacher.npy", which="teacher")
    places = {"t": tmp_path, "d": data, "r": run}
    argv = ["search", "--checkpoint", str(run), "--output", str(tmp_path / "hits")]
    code, _, err = command(*argv, *(word.format(**places) for word in words))
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith(message.format(**places)), err
    assert not (tmp_path / "hits").exists() and not [*(tmp_path / "cache").rglob("*.npy")]


def test_texts_alone_are_no_pictures(run: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a\nb\n")
    cosmos_ssl.embed(run, tmp_path / "t.txt", tmp_path / "t.npy")
    with pytest.raises(UserError, match="holds no embeddings of pictures"):
        open_index(cosmos_ssl.load(run), [str(tmp_path / "t.npy")], Opening())
    for name in ("a.npy", "b.npy"):
        cosmos_ssl.embed(run, f"{run.parent}/scenes/val-0000.tar", tmp_path / "two" / name)
    with pytest.raises(DataError, match=r"holds 2 files of embeddings\. Name one"):
        open_index(cosmos_ssl.load(run), [str(tmp_path / "two")], Opening())
