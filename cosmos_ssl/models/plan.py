"""The plan of a step: what each role computes, from the union of all needs of heads and losses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cosmos_ssl.api import ALL, GroupPlan, Head, Loss, Modality, Need, PluginError, Role, Spec, Tower
from cosmos_ssl.api.part import describe
from cosmos_ssl.models.contract import blaming, checked_needs


@dataclass(frozen=True, slots=True, kw_only=True)
class RolePlan:
    """What one role computes: view groups by modality, outputs of heads in running order, needs to gather over
    ranks.
    """

    image: Mapping[str, GroupPlan] = field(default_factory=dict)
    text: Mapping[str, GroupPlan] = field(default_factory=dict)
    heads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    gathered: Sequence[Need] = ()

    def of(self, modality: Modality) -> Mapping[str, GroupPlan]:
        """The groups of one modality."""
        return self.image if modality == "image" else self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The step's plan by role."""

    student: RolePlan
    teacher: RolePlan | None = None


def make_plan(
    spec: Spec,
    towers: Mapping[Modality, Tower],
    heads: Mapping[str, Head],
    losses: Mapping[str, Loss],
    extra: Iterable[Need] = (),
) -> Plan:
    """Expand every need of the losses, and of the heads they read, into what each role computes.

    Raises PluginError where a need is not on offer, naming who asked and what there is.
    """
    needs: dict[Role, list[tuple[str, Need]]] = {"student": [], "teacher": []}
    running: dict[Role, dict[str, set[str]]] = {"student": {}, "teacher": {}}

    def add(who: str, need: Need, above: Sequence[str]) -> None:
        if need.role == "teacher" and not spec.has_teacher:
            raise PluginError(f"{who} reads a teacher, and the config has none. Set teacher.type, for example to 'ema'")
        needs[need.role].append((who, need))
        if need.head is None:
            return
        wanted = _outputs(who, need, heads, above)
        known = running[need.role].setdefault(need.head, set())
        if not wanted <= known:
            known |= wanted
            before = above[: above.index(need.head)]
            with blaming(heads[need.head], f"heads.{need.head}"):
                inners = checked_needs(heads[need.head].requires(sorted(known)))
            for inner in inners:
                add(describe(heads[need.head], f"heads.{need.head}"), replace(inner, role=need.role), before)

    for name, loss in losses.items():
        with blaming(loss, f"losses.{name}"):
            wanted = checked_needs(loss.requires())
        for need in wanted:
            add(describe(loss, f"losses.{name}"), need, list(heads))
    for need in extra:
        add("the caller", need, list(heads))

    plans = {role: _role_plan(spec, towers, heads, needs[role], running[role]) for role in needs}
    return Plan(student=plans["student"], teacher=plans["teacher"] if needs["teacher"] else None)


def _role_plan(
    spec: Spec,
    towers: Mapping[Modality, Tower],
    heads: Mapping[str, Head],
    needs: Sequence[tuple[str, Need]],
    running: Mapping[str, set[str]],
) -> RolePlan:
    groups: dict[Modality, dict[str, GroupPlan]] = {"image": {}, "text": {}}
    for who, need in needs:
        if need.modality is None:
            continue
        for name in _check(who, need, spec, towers):
            old = groups[need.modality].get(name, GroupPlan(views=(), projected=False))
            groups[need.modality][name] = _merge(old, need, spec.views(need.modality)[name].views)
    ordered = {m: {n: groups[m][n] for n in spec.views(m) if n in groups[m]} for m in groups}
    return RolePlan(
        image=ordered["image"],
        text=ordered["text"],
        heads={
            name: tuple(o for o in head.outputs() if o in running[name])
            for name, head in heads.items()
            if name in running
        },
        gathered=tuple(dict.fromkeys(need for _, need in needs if need.gathered)),
    )


def _outputs(who: str, need: Need, heads: Mapping[str, Head], above: Sequence[str]) -> set[str]:
    """The outputs of a head that ``need`` speaks of, or PluginError."""
    assert need.head is not None
    if need.head not in heads:
        raise PluginError(
            f"{who} reads the head '{need.head}', which the config does not have. Heads: {_listed(heads)}"
        )
    if need.head not in above:
        raise PluginError(
            f"{who} reads the head '{need.head}', which runs after it. List '{need.head}' above it in heads"
        )
    offered = heads[need.head].outputs()
    strangers = [name for name in need.outputs or () if name not in offered]
    if strangers:
        raise PluginError(f"{who} reads '{strangers[0]}' of the head '{need.head}', which gives: {_listed(offered)}")
    return set(offered if need.outputs is None else need.outputs)


def _check(who: str, need: Need, spec: Spec, towers: Mapping[Modality, Tower]) -> list[str]:
    """The names of the groups that ``need`` speaks of, or PluginError."""
    assert need.modality is not None
    if need.gathered and need.kind not in ("pooled", "projected"):
        raise PluginError(
            f"{who} wants {need.kind} gathered, which is for pooled and projected features and for heads' outputs"
        )
    offered = spec.views(need.modality)
    tower = towers.get(need.modality)
    if tower is None:
        raise PluginError(f"{who} reads {need.modality} features, and the config has no model.{need.modality}")
    names = list(offered) if need.group == ALL else [need.group]
    if not names or names[0] not in offered:
        maker = f"augmenters.{need.modality}"
        raise PluginError(
            f"{who} reads the {need.modality} views '{need.group}', which {maker} does not make. Offered: "
            f"{_listed(offered)}"
        )
    for name in names:
        if need.views is not None and max(need.views) >= offered[name].views:
            raise PluginError(
                f"{who} reads view {max(need.views) + 1} of the {need.modality} group '{name}', which has "
                f"{offered[name].views}"
            )
        if need.kind == "masked_tokens" and not offered[name].masks:
            raise PluginError(f"{who} reads masked patches of '{name}', and augmenters.{need.modality} draws no masks")
    if need.kind in ("tokens", "masked_tokens") and "tokens" not in tower.capabilities:
        raise PluginError(f"{who} reads tokens, and the {need.modality} tower '{tower.part_name}' gives none")
    if need.kind == "masked_tokens" and need.role == "student" and "masks" not in tower.capabilities:
        raise PluginError(
            f"{who} reads masked patches, and the {need.modality} tower '{tower.part_name}' has no mask token"
        )
    return names


def _merge(plan: GroupPlan, need: Need, views: int) -> GroupPlan:
    wanted = set(range(views)) if need.views is None else set(need.views)
    masked = need.kind == "masked_tokens"
    return GroupPlan(
        views=tuple(sorted(wanted | set(plan.views))),
        tokens=tuple(sorted(wanted | set(plan.tokens))) if need.kind == "tokens" else plan.tokens,
        pads=plan.pads or need.pads,
        projected=plan.projected or need.kind == "projected",
        hide_masked=plan.hide_masked or (masked and need.role == "student"),
        masked_tokens=plan.masked_tokens or masked,
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
