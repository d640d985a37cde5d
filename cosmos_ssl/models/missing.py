"""What a part reads and has not asked for: it is called once more, with features that tell what is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, NoReturn, TypeVar

import torch

from cosmos_ssl.api import Features, GroupFeatures, Modality, Need, Role, StepContext
from cosmos_ssl.models.contract import Fault

T = TypeVar("T")

_KINDS = ("pooled", "projected", "tokens", "masked_tokens")


class _NotThere(Exception):
    """Raised with the need, as Python writes it."""


def saying_needs(call: Callable[..., T], *given: Any) -> T:
    """Call a part. Raises Fault, with the ``Need`` that is missing in its ``requires()``, where it fails for that."""
    try:
        return call(*given)
    except (AttributeError, TypeError, KeyError, AssertionError) as error:
        if not _of_nothing(error):
            raise
        need = None
        with suppress(Exception), torch.no_grad():
            try:
                call(*map(_telling, given))
            except _NotThere as told:
                need = str(told)
        if need is None:
            raise
        raise Fault(f"reads what its requires() does not ask for. Add {need} to it") from error


def _of_nothing(error: Exception) -> bool:
    """Return whether an error may stem from what is not there."""
    kinds = {AttributeError: "'NoneType' object", TypeError: "'NoneType' object", AssertionError: "not asked for"}
    return isinstance(error, KeyError) or any(
        type(error) is kind and word in str(error) for kind, word in kinds.items()
    )


def _telling(given: Any) -> Any:
    if isinstance(given, Features):
        return _features(given)
    if not isinstance(given, StepContext):
        return given
    roles: tuple[Role, ...] = ("student", "teacher")
    gathered = {role: _features(given.gathered.get(role), role=role, gathered=True) for role in roles}
    return replace(
        given,
        student=_features(given.student),
        teacher=_features(given.teacher, role="teacher"),
        gathered=gathered,
    )


def _features(found: Features | None, **keys: Any) -> Features:
    """Features of which what is missing raises ``_NotThere``; ``keys`` are those of the need."""
    found = found or Features()

    def groups(modality: Modality) -> _Table:
        def group(name: str) -> GroupFeatures:
            return _group(found.of(modality).get(name), {**keys, "modality": modality, "group": name})

        whole = {**keys, "modality": modality}
        return _Table({name: group(name) for name in found.of(modality)}, group, whole)

    def outputs(head: str) -> _Table:
        def refuse(name: str) -> NoReturn:
            _refuse({**keys, "head": head, "outputs": (name,)})

        return _Table(found.heads.get(head, {}), refuse, {**keys, "head": head})

    heads = _Table({name: outputs(name) for name in found.heads}, outputs, keys)
    return Features(image=groups("image"), text=groups("text"), heads=heads)


class _Table(dict[str, Any]):
    """A table that makes what it lacks, and whose emptiness is a need."""

    def __init__(self, there: Mapping[str, Any], make: Callable[[str], Any], need: Mapping[str, Any]) -> None:
        super().__init__(there)
        self._make, self._need = make, need

    def __missing__(self, name: str) -> Any:
        return self._make(name)

    def values(self) -> Any:
        return super().values() if self else _refuse(self._need)

    def items(self) -> Any:
        return super().items() if self else _refuse(self._need)

    def __iter__(self) -> Iterator[str]:
        return super().__iter__() if self else _refuse(self._need)


def _group(found: GroupFeatures | None, need: Mapping[str, Any]) -> GroupFeatures:
    class Told(GroupFeatures):
        __slots__ = ()

        def __getattribute__(self, name: str) -> Any:
            value = getattr(found, name, None)
            if name in _KINDS and value is None:
                _refuse({**need, "kind": name})
            return value if name in GroupFeatures.__slots__ else object.__getattribute__(self, name)

    return object.__new__(Told)


def _refuse(need: Mapping[str, Any]) -> NoReturn:
    defaults = {name: Need.__dataclass_fields__[name].default for name in need}
    given = (f"{name}={value!r}".replace("'", '"') for name, value in need.items() if value != defaults[name])
    raise _NotThere(f"Need({', '.join(given)})")
