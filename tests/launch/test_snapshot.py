"""The copy of the code: what is in it, and that Python takes it from there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import cosmos_ssl
from cosmos_ssl.config.source import packaged_configs
from cosmos_ssl_launch.snapshot import drop_snapshot, sources, take_snapshot

HEAD = '"""Hers."""\nfrom cosmos_ssl.api import Head\n\n\nclass Mine(Head):\n    """Hers."""\n'


@pytest.fixture
def tree(install: Callable[..., Path], tmp_path: Path) -> dict[str, object]:
    """A config with a part of a distribution outside of site-packages, and one of a distribution that no part names."""
    site = install("her-heads", entries={"heads/mine": "her_heads.mine:Mine", "losses/other": "her_other:Other"})
    (site / "her_heads" / "__pycache__").mkdir(parents=True)
    for name, text in (("__init__.py", ""), ("mine.py", HEAD), ("table.json", "{}"), ("__pycache__/old.pyc", "")):
        (site / "her_heads" / name).write_text(text)
    (site / "her_other.py").write_text("")
    return {
        "model": {"image": {"type": "clip_vit"}, "text": None},
        "heads": {"a": {"type": "mine"}},
        "losses": {"clip": {"type": "clip"}},
    }


def test_what_is_copied(tree: dict[str, object], tmp_path: Path) -> None:
    assert sorted(sources(tree)) == ["cosmos_ssl", "cosmos_ssl_launch", "cosmos_ssl_plugins", "her_heads"]
    (tmp_path / "run" / "code" / "left").mkdir(parents=True)
    code = take_snapshot(tmp_path / "run", tree)
    assert sorted(path.name for path in code.iterdir()) == [
        "cosmos_ssl",
        "cosmos_ssl_launch",
        "cosmos_ssl_plugins",
        "her_heads",
    ]
    assert {path.name for path in (code / "her_heads").iterdir()} == {"__init__.py", "mine.py", "table.json"}
    package = Path(cosmos_ssl.__file__).parent
    names = {path.relative_to(package) for path in package.rglob("*.py")}
    assert {path.relative_to(code / "cosmos_ssl") for path in (code / "cosmos_ssl").rglob("*.py")} == names
    assert {
        f"{path.relative_to(code / 'cosmos_ssl' / 'configs').with_suffix('')}"
        for path in code.rglob("configs/**/*.yaml")
    } == set(packaged_configs())
    assert (code / "cosmos_ssl_launch" / "profiles" / "slurm.yaml").exists()
    drop_snapshot(tmp_path / "run")
    assert not code.exists()


def test_python_takes_it_from_the_copy_also_in_a_clone(tree: dict[str, object], tmp_path: Path) -> None:
    code = take_snapshot(tmp_path, tree)
    asked = (
        "import cosmos_ssl, cosmos_ssl.config.source as c; print(cosmos_ssl.__file__, "
        "c.find_config('quickstart').resolve())"
    )
    done = subprocess.run(
        [sys.executable, "-c", asked],
        cwd=Path(cosmos_ssl.__file__).parents[1],
        env={"PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [
        str(code / "cosmos_ssl" / "__init__.py"),
        str(code / "cosmos_ssl" / "configs" / "quickstart.yaml"),
    ]
