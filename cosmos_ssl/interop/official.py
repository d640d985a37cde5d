"""Checkpoints of the official COSMOS program: names, sizes and values, to our form and back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cosmos_ssl.api import Role
from cosmos_ssl.errors import CheckpointError, listed
from cosmos_ssl.interop.files import check_weights

ROLES: tuple[Role, ...] = ("student", "teacher")
_DDP = "module."
CROSS_HEADS = 8
"""Heads of its cross-attention: fixed in the official program, and not to be read from a tensor."""
CLIP_VOCABULARY = 49_408
SIZES = "cosmos_ssl.sizes"
"""Where an export tells, by config keys, what stands in no tensor: a key of an official file, or of metadata."""
MAX_SIZE = 1 << 16


def _modules(*pairs: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """Weight and bias of each pair of modules."""
    for ours, theirs in pairs:
        for leaf in ("weight", "bias"):
            yield f"{ours}.{leaf}", f"{theirs}.{leaf}"


def _attention(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    yield f"{ours}.qkv.weight", f"{theirs}.in_proj_weight"
    yield f"{ours}.qkv.bias", f"{theirs}.in_proj_bias"
    yield from _modules((f"{ours}.proj", f"{theirs}.out_proj"))


def _block(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    yield from _modules((f"{ours}.norm1", f"{theirs}.ln_1"), (f"{ours}.norm2", f"{theirs}.ln_2"))
    yield from _modules((f"{ours}.mlp.fc1", f"{theirs}.mlp.c_fc"), (f"{ours}.mlp.fc2", f"{theirs}.mlp.c_proj"))
    yield from _attention(f"{ours}.attn", f"{theirs}.attn")


def _ask(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    yield from _modules((f"{ours}.norm_q", f"{theirs}.ln_q"), (f"{ours}.norm_kv", f"{theirs}.ln_k"))
    yield from _attention(ours, f"{theirs}.attn")


NAMES: tuple[tuple[str, str], ...] = (
    ("image.patch_embed.weight", "visual.conv1.weight"),
    ("image.class_token", "visual.class_embedding"),
    ("image.position_embedding", "visual.positional_embedding"),
    ("image.projection", "visual.proj"),
    *_modules(("image.norm_pre", "visual.ln_pre"), ("image.norm", "visual.ln_post")),
    *_block("image.blocks.#", "visual.transformer.resblocks.#"),
    ("text.token_embedding.weight", "token_embedding.weight"),
    ("text.position_embedding", "positional_embedding"),
    ("text.projection", "text_projection"),
    *_modules(("text.norm", "ln_final")),
    *_block("text.blocks.#", "transformer.resblocks.#"),
    *_modules(("heads.cross.image_tokens", "image_token_mapping"), ("heads.cross.text_tokens", "text_token_mapping")),
    *_ask("heads.cross.image_asks_text", "text_attn_cross_pool"),
    *_ask("heads.cross.text_asks_image", "visual.attn_cross_pool"),
    ("losses.clip.logit_scale", "logit_scale"),
    ("losses.distill.logit_scale", "distill_logit_scale"),
)
"""Our name and theirs of every tensor; ``#`` is the number of a block."""

_THEIRS = dict(NAMES)
_NUMBER = re.compile(r"(?<=blocks\.)[0-9]{1,4}(?=\.)")


def translate(name: str, table: Mapping[str, str]) -> str | None:
    """The counterpart of a tensor's name in a table like ``NAMES``; None where it has none."""
    number = _NUMBER.search(name)
    found = None if "#" in name else table.get(_NUMBER.sub("#", name))
    return found.replace("#", number[0]) if found is not None and number is not None else found


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignCheckpoint:
    """A model of another program in our form."""

    state: Mapping[str, Tensor]
    """Tensors by our names."""
    config: Mapping[str, Any]
    """A config of that model, for ``load_config``; its sizes were read from the tensors."""
    missing: tuple[str, ...] = ()
    """Names of that program that the source lacks (of a partial reading)."""
    unexpected: tuple[str, ...] = ()
    """Names in the source that are not of that program (of a partial reading), or are no weights."""


def from_official(content: Mapping[str, Any], role: str, path: Path, *, partial: bool = False) -> ForeignCheckpoint:
    """Take ``student`` or ``teacher`` from an official COSMOS file, whose table is ``content``.

    The number of attention heads stands in no tensor: the config has it where the file is an export of ours, which
    tells it. Raises CheckpointError where the file lacks the role or is another program's; with ``partial`` missing and
    unknown tensors are told instead.
    """
    tensors = _role(content, role, path)
    kind, strange = "no official COSMOS checkpoint", "is not one of its tensors"
    state, missing, unexpected = take(tensors, NAMES, f"{path} is {kind}", strange, partial=partial)
    check_weights(state, path)
    config = {"name": str(content.get("name") or path.stem), **_config(state, path, content.get(SIZES))}
    return ForeignCheckpoint(state=state, config=config, missing=missing, unexpected=unexpected)


def take(
    tensors: Mapping[str, Tensor],
    names: Iterable[tuple[str, str]],
    what: str,
    strange: str,
    *,
    idle: Sequence[str] = (),
    partial: bool = False,
) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """Tensors by our names, of a table like ``NAMES``; which of their names are missing, and which have no place.

    Raises CheckpointError, which begins with ``what``, where there are such (but ``idle`` ones); with ``partial`` only
    where nothing can be taken.
    """
    table = {theirs: ours for ours, theirs in names}
    pairs = {name: translate(name, table) for name in tensors}
    state = {ours: tensors[theirs] for theirs, ours in pairs.items() if ours is not None}
    unexpected = tuple(name for name, ours in pairs.items() if ours is None)
    missing = tuple(name for name in expected_names(state, names) if name not in tensors)
    faults = [f"{name} is missing" for name in missing]
    faults += [f"{name} {strange}" for name in unexpected if name not in idle]
    if faults and not (partial and state):
        raise CheckpointError(f"{what}: {listed(faults, '; ')}")
    return state, missing, unexpected


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by our names to tensors by official names, without ``module.``.

    Raises CheckpointError for a tensor that the official program does not know.
    """
    pairs = {name: translate(name, _THEIRS) for name in state}
    strangers = [name for name, theirs in pairs.items() if theirs is None]
    if strangers:
        raise CheckpointError(f"the official form has no place for {listed(strangers)}")
    return {theirs: state[name] for name, theirs in pairs.items() if theirs is not None}


def _role(content: Mapping[str, Any], role: str, path: Path) -> dict[str, Tensor]:
    """The tensors of one role, without the prefix that data parallelism leaves."""
    if role not in content:
        there = [name for name in ROLES if name in content]
        if there:
            raise CheckpointError(f"{path} holds no {role}, only the {there[0]}")
        raise CheckpointError(
            f"{path} is no official COSMOS checkpoint: it has neither student nor teacher, but "
            f"{listed(map(str, content))}"
        )
    tensors = content[role]
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{path}: its {role} is no table of tensors")
    return {str(name).removeprefix(_DDP): value for name, value in tensors.items()}


def expected_names(state: Mapping[str, Tensor], names: Iterable[tuple[str, str]] = NAMES) -> list[str]:
    """Their names of a model with as many blocks as ``state`` has."""
    blocks = {modality: range(_layers(state, modality)) for modality in ("image", "text")}
    return [
        theirs.replace("#", str(number))
        for ours, theirs in names
        for number in (blocks[ours.split(".")[0]] if "#" in ours else (0,))
    ]


def _layers(state: Mapping[str, Tensor], modality: str) -> int:
    numbers = [int(found[0]) for name in state if name.startswith(f"{modality}.") and (found := _NUMBER.search(name))]
    return max(numbers, default=-1) + 1


def _config(state: Mapping[str, Tensor], path: Path, sizes: object) -> dict[str, Any]:
    """The config of the model that these tensors are of, with the method's own parts around it."""
    config = clip_config(state, path, sizes)
    size = config["model"]["image"]["image_size"]
    return {
        **config,
        "augmenters": {"image": {"type": "multi_crop", "global_crops_size": size}, "text": {"type": "text_crop"}},
        "heads": {"cross": {"type": "cross_attention", "num_heads": CROSS_HEADS}},
        "losses": {"clip": {"type": "clip"}, "distill": {"type": "cross_modality_distillation", "head": "cross"}},
        "teacher": {"type": "ema", "update_when": "before_optimizer_step"},
    }


def clip_config(state: Mapping[str, Tensor], source: object, sizes: object = None) -> dict[str, Any]:
    """The sections ``model`` and ``tokenizer`` of a config, with the sizes of CLIP's towers read from their tensors.

    A state without an image tower of CLIP's has no ``image`` there, one whose text tower is a ``text.model`` of another
    library no ``text``. ``sizes``: what no tensor tells, as our exports do
    (``SIZES``); without it the config has no heads, and pictures of whole patches. Raises CheckpointError, naming
    ``source``, where a tensor is missing or of no such tower.
    """
    text: dict[str, Any] = {}
    tokenizer: dict[str, Any] = {}
    try:
        image = _image(state) if "image.patch_embed.weight" in state else {}
        embed_dim = state["image.projection"].shape[-1]
        if not any(name.startswith("text.model.") for name in state):
            text, tokenizer["context_length"] = _text(state)
            tokenizer["type"] = "clip"
        if not embed_dim:
            raise ValueError("one of them is empty")
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise CheckpointError(f"{source}: the sizes of the model cannot be told from its tensors ({error})") from error
    for name, tower in (("image", image), ("text", text)):
        hidden = len(state.get(f"{name}.blocks.0.mlp.fc1.weight", range(0)))
        if tower and hidden not in (0, 4 * tower["width"]):
            tower["mlp_ratio"] = mlp_ratio(hidden, tower["width"])
        tower |= _told(sizes, name, source)
    if image:
        _check_grid(state, image, source)
    towers = {name: tower for name, tower in (("image", image), ("text", text)) if tower}
    return {"model": {"embed_dim": embed_dim, **towers}, "tokenizer": tokenizer}


def _text(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], int]:
    """The sizes of a text tower, and the tokens of a text. Raises ValueError and such where they cannot be told."""
    places, width = state["text.position_embedding"].shape
    vocabulary = len(state["text.token_embedding.weight"])
    if not all((places, width, vocabulary)):
        raise ValueError("one of them is empty")
    vocab_size = {} if vocabulary == CLIP_VOCABULARY else {"vocab_size": vocabulary}
    return {"type": "clip_text", "width": width, "layers": _layers(state, "text"), **vocab_size}, places


def _image(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The sizes of an image tower; of pictures, whole patches. Raises ValueError and such where they cannot be told."""
    width, _ = state["image.projection"].shape
    patch = state["image.patch_embed.weight"].shape[-1]
    side = math.isqrt(len(state["image.position_embedding"]) - 1)
    if not all((width, patch, side)):
        raise ValueError("one of them is empty")
    sizes = {"width": width, "layers": _layers(state, "image"), "patch_size": patch, "image_size": side * patch}
    return {"type": "clip_vit", **sizes}


def _check_grid(state: Mapping[str, Tensor], image: Mapping[str, Any], source: object) -> None:
    patches, patch = len(state["image.position_embedding"]) - 1, image["patch_size"]
    side = math.isqrt(patches)
    if side**2 != patches:
        raise CheckpointError(f"{source}: {patches} image positions are no square")
    if image["image_size"] // patch != side:
        raise CheckpointError(
            f"{source}: pictures of {image['image_size']} px have not {side} patches of {patch} px a side, as it says"
        )


def _told(sizes: object, tower: str, source: object) -> dict[str, int]:
    """The options of a tower among ``sizes``: the table itself, or its JSON."""
    try:
        table: Any = json.loads(sizes) if isinstance(sizes, str) else sizes or {}
        found = {name: table[key] for name in ("heads", "image_size") if (key := f"model.{tower}.{name}") in table}
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{source}: '{SIZES}' holds no sizes ({error})") from error
    if not all(type(value) is int and 0 < value < MAX_SIZE for value in found.values()):
        raise CheckpointError(f"{source}: '{SIZES}' holds no sizes ({found})")
    return found


def mlp_ratio(hidden: int, width: int) -> float:
    """The ratio that a library makes ``hidden`` of again, by int(width * ratio)."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
