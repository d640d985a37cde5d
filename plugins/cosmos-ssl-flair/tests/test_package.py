"""The distribution: its parts are found by their metadata, it is typed, and it stands on the public surface alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

from cosmos_ssl.testing import check_head, check_loss

FOLDER = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((FOLDER / "pyproject.toml").read_text())
FILES = sorted(FOLDER.rglob("*.py"))
PUBLIC = re.compile(r"cosmos_ssl(\.(api|functional|testing|(models|data|evaluation)(\.\w+)*))?")


def imports(path: Path) -> list[str]:
    """Full names of the modules that a file imports, at any depth."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}:{node.lineno}"
            found += (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "cosmos_ssl"
                else [node.module]
            )
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_only_the_public_surface_is_imported(path: Path) -> None:
    ours = [name for name in imports(path) if name == "cosmos_ssl" or name.startswith("cosmos_ssl.")]
    assert not [name for name in ours if not PUBLIC.fullmatch(name)]
    assert "cosmos_ssl_plugins" not in " ".join(imports(path))
    assert not re.search(r"import_module|__import__", path.read_text()) or path == Path(__file__)


def test_public_and_private_are_told_apart() -> None:
    for name in ("cosmos_ssl", "cosmos_ssl.api", "cosmos_ssl.models.attention", "cosmos_ssl.data"):
        assert PUBLIC.fullmatch(name), name
    for name in (
        "engine",
        "engine.step",
        "registry",
        "config",
        "build",
        "cli",
        "interop",
        "types",
        "errors",
        "specs",
        "api_x",
    ):
        assert not PUBLIC.fullmatch(f"cosmos_ssl.{name}"), name


def test_parts_are_listed_with_their_distribution() -> None:
    program = Path(sys.executable).parent / "cosmos-ssl"
    done = subprocess.run([str(program), "plugins", "list"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for group, name, object_path in (("heads", "flair_pool", "pooling:FlairPool"), ("losses", "flair", "loss:Flair")):
        pattern = (
            rf"^{group} +{name} +cosmos-ssl-flair {re.escape(PYPROJECT['project']['version'])} "
            rf"+cosmos_ssl_flair\.{object_path}$"
        )
        assert re.search(pattern, done.stdout, re.MULTILINE), done.stdout


def test_installed_metadata_are_those_of_pyproject() -> None:
    project, installed = PYPROJECT["project"], distribution("cosmos-ssl-flair")
    declared = {
        (group, name, value) for group, points in project["entry-points"].items() for name, value in points.items()
    }
    assert {(point.group, point.name, point.value) for point in installed.entry_points} == declared
    assert installed.version == project["version"]
    assert "cosmos-ssl<0.2,>=0.1" in (installed.requires or [])


def test_the_wheel_holds_recipe_and_type_marker(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=FOLDER, check=True, capture_output=True)
    [wheel] = tmp_path.iterdir()
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = FOLDER / "cosmos_ssl_flair"
    files = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert held == {str(path.relative_to(FOLDER)) for path in files}
    assert {"cosmos_ssl_flair/flair.yaml", "cosmos_ssl_flair/py.typed"} <= held


def test_parts_keep_to_the_contract() -> None:
    heads = {"heads": {"pool": {"type": "flair_pool"}}}
    check_head("flair_pool")
    check_head("flair_pool", num_heads=4)
    check_loss("flair", around=heads, head="pool")
    check_loss("flair", around=heads, head="pool", negative_captions=1)
    check_loss("flair", around=heads, head="pool", multi_positive_share=0.0)
