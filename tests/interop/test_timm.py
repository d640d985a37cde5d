"""timm: the image tower, its projection as the head, from a folder and from a file of weights."""

import json

import pytest
import timm
import torch
from PIL import Image

from cosmos_ssl.errors import UserError
from cosmos_ssl.interop.clip import describe
from cosmos_ssl.interop.export import Origin, export
from cosmos_ssl.interop.timm import architecture

SIZES = {
    "small": [],
    "heads of 64, own name": [
        *("model.image.width=64", "model.image.heads=null", "model.image.layers=1", "model.image.patch_size=32"),
        *("model.image.image_size=224", "augmenters.image.global_crops_size=224"),
    ],
    "picture of no whole patches": ["model.image.image_size=38", "augmenters.image.global_crops_size=38"],
    "odd mlp": ["model.image.mlp_ratio=3.3"],
    "registers": ["model.image.registers=3"],
    "layer scale, no norm before": ["model.image.layer_scale=0.1", "model.image.pre_norm=false"],
}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out"


def write(encoder, folder):
    return export({"student": encoder}, "timm", folder, Origin(name="small", checkpoint="runs/small"))


@pytest.mark.parametrize("overrides", SIZES.values(), ids=SIZES.keys())
def test_features(make, pixels, folder, overrides):
    encoder = make(*overrides)
    assert write(encoder, folder) == ["left out: losses.clip, text"]
    images = pixels(encoder)
    config = json.loads((folder / "config.json").read_text())
    file = str(folder / "model.safetensors")
    models = [
        timm.create_model(f"local-dir:{folder}", pretrained=True),
        timm.create_model(config["architecture"], checkpoint_path=file, num_classes=24, **config["model_args"]),
    ]
    pooled = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    with torch.no_grad():
        for model in models:
            torch.testing.assert_close(
                model.eval()(images), encoder.encode_image(images, normalize=False), atol=1e-5, rtol=0
            )
        torch.testing.assert_close(pooled(images), encoder.image_features(images), atol=1e-5, rtol=0)


def test_names(make):
    assert architecture(describe(make(*SIZES["heads of 64, own name"]), "x", "student")) == "vit_base_patch32_clip_224"
    assert architecture(describe(make(), "x", "student")) == "vit_base_patch16_clip_224"


def test_preprocessing(make, folder):
    encoder = make()
    write(encoder, folder)
    config = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{folder}", pretrained=True))
    picture = Image.effect_noise((90, 45), 80).convert("RGB")
    torch.testing.assert_close(
        timm.data.create_transform(**config)(picture), encoder.preprocess(picture), atol=1e-5, rtol=0
    )


def test_an_image_tower_alone(make, pixels, folder):
    lone = make(
        "model.text=null", "tokenizer=null", "augmenters.text=null", "losses={clip: null, koleo: {type: koleo}}"
    )
    assert write(lone, folder) == []
    with torch.no_grad():
        found = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(pixels(lone))
    torch.testing.assert_close(found, lone.encode_image(pixels(lone), normalize=False), atol=1e-5, rtol=0)


def test_another_tower_is_refused(make, folder):
    crops = "augmenters.image={type: multi_crop, global_crops_size: 32, local_crops_number: 0}"
    with pytest.raises(UserError, match=r"model\.image is a TimmImage, not 'clip_vit'"):
        write(make("model.image={type: timm, model: vit_tiny_patch16_224, image_size: 32}", crops), folder)
