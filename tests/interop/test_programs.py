"""Towers as ONNX and as ``torch.export`` programs: each kind, any batch, the lines of the card as they stand."""

import json
import re

import numpy
import pytest
import torch
from PIL import Image

import cosmos_ssl
from cosmos_ssl.build import Builder
from cosmos_ssl.config import load_config
from cosmos_ssl.errors import UserError
from cosmos_ssl.interop.export import Origin, export
from cosmos_ssl.interop.programs.towers import on_host, plain_tower
from cosmos_ssl.interop.programs.writing import write
from cosmos_ssl.models.encoder import ModelEncoder

ORIGIN = Origin(name="small", checkpoint="runs/small")
OTHER = [
    *("model.image.registers=2", "model.image.layer_scale=0.1", "model.image.pre_norm=false"),
    *("model.image.patch_bias=true", "model.image.pooling=mean", "model.image.norm_after_pool=true"),
    *("model.image.activation=quick_gelu", "model.image.resize=squash", "model.image.interpolation=bilinear"),
    *("model.text.causal=false", "model.text.pooling=last", "model.text.projection_bias=true"),
    *("model.text.layer_scale=0.1", "model.text.activation=gelu_tanh"),
]
BORROWED = {
    "name": "borrowed",
    "model": {
        "embed_dim": 24,
        "image": {"type": "timm", "model": "test_vit", "image_size": 32, "projection_bias": True},
        "text": {
            "type": "huggingface",
            "architecture": "bert",
            "config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
            "pooling": "mean",
        },
    },
    "tokenizer": {"type": "clip", "context_length": 16},
    "augmenters": {"image": {"type": "resize_crop", "size": 32}, "text": {"type": "text_crop"}},
    "losses": {"clip": {"type": "clip"}},
}


def borrowed():
    assembly = Builder(load_config(BORROWED)).assemble("measure")
    return ModelEncoder(assembly.model.requires_grad_(False).eval(), assembly.spec, assembly.tokenizer)


@pytest.fixture
def picture(tmp_path, monkeypatch):
    """A picture of no even sides in the working folder."""
    monkeypatch.chdir(tmp_path)
    noise = numpy.random.default_rng(0).integers(0, 255, (41, 70, 3), numpy.uint8)
    Image.fromarray(noise).save("picture.png")


def lines_of(folder):
    return re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE)[0]


@pytest.mark.parametrize(("form", "kind"), [("onnx", "clip"), ("torch", "borrowed")])
def test_the_lines_of_the_card_give_the_features_of_the_model(make, picture, tmp_path, form, kind, monkeypatch):
    encoder = make("model.image.layers=1", "model.text.layers=1") if kind == "clip" else borrowed()
    notes = export({"student": encoder}, form, tmp_path / "out", ORIGIN)
    worst = [float(told) for note in notes for told in re.findall("in a unit feature is (.*)", note)]
    assert len(worst) == 2 and max(worst) < 1e-5
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(note in card for note in notes) and "torch 2" in card and "[batch, 16]" in card
    (tmp_path / "picture.png").rename(tmp_path / "out" / "picture.png")
    monkeypatch.chdir(tmp_path / "out")
    exec(lines_of(tmp_path / "out"), names := {})
    image, text = (torch.as_tensor(names[name]) for name in ("image", "text"))
    torch.testing.assert_close(image, encoder.encode_image(encoder.preprocess("picture.png")[None]), atol=1e-5, rtol=0)
    torch.testing.assert_close(text, encoder.encode_text(["a red circle", "a blue star"]), atol=1e-5, rtol=0)
    suffix = {"onnx": "onnx", "torch": "pt2"}[form]
    assert {path.name for path in tmp_path.joinpath("out").iterdir()} == {
        *("README.md", "picture.png", f"image.{suffix}", f"text.{suffix}", "preprocessor_config.json", "tokenizer.json")
    }
    assert str(cosmos_ssl.__path__[0]).encode() not in (tmp_path / "out" / f"image.{suffix}").read_bytes()


@pytest.mark.parametrize("overrides", [OTHER, ["model.text.vocab_size=300"]], ids=["other kinds", "few words"])
def test_the_plain_towers_are_the_packed_ones(make, pixels, words, overrides, picture):
    """What is traced, before it is: on options that the files of other libraries have no place for."""
    encoder = make(*overrides)
    host, ids = on_host(encoder), words(encoder)
    image, text = (plain_tower(host, modality) for modality in ("image", "text"))
    torch.testing.assert_close(image(pixels(encoder)), encoder.encode_image(pixels(encoder)), atol=1e-6, rtol=0)
    torch.testing.assert_close(text(ids), encoder.encode_text(ids), atol=1e-6, rtol=0)
    if overrides is OTHER:
        return
    raw = encoder.tokenizer(["a red circle", "a blue star"])[0]  # ids that the model has not
    torch.testing.assert_close(text(raw), encoder.encode_text(["a red circle", "a blue star"]), atol=1e-6, rtol=0)


def test_a_squashed_picture_and_an_image_tower_alone(make, tmp_path, picture):
    encoder = make("model.image.resize=squash", "model.image.interpolation=bilinear", "model.image.layers=1")
    encoder.model.text = None
    export({"student": encoder}, "torch", tmp_path / "out", ORIGIN)
    (tmp_path / "image.pt2").symlink_to(tmp_path / "out" / "image.pt2")
    exec(lines_of(tmp_path / "out"), names := {})
    expected = encoder.encode_image(encoder.preprocess("picture.png")[None])
    torch.testing.assert_close(names["image"], expected, atol=1e-5, rtol=0)
    assert not (tmp_path / "out" / "text.pt2").exists() and "text" not in names
    settings = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert settings["size"] == {"height": 32, "width": 32} and settings["resample"] == 2


def test_what_cannot_be_written_is_refused_in_a_line(make, tmp_path, monkeypatch):
    encoder = make("model.image.layers=1", "model.text.layers=1")
    kind = type(encoder.model.image)
    reading = {"forward": lambda self, groups, plan: int(groups["global"].pixels.sum())}
    encoder.model.image.__class__ = type("OfAnother", (kind,), reading)
    with pytest.raises(UserError, match=r"model.image .*cannot be written as a program: ") as refused:
        write(encoder, "torch", tmp_path)
    assert "\n" not in str(refused.value)
    encoder.model.image.__class__ = kind
    monkeypatch.setattr("cosmos_ssl.interop.programs.towers._norm", lambda norm, x: x)
    with pytest.raises(UserError, match=r"model.image cannot be written as torch: features differ by"):
        write(encoder, "torch", tmp_path)
    monkeypatch.setattr("cosmos_ssl.interop.programs.writing.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs onnx and onnxscript. Run: pip install 'cosmos-ssl\[onnx\]'"):
        cosmos_ssl.export(encoder, "onnx", tmp_path / "out")
