"""Any checkpoint of another program that can be read: official COSMOS files, the released ones by name, and OpenCLIP models."""

from __future__ import annotations

from pathlib import Path

from cosmos_ssl.api import Role
from cosmos_ssl.errors import CheckpointError
from cosmos_ssl.interop import openclip
from cosmos_ssl.interop.hub import checkpoint_path
from cosmos_ssl.interop.official import ROLES, ForeignCheckpoint, from_official


def read_foreign(checkpoint: str | Path, role: Role, *, partial: bool = False) -> ForeignCheckpoint | None:
    """Read another program's model in our form, or return None where ``checkpoint`` is none that we know of.

    An official COSMOS file, or the name of a released one; an OpenCLIP folder (``local-dir:`` may stand before it), file
    of weights, repository ``hf-hub:ORG/NAME`` or ``MODEL/TAG``. An OpenCLIP file beside an ``open_clip_config.json`` is read
    with it. Such models are students. Raises CheckpointError where it cannot be read, or, without ``partial``, not whole.
    """
    text = str(checkpoint)
    path = checkpoint_path(text.removeprefix(openclip.LOCAL))
    if path.is_file():
        content = openclip.read_file(path)
        if path.suffix != ".safetensors" and (any(name in content for name in ROLES) or openclip.plain_tensors(content) is None):
            return from_official(content, role, path, partial=partial)
        _is_student(text, role)
        told = openclip.read_json(path.parent / openclip.CONFIG) if openclip.is_folder(path.parent) else None
        return openclip.read_tensors(content, path, told, partial=partial)
    if openclip.is_folder(path):
        _is_student(text, role)
        return openclip.read_folder(path, partial=partial)
    if not path.exists() and openclip.is_published(text):
        _is_student(text, role)
        return openclip.fetch(text, partial=partial)
    return None


def foreign_roles(checkpoint: str | Path) -> tuple[Role, ...] | None:
    """The roles of another program's model; None where ``checkpoint`` is none that we know of. Raises CheckpointError."""
    text = str(checkpoint)
    path = checkpoint_path(text.removeprefix(openclip.LOCAL))
    if path.is_file():
        content = {} if path.suffix == ".safetensors" else openclip.read_file(path)
        return tuple(role for role in ROLES if role in content) or ("student",)
    known = openclip.is_folder(path) or (not path.exists() and openclip.is_published(text))
    return ("student",) if known else None


def _is_student(source: str, role: Role) -> None:
    if role != "student":
        raise CheckpointError(f"{source} is an OpenCLIP model, which has no {role}: take it as the student")
