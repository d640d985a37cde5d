"""The card of an exported model: what it is, how to load it, what was measured of it, the terms that it is under."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from cosmos_ssl import __version__
from cosmos_ssl.interop import huggingface, openclip, timm
from cosmos_ssl.interop.clip import ClipModel
from cosmos_ssl.interop.forms import FORMS
from cosmos_ssl.pictures import BACKGROUND


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


def card(models: Sequence[ClipModel], form: str, origin: Origin, notes: Sequence[str]) -> str:
    """The README.md of an exported model, with the header that the hub reads."""
    model = models[0]
    roles = " and ".join(found.role for found in models)
    paragraphs = [
        _header(form, origin.licence),
        f"# {origin.name}",
        f"{_kind(model, form)}, written for {FORMS[form].title} by [cosmos_ssl](https://arxiv.org/abs/2412.01814) "
        f"{__version__} from the {roles} of `{_place(origin.checkpoint)}`.",
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
    named = "\nlicense_name: not-stated" if licence == "other" else ""
    return (
        f"---\nlicense: {licence}{named}\nlibrary_name: {FORMS[form].library}\npipeline_tag: {FORMS[form].task}\n"
        "tags:\n- clip\n- cosmos-ssl\n---"
    )


def _licence(licence: str) -> str:
    told = (
        f"The weights are under `{licence}`, as those who exported them say; the terms of the data that they were "
        "trained on remain."
    )
    if licence == "other":
        told = (
            "No licence was named for the weights when they were exported: they are under the terms of those who "
            "trained them and of the data that they were trained on."
        )
    return f"{told} The program that wrote this export is under Apache-2.0."


def _kind(model: ClipModel, form: str) -> str:
    if form == "timm":
        return "The image tower of a vision-language model, its projection into the shared space as the head"
    cosmos = any(name.startswith("losses.distill.") for name in model.state)
    return "An image and a text tower, trained by contrast" + (
        " and by cross-modality self-distillation (COSMOS)" if cosmos else ""
    )


def _sizes(model: ClipModel, form: str) -> list[str]:
    towers = {"image": model.image, "text": model.text}
    inputs = {
        "image": f"{model.pictures.image_size} px, patches of {model.pictures.patch_size} px",
        "text": f"{model.context_length} of {model.vocab_size:,} tokens",
    }
    rows = ["| tower | width | layers | heads | input |", "|---|---|---|---|---|"]
    rows += [
        f"| {name} | {tower.width} | {tower.layers} | {tower.heads} | {inputs[name]} |"
        for name, tower in towers.items()
        if tower is not None
    ]
    package = FORMS[form].package
    return [*rows, "", f"Features have {model.embed_dim} numbers. The form is that of {package} {version(package)}."]


def _loading(model: ClipModel, form: str) -> str:
    """Lines that load the folder that they are run in."""
    if form != "official":
        return {"openclip": openclip.loading, "huggingface": huggingface.loading, "timm": timm.loading}[form](model)
    background = f', overrides=["model.background={model.background}"]' if model.background != BACKGROUND else ""
    return f'import cosmos_ssl\n\nmodel = cosmos_ssl.load("{official_file(model)}", which="{model.role}"{background})\n'


def official_file(model: ClipModel) -> str:
    """The name of the file of the official form."""
    return model.name.replace("/", "_") + ".pt"


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
    """Return what evaluators measured of the exported roles, as a table."""
    roles = {model.role for model in models}
    kept = {name: value for name, value in origin.metrics.items() if roles & set(name.split("/")[1:2])}
    if not kept:
        return ""
    return "\n".join(
        ["| metric | value |", "|---|---|", *(f"| {name} | {value:.4g} |" for name, value in kept.items())]
    )
