"""A teacher that never moves, read from a checkpoint (of another size, if you like)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from torch import nn

import cosmos_ssl
from cosmos_ssl.api import Progress, Spec, Teacher, UserError


class Frozen(Teacher):
    """A trained model as teacher: a run folder, one of our checkpoints or an official file."""

    def __init__(self, spec: Spec, *, checkpoint: str, which: Literal["student", "teacher"] = "teacher") -> None:
        """``checkpoint`` is anything that ``cosmos_ssl.load`` reads, ``which`` the role to take from it."""
        super().__init__()
        self.checkpoint = checkpoint
        self.which = which
        self.embed_dim = spec.embed_dim

    def start(self, build: Callable[[], nn.Module], student: nn.Module) -> None:
        """Read the checkpoint. Raises UserError where its shared width is another."""
        encoder = cosmos_ssl.load(self.checkpoint, which=self.which)
        if encoder.spec.embed_dim != self.embed_dim:
            raise UserError(f"teacher: {self.checkpoint} has embed_dim {encoder.spec.embed_dim}, the student {self.embed_dim}")
        self.model = encoder.model.requires_grad_(False).eval()

    def update(self, student: nn.Module, progress: Progress) -> Mapping[str, float]:
        """Nothing moves."""
        return {}
