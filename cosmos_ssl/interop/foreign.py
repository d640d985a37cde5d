"""Checkpoints of other programs that can be read: official COSMOS files, released ones by name, models of OpenCLIP,
Hugging Face and timm.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cosmos_ssl.api import Role
from cosmos_ssl.errors import CheckpointError
from cosmos_ssl.interop import folders, openclip
from cosmos_ssl.interop.files import read_json, read_tensor_file
from cosmos_ssl.interop.hub import HUB, checkpoint_path, fetch_repository, released
from cosmos_ssl.interop.official import ROLES, SIZES, ForeignCheckpoint, from_official
from cosmos_ssl.interop.openclip_settings import CONFIG

_BESIDE = ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""Files that tell how a model's inputs are made."""


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
    file of weights or ``MODEL/TAG``; the folder of a CLIPModel or of a timm model; a repository ``hf-hub:ORG/NAME`` of
    any of these, with ``@REVISION`` behind it where that is not the newest. An OpenCLIP file beside an
    ``open_clip_config.json`` is read with it. Models of other programs than COSMOS's are students. Raises
    CheckpointError where it cannot be read, or, without ``partial``, not whole.
    """
    text, path = str(checkpoint), _here(checkpoint)
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
    path = _here(checkpoint)
    if path.is_file() and path.suffix != ".safetensors":
        content, _ = read_tensor_file(path)
        return tuple(role for role in ROLES if role in content) or ("student",)
    return ("student",) if is_foreign(checkpoint) else None


def is_remote(checkpoint: str, *, partial: bool = False) -> bool:
    """Return whether a model would be sought on the hub.

    Nothing is fetched; raises CheckpointError for a name that is known to be of no use.
    """
    if released(checkpoint) is not None or checkpoint.startswith(HUB):
        return True
    if _local(checkpoint).exists() or not openclip.is_published(checkpoint):
        return False
    openclip.published(checkpoint, partial=partial)
    return True


def _here(checkpoint: str | Path) -> Path:
    """The path of a checkpoint on this machine, fetched where needed. Raises CheckpointError."""
    if not str(checkpoint).startswith(HUB):
        return checkpoint_path(_local(checkpoint))
    folder = fetch_repository(str(checkpoint), _chosen)
    if openclip.is_folder(folder) or folders.is_folder(folder):
        return folder
    return next(folder.glob("*.pt"))


def _chosen(files: Sequence[str]) -> list[str]:
    """The files of a repository that its model is read from: a config and its weights, or one official file."""
    for config, weights in ((CONFIG, openclip.WEIGHTS), (folders.CONFIG, folders.WEIGHTS)):
        if config in files:
            found = next((name for name in weights if name in files), None)
            return [] if found is None else [config, found, *(name for name in _BESIDE if name in files)]
    official = [name for name in files if name.endswith(".pt") and "/" not in name]
    return official if len(official) == 1 else []


def _local(checkpoint: str | Path) -> Path:
    return Path(str(checkpoint).removeprefix(openclip.LOCAL)).expanduser()
