"""A trained model, ready to encode, by the name of its checkpoint: ``cosmos_ssl.load``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from cosmos_ssl.build.builder import READING, Builder
from cosmos_ssl.build.weights import Source, find_source, read_weights
from cosmos_ssl.config import load_config
from cosmos_ssl.engine.checkpoint import check_fit
from cosmos_ssl.errors import UserError
from cosmos_ssl.interop.matching import compare
from cosmos_ssl.models.encoder import ModelEncoder

log = logging.getLogger(__name__)

_NOT_READ = ("evaluators=null", "callbacks=null", "logging=null")
"""Sections of a run's config that its model can do without, whose packages need not be here."""


def load(
    checkpoint: str | Path | Source,
    which: str = "student",
    *,
    device: torch.device | str = "cpu",
    overrides: Sequence[str] = (),
    trust_code: bool = False,
) -> ModelEncoder:
    """A trained model, ready to encode: ``encode_image``, ``encode_text``, ``preprocess``, ``tokenize``.

    ``checkpoint`` is a run folder (its newest checkpoint), one of its checkpoints, an official COSMOS file, or an
    OpenCLIP model (a folder, a file, ``hf-hub:ORG/NAME``, ``MODEL/TAG``); ``which`` the role to take, or the callback
    whose average it is. ``overrides`` reach what a file does not say, such as ``model.text.heads=4``. Parts of a run
    are those of installed packages, and losses, which encoding does without, are left out where theirs is not there;
    ``trust_code`` also imports what its config names as ``python:MODULE.CLASS``, which runs that code. What was read is
    logged in a line, at the level of information. Raises CheckpointError for anything else, for what is damaged, and
    where weights do not fit or are not finite, ConfigError for a part that cannot be used.
    """
    weights = read_weights(find_source(checkpoint), which)
    loaded = load_config(weights.config, [*_NOT_READ, *overrides], reading=True)
    weights = weights.without(loaded.absent)
    assumed = weights.assumed(loaded)
    builder = Builder(loaded, READING, trust_code=trust_code)
    model, spec, tokenizer = builder.for_reading(check=lambda model: check_fit(model, weights.state, weights.source))
    weights.check_finite(model, weights.state)
    model.load_state_dict(weights.state)
    model.requires_grad_(False).eval()
    report = compare(model, weights.state, weights.left_out)
    absent = [f"without {path}, {had}, which is not installed" for path, had in loaded.absent.items()]
    log.info("%s", "; ".join(filter(None, (f"the {which} of {weights.source}: {report}", *absent, assumed))))
    return ModelEncoder(model, spec, tokenizer, device=device)


def open_model(
    model: str | Path | Source | ModelEncoder,
    which: str = "student",
    *,
    device: str = "auto",
    overrides: Sequence[str] = (),
    trust_code: bool = False,
) -> tuple[ModelEncoder, str]:
    """A model, and the name of what was read: of a run folder its newest checkpoint.

    A loaded model stays as it is. Raises UserError.
    """
    if isinstance(model, ModelEncoder):
        return model, "model"
    place = choose_device(device)
    source = find_source(model)
    return load(source, which, device=place, overrides=overrides, trust_code=trust_code), str(source)


def choose_device(name: str) -> str:
    """The device of this name, of ``auto`` the GPU, or the CPU where there is none.

    Raises UserError for one that is not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # an unknown name; no driver; a number that is not there
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return name
