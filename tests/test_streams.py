"""Printing where nobody reads: nothing is raised, then or when the process ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from cosmos_ssl.streams import steady_streams
from cosmos_ssl.testing.examples import small_config
from cosmos_ssl_launch import main


def test_a_reader_that_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the process's standard output, which has ASCII letters alone."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="ascii") as stream:  # to close it fails where something waits to be written
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "__stdout__", stream)
        with pytest.raises(BrokenPipeError):
            os.write(writer, b"x")
        with steady_streams():
            print("x" * 100_000, flush=True)
            Console().print("é")
            with steady_streams():
                print("again")
        assert sys.stdout is stream


@pytest.mark.parametrize("closed", [None, "a stream of the caller's own"])
def test_other_streams_are_left_alone(monkeypatch: pytest.MonkeyPatch, closed: object) -> None:
    monkeypatch.setattr(sys, "stdout", closed and sys.stdout)
    before = sys.stdout
    with steady_streams():
        assert sys.stdout is before
        print("x")


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_goes_on_when_its_reader_has_gone(tmp_path: Path, ranks: int, capfd: pytest.CaptureFixture[str]) -> None:
    """As with ``cosmos-launch ... 2>&1 | head -n 1``; then the same command again finds it finished."""
    config = tmp_path / "x.yaml"
    config.write_text(yaml.safe_dump(small_config(str(tmp_path), 3, {"extends": "quickstart"})))
    argv = ["--config", str(config), f"profile.nproc={ranks}"]
    command = [str(Path(sys.executable).with_name("cosmos-launch")), *argv]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None and process.stdout.readline().startswith(b"training here, in ")
    process.stdout.close()
    assert process.wait(timeout=100) == 0
    assert main(argv) == 0
    again = capfd.readouterr()
    assert "is finished (step 3)" in again.out and not again.err
