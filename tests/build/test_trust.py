"""A run folder of a stranger: what its config names beside the parts of installed packages runs only where it is
trusted.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import cosmos_ssl
from cosmos_ssl.build import Builder
from cosmos_ssl.cli import main
from cosmos_ssl.config import load_config
from cosmos_ssl.errors import ConfigError

TINY: dict[str, Any] = {
    "extends": "quickstart",
    "model": {"image": {"layers": 1, "width": 64}, "text": {"layers": 1, "width": 64, "heads": 2}, "embed_dim": 32},
    "data": {"train_samples": 16, "validation_samples": 8, "image_size": 32},
    "loader": {"workers": 0},
    "schedule": {"max_steps": 1, "warmup_steps": 1},
    "training": {"batch_size": 8},
    "evaluators": None,
    "logging": {"tensorboard": False},
}
CODE = (
    "from pathlib import Path\nfrom cosmos_ssl_plugins.losses.clip import Clip\n\nclass Loss(Clip):\n    '''Ours.'''\n"
)
REFUSED = "losses.clip.type: 'python:stranger_code.Loss' is code that no installed package offers"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the ``run`` of the stranger, the module that it names, and a picture."""
    folder = tmp_path_factory.mktemp("trust")
    cosmos_ssl.train(TINY, [f"output_dir={folder}/run", f"data.folder={folder}/scenes"])
    config = (folder / "run" / "config.yaml").read_text()
    assert config.count("type: clip\n") == 2
    at = config.index("type: clip\n", config.index("losses:"))
    (folder / "run" / "config.yaml").write_text(f"{config[:at]}type: python:stranger_code.Loss\n{config[at + 11 :]}")
    (folder / "stranger_code.py").write_text(CODE)
    (folder / "pictures").mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "pictures" / "a.png")
    return folder


@pytest.fixture(autouse=True)
def importable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    yield
    sys.modules.pop("stranger_code", None)


COMMANDS = {
    "eval": ["--task", "retrieval"],
    "embed": ["--data", "pictures", "--output", "out_embed.npy"],
    "export": ["--format", "openclip", "--output", "out_export"],
    "attend": ["--image", "pictures/a.png", "--text", "a red circle", "--output", "out_attend"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_import_nothing_of_it(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [command, "--checkpoint", "run", *COMMANDS[command]]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert REFUSED in said and "--trust-code" in said and said.count("\n") == 1
    assert "stranger_code" not in sys.modules
    main([*words, "--trust-code"])
    assert "stranger_code" in sys.modules and REFUSED not in capsys.readouterr().err


def test_loading_and_frozen_teachers_and_start_weights() -> None:
    with pytest.raises(ConfigError, match="trust_code=True"):
        cosmos_ssl.load("run")
    data = "data.folder=scenes"
    model = Builder(load_config(TINY, [data, "model.pretrained=run"])).assemble("train").model
    teacher = "teacher={type: frozen, checkpoint: run, which: student%s}"
    with pytest.raises(ConfigError, match="is code that no installed package offers"):
        Builder(load_config(TINY, [data, teacher % ""])).assemble("train").teacher.prepare()
    assert "stranger_code" not in sys.modules and model is not None
    Builder(load_config(TINY, [data, teacher % ", trust_code: true"])).assemble("train").teacher.prepare()
    assert cosmos_ssl.load("run", trust_code=True).model is not None and "stranger_code" in sys.modules


def test_a_class_that_was_given_in_this_process_is_no_strangers(folder: Path, tmp_path: Path) -> None:
    from cosmos_ssl_plugins.losses.clip import Clip

    class Own(Clip):
        """Of the one who loads."""

    config = {**TINY, "losses": {"clip": {"type": Own}}}
    cosmos_ssl.train(config, [f"output_dir={tmp_path}/own", "data.folder=scenes"])
    assert type(cosmos_ssl.load(tmp_path / "own").model.loss("clip")) is Own
    shutil.rmtree(tmp_path / "own")
