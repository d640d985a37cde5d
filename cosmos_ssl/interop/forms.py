"""The forms of ``cosmos-ssl export --format``, by name. Imports nothing, so that ``--help`` needs no torch."""

from __future__ import annotations

from typing import NamedTuple


class Form(NamedTuple):
    """What a card says of a form."""

    title: str
    package: str
    """Its distribution, whose version is told."""
    library: str
    """The hub's identifier."""
    task: str = "zero-shot-image-classification"


FORMS = {
    "openclip": Form("OpenCLIP", "open_clip_torch", "open_clip"),
    "huggingface": Form("Hugging Face CLIPModel", "transformers", "transformers"),
    "timm": Form("timm", "timm", "timm", "image-feature-extraction"),
    "official": Form("the official COSMOS program", "torch", "pytorch"),
    "onnx": Form("ONNX", "torch", "onnx"),
    "torch": Form("torch.export", "torch", "pytorch"),
}
PROGRAMS = ("onnx", "torch")
"""Forms that hold what the towers compute, whatever their kind, and not weights by name: nothing is trained from them.
"""
