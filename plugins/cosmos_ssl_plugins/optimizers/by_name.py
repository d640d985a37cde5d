"""What the optimisers of other libraries share: they are found by name, and options held against their signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch

Options = dict[str, bool | int | float | str | list[int | float] | None]
_ENGINES = ("self", "params", "lr", "weight_decay", "kwargs")
"""Arguments that are no options: the engine sets them."""


def nearest(name: str, known: Sequence[str]) -> str:
    """`` Did you mean '...'?``, or nothing."""
    found = {each.lower(): each for each in known}
    close = get_close_matches(name.lower(), list(found), 1)
    return f" Did you mean '{found[close[0]]}'?" if close else ""


def check_options(cls: Callable[..., Any], name: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that the constructor of ``name`` does not have."""
    accepted = [key for key in inspect.signature(cls).parameters if key not in _ENGINES]
    for key in options:
        if key not in accepted:
            raise ValueError(
                f"options.{key}: unknown option of {name}.{nearest(key, accepted)} Accepts: {', '.join(accepted)}"
            )


def build(
    make: Callable[..., torch.optim.Optimizer], name: str, groups: list[dict[str, Any]], options: Options
) -> torch.optim.Optimizer:
    """Call the constructor; what it refuses is a ValueError, and a weight decay that it cannot do."""
    decay = {"weight_decay": groups[0]["weight_decay"]} if "weight_decay" in inspect.signature(make).parameters else {}
    if not decay and any(group["weight_decay"] for group in groups):
        raise ValueError(f"{name} has no weight decay. Set weight_decay to 0")
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    try:
        return make(groups, lr=groups[0]["lr"], **decay, **given)
    except Exception as error:
        raise ValueError(f"{name} cannot be used so: {str(error).partition(chr(10))[0]}") from error
