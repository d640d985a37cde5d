"""The config: YAML, merging, overrides, faults with their place, ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cosmos_ssl import registry
from cosmos_ssl.config import Config, LoadedConfig, load_config
from cosmos_ssl.config.ranks import check_ranks, possible_ranks, shards
from cosmos_ssl.config.sections import EvaluatorPart, LossPart, OptimizerConfig, Part, ScheduleConfig, TeacherPart
from cosmos_ssl.config.source import MAX_BYTES, dump_yaml, find_config, packaged_configs, parse_overrides, parse_yaml
from cosmos_ssl.errors import ConfigError, PluginError, UserError

BASE = """\
name: base
model:
  embed_dim: 64
  image: {type: clip_vit, width: 128}
  text: {type: clip_text, width: 64}
tokenizer: {type: clip}
augmenters:
  image: {type: multi_crop, global_crops_scale: [0.4, 1.0]}
  text: {type: text_crop}
heads:
  cross: {type: cross_attention, num_heads: 8}
losses:
  clip: {type: clip, loss_weight: 0.5}
  distill: {type: cross_modality_distillation, head: cross}
teacher: {type: ema, momentum_teacher: 0.99}
data: {type: webdataset, train_data: "a/{0000..0003}.tar", caption_schema: dreamlip}
training: {batch_size: 96}
evaluators:
  retrieval: {type: retrieval, data: "b.tar", every_epochs: 1}
"""

Load = Callable[..., LoadedConfig]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """``load(text, *overrides)`` loads a config x.yaml that extends the one above, from the folder it lies in."""
    monkeypatch.chdir(tmp_path)
    Path("parent.yaml").write_text(BASE)

    def load(text: str = "", *overrides: str) -> LoadedConfig:
        Path("x.yaml").write_text(f"extends: parent.yaml\n{text}")
        return load_config("x.yaml", overrides)

    return load


def faults_of(load: Load, text: str = "", *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    return caught.value.faults


# ---------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[
            ("5e-4", 5e-4),
            ("1e3", 1e3),
            (".5", 0.5),
            ("1.", 1.0),
            ("-1.5E+2", -150.0),
            (".inf", float("inf")),
            ("1e400", float("inf")),
        ],
        *[("12", 12), ("-3", -3), ("+3", 3), ("010", 10), ("0o17", 15), ("0xff", 255)],
        *[("true", True), ("False", False), ("TRUE", True), ("null", None), ("~", None), ("", None)],
        *[
            (text, text)
            for text in (
                "no",
                "yes",
                "on",
                "Off",
                "12:00:00",
                "1_000",
                "2001-01-01",
                "0b1",
                "nuLL",
                "<<",
                "1e",
                "e5",
                "=",
            )
        ],
        *[
            ("'5'", "5"),
            ('"true"', "true"),
            ("!!str 5", "5"),
            ("!!float 5", 5.0),
            ("a b #c", "a b"),
            ("9" * 5000, "9" * 5000),
        ],
    ],
)
def test_scalars_of_yaml_1_2(text: str, value: Any) -> None:
    faults: list[str] = []
    found = parse_yaml(f"key: {text}", "x.yaml", faults).plain()["key"]
    assert found == value and type(found) is type(value) and not faults


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nb: [1,\n", "x.yaml:3  this is not valid YAML: expected the node content, but found '<stream end>'"),
        ("name: a: b\n", "x.yaml:1  this is not valid YAML: mapping values are not allowed here"),
        ("a: \x00", "x.yaml  this is not valid YAML: unacceptable character"),
        ("a: &a [*a]", "x.yaml  nested too deeply, or an alias that contains itself"),
        ("[" * 3000, "x.yaml  nested too deeply"),
        ("a: 1\n---\nb: 2\n", "x.yaml:2  this is not valid YAML: but found another document"),
        ("a: *b", "x.yaml:1  this is not valid YAML: found undefined alias"),
    ],
)
def test_broken_yaml(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "x.yaml", [])
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_aliases_are_bounded() -> None:
    rows = [
        "a0: &a0 [x, x, x, x, x, x, x, x, x, x]",
        *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)),
    ]
    start = time.perf_counter()
    with pytest.raises(ConfigError, match="more than 20,000 values"):
        parse_yaml("\n".join(rows), "x.yaml", [])
    assert time.perf_counter() - start < 2
    assert parse_yaml("a: &a {x: 1}\nb: *a\n", "x.yaml", []).plain() == {"a": {"x": 1}, "b": {"x": 1}}


def test_duplicate_keys_and_tags_are_faults_with_their_line() -> None:
    faults: list[str] = []
    parse_yaml("a: 1\nb:\n  c: 1\n  c: 2\na: !thing 3\n? [x]\n: 4\n", "x.yaml", faults)
    assert faults == [
        "x.yaml:4  b.c: given twice, first at x.yaml:3",
        "x.yaml:5  a: given twice, first at x.yaml:1",
        "x.yaml:5  a: the tag !thing means nothing here",
        "x.yaml:6  a key must be a plain name",
    ]


def test_written_yaml_reads_back_equal() -> None:
    strings = [
        "5e-4",
        "no",
        "null",
        "12:00:00",
        "0o17",
        "1",
        "~",
        "",
        " x",
        "a: b",
        "#",
        "*x",
        "{0..3}.tar",
        "two\nlines",
        "\u00e9\u4e2d",
        "'\"",
        "<<",
    ]
    tree = {
        "strings": strings,
        "numbers": [1e-8, 5e-4, 1.0, 3, -2, float("inf"), True, None],
        "empty": {"map": {}, "list": []},
        "no": {"1": {"deep": [{"x": "~"}]}},
        **{f"key{i}": text for i, text in enumerate(strings)},
    }
    assert parse_yaml(dump_yaml(tree), "x.yaml", []).plain() == tree
    assert parse_yaml(dump_yaml(tree, lambda path: f"from {path}"), "x.yaml", []).plain() == tree


# ---------------------------------------------------------------------------- merging


def test_mappings_merge_by_key_and_lists_replace(load: Load) -> None:
    config = load("heads: {cross: {num_heads: 4}}\naugmenters: {image: {global_crops_scale: [0.5]}}\n").config
    assert config.heads["cross"].type == "cross_attention" and config.heads["cross"].options == {"num_heads": 4}
    assert config.augmenters.image is not None and config.augmenters.image.options == {"global_crops_scale": [0.5]}
    assert list(config.losses) == ["clip", "distill"] and config.losses["clip"].loss_weight == 0.5


def test_another_type_replaces_the_part(load: Load) -> None:
    config = load("losses: {distill: {type: clip}}\nteacher: {type: none}\n").config
    assert config.losses["distill"].options == {} and config.teacher.options == {} and config.teacher.type == "none"
    assert load("losses: {distill: {type: cross_modality_distillation}}\n").config.losses["distill"].options == {
        "head": "cross"
    }


def test_null_removes(load: Load) -> None:
    config = load("losses: {distill: null}\nevaluators: null\nteacher: ~\nmodel: {embed_dim:}\n").config
    assert (
        list(config.losses) == ["clip"]
        and config.evaluators == {}
        and config.teacher.type == "none"
        and config.model.embed_dim == 512
    )


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("trianing: null", "x.yaml:2  trianing: unknown key. Did you mean 'training'?"),
        ("trianing:", "x.yaml:2  trianing: unknown key. Did you mean 'training'?"),
        ("training: {batchsize: ~}", "x.yaml:2  training.batchsize: unknown key. Did you mean 'batch_size'?"),
        (
            "losses: {distil: null}",
            "x.yaml:2  losses.distil: there is no loss of this name to remove. Did you mean 'distill'?",
        ),
        ("heads:\n  own: null", "x.yaml:3  heads.own: there is no head of this name to remove."),
    ],
)
def test_a_null_that_removes_nothing_is_a_fault(load: Load, text: str, fault: str) -> None:
    assert any(found.startswith(fault) for found in faults_of(load, text))
    assert faults_of(load, "", "evaluators.knn=null") == (
        "command line  evaluators.knn: there is no evaluator of this name to remove.",
    )


def test_null_is_a_value_where_it_means_something(load: Load) -> None:
    assert load().config.checkpoints.every_minutes == 30
    assert load("checkpoints: {every_minutes: null}\n").config.checkpoints.every_minutes is None
    assert load("data: {caption_schema: null}\n").config.data.options["caption_schema"] is None


def test_null_can_be_given_again_by_a_grandchild(load: Load) -> None:
    load("heads: null\nlosses: {distill: null}\n")
    Path("y.yaml").write_text("extends: x.yaml\nheads: {own: {type: cross_attention}}\n")
    assert list(load_config("y.yaml").config.heads) == ["own"]


def test_name_is_the_files_unless_given(load: Load, tmp_path: Path) -> None:
    assert load().config.name == "base" and load("", "name=other").config.folder == Path("runs/other")
    Path("mine.yaml").write_text("extends: parent.yaml\nname: null\n")
    assert load_config("mine.yaml").config.name == "mine"


def test_extends_a_list_a_neighbour_and_a_packaged_config(load: Load) -> None:
    Path("sub").mkdir()
    Path("sub/small.yaml").write_text("model: {embed_dim: 8}\ntraining: {batch_size: 8}\n")
    Path("sub/y.yaml").write_text("extends: [../parent.yaml, small]\ntraining: {seed: 7}\n")
    loaded = load_config("sub/y.yaml")
    assert (loaded.config.model.embed_dim, loaded.config.training.batch_size, loaded.config.training.seed) == (8, 8, 7)
    assert loaded.origin("model.embed_dim") == "sub/small.yaml:1" and loaded.origin("training.seed") == "sub/y.yaml:2"
    Path("z.yaml").write_text("extends: cosmos/vitb16_cc3m.yaml\n")
    assert load_config("z").origin("losses.clip.type").endswith("configs/cosmos/shared/cosmos.yaml:22")


def test_circles_and_missing_parents_are_refused(load: Load) -> None:
    Path("a.yaml").write_text("name: a\nextends: b.yaml\n")
    Path("b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(ConfigError, match=r"^b\.yaml:1  extends: goes in a circle: a\.yaml -> b\.yaml -> a\.yaml$"):
        load_config("a.yaml")
    Path("c.yaml").write_text("extends: parnet.yaml\n")
    with pytest.raises(ConfigError, match=r"^c\.yaml:1  extends: no config 'parnet\.yaml'"):
        load_config("c.yaml")
    Path("d.yaml").write_text("extends: {a: b}\n")
    with pytest.raises(ConfigError, match=r"^d\.yaml:1  extends: expected the name of a config"):
        load_config("d.yaml")


def test_files_that_are_extended_are_bounded(load: Load) -> None:
    for n in range(1, 31):  # 2^30 of them, as many as a list of two at each of thirty levels names
        Path(f"f{n}.yaml").write_text(f"extends: [f{n - 1}.yaml, f{n - 1}.yaml]\n")
    Path("f0.yaml").write_text("extends: parent.yaml\n")
    with pytest.raises(
        ConfigError, match=r"^f\d\.yaml:1  extends: more than 100 files, counted as often as they are named$"
    ):
        load_config("f30.yaml")
    assert load_config("f4.yaml").config.model.embed_dim == 64


def test_files_that_are_no_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no config 'quickstrat\.yaml'.*See: cosmos-ssl config list"):
        load_config("quickstrat.yaml")
    Path("list.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match=r"list\.yaml:1  a config is a mapping"):
        load_config("list.yaml")
    Path("latin.yaml").write_bytes(b"name: \xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml  cannot be read: .*utf-8"):
        load_config("latin.yaml")
    Path("large.yaml").write_text("#" * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match=r"large\.yaml  is larger than 1 MiB, and no config"):
        load_config("large.yaml")
    os.mkfifo("pipe.yaml")
    for name, what in (("pipe.yaml", "no regular file"), ("/dev/zero", "no regular file"), (".", "a folder")):
        with pytest.raises(UserError, match=f"no config '{name}': it is {what}"):
            load_config(name)
    with pytest.raises(UserError, match="there is no such file"):
        load_config("x" * 5000)
    Path("empty.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"empty\.yaml:1  model: needs a tower"):
        load_config("empty.yaml")


def test_packaged_configs_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "cosmos/vitb16_cc3m" in packaged_configs()
    for name in packaged_configs():
        assert find_config(name) == find_config(f"{name}.yaml") == packaged_configs()[name]
    Path("cosmos").mkdir()
    Path("cosmos/vitb16_cc3m.yaml").write_text("")
    assert find_config("cosmos/vitb16_cc3m") == Path("cosmos/vitb16_cc3m.yaml"), "what is given comes first"


# ---------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("32", 32), ("5e-4", 5e-4), ("null", None), ("", None), ("true", True), ("no", "no"), ("'32'", "32")],
        *[("[1, a]", [1, "a"]), ("{x: 1, y: [2]}", {"x": 1, "y": [2]}), ("{}", {}), ("[]", [])],
        *[
            (path, path)
            for path in (
                "/x/{0000..0003}.tar",
                "{0000..0003}.tar",
                "{a,b}",
                "{0..3}",
                "s3://b/{0..3}.tar::/y.tar",
                "C:\\x",
            )
        ],
        *[(text, text) for text in ("*.bias", "&x", "!x y", "- x", "a: b", "[1, 2", "a=b", "@x", "%x", "| cat")],
    ],
)
def test_values_of_overrides(text: str, value: Any) -> None:
    faults: list[str] = []
    found = parse_overrides([f"a.b={text}"], faults).plain()["a"]["b"]
    assert found == value and type(found) is type(value) and not faults


def test_overrides_merge_as_a_child_does(load: Load) -> None:
    config = load(
        "",
        "training.batch_size=32",
        "losses.distill.type=clip",
        "evaluators=null",
        "data.train_data=/x/{0000..0003}.tar",
    ).config
    assert config.training.batch_size == 32 and config.losses["distill"].options == {} and config.evaluators == {}
    assert config.data.options["train_data"] == "/x/{0000..0003}.tar"
    assert load("", "training.seed=1", "training.seed=2").config.training.seed == 2


def test_faults_of_overrides_say_command_line(load: Load) -> None:
    faults = faults_of(
        load, "", "training.batchsize=8", "lr", ".x=1", "training={seed: 1, seed: 2}", "optimizer.lr=fast"
    )
    assert (
        "command line  'lr': expected key.sub=value" in faults
        and "command line  '.x=1': expected key.sub=value" in faults
    )
    assert "command line  training.seed: given twice, first at command line" in faults
    assert "command line  optimizer.lr: expected a number, got 'fast'" in faults
    assert any(
        text.startswith("command line  training.batchsize: unknown key. Did you mean 'batch_size'? Accepts: ")
        for text in faults
    )


# ---------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("losess: {}", "x.yaml:2  losess: unknown key. Did you mean 'losses'? Accepts: extends, name, "),
        ("extend: a", "x.yaml:2  extend: unknown key. Did you mean 'extends'?"),
        (
            "training: {batch: 3}",
            "x.yaml:2  training.batch: unknown key. Did you mean 'batch_size'? Accepts: batch_size, micro_batch_size, ",
        ),
        ("training: {batch_size: many}", "x.yaml:2  training.batch_size: expected an integer, got 'many'"),
        ("training: {batch_size: '8'}", "x.yaml:2  training.batch_size: expected an integer, got '8'"),
        ("training: {batch_size: 8.5}", "x.yaml:2  training.batch_size: expected an integer, got 8.5"),
        ("training: {batch_size: 0}", "x.yaml:2  training.batch_size: expected greater than 0, got 0"),
        ("training: {trace_steps: -1}", "x.yaml:2  training.trace_steps: expected greater than or equal to 0, got -1"),
        ("training: {compile: yes}", "x.yaml:2  training.compile: expected a boolean, got 'yes'"),
        ("training: 3", "x.yaml:2  training: expected a mapping, got 3"),
        (
            "training: {precision: fp16}",
            "x.yaml:2  training.precision: expected 'auto', 'fp32', 'amp_bf16' or 'amp_fp16', got 'fp16'",
        ),
        ("teacher:\n  update_when: later", "x.yaml:3  teacher.update_when: expected 'before_optimizer_step' or "),
        (
            "losses: {clip: {loss_weight: x}}",
            "x.yaml:2  losses.clip.loss_weight: expected a number or a mapping, got 'x'",
        ),
        ("losses: [a]", 'x.yaml:2  losses: expected a mapping, got ["a"]'),
        ("heads: {a: {num_heads: 3}}", "x.yaml:2  heads.a.type: missing: name a part"),
        (
            "heads: {a.b: {type: cross_attention}}",
            "x.yaml:2  heads.a.b: 'a.b' is no name: use letters, digits, - and _",
        ),
        (
            "optimizer:\n  rules:\n  - {match: a}\n  - {macth: b}",
            "x.yaml:5  optimizer.rules.1.macth: unknown key. Did you mean 'match'?",
        ),
        (
            "optimizer:\n  rules:\n    a: {match: a}\n    b: {macth: b}",
            "x.yaml:5  optimizer.rules.b.macth: unknown key. Did you mean 'match'?",
        ),
        (
            "optimizer: {rules: {stem: null}}",
            "x.yaml:2  optimizer.rules.stem: there is no rule of this name to remove.",
        ),
        (
            "losses:\n  clip: {type: clpi}",
            "x.yaml:3  losses.clip.type: no loss named 'clpi'. Did you mean 'clip'?\n" + " " * 10 + "Available: ",
        ),
        ("model: {image: {type: vit}}", "x.yaml:2  model.image.type: no tower named 'vit'."),
        (
            "model:\n  background: wihte",
            "x.yaml:3  model.background: expected a colour, such as white or '#ffa500', got 'wihte'",
        ),
        ("data: {type: imagenet}", "x.yaml:2  data.type: no data set named 'imagenet'."),
    ],
)
def test_faults_name_place_key_and_remedy(load: Load, text: str, fault: str) -> None:
    faults = faults_of(load, text)
    assert any(found.startswith(fault) for found in faults), faults


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            "training: {micro_batch_size: 7}",
            "x.yaml:2  training.micro_batch_size: 7 does not divide training.batch_size (96)",
        ),
        ("loader: {lanes: 5}", "x.yaml:2  loader.lanes: 5 does not divide training.batch_size (96)"),
        ("tokenizer: null", "parent.yaml:5  model.text: a text tower needs a tokenizer"),
        ("augmenters: {text: null}", "parent.yaml:5  model.text: nothing makes its views: give augmenters.text"),
        ("model: {image: null, text: null}", "x.yaml:2  model: needs a tower"),
        ("losses: null", "x.yaml:2  losses: there is nothing to train on"),
    ],
)
def test_sections_must_agree(load: Load, text: str, fault: str) -> None:
    assert any(found.startswith(fault) for found in faults_of(load, text))


def test_parts_of_others_are_named_by_distribution(load: Load, install: Callable[..., Path]) -> None:
    install("my-losses", "0.3.1", entries={"losses/triplet": "a:T"})
    install("other-losses", "1.0", entries={"losses/triplet": "b:T"})
    assert load("losses: {t: {type: my-losses:triplet, margin: 1}}\n").config.losses["t"].options == {"margin": 1}
    assert faults_of(load, "losses:\n  t: {type: triplet}\n") == (
        "x.yaml:3  losses.t.type: losses/triplet is offered by my-losses 0.3.1 and other-losses 1.0. "
        "Write 'my-losses:triplet' or 'other-losses:triplet'.",
    )


def test_all_faults_of_the_stage_come_at_once(load: Load) -> None:
    faults = faults_of(
        load, "optimizer: {lr: fast}\nschedule: {epochs: many}\nname: a\nname: b\nlosses: {clip: {type: clpi}}\n", "x=1"
    )
    assert len(faults) == 5 and [text.split(":")[0] for text in faults].count("x.yaml") == 4


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        *[(path, ".inf", "finite number, got .inf") for path in ("optimizer.lr", "schedule.final_lr")],
        ("optimizer.weight_decay", ".inf", "expected a finite number or a mapping, got .inf"),
        ("optimizer.weight_decay", "{type: linear, start: 1, end: -1}", ".end: expected greater than or equal to 0"),
        ("optimizer.weight_decay_end", "-1", "expected greater than or equal to 0, got -1"),
        ("losses.clip.loss_weight", ".nan", "finite number or a mapping, got .nan"),
        ("training.timeout_minutes", ".nan", "finite number, got .nan"),
        *[
            (path, "-1", "0")
            for path in ("optimizer.lr", "loader.workers", "training.clip_grad_norm", "schedule.warmup_steps")
        ],
        *[
            (path, "99999999999999999999", "less than or equal to")
            for path in ("loader.workers", "loader.prefetch", "loader.lanes")
        ],
        *[
            (path, "99999999999999999999", "less than or equal to")
            for path in ("training.batch_size", "training.trace_steps")
        ],
        ("training.seed", str(1 << 63), f"less than {1 << 63}"),
        ("optimizer.rules", "[{match: a, lr_scale: -1}]", "greater than or equal to 0"),
        ("optimizer.rules", "[{match: a, frozen_epochs: .inf}]", "finite number"),
        ("checkpoints.every_minutes", "1e-300", "greater than or equal to 0.001"),
        ("model.pretrained", "''", "at least 1 character"),
        ("model.pretrained", "{from: a, parts: [head]}", "expected image, text, heads, losses, or one of these"),
        ("model.pretrained", "{from: a, part: [text]}", "Did you mean 'parts'? Accepts: from, parts"),
    ],
)
def test_numbers_are_finite_and_bounded(load: Load, path: str, value: str, words: str) -> None:
    (fault,) = faults_of(load, "", f"{path}={value}")
    assert fault.startswith(f"command line  {path}") and words in fault


def test_seeds_and_infinite_warm_ups_that_are_sound(load: Load) -> None:
    assert (
        load("", f"training.seed={(1 << 63) - 1}", "schedule.warmup_steps=0", "loader.workers=0").config.training.seed
        == (1 << 63) - 1
    )


def test_paths_may_begin_at_home(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/users/ann")
    loaded = load(
        "output_dir: ~/runs/a\ndata: {train_data: '~/x/{0..3}.tar::s3://b/~c.tar::~/y.tar'}\n", "model.pretrained=~/old"
    )
    assert loaded.config.folder == Path("/users/ann/runs/a") and loaded.tree["model"]["pretrained"] == "/users/ann/old"
    assert loaded.tree["data"]["train_data"] == "/users/ann/x/{0..3}.tar::s3://b/~c.tar::/users/ann/y.tar"
    assert loaded.origin("output_dir") == "x.yaml:2" and load("data: {train_data: ['~/a']}\n").tree["data"][
        "train_data"
    ] == ["/users/ann/a"]
    assert faults_of(load, "output_dir: ~nobody-at-all/x") == (
        "x.yaml:2  output_dir: no home folder is known for ~nobody-at-all",
    )


def test_what_a_terminal_would_obey_is_shown_as_escapes(load: Load) -> None:
    (fault,) = faults_of(load, 'training: {precision: "\\e[31mred"}\n')
    assert "\x1b" not in fault and "[31mred" in fault
    (fault,) = faults_of(load, '"\\e[2J": 1\n')
    assert fault.startswith("x.yaml:2  \\x1b[2J: unknown key")
    assert faults_of(load, 'profile: "a\\0b"\n') == ("x.yaml:2  profile: holds a character that no text has",)
    assert faults_of(load, 'data: {train_data: "\\ud800"}\n') == (
        "x.yaml:2  data.train_data: holds a character that no text has",
    )


def test_depth_is_bounded(load: Load) -> None:
    assert faults_of(load, f"data: {{train_data: {'[' * 40}x{']' * 40}}}\n")[0].endswith("nested too deeply")
    assert faults_of(load, "", ".".join("a" * 2000) + "=1")[0].startswith("command line  'a.a.a")
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ConfigError, match="config  nested too deeply"):
        load_config({"data": deep})


def test_python_values_of_a_mapping(load: Load) -> None:
    tree = load().tree
    numbers = {**tree["schedule"], "epochs": np.int64(3), "final_lr": np.float32(0.5)}
    loaded = load_config({**tree, "output_dir": Path("there"), "schedule": numbers})
    assert loaded.config.folder == Path("there") and (
        loaded.config.schedule.epochs,
        loaded.config.schedule.final_lr,
    ) == (3, 0.5)
    with pytest.raises(ConfigError, match=r"^config  data\.train_data\.0: a set is nothing that a config can hold$"):
        load_config({**tree, "data": {"type": "webdataset", "train_data": [{1}]}})


def test_an_image_only_config(load: Load) -> None:
    load("model: {text: null}\naugmenters: {text: null}\ntokenizer: null\nlosses: {distill: null}\nheads: null\n")


def test_the_first_stage_is_quick_and_imports_no_part(load: Load) -> None:
    load()
    heavy = "{'torch', 'cosmos_ssl_plugins'}"
    code = (
        f"import sys; from cosmos_ssl.config import load_config; load_config('x.yaml'); print({heavy} & "
        f"{{*sys.modules}})"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()" and time.perf_counter() - start < 3, "under a second where nothing else runs"


def test_a_clone_that_is_not_installed_says_so_once(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cosmos_ssl.registry.parts.discover", lambda path: ())
    with pytest.raises(PluginError, match=r"^This clone is not installed"):
        load()


# ---------------------------------------------------------------------------- the loaded config


def test_origins(load: Load) -> None:
    loaded = load("training: {seed: 3}\n", "heads.cross.num_heads=4")
    assert loaded.origin("training.seed") == "x.yaml:2" and loaded.origin("training.batch_size") == "parent.yaml:17"
    assert (
        loaded.origin("heads.cross.num_heads") == "command line"
        and loaded.origin("heads.cross.type") == "parent.yaml:11"
    )
    assert loaded.origin("augmenters.image.global_crops_scale.1") == "parent.yaml:8"
    assert loaded.origin("schedule.epochs") == "default"
    assert loaded.fault("losses.distill.temperature", "").startswith("parent.yaml:14 ") and loaded.fault(
        "schedule.epochs", ""
    ).startswith("x.yaml:1 ")
    assert loaded.fault("losses.clip.x", "no\nyes") == "parent.yaml:13  losses.clip.x: no\n                yes"


def test_the_tree_holds_everything_and_loads_again(load: Load, tmp_path: Path) -> None:
    loaded = load("optimizer: {rules: [{match: '*.bias', lr_scale: 2}]}\n")
    assert loaded.tree["schedule"]["warmup_steps"] == 2000 and loaded.tree["heads"]["cross"] == {
        "type": "cross_attention",
        "num_heads": 8,
    }
    again = tmp_path / "again.yaml"
    again.write_text(dump_yaml(loaded.tree))
    assert load_config(again).config == loaded.config and load_config(again).tree == loaded.tree
    assert load_config(loaded.tree).config == loaded.config and load_config(loaded.tree, ["name=b"]).config.name == "b"


# ---------------------------------------------------------------------------- ranks


def ranks(batch: int, micro: int | None = None, lanes: int | None = None) -> list[int]:
    return possible_ranks(config_of(training={"batch_size": batch, "micro_batch_size": micro}, loader={"lanes": lanes}))


def config_of(**sections: Any) -> Config:
    return Config.model_validate({"data": {"type": "webdataset"}, **sections})


def test_possible_ranks() -> None:
    assert ranks(1024) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert ranks(96) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 96]
    assert ranks(96, micro=12) == [1, 2, 4, 8] and ranks(96, lanes=6) == [1, 2, 3, 6]
    assert config_of(training={"batch_size": 509 * 2}).lanes == 2


def test_impossible_ranks_are_refused_with_the_possible_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        check_ranks(config_of(), 12)
    wanted = (
        "training.batch_size: 1024 cannot be shared by 12 ranks (loader.lanes: 256). Possible: 1, 2, 4, 8, "
        "16, 32, 64, 128, 256."
    )
    assert str(caught.value) == wanted
    check_ranks(config_of(), 8)


@pytest.mark.parametrize(
    ("training", "told", "wanted"),
    [
        ({}, {}, 1),
        ({"parallel": "fsdp"}, {}, 8),
        ({"parallel": "hsdp", "parallel_shards": 4}, {}, 4),
        ({"parallel": "hsdp"}, {"LOCAL_WORLD_SIZE": "2"}, 2),
        ({"parallel": "hsdp"}, {"SLURM_JOB_NUM_NODES": "4"}, 2),
        ({"parallel": "hsdp"}, {}, 8),
        ({"parallel": "hsdp", "parallel_shards": 3}, {}, "8 ranks cannot be divided into copies of 3 ranks each"),
        ({"parallel": "fsdp", "parallel_shards": 4}, {}, "training.parallel_shards: with training.parallel=fsdp all "),
        ({"parallel_shards": 4}, {}, "training.parallel_shards: with training.parallel=replicate no rank shares"),
        ({"parallel": "hsdp", "compile": True}, {}, "training.compile: not with training.parallel=hsdp"),
    ],
)
def test_ranks_that_share_one_copy(
    monkeypatch: pytest.MonkeyPatch, training: dict[str, Any], told: dict[str, str], wanted: int | str
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "SLURM_JOB_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    config = config_of(training=training)
    if isinstance(wanted, int):
        assert shards(config, 8) == wanted and shards(config, 1) == 1
        return
    with pytest.raises(ConfigError) as caught:
        check_ranks(config, 8)
    assert wanted in str(caught.value) and "\n" not in str(caught.value)


def test_reserved_keys_are_the_fields_of_a_part() -> None:
    sections = {"heads": Part, "losses": LossPart, "teachers": TeacherPart, "evaluators": EvaluatorPart}
    sections |= {"optimizers": OptimizerConfig, "schedules": ScheduleConfig}
    for group, section in sections.items():
        assert tuple(section.model_fields) == registry.GROUPS[group].reserved
