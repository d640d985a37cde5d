"""``cosmos-ssl config`` and ``cosmos-ssl info``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cosmos_ssl.config import load_config
from cosmos_ssl.config.schema import config_schema
from cosmos_ssl.config.source import packaged_configs, parse_yaml

Command = Callable[..., tuple[int, str, str]]
Install = Callable[..., Path]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_check(command: Command) -> None:
    code, out, err = command("config", "check", "cosmos/vitb32_cc3m", "training.seed=3", "evaluators=null")
    assert code == 0 and out.endswith("configs/cosmos/vitb32_cc3m.yaml: ok\n") and not err


def test_check_reports_options_with_their_place(command: Command) -> None:
    Path("b.yaml").write_text(
        "extends: cosmos/vitb32_cc3m.yaml\nheads:\n  cross: {type: cross_attention, num_head: 8}\nlosses: {clip: "
        "{init_logit_scale: x}}\n"
    )
    code, out, err = command("config", "check", "b.yaml", "model.image.widht=3")
    assert (
        code == 2 and not out and "b.yaml:3  heads.cross.num_head: unknown option of CrossAttention (cosmos-ssl " in err
    )
    assert "Did you mean 'num_heads'? Accepts: num_heads, " in err
    assert (
        "b.yaml:4  losses.clip.init_logit_scale: expected a number, got 'x'" in err
        and "command line  model.image.widht: unknown" in err
    )


def test_show(command: Command) -> None:
    code, out, _ = command("config", "show", "name=mine", "cosmos/vitb16_cc12m")
    tree = parse_yaml(out, "x", []).plain()
    assert (
        code == 0
        and tree["name"] == "mine"
        and tree["training"]["batch_size"] == 4096
        and tree["logging"]["tensorboard"] is True
    )


def test_show_origin(command: Command) -> None:
    _, out, _ = command("config", "show", "cosmos/vitb16_cc12m", "--origin", "training.seed=3")
    origins = {line.split(":")[0].strip(): line.partition("  # ")[2] for line in out.splitlines()}
    assert origins["seed"] == "command line" and origins["max_steps"] == "default"
    assert origins["batch_size"].endswith("configs/cosmos/shared/cc12m.yaml:9")
    assert parse_yaml(out, "x", []).plain()["training"]["seed"] == 3


def test_list(command: Command) -> None:
    code, out, _ = command("config", "list")
    names = [line.split()[0] for line in out.splitlines()]
    assert code == 0 and "cosmos/vitb16_cc3m" in names and not any("shared" in name for name in names)
    assert "Trains COSMOS with a ViT-B/16 on CC3M-recap.\n" in out
    assert (
        "CLIP on both global views and all texts of compare/cosmos.yaml: what COSMOS is without distillation.\n" in out
    )
    assert all(line[-1] in ".!?" for line in out.splitlines()[1:])


@pytest.mark.parametrize("name", packaged_configs())
def test_a_copy_says_the_same_from_anywhere(command: Command, name: str) -> None:
    code, out, _ = command("config", "copy", name)
    copy = Path(f"{Path(name).name}.yaml")
    assert code == 0 and out == f"{copy}\n"
    fill = (
        ["model.image={type: clip_vit}", "augmenters.image={type: resize_crop}", "losses.clip={type: clip}"]
        if name == "base"
        else []
    )
    assert load_config(copy.absolute(), fill).config.model_copy(update={"name": ""}) == load_config(
        packaged_configs()[name], fill
    ).config.model_copy(update={"name": ""})
    assert command("config", "copy", f"{name}.yaml")[::2] == (2, f"{copy} exists already. Give another destination\n")


def test_copy_elsewhere(command: Command) -> None:
    Path("there").mkdir()
    assert command("config", "copy", "methods/clip", "there")[1] == "there/clip.yaml\n"
    assert command("config", "copy", "methods/clip", "there/mine.yaml")[0] == 0
    assert (
        command("config", "copy", "methods/clip", "nowhere/mine.yaml")[2]
        == "nowhere/mine.yaml cannot be written: No such file or directory\n"
    )
    assert command("config", "copy", "methods/clop")[2].startswith(
        "no config 'methods/clop' comes with cosmos-ssl. Did you mean 'methods/clip'?"
    )


# ---------------------------------------------------------------------------- schema


def rule(schema: dict[str, Any], group: str, name: str) -> dict[str, Any]:
    rules = schema["$defs"][f"part_{group}"]["allOf"]
    return next(found["then"] for found in rules if name in found["if"]["properties"]["type"]["enum"])


def test_schema_holds_sections_and_the_options_of_parts(command: Command) -> None:
    code, out, err = command("config", "schema")
    schema = json.loads(out)
    assert code == 0 and not err and schema["additionalProperties"] is False
    assert {"extends", "model", "losses"} <= set(schema["properties"]) and "required" not in schema
    losses = schema["properties"]["losses"]["anyOf"][0]["additionalProperties"]["anyOf"][0]
    assert losses == {"$ref": "#/$defs/part_losses"}
    assert schema["$defs"]["ModelConfig"]["properties"]["image"]["anyOf"][0] == {"$ref": "#/$defs/part_towers"}
    clip = rule(schema, "losses", "clip")
    assert {"type", "loss_weight", "init_logit_scale", "head", "text_group"} == set(clip["properties"]) and clip[
        "additionalProperties"
    ] is False
    crop = rule(schema, "augmenters", "multi_crop")["properties"]["global_crops_scale"]["anyOf"][0]
    assert crop["type"] == "array" and crop["maxItems"] == 2
    refs = {text.split('"')[0] for text in out.split('"#/$defs/')[1:]}
    assert refs <= set(schema["$defs"])


def test_schema_survives_broken_plugins(install: Install) -> None:
    install("my-losses", "0.3.1", entries={"losses/triplet": "no_such_module:X"})
    schema, broken = config_schema()
    assert broken == [
        "losses/triplet (my-losses 0.3.1, no_such_module:X) cannot be imported: ModuleNotFoundError: No module "
        "named 'no_such_module'"
    ]
    assert "triplet" in schema["$defs"]["part_losses"]["properties"]["type"]["anyOf"][0]["anyOf"][0]["enum"]
    assert rule(schema, "losses", "clip")


# ---------------------------------------------------------------------------- info


def test_info(command: Command, install: Install, tmp_path: Path) -> None:
    install("my-losses", "0.3.1", entries={"losses/a": "x:A", "heads/b": "x:B"})
    code, out, _ = command("info", "--json", str(tmp_path / "x.json"))
    facts = json.loads((tmp_path / "x.json").read_text())
    assert code == 0 and facts["plugins"] == {"my-losses 0.3.1": "heads/b, losses/a"}
    assert facts["versions"]["torch"] in out and "sdpa" in facts["attention"] and "threads" in facts["devices"]["cpu"]
    assert {"the transformer, unless compiled", "photometric work"} <= set(facts["kernels"])
