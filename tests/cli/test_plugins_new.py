"""``cosmos-ssl plugins new``: projects of every kind are installed, listed, checked, trained by their own tests, and
clean.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from cosmos_ssl import __version__, registry
from cosmos_ssl.cli.plugins_new import KINDS, new_plugin

Command = Callable[..., tuple[int, str, str]]
Install = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a project of every kind, and their installation in ``site``."""
    folder = tmp_path_factory.mktemp("new")
    sources = [str(new_plugin(f"my-{kind}", kind, folder)) for kind in KINDS]
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--disable-pip-version-check", "--target", str(folder / "site"), *sources], check=True)
    return folder


def run(folder: Path, command: Sequence[str], cwd: str = ".", **variables: str) -> subprocess.CompletedProcess[str]:
    """A command of this environment with the projects installed."""
    environment = os.environ | {"PYTHONPATH": str(folder / "site"), "OMP_NUM_THREADS": "1"} | variables
    program = (
        [sys.executable, "-m", *command]
        if command[0] in ("pytest", "ruff", "mypy")
        else [scripts(command[0]), *command[1:]]
    )
    return subprocess.run(program, cwd=folder / cwd, env=environment, capture_output=True, text=True, timeout=300)


def scripts(name: str) -> str:
    """A program of this environment."""
    return str(Path(sys.executable).parent / name)


def test_they_are_listed_and_checked(folder: Path) -> None:
    listed = run(folder, ["cosmos-ssl", "plugins", "list"])
    assert len(re.findall(r"^\w+ +my_\w+ +my-\w+ 0\.1\.0 +my_\w+:My\w+$", listed.stdout, re.MULTILINE)) == len(KINDS), (
        listed.stdout
    )
    checked = run(folder, ["cosmos-ssl", "plugins", "check"])
    assert checked.returncode == 0, checked.stdout
    alone = run(folder, ["cosmos-ssl", "plugins", "list"], COSMOS_DISABLE_PLUGINS="1")
    assert alone.returncode == 0 and "my-" not in alone.stdout and "cross_attention" in alone.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_show_describes_every_option(
    folder: Path, kind: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(folder / "site"))
    registry.forget()
    code, out, _ = command("plugins", "show", f"my_{kind}")
    rows = out.partition("MEANING")[2].split("\n\n")[0].strip().splitlines()
    assert code == 0 and rows and all(len(re.split(r" {2,}", row.strip())) == 4 for row in rows), out


@pytest.mark.parametrize("kind", KINDS)
def test_config_of_its_readme_is_valid(
    folder: Path, kind: str, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(folder / "site"))
    registry.forget()
    [text] = re.findall(
        r"^```yaml\n(.*?)^```", (folder / f"my-{kind}" / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )
    (tmp_path / "x.yaml").write_text(text)
    assert f"type: my_{kind}" in text
    assert command("config", "check", str(tmp_path / "x.yaml")) == (0, f"{tmp_path / 'x.yaml'}: ok\n", "")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind != "loss" else []) for kind in KINDS]
)
def test_its_own_test_passes(folder: Path, kind: str) -> None:
    done = run(folder, ["pytest", "-q", "-p", "no:cacheprovider"], cwd=f"my-{kind}")
    assert done.returncode == 0 and re.search(r"^[3-9] passed", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_code_is_clean(folder: Path, kind: str) -> None:
    for command in (["ruff", "check", "--no-cache"], ["ruff", "format", "--check", "--no-cache"]):
        done = run(folder, command, cwd=f"my-{kind}")
        assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_types_hold(folder: Path) -> None:
    files = [str(path.relative_to(folder)) for kind in KINDS for path in sorted((folder / f"my-{kind}").rglob("*.py"))]
    path = ":".join(str(folder / f"my-{kind}") for kind in KINDS)
    done = run(folder, ["mypy", "--strict", "--cache-dir", "cache", *files], MYPYPATH=path)
    assert done.returncode == 0, done.stdout


def test_project_says_what_it_needs(folder: Path) -> None:
    text = (folder / "my-loss" / "pyproject.toml").read_text()
    major, minor, _ = __version__.split(".")
    assert f'dependencies = ["cosmos-ssl>={major}.{minor},<{major}.{int(minor) + 1}"]' in text
    assert 'entry-points."cosmos_ssl.losses".my_loss = "my_loss:MyLoss"' in text
    for path in folder.glob("my-*/**/*.*"):
        assert "$" not in path.read_text(), path


def test_what_is_said(command: Command, tmp_path: Path) -> None:
    code, out, err = command("plugins", "new", "My-3d_Loss", "--kind", "loss", "--output", str(tmp_path / "a" / "b"))
    made = tmp_path / "a" / "b" / "My-3d_Loss"
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"{made}: README.md, my_3d_loss.py, pyproject.toml, tests/test_my_3d_loss.py",
        f"Install and test it: pip install -e {made} && cd {made} && python -m pytest",
    ]
    assert "class My3dLoss(Loss):" in (made / "my_3d_loss.py").read_text()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "my loss",
            "'my loss' is no name for a plugin: use letters, digits and single hyphens, beginning with a letter",
        ),
        ("3d-loss", "'3d-loss' is no name for a plugin"),
        ("../loss", "'../loss' is no name for a plugin"),
        ("clip", f"the name 'clip' is taken: cosmos-ssl {__version__} offers losses/clip. Give another one"),
        ("triplet", "the name 'triplet' is taken: my-losses 0.3.1 offers losses/triplet. Give another one"),
        ("My_Losses", "the name 'My_Losses' is taken: My_Losses 0.3.1 is installed. Give another one"),
        ("lonely", "the name 'lonely' is taken: there is a module 'lonely' already. Give another one"),
        ("random", "the name 'random' is taken: Python has a module 'random'. Give another one"),
        ("null", "the name 'null' is taken: 'null' has a meaning of its own. Give another one"),
        (
            "loss",
            "the name 'loss' is taken: its class would be called 'Loss', as another one that it needs. Give "
            "another one",
        ),
    ],
)
def test_names_that_cannot_be_used(command: Command, install: Install, tmp_path: Path, name: str, message: str) -> None:
    install("my-losses", "0.3.1", entries={"losses/triplet": "my_losses:X"}, modules={"lonely": ""})
    code, out, err = command("plugins", "new", name, "--kind", "loss", "--output", str(tmp_path / "new"))
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith(message)
    assert not (tmp_path / "new").exists()


def test_a_name_is_taken_in_its_own_group_alone(command: Command, tmp_path: Path) -> None:
    assert command("plugins", "new", "clip", "--kind", "head", "--output", str(tmp_path))[0] == 0


def test_places_that_cannot_be_used(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "our-loss").mkdir()
    code, _, err = command("plugins", "new", "our-loss", "--kind", "loss", "--output", str(tmp_path))
    assert (code, err) == (
        2,
        f"{tmp_path / 'our-loss'} exists already. Give another name, or another folder with --output\n",
    )
    (tmp_path / "file").touch()
    code, _, err = command("plugins", "new", "our-loss", "--kind", "loss", "--output", str(tmp_path / "file" / "x"))
    assert (code, err) == (
        2,
        f"{tmp_path / 'file' / 'x' / 'our-loss'} cannot be written: Not a directory\n",
    )

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    code, _, err = command("plugins", "new", "your-loss", "--kind", "loss", "--output", str(tmp_path))
    assert (code, err) == (2, f"{tmp_path / 'your-loss'} cannot be written: Permission denied\n")


def test_kinds_must_be_known(command: Command) -> None:
    code, _, err = command("plugins", "new", "my-thing", "--kind", "thing")
    assert code == 2 and "choose from" in err and "augmenter" in err
