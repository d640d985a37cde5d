"""Damaged run folders: one sentence and a documented exit code, never a traceback, and nothing is overwritten."""

import json
import random
import re
import shutil

import pytest

from cosmos_ssl.errors import CosmosError, UserError

SHORT = {"schedule": {"max_steps": 2, "epochs": 1}, "checkpoints": {"every_steps": 1}}
FILES = ("identity.json", "result.json", "versions.json", "metrics.jsonl", "config.yaml", "log.txt", ".lock")
CHECKPOINT = tuple(
    f"checkpoints/step_00000002/{name}"
    for name in ("manifest.json", "state.json", "student.safetensors", "optimizer.safetensors")
)


@pytest.fixture(scope="module")
def sound(tiny, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("sound") / "run"
    tiny.make_trainer(folder, tiny.make_config(**SHORT)).train()
    return folder


@pytest.fixture
def train(tiny, sound, tmp_path):
    """``train(name, damage)`` copies the run, damages one file and trains on; what was raised."""

    def train(name, damage, *, finished=True):
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(sound, run)
        if not finished:
            (run / "result.json").unlink(missing_ok=True)
        damage(run / name)
        before = contents(run)
        try:
            tiny.make_trainer(run, tiny.make_config(**SHORT)).train()
        except CosmosError as error:
            assert str(error) and "\n" not in str(error)
            after = contents(run)
            assert {path for path in before if after.get(path) != before[path]} <= {"log.txt", ".lock"}
            return error
        assert json.loads((run / "result.json").read_text())["step"] == 2
        return None

    return train


def contents(run):
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def written(data):
    return lambda path: path.write_bytes(data)


def folder_instead(path):
    path.unlink()
    (path / "inside").mkdir(parents=True)


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "missing": lambda path: path.unlink(),
    "folder": folder_instead,
    **{
        repr(data): written(data)
        for data in (b"", b"{", b"[]\n", b"null\n", b"x\n", b"\xff\xfe\x00\n", b'{"step": "2", "config": {}}\n')
    },
    "deep": written(b"[" * 100_000 + b"\n"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_file(train, damage):
    for name in FILES[:4]:
        for finished in (True, False):
            if name != "result.json" or finished:
                train(name, damage, finished=finished)


def test_what_is_said_and_kept(train, tmp_path):
    refused = {
        "identity.json": r"identity\.json is damaged: it holds no table\. It tells whose run this is: bring it back",
        "result.json": r"result\.json is damaged: it holds no table\. It says that the run is finished: delete it",
    }
    for name, words in refused.items():
        error = train(name, written(b"[]"))
        assert isinstance(error, UserError) and re.search(words, str(error))
    harmless = {
        "versions.json": "versions.json is damaged: it holds no table. The run goes on, and the file is kept as "
        "versions.json.damaged",
        "metrics.jsonl": "metrics.jsonl: 2 lines are no rows and are left out; the file is kept as "
        "metrics.jsonl.damaged",
    }
    for name, words in harmless.items():
        assert train(name, written(b"[]\nx\n" if name == "metrics.jsonl" else b"[]"), finished=False) is None
        assert words in (tmp_path / "run" / "log.txt").read_text()
        assert (tmp_path / "run" / f"{name}.damaged").read_bytes().startswith(b"[]")


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES + CHECKPOINT)
def test_any_damage(train, name):
    draw = random.Random(name)

    def bent(path):
        data = bytearray(path.read_bytes() or b"x")
        for _ in range(draw.randrange(1, 4)):
            at = draw.randrange(len(data))
            data[at : at + draw.randrange(2)] = draw.choice([b"", b"0", b"[1]", b'"', draw.randbytes(3)])
        path.write_bytes(data)

    for damage in (*DAMAGES.values(), *[bent] * 30):
        train(name, damage, finished=name == "result.json" or draw.random() < 0.5)
