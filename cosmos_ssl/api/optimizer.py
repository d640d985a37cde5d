"""For authors of optimisers: how gradients move parameters.

An optimiser in full::

    from typing import Any

    import torch
    from cosmos_ssl.api import Optimizer, Share, Spec


    class HeavyBall(Optimizer):
        '''Gradient descent with momentum.

        ``momentum``: how much of the last move stays.
        '''

        def __init__(self, spec: Spec, *, momentum: Share = 0.9) -> None:
            self.momentum = momentum

        def make(self, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
            return torch.optim.SGD(groups, lr=groups[0]["lr"], momentum=self.momentum)

A config then says ``optimizer: {type: heavy_ball, lr: 0.1, momentum: 0.8}``. The engine's are ``lr``, ``weight_decay``
and ``weight_decay_end``, ``layer_decay`` and ``rules``: they become the groups, so they hold for every optimiser.
Options and ``spec``: ``cosmos_ssl.api.part``.

When: ``make`` once, where a config is checked and when a run starts. Each step the engine writes ``lr`` and
``weight_decay`` of that step into every group, then calls ``step`` without a closure; a step whose gradients are not
finite is left out, and under fp16 gradients are unscaled before. Parameters whose ``grad`` is None stay as they are.

What must hold: learning rate and weight decay are read from the groups. What is remembered lies in ``state`` by
parameter, as tensors shaped like the parameter (they can be sharded as it is) or single numbers, or as numbers in the
groups: that is what a checkpoint holds, by the parameters' names. ``cosmos_ssl.testing.check_optimizer`` tries all
this.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from cosmos_ssl.api.part import Part


class Optimizer(Part, ABC):
    """Makes a ``torch.optim.Optimizer``; no module, and without state of its own."""

    state: ClassVar[tuple[str, ...]] = ()
    """Names of what it remembers of every parameter, where they are always the same: a checkpoint without one of them
    is refused."""

    @abstractmethod
    def make(self, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
        """Build the optimiser on ``groups`` of parameters: ``params``, ``lr`` and ``weight_decay``, and keys of the
        engine, which must stay.

        ``device`` is where the parameters are; ``meta`` where a config is checked. Raises ValueError for parameters
        that it cannot move.
        """
