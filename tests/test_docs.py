"""Every command in the documents and in the headers of the recipes is one that exists, with options that exist."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

from cosmos_ssl.cli import COMMANDS
from cosmos_ssl.cli.common import parse
from cosmos_ssl.config import load_config
from cosmos_ssl.config.source import find_config
from cosmos_ssl_launch.launch import run_parser, train_parser
from cosmos_ssl_launch.profile import read_profile

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path
    for folder in (ROOT, *(ROOT / name for name in ("configs", "plugins", "launch", "tools", "cosmos_ssl")))
    for path in folder.glob("*.md")
) + sorted((ROOT / "docs").rglob("*.md"))
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))
# Programs that are not ours: only what they are pointed at is looked into.
OTHERS = {"python3", "pip", "pre-commit", "ruff", "mypy", ".", "cd", "tar", "tensorboard", "docker", "apptainer"}
UNMARKED = "not (slow or slurm or browser or gpu)"


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language in a Markdown text."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(script: str) -> list[list[str]]:
    """The commands of a script as words, without variables set before them and the folder of the environment."""
    found = []
    for line in re.split(r"\n|&&", script.replace("\\\n", " ")):
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        if words:
            found.append([words[0].removeprefix(".venv/bin/"), *words[1:]])
    return found


def documented() -> list[tuple[str, list[str]]]:
    """Every command, with the file that it stands in."""
    found = [
        (path, command)
        for path in DOCUMENTS
        for block in blocks(path.read_text(), "bash")
        for command in commands(block)
    ]
    for path in RECIPES:
        header = "\n".join(re.findall(r"^# (?:Command|Data): *(.*)", path.read_text(), re.MULTILINE))
        found += [(path, command) for command in commands(header)]
    return [(str(path.relative_to(ROOT)), command) for path, command in found]


def check_launch(words: list[str]) -> None:
    if words[0] != "--config":
        parse(run_parser(), words)
        return
    arguments = parse(train_parser(), words)
    values = [word.removeprefix("profile.") for word in arguments.overrides if word.startswith("profile.")]
    for config in arguments.config:
        load_config(find_config(config), [word for word in arguments.overrides if not word.startswith("profile.")])
    if arguments.profile or values:
        read_profile(arguments.profile or "local", values)


def check_cosmos_ssl(words: list[str]) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    subparsers = parser.add_subparsers(required=True)
    assert words[0] in COMMANDS, words[0]
    import_module(f"cosmos_ssl.cli.{words[0]}").add_parser(subparsers)
    arguments = parse(parser, words)
    for name in ("config", "name"):
        if (config := getattr(arguments, name, None)) is not None:
            load_config(find_config(config), getattr(arguments, "overrides", []))


def check_pytest(words: list[str]) -> None:
    for word in words:
        if word.startswith("tests"):
            assert (ROOT / word).exists(), word
    if "-m" in words:
        marks = set(re.findall(r"\w+", words[words.index("-m") + 1])) - {"not", "and", "or"}
        assert marks <= {"slow", "slurm", "browser", "gpu"}, marks


@pytest.mark.parametrize(
    ("source", "command"), documented(), ids=lambda value: value if isinstance(value, str) else " ".join(value)[:60]
)
def test_documented_commands_exist(source: str, command: list[str]) -> None:
    program, *words = command
    if program == "cosmos-launch":
        check_launch(words)
    elif program == "cosmos-ssl":
        check_cosmos_ssl(words)
    elif program == "pytest":
        check_pytest(words)
    elif program == "python":
        assert (ROOT / words[0]).is_file(), words[0]
    elif "/" in program:
        assert (ROOT / program).is_file(), program
    else:
        assert program in OTHERS, f"{source}: what is '{program}'?"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_and_links_of_documents_hold(path: Path) -> None:
    text = path.read_text()
    for block in blocks(text, "bash"):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)\)", text) + re.findall(r'src="([^":]+)"', text):
        assert (path.parent / target).exists(), f"{path}: no {target}"


def test_readme_is_short_and_its_test_command_is_that_of_ci() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    [test] = [line for block in blocks(text, "bash") for line in block.splitlines() if "pytest" in line]
    assert f"-m '{UNMARKED}'" in test
    assert test.rpartition("&& ")[2] in (ROOT / ".ci" / "run").read_text()


def test_the_test_behind_each_promise_exists() -> None:
    there = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    there |= {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    promised = re.findall(r"test_\w+(?:\.py)?", (ROOT / "launch/README.md").read_text())
    assert len(promised) > 15 and not set(promised) - there
