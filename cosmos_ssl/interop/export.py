"""A model of ours as a folder that another library loads."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError

from cosmos_ssl.errors import UserError
from cosmos_ssl.files import storage_error, storage_faults
from cosmos_ssl.interop import huggingface, openclip, timm
from cosmos_ssl.interop.clip import ClipModel, describe, refuse
from cosmos_ssl.interop.curves import draw
from cosmos_ssl.interop.forms import PROGRAMS
from cosmos_ssl.interop.model_card import Origin, Subject, card, of_clip, of_programs, official_file
from cosmos_ssl.interop.official import CROSS_HEADS, SIZES, expected_names, to_official
from cosmos_ssl.interop.programs import writing as programs
from cosmos_ssl.models.contract import is_built_in, is_matching
from cosmos_ssl.models.encoder import ModelEncoder

CURVES = "curves.png"
"""The picture of what a run logged, beside the card."""

_WRITERS: Mapping[str, Callable[[ClipModel, Path], list[str]]] = {
    "openclip": openclip.write,
    "huggingface": huggingface.write,
    "timm": timm.write,
}


def export(models: Mapping[str, ModelEncoder], form: str, folder: Path, origin: Origin) -> list[str]:
    """Write one role (``official``: any) as ``form``, one of ``FORMS``, into a new or empty folder with a card; returns
    notes for people.

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
        subject, notes = (_programs if form in PROGRAMS else _weights)(models, form, temporary, origin)
        curves = draw(origin.history, list(models), temporary / CURVES)
        text = card(subject, origin, notes, curves=CURVES if curves else None)
        (temporary / "README.md").write_text(text, encoding="utf-8")
        temporary.replace(folder)
    except (OSError, SafetensorError, RuntimeError) as error:
        if (failed := _system_error(error)) is None:
            raise
        raise storage_error(failed, f"--output {folder} cannot be written") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return notes


def _programs(models: Mapping[str, ModelEncoder], form: str, folder: Path, origin: Origin) -> tuple[Subject, list[str]]:
    """The towers as programs, and what the card says of them."""
    ((role, encoder),) = models.items()
    written = programs.write(encoder, form, folder)
    matching = next((key for key in encoder.model.heads if is_matching(encoder.model.head(key))), None)
    told = [f"pictures and texts match by the product of their features, not by heads.{matching}"] if matching else []
    return of_programs(encoder, role, form, written), [*written.notes, *told]


def _weights(models: Mapping[str, ModelEncoder], form: str, folder: Path, origin: Origin) -> tuple[Subject, list[str]]:
    """The weights as another library names them, and what the card says of them."""
    described = [describe(encoder, origin.name, role, text=form != "timm") for role, encoder in models.items()]
    notes = _write_official(models, described, folder) if form == "official" else _WRITERS[form](described[0], folder)
    return of_clip(described, form), notes


def _system_error(error: BaseException) -> OSError | None:
    """Return what the system refused, if that went wrong: safetensors says it in words, ``torch.save`` fails once
    more.
    """
    if isinstance(error, OSError):
        return error
    told = re.search(r"\(os error (\d+)\)", str(error))
    if told is not None:
        return OSError(int(told[1]), os.strerror(int(told[1])))
    return None if error.__context__ is None else _system_error(error.__context__)


def _write_official(models: Mapping[str, ModelEncoder], described: Sequence[ClipModel], folder: Path) -> list[str]:
    """``NAME.pt`` as the official program reads it: ``name``, a table of tensors for each role, and ours of sizes."""
    content: dict[str, Any] = {"name": described[0].name, SIZES: described[0].sizes()}
    for (role, encoder), model in zip(models.items(), described, strict=True):
        refuse("the official form", _official_faults(encoder, model))
        content[role] = to_official(model.state)
        if missing := [name for name in expected_names(model.state) if name not in content[role]]:
            told = "the official form is that of a whole COSMOS model, and this one lacks"
            raise UserError(f"{told} {', '.join(missing[:4])}")
    with (folder / official_file(described[0])).open("wb") as file:
        torch.save(content, file)
    return []


def _official_faults(encoder: ModelEncoder, model: ClipModel) -> list[str]:
    """Options that change what a model computes, and that the official program does not have."""
    faults = [
        *model.oddities(),
        *model.kinds(),
        *(["model.image.mask_token"] if "image.mask_token" in model.state else []),
    ]
    head = cast(Any, encoder.model.heads["cross"]) if "cross" in encoder.model.heads else None
    if head is not None and is_built_in(head, "heads", "cross_attention"):
        heads = head.image_asks_text.num_heads
        faults += [f"heads.cross.num_heads={heads} (it has {CROSS_HEADS})"] if heads != CROSS_HEADS else []
        faults += ["heads.cross.mask_padding=true"] if head.mask_padding else []
    return faults
