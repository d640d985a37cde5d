"""The wheel holds what git holds, and what is installed is what pyproject says."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from cosmos_ssl.models.attention import backend_report, resolve_backend

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Where each folder of the clone lies in the wheel.
HOMES = {"cosmos_ssl": "cosmos_ssl", "plugins/cosmos_ssl_plugins": "cosmos_ssl_plugins"}
HOMES |= {"launch/cosmos_ssl_launch": "cosmos_ssl_launch", "configs": "cosmos_ssl/configs"}


def tracked() -> list[str]:
    """Names of the files that git holds and that still exist."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of the tracked files as they stand in the working tree."""
    clone = tmp_path_factory.mktemp("clone")
    for name in tracked():
        if not name.startswith("tests/"):
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, clone / name)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "dist"]
    subprocess.run(command, cwd=clone, check=True, capture_output=True)
    [path] = (clone / "dist").iterdir()
    return zipfile.ZipFile(path)


def test_wheel_holds_what_git_holds(wheel: zipfile.ZipFile) -> None:
    expected = {
        f"{home}{name.removeprefix(folder)}"
        for name in tracked()
        for folder, home in HOMES.items()
        if name.startswith(f"{folder}/")
    }
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == expected
    assert {f"{package}/py.typed" for package in ("cosmos_ssl", "cosmos_ssl_plugins", "cosmos_ssl_launch")} <= found


def test_nothing_foreign_lands_in_site_packages(wheel: zipfile.ZipFile) -> None:
    info = f"cosmos_ssl-{PYPROJECT['project']['version']}.dist-info"
    assert {name.split("/")[0] for name in wheel.namelist()} == {
        "cosmos_ssl",
        "cosmos_ssl_plugins",
        "cosmos_ssl_launch",
        info,
    }
    assert f"{info}/licenses/LICENSE" in wheel.namelist()


def test_installed_entry_points_are_those_of_pyproject() -> None:
    project = PYPROJECT["project"]
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    declared = {(group, name, value) for group, points in groups.items() for name, value in points.items()}
    installed = {(point.group, point.name, point.value) for point in distribution("cosmos-ssl").entry_points}
    assert installed == declared, "pyproject.toml has changed since it was installed. Run: pip install -e ."


def test_installed_version_is_the_package_s() -> None:
    import cosmos_ssl

    assert cosmos_ssl.__version__ == PYPROJECT["project"]["version"] == distribution("cosmos-ssl").version


def pair(extra: str) -> dict[str, SpecifierSet]:
    """The versions that an extra asks for."""
    wanted = map(Requirement, PYPROJECT["project"]["optional-dependencies"][extra])
    return {requirement.name: requirement.specifier for requirement in wanted}


def test_the_extra_for_cuda_12_pairs_xformers_with_the_torch_it_was_built_against() -> None:
    spec = importlib.util.find_spec("xformers")
    if spec is None or spec.origin is None or version("xformers") not in pair("cuda12")["xformers"]:
        pytest.skip("another xformers, or none")
    built = json.loads(Path(spec.origin).with_name("cpp_lib.json").read_text())["version"]
    assert Version(built["torch"]).base_version in pair("cuda12")["torch"] and built["cuda"] // 100 == 12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_either_extra_has_attention_in_little_memory() -> None:
    ours = version("torch").partition("+")[0]
    for extra, backend in (("cuda12", "xformers"), ("cuda13", "varlen")):
        if ours in pair(extra)["torch"]:
            assert resolve_backend("auto", "cuda") == backend, backend_report()


def test_groups_are_sorted() -> None:
    for group, points in PYPROJECT["project"]["entry-points"].items():
        assert list(points) == sorted(points), group
