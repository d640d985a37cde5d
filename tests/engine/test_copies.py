"""Checkpoints copied to an fsspec URL, storage that fails, and a run that goes on from there in an empty folder."""

import io
import json
import os
import shutil
import signal
import sys
import threading
import time

import fsspec
import pytest
from rich.console import Console

from cosmos_ssl.engine import copies as copies_module
from cosmos_ssl.engine.checkpoint import find_fault, latest_checkpoint
from cosmos_ssl.engine.copies import Copies
from cosmos_ssl.engine.remote import Remote, url_fault
from cosmos_ssl.engine.signals import Signals
from cosmos_ssl.errors import CheckpointError, StorageError, UserError
from cosmos_ssl.files import checkpoint_folders


@pytest.fixture
def system():
    """Fsspec's memory, empty before and after; ``fails``: how many calls of ``open`` to write fail from now on."""
    found = fsspec.filesystem("memory")
    found.store.clear()
    yield found
    found.store.clear()


@pytest.fixture
def failing(system, monkeypatch):
    """Set ``until`` to let every write there fail."""
    plan, open_ = {"until": 0}, type(system)._open

    def opened(self, path, mode="rb", **options):
        if mode != "rb" and plan["until"]:
            plan["until"] -= 1
            raise RuntimeError(
                "SlowDown: please reduce your request rate"
            )  # as object stores do: of a kind of their own
        return open_(self, path, mode, **options)

    monkeypatch.setattr(type(system), "_open", opened)
    return plan


def config(tiny, url, **checkpoints):
    kept = {"every_steps": 2, "keep_last": 2, "copy_to": url} | checkpoints
    return tiny.make_config(checkpoints=kept)


@pytest.fixture
def train(tiny):
    """Train into a folder; what is shown on the way."""

    def train(folder, own):
        told = io.StringIO()
        tiny.make_trainer(folder, own, Console(file=told, width=400)).train()
        return told.getvalue()

    return train


def steps(folder):
    return [int(path.name[5:]) for path in checkpoint_folders(folder)]


def test_a_run_goes_on_elsewhere(tiny, train, rows, tmp_path, system):
    """From any of its copies, in an empty folder, as one run: same id, same rows, same weights at the end."""
    url = "memory://bucket/run"
    train(tmp_path / "here", config(tiny, url))
    remote = Remote(url)
    assert list(remote.whole()) == steps(tmp_path / "here") == [8, 10]  # pruned alike
    remote.remove(10)
    told = train(tmp_path / "there", config(tiny, url))
    assert "the checkpoint of step 8 was fetched from memory://bucket/run" in told
    assert rows(tmp_path / "there") == rows(tmp_path / "here") and list(remote.whole()) == [8, 10]
    for name in ("id", "identity.json"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    ends = [
        json.loads((tmp_path / n / "checkpoints/step_00000010/manifest.json").read_text()) for n in ("here", "there")
    ]
    assert ends[0]["files"]["student.safetensors"] == ends[1]["files"]["student.safetensors"]
    told = train(tmp_path / "third", config(tiny, url))  # nothing is left to do elsewhere
    assert f"run {tmp_path / 'third'} is finished (step 10)" in told
    with pytest.raises(UserError, match=r"copy_to: .* holds the copies of another run \(training.seed: 3 -> 4\)"):
        tiny.make_trainer(
            tmp_path / "other", tiny.make_config(training={"seed": 4}, checkpoints={"copy_to": url})
        ).train()
    (tmp_path / "there" / "id").write_text("another\n")
    with pytest.raises(UserError, match="another run of this config, begun in another folder"):
        tiny.make_trainer(tmp_path / "there", config(tiny, url)).train()


def test_storage_that_fails(tiny, train, tmp_path, system, failing, monkeypatch):
    """Training goes on, nothing here is removed, and all is copied in the end."""
    monkeypatch.setattr(copies_module, "RETRY_SECONDS", (0.01, 0.05))
    failing["until"] = 6
    told = train(tmp_path / "run", config(tiny, "memory://b/run", keep_last=1))
    assert "could not be copied to memory://b/run (RuntimeError: SlowDown: please reduce" in told
    assert list(Remote("memory://b/run").whole()) == steps(tmp_path / "run") == [10]
    failing["until"] = 1 << 30
    monkeypatch.setattr(copies_module, "END_SECONDS", 0.1)
    own = config(tiny, "memory://b/down", every_steps=1, keep_last=1)
    told = train(tmp_path / "down", own)
    assert steps(tmp_path / "down") == [6, 7, 8, 9, 10]  # WAITING of them, and the newest
    assert told.count("more than 4 checkpoints wait to be copied") == 1
    assert "not all checkpoints are copied to memory://b/down (step 10)" in told
    failing["until"] = 0
    train(tmp_path / "down", own)  # finished: the rest is copied
    assert list(Remote("memory://b/down").whole()) == steps(tmp_path / "down") == [10]


def test_storage_that_cannot_be_asked(tiny, train, tmp_path, system, monkeypatch):
    """With a checkpoint here the run goes on from it, without one it ends as for lost storage."""
    short = {"schedule": {"max_steps": 4}}
    train(tmp_path / "run", tiny.make_config(**short))
    (tmp_path / "run" / "result.json").unlink()
    monkeypatch.setattr(copies_module, "END_SECONDS", 0.0)
    monkeypatch.setattr(type(system), "ls", lambda *_, **__: 1 / 0)
    own = tiny.make_config(**short, checkpoints={"copy_to": "memory://b"})
    with pytest.raises(StorageError, match=r"copy_to: memory://b cannot be read .* has no checkpoint"):
        train(tmp_path / "new", own)
    assert "the run goes on from its checkpoint here" in train(tmp_path / "run", own)


@pytest.fixture
def saved(tiny, tmp_path):
    """The folder of a short run."""
    tiny.make_trainer(tmp_path / "run", config(tiny, None)).train()
    return tmp_path / "run"


def killed(work, at):
    """Do ``work`` in a forked child that kills itself in the midst of write ``at``; whether it came so far."""
    child = os.fork()
    if child == 0:
        count = [0]

        def watch(frame, event, called):
            name = getattr(called, "__name__", "")
            if event == "c_call" and name in ("open", "write", "unlink", "remove", "rename", "replace", "mkdir"):
                count[0] += any(in_remote(frame))
                if count[0] == at:
                    os.kill(os.getpid(), signal.SIGKILL)

        threading.setprofile(watch)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] != 0


def in_remote(frame):
    while frame is not None:
        yield frame.f_code.co_filename.endswith("engine/remote.py")
        frame = frame.f_back


def test_killed_at_any_stage_of_a_copy(saved, tmp_path):
    """There: what counts as whole is, and what was whole before another step was sent still is."""
    there, before, at = tmp_path / "there", tmp_path / "before", 0
    Remote(f"file://{before}").send(saved / "checkpoints" / "step_00000008", saved)
    remote = Remote(f"file://{there}")

    def work():
        remote.send(saved / "checkpoints" / "step_00000010", saved)
        remote.remove(8)

    seen = set()
    while shutil.copytree(before, there) and killed(work, at := at + 1):
        seen.add(whole := tuple(remote.whole()))
        for step in whole:
            assert find_fault(there / "checkpoints" / f"step_{step:08d}") is None
            assert remote.read(step, "metrics.jsonl") == (saved / "metrics.jsonl").read_bytes()
        shutil.rmtree(there)
    assert at > 20 and seen == {(8,), (8, 10), (10,)}


def test_killed_at_any_stage_of_bringing_back(saved, tmp_path):
    """Here: no checkpoint, or the whole one with the run's files; the same again goes on."""
    remote, at = Remote(f"file://{tmp_path / 'there'}"), 0
    remote.send(saved / "checkpoints" / "step_00000010", saved)
    while killed(lambda: remote.fetch(10, tmp_path / "back"), at := at + 1):
        newest = latest_checkpoint(tmp_path / "back")
        assert (
            newest is None
            or (tmp_path / "back" / "metrics.jsonl").read_bytes() == (saved / "metrics.jsonl").read_bytes()
        )
        if at % 4 == 0:
            shutil.rmtree(tmp_path / "back")
    assert at > 10 and latest_checkpoint(tmp_path / "back").name == "step_00000010"


def test_a_copy_at_an_endpoint_that_never_answers(system, monkeypatch):
    """The first answer is waited for as that of shards is."""
    release = threading.Event()
    monkeypatch.setenv("COSMOS_SSL_CONNECT_TIMEOUT", "0.1")
    with monkeypatch.context() as patch:
        patch.setattr(type(system), "ls", lambda *args, **options: release.wait(60))
        with pytest.raises(TimeoutError, match=r"no answer within 0\.1 s"):
            Remote("memory://silent/run").whole()
    release.set()
    assert Remote("memory://silent/run").whole() == {}
    with monkeypatch.context() as patch:
        patch.setattr(type(system), "ls", lambda *args, **options: time.sleep(0.3) or [])
        assert Remote("memory://silent/run").whole() == {}


def test_a_damaged_copy_is_passed_over(saved, tmp_path, system):
    remote = Remote("memory://b")
    for step in (8, 10):
        remote.send(saved / "checkpoints" / f"step_{step:08d}", saved)
    path = "/b/checkpoints/step_00000010/student.safetensors"
    content = system.cat_file(path)
    system.pipe_file(path, content[:-1])
    assert list(remote.whole()) == [8]  # cut
    system.pipe_file(path, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"step 10 at memory://b is damaged: student.safetensors has changed"):
        remote.fetch(10, tmp_path / "back")
    assert not any((tmp_path / "back").rglob("*.*"))
    (saved / "checkpoints" / "step_00000008" / "teacher.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"teacher.safetensors has changed since it was written"):
        remote.send(saved / "checkpoints" / "step_00000008", saved)
    (saved / "checkpoints" / "step_00000008" / "manifest.json").write_bytes(b"{")
    with pytest.raises(CheckpointError, match=r"manifest.json is damaged"):
        remote.send(saved / "checkpoints" / "step_00000008", saved)
    assert list(remote.whole()) == [10]


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_that_is_told_to_leave_does_not_wait_long(saved, system, monkeypatch, caplog, finished):
    """Nor one that is finished, and waits for its copies."""
    monkeypatch.setattr(copies_module, "LEAVE_SECONDS", 0.05)
    stuck = threading.Event()
    monkeypatch.setattr(Remote, "send", lambda *_: stuck.wait(30))
    copies = Copies(saved, "memory://b", lambda steps: set(steps), lambda: None)
    began = time.monotonic()
    with Signals() as signals:
        threading.Timer(0.1, lambda: setattr(signals, "received", signal.SIGTERM)).start()
        copies.close(finished=finished)
    assert not finished or signals.ahead == "the wait for the copies ends"
    assert time.monotonic() - began < 5 and "not all checkpoints are copied to memory://b (step 10" in caplog.text
    stuck.set()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s4://bucket/run", "Protocol not known: s4"),
        ("abfs://bucket/run", "Install adlfs"),
        ("s3://bucket/run", "Run: pip install 'cosmos-ssl[s3]'"),
        ("simplecache::s3://bucket/run", "is a chain of URLs"),
        ("https://example.com/run", "can be read there alone"),
        ("zip://run", "can be read there alone"),
        ("memory://", "names no folder"),
        ("runs/a/copies", "lies in the run folder"),
        ("memory://b/run", None),
        ("copies", None),
    ],
)
def test_urls(url, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not installed
    fault = url_fault(url, tmp_path / "runs" / "a")
    assert fault is None if message is None else message in fault and "\n" not in fault
