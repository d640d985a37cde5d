"""Towers of ours as ``transformers.CLIPModel``, with its image processor and CLIP's tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from cosmos_ssl.interop.clip import ClipModel, TowerSizes, refuse
from cosmos_ssl.interop.files import write_json, write_safetensors

START, END = "<|startoftext|>", "<|endoftext|>"
_START_ID, _END_ID = 49_406, 49_407
ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}
"""Our names and theirs."""
_LARGEST = 2
"""As ``eos_token_id``: the end of a text is its largest id, whatever that is."""

_ENTITIES = (
    *[("&amp;", "&")] * 3,
    ("&lt;", "<"),
    ("&gt;", ">"),
    ("&quot;|&#34;", '"'),
    ("&apos;|&#0?39;|&#[xX]27;", "'"),
    ("&nbsp;", " "),
)
"""What stands for a character in captions from the web, in the order of replacing; it may be escaped three times."""
_QUOTES = (("[\u02bc\u2018-\u201b]", "'"), ("[\u201c-\u201f]", '"'))
"""As ftfy has them."""

_BLOCK = (
    ("norm1", "layer_norm1"),
    ("norm2", "layer_norm2"),
    ("attn.proj", "self_attn.out_proj"),
    ("mlp.fc1", "mlp.fc1"),
    ("mlp.fc2", "mlp.fc2"),
)


def write(model: ClipModel, folder: Path) -> list[str]:
    """Write a folder for ``from_pretrained``; returns what stays behind.

    Raises UserError for what CLIPModel has no place for.
    """
    assert model.text is not None
    refuse("huggingface (CLIPModel)", [*model.oddities(), *model.kinds("activation", "norm_eps", "mean", "std")])
    write_safetensors(folder / "model.safetensors", tensors(model))
    write_json(folder / "config.json", config(model))
    write_json(folder / "preprocessor_config.json", preprocessing(model))
    notes = [*model.left_out("image", "text"), *model.about_logits()]
    if model.vocabulary:
        _write_tokenizer(model, folder)
    else:
        notes.append("no tokenizer is written: the token ids are not those of CLIP's vocabulary")
    if model.logit_bias is not None:
        notes.append(f"the bias of the logits, {model.logit_bias.item():.4g}, is left out: CLIPModel has none")
    return notes


def loading(model: ClipModel) -> str:
    """Lines that load the folder that they are run in, and prepare pictures and texts exactly as ours do."""
    processor = "CLIPProcessor" if model.vocabulary else "CLIPImageProcessor"
    imports = "import html\n\nimport ftfy\n" if model.vocabulary else ""
    clean = "\n\n\ndef clean(text):\n    return html.unescape(html.unescape(ftfy.fix_text(text)))"
    return (
        f"{imports}from torchvision import transforms\nfrom transformers import {processor}, CLIPModel\n\n"
        f'model = CLIPModel.from_pretrained(".").eval()\nprocessor = {processor}.from_pretrained(".")\n'
        "preprocess = transforms.Compose(\n    [\n"
        f"        transforms.Resize({model.pictures.image_size}, transforms.InterpolationMode.BICUBIC),\n"
        f"        transforms.CenterCrop({model.pictures.image_size}),\n        transforms.ToTensor(),\n"
        f"        transforms.Normalize({list(model.pictures.mean)}, {list(model.pictures.std)}),\n    ]\n)"
        f"{clean if model.vocabulary else ''}\n"
    )


def differences(model: ClipModel) -> list[str]:
    """For the card: how what the processor makes of pictures and texts differs from what the model was trained on."""
    pictures = (
        "pictures: CLIPProcessor cuts the middle out one pixel beside the place where this model has it, where the "
        "longer side, once resized, has 3, 7, 11, ... pixels to spare (a quarter of all shapes); else its pixels "
        "differ by rounding, 1 of 255. 0.06 were seen in a unit feature. `preprocess`, for RGB pictures of PIL, makes "
        "the very pixels of this model"
    )
    texts = (
        "texts: CLIPProcessor makes straight quotes of curly ones, and characters of the common HTML entities. Of "
        "others, and of characters that were once decoded wrongly, it makes other tokens than this model was trained "
        "on, and 0.24 were seen in a unit feature: `clean` texts first"
    )
    return [pictures, texts] if model.vocabulary else [pictures.replace("CLIPProcessor", "CLIPImageProcessor")]


def tensors(model: ClipModel) -> dict[str, Tensor]:
    """The state of a CLIPModel."""
    image, text = model.tower("image"), model.tower("text")
    return {
        "logit_scale": model.logit_scale,
        "vision_model.embeddings.class_embedding": image["class_token"],
        "vision_model.embeddings.patch_embedding.weight": image["patch_embed.weight"],
        "vision_model.embeddings.position_embedding.weight": image["position_embedding"],
        "text_model.embeddings.token_embedding.weight": text["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": text["position_embedding"],
        "visual_projection.weight": image["projection"].t().contiguous(),
        "text_projection.weight": text["projection"].t().contiguous(),
        **dict(_modules(image, (("norm_pre", "vision_model.pre_layrnorm"), ("norm", "vision_model.post_layernorm")))),
        **dict(_modules(text, (("norm", "text_model.final_layer_norm"),))),
        **dict(_blocks(image, model.image, "vision_model")),
        **dict(_blocks(text, model.text, "text_model")),
    }


def config(model: ClipModel) -> dict[str, Any]:
    """The ``config.json`` of a CLIPModel.

    CLIPModel reads a text's feature at its first ``eos_token_id``; with another vocabulary than CLIP's it is told
    to look for the largest id, as CLIP does.
    """
    assert model.text is not None
    ends = {"bos_token_id": _START_ID, "eos_token_id": _END_ID, "pad_token_id": _END_ID}
    others = {"bos_token_id": None, "eos_token_id": _LARGEST, "pad_token_id": None}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model.embed_dim,
        "logit_scale_init_value": model.logit_scale.item(),
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": model.pictures.image_size,
            "patch_size": model.pictures.patch_size,
            "num_channels": 3,
            **_sizes(model.image),
            "projection_dim": model.embed_dim,
        },
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": model.vocab_size,
            "max_position_embeddings": model.context_length,
            **_sizes(model.text),
            "projection_dim": model.embed_dim,
            **(ends if model.vocabulary else others),
        },
    }


def preprocessing(model: ClipModel) -> dict[str, Any]:
    """The ``preprocessor_config.json``: shorter side to the model's size (bicubic), centre crop, mean and deviation."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": model.pictures.image_size},
        "resample": 3,  # PIL's number of bicubic
        "do_center_crop": True,
        "crop_size": {"height": model.pictures.image_size, "width": model.pictures.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(model.pictures.mean),
        "image_std": list(model.pictures.std),
    }


def _sizes(tower: TowerSizes | None) -> dict[str, Any]:
    assert tower is not None
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.hidden,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "hidden_act": ACTIVATIONS[tower.kind.get("activation", "gelu")],
        "layer_norm_eps": tower.kind.get("norm_eps", 1e-5),
    }


def _modules(state: dict[str, Tensor], pairs: tuple[tuple[str, str], ...]) -> Iterator[tuple[str, Tensor]]:
    for ours, theirs in pairs:
        for leaf in ("weight", "bias"):
            yield f"{theirs}.{leaf}", state[f"{ours}.{leaf}"]


def _blocks(state: dict[str, Tensor], tower: TowerSizes | None, theirs: str) -> Iterator[tuple[str, Tensor]]:
    assert tower is not None
    for number in range(tower.layers):
        ours, layer = f"blocks.{number}", f"{theirs}.encoder.layers.{number}"
        yield from _modules(state, tuple((f"{ours}.{a}", f"{layer}.{b}") for a, b in _BLOCK))
        for leaf in ("weight", "bias"):
            for letter, part in zip("qkv", state[f"{ours}.attn.qkv.{leaf}"].chunk(3), strict=True):
                yield f"{layer}.self_attn.{letter}_proj.{leaf}", part.contiguous()


def _write_tokenizer(model: ClipModel, folder: Path) -> None:
    """CLIP's byte pairs under transformers' names of the start and the end token, from open_clip's own table.

    CLIPProcessor reads ``tokenizer.json``, which cleans texts; CLIPTokenizer reads the tables, and cleans nothing.
    """
    vocabulary, pairs = _byte_pairs()
    write_json(folder / "vocab.json", vocabulary, indent=None)
    merges = "\n".join(" ".join(pair) for pair in pairs)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    (folder / "tokenizer.json").write_text(clip_tokenizer() + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model.context_length,
            "do_lower_case": True,
            **special,
        },
    )


def _byte_pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary, under transformers' names, and its merges in their order."""
    from open_clip.tokenizer import SimpleTokenizer

    pairs = SimpleTokenizer()
    words = list(pairs.encoder)[:_START_ID]
    return {word: number for number, word in enumerate([*words, START, END])}, list(pairs.bpe_ranks)


def clip_tokenizer() -> str:
    """transformers' own way of CLIP's tokenizer as JSON, with the cleaning of texts before it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    vocabulary, merges = _byte_pairs()
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token=END, end_of_word_suffix="</w>", fuse_unk=False))
    cleaning = [normalizers.Replace(Regex(found), meant) for found, meant in (*_ENTITIES, *_QUOTES, (r"\s+", " "))]
    made.normalizer = normalizers.Sequence([*cleaning, normalizers.NFC(), normalizers.Lowercase()])
    parts = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    split = pre_tokenizers.Split(Regex(parts), behavior="removed", invert=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.post_processor = processors.RobertaProcessing(
        (END, _END_ID), (START, _START_ID), trim_offsets=False, add_prefix_space=False
    )
    made.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " "), decoders.Strip(" ", 0, 1)])
    made.add_special_tokens([START, END])
    return str(made.to_str())
