"""For authors of towers: the view groups of one modality to features.

A tower in full::

    from collections.abc import Mapping, Sequence
    from typing import ClassVar

    import torch
    from cosmos_ssl.api import GroupFeatures, GroupPlan, ImageGroup, Modality, Pixels, Size, Spec, Tower, TowerSpec
    from torch import nn


    class BagOfPatches(Tower):
        '''Each patch by a linear map and a ReLU, and their mean.

        ``width``: of the features.
        ``image_size``, ``patch_size``: sides in pixels.
        '''

        modality: ClassVar[Modality] = "image"
        capabilities = frozenset({"tokens"})

        def __init__(self, spec: Spec, *, width: Size = 256, image_size: Pixels = 224, patch_size: Pixels = 16) -> None:
            super().__init__()
            self.spec = TowerSpec(width=width, image_size=image_size, patch_size=patch_size)
            self.embed = nn.Conv2d(3, width, patch_size, stride=patch_size)
            self.projection = nn.Parameter(width**-0.5 * torch.randn(width, spec.embed_dim))

        def forward(
            self, groups: Mapping[str, ImageGroup], plan: Mapping[str, GroupPlan]
        ) -> dict[str, GroupFeatures]:
            return {name: self._encode(groups[name], wanted) for name, wanted in plan.items()}

        def _encode(self, group: ImageGroup, wanted: GroupPlan) -> GroupFeatures:
            pixels = group.pixels[list(wanted.views)]  # [V, B, 3, H, W]
            patches = self.embed(pixels.flatten(0, 1)).relu().flatten(2).transpose(1, 2)
            tokens = patches.unflatten(0, pixels.shape[:2])  # [V, B, N, W]
            pooled = tokens.mean(2)
            return GroupFeatures(
                views=wanted.views,
                pooled=pooled,
                projected=pooled @ self.projection if wanted.projected else None,
                tokens=tokens[wanted.token_places] if wanted.tokens else None,
                token_views=wanted.tokens,
            )

        def unread(self, plan: Mapping[str, GroupPlan]) -> Sequence[str]:
            return () if any(wanted.projected for wanted in plan.values()) else ("projection",)

A config then says ``model: {image: {type: bag_of_patches, width: 512}}``. Options, and ``TowerSpec``, which
``self.spec`` must be: ``cosmos_ssl.api.part``.

When: ``check_inputs`` is asked, and ``unread``, once the model is built. In each step the student's tower, and the
teacher's where something of it is read, gets all groups of its modality in one call, so that views of several sizes can
share work. A group that is wanted in several forms comes several times, by names of their own: whole, with what its
``masks`` mark behind the mask token (``hide_masked``), or without it (``drop_masked``). ``set_progress`` tells the step
before: a share of patches that training drops, say, may follow from it. ``torch.nn.Module.compile`` is called where
``training.compile`` asks for it.

Shapes: B samples, V views of one group, N patches of a picture or S tokens of a padded text, M masked patches of a
whole group; W width of the tower, D shared width. An ``ImageGroup`` has ``pixels``, floats [V, B, 3, H, W], normalised
by ``spec.mean`` and ``spec.std``, and ``masks``, bool [V, B, N] on the host, or None; a ``TextGroup`` has ``tokens``,
int64 [V, B, S], ``lengths``, int64 [V, B] on the host: up to and with the end of the text, and ``masks``, bool
[V, B, S] on the host, or None.

What must hold: of each group in the plan, and of its ``views`` alone, ``pooled`` and what else is asked for; features
of a sample that depend on no other, and on nothing that is hidden; gradients to all parameters that ``unread`` does not
name; dropout and the like only in training, from torch's random numbers. ``cosmos_ssl.testing.check_tower`` tries all
this.

A tower whose parameters lie at depths is a ``LayeredTower``, one with features of every patch a ``DenseTower``: it has
their members, and need not derive from them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from cosmos_ssl.api.loss import GroupFeatures
from cosmos_ssl.api.part import ParameterRule, Part, TowerSpec, ViewSpec
from cosmos_ssl.api.views import Modality


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    """What a tower must compute for one view group."""

    views: tuple[int, ...]
    """Which views, in the order of the features' leading dimension."""
    tokens: tuple[int, ...] = ()
    """Views (a part of ``views``) whose tokens are read."""
    pads: bool = False
    """Tokens of texts: also those of pads; otherwise zeros stand there."""
    projected: bool = True
    """``projected`` is read."""
    hide_masked: bool = False
    """Masked patches, or tokens, are replaced by the mask token (the student of masked image modelling)."""
    drop_masked: bool = False
    """Masked patches are left out: the others alone are computed, and zeros stand in the places of their tokens."""
    masked_tokens: bool = False
    """``masked_tokens`` is read."""

    @property
    def token_places(self) -> list[int]:
        """Where the views whose tokens are read stand among ``views``."""
        return [self.views.index(view) for view in self.tokens]


class Tower(Part, nn.Module, ABC):
    """Encodes the view groups of one modality, all of them in one call."""

    modality: ClassVar[Modality]
    spec: TowerSpec
    capabilities: frozenset[str] = frozenset()
    """Of ``tokens``, ``masks`` (it has a mask token), ``drop`` (it can leave masked patches out), ``causal`` (a text's
    token knows nothing of those after it), ``csa`` (it is a ``DenseTower``).
    """

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
        """Learning rates, decay and freezing of its parameters, where they are not the run's own."""
        return ()


@runtime_checkable
class LayeredTower(Protocol):
    """A tower that knows how deep its parameters lie, for ``optimizer.layer_decay``."""

    layer_count: int

    def layer_of(self, name: str) -> int:
        """The depth of a parameter: 0 at the embeddings, ``layer_count`` behind the last block."""
        ...


class DenseTower(Protocol):
    """An image tower with features of every patch, for segmentation; ``capabilities`` says so by ``csa``."""

    projection: Tensor
    """[W, D]: what patches and pooled features are multiplied by."""

    def dense(self, pixels: Tensor, *, csa: bool = False) -> tuple[Tensor, Tensor]:
        """Pictures [B, 3, H, W] of any size -> tokens [B, N, W] after the final norm, and pooled [B, W].

        ``csa``: the last block attends by queries and by keys to themselves (SCLIP, arXiv 2312.01597, section 3.2).
        """
        ...
