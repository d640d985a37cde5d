"""``cosmos-ssl embed``: from the command line, and through a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

import cosmos_ssl
from cosmos_ssl.cli import main
from cosmos_ssl.cli.progress import progress
from cosmos_ssl.errors import UserError

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def run(one_step_run: Path) -> Path:
    """The folder of a run of one step; its data is ``../scenes``."""
    return one_step_run


def test_shards(command: Command, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.parquet"
    base = (
        "embed",
        "--checkpoint",
        str(run),
        "--which",
        "teacher",
        "--data",
        f"{run.parent}/scenes/val-*.tar",
        "--output",
        str(out),
    )
    code, said, err = command(*base)
    assert (code, said) == (0, f"24 embeddings of 32 numbers in {out}\n"), err
    table = parquet.read_table(out)
    meta = json.loads(table.schema.metadata[b"cosmos_ssl"])
    assert (meta["checkpoint"], meta["which"]) == (f"{run}/checkpoints/step_00000001", "teacher")
    np.testing.assert_allclose(np.linalg.norm(np.stack(table["embedding"].to_numpy()), axis=1), 1, atol=1e-6)
    code, said, err = command(*base)
    assert (code, err) == (0, "24 of 24 samples had been embedded before\n") and said.startswith("24 embeddings")
    code, _, err = command(*base, "--what", "both")
    assert (
        code == 2
        and err == f"{out} holds other embeddings (what: image -> both). Give another output, or --overwrite\n"
    )
    code, said, _ = command(*base, "--what", "both", "--texts", "raw_caption", "--overwrite")
    assert (code, said) == (0, f"48 embeddings of 32 numbers in {out}\n")


def test_in_python(command: Command, run: Path, tmp_path: Path) -> None:
    """The function is what the command calls, and takes a model that is in memory, too."""
    data = sorted((run.parent / "scenes").glob("val-*.tar"))
    report = cosmos_ssl.embed(cosmos_ssl.load(run), data, tmp_path / "a.npy")
    assert (report.samples, report.rows, report.width, report.kept) == (24, 24, 32, 0)
    assert (
        command("embed", "--checkpoint", str(run), "--data", *map(str, data), "--output", str(tmp_path / "b.npy"))[0]
        == 0
    )
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    (tmp_path / "t.txt").write_text("a\n")
    with pytest.raises(UserError, match=r"--what image: .*t\.txt holds texts alone"):
        cosmos_ssl.embed(run, tmp_path / "t.txt", tmp_path / "c.npy", what="image")
    with pytest.raises(UserError, match="cannot be written: "):
        cosmos_ssl.embed(run, tmp_path / "t.txt", tmp_path / "t.txt" / "c.npy")


def test_bad_samples_are_told(command: Command, run: Path, tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(b"no picture")
    code, said, err = command(
        "embed", "--checkpoint", str(run), "--data", str(tmp_path), "--output", str(tmp_path / "e.npy")
    )
    assert (
        code == 0 and said.startswith("2 embeddings") and err == "1 of 3 samples left out: undecodable, such as 1.png\n"
    )
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe.txt")
    for name in ("pipe.png", "pipe.txt"):
        code, _, err = command(
            "embed", "--checkpoint", str(run), "--data", str(tmp_path / name), "--output", str(tmp_path / "p.npy")
        )
        assert (code, err) == (2, f"data: {tmp_path}/{name} is no regular file\n")
    (tmp_path / "t.txt").write_text("a\n\n")
    base = ("embed", "--checkpoint", str(run), "--data", str(tmp_path / "t.txt"), "--output", str(tmp_path / "t.npy"))
    assert command(*base, "--what", "image")[::2] == (2, f"--what image: {tmp_path}/t.txt holds texts alone\n")
    assert command(*base)[::2] == (0, "1 of 2 samples left out: no text, such as 2\n")
    code, _, err = command(*base, "--batch-size", "0")
    assert code == 2 and "--batch-size: 0 is no whole number above zero" in err


KILLED = """
import os, pathlib, signal, sys
from cosmos_ssl.cli import main
from cosmos_ssl.models.encoder import ModelEncoder
encode, output = ModelEncoder.encode_image, pathlib.Path(sys.argv[sys.argv.index("--output") + 1] + ".parts")
def watched(self, pixels):
    if len(list(output.glob("*.pt"))) >= 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, pixels)
ModelEncoder.encode_image = watched
main(sys.argv[1:])
"""


def test_a_killed_job_goes_on(command: Command, run: Path, tmp_path: Path) -> None:
    """kill -9 while parts are written, then the same command: the same table as without a kill."""
    data = f"{run.parent}/scenes/val-*.tar"

    def words(out: str) -> list[str]:
        return ["embed", "--checkpoint", str(run), "--data", data, "--output", str(tmp_path / out), "--batch-size", "1"]

    done = subprocess.run([sys.executable, "-c", KILLED, *words("e.parquet")], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    there = len(list((tmp_path / "e.parquet.parts").glob("*.pt")))
    assert 3 <= there < 24 and not (tmp_path / "e.parquet").exists()
    assert f"{there} of 24 samples had been embedded before" in command(*words("e.parquet"))[2]
    assert command(*words("whole.parquet"))[0] == 0
    assert parquet.read_table(tmp_path / "e.parquet").equals(parquet.read_table(tmp_path / "whole.parquet"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.parquet", "whole.parquet"]


def test_progress_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("samples embedded") as told:
        for done in range(0, 1001, 25):
            told(done, 1000)
    lines = [line.partition(" (")[0] for line in capsys.readouterr().err.splitlines()]  # the rate is the clock's
    assert lines == [f"{done:,} of 1,000 samples embedded" for done in range(100, 1001, 100)]
    with progress("few") as told:
        for done in range(10):
            told(done, 9)
    assert capsys.readouterr().err == ""


def test_progress_shows_no_rate_in_the_first_second(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(monotonic=lambda: 100.0)
    monkeypatch.setattr("cosmos_ssl.cli.progress.time", clock)
    with progress("shards indexed") as told:
        told(0, 100)
        clock.monotonic = lambda: 100.001
        told(50, 100)
        clock.monotonic = lambda: 102.0
        told(90, 100)
    assert capsys.readouterr().err == "50 of 100 shards indexed\n90 of 100 shards indexed (45/s, 0 s left)\n"


@pytest.mark.parametrize("name", ["attend", "embed", "search"])
def test_help_imports_no_torch(name: str) -> None:
    code = (
        "import sys\nfrom cosmos_ssl.cli import main\n"
        f"try:\n    main(['{name}', '--help'])\n"
        "except SystemExit as left:\n    print({'torch', 'numpy', 'PIL'} & {*sys.modules}, left.code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set() 0\n") and "--checkpoint C" in done.stdout


DYING = """
import os, pathlib
if os.environ.get("RANK") == "1":
    from cosmos_ssl.models.encoder import ModelEncoder
    encode, output = ModelEncoder.encode_image, pathlib.Path(os.environ["WATCHED"])
    def watched(self, pixels):
        if len(list(output.glob("*.pt"))) >= 3:
            os.kill(os.getpid(), 9)
        return encode(self, pixels)
    ModelEncoder.encode_image = watched
"""


def test_processes_of_a_profile_write_one_file_also_when_one_was_killed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def words(out: str) -> list[str]:
        data = f"{run.parent}/scenes/val-*.tar"
        return ["embed", "--checkpoint", str(run), "--data", data, "--output", f"{tmp_path}/{out}", "--batch-size", "1"]

    assert main(words("one.npy")) == 0
    capfd.readouterr()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(DYING)
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{tmp_path}/site", prepend=os.pathsep)
        patch.setenv("WATCHED", f"{tmp_path}/many.npy.parts")
        assert main([*words("many.npy"), "profile.nproc=2"]) == 74
    assert "another rank was lost" in capfd.readouterr().err
    there = len(list((tmp_path / "many.npy.parts").glob("*.pt")))
    assert 3 <= there < 24 and not (tmp_path / "many.npy").exists()
    (tmp_path / "two.yaml").write_text("kind: local\nnproc: 2\n")
    assert main([*words("many.npy"), "--profile", f"{tmp_path}/two.yaml"]) == 0
    said = capfd.readouterr()
    assert f"{there} of 24 samples had been embedded before" in said.err
    assert said.out == f"24 embeddings of 32 numbers in {tmp_path}/many.npy\n", "the first rank speaks for all"
    for ending in ("npy", "keys.txt", "meta.json"):
        assert (tmp_path / f"many.{ending}").read_bytes() == (tmp_path / f"one.{ending}").read_bytes()


def test_what_a_profile_cannot_be_used_for_is_told_before_ranks_start(command: Command, run: Path) -> None:
    base = ("embed", "--checkpoint", str(run), "--data", f"{run.parent}/scenes/val-*.tar", "--output")
    for words, told in (
        (("e.npy", "--profile", "slrum"), "no profile 'slrum': there is no such file. Did you mean 'slurm'?"),
        (("e.npy", "profile.nprocs=2"), "command line  profile.nprocs: unknown key. Did you mean 'nproc'?"),
        (("e.csv", "profile.nproc=2"), "--output e.csv: write to a file that ends in"),
    ):
        code, _, err = command(*base, *words)
        assert code == 2 and err.startswith(told) and err.count("\n") == 1
    code, _, err = command("eval", "--checkpoint", "runs/none", "--task", "knn", "--data", "x", "profile.nproc=2")
    assert code == 2 and err.startswith("runs/none is no run folder")
