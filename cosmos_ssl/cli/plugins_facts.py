"""The needs and offers of a part, told by one that is built for the shapes of COSMOS."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from cosmos_ssl import registry
from cosmos_ssl.api import Need, Spec, TowerSpec, ViewSpec
from cosmos_ssl.build import meta_device
from cosmos_ssl.errors import PluginError, first_line
from cosmos_ssl.models.contract import is_matching

SPEC = Spec(
    embed_dim=512,
    batch_size=1024,
    has_teacher=True,
    context_length=77,
    vocab_size=49_408,
    image=TowerSpec(width=768, image_size=224, patch_size=16),
    text=TowerSpec(width=512),
    image_views={"global": ViewSpec(views=2, size=224, masks=True), "local": ViewSpec(views=6, size=96)},
    text_views={"global": ViewSpec(views=2), "local": ViewSpec(views=6)},
)

HEAD = "head"
"""The name of a head that is not given: any one whose outputs fit."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Lines for people; ``unknown`` says why there are none, where a part cannot be built without more options."""

    requires: Sequence[str] = field(default_factory=list)
    offers: Sequence[str] = field(default_factory=list)
    unknown: str = ""


def facts(record: registry.Record, cls: type[Any], given: Mapping[str, Any]) -> Facts:
    """Tell what the part requires and offers with these options; the others are at their defaults.

    An option ``head`` that is not given stands for any head with outputs that fit.
    """
    if record.group == "evaluators":
        return Facts([f"model.{modality}" for modality in cls.modalities], ["metrics and pictures of every role"])
    if record.group == "writers":
        return Facts([], ["numbers and pictures"])
    if record.group == "callbacks":
        return Facts([], ["a watcher" if cls.watches else "a part of the run"])
    if record.group == "datasets":
        return Facts([], ["samples"])
    if record.group == "teachers":
        return Facts([], ["features and outputs of heads of the teacher" if cls.present else "no teacher"])
    if record.group == "optimizers":
        return Facts([], ["moved parameters"])
    if record.group == "schedules":
        return Facts([], ["a learning rate; curves of other numbers"])
    found: list[Facts] = []
    for options in _variants(cls, given):
        part, reason = _built(record, cls, options)
        if part is None:
            return replace(_of_class(record, cls), unknown=reason)
        found.append(_of_part(record, part))
    requires = [*found[0].requires, *(f"with a head instead: {'; '.join(own.requires)}" for own in found[1:])]
    return replace(found[0], requires=requires)


def _variants(cls: type[Any], given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The options of each way to build the part: where it can do without a head, so and with one."""
    options = {option.name: option for option in registry.options_of(cls)}
    literals = [o for o in options.values() if o.required and typing.get_origin(o.type) is typing.Literal]
    given = {**{o.name: typing.get_args(o.type)[0] for o in literals}, **given}
    wanted = "head" in options and "head" not in given
    if not (wanted and options["head"].required):
        yield dict(given)
    if wanted:
        yield {**given, "head": HEAD}


def _built(record: registry.Record, cls: type[Any], options: Mapping[str, Any]) -> tuple[Any, str]:
    """The part on the meta device, or None and the reason."""
    missing = [option.name for option in registry.options_of(cls) if option.required and option.name not in options]
    if missing:
        return None, f"depends on {', '.join(missing)}: give {'=... '.join(missing)}=... behind the part's name"
    reason = ""
    head = options.get("head")
    for outputs in _outputs_of_heads(record.distribution) if isinstance(head, str) else [{}]:
        spec = replace(SPEC, heads={head: outputs} if isinstance(head, str) else {})
        try:
            with meta_device():
                return cls(spec, **options), ""
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # another model around it
            reason = reason or first_line(error)
    return None, f"cannot be told: {reason}"


@lru_cache
def _outputs_of_heads(distribution: str) -> list[Mapping[str, int]]:
    """Outputs of the heads that can be built, those of one distribution first, then ours."""
    heads = [record for record in registry.records() if record.group == "heads"]
    found: list[Mapping[str, int]] = []
    for record in sorted(heads, key=lambda record: (record.distribution != distribution, not record.own, record.name)):
        try:
            cls = registry.load(record)
        except PluginError:
            continue
        part, _ = _built(record, cls, {})
        if part is not None:
            found.append(dict(part.outputs()))
    return found


# ---------------------------------------------------------------------------- lines


def _of_class(record: registry.Record, cls: type[Any]) -> Facts:
    """The little that can be told of a part that is not built."""
    if record.group in ("towers", "augmenters"):
        return Facts(_inputs(record, cls), sorted(getattr(cls, "capabilities", ())))
    return Facts()


def _of_part(record: registry.Record, part: Any) -> Facts:
    if record.group == "losses":
        return Facts([f"{need.role}: {_need(need)}" for need in part.requires()], ["terms"])
    if record.group == "heads":
        widths = part.outputs()
        offers = [f"output '{name}', width {width:,}" for name, width in widths.items()]
        return Facts(
            list(_of_outputs(part)), offers + ["scores of pictures and texts for retrieval"] * is_matching(part)
        )
    if record.group == "augmenters":
        return Facts(_inputs(record, part), list(_views(part.offers())))
    if record.group == "towers":
        return Facts(_inputs(record, part), ["pooled and projected features", *sorted(part.capabilities)])
    return Facts([], [f"{part.vocab_size:,} tokens, {part.context_length} a text"])


def _inputs(record: registry.Record, part: Any) -> list[str]:
    if record.group == "towers":
        return [f"{part.modality} views"]
    return [{"image": "pictures", "text": "captions"}[part.modality]]


def _of_outputs(head: Any) -> Iterator[str]:
    """The needs of a head: told once where they are the same for all outputs."""
    needs = {output: tuple(_need(need) for need in head.requires([output])) for output in head.outputs()}
    if len(set(needs.values())) == 1:
        yield from next(iter(needs.values()))
        return
    for output, lines in needs.items():
        yield f"for '{output}': {' and '.join(lines)}"


def _need(need: Need) -> str:
    if need.head is not None:
        outputs = "all outputs" if need.outputs is None else " and ".join(f"'{name}'" for name in need.outputs)
        text = f"{outputs or 'answers'} of {'its head' if need.head == HEAD else f'the head {need.head!r}'}"
    else:
        group = "all groups" if need.group == "*" else f"group '{need.group}'"
        views = "" if need.views is None else f", view {', '.join(str(view + 1) for view in need.views)}"
        form = {True: ", masked patches hidden", "drop": ", masked patches left out"}.get(need.hidden or "", "")
        text = f"{need.modality} {need.kind.replace('_', ' ')} of {group}{views}{form}"
    return f"{text}{', with pads' if need.pads else ''}{', gathered over ranks' if need.gathered else ''}"


def _views(offered: Mapping[str, ViewSpec]) -> Iterator[str]:
    for name, views in offered.items():
        size = f" of {views.size} x {views.size} pixels" if views.size else ""
        yield f"'{name}': {views.views} view{'s' * (views.views > 1)}{size}{', with masks' if views.masks else ''}"
