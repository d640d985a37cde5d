"""OpenCLIP models, read and written: a folder with ``open_clip_config.json``, a file of weights, a published name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from cosmos_ssl.errors import CheckpointError, listed
from cosmos_ssl.interop import openclip_huggingface, openclip_timm
from cosmos_ssl.interop.clip import ClipModel, TowerSizes, refuse
from cosmos_ssl.interop.files import (
    check_weights,
    read_json,
    read_tensor_file,
    weights_of,
    write_json,
    write_safetensors,
)
from cosmos_ssl.interop.hub import HUB, reason
from cosmos_ssl.interop.official import (
    NAMES,
    SIZES,
    ForeignCheckpoint,
    clip_config,
    mlp_ratio,
    take,
    translate,
)
from cosmos_ssl.interop.openclip_settings import (
    CONFIG,
    KNOWN,
    check,
    image_options,
    settings,
    side,
    text_options,
    tokenizer_options,
)
from cosmos_ssl.interop.openclip_timm import identity

WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
"""Files of weights in a folder, in OpenCLIP's order of preference."""
LOCAL = "local-dir:"

_SCALE = ("losses.clip.logit_scale", "logit_scale")
_SIGLIP = (("losses.siglip.logit_scale", "logit_scale"), ("losses.siglip.logit_bias", "logit_bias"))
_TOWERS = tuple(pair for pair in NAMES if pair[0].startswith(("image.", "text.")))
_PRE_NORM = tuple(pair for pair in _TOWERS if pair[0].startswith("image.norm_pre."))
_LAYER_SCALES = {
    modality: tuple(
        (f"{modality}.blocks.#.ls{n}.gamma", f"{prefix}transformer.resblocks.#.ls_{n}.gamma") for n in (1, 2)
    )
    for modality, prefix in (("image", "visual."), ("text", ""))
}
_BUFFERS = ("attn_mask", "input_resolution", "context_length", "vocab_size")
"""What older files hold beside parameters."""

# ---------------------------------------------------------------------------- writing


def write(model: ClipModel, folder: Path) -> list[str]:
    """Write a folder for ``local-dir:`` and the hub; returns what stays behind.

    Raises UserError for what OpenCLIP has no place for.
    """
    registers = [f"model.image.registers ({model.registers})"] if model.registers else []
    refuse("openclip", [*registers, *model.kinds(*KNOWN), *_unlike(model)])
    write_safetensors(folder / WEIGHTS[0], tensors(model), (SIZES, json.dumps(model.sizes())))
    write_json(folder / CONFIG, config(model))
    return [*model.left_out("image", "text"), *model.about_logits()]


def loading(model: ClipModel) -> str:
    """Lines that load the folder that they are run in."""
    return (
        "import open_clip\n\n"
        'model, preprocess = open_clip.create_model_from_pretrained("local-dir:.")\n'
        'tokenizer = open_clip.get_tokenizer("local-dir:.")\n'
    )


def config(model: ClipModel) -> dict[str, Any]:
    """The ``open_clip_config.json``: sizes, and how pictures are prepared."""
    assert model.text is not None
    activations = {tower.kind.get("activation", "gelu") for tower in (model.image, model.text)}
    return {
        "model_cfg": {
            "embed_dim": model.embed_dim,
            "vision_cfg": {
                "image_size": model.pictures.image_size,
                "patch_size": model.pictures.patch_size,
                "head_width": model.image.width // model.image.heads,
                **_sizes(model.image),
                **({} if model.pre_norm else {"no_ln_pre": True}),
                **settings(model.image.kind),
            },
            "text_cfg": {
                "context_length": model.context_length,
                "vocab_size": model.vocab_size,
                "heads": model.text.heads,
                **_sizes(model.text),
                **settings(model.text.kind),
            },
            **({"quick_gelu": True} if "quick_gelu" in activations else {}),
            **({} if model.logit_bias is None else {"init_logit_bias": model.logit_bias.item()}),
        },
        "preprocess_cfg": {
            "size": model.pictures.image_size,
            "mode": "RGB",
            "mean": list(model.pictures.mean),
            "std": list(model.pictures.std),
            "interpolation": model.pictures.interpolation,
            "resize_mode": "squash" if model.pictures.resize == "squash" else "shortest",
        },
    }


def tensors(model: ClipModel) -> dict[str, Tensor]:
    """The state of an OpenCLIP model."""
    table = dict((*_TOWERS, *_LAYER_SCALES["image"], *_LAYER_SCALES["text"]))
    pairs = {name: translate(name, table) for name in model.state}
    found = {theirs: model.state[ours] for ours, theirs in pairs.items() if theirs is not None}
    if (projection_bias := model.state.get("text.projection_bias")) is not None:
        found["text_projection.weight"] = found.pop("text_projection").t().contiguous()
        found["text_projection.bias"] = projection_bias
    bias = {} if model.logit_bias is None else {"logit_bias": model.logit_bias}
    return {**found, "logit_scale": model.logit_scale, **bias}


def _unlike(model: ClipModel) -> list[str]:
    """Activations of the towers that OpenCLIP has in none or in both."""
    assert model.text is not None
    found = [tower.kind.get("activation", "gelu") for tower in (model.image, model.text)]
    return [f"the activations {' and '.join(found)}"] if "quick_gelu" in found and found[0] != found[1] else []


def _sizes(tower: TowerSizes) -> dict[str, Any]:
    scale = {"ls_init_value": 1.0} if tower.layer_scale else {}
    return {"width": tower.width, "layers": tower.layers, "mlp_ratio": mlp_ratio(tower.hidden, tower.width), **scale}


# ---------------------------------------------------------------------------- finding


def is_folder(path: Path) -> bool:
    """Return whether a folder holds an OpenCLIP model."""
    return (path / CONFIG).is_file()


def is_published(name: str) -> bool:
    """Return whether this is ``hf-hub:ORG/REPOSITORY``, or ``MODEL/TAG`` of a model that OpenCLIP knows.

    Imports nothing.
    """
    model, _, tag = name.partition("/")
    return name.startswith(HUB) or (bool(tag) and "/" not in tag and _known_model(model) is not None)


def _known_model(name: str) -> Path | None:
    package = find_spec("open_clip")  # found, not imported: that takes seconds
    path = (
        Path(package.origin).parent / "model_configs" / f"{name}.json"
        if package is not None and package.origin
        else None
    )
    return path if path is not None and name and path.is_file() else None


def read_folder(folder: Path, *, partial: bool = False) -> ForeignCheckpoint:
    """The model in a folder with ``open_clip_config.json``. Raises CheckpointError as ``read_tensors`` does."""
    told = read_json(folder / CONFIG)
    return read_tensors(read_tensor_file(weights_of(folder, CONFIG, WEIGHTS))[0], folder, told, partial=partial)


def fetch(name: str, *, partial: bool = False) -> ForeignCheckpoint:
    """The published model ``MODEL/TAG``, from the hub or where it was kept when last fetched.

    Raises CheckpointError, also without network.
    """
    from open_clip.pretrained import download_pretrained

    known, told = published(name, partial=partial)  # before much is fetched
    try:
        weights = Path(download_pretrained(known))
    except Exception as error:  # the hub's client, sockets and files raise many kinds
        raise CheckpointError(
            f"{name} cannot be fetched: {reason(error)}. Reach the hub once, or give a folder with the model"
        ) from error
    return read_tensors(read_tensor_file(weights)[0], name, told, partial=partial)


def published(name: str, *, partial: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what OpenCLIP knows of the weights ``MODEL/TAG``, and their ``open_clip_config.json``.

    Raises CheckpointError, fetches nothing.
    """
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    model, _, tag = name.partition("/")
    known = get_pretrained_cfg(model, tag)
    if not known:
        raise CheckpointError(
            f"{name}: OpenCLIP has no weights '{tag}' of {model}. It has "
            f"{listed(list_pretrained_tags_by_model(model), limit=20)}"
        )
    told = {"model_cfg": read_json(_known_model(model) or Path(model)), "preprocess_cfg": dict(known)}
    told["model_cfg"]["quick_gelu"] = bool(told["model_cfg"].get("quick_gelu") or known.get("quick_gelu"))
    check(told, name, partial)
    return dict(known), told


# ---------------------------------------------------------------------------- reading


def plain_tensors(content: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The tensors of a file of OpenCLIP's, bare or in a training state; None where it is another program's."""
    table = content.get("state_dict", content)
    if not isinstance(table, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in table.items()
    ):
        return None
    found = {name.removeprefix("module.").removeprefix("text."): value for name, value in table.items()}
    return found if any(name.startswith("visual.") for name in found) else None


def read_tensors(
    content: Mapping[str, Any],
    source: str | Path,
    told: Mapping[str, Any] | None = None,
    *,
    sizes: object = None,
    partial: bool = False,
) -> ForeignCheckpoint:
    """An OpenCLIP model from its tensors and, where there is one, its ``open_clip_config.json`` (``told``).

    Without that, ``sizes`` tell what no tensor does (see ``clip_config``), and the activation is taken to be GELU.
    Raises CheckpointError for tensors that our towers have no place for, or lack, and for settings that they do not
    have (``openclip_settings.check``); with ``partial`` these are told and logged instead.
    """
    tensors = plain_tensors(content)
    if tensors is None:
        raise CheckpointError(f"{source} holds no OpenCLIP model: none of its tensors is called visual.*")
    told = told or {}
    check(told, source, partial)
    tensors, names = _text_projection(tensors, told, source)
    image: dict[str, Tensor] = {}
    trunk = told.get("model_cfg", {}).get("vision_cfg", {})
    if trunk.get("timm_model_name"):
        image, tensors = openclip_timm.take(tensors, told["model_cfg"], source)
    text: dict[str, Tensor] = {}
    if told.get("model_cfg", {}).get("text_cfg", {}).get("hf_model_name"):
        text, tensors = openclip_huggingface.take(tensors, source)
    pre_norm = any(theirs in tensors for _, theirs in _PRE_NORM)
    scales = _SIGLIP if "logit_bias" in tensors else (_SCALE,)
    foreign = tuple(f"{name}." for name, taken in (("image", image), ("text", text)) if taken)
    towers = [pair for pair in _TOWERS if not pair[0].startswith(foreign)]
    names += [*(pair for pair in towers if pre_norm or pair not in _PRE_NORM), *scales]
    scaled = [modality for modality, pairs in _LAYER_SCALES.items() if pairs[0][1].replace("#", "0") in tensors]
    names += [pair for modality in scaled for pair in _LAYER_SCALES[modality]]
    what = f"{source} is no model of CLIP's towers"
    state, missing, unexpected = take(tensors, names, what, "has no place", idle=_BUFFERS, partial=partial)
    state |= image | text
    check_weights(state, source)
    state |= {ours: state[ours].flatten()[0] for ours, _ in scales if ours in state and state[ours].numel() == 1}
    config = _config(state, source, told, sizes)
    if image:
        config["model"]["image"] = openclip_timm.tower(image, told)
    else:
        config["model"]["image"] |= {} if pre_norm else {"pre_norm": False}
    for modality in scaled:
        config["model"][modality]["layer_scale"] = 1.0
    if "text.projection_bias" in state:
        config["model"]["text"]["projection_bias"] = True
    loss = scales[0][0].split(".")[1]
    config = {"name": Path(source).stem, **config, "losses": {loss: {"type": loss}}}
    return ForeignCheckpoint(state=state, config=config, missing=missing, unexpected=unexpected)


def _text_projection(
    tensors: Mapping[str, Tensor], told: Mapping[str, Any], source: object
) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    """The tensors with a text projection [W, D]: the transpose of a linear map's, the identity where there is none;
    and the name of its bias, if any.
    """
    found = dict(tensors)
    weight = found.pop("text_projection.weight", None)
    if weight is not None:
        check_weights({"text_projection.weight": weight}, source)
        found["text_projection"] = weight.movedim(0, -1) if weight.dim() else weight
    elif told.get("model_cfg", {}).get("text_cfg", {}).get("proj_type") == "none":
        found["text_projection"] = identity(found.get("ln_final.weight"), found, source)
    return found, [("text.projection_bias", "text_projection.bias")] if "text_projection.bias" in found else []


def _config(state: Mapping[str, Tensor], source: str | Path, told: Mapping[str, Any], sizes: object) -> dict[str, Any]:
    """The sizes that the tensors tell, with what only the model's own config tells."""
    config = clip_config(state, source, sizes)
    model = told.get("model_cfg", {})
    vision, words = model.get("vision_cfg", {}), model.get("text_cfg", {})
    image, text = config["model"].get("image"), config["model"].setdefault("text", {})
    size = side(vision.get("image_size", 224))
    if words.get("hf_model_name"):
        config["model"]["text"], config["tokenizer"]["context_length"] = openclip_huggingface.tower(state, words)
    elif model:
        text["heads"] = words.get("heads", 8)
    if image is not None and model:
        image["heads"] = image["width"] // vision.get("head_width", 64)
        if size is not None and size // image["patch_size"] == image["image_size"] // image["patch_size"]:
            image["image_size"] = size
    if image is not None:
        image |= image_options(told)
        size = image["image_size"]
    text |= text_options(told)
    config["tokenizer"] |= tokenizer_options(told, source)
    config["augmenters"] = {
        "image": {"type": "multi_crop", "global_crops_size": size},
        "text": {"type": "text_crop"},
    }
    return config
