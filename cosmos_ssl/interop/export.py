"""A model of ours as a folder that another library loads, with a card that says what it is and how to load it."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor

from cosmos_ssl import __version__
from cosmos_ssl.api import Role
from cosmos_ssl.errors import UserError, listed
from cosmos_ssl.files import storage_error, storage_faults
from cosmos_ssl.interop import huggingface, openclip, timm
from cosmos_ssl.interop.clip import ClipModel, describe, refuse
from cosmos_ssl.interop.official import CROSS_HEADS, SIZES, expected_names, to_official
from cosmos_ssl.models.contract import is_built_in
from cosmos_ssl.models.encoder import ModelEncoder
from cosmos_ssl.pictures import BACKGROUND

FORMATS = ("openclip", "huggingface", "timm", "official")
_TITLES = {
    "openclip": "OpenCLIP",
    "huggingface": "Hugging Face CLIPModel",
    "timm": "timm",
    "official": "the official COSMOS program",
}
_WRITERS: Mapping[str, Callable[[ClipModel, Path], list[str]]] = {
    "openclip": openclip.write,
    "huggingface": huggingface.write,
    "timm": timm.write,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a model comes from, for its card."""

    name: str
    """What it is called there, and its file here (``official``)."""
    checkpoint: str
    """Its published name, or a place here, of which readers elsewhere are told the last part alone."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What was measured of this very checkpoint."""
    licence: str = "other"
    """The hub's identifier of the terms that the weights are under, such as ``mit`` or ``cc-by-nc-4.0``."""


def export(models: Mapping[Role, ModelEncoder], form: str, folder: Path, origin: Origin) -> list[str]:
    """Write one role (``official``: any) as ``form``, one of ``FORMATS``, into a new or empty folder; returns notes for
    people.

    The folder appears whole or not at all. Raises UserError for what the form has no place for, or a folder that is in
    use.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output {folder} is not empty. Give another folder")
    with storage_faults(f"--output {folder} cannot be written"):
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))  # for its owner alone
    try:
        (temporary := place / "whole").mkdir()
        described = [describe(encoder, origin.name, role, text=form != "timm") for role, encoder in models.items()]
        notes = (
            _write_official(models, described, temporary)
            if form == "official"
            else _WRITERS[form](described[0], temporary)
        )
        (temporary / "README.md").write_text(card(described, form, origin, notes), encoding="utf-8")
        temporary.replace(folder)
    except (OSError, SafetensorError, RuntimeError) as error:
        if (failed := _system_error(error)) is None:
            raise
        raise storage_error(failed, f"--output {folder} cannot be written") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return notes


def _system_error(error: BaseException) -> OSError | None:
    """What the system refused, where that is what went wrong: safetensors says it in words, ``torch.save`` fails once
    more over it.
    """
    if isinstance(error, OSError):
        return error
    told = re.search(r"\(os error (\d+)\)", str(error))
    if told is not None:
        return OSError(int(told[1]), os.strerror(int(told[1])))
    return None if error.__context__ is None else _system_error(error.__context__)


# ---------------------------------------------------------------------------- official


def _write_official(models: Mapping[Role, ModelEncoder], described: Sequence[ClipModel], folder: Path) -> list[str]:
    """``NAME.pt`` as the official program's evaluation reads it: ``name``, a table of tensors for each role, and ours
    of sizes.
    """
    content: dict[str, Any] = {"name": described[0].name, SIZES: described[0].sizes()}
    for (role, encoder), model in zip(models.items(), described, strict=True):
        refuse("the official form", _official_faults(encoder, model))
        content[role] = _official_tensors(model)
    with (folder / _file(described[0])).open("wb") as file:
        torch.save(content, file)
    return []


def _file(model: ClipModel) -> str:
    return model.name.replace("/", "_") + ".pt"


def _official_faults(encoder: ModelEncoder, model: ClipModel) -> list[str]:
    """Options that change what a model computes, and that the official program does not have."""
    faults = [f"model.image.registers ({model.registers})"] if model.registers else []
    faults += [] if model.pre_norm else ["model.image.pre_norm=false"]
    faults += ["model.image.mask_token"] if "image.mask_token" in model.state else []
    for modality, tower in (("image", model.image), ("text", model.text)):
        faults += [f"model.{modality}.layer_scale"] if tower is not None and tower.layer_scale else []
    head = cast(Any, encoder.model.heads["cross"]) if "cross" in encoder.model.heads else None
    if head is not None and is_built_in(head, "heads", "cross_attention"):
        heads = head.image_asks_text.num_heads
        faults += [f"heads.cross.num_heads={heads} (it has {CROSS_HEADS})"] if heads != CROSS_HEADS else []
        faults += ["heads.cross.mask_padding=true"] if head.mask_padding else []
    return faults


def _official_tensors(model: ClipModel) -> dict[str, Tensor]:
    tensors = to_official(model.state)
    missing = [name for name in expected_names(model.state) if name not in tensors]
    if missing:
        raise UserError(f"the official form is that of a whole COSMOS model, and this one lacks {listed(missing)}")
    return tensors


# ---------------------------------------------------------------------------- the card


def card(models: Sequence[ClipModel], form: str, origin: Origin, notes: Sequence[str]) -> str:
    """The README.md of an exported model, with the header that the hub reads."""
    model = models[0]
    roles = " and ".join(found.role for found in models)
    paragraphs = [
        _header(form, origin.licence),
        f"# {origin.name}",
        f"{_kind(model, form)}, written for {_TITLES[form]} by [cosmos_ssl](https://arxiv.org/abs/2412.01814) "
        f"{__version__}"
        f" from the {roles} of `{_place(origin.checkpoint)}`.",
        "\n".join(_sizes(model, form)),
        "## Loading",
        "In this folder; from elsewhere, its path stands in place of the dot:",
        f"```python\n{_loading(model, form)}```",
        *_transparency(model),
        "\n".join(f"- {note}" for note in [*notes, *(huggingface.differences(model) if form == "huggingface" else ())]),
    ]
    metrics = _metrics(models, origin)
    if metrics:
        paragraphs += ["## Results", "At the end of its training run, on that run's own validation data:", metrics]
    paragraphs += ["## Licence", _licence(origin.licence)]
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def _place(checkpoint: str) -> str:
    """A checkpoint for readers elsewhere, whom the folders of this machine do not concern."""
    return checkpoint if openclip.is_published(checkpoint) else Path(checkpoint).name


def _header(form: str, licence: str) -> str:
    library = {"openclip": "open_clip", "huggingface": "transformers", "timm": "timm", "official": "pytorch"}[form]
    task = "image-feature-extraction" if form == "timm" else "zero-shot-image-classification"
    named = "\nlicense_name: not-stated" if licence == "other" else ""
    return (
        f"---\nlicense: {licence}{named}\nlibrary_name: {library}\npipeline_tag: {task}\ntags:\n- clip\n- "
        "cosmos-ssl\n---"
    )


def _licence(licence: str) -> str:
    weights = (
        "No licence was named for the weights when they were exported: they are under the terms of those who "
        "trained them and of the data"
        " that they were trained on."
        if licence == "other"
        else f"The weights are under `{licence}`, as those who exported them say; the terms of the data that "
        "they were trained on remain."
    )
    return f"{weights} The program that wrote this export is under Apache-2.0."


def _kind(model: ClipModel, form: str) -> str:
    if form == "timm":
        return "The image tower of a vision-language model, its projection into the shared space as the head"
    cosmos = any(name.startswith("losses.distill.") for name in model.state)
    return "An image and a text tower, trained by contrast" + (
        " and by cross-modality self-distillation (COSMOS)" if cosmos else ""
    )


def _sizes(model: ClipModel, form: str) -> list[str]:
    image = model.image
    rows = ["| tower | width | layers | heads | input |", "|---|---|---|---|---|"]
    rows.append(
        f"| image | {image.width} | {image.layers} | {image.heads} | {model.image_size} px, patches of "
        f"{model.patch_size} px |"
    )
    if model.text is not None:
        text = model.text
        rows.append(
            f"| text | {text.width} | {text.layers} | {text.heads} | {model.context_length} of "
            f"{model.vocab_size:,} tokens |"
        )
    package = {"openclip": "open_clip_torch", "huggingface": "transformers", "timm": "timm", "official": "torch"}[form]
    return [*rows, "", f"Features have {model.embed_dim} numbers. The form is that of {package} {version(package)}."]


def _loading(model: ClipModel, form: str) -> str:
    """Lines that load the folder that they are run in."""
    if form == "openclip":
        return (
            "import open_clip\n\n"
            'model, preprocess = open_clip.create_model_from_pretrained("local-dir:.")\n'
            'tokenizer = open_clip.get_tokenizer("local-dir:.")\n'
        )
    if form == "huggingface":
        return huggingface.loading(model)
    if form == "timm":
        return (
            "import timm\n\n"
            'model = timm.create_model("local-dir:.", pretrained=True).eval()  # num_classes=0: before the projection\n'
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
        )
    background = f', overrides=["model.background={model.background}"]' if model.background != BACKGROUND else ""
    return f'import cosmos_ssl\n\nmodel = cosmos_ssl.load("{_file(model)}", which="{model.role}"{background})\n'


def _transparency(model: ClipModel) -> Sequence[str]:
    """That other libraries make transparent pictures black, and lines that open one as this model wants it."""
    return (
        f"Put transparent pictures on {model.background}, as in training, before you preprocess them; libraries "
        "make them black:",
        "```python\nfrom PIL import Image\n\n"
        'clear = Image.open("picture.png").convert("RGBA")\n'
        f'picture = Image.alpha_composite(Image.new("RGBA", clear.size, "{model.background}"), '
        'clear).convert("RGB")\n```',
    )


def _metrics(models: Sequence[ClipModel], origin: Origin) -> str:
    """What evaluators measured of the exported roles, as a table."""
    roles = {model.role for model in models}
    kept = {name: value for name, value in origin.metrics.items() if roles & set(name.split("/")[1:2])}
    if not kept:
        return ""
    return "\n".join(
        ["| metric | value |", "|---|---|", *(f"| {name} | {value:.4g} |" for name, value in kept.items())]
    )
