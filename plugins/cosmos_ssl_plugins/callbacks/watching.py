"""Callbacks that follow one number: the run ends where it no longer gets better, and the best weights are kept."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

from cosmos_ssl.api import Callback, CallbackContext, Count, Spec, Strength

log = logging.getLogger("cosmos_ssl")


class Watching(Callback):
    """Base of these: knows the best value so far, and whether an epoch's end has bettered it."""

    watches = True

    def __init__(self, metric: str, mode: Literal["min", "max"], least: float = 0.0) -> None:
        self.metric, self.mode, self.least = metric, mode, least
        self.best: float | None = None
        self._missed = False

    def better(self, ctx: CallbackContext) -> bool | None:
        """Return whether the number is better than ever by more than ``least``; None where it was not reported."""
        value = ctx.metrics.get(self.metric)
        if value is None:
            if not self._missed:
                there = ", ".join(sorted(ctx.metrics)) or "nothing"
                log.warning("callbacks.%s: no '%s' in this epoch, but %s", self.part_name, self.metric, there)
            self._missed = True
            return None
        sign = 1 if self.mode == "max" else -1
        found = math.isfinite(value) and (self.best is None or sign * (value - self.best) > self.least)
        if found:
            self.best = value
        return found

    def state_dict(self) -> Mapping[str, Any]:
        """The best value so far."""
        return {"best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it over."""
        self.best = state["best"]


class EarlyStopping(Watching):
    """Ends the run, as a finished one, once a number has not got better for some ends of epochs that report it.

    ``metric``: its name in metrics.jsonl, such as loss or retrieval/student/image_to_text_R@1.
    ``mode``: whether less (min) or more (max) is better.
    ``patience``: ends of epochs without a better one that end the run.
    ``min_delta``: by how much a better one must be better.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        metric: str,
        mode: Literal["min", "max"],
        patience: Count = 3,
        min_delta: Strength = 0.0,
    ) -> None:
        super().__init__(metric, mode, min_delta)
        self.patience = patience
        self.waited = 0

    def start(self, ctx: CallbackContext) -> None:
        """End again what has ended."""
        self._stop(ctx)

    def at_epoch(self, ctx: CallbackContext) -> None:
        """Count the epochs without a better value."""
        better = self.better(ctx)
        if better is not None:
            self.waited = 0 if better else self.waited + 1
            self._stop(ctx)

    def _stop(self, ctx: CallbackContext) -> None:
        if self.waited >= self.patience:
            best = "no finite value" if self.best is None else f"no better than {self.best:.4g}"
            ctx.stop(f"{self.metric}: {best} for {self.waited} ends of epochs")

    def state_dict(self) -> Mapping[str, Any]:
        """The best value, and how long ago it was."""
        return {**super().state_dict(), "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them over."""
        super().load_state_dict(state)
        self.waited = state["waited"]


class BestCheckpoint(Watching):
    """Keeps the checkpoint of the epoch's end with the best value of a number: ``RUN/checkpoints/NAME``.

    NAME is the callback's own. No other checkpoint takes its place, and it takes none of theirs; what it shares with
    one it shares on the disk too. Training waits until it is written.

    ``metric``: the number's name in metrics.jsonl, such as retrieval/student/image_to_text_R@1.
    ``mode``: whether less (min) or more (max) is better.
    """

    def __init__(self, spec: Spec, *, metric: str, mode: Literal["min", "max"]) -> None:
        super().__init__(metric, mode)

    def at_epoch(self, ctx: CallbackContext) -> None:
        """Keep a better one."""
        if self.better(ctx):
            ctx.keep()
