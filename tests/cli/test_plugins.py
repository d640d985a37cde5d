"""``cosmos-ssl plugins``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cosmos_ssl import registry

Command = Callable[..., tuple[int, str, str]]
Install = Callable[..., Path]

HEAD = '''
from cosmos_ssl.api import Head

class Plain(Head):
    """A head.

    width: how wide it is.
    """

    def __init__(self, spec, *, width: int = 32, names: list[str]) -> None:
        super().__init__()

    def outputs(self): return {}
    def requires(self): return []
    def forward(self, features, views): return {}
'''


def test_list(command: Command, install: Install) -> None:
    install("my-losses", "0.3.1", entries={"losses/clip": "no_such_module:X", "losses/triplet": "no_such_module:Y"})
    code, out, _ = command("plugins", "list")
    head, columns, *rows = out.splitlines()
    assert (
        code == 0 and head == f"cosmos-ssl {registry.__version__}, plugin API 1" and columns.split() == ["GROUP", "NAME", "FROM", "OBJECT"]
    )
    cells = [[row[columns.index(name) :].split("  ")[0].strip() for name in ("GROUP", "NAME", "FROM", "OBJECT")] for row in rows]
    assert ["losses", "my-losses:clip", "my-losses 0.3.1", "no_such_module:X"] in cells
    assert ["losses", "triplet", "my-losses 0.3.1", "no_such_module:Y"] in cells
    assert ["losses", "clip", f"cosmos-ssl {registry.__version__}", "cosmos_ssl_plugins.losses.clip:Clip"] in cells


def test_list_as_json(command: Command, tmp_path: Path) -> None:
    assert command("plugins", "list", "--json", str(tmp_path / "x.json"))[0] == 0
    parts = json.loads((tmp_path / "x.json").read_text())
    assert {"group", "name", "distribution", "version", "object"} == set(parts[0]) and len(parts) == len(registry.records())


def test_list_where_nothing_is_installed(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_discover", lambda path: ())
    assert command("plugins", "list")[::2] == (2, f"{registry.NOT_INSTALLED}\n")


def test_show(command: Command, install: Install, tmp_path: Path) -> None:
    install("my-heads", "2.0", entries={"heads/plain": "my_heads:Plain"}, modules={"my_heads": HEAD})
    code, out, _ = command("plugins", "show", "plain", "--json", str(tmp_path / "x.json"))
    lines = [line.split() for line in out.splitlines()]
    assert code == 0 and out.startswith("heads/plain (my-heads 2.0, my_heads:Plain)\n  A head.\n")
    assert ["width", "int", "32", "how", "wide", "it", "is."] in lines and ["names", "list[str]", "(required)"] in lines
    options = json.loads((tmp_path / "x.json").read_text())["options"]
    assert options[0] == {"name": "width", "type": "int", "required": False, "default": 32, "doc": "how wide it is."}


def test_show_tells_what_a_part_requires_and_offers(command: Command) -> None:
    _, out, _ = command("plugins", "show", "heads/cross_attention")
    assert "Requires\n" in out and "text tokens of group 'global', view 1, with pads" in out and "Outputs\n  image, width 512\n" in out
    _, out, _ = command("plugins", "show", "losses/clip")
    assert "Options (and loss_weight, handled by the engine)" in out and "student: image projected of group 'global'" in out
    _, out, _ = command("plugins", "show", "multi_crop")
    assert "local: 6 views of 96 x 96 pixels" in out
    _, out, _ = command("plugins", "show", "clip_vit")
    assert "Capabilities\n" in out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clip", "'clip' is the name of several parts. Write losses/clip or tokenizers/clip\n"),
        ("multicrop", "no part named 'multicrop'. Did you mean 'multi_crop'? See: cosmos-ssl plugins list\n"),
        ("loss/clip", "no group named 'loss'. Did you mean 'losses'? Groups: augmenters, heads, "),
        ("losses/clop", "no loss named 'clop'. Did you mean 'clip'?\nAvailable: "),
    ],
)
def test_show_of_unclear_names(command: Command, name: str, message: str) -> None:
    code, _, err = command("plugins", "show", name)
    assert code == 2 and err.startswith(message)


def test_check(command: Command, install: Install, tmp_path: Path) -> None:
    own = sum(record.own for record in registry.records())
    install("my-heads", "2.0", entries={"heads/plain": "my_heads:Plain"}, modules={"my_heads": HEAD})
    code, out, _ = command("plugins", "check")
    assert (code, out) == (0, f"{own + 1} of {own + 1} parts can be used\n")
    install("bad-heads", "1.0", entries={"heads/a": "bad_heads:A", "heads/b": "my_heads:HEAD"}, modules={"bad_heads": "import einops_x"})
    code, out, _ = command("plugins", "check", "--json", str(tmp_path / "x.json"))
    first, second, last = out.splitlines()
    assert code == 3 and last == f"{own + 1} of {own + 3} parts can be used"
    assert first == "heads/a (bad-heads 1.0, bad_heads:A) cannot be imported: ModuleNotFoundError: No module named 'einops_x'"
    assert second.startswith("heads/b (bad-heads 1.0, my_heads:HEAD) cannot be imported: AttributeError")
    assert [row["name"] for row in json.loads((tmp_path / "x.json").read_text()) if row["error"]] == ["a", "b"]
