"""Everything of a run that moves: model, teacher, optimiser, scaler, counters, and the step they stand at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.profiler import record_function

from cosmos_ssl.api import Progress
from cosmos_ssl.config import Config
from cosmos_ssl.data.budget import BadSampleBudget
from cosmos_ssl.engine.assembly import Assembly
from cosmos_ssl.engine.checkpoint import Snapshot, load_exactly, load_tensors, read_state, to_host
from cosmos_ssl.engine.optim import Optimizer
from cosmos_ssl.errors import CheckpointError, UserError
from cosmos_ssl.models.contract import blaming, checked_moves
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


class RunState:
    """Owns what training changes; ``snapshot`` and ``restore`` are exact to the last bit."""

    def __init__(self, assembly: Assembly, config: Config, device: torch.device, precision: str = "fp32") -> None:
        """Put the model on ``device``, start the teacher, make the optimiser. Raises UserError."""
        self.assembly = assembly
        self.step = 0
        self.model = assembly.model.to(device)
        self.teacher = assembly.teacher
        with blaming(self.teacher, "teacher"):
            self.teacher.start(assembly.build_model, self.model)
        self.teacher.to(device)
        self.optimizer = Optimizer(self.model, config.optimizer, config.schedule, device)
        self.scaler = torch.amp.GradScaler(device.type) if precision == "amp_fp16" else None
        self.budget = BadSampleBudget(config.loader.error_budget)
        self.counters = Counters()
        if config.training.compile:
            self._compile(device)

    @property
    def teacher_model(self) -> Model | None:
        """The teacher's model, if there is a teacher."""
        return cast(Model, self.teacher.model) if self.teacher.present else None

    def move(self, progress: Progress) -> dict[str, float]:
        """One update from the gradients that are there: teacher and optimiser in the order asked for, then the
        hooks.
        """
        before = self.assembly.update_when == "before_optimizer_step"
        moved = self._move_teacher(progress) if before else {}
        with record_function("optimizer"):
            self.optimizer.step()
        moved |= {} if before else self._move_teacher(progress)
        self.model.after_step()
        if self.teacher_model is not None:
            self.teacher_model.after_step()
        return moved

    @record_function("teacher update")
    def _move_teacher(self, progress: Progress) -> dict[str, float]:
        with blaming(self.teacher, "teacher"):
            return checked_moves(self.teacher.update(self.model, progress))

    @record_function("checkpoint")
    def snapshot(self, about: Mapping[str, Any]) -> Snapshot:
        """A copy in host memory; ``about`` goes into the state as it is."""
        own = {f"{_TEACHER}{name}": value for name, value in self._teacher_extras().items()}
        tensors = {"student": self.model.state_dict(), "optimizer": self.optimizer.tensors() | own}
        if self.teacher_model is not None:
            tensors["teacher"] = self.teacher_model.state_dict()
        buffers = {
            name for model in (self.model, self.teacher_model) if model is not None for name, _ in model.named_buffers()
        }
        state = {
            "step": self.step,
            **about,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "counters": asdict(self.counters),
            "bad_samples": self.budget.state_dict(),
        }
        return Snapshot(
            step=self.step,
            tensors={name: to_host(each) for name, each in tensors.items()},
            state=state,
            buffers=buffers | own.keys(),
            settled=not self.counters.nonfinite_in_a_row,
        )

    def restore(self, path: Path) -> dict[str, Any]:
        """Become what ``snapshot`` saw, from a checkpoint folder; the folder's state. Raises CheckpointError."""
        state = read_state(path)
        load_exactly(self.model, load_tensors(path, "student"), f"{path}/student.safetensors")
        if self.teacher_model is not None:
            load_exactly(self.teacher_model, load_tensors(path, "teacher"), f"{path}/teacher.safetensors")
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
        """What a teacher part holds beside its model."""
        return {
            name: value.detach() for name, value in self.teacher.state_dict().items() if not name.startswith(_MODEL)
        }

    def _compile(self, device: torch.device) -> None:
        """Compile the towers, in place: names stay, and each compiles when first called.

        Raises UserError where torch cannot.
        """
        try:
            torch.compile(torch.Tensor.sin)(torch.zeros(2, device=device))
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"training.compile: torch cannot compile here ({reason}). It needs a C++ compiler and Python's headers "
                "(Debian: g++, python3-dev). Install them, or leave training.compile out"
            ) from error
        for model in (self.model, self.teacher_model):
            for tower in model.towers.values() if model is not None else ():
                tower.compile()
