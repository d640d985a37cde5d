"""Everything of a run that moves: model, teacher, optimiser, scaler, counters, and the step they stand at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.profiler import record_function

from cosmos_ssl.api import Role
from cosmos_ssl.api.part import describe
from cosmos_ssl.config import Config
from cosmos_ssl.data.budget import BadSampleBudget
from cosmos_ssl.engine.assembly import Assembly
from cosmos_ssl.engine.checkpoint import Snapshot, load_exactly, load_role, load_tensors, read_state, to_files
from cosmos_ssl.engine.exchange import share_start
from cosmos_ssl.engine.optim import Optimizer
from cosmos_ssl.engine.parallel import Parts, Sharding
from cosmos_ssl.errors import CheckpointError, UserError
from cosmos_ssl.models.contract import blaming
from cosmos_ssl.models.model import Model

_MODEL = "model."
_TEACHER = "teacher."


@dataclass(slots=True)
class Counters:
    """Updates that were skipped, over the whole run."""

    nonfinite_steps: int = 0
    nonfinite_in_a_row: int = 0
    overflowed_steps: int = 0
    """Of fp16: part of how the scaler finds its scale, no fault."""

    @property
    def skipped(self) -> int:
        """Updates that were left out, for whichever reason."""
        return self.nonfinite_steps + self.overflowed_steps


class RunState:
    """Owns what training changes; ``snapshot`` and ``restore`` are exact to the last bit."""

    def __init__(self, assembly: Assembly, config: Config, device: torch.device, precision: str = "fp32") -> None:
        """Put the model on ``device``, start the teacher, make the optimiser. Raises UserError."""
        self.device = device
        self.precision = precision
        self.step = 0
        self.model = assembly.model.to(device)
        self.teacher = assembly.teacher
        with blaming(self.teacher, "teacher"):
            assembly.start_teacher()
        self.teacher.to(device)
        self.sharding = Sharding(config, device, precision)
        if self.sharding.on:
            share_start(self.replicas)
        for each in self.models.values():
            self.sharding.share(each)
        self.parts = Parts(*self.models.values())
        self.split = self.sharding.split(config.checkpoints.shards)
        self.optimizer = Optimizer(self.model, config, device, assembly.optimizer, assembly.schedule)
        self.scaler = torch.amp.GradScaler(device.type) if precision == "amp_fp16" else None
        self.budget = BadSampleBudget(config.loader.error_budget)
        self.counters = Counters()
        if config.training.compile:
            self._compile(device)

    @property
    def models(self) -> dict[Role, Model]:
        """``student`` and, where there is one, ``teacher``."""
        teacher: dict[Role, Model] = {"teacher": cast(Model, self.teacher.model)} if self.teacher.present else {}
        return {"student": self.model, **teacher}

    @property
    def replicas(self) -> dict[str, Tensor]:
        """What is the same on every rank, by role and name: parameters and buffers of student and teacher, but those
        that are not persistent, which are a rank's own.
        """
        found: dict[str, Tensor] = {}
        for role, model in self.models.items():
            found |= {f"{role}.{name}": x for name, x in model.state_dict(keep_vars=True).items()}
        return found | {f"{_TEACHER}{name}": value for name, value in self._teacher_extras().items()}

    def owner(self, replica: str) -> str:
        """The part that a tensor of ``replicas`` belongs to, for a message."""
        role, _, name = replica.partition(".")
        parts = next((model.parts() for own, model in self.models.items() if own == role), {})
        return next(
            (told for prefix, told in parts.items() if name.startswith(f"{prefix}.")), describe(self.teacher, "teacher")
        )

    @record_function("checkpoint")
    def snapshot(self, about: Mapping[str, Any]) -> Snapshot:
        """A copy in host memory; ``about`` goes into the state as it is.

        A collective where ranks share weights; each rank's copy holds what it writes.
        """
        own = {f"{_TEACHER}{name}": value for name, value in self._teacher_extras().items()}
        tensors: dict[str, Any] = {role: model.state_dict() for role, model in self.models.items()}
        tensors["optimizer"] = self.optimizer.tensors() | own
        buffers = {name for model in self.models.values() for name, _ in model.named_buffers()}
        state = {
            "step": self.step,
            **about,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "counters": asdict(self.counters),
            "bad_samples": self.budget.state_dict(),
        }
        copies, files = to_files(tensors, self.split)
        return Snapshot(
            step=self.step,
            tensors=copies,
            state=state,
            split=self.split,
            files=files,
            buffers=buffers | own.keys(),
            settled=not self.counters.nonfinite_in_a_row,
        )

    def restore(self, path: Path) -> dict[str, Any]:
        """Become what ``snapshot`` saw, from a checkpoint folder; the folder's state. Raises CheckpointError."""
        state = read_state(path)
        for role, model in self.models.items():
            load_exactly(model, load_role(path, role), f"{path}/{role}.safetensors")
        tensors = load_tensors(path, "optimizer")
        for name, value in self._teacher_extras().items():
            told = tensors.pop(f"{_TEACHER}{name}", None)
            if told is None or told.shape != value.shape:
                raise CheckpointError(
                    f"{path}/optimizer.safetensors does not fit the teacher: {name} is missing or of another shape"
                )
            value.copy_(told)
        self.optimizer.load(tensors)
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.counters = Counters(**state["counters"])
        self.budget.load_state_dict(state["bad_samples"])
        self.step = state["step"]
        return state

    def _teacher_extras(self) -> dict[str, Tensor]:
        """Return what a teacher part holds beside its model."""
        return {
            name: value.detach() for name, value in self.teacher.state_dict().items() if not name.startswith(_MODEL)
        }

    def _compile(self, device: torch.device) -> None:
        """Compile the towers, in place: names stay, and each compiles when first called.

        Raises UserError as ``check_compiler``.
        """
        check_compiler(device)
        for model in self.models.values():
            for tower in model.towers.values():
                tower.compile()


def check_compiler(device: torch.device) -> None:
    """Raise UserError where torch cannot compile for ``device``."""
    try:
        torch.compile(torch.Tensor.sin)(torch.zeros(2, device=device))
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"training.compile: torch cannot compile here ({reason}). It needs a C++ compiler and Python's headers "
            "(Debian: g++, python3-dev). Install them, or leave training.compile out"
        ) from error
