"""A teacher that never moves, read from a checkpoint (of another size, if you like)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from torch import nn

import cosmos_ssl
from cosmos_ssl.api import Aside, Location, Progress, Spec, Teacher, UserError


class Frozen(Teacher):
    """A trained model as teacher: a run folder, one of our checkpoints or an official file.

    ``checkpoint``: anything that ``cosmos_ssl.load`` reads.
    ``which``: the role to take from it.
    ``trust_code``: import what its run names as ``python:MODULE.CLASS``, too, which runs that code.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        checkpoint: Location,
        which: Literal["student", "teacher"] = "teacher",
        trust_code: Aside[bool] = False,
    ) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.which = which
        self.trust_code = trust_code
        self.embed_dim = spec.embed_dim

    def prepare(self) -> None:
        """Read the checkpoint, as ``start`` does."""
        self._read()

    def start(self, build: Callable[[], nn.Module], student: nn.Module) -> None:
        """Read the checkpoint. Raises UserError where its shared width is another."""
        self.model = self._read()

    def _read(self) -> nn.Module:
        encoder = cosmos_ssl.load(self.checkpoint, which=self.which, trust_code=self.trust_code)
        if encoder.spec.embed_dim != self.embed_dim:
            raise UserError(
                f"teacher: {self.checkpoint} has embed_dim {encoder.spec.embed_dim}, the student {self.embed_dim}"
            )
        return encoder.model.with_losses({}).requires_grad_(False).eval()

    def update(self, student: nn.Module, progress: Progress) -> Mapping[str, float]:
        """Nothing moves."""
        return {}
