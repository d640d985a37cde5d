"""Released checkpoints by name, from a stand-in for the hub on this machine."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cosmos_ssl.errors import CheckpointError
from cosmos_ssl.interop.hub import RELEASED, checkpoint_path, fetch_released

NAME = "cosmos_vitb16_merged30m"
CONTENT = b"weights" * 1000
COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for one file: what it is in the headers, the bytes themselves from a second address."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body):
        state = self.server.state
        state["asked"].append((self.command, self.path))
        if self.path == "/storage":
            self.send(200, state["content"], body)
        elif (
            self.path == f"/sankim2/cosmos/resolve/main/{NAME}.pt"
            or self.path == f"/sankim2/cosmos/resolve/{COMMIT}/{NAME}.pt"
        ):
            told = {
                "X-Repo-Commit": COMMIT,
                "X-Linked-Etag": f'"{state["told"]}"',
                "X-Linked-Size": str(len(state["content"])),
                "Location": f"http://localhost:{self.server.server_port}/storage",  # another host, as the real one
            }
            self.send(302, b"", body, told)
        else:
            self.send(404, b"{}", body, {"X-Error-Code": "EntryNotFound"})

    def send(self, code, content, body, headers=()):
        self.send_response(code)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in's state: what it holds, what it tells of it, and what it was asked."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.state = {"content": CONTENT, "told": hashlib.sha256(CONTENT).hexdigest(), "asked": []}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    yield server.state
    server.shutdown()
    server.server_close()


def downloads(state):
    return [path for command, path in state["asked"] if command == "GET" and path == "/storage"]


def test_a_released_checkpoint_is_fetched_once(hub, tmp_path):
    path = fetch_released(NAME, cache_dir=tmp_path)
    assert path.name == f"{NAME}.pt" and path.read_bytes() == CONTENT
    assert fetch_released(NAME, cache_dir=tmp_path) == path and len(downloads(hub)) == 1


def test_without_network_the_cached_file_serves(hub, tmp_path, monkeypatch):
    path = fetch_released(NAME, cache_dir=tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert fetch_released(NAME, cache_dir=tmp_path) == path
    path.resolve().write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"is in the cache and damaged \(its SHA-256 is not [0-9a-f]{64}\)"):
        fetch_released(NAME, cache_dir=tmp_path)


def test_without_network_and_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=rf"{NAME} is not in the cache (.|\n)*127.0.0.1:9/.*{NAME}.pt elsewhere"):
        fetch_released(NAME, cache_dir=tmp_path)


def test_a_damaged_download_is_fetched_again_and_then_refused(hub, tmp_path):
    hub["told"] = hashlib.sha256(b"what was released").hexdigest()
    with pytest.raises(CheckpointError, match=f"its SHA-256 is not {hub['told']}, also when fetched again"):
        fetch_released(NAME, cache_dir=tmp_path)
    assert len(downloads(hub)) == 2


def test_a_stored_file_that_was_damaged_later_is_mended(hub, tmp_path):
    path = fetch_released(NAME, cache_dir=tmp_path)
    path.resolve().write_bytes(b"other bytes")
    assert fetch_released(NAME, cache_dir=tmp_path).read_bytes() == CONTENT


def test_a_hub_that_tells_no_hash(hub, tmp_path):
    hub["told"] = "abc"
    with pytest.raises(CheckpointError, match=r"tells no SHA-256 of this file \('abc'\)"):
        fetch_released(NAME, cache_dir=tmp_path)


def test_names_and_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(RELEASED) == 10
    assert checkpoint_path("runs/a") == tmp_path.cwd().relative_to(tmp_path) / "runs/a"
    (tmp_path / f"{NAME}.pt").write_bytes(b"")
    assert checkpoint_path(f"{NAME}.pt").name == f"{NAME}.pt"
    assert str(checkpoint_path(f"elsewhere/{NAME}.pt")) == f"elsewhere/{NAME}.pt"
    with pytest.raises(CheckpointError, match=r"is named 'cosmos_vitb16_cc4m'\. Did you mean 'cosmos_vitb16_cc3m'\?"):
        checkpoint_path("cosmos_vitb16_cc4m")
