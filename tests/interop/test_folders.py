"""Folders of Hugging Face and timm, written by these libraries, give their own features."""

import json

import pytest
import timm
import torch
from timm.models import save_for_hf
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

import cosmos_ssl
from cosmos_ssl.api import Spec, TowerSpec
from cosmos_ssl.errors import CheckpointError, UserError
from cosmos_ssl.testing import small_run
from cosmos_ssl_plugins.teachers.frozen import Frozen

TOWER = {"num_hidden_layers": 2, "layer_norm_eps": 1e-4}
WORDS = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "max_position_embeddings": 20, **TOWER}
VIT = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 3, "image_size": 32, "patch_size": 8, **TOWER}


@pytest.fixture
def clip(tmp_path):
    """Write a random CLIPModel with this activation; returns it and its folder."""

    def write(act):
        torch.manual_seed(0)
        config = CLIPConfig(
            vision_config={**VIT, "hidden_act": act}, text_config={**WORDS, "hidden_act": act}, projection_dim=24
        )
        model = CLIPModel(config).eval()
        model.save_pretrained(tmp_path / "clip")
        preprocessing = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"shortest_edge": 32}}
        (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(preprocessing))
        return model, tmp_path / "clip"

    return write


@pytest.mark.parametrize("act", ["gelu", "quick_gelu", "gelu_pytorch_tanh"])
def test_clip_model(clip, act):
    model, folder = clip(act)
    ours = cosmos_ssl.load(folder)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    ids = ours.tokenize(["a red circle", "b " * 40])
    with torch.no_grad():
        theirs = model(input_ids=ids, pixel_values=pixels)
    torch.testing.assert_close(ours.encode_image(pixels), theirs.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.encode_text(ids), theirs.text_embeds, atol=1e-5, rtol=0)
    assert ours.spec.image.mean == (0.5,) * 3 and ours.spec.image.std == (0.25,) * 3


def test_siglip_model(tmp_path, write_tokenizer):
    """Of a published size, on timm's tower; others, and settings that no SigLIP has, are refused."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "patch_size": 32,
        "image_size": 256,
    }
    words = {"vocab_size": 12, "hidden_size": 768, "num_hidden_layers": 1, "max_position_embeddings": 16}
    model = SiglipModel(SiglipConfig(vision_config=vision, text_config=words)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    folder = tmp_path / "siglip"
    model.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        cosmos_ssl.load(folder)
    write_tokenizer(folder)
    pictures = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 256, "width": 256}, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    ours = cosmos_ssl.load(folder)
    pixels = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    ids = ours.tokenize(["a red heart", "Two blue stars!"])
    with torch.no_grad():
        theirs = model(input_ids=ids, pixel_values=pixels)
    torch.testing.assert_close(ours.encode_image(pixels), theirs.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.encode_text(ids), theirs.text_embeds, atol=1e-5, rtol=0)
    loss = ours.model.losses["siglip"]
    logits = ours.encode_image(pixels) @ ours.encode_text(ids).T * loss.logit_scale.exp() + loss.logit_bias
    torch.testing.assert_close(logits, theirs.logits_per_image, atol=1e-4, rtol=1e-4)
    assert ours.spec.image.resize == "squash" and ours.spec.image.mean == (0.5,) * 3
    told = json.loads((folder / "config.json").read_text())
    for change, message in (
        (
            {"hidden_size": 64},
            r"timm has no SigLIP tower of its sizes \(width, layers, heads, patch \[64, 12, 12, 32\]",
        ),
        ({"image_size": []}, r"timm has no SigLIP tower of its sizes .* pictures of \[\]"),
        ({"hidden_act": "gelu"}, r"another kind than SigLIP: vision_config\.hidden_act: gelu"),
    ):
        (folder / "config.json").write_text(json.dumps({**told, "vision_config": {**told["vision_config"], **change}}))
        with pytest.raises(CheckpointError, match=message):
            cosmos_ssl.load(folder)


def test_other_models_are_refused(clip, tmp_path):
    _, folder = clip("gelu")
    with pytest.raises(CheckpointError, match="is a model of Hugging Face or timm, which has no teacher"):
        cosmos_ssl.load(folder, "teacher")
    told = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"model_type": "blip"}, "another kind than CLIPModel, SiglipModel and timm's: its model_type is blip"),
        ({"text_config": {**told["text_config"], "hidden_act": "quick_gelu"}}, "activations are gelu and quick_gelu"),
        ({"vision_config": {**told["vision_config"], "num_attention_heads": 0}}, "has no sizes"),
    ):
        (folder / "config.json").write_text(json.dumps({**told, **change}))
        with pytest.raises(CheckpointError, match=message):
            cosmos_ssl.load(folder)
    pictures = (folder / "preprocessor_config.json").read_text()
    for change, more, message in (
        ({"vision_config": {**told["vision_config"], "hidden_act": []}}, {}, r"activations are \[\]"),
        ({"vision_config": {**told["vision_config"], "layer_norm_eps": "x"}}, {}, "vision_cfg.norm_kwargs.eps: x"),
        ({"vision_config": {**told["vision_config"], "image_size": {}}}, {}, "vision_cfg.image_size: {}"),
        ({"text_config": 3}, {}, "is a model of another kind"),
        ({"architecture": "test_vit", "num_features": 1 << 60}, {}, "the width of its features"),
        ({}, {"resample": []}, "preprocess_cfg.interpolation: another"),
        ({}, {"image_mean": 3}, "preprocess_cfg.mean: 3"),
    ):
        (folder / "config.json").write_text(json.dumps({**told, **change}))
        (folder / "preprocessor_config.json").write_text(json.dumps({**json.loads(pictures), **more}))
        with pytest.raises(CheckpointError, match=message):
            cosmos_ssl.load(folder)
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=r"holds config.json and no weights, such as model.safetensors"):
        cosmos_ssl.load(folder)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "depth": 2}),
        ("vit_small_patch16_dinov3", {"depth": 2}),
        ("vit_base_patch16_siglip_224", {"depth": 1}),
        ("test_vit", {}),
        ("test_convnext", {"num_classes": 10}),
    ],
)
def test_timm_models(tmp_path, name, options):
    """An image tower alone, with the features before the classifier."""
    torch.manual_seed(0)
    model = timm.create_model(name, **options).eval()
    kept = {key: value for key, value in options.items() if key != "num_classes"}
    save_for_hf(model, tmp_path / "timm", model_args=kept or None, safe_serialization=True)
    ours = cosmos_ssl.load(tmp_path / "timm")
    size = 56 if "img_size" in options else model.pretrained_cfg["input_size"][-1]
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = model.forward_head(model.forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(ours.encode_image(pixels, normalize=False), theirs, atol=1e-5, rtol=1e-5)
    assert ours.spec.image.mean == tuple(model.pretrained_cfg["mean"]) and ours.model.text is None


PROTOTYPES = {"hidden_dim": 24, "bottleneck_dim": 16, "output_dim": 40}
IBOT = {
    "model": {"text": None},
    "tokenizer": None,
    "augmenters": {"image": {"mask_probability": 1.0}, "text": None},
    "data": {"caption_schema": None},
    "heads": {"cross": None, "dino": {"type": "dino_projection", **PROTOTYPES}},
    "losses": {
        "clip": None,
        "distill": None,
        "dino": {"type": "dino", "head": "dino"},
        "ibot": {"type": "ibot", "head": "dino"},
    },
    "teacher": {"type": "ema"},
    "optimizer": {"layer_decay": 0.8},
    "evaluators": None,
}


def test_training_goes_on_from_timm(tmp_path):
    """iBOT on a ViT with its weights, at another size: positions resampled by timm, a mask token, rates by depth."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit")
    save_for_hf(model, tmp_path / "timm", safe_serialization=True)
    image = {"type": "timm", "model": f"local-dir:{tmp_path / 'timm'}", "pretrained": True, "mask_token": True}
    tree = json.loads(json.dumps(IBOT))
    tree["model"]["image"] = {**image, "image_size": 32, "drop_path": 0.1}
    tree["augmenters"]["image"] |= {"type": "multi_crop", "global_crops_size": 32, "local_crops_size": 16}
    tree["augmenters"]["image"]["local_crops_number"] = 1
    rows = small_run(tmp_path, tree, steps=2)
    assert [row["loss"] > 0 for row in rows] == [True, True]
    ours = cosmos_ssl.load(tmp_path / "run")
    weight = ours.model.image.model.blocks[0].attn.qkv.weight
    torch.testing.assert_close(weight, model.blocks[0].attn.qkv.weight, atol=0.01, rtol=0)
    assert not torch.equal(weight, model.blocks[0].attn.qkv.weight)
    assert ours.model.image.mask_token.any()


def test_a_frozen_teacher_reads_what_the_student_reads(clip):
    """Of another architecture and size; else it is refused."""
    model, folder = clip("quick_gelu")
    pictures = TowerSpec(width=8, mean=(0.5,) * 3, std=(0.25,) * 3)
    for spec, message in (
        (Spec(embed_dim=25), "has embed_dim 24, the student 25"),
        (Spec(embed_dim=24, image=TowerSpec(width=8)), r"has model.image.mean \[0.5, 0.5, 0.5\], the student \[0.48"),
        (Spec(embed_dim=24, text=TowerSpec(width=8), vocab_size=60_000), "has token ids 49408, the student 60000"),
    ):
        with pytest.raises(UserError, match=message):
            Frozen(spec, checkpoint=str(folder), which="student").prepare()
    teacher = Frozen(Spec(embed_dim=24, image=pictures), checkpoint=str(folder), which="student")
    teacher.start(lambda: model, model)
    assert torch.equal(teacher.model.image.projection, model.visual_projection.weight.t())
