"""``cosmos-ssl plugins``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from cosmos_ssl import __version__, registry

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
    def requires(self, outputs): return []
    def forward(self, features, views, outputs): return {}
'''


def test_list(command: Command, install: Install) -> None:
    install("my-losses", "0.3.1", entries={"losses/clip": "no_such_module:X", "losses/triplet": "no_such_module:Y"})
    code, out, _ = command("plugins", "list")
    head, columns, *rows = out.splitlines()
    assert (
        code == 0
        and head == f"cosmos-ssl {__version__}, plugin API 2"
        and columns.split() == ["GROUP", "NAME", "FROM", "OBJECT"]
    )
    cells = [
        [row[columns.index(name) :].split("  ")[0].strip() for name in ("GROUP", "NAME", "FROM", "OBJECT")]
        for row in rows
    ]
    assert ["losses", "my-losses:clip", "my-losses 0.3.1", "no_such_module:X"] in cells
    assert ["losses", "triplet", "my-losses 0.3.1", "no_such_module:Y"] in cells
    assert ["losses", "clip", f"cosmos-ssl {__version__}", "cosmos_ssl_plugins.losses.clip:Clip"] in cells


def test_list_as_json(command: Command, tmp_path: Path) -> None:
    assert command("plugins", "list", "--json", str(tmp_path / "x.json"))[0] == 0
    parts = json.loads((tmp_path / "x.json").read_text())
    assert {"group", "name", "distribution", "version", "object"} == set(parts[0]) and len(parts) == len(
        registry.records()
    )


def test_list_where_nothing_is_installed(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cosmos_ssl.registry.parts.discover", lambda path: ())
    assert command("plugins", "list")[::2] == (2, f"{registry.NOT_INSTALLED}\n")


def test_show(command: Command, install: Install, tmp_path: Path) -> None:
    install("my-heads", "2.0", entries={"heads/plain": "my_heads:Plain"}, modules={"my_heads": HEAD})
    code, out, _ = command("plugins", "show", "plain", "--json", str(tmp_path / "x.json"))
    lines = [line.split() for line in out.splitlines()]
    assert code == 0 and out.startswith("heads/plain (my-heads 2.0, my_heads:Plain)\n  A head.\n")
    assert ["width", "int", "32", "how", "wide", "it", "is."] in lines and ["names", "list[str]", "(required)"] in lines
    options = json.loads((tmp_path / "x.json").read_text())["options"]
    assert options[0] == {"name": "width", "type": "int", "required": False, "default": 32, "doc": "how wide it is."}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["heads/cross_attention"],
            "Requires\n  for 'image': image projected of all groups and text tokens of group 'global', view 1, "
            "with pads\n"
            "  for 'text': text projected of all groups and image tokens of group 'global', view 1\n\n"
            "Offers\n  output 'image', width 512\n  output 'text', width 512\n",
        ),
        (["heads/cross_attention", "mask_padding=true"], "text tokens of group 'global', view 1\n"),
        (
            ["heads/cross_attention", "num_heads=7"],
            "cannot be told: ValueError: num_heads: model.embed_dim (512) is not a multiple of 7\n",
        ),
        (["losses/clip"], "Options (and loss_weight, handled by the engine)"),
        (
            ["losses/clip"],
            "Requires\n  student: image projected of group 'global', gathered over ranks\n  student: text projected of",
        ),
        (
            ["cross_modality_distillation"],
            "  with a head instead: student: 'image' and 'text' of its head; teacher: image projected of",
        ),
        (
            ["cross_modality_distillation", "head=mine"],
            "Requires\n  student: 'image' and 'text' of the head 'mine'\n  teacher: image",
        ),
        (["losses/dino"], "Requires\n  student: 'global' and 'local' of its head\n  teacher: 'global' of its head\n"),
        (["losses/ibot"], "student: 'global_masked' of its head\n"),
        (
            ["dino_projection", "output_dim=7"],
            "masked tokens of group 'global'\n  for 'global_patches': image tokens of group 'global'\n\nOffers\n",
        ),
        (["losses/lightly"], "with a head instead: student: 'global' of its head, gathered over ranks\n"),
        (["multi_crop"], "Offers\n  'global': 2 views of 224 x 224 pixels\n  'local': 6 views of 96 x 96 pixels\n"),
        (
            ["multi_crop", "mask_probability=0.5", "local_crops_number=0"],
            "Offers\n  'global': 2 views of 224 x 224 pixels, with masks\n",
        ),
        (
            ["view_groups"],
            "Requires\n  pictures\n\nOffers\n  depends on groups: give groups=... behind the part's name\n",
        ),
        (["view_groups"], "\n  groups.NAME.scale                 tuple[float, float]"),
        (["view_groups", "groups={a: {size: 64}}"], "Offers\n  'a': 1 view of 64 x 64 pixels\n"),
        (
            ["clip_vit", "mask_token=true"],
            "Requires\n  image views\n\nOffers\n  pooled and projected features\n  csa\n  drop\n  masks\n",
        ),
        (["towers/timm"], "Offers\n  tokens\n  depends on model: give model=... behind the part's name\n"),
        (["tokenizers/clip", "context_length=32"], "Requires\n  nothing\n\nOffers\n  49,408 tokens, 32 a text\n"),
        (["evaluators/knn"], "Requires\n  model.image\n"),
        (
            ["teachers/none"],
            "Options: none (and update_when, handled by the engine)\n\nRequires\n  nothing\n\nOffers\n  no teacher\n",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_show_tells_what_a_part_requires_and_offers(command: Command, arguments: list[str], words: str) -> None:
    code, out, err = command("plugins", "show", *arguments)
    assert (code, err) == (0, "") and words in out, out


def test_what_is_shown_of_our_options_are_whole_sentences() -> None:
    own = [record for record in registry.records() if record.own]
    docs = [option.doc for record in own for option in registry.options_of(registry.load(record)) if option.doc]
    assert len(docs) > 100 and not [doc for doc in docs if not re.search(r"[.!?]$", doc)]
    webdataset = {
        option.name: option.doc
        for option in registry.options_of(registry.load(registry.find("datasets", "webdataset")))
    }
    assert webdataset["caption_schema"].endswith("or null for pictures alone.")


def test_show_finds_heads_of_the_same_distribution_first(command: Command, install: Install) -> None:
    loss = """
from cosmos_ssl.api import Loss, Need, LossOutput
class Reads(Loss):
    def __init__(self, spec, *, head: str) -> None:
        super().__init__()
        if "odd" not in spec.heads[head]:
            raise ValueError("head: no such output")
        self.head = head
    def requires(self): return [Need(head=self.head, outputs=("odd",), role="teacher")]
    def forward(self, ctx): return LossOutput(terms={})
"""
    head = HEAD.replace(", names: list[str]", "").replace("return {}\n    def req", "return {'odd': 3}\n    def req")
    entries = {"heads/zz": "my_parts:Plain", "losses/reads": "my_parts:Reads", "heads/broken": "my_parts:Missing"}
    install("my-parts", entries=entries, modules={"my_parts": head + loss})
    code, out, _ = command("plugins", "show", "losses/reads")
    assert code == 0 and "Requires\n  teacher: 'odd' of its head\n" in out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("num_head=3", "command line  num_head: unknown option of CrossAttention"),
        ("num_heads=x", "command line  num_heads: expected an integer, got 'x'"),
    ],
)
def test_show_with_options_it_does_not_have(command: Command, option: str, message: str) -> None:
    code, _, err = command("plugins", "show", "cross_attention", option)
    assert code == 2 and err.startswith(message)


def test_markdown(command: Command, install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    head = HEAD.replace(", names: list[str]", "")
    install(
        "my-heads",
        "2.0",
        entries={"heads/plain": "my_heads:Plain", "losses/clip": "my_heads:X"},
        modules={"my_heads": head},
    )
    code, out, err = command("plugins", "list", "--markdown")
    assert code == 3 and err.startswith("losses/clip (my-heads 2.0, my_heads:X) cannot be imported: AttributeError")
    assert "| `heads/plain` |" in out and len(out.splitlines()) == 2 + len(registry.records()) - 1
    monkeypatch.setenv("COSMOS_DISABLE_PLUGINS", "1")
    code, out, _ = command("plugins", "list", "--markdown")
    lines = out.splitlines()
    assert code == 0 and len(lines) == 2 + len(registry.records()) and all(line.count(" | ") == 2 for line in lines[2:])
    assert (
        "| `heads/plain` |" not in out
        and "| `losses/koleo` | student: image pooled of group `global`, gathered over ranks | terms |" in out
    )


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
    before = len(registry.records())
    install("my-heads", "2.0", entries={"heads/plain": "my_heads:Plain"}, modules={"my_heads": HEAD})
    code, out, _ = command("plugins", "check")
    assert (code, out) == (0, f"{before + 1} of {before + 1} parts can be used\n")
    install(
        "bad-heads",
        "1.0",
        entries={"heads/a": "bad_heads:A", "heads/b": "my_heads:HEAD"},
        modules={"bad_heads": "import einops_x"},
    )
    code, out, _ = command("plugins", "check", "--json", str(tmp_path / "x.json"))
    first, second, last = out.splitlines()
    assert code == 3 and last == f"{before + 1} of {before + 3} parts can be used"
    assert (
        first
        == "heads/a (bad-heads 1.0, bad_heads:A) cannot be imported: ModuleNotFoundError: No module named 'einops_x'"
    )
    assert second.startswith("heads/b (bad-heads 1.0, my_heads:HEAD) cannot be imported: AttributeError")
    assert [row["name"] for row in json.loads((tmp_path / "x.json").read_text()) if row["error"]] == ["a", "b"]


def test_check_of_options_that_no_config_can_hold(command: Command, install: Install) -> None:
    source = "import torch\n" + HEAD.replace("width: int = 32", "dtype: torch.dtype = torch.float32")
    install("my-heads", "2.0", entries={"heads/plain": "my_heads:Plain"}, modules={"my_heads": source})
    code, out, _ = command("plugins", "check")
    assert code == 3 and out.startswith(
        "heads/plain (my-heads 2.0, my_heads:Plain): the option 'dtype' has the type dtype, which no config can"
    )


def test_disabled_plugins_are_neither_listed_nor_checked(
    command: Command, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("bad-heads", "1.0", entries={"heads/a": "bad_heads:A"}, modules={"bad_heads": "import einops_x"})
    assert command("plugins", "check")[0] == 3
    monkeypatch.setenv("COSMOS_DISABLE_PLUGINS", "1")
    own = len(registry.records())
    assert command("plugins", "check")[:2] == (0, f"{own} of {own} parts can be used\n")
    assert "bad-heads" not in command("plugins", "list")[1]
    assert command("plugins", "show", "heads/a")[2].startswith("no head named 'a'.")
