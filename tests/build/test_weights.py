"""The one door for weights: found and verified, told in a line, refused where they are damaged or no weights."""

import hashlib
import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import cosmos_ssl
from cosmos_ssl import registry
from cosmos_ssl.build import Builder
from cosmos_ssl.build.weights import find_source, read_weights
from cosmos_ssl.config import load_config
from cosmos_ssl.config.source import dump_yaml
from cosmos_ssl.engine.checkpoint import Snapshot, latest_checkpoint, save_checkpoint, to_host
from cosmos_ssl.errors import CheckpointError, ConfigError, UserError
from cosmos_ssl.interop.foreign import is_remote
from cosmos_ssl.testing.examples import small_config

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "official_checkpoint.pt"
HEADS = ["model.image.heads=3", "model.text.heads=2"]
SMALL = [
    *(
        "model.image.layers=1",
        "model.image.width=32",
        "model.image.heads=2",
        "model.text.layers=1",
        "model.text.width=32",
    ),
    *("model.text.heads=4", "model.embed_dim=32", "data=null", "evaluators=null", "teacher={type: none}"),
    *("heads=null", "losses.distill=null"),
]


@pytest.fixture(scope="module")
def loaded():
    return load_config("quickstart", SMALL)


@pytest.fixture(scope="module")
def state(loaded):
    return to_host(Builder(loaded).assemble("measure").model.state_dict())


@pytest.fixture
def run(tmp_path, loaded, state):
    """A run folder with two checkpoints."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_yaml(loaded.config.model_dump()))
    for step in (1, 2):
        save_checkpoint(folder, Snapshot(step=step, tensors={"student": state, "optimizer": {}}, state={"step": step}))
    return folder


def rewritten(folder, name, content):
    """Change a file of a checkpoint and make the manifest true to it, as someone who means harm would."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def flip(folder):
    data = bytearray((folder / "student.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "student.safetensors").write_bytes(data)


def state_of(step):
    return lambda folder: rewritten(folder, "state.json", json.dumps({"format": 1, "step": step}).encode())


def manifest_of(content):
    return lambda folder: (folder / "manifest.json").write_text(content)


def poisoned(value):
    def poison(folder):
        state = cosmos_ssl.engine.checkpoint.load_tensors(folder, "student")
        state["image.norm.weight"] = state["image.norm.weight"].clone()
        state["image.norm.weight"][3] = value
        save_file(state, folder / "x", metadata={"role": "student"})
        rewritten(folder, "student.safetensors", (folder / "x").read_bytes())

    return poison


def of_8_bits(folder):
    tensors = {"image.norm.weight": torch.ones(32).to(torch.float8_e5m2)}
    save_file(tensors, folder / "x", metadata={"role": "student"})
    rewritten(folder, "student.safetensors", (folder / "x").read_bytes())


DAMAGE = {
    "flipped byte": (flip, "student.safetensors has changed since it was written"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest without files": (
        manifest_of('{"files": {}}'),
        "manifest.json cannot be used: it does not tell of optimizer.safetensors",
    ),
    "manifest of strings": (
        manifest_of('{"files": {"state.json": {"bytes": "3", "sha256": ""}}}'),
        "it tells no files with their sizes",
    ),
    "manifest of lists": (manifest_of('{"files": []}'), "it tells no files with their sizes and hashes"),
    "deep manifest": (manifest_of("[" * 100_000), "manifest.json cannot be read: "),
    "a file that it does not tell of": (
        lambda folder: (folder / "teacher.safetensors").write_bytes(b""),
        "not tell of teacher",
    ),
    "step of another folder": (state_of(7), "state.json tells step 7, which is no step, or not that of the folder"),
    "negative step": (state_of(-2), "state.json tells step -2"),
    "step of words": (state_of("2"), "state.json tells step 2"),
    "step that is true": (state_of(True), "state.json tells step True"),
    "no step": (lambda folder: rewritten(folder, "state.json", b'{"format": 1}'), "state.json tells step None"),
    "state of a list": (lambda folder: rewritten(folder, "state.json", b"[]"), "state.json holds no table"),
    "another role": (
        lambda folder: rewritten(folder, "student.safetensors", (folder / "optimizer.safetensors").read_bytes()),
        "it holds the",
    ),
    "NaN": (poisoned(float("nan")), r"student.safetensors holds a NaN or an infinity \(image.norm.weight\)"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint(run, damage, message, caplog):
    """Refused where it is named, passed over for the one before where its run is, by readers and by a resume."""
    one, two = (run / "checkpoints" / f"step_{step:08d}" for step in (1, 2))
    assert find_source(two).folder == find_source(run).folder == two
    damage(two)
    with pytest.raises(CheckpointError, match=rf"^{two} is damaged: .*{message}"):
        cosmos_ssl.load(two)
    assert find_source(run).folder == one == latest_checkpoint(run)
    assert "step_00000002 is damaged" in caplog.text
    damage(one)
    with pytest.raises(CheckpointError, match="run holds no sound checkpoint: all were passed over"):
        cosmos_ssl.load(run)


def test_weights_of_another_type_do_not_fit(run):
    of_8_bits(run / "checkpoints" / "step_00000002")
    with pytest.raises(CheckpointError, match=r"does not fit the model: .* is missing"):
        cosmos_ssl.load(run)


def test_names_of_steps_without_end(run):
    two = run / "checkpoints" / "step_00000002"
    state_of(1 << 60)(two)
    with pytest.raises(CheckpointError, match="tells step 1152921504606846976"):
        find_source(two.rename(two.with_name(f"step_{1 << 60}")))


def test_only_buffers_may_be_infinite(run, state):
    """What the optimiser does not move, such as a mask that a part keeps; and nothing may be NaN."""
    name = "image.norm.weight"
    tensors = {"student": {**state, name: torch.full((32,), float("inf"))}, "optimizer": {}}
    save_checkpoint(run, Snapshot(step=3, tensors=tensors, state={"step": 3}, buffers={name}))
    assert find_source(run).name.endswith("step_00000003")
    for step, (moved, value) in enumerate(((name, "inf"), ("image.other", "nan")), 4):
        one = {"student": state, "optimizer": {f"{moved}.exp_avg": torch.ones(32)}}
        poisoned(float(value))(save_checkpoint(run, Snapshot(step=step, tensors=one, state={"step": step})))
        assert find_source(run).name.endswith("step_00000003")
    with pytest.raises(CheckpointError, match=r"step_00000003: image.norm.weight holds a NaN or an infinity"):
        cosmos_ssl.load(run)  # where the model says that it is no buffer


def test_every_load_tells_what_it_took(run, state, caplog):
    with caplog.at_level(logging.INFO, "cosmos_ssl"):
        cosmos_ssl.load(run)
        cosmos_ssl.load(GOLDEN, "teacher", overrides=HEADS)
    assert [record.message for record in caplog.records] == [
        f"the student of {run}/checkpoints/step_00000002: {len(state)} of {len(state)} tensors",
        f"the teacher of {GOLDEN}: 83 of 83 tensors",
    ]


def test_a_model_of_another_size_is_refused_before_it_is_built(run):
    """A config that asks for hundreds of gigabytes, beside small weights."""
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("width: 32", "width: 65536"))
    with pytest.raises(
        CheckpointError, match=r"does not fit the model: image.class_token is \[32\], the model's \[65536\]"
    ):
        cosmos_ssl.load(run)


SPREAD = """
from cosmos_ssl.api import Loss, LossOutput, Need
import torch

class Spread(Loss):
    def __init__(self, spec):
        super().__init__()
        self.register_buffer("queue", torch.zeros(4))
    def requires(self): return [Need(modality="image", group="global")]
    def forward(self, ctx): return LossOutput(terms={"spread": ctx.student.image["global"].unit.std(1).mean()})
"""


def test_a_run_whose_losses_package_is_gone_encodes_and_names_it(install, tmp_path, caplog, monkeypatch):
    """For all that encodes; a resume, which needs it, is refused."""
    site = install("my-losses", "0.3.1", entries={"losses/spread": "my_losses:Spread"}, modules={"my_losses": SPREAD})
    config = small_config(str(tmp_path), 1, {"losses": {"spread": {"type": "spread"}}})
    cosmos_ssl.train(config)
    run = tmp_path / "run"
    whole = cosmos_ssl.load(run).encode_text(["a cat"])
    (site / "my_losses-0.3.1.dist-info" / "entry_points.txt").unlink()
    registry.forget()
    with caplog.at_level(logging.INFO, "cosmos_ssl"):
        assert torch.equal(cosmos_ssl.load(run, "teacher").encode_text(["a cat"]), whole) is False
        encoder = cosmos_ssl.load(run)
    assert torch.equal(encoder.encode_text(["a cat"]), whole)
    assert "; without losses.spread, spread (my-losses 0.3.1), which is not installed" in caplog.text
    assert cosmos_ssl.export(run, "openclip", tmp_path / "out").roles == ("student",)
    had = r"no loss named 'spread'\.(.|\n)*Its run had spread \(my-losses 0\.3\.1\): install that package"
    for again in (config, run / "config.yaml"):
        with pytest.raises(ConfigError, match=had):
            cosmos_ssl.train(again)


# ---------------------------------------------------------------------------- starting from weights


def started(*overrides):
    return Builder(load_config("quickstart", [*SMALL, *overrides])).assemble("train").start


def test_a_start_tells_what_it_took(run, state):
    pretrained = f"model.pretrained={run}"
    source = f"{run}/checkpoints/step_00000002"
    towers = len(state) - 1
    anew = "; not asked for (model.pretrained.parts): losses.clip"
    assert started(pretrained) == f"starting from {source}: {towers} of {towers} tensors{anew}"
    whole = f"model.pretrained={{from: {run}, parts: [image, text, losses]}}"
    assert started(whole) == f"starting from {source}: {len(state)} of {len(state)} tensors"
    lone = ["model.text=null", "tokenizer=null", "augmenters.text=null", "losses={clip: null, koleo: {type: koleo}}"]
    image, text = ([name for name in state if name.startswith(tower)] for tower in ("image.", "text."))
    told = started(pretrained, *lone)
    left = "not asked for (model.pretrained.parts): losses.clip, text"
    assert told.split("; ")[1:] == [left] and f"{len(image)} of {len(image)} tensors" in told
    for parts, words in (
        ("[text, loses]", r"parts\.1: expected image, text, heads"),
        ("[losses.clp]", r"the model has no 'losses\.clp'\. Did you mean 'losses\.clip'\? It has image, text, losses"),
        ("[heads]", r"has nothing of heads: 0 of 0 tensors"),
    ):
        with pytest.raises(UserError, match=words):
            started(f"model.pretrained={{from: {run}, parts: {parts}}}")
    with pytest.raises(
        CheckpointError, match=r"does not fit the towers: .* left out: 2 not in the model \(image\.norm_pre"
    ):
        started(pretrained, "model.image.pre_norm=false")
    told = started(pretrained, "model.pretrained_partial=true", "model.text.width=64")
    assert f"left out: {len(text)} of another shape (text." in told


def test_a_start_from_next_to_nothing(run, loaded):
    other = ["model.image.width=64", "model.image.patch_size=12", "model.text.width=64", "model.embed_dim=64"]
    with pytest.raises(
        CheckpointError, match=r"model.pretrained: .*run has nothing of the towers: \d+ of \d+ tensors; left out: "
    ):
        started(f"model.pretrained={run}", "model.pretrained_partial=true", *other)


def test_heads_that_no_shape_tells(run):
    golden = [
        *("model.image.width=48", "model.image.patch_size=8", "model.image.image_size=32", "model.image.layers=2"),
        *HEADS,
    ]
    golden += [
        "model.text.layers=2",
        "model.text.vocab_size=256",
        "tokenizer.context_length=16",
        f"model.pretrained={GOLDEN}",
    ]
    told = started(*golden, "augmenters.image.global_crops_size=32", "augmenters.image.local_crops_size=16")
    assert told.endswith(
        "; heads, which it does not tell, are taken to be the model's (3 of the image tower, 2 of the text tower)"
    )
    with pytest.raises(
        CheckpointError, match=r"has 4 heads in its text tower \(model\.text\.heads=4\)\. Set that, or "
    ):
        started(f"model.pretrained={run}", "model.text.heads=2")


def test_what_is_no_source(run, tmp_path):
    for name in ("cosmos_vitb16_cc3m", "hf-hub:someone/vit", "ViT-B-32/laion2b_s34b_b79k"):
        assert is_remote(name)  # not fetched by a dry run
    assert not is_remote(str(run)) and not is_remote("0" * 32)
    (tmp_path / "cut.pt").write_bytes(GOLDEN.read_bytes()[:50_000])
    (run / "checkpoints" / "step_00000001" / "student.safetensors").write_bytes(b"")
    for bad, message in {
        "x" * 999: "^x{100} cannot be read: File name too long",
        "nowhere.pt": "nowhere.pt is no run folder with a checkpoint",
        "cosmos_vitb16_cc4m": "Did you mean 'cosmos_vitb16_cc3m'",
        str(tmp_path / "cut.pt"): "cut.pt cannot be read as a torch file",
        str(run / "checkpoints" / "step_00000001"): "is damaged: student.safetensors has 0 bytes, expected ",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            read_weights(find_source(bad), "student")
