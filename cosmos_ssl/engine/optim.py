"""The optimiser: AdamW by parameter rules, its schedules, and its state by parameter name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from cosmos_ssl.api import Head, LayeredTower, Loss, ParameterRule, Progress, Tower
from cosmos_ssl.config import OptimizerConfig, ScheduleConfig
from cosmos_ssl.errors import CheckpointError, UserError, did_you_mean, listed
from cosmos_ssl.models.contract import blaming
from cosmos_ssl.models.model import Model

_STATE = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What the rules say of one parameter."""

    lr_scale: float = 1.0
    weight_decay_scale: float = 1.0
    frozen_epochs: float = 0.0


def settings(model: Model, config: OptimizerConfig) -> dict[str, Setting]:
    """The setting of every parameter of ``model``: layer decay, then the parts' rules, then the config's.

    Raises UserError for a rule of the config that matches nothing, and for a layer decay that a tower cannot serve.
    """
    names = [name for name, _ in model.named_parameters()]
    depth = dict(_layer_factors(model, config.layer_decay)) if config.layer_decay is not None else {}
    rules = [*_part_rules(model), *_config_rules(config, names)]
    found = {}
    for name in names:
        setting = Setting()
        for rule in rules:
            if fnmatchcase(name, rule.match):
                given = {key: getattr(rule, key) for key in ("lr_scale", "weight_decay_scale", "frozen_epochs")}
                setting = replace(setting, **{key: value for key, value in given.items() if value is not None})
        found[name] = replace(setting, lr_scale=setting.lr_scale * depth.get(name, 1.0))
    return found


def trained(model: Model, config: OptimizerConfig) -> dict[str, Setting]:
    """The settings of the parameters that are trained, for a while at least. Raises UserError as ``settings``, and
    where there are none.
    """
    rules, found = settings(model, config), dict(model.named_parameters())
    moved = {name: rules[name] for name, x in found.items() if x.requires_grad and rules[name].frozen_epochs < math.inf}
    if not moved:
        raise UserError("optimizer: every parameter is frozen, so there is nothing to train")
    return moved


def _layer_factors(model: Model, decay: float) -> Iterator[tuple[str, float]]:
    for modality, tower in model.towers.items():
        if not isinstance(tower, LayeredTower):
            raise UserError(
                f"optimizer.layer_decay: the {modality} tower '{tower.part_name}' does not tell its layers. "
                "Leave it out"
            )
        for name, _ in tower.named_parameters():
            yield f"{modality}.{name}", decay ** (tower.layer_count - tower.layer_of(name))


def _part_rules(model: Model) -> Iterator[ParameterRule]:
    """The rules of towers, heads and losses, with full names."""
    parts: list[tuple[str, Tower | Head | Loss]] = [(modality, tower) for modality, tower in model.towers.items()]
    parts += [(f"heads.{name}", model.head(name)) for name in model.heads]
    parts += [(f"losses.{name}", model.loss(name)) for name in model.losses]
    for prefix, part in parts:
        with blaming(part, prefix if "." in prefix else f"model.{prefix}"):
            rules = list(part.parameter_rules())
        for rule in rules:
            yield replace(rule, match=f"{prefix}.{rule.match}")


def _config_rules(config: OptimizerConfig, names: Sequence[str]) -> Iterator[ParameterRule]:
    for number, rule in enumerate(config.rules):
        if not any(fnmatchcase(name, rule.match) for name in names):
            raise UserError(
                f"optimizer.rules.{number}.match: '{rule.match}' matches no parameter."
                f"{did_you_mean(rule.match, names)} Names look like {', '.join(names[:3])}"
            )
        yield ParameterRule(
            match=rule.match,
            lr_scale=rule.lr_scale,
            weight_decay_scale=rule.weight_decay_scale,
            frozen_epochs=math.inf if rule.frozen else rule.frozen_epochs,
        )


def learning_rate(optimizer: OptimizerConfig, schedule: ScheduleConfig, step: int, total_steps: int) -> float:
    """Linear warm-up, lr (step + 1) / warmup, then a cosine to ``final_lr`` over the steps that are left."""
    if step < schedule.warmup_steps:
        return optimizer.lr * (step + 1) / schedule.warmup_steps
    done = (step - schedule.warmup_steps) / (total_steps - schedule.warmup_steps)
    return schedule.final_lr + (optimizer.lr - schedule.final_lr) * (1 + math.cos(math.pi * done)) / 2


def weight_decay(optimizer: OptimizerConfig, step: int, total_steps: int) -> float:
    """Fixed, or a cosine to ``weight_decay_end`` over all steps (arXiv 2104.14294, section 3)."""
    if optimizer.weight_decay_end is None:
        return optimizer.weight_decay
    end = optimizer.weight_decay_end
    return end + (optimizer.weight_decay - end) * (1 + math.cos(math.pi * step / total_steps)) / 2


class Optimizer:
    """AdamW over a model's trainable parameters; what a rule freezes for good stops needing gradients here."""

    def __init__(
        self, model: Model, optimizer: OptimizerConfig, schedule: ScheduleConfig, device: torch.device
    ) -> None:
        self.config = optimizer
        self.schedule = schedule
        self.lr = 0.0
        grouped: dict[tuple[float, float, float], list[Tensor]] = {}
        self.names: dict[str, Tensor] = {}
        rules = trained(model, optimizer)
        for name, parameter in model.named_parameters():
            rule = rules.get(name)
            if rule is None:
                parameter.requires_grad_(False)
                continue
            self.names[name] = parameter
            decay = rule.weight_decay_scale if parameter.dim() >= 2 else 0.0
            grouped.setdefault((rule.lr_scale, decay, rule.frozen_epochs), []).append(parameter)
        groups = [
            {"params": parameters, "lr_scale": lr_scale, "weight_decay_scale": decay, "frozen_epochs": frozen}
            for (lr_scale, decay, frozen), parameters in grouped.items()
        ]
        self.fused = device.type in ("cpu", "cuda")
        self.torch = torch.optim.AdamW(
            groups,
            lr=optimizer.lr,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            fused=self.fused or None,
        )

    def set(self, progress: Progress) -> None:
        """Set learning rate and weight decay of the step under way."""
        self.lr = learning_rate(self.config, self.schedule, progress.step, progress.total_steps)
        decay = weight_decay(self.config, progress.step, progress.total_steps)
        for group in self.torch.param_groups:
            group["lr"] = self.lr * group["lr_scale"]
            group["weight_decay"] = decay * group["weight_decay_scale"]

    def drop_frozen(self, progress: Progress) -> None:
        """Drop the gradients of parameters that are frozen until a later epoch."""
        for group in self.torch.param_groups:
            if progress.epoch < group["frozen_epochs"]:
                for parameter in group["params"]:
                    parameter.grad = None

    def clip(self, max_norm: float | None) -> Tensor:
        """Scale the gradients down to ``max_norm``, if given; the norm they had, a scalar."""
        parameters = [p for p in self.names.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def step(self) -> None:
        """Move the parameters."""
        self.torch.step()

    def tensors(self) -> dict[str, Tensor]:
        """The state by parameter: ``NAME.step``, ``NAME.exp_avg``, ``NAME.exp_avg_sq``; none before a first update."""
        return {
            f"{name}.{key}": value
            for name, p in self.names.items()
            for key, value in self.torch.state.get(p, {}).items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take a state that ``tensors`` gave. Raises CheckpointError where it is not this model's."""
        strangers = listed(sorted(set(tensors) - {f"{name}.{key}" for name in self.names for key in _STATE}))
        if strangers:
            raise CheckpointError(f"the optimiser's state holds parameters that are not trained here: {strangers}")
        for name, parameter in self.names.items():
            own = {key: tensors[f"{name}.{key}"] for key in _STATE if f"{name}.{key}" in tensors}
            if not own:
                continue
            if set(own) != set(_STATE) or any(own[key].shape != parameter.shape for key in _STATE[1:]):
                raise CheckpointError(f"the optimiser's state of {name} is incomplete or of another shape")
            step = own["step"].to(parameter.device if self.fused else "cpu", torch.float32, copy=True)
            moments = {key: torch.empty_like(parameter, requires_grad=False).copy_(own[key]) for key in _STATE[1:]}
            self.torch.state[parameter] = {"step": step, **moments}
