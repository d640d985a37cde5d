"""Attention heads, which no tensor tells: taken to be 64 wide where that is the custom, asked for where it is not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cosmos_ssl.errors import CheckpointError

HEAD_WIDTH = 64
USUAL: Mapping[str, tuple[int, ...]] = {
    "image": (384, 512, 768, 896, 1024),
    "text": (256, 384, 512, 640, 768, 1024, 1280),
}
"""Widths of towers of which all published models have heads 64 wide (COSMOS's are 768 and 512).

ViT-H's 1280, for one, has 16 heads.
"""


def assume_heads(model: Mapping[str, Any], source: object) -> str:
    """For people: the heads of CLIP's towers that a config's section ``model`` leaves to their width; empty where it
    leaves none.

    Raises CheckpointError, which names the overrides, where the width is not one of ``USUAL``.
    """
    left = {tower: width or 0 for tower, width, heads in _towers(model) if heads is None}
    if unusual := [tower for tower, width in left.items() if width not in USUAL[tower]]:
        widths = " and ".join(f"its {tower} tower (width {left[tower]})" for tower in unusual)
        asked = " and ".join(f"model.{tower}.heads=.." for tower in unusual)
        raise CheckpointError(
            f"{source} does not tell how many attention heads {widths} has, and several numbers are usual: say {asked}"
        )
    found = ", ".join(f"{width // HEAD_WIDTH} of the {tower} tower" for tower, width in left.items())
    return f"heads, which it does not tell, are taken to be {HEAD_WIDTH} wide ({found})" if left else ""


def told_heads(model: Mapping[str, Any], *, ours: bool) -> dict[str, int]:
    """The heads of CLIP's towers as a section ``model`` tells them; a config of ``ours`` tells them by width too."""
    found = {
        tower: heads or (width // HEAD_WIDTH if ours and width else None) for tower, width, heads in _towers(model)
    }
    return {tower: heads for tower, heads in found.items() if heads}


def other_kinds(model: Mapping[str, Any], towers: Mapping[str, Any], *, ours: bool) -> list[str]:
    """Name the options of CLIP's towers, of those that no size tells (their ``kind``), that a section ``model`` tells
    otherwise than ``towers`` have them; a config of ``ours`` means the usual ones where it tells none.
    """
    found = []
    for name, _, _ in _towers(model):
        own: Mapping[str, Any] = getattr(towers.get(name), "kind", {})
        told = {**(type(towers[name]).__init__.__kwdefaults__ if ours and own else {}), **model[name]}
        for option in (option for option in own if option in told):
            value = tuple(told[option]) if isinstance(told[option], list) else told[option]
            if value != own[option]:
                found.append(f"{option} {value} in its {name} tower (model.{name}.{option}={_yaml(value)})")
    return found


def _yaml(value: object) -> str:
    return str(list(value) if isinstance(value, tuple) else value).lower()


def _towers(model: Mapping[str, Any]) -> Iterator[tuple[str, int | None, int | None]]:
    """Name, width and heads of each tower of CLIP's kind."""
    for tower, kind in (("image", "clip_vit"), ("text", "clip_text")):
        part = model.get(tower)
        if part is not None and str(part["type"]).rpartition(":")[2] == kind:
            yield tower, part.get("width"), part.get("heads")
