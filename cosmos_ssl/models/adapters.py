"""Low-rank adapters (LoRA, arXiv 2106.09685) on the linear maps of towers, by Hugging Face's peft; and weights in which
they are merged, which are plain ones again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

_A, _B, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."


def is_plain(*maps: nn.Module) -> bool:
    """Return whether linear maps have no adapters: their weights alone say what they compute."""
    return all(isinstance(each, nn.Linear) for each in maps)


def add_adapters(
    towers: Mapping[str, nn.Module],
    *,
    rank: int,
    alpha: float,
    rslora: bool = False,
    dropout: float = 0.0,
    match: Sequence[str],
    train: Sequence[str] = (),
) -> list[str]:
    """Put an adapter beside every linear map of ``towers`` that one of the patterns ``match`` takes in; their names.

    A map x -> W x + b becomes x -> W x + b + s B A dropout(x), with A [rank, in] drawn and B [out, rank] at zero, so
    that nothing changes until a first step. s is alpha / rank, or alpha / sqrt(rank) by ``rslora``. Of the towers,
    adapters and the parameters that ``train`` takes in need gradients from then on. Patterns are fnmatch's over full
    names: ``image.blocks.0.attn.qkv``. Raises ValueError, which begins with the option, for a pattern that takes in
    nothing or what cannot be adapted.
    """
    maps = {name: why for prefix, tower in towers.items() for name, why in _linear_maps(tower, prefix)}
    weights = [f"{prefix}.{name}" for prefix, tower in towers.items() for name, _ in tower.named_parameters()]
    for option, patterns, names in (("match", match, list(maps)), ("train", train, weights)):
        for number, pattern in enumerate(patterns):
            if not any(fnmatchcase(name, pattern) for name in names):
                what = "linear map" if option == "match" else "parameter"
                raise ValueError(f"{option}.{number}: '{pattern}' matches no {what} of a tower, such as {names[-1]}")
    chosen = [name for name in maps if any(fnmatchcase(name, pattern) for pattern in match)]
    if bypassed := next((name for name in chosen if maps[name]), None):
        raise ValueError(f"match: {bypassed} cannot be adapted, since {maps[bypassed]}")
    for prefix, tower in towers.items():
        beside = {name for name in weights if any(fnmatchcase(name, pattern) for pattern in train)}
        for name, parameter in tower.named_parameters():
            parameter.requires_grad_(f"{prefix}.{name}" in beside)
        own = [name.removeprefix(f"{prefix}.") for name in chosen if name.startswith(f"{prefix}.")]
        if own:
            _inject(tower, own, r=rank, lora_alpha=alpha, use_rslora=rslora, lora_dropout=dropout)
    return chosen


def _linear_maps(tower: nn.Module, prefix: str) -> Iterator[tuple[str, str]]:
    """The full name of each linear map of a tower, and why it cannot be adapted, if so."""
    for name, module in tower.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        parent = tower.get_submodule(name.rpartition(".")[0])
        # these read the weight itself: a module in the place of the map would not be asked
        beside = name.endswith("qkv") and getattr(parent, "q_bias", None) is not None
        reads = beside or isinstance(parent, nn.MultiheadAttention)
        yield f"{prefix}.{name}", f"{type(parent).__name__} reads its weight past it" if reads else ""


def _inject(tower: nn.Module, names: Sequence[str], **options: Any) -> None:
    import peft

    trained = [parameter for parameter in tower.parameters() if parameter.requires_grad]
    whole = "|".join(map(re.escape, names))  # a string is matched as a whole
    config = peft.LoraConfig(target_modules=whole, **options)
    peft.inject_adapter_in_model(config, tower)
    for parameter in trained:  # which peft freezes with all others
        parameter.requires_grad_(True)


def plain_name(name: str) -> str:
    """A parameter's name without adapters: of one of an adapter, the weight's that it changes."""
    for end in (_A, _B):
        if name.endswith(end):
            return f"{name.removesuffix(end)}.weight"
    return name.replace(_BASE, ".")


def has_adapters(names: Iterable[str]) -> bool:
    """Return whether any of a state's names is an adapter's."""
    return any(name.endswith(_B) for name in names)


def merged(state: Mapping[str, Tensor], alpha: float, *, rslora: bool = False) -> dict[str, Tensor]:
    """A state by the names that it has without adapters, W + s B A in the place of each W and its A and B.

    Products are summed in float32 and rounded once to the weight's precision.
    """
    found = {plain_name(name): x for name, x in state.items() if not name.endswith((_A, _B))}
    for name, b in state.items():
        if name.endswith(_B):
            a, weight = state[name.removesuffix(_B) + _A], found[plain_name(name)]
            change = torch.mm(b.float(), a.float()) * (alpha / (math.sqrt(len(a)) if rslora else len(a)))
            found[plain_name(name)] = (weight.float() + change).to(weight.dtype)
    return found
