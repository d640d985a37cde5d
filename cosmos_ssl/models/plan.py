"""The plan of a step: what each role computes, from the union of all needs of heads and losses."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cosmos_ssl.api import (
    ALL,
    Features,
    GroupPlan,
    Head,
    Hidden,
    Loss,
    Modality,
    Need,
    Part,
    PluginError,
    Role,
    Spec,
    Tower,
)
from cosmos_ssl.api.part import describe
from cosmos_ssl.models.contract import blaming, checked_needs

_FORM = "{}, masked patches {}"
"""What the second and third form of a group are called in what a tower is asked for."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A need, with how it reads masked patches decided, and by whom it is: as messages call it, and its place."""

    who: str
    place: str
    need: Need
    part: Part | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RolePlan:
    """What one role computes: view groups by modality, outputs of heads in running order, needs to gather over
    ranks.

    A group that is read in several forms (``Need.hidden``) has an entry of its own for each, of which ``forms`` tells
    group and form. Readers who do not say see those of ``veiled`` with their masked patches hidden; ``open_to`` names,
    by place in the config, who sees which of them whole.
    """

    image: Mapping[str, GroupPlan] = field(default_factory=dict)
    text: Mapping[str, GroupPlan] = field(default_factory=dict)
    heads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    gathered: Sequence[Need] = ()
    forms: Mapping[tuple[Modality, str], tuple[str, Hidden]] = field(default_factory=dict)
    veiled: Collection[tuple[Modality, str]] = ()
    open_to: Mapping[str, Collection[tuple[Modality, str]]] = field(default_factory=dict)

    def of(self, modality: Modality) -> Mapping[str, GroupPlan]:
        """The entries of one modality."""
        return self.image if modality == "image" else self.text

    def form(self, modality: Modality, entry: str) -> tuple[str, Hidden]:
        """The group of an entry, and the form that it is encoded in."""
        return self.forms.get((modality, entry), (entry, False))

    def shown(self, place: str, features: Features) -> Features:
        """The features as the part at ``place`` sees them: whole where it said so, and others did not."""
        for modality, group in self.open_to.get(place, ()):
            whole = features.forms.get((modality, False), {})
            if group in whole:
                groups = {**features.of(modality), group: whole[group]}
                features = replace(features, image=groups) if modality == "image" else replace(features, text=groups)
        return features


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The step's plan by role."""

    student: RolePlan
    teacher: RolePlan | None = None
    views: Collection[Modality] = ()
    """Modalities whose views somebody reads as they are."""
    warnings: Sequence[str] = ()
    """What the authors of parts should know of who hides what from whom."""

    def reads(self, modality: Modality, group: str) -> bool:
        """Whether anybody reads the group, encoded or as it is."""
        roles = [self.student, *([] if self.teacher is None else [self.teacher])]
        encoded = {role.form(modality, entry)[0] for role in roles for entry in role.of(modality)}
        return modality in self.views or group in encoded


def make_plan(
    spec: Spec,
    towers: Mapping[Modality, Tower],
    heads: Mapping[str, Head],
    losses: Mapping[str, Loss],
    extra: Iterable[Need] = (),
    resting: Collection[str] = (),
) -> Plan:
    """Expand every need of the losses, and of the heads they read, into what each role computes.

    ``resting``: losses that are left out. What one of them hides from others stays hidden.

    Raises PluginError where a need is not on offer, naming who asked and what there is.
    """
    needs, running = _ask(spec, heads, losses, extra)
    veiled = _veiled(needs["student"], spec)
    if resting:
        needs, running = _ask(spec, heads, {n: loss for n, loss in losses.items() if n not in resting}, extra)
    plans = {role: _role_plan(spec, towers, heads, needs[role], running[role], veiled) for role in needs}
    return Plan(
        student=plans["student"],
        teacher=plans["teacher"] if needs["teacher"] else None,
        views={
            each.need.modality
            for each in (*needs["student"], *needs["teacher"])
            if each.need.kind == "views" and each.need.modality is not None
        },
        warnings=_warnings(needs["student"], spec, veiled),
    )


def _ask(
    spec: Spec, heads: Mapping[str, Head], losses: Mapping[str, Loss], extra: Iterable[Need]
) -> tuple[dict[Role, list[_Asked]], dict[Role, dict[str, set[str]]]]:
    """All that is asked of each role, and which outputs of which heads are."""
    needs: dict[Role, list[_Asked]] = {"student": [], "teacher": []}
    running: dict[Role, dict[str, set[str]]] = {"student": {}, "teacher": {}}

    def add(place: str, part: Part | None, need: Need, above: Sequence[str]) -> None:
        who = place if part is None else describe(part, place)
        if need.role == "teacher" and not spec.has_teacher:
            raise PluginError(f"{who} reads a teacher, and the config has none. Set teacher.type, for example to 'ema'")
        needs[need.role].append(_Asked(who, place, need, part))
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
                add(f"heads.{need.head}", heads[need.head], replace(inner, role=need.role), before)

    for name, loss in losses.items():
        with blaming(loss, f"losses.{name}"):
            wanted = checked_needs(loss.requires())
        for need in wanted:
            add(f"losses.{name}", loss, need, list(heads))
    for need in extra:
        add("the caller", None, need, list(heads))
    return needs, running


def _groups(need: Need, spec: Spec) -> list[str]:
    """The names of the groups that a need of features speaks of, if they are on offer."""
    if need.modality is None or need.kind == "views":
        return []
    return [name for name in spec.views(need.modality) if need.group in (ALL, name)]


def _veiled(asked: Sequence[_Asked], spec: Spec) -> dict[tuple[Modality, str], str]:
    """The groups whose masked patches are hidden from all of the student's readers who do not say, and by whom."""
    return {
        (each.need.modality, name): each.who
        for each in asked
        if each.need.kind == "masked_tokens" and each.need.hidden is None and each.need.modality is not None
        for name in _groups(each.need, spec)
    }


def _warnings(asked: Sequence[_Asked], spec: Spec, veiled: Mapping[tuple[Modality, str], str]) -> list[str]:
    """Of other packages' parts that another one hides patches from, though they never said what they want."""
    found = {
        f"{each.who} reads the {modality} group '{name}' with its masked patches hidden, since {by} reads masked "
        f"patches of it. Say Need(hidden=False), or hidden=True, in requires()"
        for each in asked
        for (modality, name), by in veiled.items()
        if each.part is not None and each.part.part_source and each.who != by
        if each.need.hidden is None and each.need.modality == modality and name in _groups(each.need, spec)
    }
    return sorted(found)


def _role_plan(
    spec: Spec,
    towers: Mapping[Modality, Tower],
    heads: Mapping[str, Head],
    needs: Sequence[_Asked],
    running: Mapping[str, set[str]],
    veiled: Mapping[tuple[Modality, str], str],
) -> RolePlan:
    groups: dict[Modality, dict[tuple[str, Hidden], GroupPlan]] = {"image": {}, "text": {}}
    open_to: dict[str, set[tuple[Modality, str]]] = {}
    for each in needs:
        need = each.need
        if need.modality is None:
            continue
        for name in _check(each.who, need, spec, towers):
            if need.kind == "views":
                continue
            hidden = _form(need, (need.modality, name) in veiled)
            if need.role == "student" and need.hidden is False and (need.modality, name) in veiled:
                open_to.setdefault(each.place, set()).add((need.modality, name))
            old = groups[need.modality].get((name, hidden), GroupPlan(views=(), projected=False))
            groups[need.modality][name, hidden] = _merge(old, need, hidden, spec.views(need.modality)[name].views)
    _refuse_half_said(needs, spec, open_to)
    image, text, forms = _entries(spec, groups)
    return RolePlan(
        image=image,
        text=text,
        forms=forms,
        veiled=frozenset(veiled if any(each.need.role == "student" for each in needs) else ()),
        open_to=open_to,
        heads={
            name: tuple(o for o in head.outputs() if o in running[name])
            for name, head in heads.items()
            if name in running
        },
        gathered=tuple(dict.fromkeys(each.need for each in needs if each.need.gathered)),
    )


def _form(need: Need, veiled: bool) -> Hidden:
    """How a need's group is encoded."""
    if need.role == "teacher":
        return False
    return veiled if need.hidden is None else need.hidden


def _refuse_half_said(
    asked: Sequence[_Asked], spec: Spec, open_to: Mapping[str, Collection[tuple[Modality, str]]]
) -> None:
    """Raise PluginError for a part that reads a veiled group whole, and once more without saying how."""
    for each in asked:
        for modality, name in open_to.get(each.place, ()):
            if each.need.hidden is None and each.need.modality == modality and name in _groups(each.need, spec):
                raise PluginError(
                    f"{each.who} reads {modality} '{name}' with hidden=False, and its {each.need.kind} without saying: "
                    "say hidden in each Need of this group"
                )


def _entries(
    spec: Spec, groups: Mapping[Modality, Mapping[tuple[str, Hidden], GroupPlan]]
) -> tuple[dict[str, GroupPlan], dict[str, GroupPlan], dict[tuple[Modality, str], tuple[str, Hidden]]]:
    """What each tower is asked for, in the order of the views; a group's first form goes by the group's name."""
    entries: dict[Modality, dict[str, GroupPlan]] = {"image": {}, "text": {}}
    forms: dict[tuple[Modality, str], tuple[str, Hidden]] = {}
    for modality, wanted in groups.items():
        for name in spec.views(modality):
            for hidden in (h for h in (False, True, "drop") if (name, h) in wanted):
                told = "left out" if hidden == "drop" else "hidden"
                entry = _FORM.format(name, told) if name in entries[modality] else name
                entries[modality][entry] = wanted[name, hidden]
                forms[modality, entry] = name, hidden
    return entries["image"], entries["text"], forms


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
    if tower is None and need.kind != "views":
        raise PluginError(f"{who} reads {need.modality} features, and the config has no model.{need.modality}")
    names = list(offered) if need.group == ALL else [need.group]
    if not names or names[0] not in offered:
        maker = f"augmenters.{need.modality}"
        raise PluginError(
            f"{who} reads the {need.modality} views {need.group!r}, which {maker} does not make. Offered: "
            f"{_listed(offered)}"
        )
    for name in names:
        if need.views is not None and max(need.views) >= offered[name].views:
            raise PluginError(
                f"{who} reads view {max(need.views) + 1} of the {need.modality} group '{name}', which has "
                f"{offered[name].views}"
            )
        hides = need.role == "student" and bool(need.hidden)
        if (hides or need.kind == "masked_tokens") and not offered[name].masks:
            raise PluginError(
                f"{who} reads {'hidden' if hides else 'masked'} patches of '{name}', and augmenters.{need.modality} "
                "draws no masks"
            )
    if tower is not None and need.kind != "views":
        _check_tower(who, need, tower)
    return names


def _check_tower(who: str, need: Need, tower: Tower) -> None:
    """Raise PluginError where the tower has not what ``need`` speaks of."""
    named = f"the {need.modality} tower '{tower.part_name}'"
    if need.kind in ("tokens", "masked_tokens") and "tokens" not in tower.capabilities:
        raise PluginError(f"{who} reads tokens, and {named} gives none")
    hides = need.hidden is True or (need.kind == "masked_tokens" and need.hidden is None)
    if need.role == "student" and hides and "masks" not in tower.capabilities:
        raise PluginError(f"{who} reads masked patches, and {named} has no mask token")
    if need.role == "student" and need.hidden == "drop" and "drop" not in tower.capabilities:
        raise PluginError(f"{who} has masked patches left out, and {named} cannot do without them")
    if need.causal and "causal" not in tower.capabilities:
        raise PluginError(f"{who} reads {need.kind} that know nothing of later ones, and {named} is not causal")


def _merge(plan: GroupPlan, need: Need, hidden: Hidden, views: int) -> GroupPlan:
    wanted = set(range(views)) if need.views is None else set(need.views)
    return GroupPlan(
        views=tuple(sorted(wanted | set(plan.views))),
        tokens=tuple(sorted(wanted | set(plan.tokens))) if need.kind == "tokens" else plan.tokens,
        pads=plan.pads or need.pads,
        projected=plan.projected or need.kind == "projected",
        hide_masked=hidden is True,
        drop_masked=hidden == "drop",
        masked_tokens=plan.masked_tokens or need.kind == "masked_tokens",
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
