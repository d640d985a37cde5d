"""The distribution: its parts are found by their metadata, it is whole, and it stands on the public surface alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

from cosmos_ssl_masked import RECIPES

FOLDER = Path(__file__).resolve().parents[1]
PACKAGE = FOLDER / "cosmos_ssl_masked"
PROJECT = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]


def test_only_the_public_surface_is_imported() -> None:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                found.add(node.module or ".")
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
    ours = {name for name in found if re.match(r"\.|cosmos_ssl(?!_masked\b)", name)}
    assert ours == {"cosmos_ssl.api", "cosmos_ssl.functional"}


def test_installed_metadata_are_those_of_pyproject() -> None:
    installed = distribution("cosmos-ssl-masked")
    declared = {
        (group, name, value) for group, points in PROJECT["entry-points"].items() for name, value in points.items()
    }
    assert {(point.group, point.name, point.value) for point in installed.entry_points} == declared
    assert installed.version == PROJECT["version"]
    assert "cosmos-ssl<0.2,>=0.1" in (installed.requires or [])


def test_the_wheel_holds_recipes_and_type_marker(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=FOLDER, check=True, capture_output=True)
    [wheel] = tmp_path.iterdir()
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert held == {str(path.relative_to(FOLDER)) for path in files}
    assert {"cosmos_ssl_masked/py.typed", *(f"cosmos_ssl_masked/{Path(r).name}" for r in RECIPES.values())} <= held
