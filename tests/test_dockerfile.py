"""The Dockerfile, as far as it can be tried without a container: hadolint finds nothing, and its steps on the files
that it copies, and no others, give the requirements of each device and the wheel.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINES = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
STEPS = [tuple(step.split(maxsplit=1)) for step in "\n".join(LINES).replace("\\\n", "").splitlines() if step.strip()]


def copied() -> list[str]:
    """What is taken from the clone into the image."""
    words = [text.split() for step, text in STEPS if step == "COPY"]
    return [source for sources in words if not sources[0].startswith("--from") for source in sources[:-1]]


@pytest.mark.skipif(sys.platform != "linux", reason="its package brings the program for Linux")
def test_hadolint_finds_nothing() -> None:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    assert program is not None, "pip install -e '.[dev]' brings it"
    done = subprocess.run([program, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("device", ["cpu", "cuda12", "cuda13", "cude12"])
def test_the_requirements_of_a_device(tmp_path: Path, device: str) -> None:
    [script] = [text for step, text in STEPS if step == "RUN" and "tomllib" in text]
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "DEVICE": device}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    if device == "cude12":
        assert done.returncode != 0 and "KeyError: 'cude12'" in done.stderr
        return
    found = (tmp_path / "requirements.txt").read_text().splitlines()
    assert found == PROJECT["dependencies"] + PROJECT["optional-dependencies"].get(device, [])


def test_what_is_copied_makes_the_wheel(tmp_path: Path) -> None:
    allowed = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert sorted(copied()) == sorted(allowed)
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = [name for name in names.split("\0") if (ROOT / name).is_file()]
    inside = [name for name in tracked if any(name == one or name.startswith(f"{one}/") for one in copied())]
    for name in inside:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "dist"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    [wheel] = (tmp_path / "dist").iterdir()
    held = {name.rpartition("/")[2] for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {"quickstart.yaml", "py.typed"} <= held
    assert held == {Path(name).name for name in inside if "/" in name}


def test_it_starts_a_program_of_the_project_as_no_root() -> None:
    last = dict(STEPS)
    assert last["ENTRYPOINT"] == '["cosmos-launch"]' and "cosmos-launch" in PROJECT["scripts"]
    assert last["USER"].isdecimal() and last["USER"] != "0"
