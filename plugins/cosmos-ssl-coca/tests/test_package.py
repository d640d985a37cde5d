"""The distribution: it is typed, it holds its recipe, and it stands on the public surface alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1]
PUBLIC = re.compile(r"cosmos_ssl(\.(api|functional|testing))?")


def test_only_the_public_surface_is_imported() -> None:
    found = []
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.module and not node.level, f"{path}:{node.lineno}"
                found.append(node.module)
    ours = {name for name in found if re.match(r"cosmos_ssl(_plugins)?(\.|$)", name)}
    assert "cosmos_ssl.api" in ours and not [name for name in ours if not PUBLIC.fullmatch(name)]


def test_installed_metadata_are_those_of_pyproject() -> None:
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]
    installed = distribution(project["name"])
    declared = {(group, name, at) for group, points in project["entry-points"].items() for name, at in points.items()}
    assert {(point.group, point.name, point.value) for point in installed.entry_points} == declared
    assert installed.version == project["version"]


def test_the_wheel_holds_recipe_and_type_marker(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=FOLDER, check=True, capture_output=True)
    [wheel] = tmp_path.iterdir()
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = [path for path in (FOLDER / "cosmos_ssl_coca").iterdir() if path.is_file()]
    assert held == {str(path.relative_to(FOLDER)) for path in files}
    assert {"cosmos_ssl_coca/coca.yaml", "cosmos_ssl_coca/py.typed"} <= held
