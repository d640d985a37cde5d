"""Checks of a callback around steps of the small model: what it may change, and that it goes on from its state."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cosmos_ssl.api import CallbackContext, Progress, Writer, floats_of
from cosmos_ssl.config import LoadedConfig
from cosmos_ssl.engine.assembly import Assembly
from cosmos_ssl.engine.callbacks import Callbacks
from cosmos_ssl.engine.metrics import Writers
from cosmos_ssl.testing.examples import example_assembly
from cosmos_ssl.testing.model import _equal as equal
from cosmos_ssl.testing.model import _state as state_of
from cosmos_ssl.testing.model import expect, move

STEPS, EPOCH = 6, 2


class _Story:
    """A run of a callback without training: weights move by themselves, the same way each time."""

    def __init__(self, loaded: LoadedConfig) -> None:
        self.assembly: Assembly = example_assembly(loaded)
        self.assembly.start_teacher()
        self.callbacks = Callbacks(self.assembly.callbacks)
        self.model = self.assembly.model

    def call(self, hook: str, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Call one hook, and hold what it changed to the contract."""
        teacher = self.assembly.teacher.model
        before, kinds, teachers = state_of(self.model), _kinds(self.model), state_of(teacher)
        floats = _floats(self.model)
        progress = Progress(step=step, total_steps=STEPS, steps_per_epoch=EPOCH)
        writers: Writer = Writers([])
        given = {} if metrics is None else metrics
        ctx = CallbackContext(model=self.model, teacher=teacher, progress=progress, writers=writers, metrics=given)
        self.callbacks.call(hook, ctx)
        found = _kinds(self.model)
        wrong = [name for name in {**kinds, **found} if kinds.get(name) != found.get(name)]
        expect(not wrong, f"{hook} makes another parameter of {', '.join(wrong[:3])}: change values, in place")
        equal(teachers, state_of(teacher), f"{hook} changes {{}} of the teacher")
        if all(part.watches for part in self.callbacks.parts.values()) or hook == "at_checkpoint":
            why = "it may change its own state at most" if hook == "at_checkpoint" else "and says that it watches alone"
            equal(before, state_of(self.model), f"{hook} changes {{}}: {why}")
            expect(floats == _floats(self.model), f"{hook} changes attributes of the model: {why}")

    def go(self, first: int, last: int) -> None:
        """Take steps, with an epoch's end where there is one."""
        for step in range(first, last):
            self.call("before_step", step)
            move(self.model)
            self.call("after_step", step)
            if (step + 1) % EPOCH == 0:
                self.call("at_checkpoint", step + 1)
                loss = 1.0 / (1 + step % 3)
                self.call("at_epoch", step + 1, {"loss": loss, "eval/student/top1": loss})

    def state(self) -> dict[str, Any]:
        """What a checkpoint would hold of the callback, as it would give it back."""
        [part] = self.callbacks.parts.values()
        state = part.state_dict()
        plain = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
        try:
            plain = json.loads(json.dumps(plain))
        except TypeError as error:
            raise AssertionError(f"state_dict holds neither a tensor nor what JSON can hold: {error}") from error
        return {**plain, **{name: x.detach().cpu().clone() for name, x in state.items() if isinstance(x, Tensor)}}


def _kinds(model: nn.Module) -> dict[str, tuple[int, torch.Size, bool]]:
    return {name: (id(x), x.shape, x.requires_grad) for name, x in model.named_parameters()}


def _floats(model: nn.Module) -> dict[str, Any]:
    return {
        name: getattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
        for name in floats_of(model, "*")
    }


def _same(first: _Story, second: _Story, message: str) -> None:
    a, b = first.state(), second.state()
    equal(
        {n: torch.as_tensor(x) for n, x in a.items() if isinstance(x, Tensor)},
        {n: torch.as_tensor(x) for n, x in b.items() if isinstance(x, Tensor)},
        message,
    )
    other = [n for n in {**a, **b} if not isinstance(a.get(n), Tensor) and a.get(n) != b.get(n)]
    expect(not other, message.format(", ".join(other)))
    equal(state_of(first.model), state_of(second.model), message)
    expect(_floats(first.model) == _floats(second.model), message.format("attributes of the model"))


def check_hooks(loaded: LoadedConfig) -> None:
    """Hold the one callback of a config to what ``cosmos_ssl.api.callback`` says."""
    whole, again, later = (_Story(loaded) for _ in range(3))
    for story in (whole, again):
        story.call("start", 0)
        story.go(0, STEPS // 2 + 1)
    _same(whole, again, "two runs alike differ in {}: draw from torch alone")
    again.go(STEPS // 2 + 1, STEPS)
    later.model.load_state_dict(state_of(whole.model))
    assert isinstance(later.assembly.teacher.model, nn.Module)
    later.assembly.teacher.load_state_dict(whole.assembly.teacher.state_dict())
    [part] = later.callbacks.parts.values()
    part.load_state_dict(whole.state())
    later.call("start", STEPS // 2 + 1)
    later.go(STEPS // 2 + 1, STEPS)
    _same(again, later, "one that goes on from its state differs in {}: keep what it remembers in state_dict")
