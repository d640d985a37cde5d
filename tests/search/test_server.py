"""What is served: the answers, and what is refused (paths, hosts, sizes, bombs, other sites), always by a sentence."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cosmos_ssl.errors import UserError
from cosmos_ssl.search.index import Entry
from cosmos_ssl.search.routes import PICTURE_BYTES
from cosmos_ssl.search.searcher import Searcher
from cosmos_ssl.search.server import Server, listen


def ask(
    server: Server, path: str, body: bytes | None = None, method: str = "", **headers: str
) -> tuple[int, Any, http.client.HTTPResponse]:
    """Status, body (JSON as what it holds), and the response."""
    connection = http.client.HTTPConnection("127.0.0.1", server.socket.getsockname()[1], timeout=20)
    connection.request(
        method or ("GET" if body is None else "POST"),
        path,
        body,
        {name.replace("_", "-"): v for name, v in headers.items()},
    )
    reply = connection.getresponse()
    found = reply.read()
    connection.close()
    return reply.status, json.loads(found) if reply.headers["Content-Type"] == "application/json" else found, reply


def png(width: int, height: int, mode: str = "RGB") -> bytes:
    Image.new(mode, (width, height)).save(file := io.BytesIO(), "png")
    return file.getvalue()


def words(text: object) -> bytes:
    return json.dumps({"text": text}).encode()


def rows(found: Any) -> list[int]:
    return [hit["row"] for hit in found["hits"]]


def test_answers(server: Server, searcher: Searcher) -> None:
    status, page, reply = ask(server, "/")
    assert status == 200 and page.startswith(b"<!doctype html>")
    policy = reply.headers["Content-Security-Policy"]
    assert (
        "default-src 'none'" in policy
        and "unsafe" not in policy
        and reply.headers["X-Content-Type-Options"] == "nosniff"
    )
    about = ask(server, "/about")[1]
    assert about == {
        "model": "tiny", "data": "scenes", "pictures": 24, "shown": True, "words": True, "looks": True, "texts": True,
    }  # fmt: skip
    found = ask(server, "/words", words("a red circle"))[1]
    expected = searcher.nearest(searcher.words_vector("a red circle"), 12)
    assert rows(found) == [hit.row for hit in expected] and found["hits"][0]["score"] == round(expected[0].score, 6)
    entry = searcher.index.entry(expected[0].row)
    assert found["hits"][0]["caption"] == entry.caption and entry.caption
    like = rows(ask(server, "/like/7")[1])
    vectors = searcher.index.nearest.vectors
    assert like == [row for row in np.argsort(-(vectors @ vectors[7]), kind="stable").tolist() if row != 7][:12]
    original = searcher.index.picture(7, "white")
    original.save(file := io.BytesIO(), "png")
    by_picture = ask(server, "/picture", file.getvalue())[1]
    assert rows(by_picture) == [7, *like][:12] and by_picture["shown"].startswith("data:image/webp;base64,")
    assert by_picture["texts"] == ask(server, "/texts/7")[1]["texts"] and len(by_picture["texts"]) == 8
    for size in ("small", "large"):
        with Image.open(io.BytesIO(ask(server, f"/{size}/7")[1])) as shown:
            assert shown.format == "WEBP" and shown.size == original.size
    look = ask(server, "/look/7", words("a red circle"))[1]
    assert [one["word"] for one in look["words"]] == ["a", "red", "circle"] and look["picture"].startswith(
        "data:image/"
    )
    status, body, reply = ask(server, "/small/7", method="HEAD")
    assert status == 200 and body == b"" and int(reply.headers["Content-Length"]) > 100


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/nothing", None, 404, "There is nothing here."),
        ("/../../etc/passwd", None, 404, "There is nothing here."),
        ("/small/../about", None, 404, "There is nothing here."),
        ("/%2e%2e/page.css", None, 404, "There is nothing here."),
        ("/small/-1", None, 404, "There is nothing here."),
        ("/small/24", None, 404, "There is no picture 24: the last one is 23."),
        ("/large/999999999", None, 404, "There is no picture 999999999: the last one is 23."),
        ("/words", None, 405, "/words is asked by POST alone."),
        ("/like/3", b"more", 405, "/like/3 is asked by GET alone."),
        ("/words", b"{", 400, 'The question is no JSON such as {"text": "a red heart"}.'),
        ("/words", b"[" * 60_000, 400, 'The question is no JSON such as {"text": "a red heart"}.'),
        ("/words", b"[1]", 400, 'The question has no text: {"text": "a red heart"}.'),
        ("/words", words(3), 400, 'The question has no text: {"text": "a red heart"}.'),
        ("/words", words("  "), 400, "Say in words what to look for."),
        ("/words", words("x" * 2001), 413, "The text has 2,001 letters, at most 2,000."),
        ("/words", words("x" * 70_000), 413, "This is too much: at most 65,536 bytes are taken."),
        ("/look/3", words(""), 400, "Say whose look at the picture is wanted: one word or more."),
        ("/look/99", words("a"), 404, "There is no picture 99: the last one is 23."),
        ("/about", b"more", 405, "/about is asked by GET alone."),
        ("/picture", b"", 400, "This is no picture that can be searched by (cannot identify image file)."),
        ("/picture", b"<svg/>", 400, "This is no picture that can be searched by (cannot identify image file)."),
        ("/picture", png(30, 30)[:-30], 400, "This is no picture that can be searched by ("),
        ("/picture", png(20_000, 10_000, "1"), 413, "This is no picture that can be searched by ("),
        ("/picture", png(8200, 8200, "1"), 413, "This is no picture that can be searched by (8200x8200 pixels)."),
    ],
)  # fmt: skip
def test_what_is_refused(server: Server, path: str, body: bytes | None, status: int, said: str) -> None:
    found = ask(server, path, body)
    assert found[0] == status and found[1]["error"].startswith(said), found[:2]


def test_other_sites_and_names_are_refused(server: Server) -> None:
    """A page of another site, or one that has our address by its own name, learns nothing."""
    port = server.socket.getsockname()[1]
    for host in ("evil.example", f"evil.example:{port}", "", "127.0.0.1.evil.example", "[::1]"):
        status, found, _ = ask(server, "/about", Host=host)
        assert status == 403 and found["error"].startswith("This page is at http://127.0.0.1:"), host
    for origin in ("https://evil.example", "null", f"http://localhost:{port}"):
        assert ask(server, "/words", words("x"), Origin=origin)[0] == 403, origin
    assert ask(server, "/words", words("x"), Origin=f"http://127.0.0.1:{port}")[0] == 200
    cross = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "no-cors"}  # as the source of a picture
    assert ask(server, "/small/3", **cross)[0] == 403
    assert ask(server, "/", **cross | {"Sec_Fetch_Mode": "navigate"})[0] == 200
    assert ask(server, "/about", Host="localhost:9999")[0] == 200  # a port that SSH forwards


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"POST /picture HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (PICTURE_BYTES + 1), 413),
        (b"POST /picture HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999999999999999999\r\n\r\n", 413),
        (b"POST /picture HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /words HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\nContent-Length: 2\r\n\r\n{}", 400),
        (b"POST /picture HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST /words HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\nhalf", 400),
        (b"GET /about HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", 403),
        (b"GET /about HTTP/1.1\r\n\r\n", 403),
        (b"GET http://[::1 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"BREW /pot HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"no request at all\r\n\r\n", 400),
    ],
)
def test_raw_requests(server: Server, sent: bytes, status: int) -> None:
    """Each is answered at once, before anything more is read, by a status and a sentence; then the connection ends."""
    with socket.create_connection(server.socket.getsockname(), timeout=20) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        reply = b"".join(iter(lambda: connection.recv(65_536), b""))
    head, _, body = reply.partition(b"\r\n\r\n")
    if body:  # without a version in the request there are no heads
        assert head.startswith(b"HTTP/1.1 %d " % status), head
    assert json.loads(body or head)["error"]


def test_a_picture_that_has_gone(server: Server, searcher: Searcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that change under a search are told; captions are handed on as they are, as JSON."""

    def gone(index: int) -> None:
        raise OSError(5, "Input/output error")

    evil = "</script><img src=x onerror=alert(1)>"
    with monkeypatch.context() as patch:
        patch.setattr(searcher.index._samples, "read", gone)
        status, found, _ = ask(server, "/large/2")
        assert (status, found["error"]) == (404, "This picture cannot be shown (unreadable: Input/output error).")
        assert len(rows(ask(server, "/words", words("a red circle"))[1])) == 12
    monkeypatch.setattr(searcher.index, "entry", lambda row: Entry(key="k", file=None, caption=evil))
    assert ask(server, "/words", words("a"))[1]["hits"][0]["caption"] == evil
    monkeypatch.setattr(searcher, "words_vector", lambda text: 1 / 0)
    assert ask(server, "/words", words("a"))[:2] == (500, {"error": "This failed; the terminal says how."})


def test_a_port_that_is_taken() -> None:
    with listen(0) as first:
        port = first.getsockname()[1]
        assert first.getsockname()[0] == "127.0.0.1"
        with pytest.raises(UserError, match=rf"--serve {port}: another program listens there. Give another port"):
            listen(port)


def test_the_command_serves_until_it_is_interrupted(
    command: Callable[..., tuple[int, str, str]], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    listener = listen(0)
    monkeypatch.setattr("cosmos_ssl.search.server.listen", lambda port: listener)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started in the background ignores it
    seen: list[Any] = []

    def ask_and_interrupt() -> None:
        connection = http.client.HTTPConnection(*listener.getsockname(), timeout=60)
        connection.request("GET", "/about")
        seen.append(json.loads(connection.getresponse().read()))
        os.kill(os.getpid(), signal.SIGINT)  # with a connection that is kept open
        seen.append(connection)

    thread = threading.Thread(target=ask_and_interrupt)
    thread.start()
    argv = ["search", "--checkpoint", str(run), "--data", f"{run.parent}/scenes/val-0000.tar", "--serve", "0"]
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    try:
        code, said, err = command(*argv, "--output", str(tmp_path / "hits"))
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert (code, said) == (0, f"{address} (Ctrl-C ends it)\n") and err.endswith("ended\n"), err
    assert seen[0]["texts"] is True and not (tmp_path / "hits").exists()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(address.split(":")[2].strip("/"))))
