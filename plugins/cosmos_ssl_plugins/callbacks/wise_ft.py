"""Weights between those that a run started from and those that it has come to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cosmos_ssl.api import Aside, Callback, CallbackContext, Share, Spec
from cosmos_ssl.api.callback import KEPT


class WiseFT(Callback):
    """(1 - alpha) start + alpha now, of all parameters (WiSE-FT, arXiv 2109.01903, section 3).

    That is most of what fine-tuning gains on its own pictures, with most of what the start knew of others.

    It lies in every checkpoint as ``NAME.safetensors`` by the callback's name: ``cosmos_ssl.load(run, "NAME")`` and
    ``--which NAME`` of all commands take it. Buffers are the student's. Of an adapter's two factors (``model.lora``)
    the one that started at zero is mixed and the other is the student's, which makes their product the mix.

    ``alpha``: the share of the weights of now; 0.5 where nothing is known of the pictures to come, as in section 4.
    ``evaluate``: whether the run's evaluators work on it too: ``EVALUATOR/NAME/METRIC``.
    """

    def __init__(self, spec: Spec, *, alpha: Aside[Share] = 0.5, evaluate: Aside[bool] = False) -> None:
        self.alpha, self.evaluate = alpha, evaluate
        self.begun: dict[str, Tensor] = {}
        """The parameters at the start, by name."""
        self._model: nn.Module | None = None

    def start(self, ctx: CallbackContext) -> None:
        """Keep the weights that the run begins with."""
        found = {name: x.detach() for name, x in ctx.model.named_parameters()}
        self._model = ctx.model
        if not self.begun:
            self.begun = {name: x.clone() for name, x in found.items() if "lora_A." not in name}
        self.begun = {name: x.to(found[name].device) for name, x in self.begun.items()}

    @torch.no_grad()
    def _mixed(self) -> dict[str, Tensor]:
        found = {} if self._model is None else self._model.state_dict()
        return {**found, **{name: torch.lerp(x, found[name], self.alpha) for name, x in self.begun.items()}}

    def evaluated(self) -> Mapping[str, Tensor]:
        """The mix."""
        return self._mixed() if self.evaluate else {}

    def state_dict(self) -> Mapping[str, Any]:
        """The mix by the model's names, and the start's weights for a run that goes on."""
        return {**self._mixed(), **{f"{KEPT}{name}": x for name, x in self.begun.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the start's weights."""
        self.begun = {name.removeprefix(KEPT): x for name, x in state.items() if name.startswith(KEPT)}
