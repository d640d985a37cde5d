"""The optimiser: groups by parameter rules, learning rate and weight decay of a step, and state by parameter name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from cosmos_ssl import api
from cosmos_ssl.api import Head, LayeredTower, Loss, ParameterRule, Progress, Schedule, Tower, value_at
from cosmos_ssl.config import Config, OptimizerConfig, ScheduleConfig
from cosmos_ssl.errors import CheckpointError, UserError, did_you_mean, listed
from cosmos_ssl.functional import all_max, is_sharded, laid_out, local
from cosmos_ssl.functional.placement import sum_of_parts
from cosmos_ssl.models.adapters import plain_name
from cosmos_ssl.models.contract import Fault, blaming
from cosmos_ssl.models.model import Model

ELEMENTWISE = ("AdamW", "Adam", "SGD", "Lion", "NAdam", "RAdam", "Adamax", "Adagrad", "RMSprop")
"""Optimisers that move each number by its own gradients alone, so that ranks may each move a part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What the rules say of one parameter."""

    lr_scale: float = 1.0
    weight_decay_scale: float = 1.0
    decay_1d: bool = False
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
                given = {each.name: getattr(rule, each.name) for each in fields(Setting)}
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
            yield f"{modality}.{name}", decay ** (tower.layer_count - tower.layer_of(plain_name(name)))


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
    for key, rule in config.rules.items():
        if not any(fnmatchcase(name, rule.match) for name in names):
            place = key if "." in key else f"optimizer.rules.{key}.match"
            raise UserError(
                f"{place}: '{rule.match}' matches no parameter."
                f"{did_you_mean(rule.match, names)} Names look like {', '.join(names[:3])}"
            )
        yield ParameterRule(
            match=rule.match,
            lr_scale=rule.lr_scale,
            weight_decay_scale=rule.weight_decay_scale,
            decay_1d=rule.decay_1d,
            frozen_epochs=math.inf if rule.frozen else rule.frozen_epochs,
        )


def learning_rate(lr: float, config: ScheduleConfig, schedule: Schedule, progress: Progress) -> float:
    """The learning rate of a step: a linear warm-up, then the schedule's way to ``final_lr``. Raises PluginError.

    Warm-up: start + (lr - start) (step + 1) / warmup.
    """
    if progress.step < config.warmup_steps:
        start = config.warmup_start_lr
        return start + (lr - start) * (progress.step + 1) / config.warmup_steps
    with blaming(schedule, "schedule"):
        left = schedule.left(progress, config.warmup_steps)
        if not 0 <= left <= 1:
            raise Fault(f"has {left} of the way left at step {progress.step:,}, expected 0 to 1")
    return config.final_lr + (lr - config.final_lr) * left


def weight_decay(config: OptimizerConfig, progress: Progress) -> float:
    """A number or curve, or a cosine to ``weight_decay_end`` over all steps (arXiv 2104.14294, section 3)."""
    start = value_at(config.weight_decay, progress)
    if config.weight_decay_end is None:
        return start
    end = config.weight_decay_end
    return end + (start - end) * (1 + math.cos(math.pi * progress.step / progress.total_steps)) / 2


class Optimizer:
    """Moves a model's trainable parameters; what a rule freezes for good stops needing gradients here."""

    def __init__(
        self,
        model: Model,
        sections: Config,
        device: torch.device,
        part: api.Optimizer,
        schedule: Schedule,
    ) -> None:
        """``part`` makes the optimiser, ``schedule`` is the learning rate's. Raises UserError, PluginError."""
        self.sections, self.part, self.schedule = sections, part, schedule
        config = sections.optimizer
        self.lr = 0.0
        grouped: dict[tuple[float, float, float], dict[str, Tensor]] = {}
        self.sharded: list[Tensor] = []
        """Parameters of which this rank holds a part."""
        self.names: dict[str, Tensor] = {}
        rules = trained(model, config)
        for name, parameter in model.named_parameters():
            rule = rules.get(name)
            if rule is None:
                parameter.requires_grad_(False)
                continue
            self.names[name] = parameter
            decay = rule.weight_decay_scale if parameter.dim() >= 2 or rule.decay_1d else 0.0
            grouped.setdefault((rule.lr_scale, decay, rule.frozen_epochs), {})[name] = parameter
            if is_sharded(parameter):
                self.sharded.append(parameter)
        decays = value_at(config.weight_decay, Progress(step=0, total_steps=1))
        groups: list[dict[str, Any]] = [
            {
                "params": parameters,
                "lr": config.lr * lr_scale,
                "weight_decay": decays * decay,
                "lr_scale": lr_scale,
                "weight_decay_scale": decay,
                "frozen_epochs": frozen,
            }
            for (lr_scale, decay, frozen), named in grouped.items()
            for parameters in _alike(named.values())
        ]
        with blaming(part, "optimizer"):
            try:
                self.torch = part.make(groups, device)
            except ValueError as error:
                raise UserError(f"optimizer: {error}") from error
            if not isinstance(self.torch, torch.optim.Optimizer):
                raise Fault(f"made a {type(self.torch).__name__}, expected a torch.optim.Optimizer")
            if [group.get("params") for group in self.torch.param_groups] != [group["params"] for group in groups]:
                raise Fault("has other groups than it was given")
        if self.sharded and (name := type(self.torch).__name__) not in ELEMENTWISE:
            raise UserError(
                f"optimizer: {name} moves a weight by what others of its matrix are, of which ranks hold parts alone. "
                f"Take training.parallel=replicate, or one of {', '.join(ELEMENTWISE)}"
            )
        made = iter(self.torch.param_groups)
        self._groups = {next(iter(named)): [next(made) for _ in _alike(named.values())] for named in grouped.values()}
        """By the name of the first parameter; two where it has sharded parameters and whole ones."""
        self._made = {name: dict(groups[0]) for name, groups in self._groups.items()}

    def set(self, progress: Progress) -> None:
        """Set learning rate and weight decay of the step under way."""
        optimizer = self.sections.optimizer
        self.lr = learning_rate(optimizer.lr, self.sections.schedule, self.schedule, progress)
        decay = weight_decay(optimizer, progress)
        for group in self.torch.param_groups:
            group["lr"] = self.lr * group["lr_scale"]
            group["weight_decay"] = decay * group["weight_decay_scale"]

    def drop_frozen(self, progress: Progress) -> None:
        """Drop the gradients of parameters that are frozen until a later epoch."""
        for group in self.torch.param_groups:
            if progress.epoch < group["frozen_epochs"]:
                for parameter in group["params"]:
                    parameter.grad = None

    @torch.no_grad()
    def clip(self) -> Tensor:
        """Scale the gradients down to ``training.clip_grad_norm``, if given. Returns the norm they had, a scalar.

        By ``training.clip_grad_per``, the norm is that of all gradients, of a module's or of a parameter's.
        """
        training = self.sections.training
        grads: dict[str, list[Tensor]] = {}
        for name, parameter in self.names.items():
            if parameter.grad is not None:
                grads.setdefault(_clipped_as(name, training.clip_grad_per), []).append(parameter.grad)
        norms = self._norms([*grads.values()])
        if training.clip_grad_norm is not None:
            for group, norm in zip(grads.values(), norms, strict=True):
                factor = (training.clip_grad_norm / (norm + 1e-6)).clamp(max=1.0)
                torch._foreach_mul_([local(x) for x in group], factor)
        return norms[0] if len(norms) == 1 else torch.nn.utils.get_total_norm(norms)

    def _norms(self, grads: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """The norm of each list of gradients; of sharded ones, squares are summed over ranks."""
        total = torch.nn.utils.get_total_norm
        if not self.sharded:
            return [total(group) for group in grads]

        def squares(sharded: bool) -> Tensor:
            kinds = ([local(x) for x in group if is_sharded(x) is sharded] for group in grads)
            return torch.stack([total(kind).to(self.sharded[0].device, torch.float64) for kind in kinds]).square()

        return [*(sum_of_parts(squares(True), self.sharded) + squares(False)).sqrt().float()]

    @torch.no_grad()
    def unscale(self, scaler: torch.amp.GradScaler) -> None:
        """Divide the gradients by the scale of the loss; all ranks note it where any gradient is not finite."""
        if not self.sharded:
            scaler.unscale_(self.torch)
            return
        grads = [part for p in self.names.values() if p.grad is not None and (part := local(p.grad)).numel()]
        largest = torch.stack([torch.zeros((), device=self.sharded[0].device), *torch._foreach_norm(grads, torch.inf)])
        faulty = all_max((~largest.isfinite()).any().float())
        told = torch.where(faulty > 0, torch.inf, 0.0)  # by it a rank learns of another's
        given = [torch.empty_like(grad) for grad in (*grads, told)]
        for each, grad in zip(given, (*grads, told), strict=True):
            each.grad = grad
        scaler.unscale_(cast(torch.optim.Optimizer, SimpleNamespace(param_groups=[{"params": given}])))

    def step(self) -> None:
        """Move the parameters."""
        with blaming(self.part, "optimizer"):
            self.torch.step()

    # ------------------------------------------------------------------ its state, by parameter name

    def tensors(self) -> dict[str, Tensor]:
        """The state by parameter: ``NAME.exp_avg``, of numbers ``NAME.step!``; none before a first update.

        What the optimiser counts in a group (``@``) stands by the group's first parameter. Raises PluginError.
        """
        found: dict[str, Tensor] = {}
        with blaming(self.part, "optimizer"):
            for name, parameter in self.names.items():
                for key, value in self.torch.state.get(parameter, {}).items():
                    found |= {f"{name}.{field}": each for field, each in _fields(key, value, parameter.device)}
            for name, (group, *_) in self._groups.items():
                made = self._made[name]
                for key, value in group.items():
                    new = isinstance(value, Tensor) or (isinstance(value, int | float) and made.get(key) != value)
                    if new and key not in _SET:
                        values = _fields(key, value, self.names[name].device)
                        found |= {f"{name}.{field}@": each for field, each in values}
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take a state that ``tensors`` gave. Raises CheckpointError where it is not this model's."""
        told: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            told.setdefault(key.rpartition(".")[0], {})[key.rpartition(".")[2]] = value
        strangers = listed(sorted(key for key in tensors if key.rpartition(".")[0] not in self.names))
        if strangers:
            raise CheckpointError(f"the optimiser's state holds parameters that are not trained here: {strangers}")
        self.torch.state.clear()
        for name, groups in self._groups.items():  # a run that goes back has counted since
            for group in groups:
                for key in group.keys() - set(_SET):
                    del group[key]
                group |= {key: value for key, value in self._made[name].items() if key not in _SET}
        of = {id(p): groups for groups in self._groups.values() for group in groups for p in group["params"]}
        for name, values in told.items():
            parameter, groups = self.names[name], of[id(self.names[name])]
            group = groups[0]
            for each in groups:
                _put(each, {key[:-1]: value for key, value in values.items() if key.endswith("@")}, parameter, each)
            own = {key: value for key, value in values.items() if not key.endswith("@")}
            if not own:
                continue
            known = self.part.state
            odd = any(value.dim() and value.shape != parameter.shape for value in own.values())
            if known and (set(own) != set(known) or odd):
                raise CheckpointError(f"the optimiser's state of {name} is incomplete or of another shape")
            self.torch.state[parameter] = {}
            _put(self.torch.state[parameter], own, parameter, group)


def _clipped_as(name: str, per: str) -> str:
    """The key of the gradients that are clipped together with this parameter's."""
    if per == "parameter":
        return name
    tower = name.partition(".")[0]
    return "" if per == "model" else tower if tower in ("image", "text") else ".".join(name.split(".")[:2])


def _alike(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Parameters as one list, or as two where some are sharded: no kernel takes both together."""
    kinds: dict[bool, list[Tensor]] = {}
    for parameter in parameters:
        kinds.setdefault(is_sharded(parameter), []).append(parameter)
    return list(kinds.values())


_SET = ("params", "lr", "weight_decay", "lr_scale", "weight_decay_scale", "frozen_epochs")
"""Keys of a group that the engine sets."""
_FIELD = re.compile(r"(?P<key>[^\[~!]+)(?:\[(?P<index>\d+)\])?(?P<host>~?)(?P<number>!?)")


def _fields(key: str, value: Any, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """A value of a state as tensors: ``KEY``, a number ``KEY!``, of a list ``KEY[0]``; ``~``: on the host, although the
    parameter is not.
    """
    if isinstance(value, Tensor):
        host = value.dim() == 0 and value.device.type == "cpu" != device.type and key != "step"
        yield f"{key}{'~' * host}", value
    elif isinstance(value, int | float):
        yield f"{key}!", torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)
    elif isinstance(value, list | tuple) and "[" not in key:
        for index, each in enumerate(value):
            yield from _fields(f"{key}[{index}]", each, device)
    elif value is not None:
        raise Fault(f"keeps a {type(value).__name__} as '{key}', which no checkpoint holds")


def _put(state: dict[str, Any], fields: Mapping[str, Tensor], parameter: Tensor, group: Mapping[str, Any]) -> None:
    """Put what ``_fields`` gave into a state, in the order of lists. Raises CheckpointError."""
    on_device = bool(group.get("fused") or group.get("capturable"))
    for name, value in fields.items():
        found = _FIELD.fullmatch(name)
        if found is None:
            raise CheckpointError(f"the optimiser's state holds '{name}', which is no name of a field")
        key, home = found["key"], parameter.device
        if found["host"] or (key == "step" and value.dim() == 0 and not on_device):
            home = torch.device("cpu")
        own: Any = value.item() if found["number"] else value.to(home, copy=True)
        if value.dim() and is_sharded(parameter):
            own = laid_out(value, parameter)
        elif value.dim() and value.shape == parameter.shape:  # in the parameter's order in memory
            own = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
        if found["index"] is None:
            state[key] = own
        else:
            state.setdefault(key, []).append(own)
