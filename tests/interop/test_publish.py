"""Exports pushed to the hub and loaded from it: a stand-in on this machine speaks its protocol, uploads included."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from huggingface_hub import constants

import cosmos_ssl
from cosmos_ssl.cli import main
from cosmos_ssl.errors import CheckpointError
from cosmos_ssl.interop.foreign import _chosen

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "official_checkpoint.pt"
HEADS = ["model.image.heads=3", "model.text.heads=2"]

TOKEN = "hf_" + "a" * 34
COSMOS = [
    *("model.embed_dim=32", "heads={cross: {type: cross_attention}}", "teacher={type: ema}"),
    "losses.distill={type: cross_modality_distillation, head: cross}",
]


class Hub(BaseHTTPRequestHandler):
    """Accounts, repositories with commits, large files by their SHA-256, and files of any commit."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def __getattr__(self, name):
        if name.startswith("do_"):
            return self.answer
        raise AttributeError(name)

    def answer(self):
        state, path = self.server.state, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        state["asked"].append(f"{self.command} {path}")
        open_to_all = path.startswith(("/lfs/", "/api/validate"))
        if not open_to_all and self.headers.get("Authorization") not in (f"Bearer {TOKEN}", None):
            return self.tell(401, {"error": "Invalid username or password."})
        asked = "GET" if self.command == "HEAD" else self.command
        for method, pattern, act in ROUTES:
            if method == asked and (found := re.fullmatch(pattern, path)):
                return act(self, state, body, *found.groups())
        return self.tell(404, {"error": f"no {path}"})

    def tell(self, code, answer, headers=()):
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(code)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def whoami(self, state, body):
        self.tell(200, {"type": "user", "name": "me", "orgs": [{"name": "lab"}, {"name": "readers"}]})

    def create(self, state, body):
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] == "readers":
            return self.tell(403, {"error": "You don't have the rights to create a model here"})
        known = name in state["repositories"]
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        state["repositories"].setdefault(name, {"private": private, "commits": {}})
        return self.tell(409 if known else 200, {"url": f"{state['url']}/{name}"})

    def validate(self, state, body):
        self.tell(200, {"errors": [], "warnings": []})

    def preupload(self, state, body, name):
        told = [
            {"path": each["path"], "uploadMode": "lfs" if each["size"] > 20_000 else "regular", "shouldIgnore": False}
            for each in json.loads(body)["files"]
        ]
        self.tell(200, {"files": told})

    def batch(self, state, body, name):
        wanted = json.loads(body)["objects"]
        places = [{**each, "actions": {"upload": {"href": f"{state['url']}/lfs/{each['oid']}"}}} for each in wanted]
        self.tell(200, {"transfer": "basic", "objects": places})

    def store(self, state, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        state["large"][oid] = body
        self.tell(200, b"")

    def commit(self, state, body, name):
        commits = state["repositories"][name]["commits"]
        files = dict(list(commits.values())[-1]) if commits else {}
        for row in map(json.loads, body.splitlines()):
            value = row["value"]
            if row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                files[value["path"]] = state["large"][value["oid"]]
        oid = hashlib.sha1(body).hexdigest()
        commits[oid] = files
        self.tell(200, {"commitUrl": f"{state['url']}/{name}/commit/{oid}", "commitOid": oid})

    def files_of(self, state, name, revision):
        """Its commit and files, or None where this caller sees none."""
        found = state["repositories"].get(name)
        if found is None or (found["private"] and "Authorization" not in self.headers):
            return None
        commits = found["commits"]
        oid = (list(commits) or [""])[-1] if revision in (None, "main") else revision
        return (oid, commits.get(oid, {})) if oid in commits or not commits else None

    def info(self, state, body, name, revision=None):
        found = self.files_of(state, name, revision)
        if found is None:
            return self.tell(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
        about = {"id": name, "sha": found[0], "private": state["repositories"][name]["private"]}
        return self.tell(200, {**about, "siblings": [{"rfilename": path} for path in found[1]]})

    def tree(self, state, body, name, revision):
        files = self.files_of(state, name, revision)[1].items()
        rows = [(path, len(content), hashlib.sha1(content).hexdigest()) for path, content in files]
        self.tell(200, [{"type": "file", "path": path, "size": size, "oid": oid} for path, size, oid in rows])

    def resolve(self, state, body, name, revision, path):
        found = self.files_of(state, name, revision)
        if found is None or path not in found[1]:
            return self.tell(404, {}, {"X-Error-Code": "EntryNotFound"})
        content = found[1][path]
        return self.tell(200, content, {"X-Repo-Commit": found[0], "ETag": f'"{hashlib.sha256(content).hexdigest()}"'})


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", Hub.whoami),
    ("POST", "/api/repos/create", Hub.create),
    ("POST", "/api/validate-yaml", Hub.validate),
    ("POST", f"/api/models/{NAME}/preupload/main", Hub.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Hub.batch),
    ("PUT", r"/lfs/(\w+)", Hub.store),
    ("POST", f"/api/models/{NAME}/commit/main", Hub.commit),
    ("GET", f"/api/models/{NAME}", Hub.info),
    ("GET", f"/api/models/{NAME}/revision/(.+)", Hub.info),
    ("GET", f"/api/models/{NAME}/tree/(.+)", Hub.tree),
    ("GET", f"/{NAME}/resolve/([^/]+)/(.+)", Hub.resolve),
]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in's state, with this machine logged in to it and an empty cache; large files go by LFS."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    url = f"http://127.0.0.1:{server.server_port}"
    server.state = {"url": url, "repositories": {}, "large": {}, "asked": []}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield server.state
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("form", ["openclip", "official"])
def test_a_pushed_model_is_loaded_to_the_bit(hub, make, pixels, words, form, tmp_path, monkeypatch):
    encoder = make(*COSMOS)
    roles, notes = cosmos_ssl.export(encoder, form, push="lab/small", private=True)
    assert roles == ("student",) and notes[-1] == f"on the hub: {hub['url']}/lab/small"
    ((first, files),) = hub["repositories"]["lab/small"]["commits"].items()
    assert hub["repositories"]["lab/small"]["private"] and hub["large"]
    assert 'cosmos_ssl.load("hf-hub:lab/small")' in files["README.md"].decode()
    for name in ("hf-hub:lab/small", f"hf-hub:lab/small@{first}"):
        again = cosmos_ssl.load(name)
        assert torch.equal(again.encode_image(pixels(encoder)), encoder.encode_image(pixels(encoder)))
        assert torch.equal(again.encode_text(words(encoder)), encoder.encode_text(words(encoder)))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # what was fetched serves
    assert repr(cosmos_ssl.load("hf-hub:lab/small")) == repr(again)
    with pytest.raises(CheckpointError, match=r"hf-hub:lab/other cannot be fetched: .*Reach the hub once"):
        cosmos_ssl.load("hf-hub:lab/other")


@pytest.mark.parametrize(
    ("settings", "flags", "message"),
    [
        ({}, ["--push", "nobody/small"], "the account has no place 'nobody' on the hub. It has me, lab, readers"),
        ({}, ["--push", "readers/small"], "the account may not write there: .*You don't have the rights"),
        (
            {"HF_TOKEN": ""},
            ["--push", "lab/small"],
            r"nobody is logged in to the hub. Run: hf auth login \(or set HF_TO",
        ),
        ({"HF_TOKEN": "hf_other"}, ["--push", "lab/small"], "the hub does not know this token"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, ["--push", "lab/small"], "the hub cannot be reached: "),
        ({}, ["--push", "lab/seen", "--private"], "it is there and public. Make it private"),
        ({}, ["--push", "small"], "'small' is no place on the hub, such as my-lab/my-model"),
        ({}, ["--private"], "give --output DIR, --push ORG/NAME, or both"),
        ({}, ["--private", "--output", "out"], "--private: needs --push ORG/NAME"),
    ],
)
def test_what_the_hub_refuses_is_told_in_a_line(hub, monkeypatch, tmp_path, capsys, settings, flags, message):
    hub["repositories"]["lab/seen"] = {"private": False, "commits": {}}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    command = ["export", "--checkpoint", str(GOLDEN), *HEADS, "--format", "timm", *flags]
    try:
        code = main(command)
    except SystemExit as left:
        code = left.code
    lines = [line for line in capsys.readouterr().err.splitlines() if "tensors" not in line]
    assert code == 2 and re.search(message, lines[-1]) and "Traceback" not in "".join(lines)
    assert not [line for line in hub["asked"] if "commit" in line] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (
            "a.bin open_clip_pytorch_model.bin open_clip_config.json",
            "open_clip_config.json open_clip_pytorch_model.bin",
        ),
        (
            "config.json image.onnx model.safetensors preprocessor_config.json pytorch_model.bin",
            "config.json model.safetensors preprocessor_config.json",
        ),
        ("README.md small.pt", "small.pt"),
        ("a.pt b.pt", ""),
        ("config.json tf_model.h5", ""),
    ],
)
def test_no_more_is_fetched_than_is_read(files, chosen):
    assert _chosen(files.split()) == chosen.split()


def test_a_repository_that_holds_no_weights(hub):
    files = {"image.onnx": b"", "README.md": b""}
    hub["repositories"]["lab/programs"] = {"private": False, "commits": {"1" * 40: files}}
    with pytest.raises(CheckpointError, match=r"lab/programs holds no model that can be read: image.onnx, README.md"):
        cosmos_ssl.load("hf-hub:lab/programs")
    with pytest.raises(CheckpointError, match="no such repository or revision, or not for you"):
        cosmos_ssl.load("hf-hub:lab/nothing")
