"""From a config to a run: training by the Python API, loading what it left and official files, faults of stage two."""

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import cosmos_ssl
from cosmos_ssl.build import Builder, check
from cosmos_ssl.build.builder import READING
from cosmos_ssl.config import load_config
from cosmos_ssl.engine.checkpoint import load_tensors
from cosmos_ssl.errors import CheckpointError, ConfigError, DataError, UserError
from cosmos_ssl.testing.examples import example_config
from cosmos_ssl_plugins.augmenters.multi_crop import MultiCrop
from cosmos_ssl_plugins.augmenters.text_crop import TextCrop
from cosmos_ssl_plugins.datasets.scenes import Scenes

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
TINY = {
    "extends": "quickstart",
    "model": {"image": {"layers": 1, "width": 64}, "text": {"layers": 1, "width": 64, "heads": 2}, "embed_dim": 32},
    "augmenters": {"text": {"num_sampled_captions": 3}},
    "heads": {
        "cross": None,
        "training": {"type": "cross_attention"},
    },  # a part may have any name, also of what modules have
    "losses": {"clip": None, "forward": {"type": "clip"}, "distill": {"head": "training"}},
    "data": {"train_samples": 32, "validation_samples": 8},
    "loader": {"workers": 0},
    "schedule": {"epochs": 1, "warmup_steps": 1},
    "training": {"batch_size": 8},
    "evaluators": {"classification": None},
    "logging": {"every_steps": 1, "tensorboard": False},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a tiny finished run, and its final metrics."""
    folder = tmp_path_factory.mktemp("build")
    config = folder / "tiny.yaml"
    config.write_text(json.dumps(TINY))
    metrics = cosmos_ssl.train(config, [f"output_dir={folder}/run", f"data.folder={folder}/scenes"])
    return folder / "run", metrics


def test_train_returns_the_final_metrics(trained):
    run, metrics = trained
    assert metrics["loss"] > 0
    assert {"retrieval/student/image_to_text_R@1", "retrieval/teacher/image_to_text_R@1"} <= metrics.keys()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_load_a_run_or_its_checkpoint(trained, which):
    run, _ = trained
    model = cosmos_ssl.load(run, which=which)
    (checkpoint,) = (run / "checkpoints").glob("step_*")
    saved = load_tensors(checkpoint, "student") | load_tensors(checkpoint, which)  # losses are the student's alone
    assert all(torch.equal(value, saved[name]) for name, value in model.model.state_dict().items())
    images = model.encode_image(model.preprocess(Image.new("RGB", (90, 70), "red"))[None])
    texts = model.encode_text(model.tokenize(["a red circle", "a blue star"]))
    assert images.shape == (1, 32)
    torch.testing.assert_close(texts.norm(dim=-1), torch.ones(2))
    again = cosmos_ssl.load(checkpoint, which=which)
    torch.testing.assert_close(again.encode_text(again.tokenize("a red circle"))[0], texts[0])


def test_what_only_encodes_is_built_without_data_and_augmenters(trained, monkeypatch):
    """Those, where a head asks what they offer, give it the same widths as in training."""
    for cls in (Scenes, MultiCrop, TextCrop):
        monkeypatch.setattr(cls, "__init__", lambda *given, **options: pytest.fail("was built"))
    assert not cosmos_ssl.load(trained[0]).spec.validation_data
    monkeypatch.undo()
    loaded = example_config({"heads": {"project": {"type": "projection", "hidden_dim": 16, "output_dim": 8}}})
    whole, seen = Builder(loaded).assemble("measure"), []
    model, spec, _ = Builder(loaded, READING).for_reading(check=seen.append)
    assert seen[0].state_dict().keys() == model.state_dict().keys() == whole.model.state_dict().keys()
    assert all(value.is_meta for value in seen[0].state_dict().values())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in whole.model.state_dict().items())
    assert spec.heads == whole.spec.heads and dict(spec.image_views) == whole.spec.image_views
    assert pickle.loads(pickle.dumps(spec)) == whole.spec


def test_student_and_teacher_differ(trained):
    run, _ = trained
    student, teacher = (cosmos_ssl.load(run, which=which).model.state_dict() for which in ("student", "teacher"))
    assert any(not torch.equal(student[name], teacher[name]) for name in student)


def test_load_an_official_file():
    from safetensors.torch import load_file

    golden = load_file(GOLDEN / "golden.safetensors")
    model = cosmos_ssl.load(
        GOLDEN / "official_checkpoint.pt", which="teacher", overrides=["model.image.heads=3", "model.text.heads=2"]
    )
    features = model.encode_image(torch.cat([golden["image.0"], golden["image.1"]]))
    torch.testing.assert_close(features, golden["teacher.image_features"], rtol=0, atol=1e-5)
    texts = model.encode_text(golden["texts"][:8].long())
    torch.testing.assert_close(texts, golden["teacher.text_features"], rtol=0, atol=1e-5)


def test_official_heads_must_be_given_where_the_width_does_not_tell():
    with pytest.raises(CheckpointError, match=r"say model\.image\.heads=\.\. and model\.text\.heads=\.\."):
        cosmos_ssl.load(GOLDEN / "official_checkpoint.pt")


def test_load_names_what_it_cannot_read(tmp_path, trained):
    with pytest.raises(CheckpointError, match="no run folder with a checkpoint"):
        cosmos_ssl.load(tmp_path)
    with pytest.raises((CheckpointError, UserError), match="model"):
        cosmos_ssl.load(trained[0], overrides=["model.image.width=128"])


def test_a_frozen_teacher_of_another_size(trained, tmp_path):
    """A trained run teaches a smaller student, and never moves."""
    run, _ = trained
    config = tmp_path / "student.yaml"
    config.write_text(json.dumps({**TINY, "evaluators": None}))
    overrides = [f"output_dir={tmp_path}/run", f"data.folder={run.parent}/scenes", "schedule.max_steps=2"]
    overrides += [f"teacher={{type: frozen, checkpoint: {run}, which: student}}", "model.image.width=128"]
    cosmos_ssl.train(config, overrides)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    kept, source = load_tensors(checkpoint, "teacher"), cosmos_ssl.load(run).model.state_dict()
    assert kept.keys() == {name for name in source if not name.startswith("losses.")}
    assert all(torch.equal(kept[name], source[name]) for name in kept)


def test_all_faults_of_options_come_at_once_with_their_lines(tmp_path):
    config = tmp_path / "x.yaml"
    config.write_text("extends: quickstart\nheads:\n  cross: {num_head: 8}\nlosses:\n  clip: {init_logit_scale: hot}\n")
    with pytest.raises(ConfigError) as caught:
        check(load_config(config))
    text = str(caught.value)
    assert "x.yaml:3  heads.cross.num_head: unknown option of CrossAttention" in text
    assert "Did you mean 'num_heads'?" in text
    assert "x.yaml:5  losses.clip.init_logit_scale" in text


def test_values_that_make_no_sense_are_located(tmp_path):
    config = tmp_path / "x.yaml"
    config.write_text("extends: quickstart\nheads:\n  cross: {num_heads: 7}\n")
    with pytest.raises(ConfigError, match=r"x\.yaml:3  heads\.cross\.num_heads: .*not a multiple of 7"):
        check(load_config(config))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("losses.distill.head=corss", "no head 'corss'"),
        ("teacher={type: none}", "distill reads a teacher, and the config has none"),
        ("augmenters.image={type: text_crop}", "makes text views"),
        ("data=null", "needs a data set"),
    ],
)
def test_requirements_that_are_not_on_offer(override, message):
    with pytest.raises(UserError, match=message):
        check(load_config("quickstart", [override]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("name=../../x", r"name: '\.\./\.\./x' is no name of one folder in runs/\. Give another name, or output_dir"),
        ("name=..", r"name: '\.\.' is no name"),
        ("name='a\\n#SBATCH --wrap=x'", None),
        ('name="a\\n#SBATCH --wrap=x"', r"name: 'a\\n#SBATCH --wrap=x' holds control characters"),
        ('output_dir="a\\x1b[2J"', r"output_dir: 'a\\x1b\[2J' holds control characters"),
        ("name='sweep of lr, β=0.9'", None),
    ],
)
def test_a_name_is_a_folder_and_a_line(override, message):
    if message is None:
        check(load_config("quickstart", [override]))
        return
    with pytest.raises(ConfigError, match=message):
        check(load_config("quickstart", [override]))


def test_a_name_with_a_slash_needs_a_folder():
    check(load_config("quickstart", ["name=sweep/a", "output_dir=runs/sweep/a"]))


def test_missing_shards_are_named_before_training(tmp_path):
    overrides = [
        f"data={{type: webdataset, train_data: '{tmp_path}/none-{{0000..0001}}.tar'}}",
        f"output_dir={tmp_path}/run",
        "evaluators=null",
    ]
    with pytest.raises(DataError, match=r"none-0000\.tar"):
        cosmos_ssl.train("quickstart", overrides)


def test_nothing_unread_stays_trainable_in_an_image_only_run():
    """Without text, image projections are all that is read; what the plan never reaches is frozen and named."""
    overrides = ["losses.distill=null", "teacher={type: none}", "evaluators=null"]
    assembly = check(load_config("quickstart", overrides))
    assert set(assembly.frozen) == {
        name for name, _ in assembly.model.named_parameters() if name.startswith("heads.cross.")
    }
    assert check(load_config("quickstart")).frozen == [] == check(load_config("quickstart")).notices
    [notice] = check(load_config("quickstart", ["losses.own={type: cross_modality_distillation}"])).notices
    assert notice.startswith("losses.own: no head is given, so this is the ablation"), "a part may say something"


def test_a_run_starts_from_trained_towers(trained, tmp_path, capsys):
    run, _ = trained
    config = tmp_path / "next.yaml"
    config.write_text(json.dumps({**TINY, "evaluators": None}))
    parts = "[image, text, heads, losses]"
    start = [f"model.pretrained={{from: {run}, parts: {parts}}}", f"data.folder={run.parent}/scenes"]
    model = Builder(load_config(config, start)).assemble("train").model
    source = cosmos_ssl.load(run).model.state_dict()
    assert all(torch.equal(value, source[name]) for name, value in model.state_dict().items())
    with pytest.raises(
        CheckpointError, match=r"model\.pretrained: .* does not fit image, text, heads, losses: .* of another shape"
    ):
        Builder(load_config(config, [*start, "model.image.patch_size=8"])).assemble("train")
    part = [
        *start,
        "model.image.patch_size=8",
        "model.pretrained_partial=true",
        f"output_dir={tmp_path}/part",
        "schedule.max_steps=1",
    ]
    assembly = Builder(load_config(config, part)).assemble("train")
    assert torch.equal(assembly.model.text.projection, source["text.projection"])
    capsys.readouterr()
    cosmos_ssl.train(config, part)
    told = (
        r"starting from .*: \d+ of \d+ tensors; left out: 1 of another shape \(image.patch_embed.weight\); image posi"
    )
    assert re.search(told, assembly.start)
    assert assembly.start in capsys.readouterr().out and assembly.start in (tmp_path / "part" / "log.txt").read_text()


HANGS = """
import sys, time, cosmos_ssl
from cosmos_ssl.api import Dataset, Spec
from cosmos_ssl.functional import alive
from cosmos_ssl.testing.examples import small_config

class Hangs(Dataset):
    shard_sizes = read = None
    def __init__(self, spec: Spec) -> None: pass
    def prepare(self):
        for _ in range(20): alive() or time.sleep(0.1)
        print("nothing from here on", flush=True)
        time.sleep(600)

cosmos_ssl.train(small_config(sys.argv[1], 1, {"data": {"type": Hangs}, "training": {"timeout_minutes": 0.02}}))
"""


def test_data_whose_preparation_hangs_end_the_run(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path)], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 74 and "nothing from here on" in done.stdout, done.stderr
    assert (
        "nothing has happened for 0.02 min (training.timeout_minutes): rank 0, preparing the data. Stacks of all"
        in done.stderr
    )
    assert "in prepare" in (tmp_path / "run" / "log.txt").read_text()


def test_a_backend_that_cannot_repeat_is_refused_in_the_check():
    repeats = ["training.deterministic=true", "training.attention=varlen"]
    check(load_config("quickstart", repeats))
    with pytest.raises(ConfigError, match=r"training\.attention: xformers adds up gradients in an order that differs"):
        check(load_config("quickstart", [repeats[0], "training.attention=xformers"]))
