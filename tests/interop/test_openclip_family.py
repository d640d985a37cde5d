"""OpenCLIP's architectures: random models of its own making give the same features in ours, or are refused."""

import json

import open_clip
import pytest
import torch
import transformers
from open_clip.model import CLIP, CustomTextCLIP
from PIL import Image
from safetensors.torch import save_file

import cosmos_ssl

VIT = {"image_size": 64, "layers": 2, "width": 128, "patch_size": 16}
TEXT = {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
TIMM = {"timm_model_pretrained": False}
BOTH_WAYS = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True, "norm_kwargs": {"eps": 1e-6}}
TANH = {"act_kwargs": {"approximate": "tanh"}}
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}

KINDS = {
    "ViT": ({}, {}, {}, {}),
    "ViT, QuickGELU (OpenAI, DFN)": ({}, {}, {"quick_gelu": True}, {}),
    "ViT, heads 32 wide": ({"head_width": 32}, {"heads": 4}, {}, {}),
    "ViT, layer scale": ({"ls_init_value": 1e-4}, {"ls_init_value": 0.1}, {}, {}),
    "ViT, mean over patches": ({"pool_type": "avg"}, {}, {}, HALF),
    "ViT, fixed positions, norm after the class token": (
        {"pos_embed_type": "sin_cos_2d", "final_ln_after_pool": True}, {}, {}, {}
    ),
    "CLIPA": (
        {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True},
        {"no_causal_mask": True, "pool_type": "last"},
        {},
        {"interpolation": "bilinear", "resize_mode": "squash"},
    ),
    "ViT, other norms and GELU by tanh": (
        {"norm_kwargs": {"eps": 1e-3}, **TANH}, {"norm_kwargs": {"eps": 1e-4}, **TANH}, {}, {}
    ),
    "text of both ways, read at its end": ({}, {"no_causal_mask": True}, {}, {}),
    "text of both ways, read at its start": ({}, {"no_causal_mask": True, "pool_type": "first"}, {}, {}),
    "causal text, read at the context's last place": ({}, {"pool_type": "last"}, {"init_logit_bias": -10.0}, {}),
    "SigLIP": (
        {"image_size": 224, "timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map", "timm_proj": "none"},
        BOTH_WAYS, {"init_logit_bias": -10.0, "custom_text": True, "embed_dim": 768}, HALF,
    ),
    "SigLIP 2": (
        {"image_size": 256, "timm_model_name": "vit_base_patch32_siglip_256", "timm_pool": "map", "timm_proj": "none"},
        {**BOTH_WAYS, **TANH, "proj_type": "none", "width": 768, "heads": 12, "layers": 1},
        {"init_logit_bias": -10.0, "custom_text": True, "embed_dim": 768}, HALF,
    ),
    "EVA": (
        {"image_size": 224, "timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "timm_proj": None},
        {}, {"custom_text": True}, {},
    ),
    "PE": (
        {"image_size": 384, "timm_model_name": "vit_pe_core_tiny_patch16_384", "timm_pool": "map", "timm_proj": None},
        {}, {"custom_text": True}, HALF,
    ),
    "MobileCLIP (FastViT)": (
        {"image_size": 256, "timm_model_name": "fastvit_mci0", "timm_pool": "avg", "timm_proj": None},
        {"no_causal_mask": True}, {"custom_text": True}, {},
    ),
    "ConvNeXt": (
        {"image_size": 64, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"}, {}, {}, {}
    ),
    "ConvNeXt, two maps": (
        {"image_size": 64, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "mlp"}, {}, {}, {}
    ),
    "ViTamin": (
        {"image_size": 224, "timm_model_name": "vitamin_small_224", "timm_pool": "", "timm_proj": "linear"},
        {}, {"custom_text": True}, {},
    ),
    "Swin": (
        {"image_size": 224, "timm_model_name": "swin_tiny_patch4_window7_224", "timm_pool": "", "timm_proj": "linear"},
        {}, {}, {},
    ),
}  # fmt: skip


def build(kind: str):
    vision, words, more, pictures = KINDS[kind]
    plain = {} if "timm_model_name" in vision else VIT
    timm = TIMM if "timm_model_name" in vision else {}
    cfg = {"embed_dim": 48, "vision_cfg": {**plain, **timm, **vision}, "text_cfg": {**TEXT, **words}, **more}
    sizes = {key: value for key, value in cfg.items() if key != "custom_text"}
    return random_model(CustomTextCLIP if cfg.get("custom_text") else CLIP, sizes), cfg, pictures


def random_model(kind, sizes):
    torch.manual_seed(0)
    model = kind(**sizes).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases that start at zero, too
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def save(model, cfg, pictures, folder):
    folder.mkdir()
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": pictures}))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_architectures(kind, tmp_path, record_property):
    """Unit features to 1e-5 of OpenCLIP's, pictures as it prepares them. interop/README.md has a table of it."""
    model, cfg, pictures = build(kind)
    ours = cosmos_ssl.load(save(model, cfg, pictures, tmp_path / "model"))
    size = ours.spec.image.image_size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    ids = open_clip.get_tokenizer("ViT-B-32", context_length=24)(
        ["a red heart", "two blue stars on white", "word " * 40]
    )
    with torch.no_grad():
        pairs = [
            (model.encode_image(pixels, normalize=True), ours.encode_image(pixels)),
            (model.encode_text(ids, normalize=True), ours.encode_text(ids)),
        ]
    largest = max((theirs - own).abs().max().item() for theirs, own in pairs)
    record_property("largest difference", largest)
    print(f"| {kind} | {largest:.1e} |")
    assert largest < 1e-5
    picture = Image.effect_noise((90, 71), 80).convert("RGB")
    usual = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
    prepare = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(size=size, **usual | pictures), is_train=False
    )
    torch.testing.assert_close(prepare(picture), ours.preprocess(picture), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("words", "kwargs"),
    [
        ({"pool_type": "eos", "eos_id": 2}, {"clean": "canonicalize"}),
        ({"pool_type": "last", "no_causal_mask": True}, {"strip_sep_token": True}),
    ],
    ids=["worldwide", "CLIPA"],
)
def test_models_with_a_tokenizer_of_their_own(tmp_path, words, kwargs, write_tokenizer):
    """Ids and features are OpenCLIP's, of strings too long and of punctuation."""
    model, cfg, _ = build("ViT")
    own = {"hf_tokenizer_name": "someone/words", "tokenizer_kwargs": kwargs, "vocab_size": 10, **words}
    cfg["text_cfg"] = {**cfg["text_cfg"], **own}
    built = {**cfg["text_cfg"], "hf_tokenizer_name": None}
    model = CLIP(cfg["embed_dim"], cfg["vision_cfg"], built).eval()
    folder = save(model, cfg, {}, tmp_path / "model")
    write_tokenizer(folder)
    ours = cosmos_ssl.load(folder)
    texts = ["a red heart", "Two, blue   stars!", "", "a " * 40]
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")(texts)
    assert torch.equal(ours.tokenize(texts), ids)
    with torch.no_grad():
        theirs = model.encode_text(ids, normalize=True)
    torch.testing.assert_close(ours.encode_text(texts), theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.encode_text(ids), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "words", "width"),
    [
        ("xlm-roberta", {}, 64),
        ("roberta", {"hf_proj_type": "linear", "hf_pooler_type": "cls_last_hidden_state_pooler"}, 64),
        ("bert", {"hf_proj_type": None, "hf_pooler_type": "mean_pooler"}, 48),
    ],
)
def test_text_towers_of_hugging_face(kind, words, width, tmp_path, write_tokenizer):
    """Two maps, one or none behind them; the config of the tower lies in a folder."""
    sizes = {"vocab_size": 10, "hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 96, "max_position_embeddings": 40, "pad_token_id": 1}
    transformers.AutoConfig.for_model(kind, **sizes).save_pretrained(tmp_path / "text")
    tokens = {"hf_tokenizer_name": "someone/words", "context_length": 24}
    text = {"hf_model_name": str(tmp_path / "text"), "hf_model_pretrained": False, **tokens, **words}
    model = random_model(CustomTextCLIP, {"embed_dim": 48, "vision_cfg": VIT, "text_cfg": text})
    cfg = {"embed_dim": 48, "vision_cfg": VIT, "text_cfg": text, "custom_text": True}
    folder = save(model, cfg, {}, tmp_path / "model")
    write_tokenizer(folder)
    ours = cosmos_ssl.load(folder)
    texts = ["a red heart", "two, blue stars", "", "a " * 40]
    ids = open_clip.get_tokenizer(f"local-dir:{folder}", context_length=24)(texts)
    assert torch.equal(ours.tokenize(texts), ids)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        theirs = model.encode_text(ids, normalize=True), model.encode_image(pixels, normalize=True)
    torch.testing.assert_close((ours.encode_text(ids), ours.encode_image(pixels)), theirs, atol=1e-5, rtol=0)
