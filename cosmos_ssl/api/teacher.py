"""DOC api.teacher"""

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
