"""What all commands share: exit codes, tracebacks, overrides anywhere, quick starts."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cosmos_ssl.cli.common import execute, parse, table, write_json
from cosmos_ssl.errors import ConfigError, StorageError, TrainingError, UserError

SCRIPTS = Path(sys.executable).parent
Command = Callable[..., tuple[int, str, str]]


def failing(error: BaseException) -> Callable[[], int]:
    def function() -> int:
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("no such thing"), 2, "no such thing\n"),
        (ConfigError(["a:1  x: no", "a:2  y: no"]), 2, "a:1  x: no\na:2  y: no\n"),
        (TrainingError("diverged"), 1, "diverged\n"),
        (StorageError("disk full"), 74, "disk full\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_errors_become_messages_and_exit_codes(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, words: str
) -> None:
    assert execute(failing(error)) == code
    assert capsys.readouterr().err == words


def test_debug_shows_tracebacks_and_bugs_always_do() -> None:
    with pytest.raises(UserError):
        execute(failing(UserError("x")), debug=True)
    with pytest.raises(ZeroDivisionError):
        execute(failing(ZeroDivisionError()))
    with pytest.raises(BrokenPipeError):  # of a pipe that is not our output
        execute(failing(BrokenPipeError()))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(exit_on_error=False)
    actions = top.add_subparsers()
    taking = actions.add_parser("take")
    taking.add_argument("config")
    taking.add_argument("--output")
    taking.add_argument("--flag", action="store_true")
    taking.set_defaults(overrides=[])
    actions.add_parser("leave").add_argument("file")
    return top


def test_overrides_stand_anywhere() -> None:
    found = parse(parser(), ["take", "a.b=1", "x.yaml", "--flag", "c=2", "--debug", "--output", "o=1", "d-e.f_g="])
    assert (
        found.config == "x.yaml"
        and found.flag
        and found.output == "o=1"
        and found.overrides == ["a.b=1", "c=2", "d-e.f_g="]
    )
    assert parse(parser(), ["take", "./odd=name.yaml"]).config == "./odd=name.yaml"
    assert parse(parser(), ["take", "x"]).overrides == []


def test_commands_without_overrides_keep_such_arguments() -> None:
    assert parse(parser(), ["leave", "a=b.tar"]).file == "a=b.tar"


def test_table() -> None:
    assert table([("A", "LONG"), ("longer", "b")], indent=" ") == " A       LONG\n longer  b\n"


def test_json_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--json .*: cannot be written: No such file or directory"):
        write_json(tmp_path / "no" / "x.json", {})


def test_debug_flag_of_the_command(command: Command) -> None:
    assert command("plugins", "show", "nothing")[0] == 2
    with pytest.raises(UserError):
        command("plugins", "show", "nothing", "--debug")


def test_unknown_command_is_the_users_mistake(command: Command) -> None:
    code, _, err = command("plugin", "list")
    assert code == 2 and "invalid choice: 'plugin'" in err


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_closed_output_ends_quietly(unbuffered: str) -> None:
    script = "import sys; from cosmos_ssl.cli import main; sys.exit(main(['plugins', 'list']))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", script],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    os.close(write)
    assert done.returncode == 1 and done.stderr == ""


@pytest.mark.parametrize(
    "arguments", ["cosmos-ssl --help", "cosmos-ssl plugins list", "cosmos-launch --help", "cosmos-ssl config list"]
)
def test_quick_commands_import_no_torch(arguments: str) -> None:
    name, *rest = arguments.split()
    code = (
        "import sys, runpy\n"
        f"sys.argv = {[name, *rest]!r}\n"
        "try:\n"
        f"    runpy.run_path({str(SCRIPTS / name)!r}, run_name='__main__')\n"
        "except SystemExit as left:\n"
        "    print({'torch', 'rich', 'numpy'} & {*sys.modules}, left.code or 0, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "set() 0" and done.stdout
