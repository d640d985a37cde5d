"""Callbacks of a run: called in their order, with their state in checkpoints."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosmos_ssl.api import Callback, CallbackContext
from cosmos_ssl.api.part import describe
from cosmos_ssl.config import Config
from cosmos_ssl.config.sections import RuleConfig
from cosmos_ssl.data.order import step_seed
from cosmos_ssl.engine.checkpoint import Snapshot, load_tensors, to_files
from cosmos_ssl.engine.layout import roles_in
from cosmos_ssl.errors import CheckpointError, listed
from cosmos_ssl.models.contract import blaming

log = logging.getLogger(__name__)

_HOOKS = ("start", "before_step", "after_step", "at_epoch", "at_checkpoint")
_STREAM = 1 << 20
"""Random numbers of hooks are none of a micro-batch's (``step_seed``)."""


class Callbacks:
    """The callbacks of a run as one, and what they ask for at an epoch's end."""

    def __init__(self, callbacks: Mapping[str, Callback], seed: int = 0) -> None:
        self.parts = callbacks
        self.seed = seed
        self.told: dict[str, int] = {}
        """The step at which a hook was last called, of those that may be called for once only."""
        self.stop: dict[str, str] = {}
        """Who asks for the run to end, and why."""
        self.keep: list[str] = []
        """Who asks for a checkpoint of this step to be kept."""
        self._of = {
            hook: [(n, c) for n, c in callbacks.items() if getattr(type(c), hook) is not getattr(Callback, hook)]
            for hook in _HOOKS
        }

    def with_rules(self, config: Config) -> Config:
        """The config with the callbacks' rules on parameters behind its own."""
        rules = {
            f"callbacks.{name}.{number}": RuleConfig(
                match=rule.match,
                lr_scale=rule.lr_scale,
                weight_decay_scale=rule.weight_decay_scale,
                decay_1d=rule.decay_1d,
                frozen_epochs=rule.frozen_epochs,
            )
            for name, part in self.parts.items()
            for number, rule in enumerate(part.parameter_rules())
        }
        optimizer = config.optimizer.model_copy(update={"rules": config.optimizer.rules | rules})
        return config.model_copy(update={"optimizer": optimizer}) if rules else config

    def has(self, hook: str) -> bool:
        """Return whether any callback defines this hook."""
        return bool(self._of[hook])

    def call(self, hook: str, ctx: CallbackContext) -> None:
        """Call one hook of all; torch's generators are seeded by seed and step, alike on all ranks."""
        for name, part in self._of[hook]:
            torch.manual_seed(step_seed(self.seed, ctx.progress.step, _STREAM + _HOOKS.index(hook), 0))
            asks = replace(ctx, stop=partial(self._stop, name), keep=partial(self.keep.append, name))
            with blaming(part, f"callbacks.{name}"):
                getattr(part, hook)(asks)

    def _stop(self, name: str, reason: str) -> None:
        self.stop[name] = reason

    def once(self, hook: str, ctx: CallbackContext) -> None:
        """Call one hook of all, once for each step."""
        if self.told.get(hook) != ctx.progress.step:
            self.call(hook, ctx)
            self.told[hook] = ctx.progress.step

    # ------------------------------------------------------------------ state

    def _states(self) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
        """The tensors and the plain values of each."""
        found = {}
        for name, part in self.parts.items():
            state = part.state_dict()
            tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
            found[name] = tensors, {key: value for key, value in state.items() if key not in tensors}
        return found

    @property
    def replicas(self) -> dict[str, Tensor]:
        """What is the same on every rank: tensors, and a checksum of the plain values."""
        found: dict[str, Tensor] = {}
        for name, (tensors, plain) in self._states().items():
            found |= {f"callbacks.{name}.{key}": value for key, value in tensors.items()}
            found[f"callbacks.{name}"] = torch.tensor(zlib.crc32(json.dumps(plain).encode()))
        return found

    def owner(self, replica: str) -> str:
        """The callback that an entry of ``replicas`` belongs to, for a message."""
        name = replica.split(".")[1]
        return describe(self.parts[name], f"callbacks.{name}")

    def added(self, snapshot: Snapshot) -> Snapshot:
        """A snapshot with the callbacks' states."""
        if not self.parts:
            return snapshot
        states = self._states()
        own = {name: tensors for name, (tensors, _) in states.items() if tensors}
        buffers = {key for each in own.values() for key in each}
        tensors, files = to_files(own, snapshot.split)
        plain = {
            name: json.loads(json.dumps(each)) for name, (_, each) in states.items()
        }  # theirs may change meanwhile
        told = {"told": dict(self.told), "keep": list(self.keep), "states": plain}
        return replace(
            snapshot,
            tensors={**snapshot.tensors, **tensors},
            files={**snapshot.files, **files},
            state={**snapshot.state, "callbacks": told},
            buffers={*snapshot.buffers, *buffers},
        )

    def restore(self, path: Path, saved: Mapping[str, Any]) -> None:
        """Take over what a checkpoint holds, by name, and say what it lacks or holds beside. Raises CheckpointError."""
        found = saved.get("callbacks") or {"told": {}, "keep": [], "states": {}}
        self.told, self.keep = dict(found["told"]), [name for name in found["keep"] if name in self.parts]
        for name in self.parts.keys() & found["states"].keys():
            tensors = load_tensors(path, name) if name in roles_in(path) else {}
            try:
                self.parts[name].load_state_dict({**found["states"][name], **tensors})
            except (LookupError, TypeError, ValueError) as error:
                raise CheckpointError(f"{path} does not fit callbacks.{name}: {error}") from error
        if new := [name for name in self.parts if name not in found["states"]]:
            log.warning("callbacks: %s: new in this run from here on, without a past", listed(new))
        if gone := [name for name in found["states"] if name not in self.parts]:
            log.warning("callbacks: %s: no longer in the config; the state that was saved is left behind", listed(gone))
