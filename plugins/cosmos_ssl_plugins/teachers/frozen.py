"""A teacher that never moves, read from a checkpoint (of another size, if you like)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from torch import nn

import cosmos_ssl
from cosmos_ssl.api import Aside, Location, Progress, Spec, Teacher, UserError


class Frozen(Teacher):
    """A trained model as teacher, of any architecture and size that reads the same pictures and token ids.

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
        self.student = spec

    def prepare(self) -> None:
        """Read the checkpoint, as ``start`` does."""
        self._read()

    def start(self, build: Callable[[], nn.Module], student: nn.Module) -> None:
        """Read the checkpoint.

        Raises UserError where its shared width is another, or where it reads other pictures or token ids.
        """
        self.model = self._read()

    def _read(self) -> nn.Module:
        encoder = cosmos_ssl.load(self.checkpoint, which=self.which, trust_code=self.trust_code)
        for what, theirs, own in _inputs(encoder.spec, self.student):
            if theirs != own:
                raise UserError(f"teacher: {self.checkpoint} has {what} {theirs}, the student {own}")
        return encoder.model.with_losses({}).requires_grad_(False).eval()

    def update(self, student: nn.Module, progress: Progress) -> Mapping[str, float]:
        """Nothing moves."""
        return {}


def _inputs(teacher: Spec, student: Spec) -> Iterator[tuple[str, object, object]]:
    """What must be the same of both: its name, the teacher's, and the student's."""
    yield "embed_dim", teacher.embed_dim, student.embed_dim
    if teacher.image is not None and student.image is not None:
        yield "model.image.mean", list(teacher.image.mean), list(student.image.mean)
        yield "model.image.std", list(teacher.image.std), list(student.image.std)
    if teacher.text is not None and student.text is not None:
        yield "token ids", min(teacher.vocab_size, student.vocab_size), student.vocab_size  # more would have no place
