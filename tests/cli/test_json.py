"""``--json -``: of every command that has ``--json``, standard output holds the report and nothing else."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from cosmos_ssl.cli import command_parser, main
from cosmos_ssl_launch.launch import run_parser, train_parser

CAPTIONS = ("--table", "table.csv", "--images", "images", "--output", "out")
ARGUMENTS = {
    "data check": ("a.tar",),
    "data index": ("a.tar",),
    "data merge": ("a.tar", "--output", "all.list"),
    "data prepare captions": (*CAPTIONS, "--caption-columns", "text"),
    "data prepare dreamlip": (*CAPTIONS, "--caption-columns", "text"),
    "data prepare pixelprose": (*CAPTIONS, "--caption-columns", "text"),
    "data split": ("a.tar", "--output", "out", "--share", "0.5", "--workers", "1"),
    "data stats": ("a.tar",),
    "eval": (
        *("--checkpoint", str(Path(__file__).parents[1] / "data" / "golden" / "official_checkpoint.pt")),
        *("model.image.heads=3", "model.text.heads=2", "--task", "knn", "-k", "1", "--which", "student"),
        *("--data", "classes", "--train-data", "classes"),
    ),
    "flops": ("quickstart", "model.image.layers=1", "model.text.layers=1"),
    "info": (),
    "plugins check": (),
    "plugins list": (),
    "plugins show": ("losses/clip",),
    "runs": ("run",),
}


def commands_with_json(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[str]:
    for action in parser._actions:
        if "--json" in action.option_strings:
            yield " ".join(words)
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from commands_with_json(inner, (*words, name))


def test_cosmos_launch_writes_no_reports() -> None:
    assert not [*commands_with_json(train_parser()), *commands_with_json(run_parser())], "add them to this file"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tar: Callable[..., Path]) -> None:
    """In the working directory: a shard, a folder of images, one with a folder per class, a table, a run directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    samples = []
    for folder in ("images", "classes/a", "classes/b", "run"):
        Path(folder).mkdir(parents=True)
    for number in range(4):
        file = io.BytesIO()
        Image.new("RGB", (64, 64), (60 * number, 0, 0)).save(file, "PNG")
        samples.append((str(number), {"png": file.getvalue(), "txt": b"a dog"}))
        for folder in ("images", "classes/a" if number % 2 else "classes/b"):
            Path(folder, f"{number}.png").write_bytes(file.getvalue())
    tar(Path("a.tar"), samples)
    Path("run", "config.yaml").write_text("name: a\n")
    Path("table.csv").write_text("image,text\n" + "".join(f"{number}.png,a dog\n" for number in range(4)))


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize("name", sorted(commands_with_json(command_parser())))
def test_standard_output_is_the_report_alone(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert name in ARGUMENTS, "give arguments with which this command succeeds"
    assert main([*name.split(), *ARGUMENTS[name], "--json", "-"]) == 0
    out, _ = capfd.readouterr()
    assert json.loads(out) and not Path("-").exists()
