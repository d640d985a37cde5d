"""OpenCLIP models: written ones give the same features in OpenCLIP's own code, and read ones in ours."""

import json

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import cosmos_ssl
from cosmos_ssl.api import Head
from cosmos_ssl.build import Builder
from cosmos_ssl.config import load_config
from cosmos_ssl.errors import CheckpointError, UserError
from cosmos_ssl.interop.export import Origin, export
from cosmos_ssl.interop.openclip import CONFIG, WEIGHTS, read_tensors

SIZES = {
    "small": [],
    "heads of 64": ["model.image.width=128", "model.image.heads=null", "model.text.width=64", "model.text.heads=1"],
    "77 places, small patches": ["tokenizer.context_length=77", "model.image.patch_size=4", "model.image.layers=1"],
    "picture of no whole patches": ["model.image.image_size=38", "augmenters.image.global_crops_size=38"],
    "narrow and odd mlps": ["model.image.mlp_ratio=3.3", "model.text.mlp_ratio=2.7", "model.text.layers=3"],
    "another vocabulary": ["model.text.vocab_size=300"],
    "layer scale": ["model.image.layer_scale=0.1", "model.text.layer_scale=0.5"],
    "no norm before": ["model.image.pre_norm=false"],
    "quick gelu": [
        "model.image.activation=quick_gelu",
        "model.text.activation=quick_gelu",
        "model.image.std=[1,1,0.5]",
    ],
    "clipa": [
        "model.image.pooling=mean",
        "model.image.norm_after_pool=true",
        "model.image.resize=squash",
        "model.text.causal=false",
        "model.text.pooling=last",
    ],
    "text of siglip 2": [
        "model.text.projection_bias=true",
        "model.text.activation=gelu_tanh",
        "model.text.norm_eps=0.1",
    ],
    "siglip": ["losses={clip: null, siglip: {type: siglip}}"],
}
sizes = pytest.mark.parametrize("overrides", SIZES.values(), ids=SIZES.keys())


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out"


def write(encoder, folder, name="small"):
    return export({"student": encoder}, "openclip", folder, Origin(name=name, checkpoint="runs/small"))


def assert_same_features(encoder, model, pixels, tokens):
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode_image(pixels, normalize=True), encoder.encode_image(pixels), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            model.encode_text(tokens, normalize=True), encoder.encode_text(tokens), atol=1e-5, rtol=0
        )


@sizes
def test_features_in_openclip(make, pixels, words, folder, overrides):
    encoder = make(*overrides)
    write(encoder, folder)
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    assert_same_features(encoder, model, pixels(encoder), words(encoder))
    [loss] = encoder.model.losses.values()
    assert torch.equal(model.logit_scale, loss.logit_scale)
    assert model.logit_bias is None or torch.equal(model.logit_bias, loss.logit_bias)


@sizes
def test_there_and_back(make, pixels, words, folder, overrides):
    """Exactly the same tensors and sizes; only the start values of scales and such, which the tensors replace, may
    differ.
    """
    encoder = make(*overrides)
    write(encoder, folder)
    again = cosmos_ssl.load(folder)
    before, after = encoder.model.state_dict(), again.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(again.encode_image(pixels(encoder)), encoder.encode_image(pixels(encoder)))
    assert torch.equal(again.encode_text(words(encoder)), encoder.encode_text(words(encoder)))
    assert again.spec.image == encoder.spec.image
    assert [again.model.towers[m].kind == encoder.model.towers[m].kind for m in ("image", "text")] == [True] * 2


def test_preprocessing_and_tokens(make, folder):
    encoder = make()
    write(encoder, folder)
    _, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    picture = Image.effect_noise((70, 45), 80).convert("RGB")
    torch.testing.assert_close(preprocess(picture), encoder.preprocess(picture), atol=1e-6, rtol=0)
    texts = ["a red circle", "", "many words " * 60]
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{folder}")(texts), encoder.tokenize(texts))


def test_what_is_left_out_is_told(make, folder):
    heads = [
        "heads={cross: {type: cross_attention}}",
        "losses.distill={type: cross_modality_distillation, head: cross}",
    ]
    teacher = ["teacher={type: ema}", "model.image.mask_token=true"]
    notes = write(make(*heads, *teacher), folder)
    assert notes == ["left out: heads.cross, image.mask_token, losses.distill"]


def test_logits_of_another_kind_are_told(make, folder):
    class Matching(Head):
        matches = True

        def outputs(self):
            return {}

        def requires(self, outputs):
            return []

        def forward(self, features, views, outputs):
            return {}

        match_needs = match_input = match = forward

    encoder = make()
    encoder.model.heads["own"] = Matching()
    del encoder.model.losses["clip"]
    assert write(encoder, folder) == [
        "logit_scale is CLIP's start value: the model has no loss clip or siglip",
        "pictures and texts match by the product of their features, not by heads.own",
    ]
    assert load_file(folder / WEIGHTS[0])["logit_scale"].exp().item() == pytest.approx(1 / 0.07)


def test_what_openclip_has_no_place_for(make, folder):
    with pytest.raises(UserError, match=r"^openclip has no place for model.image.registers \(2\)$"):
        write(make("model.image.registers=2"), folder)
    with pytest.raises(UserError, match=r"model.image.patch_bias \(True\); the activations gelu and quick_gelu$"):
        write(make("model.text.activation=quick_gelu", "model.image.patch_bias=true"), folder)
    assert not folder.exists() and not list(folder.parent.iterdir())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.image={type: timm, model: vit_tiny_patch16_224, image_size: 32}",
            "model.image is a TimmImage, not 'clip_vit'",
        ),
        ("model.text=null", "model.text is missing"),
        ("model.text={type: huggingface, architecture: bert}", "model.text is a HuggingFaceText, not 'clip_text'"),
    ],
)
def test_other_towers_are_refused_by_name(make, folder, override, message):
    rest = ["losses={clip: null, koleo: {type: koleo}}", "augmenters.text=null"] if override.endswith("null") else []
    if "timm" in override:
        rest = ["augmenters.image={type: multi_crop, global_crops_size: 32, local_crops_number: 0}"]
    with pytest.raises(UserError, match=message):
        write(make(override, *rest), folder)


# ---------------------------------------------------------------------------- reading


@pytest.fixture
def theirs():
    """A model of OpenCLIP's own making, and its config."""
    model_cfg = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 1},
    }
    torch.manual_seed(0)
    return open_clip.CLIP(**model_cfg).eval(), model_cfg


def save(model, model_cfg, folder, **preprocess):
    folder.mkdir(exist_ok=True)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / CONFIG).write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess}))
    return folder


def test_a_folder(theirs, tmp_path, pixels):
    model, model_cfg = theirs
    source = save(model, model_cfg, tmp_path / "vit", mean=[0.48145466, 0.4578275, 0.40821073], resize_mode="shortest")
    for name in (source, f"local-dir:{source}", source / "open_clip_model.safetensors"):
        encoder = cosmos_ssl.load(name)
        assert_same_features(encoder, model, pixels(encoder), encoder.tokenize(["a red circle", "b"]))
    with pytest.raises(CheckpointError, match="is an OpenCLIP model, which has no teacher"):
        cosmos_ssl.load(source, "teacher")


@pytest.mark.parametrize("form", ["bare.bin", "training.pt", "custom.pt", "plain.safetensors"])
def test_a_file_alone(theirs, tmp_path, pixels, form):
    """Heads are told by overrides: no tensor has them."""
    model, _ = theirs
    state, path = model.state_dict(), tmp_path / form
    content = {
        "bare.bin": state,
        "training.pt": {
            "epoch": 3,
            "name": "x",
            "state_dict": {f"module.{name}": value for name, value in state.items()},
        },
        "custom.pt": {
            name if name.startswith(("visual.", "logit")) else f"text.{name}": value for name, value in state.items()
        },
    }
    if form.endswith(".safetensors"):
        save_file(state, path)
    else:
        torch.save(content[form], path)
    encoder = cosmos_ssl.load(path, overrides=["model.image.heads=3", "model.text.heads=4"])
    assert_same_features(encoder, model, pixels(encoder), encoder.tokenize(["a red circle", "b"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quick_gelu": True, "vision_cfg": {"act_kwargs": {"approximate": "tanh"}}}, "vision_cfg.act_kwargs: {'appr"),
        ({"vision_cfg": {"timm_model_name": "hf-hub:a/b"}}, "vision_cfg.timm_model_name: hf-hub:a/b"),
        ({"vision_cfg": {"timm_pool": "abs_attn"}}, "vision_cfg.timm_pool: abs_attn"),
        ({"vision_cfg": {"pool_type": "none"}}, "vision_cfg.pool_type: none"),
        ({"vision_cfg": {"attentional_pool": True}}, "vision_cfg.attentional_pool: True"),
        ({"vision_cfg": {"qk_norm": True}}, "vision_cfg.qk_norm: True"),
        (
            {"text_cfg": {"pool_type": "first", "hf_model_name": "bert", "norm_kwargs": {"bias": False}}},
            r"text_cfg.norm_kwargs: bias; text_cfg.hf_model_name: bert \(without.*; text_cfg.pool_type: first",
        ),
        (
            {"text_cfg": {"hf_model_name": "b", "hf_tokenizer_name": "b", "hf_pooler_type": "cls_pooler"}},
            "text_cfg.hf_pooler_type: cls_pooler",
        ),
        (
            {"text_cfg": {"embed_cls": True, "tokenizer_kwargs": {"clean": "lower"}}},
            "text_cfg.embed_cls: True; text_cf",
        ),
        ({"vision_cfg": {"layers": [3, 4, 6, 3]}}, r"vision_cfg.layers: \[3, 4, 6, 3\]"),
        ({"vision_cfg": {"image_size": [32, 64]}}, r"vision_cfg.image_size: \[32, 64\]"),
        ({"multimodal_cfg": {"layers": 2}}, "multimodal_cfg"),
    ],
)
def test_models_of_another_kind(theirs, tmp_path, change, message):
    model, model_cfg = theirs
    changed = {
        **model_cfg,
        **{key: {**model_cfg[key], **value} if key in model_cfg else value for key, value in change.items()},
    }
    source = save(model, changed, tmp_path / "other")
    with pytest.raises(CheckpointError, match=f"is a model of another kind than our towers: {message}"):
        cosmos_ssl.load(source)


def test_every_setting_of_openclip_is_known_or_refused(theirs, tmp_path):
    """The settings of all published models: those with our two towers and GELU are taken, with their own defaults spelt
    out.
    """
    from dataclasses import asdict

    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    model, model_cfg = theirs
    full = {
        **model_cfg,
        "vision_cfg": {**asdict(CLIPVisionCfg()), **model_cfg["vision_cfg"]},
        "text_cfg": {**asdict(CLIPTextCfg()), **model_cfg["text_cfg"]},
    }
    assert cosmos_ssl.load(save(model, full, tmp_path / "full")).spec.image.image_size == 32


@pytest.mark.parametrize(
    "name", ["ViT-B-16", "ViT-B-32-256", "ViT-S-32-alt", "ViT-L-14-336", "ViT-H-14", "ViT-g-14", "ViT-bigG-14"]
)
def test_sizes_of_published_models(name, monkeypatch):
    """Every tensor of OpenCLIP's own model has its place and its shape in ours; heads as OpenCLIP counts them."""
    model_cfg = open_clip.get_model_config(name)
    monkeypatch.setattr("cosmos_ssl.interop.openclip.check_weights", lambda *_: None)  # which would have real ones
    with torch.device("meta"):
        theirs = open_clip.CLIP(**model_cfg)
    found = read_tensors(theirs.state_dict(), name, {"model_cfg": model_cfg})
    ours = Builder(load_config(found.config)).assemble("check")
    shapes = {key: value.shape for key, value in ours.model.state_dict().items()}
    assert shapes == {key: value.shape for key, value in found.state.items()}
    assert ours.model.image.blocks[0].attn.heads == theirs.visual.transformer.resblocks[0].attn.num_heads
    assert ours.model.text.blocks[0].attn.heads == theirs.transformer.resblocks[0].attn.num_heads
    assert ours.spec.image.image_size == theirs.visual.image_size[0]


@pytest.mark.parametrize("name", ["RN50", "RN50x64-quickgelu", "coca_ViT-B-32", "coca_base", "nllb-clip-base-siglip"])
def test_published_models_of_another_kind(name):
    with pytest.raises(CheckpointError, match=f"{name} is a model of another kind"):
        read_tensors({"visual.proj": torch.ones(1)}, name, {"model_cfg": open_clip.get_model_config(name)})


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        ({"mean": [0.5] * 2}, r"preprocess_cfg.mean: \[0.5, 0.5\]"),
        ({"std": [0.0] * 3}, r"std: \[0.0, 0.0, 0.0\] has a number"),
        ({"interpolation": "random"}, "preprocess_cfg.interpolation: random"),
        ({"resize_mode": "longest"}, "preprocess_cfg.resize_mode: longest"),
    ],
)
def test_pictures_prepared_otherwise(theirs, tmp_path, preprocess, message):
    with pytest.raises(UserError, match=message):
        cosmos_ssl.load(save(*theirs, tmp_path / "other", **preprocess))


def test_missing_and_strange_tensors(theirs, tmp_path):
    source = save(*theirs, tmp_path / "cut")
    state = load_file(source / "open_clip_model.safetensors")
    del state["ln_final.bias"]
    save_file({**state, "visual.extra": torch.ones(1)}, source / "open_clip_model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"no model of CLIP's towers: ln_final.bias is missing; visual.extra has no place"
    ):
        cosmos_ssl.load(source)
    save_file({"embeddings.weight": torch.ones(1)}, source / "open_clip_model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no OpenCLIP model: none of its tensors is called visual"):
        cosmos_ssl.load(source)
    (source / "open_clip_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="and no weights, such as"):
        cosmos_ssl.load(source)


START = {
    "model": {
        "embed_dim": 24,
        "image": {"type": "clip_vit", "width": 48, "layers": 2, "heads": 3, "patch_size": 8, "image_size": 32},
        "text": {"type": "clip_text", "width": 32, "layers": 1, "heads": 4},
    },
    "tokenizer": {"type": "clip", "context_length": 20},
    "augmenters": {
        "image": {"type": "multi_crop", "global_crops_size": 32, "local_crops_size": 16},
        "text": {"type": "text_crop"},
    },
    "losses": {"clip": {"type": "clip"}},
}


def started(*overrides):
    assembly = Builder(load_config(START, overrides)).assemble("train")
    return assembly.model.state_dict(), assembly.start


def test_training_starts_from_openclip(theirs, tmp_path):
    model, model_cfg = theirs
    source = save(model, model_cfg, tmp_path / "vit")
    state, told = started(f"model.pretrained={{from: {source}, parts: [image, text, losses.clip]}}")
    assert torch.equal(
        state["image.blocks.1.attn.qkv.weight"], model.visual.transformer.resblocks[1].attn.in_proj_weight
    )
    assert torch.equal(state["losses.clip.logit_scale"], model.logit_scale)
    assert told == f"starting from {source}: {len(state)} of {len(state)} tensors"
    with pytest.raises(CheckpointError, match=r"has 4 heads in its text tower \(model\.text\.heads=4\)\. Set that, or"):
        started(f"model.pretrained={source}", "model.text.heads=2")
    with pytest.raises(
        CheckpointError, match=r"has activation gelu in its text tower \(model\.text\.activation=gelu\)"
    ):
        started(f"model.pretrained={source}", "model.text.activation=quick_gelu")


def test_training_starts_at_another_size(theirs, tmp_path):
    model, model_cfg = theirs
    source = save(model, model_cfg, tmp_path / "vit")
    state, told = started(f"model.pretrained={source}", "model.image.image_size=48", "model.image.mask_token=true")
    expected = {"visual.positional_embedding": model.visual.positional_embedding}
    open_clip.model.resize_pos_embed(expected, type("Other", (), {"visual": type("V", (), {"grid_size": (6, 6)})}))
    torch.testing.assert_close(state["image.position_embedding"], expected["visual.positional_embedding"].detach())
    assert told.endswith("image positions resampled from 17 to 37 tokens; image.mask_token starts anew")


def test_training_starts_from_a_part_of_openclip(theirs, tmp_path):
    model, model_cfg = theirs
    wider = [
        f"model.pretrained={save(model, model_cfg, tmp_path / 'vit')}",
        "model.image.width=64",
        "model.image.heads=4",
    ]
    with pytest.raises(CheckpointError, match="does not fit the towers"):
        started(*wider)
    state, told = started(*wider, "model.pretrained_partial=true", "model.text.heads=2")
    assert torch.equal(state["text.projection"], model.text_projection)
    own, image = (sum(name.startswith(f"{tower}.") for name in state) for tower in ("text", "image"))
    assert f": {own} of {own + image} tensors; left out: {image} of another shape (image.class_token, " in told
    assert told.endswith("; 4 heads in its text tower (model.text.heads=4)")


def test_another_kind_is_a_start_when_asked_for_in_part(theirs, tmp_path, caplog):
    model, model_cfg = theirs
    changed = {**model_cfg, "vision_cfg": {**model_cfg["vision_cfg"], "qk_norm": True}}
    start = f"model.pretrained={save(model, changed, tmp_path / 'other')}"
    with pytest.raises(CheckpointError, match="qk_norm"):
        started(start)
    state, _ = started(start, "model.pretrained_partial=true")
    assert torch.equal(state["text.projection"], model.text_projection)
    assert "its weights are taken all the same: vision_cfg.qk_norm: True" in caplog.text


# ---------------------------------------------------------------------------- published ones


def test_a_published_name_without_network(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip.pretrained, "download_pretrained", unreachable)
    name = "ViT-B-16/laion2b_s34b_b88k"
    with pytest.raises(
        CheckpointError, match=f"{name} cannot be fetched: no route to host. Reach the hub once, or give a folder"
    ):
        cosmos_ssl.load(name)
    with pytest.raises(CheckpointError, match=r"OpenCLIP has no weights 'laion3b' of ViT-B-16\. It has openai, "):
        cosmos_ssl.load("ViT-B-16/laion3b")
    with pytest.raises(CheckpointError, match="ModifiedResNet"):  # said before anything is fetched
        cosmos_ssl.load("RN50/openai")
    with pytest.raises(
        CheckpointError, match="no run folder with a checkpoint, no checkpoint, no official file and no OpenCLIP model"
    ):
        cosmos_ssl.load("runs/nowhere")
