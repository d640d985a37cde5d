"""plugins/README.md: its table is what the program prints, its doors are there, and its Python runs."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cosmos_ssl
from cosmos_ssl import api, registry
from cosmos_ssl.testing.examples import small_config

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "plugins" / "README.md").read_text()
START, END = "<!-- table -->\n", "<!-- end of table -->\n"


def block(text: str, containing: str) -> str:
    """The Python block of a document that holds some text."""
    [found] = [
        code for code in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if containing in code
    ]
    return found


@pytest.fixture
def my_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The module of the project's README, on the path."""
    (tmp_path / "my_losses.py").write_text(block((ROOT / "README.md").read_text(), "class Uniformity"))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_losses", None)


def run(code: str) -> dict[str, Any]:
    """What is defined when a piece of code has run."""
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_table_is_what_the_program_prints() -> None:
    program = str(Path(sys.executable).parent / "cosmos-ssl")
    environment = os.environ | {"COSMOS_DISABLE_PLUGINS": "1"}
    done = subprocess.run(
        [program, "plugins", "list", "--markdown"], env=environment, capture_output=True, text=True, check=True
    )
    written = README.partition(START)[2].partition(END)[0]
    assert written == done.stdout, (
        "put there what is printed by: COSMOS_DISABLE_PLUGINS=1 cosmos-ssl plugins list --markdown"
    )
    assert all(f"`{record.group}/{record.name}`" in written for record in registry.records() if record.own)


def test_doors_lead_somewhere() -> None:
    """Every hook, example and test that is named is there; every group of entry points has a row."""
    rows = README.partition("<!-- doors -->\n")[2].partition("<!-- end of doors -->")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    for _, by, *places in cells:
        paths = [path for place in places for path in re.findall(r"\]\((.*?)\)$", place)]
        assert len(paths) == 2 and all((ROOT / "plugins" / path).is_file() for path in paths), places
        assert "tests/" in paths[1]
        for base, name in re.findall(r"`([A-Z]\w+)\.(\w+)`", by):
            there = getattr(api, base)
            assert hasattr(there, name) or name in there.__dataclass_fields__, f"{base}.{name}"
    groups = {by.partition(":")[0] for _, by, *_ in cells}
    assert groups >= set(registry.GROUPS)


def test_python_api(
    my_losses: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer = cosmos_ssl.make_trainer

    def small(config: dict[str, Any], overrides: list[str]) -> Any:
        return make_trainer(small_config(str(tmp_path), 3, config | {"name": "small"}), overrides)

    code = block(README, "make_trainer")
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    monkeypatch.setattr(cosmos_ssl, "make_trainer", small)
    names = run(code)
    loss = names["trainer"].assembly.model.loss("uniformity")
    assert (
        type(loss) is names["Uniformity"]
        and loss.t == 3.0
        and names["trainer"].assembly.loss_weights["uniformity"] == 0.1
    )
    assert capsys.readouterr().out.splitlines()[-1] == f"3 {names['metrics']['loss/uniformity']}"
    assert names["metrics"]["loss/uniformity"] < 0


def test_example_test(my_losses: None, tmp_path: Path) -> None:
    names = run(block(README, "check_loss"))
    tests: dict[str, Callable[..., None]] = {name: value for name, value in names.items() if name.startswith("test_")}
    assert len(tests) == 2
    for test in tests.values():
        test(*[tmp_path for _ in inspect.signature(test).parameters])
