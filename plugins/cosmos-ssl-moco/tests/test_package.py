"""The distribution: its parts are found by their metadata and keep to the contract, on the public surface alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

from cosmos_ssl.testing import check_loss

FOLDER = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((FOLDER / "pyproject.toml").read_text())
FILES = sorted(FOLDER.rglob("*.py"))
PROJECTION: dict[str, Any] = {"type": "projection", "hidden_dim": 24, "output_dim": 16, "output_batch_norm": True}
HEADS = {"heads": {"project": PROJECTION, "predict": {**PROJECTION, "input": "project"}}}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_only_the_public_surface_is_imported(path: Path) -> None:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}:{node.lineno}"
            found.append(node.module)
    ours = {name for name in found if re.match(r"cosmos_ssl(\.|$|_plugins|_launch)", name)}
    assert ours <= {"cosmos_ssl", "cosmos_ssl.api", "cosmos_ssl.functional", "cosmos_ssl.testing"}


def test_installed_metadata_are_those_of_pyproject() -> None:
    project, installed = PYPROJECT["project"], distribution("cosmos-ssl-moco")
    declared = {
        (group, name, value) for group, points in project["entry-points"].items() for name, value in points.items()
    }
    assert {(point.group, point.name, point.value) for point in installed.entry_points} == declared
    assert installed.version == project["version"]
    assert "cosmos-ssl<0.2,>=0.1" in (installed.requires or [])


def test_the_wheel_holds_recipes_and_type_marker(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=FOLDER, check=True, capture_output=True)
    [wheel] = tmp_path.iterdir()
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = FOLDER / "cosmos_ssl_moco"
    files = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert held == {str(path.relative_to(FOLDER)) for path in files}
    assert {f"cosmos_ssl_moco/{name}" for name in ("moco_text.yaml", "moco_v3.yaml", "py.typed")} <= held


@pytest.mark.parametrize(
    ("part", "options"),
    [
        ("moco_text", {"text_queue": 20, "image_queue": 7}),  # less than a step's 12 keys, and no multiple of them
        ("moco_text", {"text_queue": 0, "image_queue": 0}),
        ("moco_v3", {"head": "predict", "target_head": "project"}),
        ("moco_v3", {"head": "predict", "target_head": "project", "queue_size": 50}),
    ],
)
def test_parts_keep_to_the_contract_on_two_ranks_too(part: str, options: dict[str, Any]) -> None:
    check_loss(part, around=HEADS, ranks=2, **options)
