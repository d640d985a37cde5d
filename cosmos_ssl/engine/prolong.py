"""A run that is to be longer than it was begun: from which step on it can go on as the same run."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn

from cosmos_ssl.api import Curve, Part
from cosmos_ssl.config import Config
from cosmos_ssl.data.order import Order
from cosmos_ssl.engine.assembly import Assembly, total_steps
from cosmos_ssl.engine.checkpoint import MAX_STEP, latest_checkpoint
from cosmos_ssl.engine.metrics import cut_rows
from cosmos_ssl.engine.rollback import keep_records
from cosmos_ssl.engine.segments import begin_segment
from cosmos_ssl.errors import CheckpointError, UserError, listed
from cosmos_ssl.files import checkpoint_folders, checkpoint_step, set_aside

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Longer:
    """What a run was until now, what it is to be, and the last step to which both are the same."""

    before: int
    now: int
    stable: int

    def start(self, folder: Path) -> Path:
        """Return the checkpoint in ``folder`` to go on from, and set those aside that the old end has shaped.

        Raises CheckpointError.
        """
        newest = latest_checkpoint(folder, self.stable)
        if newest is None:
            raise CheckpointError(f"{folder}: no sound checkpoint of its first {self.stable:,} steps is left")
        keep_records(folder, self.stable)
        drop_rows = partial(cut_rows, folder / "metrics.jsonl")
        begin_segment(folder, checkpoint_step(newest) or 0, drop_rows, same_until=self.stable)
        later = [path for path in checkpoint_folders(folder) if path > newest]
        told = f"; what it came to is kept as {listed([set_aside(path, 'shorter').name for path in later])}"
        steps = [f"{step:,}" for step in (self.before, self.now, checkpoint_step(newest) or 0)]
        log.info("the run of %s steps is prolonged to %s, from step %s on%s", *steps, told if later else "")
        return newest


def same_until(before: Mapping[str, Any], assembly: Assembly, config: Config, order: Order) -> int:
    """To which step a run of the config ``before`` is the same as one of ``config``, but for the length alike."""
    try:
        old = total_steps(Config.model_validate_json(json.dumps(before)), order)
    except ValidationError:  # of another version
        return MAX_STEP
    return stable_steps(assembly, config, old)[0] if old < total_steps(config, order) else MAX_STEP


def stable_steps(assembly: Assembly, config: Config, total: int) -> tuple[int, str]:
    """How many steps of a run of ``total`` would be the same in a longer one, and the config's key that says so."""
    schedule = config.schedule
    found = {"schedule.type": min(total, assembly.schedule.stable_steps(total, schedule.warmup_steps))}
    if config.optimizer.weight_decay_end is not None:
        found["optimizer.weight_decay_end"] = 0
    for name, curve in _curves(assembly, config):
        found[name] = min(total, curve.schedule.stable_steps(total))
    key = min(found, key=lambda name: found[name])
    return found[key], key


def _curves(assembly: Assembly, config: Config) -> Iterator[tuple[str, Curve[float]]]:
    """The curves that the optimiser and the parts hold, by the place of the part."""
    if isinstance(config.optimizer.weight_decay, Curve):
        yield "optimizer.weight_decay", config.optimizer.weight_decay
    for name, weight in assembly.loss_weights.items():
        if isinstance(weight, Curve):
            yield f"losses.{name}.loss_weight", weight
    parts: dict[str, nn.Module | Part] = {"teacher": assembly.teacher}
    parts |= {f"augmenters.{name}": each for name, each in assembly.augmenters.items()}
    parts |= {f"callbacks.{name}": each for name, each in assembly.callbacks.items()}
    for name, module in assembly.model.named_children():
        parts[f"model.{name}" if name in assembly.model.towers else name] = module
    for place, part in parts.items():
        inside = part.named_modules() if isinstance(part, nn.Module) else [("", part)]
        for name, each in inside:
            curves = [value for value in vars(each).values() if isinstance(value, Curve)]
            yield from ((f"{place}.{name}".rstrip("."), curve) for curve in curves)


def plan_longer(
    folder: Path, before: Mapping[str, Any], assembly: Assembly, config: Config, order: Order
) -> Longer | None:
    """Return how the run in ``folder``, begun with the config ``before``, becomes as long as ``config`` says.

    None where it has no checkpoint and begins anew. Raises UserError where it cannot: the run would be shorter, or what
    it has done depends on its length.
    """
    old = total_steps(Config.model_validate_json(json.dumps(before)), order)
    new = total_steps(config, order)
    if new <= old:
        raise UserError(f"it has {old:,} steps, and a run may only grow: {new:,} are asked for")
    stable, key = stable_steps(assembly, config, old)
    steps = [checkpoint_step(path) or 0 for path in checkpoint_folders(folder)]
    if not steps:
        return None
    if stable == 0:
        raise UserError(f"what it has done depends on its length, by {key}")
    if min(steps) > stable:
        raise UserError(
            f"its first {stable:,} steps do not depend on its length (by {key}), and no checkpoint of them is left: "
            f"there are {listed([f'{step:,}' for step in steps])}"
        )
    return Longer(before=old, now=new, stable=stable)
