"""A stranger's package: built from the README's own text, installed beside the project, listed, chosen in YAML, trained
with.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
SMALL = [
    *(
        "data.train_samples=32",
        "data.validation_samples=8",
        "data.image_size=32",
        "loader.workers=0",
        "evaluators=null",
    ),
    *(
        "model.image.image_size=32",
        "model.image.width=64",
        "model.image.layers=1",
        "model.text.width=64",
        "model.text.layers=1",
    ),
    *(
        "augmenters.image.global_crops_size=32",
        "augmenters.image.local_crops_size=16",
        "augmenters.image.local_crops_number=1",
    ),
    *(
        "training.batch_size=8",
        "schedule.epochs=1",
        "schedule.warmup_steps=1",
        "logging.every_steps=1",
        "logging.tensorboard=false",
    ),
]


def block(language: str, containing: str) -> str:
    """The README's block of this language that holds some text."""
    [found] = [
        text
        for text in re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
        if containing in text
    ]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package's sources, its installation in ``site``, and ``run.yaml``."""
    folder = tmp_path_factory.mktemp("outside")
    source = folder / "my-losses"
    source.mkdir()
    (source / "my_losses.py").write_text(block("python", "class Uniformity"))
    (source / "pyproject.toml").write_text(block("toml", "my_losses:Uniformity"))
    (folder / "run.yaml").write_text(block("yaml", "uniformity"))
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--disable-pip-version-check", "--target", str(folder / "site"), str(source)], check=True)
    return folder


def run(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command as a user types it, with the package importable and caches inside ``folder``."""
    environment = (
        os.environ
        | {"PYTHONPATH": str(folder / "site"), "XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "200"}
        | variables
    )
    program = str(Path(sys.executable).parent / command[0])
    return subprocess.run(
        [program, *command[1:]], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_loss_is_under_thirty_lines() -> None:
    assert len(block("python", "class Uniformity").strip().splitlines()) < 30


def test_it_is_listed_with_its_distribution(folder: Path) -> None:
    done = run(folder, "cosmos-ssl", "plugins", "list")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^losses +uniformity +my-losses 0\.3\.1 +my_losses:Uniformity$", done.stdout, re.MULTILINE), (
        done.stdout
    )


def test_its_options_are_checked(folder: Path) -> None:
    done = run(folder, "cosmos-ssl", "config", "check", "run.yaml", "losses.uniformity.tt=3.0")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "losses.uniformity.tt" in done.stderr and "my-losses 0.3.1" in done.stderr


def test_plugins_can_be_disabled(folder: Path) -> None:
    listed = run(folder, "cosmos-ssl", "plugins", "list", COSMOS_DISABLE_PLUGINS="1")
    assert listed.returncode == 0 and "my-losses" not in listed.stdout and "cross_attention" in listed.stdout
    done = run(folder, "cosmos-launch", "--config", "run.yaml", "output_dir=disabled", COSMOS_DISABLE_PLUGINS="1")
    assert (
        done.returncode == 2
        and "losses.uniformity.type: no loss named 'uniformity'" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert not (folder / "disabled").exists()


def test_it_passes_the_checks_of_parts(folder: Path) -> None:
    code = "from cosmos_ssl.testing import check_loss; check_loss('my-losses:uniformity', t=3.0)"
    environment = os.environ | {"PYTHONPATH": str(folder / "site")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_it_trains(folder: Path) -> None:
    done = run(folder, "cosmos-launch", "--config", "run.yaml", "output_dir=run", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    terms = [value for row in rows for name, value in row.items() if name.startswith("loss/") and "uniformity" in name]
    assert len(terms) == 4 and len(set(terms)) == 4  # 32 samples in batches of 8, and the loss moves
    assert "my-losses" in "".join(
        path.read_text() for path in (folder / "run").glob("*") if path.suffix in {".json", ".yaml", ".txt", ".log"}
    )
