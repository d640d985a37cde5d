"""Commands that cannot write: 74 where the disk is full, 2 where it may not be written, one line, and the old file
stays.
"""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from safetensors import SafetensorError

from cosmos_ssl.errors import EXIT_LOST, EXIT_USER
from cosmos_ssl.interop import export

Command = Callable[..., tuple[int, str, str]]
GOLDEN = str(Path(__file__).parents[1] / "data" / "golden" / "official_checkpoint.pt")
MODEL = ("--checkpoint", GOLDEN, "model.image.heads=3", "model.text.heads=2")
COMMANDS = {
    "config copy": ("config", "copy", "quickstart", "OUT"),
    "data index": ("data", "index", "DATA/a.tar", "--json", "OLD"),
    "data scenes": ("data", "scenes", "--output", "OUT", "--train-samples", "4", "--validation-samples", "2"),
    "data merge": ("data", "merge", "DATA/a.tar", "--output", "OUT/x.list"),
    "data split": ("data", "split", "DATA/a.tar", "--output", "OUT", "--share", "0.5", "--workers", "1"),
    "data prepare": (
        "data",
        "prepare",
        "captions",
        "--table",
        "DATA/t.csv",
        "--caption-columns",
        "text",
        "--images",
        "DATA/pictures",
        "--output",
        "OUT",
    ),
    "data check": ("data", "check", "DATA/a.tar", "--fix", "--output", "OUT"),
    "data show": ("data", "show", "DATA/a.tar", "--config", "quickstart", "--output", "OUT", "--samples", "2"),
    "runs": ("runs", "DATA/run", "--html", "OLD"),
    "embed": ("embed", *MODEL, "--data", "DATA/pictures", "--output", "OUT/e.npy"),
    "search": ("search", *MODEL, "--data", "DATA/pictures", "--text", "a dog", "--output", "OUT"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard with a fault, indexed; pictures; a table of them; a run folder."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "pictures").mkdir()
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text("name: a\n")
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number in range(8):
            file = io.BytesIO()
            Image.new("RGB", (32, 32), (number, 0, 0)).save(file, "PNG")
            (folder / "pictures" / f"{number}.png").write_bytes(file.getvalue())
            body = {
                "png": file.getvalue() if number else b"none",
                "json": json.dumps({"raw_caption": ["a dog"]}).encode(),
            }
            for extension, content in body.items():
                info = tarfile.TarInfo(f"{number:03d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    (folder / "t.csv").write_text("image,text\n" + "".join(f"{number}.png,a dog\n" for number in range(8)))
    return folder


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, EXIT_LOST), (errno.EROFS, EXIT_USER)])
@pytest.mark.parametrize("name", COMMANDS)
def test_what_cannot_be_written(
    command: Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int, code: int
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(data / "cache"))
    assert command("data", "index", str(data / "a.tar"))[0] == 0
    (tmp_path / "old").write_text("old")

    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refused)
    places = {"DATA": str(data), "OUT": str(tmp_path / "out"), "OLD": str(tmp_path / "old")}
    argv = [
        next((word.replace(key, place) for key, place in places.items() if word.startswith(key)), word)
        for word in COMMANDS[name]
    ]
    found, _, err = command(*argv)
    assert (found, os.strerror(number) in err) == (code, True), err
    assert len(err.strip().splitlines()) == 1 and (tmp_path / "old").read_text() == "old"
    left = [path for path in tmp_path.rglob("*.part") if path.is_file()]
    assert not left, "no half of a file is left"


def test_a_report_on_a_full_device(command: Command, tmp_path: Path) -> None:
    code, _, err = command("plugins", "list", "--json", "/dev/full")
    assert (code, err) == (EXIT_LOST, "--json /dev/full: cannot be written: No space left on device\n")
    code, _, err = command("plugins", "list", "--json", str(tmp_path))
    assert code == EXIT_USER and err == f"--json {tmp_path}: cannot be written: Is a directory\n"


def test_a_new_plugin_that_finds_no_room_leaves_nothing(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    code, _, err = command("plugins", "new", "roomless-loss", "--kind", "loss", "--output", str(tmp_path))
    assert (code, "No space left" in err) == (EXIT_LOST, True) and not (tmp_path / "roomless-loss").exists()


@pytest.mark.parametrize(
    "error",
    [SafetensorError("I/O error: No space left on device (os error 28)"), OSError(28, "No space left on device")],
)
def test_an_export_that_finds_no_room(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: object) -> list[str]:
        try:
            raise error
        finally:
            if isinstance(error, OSError):
                raise RuntimeError("unexpected pos 704 vs 598")  # as torch.save ends, over what went wrong

    monkeypatch.setitem(export._WRITERS, "openclip", full)  # type: ignore[arg-type]
    code, _, err = command("export", *MODEL, "--format", "openclip", "--output", str(tmp_path / "out"))
    assert (code, err) == (EXIT_LOST, f"--output {tmp_path / 'out'} cannot be written: No space left on device\n")
    assert not list(tmp_path.iterdir())
