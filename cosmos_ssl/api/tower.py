"""DOC api.tower"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from cosmos_ssl.api.loss import GroupFeatures
from cosmos_ssl.api.part import ParameterRule, Part, TowerSpec, ViewSpec
from cosmos_ssl.api.views import Modality


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    """What a tower must compute for one view group."""

    views: tuple[int, ...]
    tokens: tuple[int, ...] = ()
    """Views (a part of ``views``) whose tokens are read."""
    pads: bool = False
    projected: bool = True
    hide_masked: bool = False
    """Masked patches are replaced by the mask token (the student of masked image modelling)."""
    masked_tokens: bool = False


class Tower(Part, nn.Module, ABC):
    """Encodes the view groups of one modality, all of them in one call."""

    modality: ClassVar[Modality]
    spec: TowerSpec
    capabilities: frozenset[str] = frozenset()
    """Of ``tokens``, ``masks`` (a mask token), ``packing``, ``pruning`` (last block only where read), ``csa``."""

    @abstractmethod
    def forward(self, groups: Mapping[str, Any], plan: Mapping[str, GroupPlan]) -> dict[str, GroupFeatures]:
        """Encode ``groups[name]`` (ImageGroup, float; or TextGroup) for every name in ``plan``."""

    def check_inputs(self, views: Mapping[str, ViewSpec]) -> None:
        """Raise ValueError where it cannot encode these view groups, or the tokenizer's ids, so that this is known
        before training.
        """

    def unread(self, plan: Mapping[str, GroupPlan]) -> Sequence[str]:
        """fnmatch patterns of parameters that this plan never reaches (they are frozen)."""
        return ()

    def parameter_rules(self) -> Sequence[ParameterRule]:
        """Rules of the parameters, depth-dependent ones included."""
        return ()
