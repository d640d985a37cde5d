"""The part that stands for 'no teacher'."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from cosmos_ssl.api import Progress, Spec, Teacher


class NoTeacher(Teacher):
    """No teacher: parts that read one are refused before training."""

    present = False

    def __init__(self, spec: Spec) -> None:
        """No options."""
        super().__init__()

    def start(self, build: Callable[[], nn.Module], student: nn.Module) -> None:
        """Nothing to make."""

    def update(self, student: nn.Module, progress: Progress) -> Mapping[str, float]:
        """Nothing to move."""
        return {}
