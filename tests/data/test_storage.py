"""Servers that refuse, stall, forget and say nothing: what is missing is told from what was lost, and nothing is waited
for without end.
"""

from __future__ import annotations

import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cosmos_ssl import build
from cosmos_ssl.build import readiness
from cosmos_ssl.cli import main
from cosmos_ssl.config import load_config
from cosmos_ssl.data import Shards, load_manifest, scan, storage
from cosmos_ssl.data.manifest import is_indexed, notices
from cosmos_ssl.errors import EXIT_FAULTS, EXIT_LOST, EXIT_USER, DataError, StorageError, UserError

Make = Callable[..., str]


class Server(ThreadingHTTPServer):
    """Answers as its path says: ``/500/x.tar``, ``/stall/x.tar``, ``/plain/x.tar`` (no ETag, no time),
    ``/dated/x.tar``.
    """

    body = b""
    failing = 0
    requests = 0


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        self._answer(self.server.body[int(first) : int(last or len(self.server.body)) + 1])

    def _answer(self, body: bytes) -> None:
        self.server.requests += 1
        kind = "404" if self.path.endswith("sizes.json") else self.path.split("/")[1]
        if kind == "stall":
            time.sleep(2)
        if kind == "flaky" and self.server.failing:
            self.server.failing -= 1
            kind = "503"
        code = int(kind) if kind.isdecimal() else 206 if "Range" in self.headers else 200
        self.send_response(code)
        self.send_header("Content-Length", str(len(body) if body else 0 if code >= 400 else len(self.server.body)))
        if kind == "dated":
            self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(shards: Make, tmp_path: Path) -> Iterator[Server]:
    """A server of one shard."""
    shards(4)
    server = Server(("127.0.0.1", 0), _Handler)
    server.body = (tmp_path / "shards" / "a-000.tar").read_bytes()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def url(server: Server, kind: str) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/{kind}/x.tar"


@pytest.mark.parametrize("kind", ["404", "410"])
def test_only_what_the_server_says_is_missing_is_missing(
    server: Server, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "index", url(server, kind)]) == EXIT_USER
    assert "no such shard" in capsys.readouterr().err and server.requests <= 2, "and at once"


@pytest.mark.parametrize(("kind", "words"), [("500", "500"), ("403", "403"), ("stall", "no answer within 0.05 s")])
def test_a_server_that_fails_is_lost_storage(
    server: Server, kind: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "stall":
        monkeypatch.setattr(storage, "REQUEST_SECONDS", 0.05)
    for command in ("index", "check"):
        assert main(["data", command, url(server, kind)]) == EXIT_LOST
        err = capsys.readouterr().err
        assert words in err and "(3 attempts)" in err and "no such shard" not in err


def test_a_run_that_finds_its_storage_lost(server: Server, tmp_path: Path) -> None:
    overrides = [
        "data.type=webdataset",
        f"data.train_data={url(server, '500')}",
        "evaluators=null",
        f"output_dir={tmp_path / 'run'}",
    ]
    loaded = load_config("quickstart", overrides)
    for start in (readiness.make_ready, build.run):
        with pytest.raises(StorageError, match=r"storage fails: http://.*/500/x\.tar: 500.*\(3 attempts\)"):
            start(loaded)


@pytest.mark.parametrize("scheme", ["http", "ftp"])
def test_a_port_where_nobody_listens_is_lost_storage(scheme: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert main(["data", "index", f"{scheme}://127.0.0.1:{taken.getsockname()[1]}/x.tar"]) == EXIT_LOST
    assert "storage fails" in (err := capsys.readouterr().err) and "3 attempts" in err


def test_a_server_that_comes_back_is_waited_for(server: Server) -> None:
    server.failing = 3  # a request of two kinds for a size, and one more
    assert len(load_manifest(url(server, "flaky"))) == 4


def test_an_endpoint_that_never_answers_fails_in_seconds(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default within 20 seconds; one that has answered before is waited for."""
    assert storage.connect_seconds() < 20
    assert storage.stat(url(server, "plain")).size == len(server.body)
    monkeypatch.setenv("COSMOS_SSL_CONNECT_TIMEOUT", "0.3")
    assert storage.stat(url(server, "stall")).size == len(server.body)  # after two seconds
    reader = pickle.dumps(storage.Reader())
    storage._answered.clear()
    began = time.monotonic()
    assert main(["data", "index", url(server, "stall")]) == EXIT_LOST and time.monotonic() - began < 2
    assert "x.tar: no answer (nothing succeeded within 0.3 s: check the URL and its" in capsys.readouterr().err
    monkeypatch.setattr(storage, "RETRY_SECONDS", (60.0,))
    with pytest.raises(OSError, match=r"x\.tar: 500.*\(nothing succeeded within 0\.3 s"):
        storage.stat(url(server, "500"))
    pickle.loads(reader)  # as a worker does that is started anew
    assert storage.stat(url(server, "stall")).size == len(server.body)


@pytest.mark.parametrize("text", ["x", "0", "-1", "nan", "inf"])
def test_a_time_to_connect_that_is_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COSMOS_SSL_CONNECT_TIMEOUT", text)
    with pytest.raises(UserError, match=f"COSMOS_SSL_CONNECT_TIMEOUT is '{text}', expected seconds"):
        storage.stat("http://127.0.0.1/x.tar")


def test_attempts_end_after_some_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "GIVE_UP_SECONDS", -1.0)
    with pytest.raises(OSError, match=r"x: gone \(1 attempts\)"):
        storage.retrying(lambda: (_ for _ in ()).throw(OSError("gone")), "x")


def test_a_time_of_change_is_a_mark(server: Server) -> None:
    assert storage.stat(url(server, "dated")).stamp == "Mon, 01 Jan 2024 00:00:00 GMT"


def test_nothing_of_an_unmarked_shard_is_used_by_another_run(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = url(server, "plain")
    first = Shards(plain)
    assert first.read(0).key == "key00000" and "without ETag" in notices(first.manifest)[0]
    assert is_indexed(plain), "no index made before can help"
    done = server.requests
    assert first.read(1).key == "key00001" and server.requests == done, "within a run blocks are kept"
    server.body = server.body.replace(b"raw 0", b"new 0")
    monkeypatch.setattr(storage, "_RUN", "the next")
    assert Shards(plain).read(0).captions["raw_caption"] == ["new 0"]


def test_local_storage_that_hangs_ends_in_a_sentence(
    shards: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern, pread, ended = shards(3), os.pread, threading.Event()

    def hangs(*args: Any) -> bytes:
        ended.wait(5)
        return pread(*args)

    monkeypatch.setattr(storage, "STILL_SECONDS", 0.05)
    monkeypatch.setattr(scan.os, "pread", hangs)
    try:
        assert main(["data", "index", pattern]) == EXIT_LOST
    finally:
        ended.set()
    assert "no answer within 0.05 s" in (err := capsys.readouterr().err) and "a-000.tar" in err


# ---------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("{0..99999999}.tar", "names 100,000,000 shards; at most 1,048,576"),
        ("{a..z}{a..z}{a..z}{a..z}{a..z}{a..z}", "names 308,915,776 shards"),
        ("{" * 1500 + "}" * 1500, "braces do not match"),
        ("a\0b.tar", "is no path"),
    ],
)
def test_absurd_patterns_are_refused_at_once(pattern: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        load_manifest(pattern)


def test_the_count_of_a_pattern_is_that_of_its_names() -> None:
    braces = pytest.importorskip("braceexpand").braceexpand
    for pattern in (
        "a",
        "{1..3}",
        "x{07..10}y{a..g..2}",
        "p{2.{5..7},3.{2,3}}",
        "{2..-1}",
        r"{1\{2,3}",
        "{}",
        "{a{1..4}b}",
        "i{,.b}",
        "{0..9..3}",
    ):
        assert scan._strings(pattern) == len(list(braces(pattern)))


def test_lists_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.list"
    path.write_text("a.tar\n" * 100)
    monkeypatch.setattr(scan, "MAX_SHARDS", 99)
    with pytest.raises(DataError, match="names 100 shards; at most 99"):
        load_manifest(str(path))
    monkeypatch.setattr(scan, "LIST_BYTES", 599)
    with pytest.raises(DataError, match="holds 600 bytes; at most 599"):
        load_manifest(str(path))


@pytest.mark.parametrize("name", ["x.tar", "x.list", "sizes.json", "x.csv", "x.parquet"])
def test_a_pipe_is_never_waited_for(
    shards: Make, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shards(1)
    path = tmp_path / "shards" / name
    os.mkfifo(path)
    given = [str(tmp_path / "shards" / "a-000.tar")] if name == "sizes.json" else [str(path)]
    if path.suffix in (".csv", ".parquet"):
        argv = [
            "data",
            "prepare",
            "dreamlip",
            "--table",
            *given,
            "--images",
            str(tmp_path),
            "--output",
            str(tmp_path / "out"),
        ]
    else:
        argv = ["data", "index", *given]
    assert main(argv) == EXIT_USER
    assert "no regular file" in capsys.readouterr().err


# ---------------------------------------------------------------------------- members


def test_check_lists_what_is_wrong_with_its_place(
    shards: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(number: int, members: dict[str, bytes]) -> None:
        members |= {"cls": b"--5"} if number == 1 else {"JSON": b"{}"} if number == 2 else {}

    shards(4, 2, 2, change=change)
    folder = tmp_path / "shards"
    with (folder / "a-001.tar").open("ab") as file:
        file.write((folder / "a-002.tar").read_bytes())
    assert main(["data", "check", str(folder / "*.tar")]) == EXIT_FAULTS
    out = capsys.readouterr().out
    assert "sample 1: --5" in out and "sample 2: key00002 has more than one of" in out
    assert "more follows its end mark at byte 10,240; archives put end to end" in out
    assert main(["data", "index", str(folder / "*.tar")]) == EXIT_USER
    assert "a-001.tar: more follows its end mark" in capsys.readouterr().err
