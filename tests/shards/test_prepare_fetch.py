"""Images from their URLs: a stand-in for img2dataset, and a server that fails, stalls, redirects and lies."""

from __future__ import annotations

import csv
import io
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from cosmos_ssl.cli import main
from cosmos_ssl.data import open_shards
from cosmos_ssl.errors import EXIT_DONE, EXIT_LOST, StorageError, UserError
from cosmos_ssl.shards.prepare import fetch
from cosmos_ssl.shards.prepare.fetch import FetchOptions, read_stats

KINDS = ("ok", "moved", "missing", "broken", "stalled", "page")
# What img2dataset 1.47 does with these arguments, in small: names, JSON and stats are its own. It believes what servers
# say of content.
STAND_IN = """
import collections, io, json, os, sys, tarfile, urllib.request
from pyarrow import parquet
options = dict(text.removeprefix("--").split("=", 1) for text in sys.argv[1:])
assert [options[f"{key}_format"] for key in ("output", "input")] == ["webdataset", "parquet"], options
assert options["url_col"] == "url", options
folder = options["output_folder"]
os.makedirs(folder, exist_ok=True)
urls = parquet.read_table(options["url_list"])["url"].to_pylist()
if os.path.exists("FLAG"):
    os.remove("FLAG")
    with open(folder + "/00000.tar", "wb") as file:
        file.write(b"cut")
    sys.exit("the power went")
print("fetching", len(urls))
status = collections.Counter()
with tarfile.open(folder + "/00000.tar", "w") as tar:
    for number, url in enumerate(urls):
        error = ""
        for _ in range(1 + int(options["retries"])):
            try:
                body = urllib.request.urlopen(url, timeout=float(options["timeout"])).read()
                break
            except Exception as caught:
                error = str(caught)
        else:
            status[error] += 1
            continue
        status["success"] += 1
        table = {"url": url, "key": f"{number:09d}", "status": "success"}
        for extension, member in (("jpg", body), ("json", json.dumps(table).encode())):
            info = tarfile.TarInfo(f"{number:09d}.{extension}")
            info.size = len(member)
            tar.addfile(info, io.BytesIO(member))
stats = {"count": len(urls), "successes": status["success"], "status_dict": dict(status)}
with open(folder + "/00000_stats.json", "w") as file:
    json.dump(stats, file)
"""


class Handler(BaseHTTPRequestHandler):
    """Answers by the first part of the path. The first request of a ``broken`` URL breaks off, the second is served."""

    asked: dict[str, int]
    done: threading.Event

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        _, kind, number = self.path.split("/")
        self.asked[self.path] = self.asked.get(self.path, 0) + 1
        if kind == "stalled":
            self.done.wait(20)
            return
        if kind == "missing":
            self.send_error(404)
            return
        if kind == "moved":
            self.send_response(302)
            self.send_header("Location", f"/ok/{number}")
            self.end_headers()
            return
        buffer = io.BytesIO()
        Image.new("RGB", (20, 20), (int(number), 0, 0)).save(buffer, "jpeg")
        body = b"<html>Sorry</html>" if kind == "page" else buffer.getvalue()
        self.send_response(200)
        self.send_header("Content-Type", "image/jpeg")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:10] if kind == "broken" and self.asked[self.path] == 1 else body)


@pytest.fixture
def server() -> Iterator[str]:
    """The root of a server on this machine."""
    handler = type("Own", (Handler,), {"asked": {}, "done": threading.Event()})
    made = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    handler.done.set()  # type: ignore[attr-defined]
    made.shutdown()
    made.server_close()


@pytest.fixture
def table(server: str, tmp_path: Path) -> Path:
    """Three URLs of each kind."""
    with (tmp_path / "t.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["url", "a"])
        writer.writerows(
            [f"{server}/{kind}/{number}", f"{kind} {number}. Yes."] for number in range(3) for kind in KINDS
        )
    return tmp_path / "t.csv"


@pytest.fixture
def stand_in(tmp_path: Path) -> str:
    """Its command; where the file ``power`` lies in the folder it breaks off once."""
    (tmp_path / "stand_in.py").write_text(STAND_IN.replace("FLAG", str(tmp_path / "power")))
    return f"{sys.executable} {tmp_path / 'stand_in.py'}"


def test_fetched_images_are_joined_and_lies_found(
    table: Path, stand_in: str, tmp_path: Path, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        "data",
        "prepare",
        "captions",
        "--table",
        str(table),
        "--caption-columns",
        "a",
        "--output",
        str(tmp_path / "out"),
    ]
    given += [
        "--fetch",
        str(tmp_path / "fetch"),
        "--fetch-command",
        stand_in,
        "--fetch-timeout",
        "1",
        "--fetch-retries",
        "1",
    ]
    (tmp_path / "power").touch()
    assert main(given) == EXIT_LOST
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "the power went" in said and "img2dataset.log" in said
    assert not (tmp_path / "out").exists(), "a shard without stats is not taken for whole"
    assert main(given) == EXIT_DONE
    said = capsys.readouterr().out
    assert "fetched: 12 images of 18 URLs" in said and "HTTP Error 404: Not Found 3" in said and "timed out 3" in said
    assert "6  rows without an image" in said and "3  left out: not a picture" in said and "<html>Sorry" in said
    read = open_shards(f"{tmp_path}/out/*.tar")
    urls = {read.read(i).extras["json"]["url"] for i in range(len(read))}
    assert urls == {f"{server}/{kind}/{n}" for kind in ("ok", "moved", "broken") for n in range(3)}


def test_what_is_there_is_not_fetched_again(table: Path, stand_in: str, tmp_path: Path) -> None:
    options = FetchOptions(folder=tmp_path / "fetch", command=stand_in, timeout=1, retries=0)
    first = fetch([str(table)], None, options, lambda what, done, total: None)
    assert (first.urls, first.images) == (18, 9), "three of each were cut off, missing or stalled"
    again = FetchOptions(folder=tmp_path / "fetch", command="false")
    assert fetch([str(table)], None, again, lambda what, done, total: None) == first
    table.write_text(table.read_text() + "http://127.0.0.1/x,more\n")
    with pytest.raises(UserError, match="other tables or options"):
        fetch([str(table)], None, again, lambda what, done, total: None)


def test_mistakes(table: Path, tmp_path: Path) -> None:
    def run(command: str, column: str | None = None, folder: str = "fetch") -> None:
        fetch(
            [str(table)],
            column,
            FetchOptions(folder=tmp_path / folder, command=command),
            lambda what, done, total: None,
        )

    with pytest.raises(UserError, match="no-such-command cannot be run"):
        run("no-such-command")
    with pytest.raises(StorageError, match=r"exit code 1.*it said nothing"):
        run("false")
    with pytest.raises(StorageError, match="wrote no shard"):
        run("true")
    with pytest.raises(UserError, match="no column 'b'"):
        run("true", "b", "f2")
    with pytest.raises(UserError, match="no URLs in the column 'a'"):
        run("true", "a", "f3")
    (tmp_path / "f4").mkdir()
    (tmp_path / "f4" / "mine").touch()
    with pytest.raises(UserError, match="something else"):
        run("true", None, "f4")


def test_stats_that_are_not_whole_are_left_out(tmp_path: Path) -> None:
    for number, text in enumerate(
        ['{"count": 3, "successes": 2, "status_dict": {"success": 2, "timed out": 1}}', '{"count": 3, "succ']
    ):
        (tmp_path / f"{number:05d}_stats.json").write_text(text)
        (tmp_path / f"{number:05d}.tar").touch()
    (tmp_path / "00002_stats.json").write_text(json.dumps({"count": 1, "successes": 1}))
    found = read_stats(tmp_path)
    assert (len(found.shards), found.urls, found.images, dict(found.failures)) == (1, 3, 2, {"timed out": 1})
