"""For authors of teachers: a second model whose features losses read, and how it follows the student.

A teacher in full::

    from collections.abc import Mapping

    import torch
    from cosmos_ssl.api import Count, Progress, Spec, Teacher
    from torch import nn


    class Snapshot(Teacher):
        '''The student as it was some steps ago.

        ``every``: steps after which it is taken anew.
        '''

        def __init__(self, spec: Spec, *, every: Count = 100) -> None:
            super().__init__()
            self.every = every

        @torch.no_grad()
        def update(self, student: nn.Module, progress: Progress) -> Mapping[str, float]:
            taken = progress.step % self.every == 0
            if taken:
                self.model.load_state_dict(student.state_dict())
            return {"taken": float(taken)}

A config then says ``teacher: {type: snapshot, every: 50}``; ``update_when`` (``before_optimizer_step`` or
``after_optimizer_step``) is the engine's. Options and ``spec``: ``cosmos_ssl.api.part``.

When: ``prepare`` before training and in a dry run, ``start`` once, when the student has its first values (a run that
goes on then loads its checkpoint), ``update`` once a step that is not skipped. In each step ``model`` encodes what some
part asks of the role ``teacher``, in evaluation mode and without gradients.

What must hold: ``model`` shares no tensor with the student and takes no gradients; ``update`` moves nothing but the
teacher, each number by those at its place (where ranks share weights, the models hold this rank's part of each
parameter then), and returns numbers, which are logged as ``teacher/NAME``. What it remembers lies in buffers: they go
into checkpoints with ``model``. ``cosmos_ssl.testing.check_teacher`` tries all this.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import nn

from cosmos_ssl.api.part import Part, Progress


class Teacher(Part, nn.Module, ABC):
    """Owns a second model of the same config, or none. Never receives gradients."""

    present: ClassVar[bool] = True
    """False for the part that stands for 'no teacher'."""
    model: nn.Module

    def prepare(self) -> None:
        """Look for what ``start`` reads, before training: a missing file is better found now. Raises UserError."""
        return

    def start(self, build: Callable[[], nn.Module], student: nn.Module) -> None:
        """Make the teacher's model: rebuilt from the config, then loaded with the student's start values."""
        self.model = build()
        self.model.load_state_dict(student.state_dict())
        self.model.requires_grad_(False).eval()

    @abstractmethod
    def update(self, student: nn.Module, progress: Progress) -> Mapping[str, float]:
        """Move the teacher once a step; return what is worth logging (the momentum)."""
