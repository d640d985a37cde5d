"""The card of an exported model: what it is, how to load it, what was measured of it, the terms that it is under."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cosmos_ssl import __version__
from cosmos_ssl.config.source import dump_yaml
from cosmos_ssl.interop import huggingface, openclip, timm
from cosmos_ssl.interop.clip import ClipModel
from cosmos_ssl.interop.forms import FORMS, PROGRAMS
from cosmos_ssl.interop.hub import HUB
from cosmos_ssl.interop.programs.example import Inputs, example
from cosmos_ssl.interop.programs.writing import SUFFIX, Written
from cosmos_ssl.interop.recipe import without_places
from cosmos_ssl.models.encoder import ModelEncoder
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
    recipe: Mapping[str, Any] | None = None
    """The resolved config of its run."""
    history: Sequence[Mapping[str, Any]] = ()
    """The rows of its run's ``metrics.jsonl``, up to this checkpoint."""
    repository: str | None = None
    """Its place on the hub, ``ORG/NAME``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What a card says of an exported model, whatever its towers and its form."""

    form: str
    roles: Sequence[str]
    kind: str
    """What it is, in a few words, without a full stop."""
    sizes: Sequence[str]
    """Rows of a table, and what else is to be known of its sizes."""
    loading: str
    """Lines that load and use the folder that they are run in."""
    background: str | None
    """What transparent pictures were put on; None without pictures."""
    remarks: Sequence[str] = ()
    """What the form does otherwise, beside what the export says."""


def card(subject: Subject, origin: Origin, notes: Sequence[str], *, curves: str | None = None) -> str:
    """The README.md of an exported model, with the header that the hub reads; ``curves`` names a picture beside it."""
    form = subject.form
    place = "In this folder; from elsewhere, its path stands in place of the dot:"
    if form in PROGRAMS:
        place = "In this folder, with a picture of yours in it; batches have any size, and features are unit vectors:"
    paragraphs = [
        _header(form, origin.licence),
        f"# {origin.name}",
        f"{subject.kind}, written for {FORMS[form].title} by [cosmos_ssl](https://arxiv.org/abs/2412.01814) "
        f"{__version__} from the {' and '.join(subject.roles)} of `{_place(origin.checkpoint)}`.",
        "\n".join(subject.sizes),
        "## Loading",
        place,
        f"```python\n{subject.loading}```",
        _from_the_hub(form, origin.repository),
        *([] if subject.background is None else _transparency(subject.background)),
        "\n".join(f"- {note}" for note in [*notes, *subject.remarks]),
    ]
    metrics = _metrics(subject.roles, origin)
    if metrics:
        paragraphs += ["## Results", "At the end of its training run, on that run's own validation data:", metrics]
    if curves is not None:
        paragraphs += ["## Training", f"![What the run logged, by its step]({curves})"]
    if origin.recipe is not None:
        told = dump_yaml(without_places(origin.recipe))
        paragraphs += ["## Recipe", f"<details><summary>The run's config</summary>\n\n```yaml\n{told}```\n\n</details>"]
    paragraphs += ["## Licence", _licence(origin.licence)]
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def of_clip(models: Sequence[ClipModel], form: str) -> Subject:
    """A model with CLIP's towers, in a form that holds its weights."""
    model = models[0]
    return Subject(
        form=form,
        roles=[found.role for found in models],
        kind=_kind(model, form),
        sizes=_sizes(model, form),
        loading=_loading(model, form),
        background=model.background,
        remarks=huggingface.differences(model) if form == "huggingface" else (),
    )


def of_programs(encoder: ModelEncoder, role: str, form: str, written: Written) -> Subject:
    """A model whose towers were written as programs."""
    tower = encoder.model.image
    given = Inputs(
        modalities=written.modalities,
        pictures=None if tower is None else tower.spec,
        context_length=encoder.spec.context_length,
        tokenizer=written.tokenizer,
    )
    return Subject(
        form=form,
        roles=[role],
        kind=f"The {' and the '.join(written.modalities)} tower of a vision-language model, as "
        f"program{'s' if len(written.modalities) > 1 else ''}",
        sizes=_program_sizes(encoder, form),
        loading=example(form, given),
        background=None if tower is None else encoder.spec.background,
    )


def _program_sizes(encoder: ModelEncoder, form: str) -> list[str]:
    """Kinds, widths, inputs and outputs of both towers."""
    inputs = {
        "image": lambda spec: f"`pixels`, float32 [batch, 3, {spec.image_size}, {spec.image_size}]",
        "text": lambda spec: f"`tokens`, int64 [batch, {encoder.spec.context_length}]",
    }
    rows = ["| file | tower | width | input |", "|---|---|---|---|"]
    rows += [
        f"| `{name}{SUFFIX[form]}` | {type(tower).__name__} | {tower.spec.width} | {inputs[name](tower.spec)} |"
        for name, tower in encoder.model.towers.items()
    ]
    package, scale = FORMS[form].package, encoder.logit_scale
    told = "" if scale is None else f" Cosines were multiplied by {scale:.4g} in training."
    return [
        *rows,
        "",
        f"The output, `features`, has {encoder.spec.embed_dim} numbers.{told} Written by {package} {version(package)}.",
    ]


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


def _from_the_hub(form: str, repository: str | None) -> str:
    """How one gets the folder, or the model at once, from its place on the hub."""
    if repository is None:
        return ""
    call = "huggingface_hub.snapshot_download" if form in PROGRAMS else "cosmos_ssl.load"
    what = "gives the path of this folder" if form in PROGRAMS else "loads the model"
    return f'`{call}("{"" if form in PROGRAMS else HUB}{repository}")` {what}.'


def _transparency(background: str) -> Sequence[str]:
    """That other libraries make transparent pictures black, and lines that open one as this model wants it."""
    return (
        f"Put transparent pictures on {background}, as in training, before you preprocess them; libraries "
        "make them black:",
        "```python\nfrom PIL import Image\n\n"
        'clear = Image.open("picture.png").convert("RGBA")\n'
        f'picture = Image.alpha_composite(Image.new("RGBA", clear.size, "{background}"), '
        'clear).convert("RGB")\n```',
    )


def _metrics(roles: Sequence[str], origin: Origin) -> str:
    """Return what evaluators measured of the exported roles, as a table."""
    kept = {name: value for name, value in origin.metrics.items() if set(roles) & set(name.split("/")[1:2])}
    if not kept:
        return ""
    return "\n".join(
        ["| metric | value |", "|---|---|", *(f"| {name} | {value:.4g} |" for name, value in kept.items())]
    )
