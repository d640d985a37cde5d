"""Checkpoints of other programs that can be read: official COSMOS files, released ones by name, models of OpenCLIP,
Hugging Face and timm.
"""

from __future__ import annotations

from pathlib import Path

from cosmos_ssl.api import Role
from cosmos_ssl.errors import CheckpointError
from cosmos_ssl.interop import folders, openclip
from cosmos_ssl.interop.files import read_json, read_tensor_file
from cosmos_ssl.interop.hub import checkpoint_path, released
from cosmos_ssl.interop.official import ROLES, SIZES, ForeignCheckpoint, from_official
from cosmos_ssl.interop.openclip_settings import CONFIG


def is_foreign(checkpoint: str | Path) -> bool:
    """Return whether ``checkpoint`` names another program's model: a file, a folder of OpenCLIP's, Hugging Face's or
    timm's, or a published name.

    Nothing is fetched.
    """
    path = _local(checkpoint)
    known = path.is_file() or openclip.is_folder(path) or folders.is_folder(path)
    return known or (not path.exists() and openclip.is_published(str(checkpoint)))


def read_foreign(checkpoint: str | Path, role: str, *, partial: bool = False) -> ForeignCheckpoint | None:
    """Read another program's model in our form, or return None where ``checkpoint`` is none that we know of.

    An official COSMOS file, or the name of a released one; an OpenCLIP folder (``local-dir:`` may stand before it),
    file of weights, repository ``hf-hub:ORG/NAME`` or ``MODEL/TAG``; the folder of a CLIPModel or of a timm model. An
    OpenCLIP file beside an ``open_clip_config.json`` is read with it. Such models are students. Raises CheckpointError
    where it cannot be read, or, without ``partial``, not whole.
    """
    text, path = str(checkpoint), checkpoint_path(_local(checkpoint))
    if not is_foreign(path if path.exists() else checkpoint):
        return None
    content, metadata = read_tensor_file(path) if path.is_file() else ({}, {})
    official = any(name in content for name in ROLES) or openclip.plain_tensors(content) is None
    if path.is_file() and path.suffix != ".safetensors" and official:
        return from_official(content, role, path, partial=partial)
    if role != "student":
        kind = "a model of Hugging Face or timm" if folders.is_folder(path) else "an OpenCLIP model"
        raise CheckpointError(f"{text} is {kind}, which has no {role}: take it as the student")
    if path.is_file():
        told = read_json(path.parent / CONFIG) if openclip.is_folder(path.parent) else None
        return openclip.read_tensors(content, path, told, sizes=metadata.get(SIZES), partial=partial)
    if openclip.is_folder(path):
        return openclip.read_folder(path, partial=partial)
    if folders.is_folder(path):
        return folders.read_folder(path, partial=partial)
    return openclip.fetch(text, partial=partial)


def foreign_roles(checkpoint: str | Path) -> tuple[Role, ...] | None:
    """The roles of another program's model; None where ``checkpoint`` is none that we know of.

    Raises CheckpointError.
    """
    path = checkpoint_path(_local(checkpoint))
    if path.is_file() and path.suffix != ".safetensors":
        content, _ = read_tensor_file(path)
        return tuple(role for role in ROLES if role in content) or ("student",)
    return ("student",) if is_foreign(checkpoint) else None


def is_remote(checkpoint: str, *, partial: bool = False) -> bool:
    """Return whether a model would be sought on the hub.

    Nothing is fetched; raises CheckpointError for a name that is known to be of no use.
    """
    if released(checkpoint) is not None or checkpoint.startswith(openclip.HUB):
        return True
    if _local(checkpoint).exists() or not openclip.is_published(checkpoint):
        return False
    openclip.published(checkpoint, partial=partial)
    return True


def _local(checkpoint: str | Path) -> Path:
    return Path(str(checkpoint).removeprefix(openclip.LOCAL)).expanduser()
