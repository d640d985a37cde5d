"""The lines of a card that use a folder of programs, without this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cosmos_ssl.api import Modality, TowerSpec
from cosmos_ssl.interop.programs.inputs import TEXTS

_IMPORTS = {"onnx": ("numpy", "onnxruntime"), "torch": ("numpy", "torch")}


class Inputs(NamedTuple):
    """What the lines must know of a model."""

    modalities: Sequence[Modality]
    pictures: TowerSpec | None
    context_length: int
    tokenizer: bool
    """Whether there is a file that says how texts become tokens."""


def example(form: str, given: Inputs) -> str:
    """Lines that encode ``picture.png`` and two texts in the folder that they are run in."""
    imports = [f"import {name}" for name in _IMPORTS[form]]
    imports += ["from PIL import Image"] * ("image" in given.modalities)
    imports += ["from tokenizers import Tokenizer"] * ("text" in given.modalities and given.tokenizer)
    lines: list[str] = []
    if given.pictures is not None:
        lines += [*_pixels(given.pictures), _run(form, "image", "pixels")]
    if "text" in given.modalities:
        lines += [_tokens(given), _run(form, "text", "tokens")]
    if len(given.modalities) == 2:
        lines.append("print(image @ text.T)  # cosines")
    return "\n".join([*imports, "", *lines]) + "\n"


def _pixels(spec: TowerSpec) -> list[str]:
    """``ModelEncoder.preprocess`` for a picture without transparency."""
    size, by = spec.image_size, f"Image.Resampling.{spec.interpolation.upper()}"
    opened = 'picture = Image.open("picture.png").convert("RGB")'
    if spec.resize == "squash":
        lines = [opened, f"picture = picture.resize(({size}, {size}), {by})"]
    else:
        lines = [
            opened,
            f"w, h = (max({size}, int({size} * side / min(picture.size))) for side in picture.size)",
            f"left, top = round((w - {size}) / 2), round((h - {size}) / 2)",
            f"picture = picture.resize((w, h), {by}).crop((left, top, left + {size}, top + {size}))",
        ]
    mean, std = (f"numpy.float32({[float(x) for x in values]})" for values in (spec.mean, spec.std))
    lines.append(f"mean, std = {mean}, {std}")
    return [*lines, "pixels = ((numpy.float32(picture) / 255 - mean) / std).transpose(2, 0, 1)[None]"]


def _tokens(given: Inputs) -> str:
    if not given.tokenizer:
        return f"tokens = numpy.zeros((2, {given.context_length}), numpy.int64)  # of this model's own tokenizer"
    return (
        f'texts = Tokenizer.from_file("{TEXTS}").encode_batch(["a red circle", "a blue star"])\n'
        "tokens = numpy.array([text.ids for text in texts])"
    )


def _run(form: str, modality: str, name: str) -> str:
    if form == "onnx":
        return f'{modality} = onnxruntime.InferenceSession("{modality}.onnx").run(None, {{"{name}": {name}}})[0]'
    return f'{modality} = torch.export.load("{modality}.pt2").module()(torch.from_numpy({name}))'
