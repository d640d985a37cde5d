"""The checks of what moves parameters and numbers: optimisers and schedules."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch

from cosmos_ssl.api import Progress, Schedule
from cosmos_ssl.config import LoadedConfig
from cosmos_ssl.engine.optim import Optimizer
from cosmos_ssl.models.model import Model
from cosmos_ssl.testing.examples import example_assembly
from cosmos_ssl.testing.model import expect

TOTALS = (1, 2, 7, 40)


class Moved:
    """The example model and its optimiser; each step pulls the parameters to 0, some having no gradient."""

    def __init__(self, loaded: LoadedConfig) -> None:
        assembly = example_assembly(loaded)
        self.model: Model = assembly.model
        sections = loaded.config
        self.optimizer = Optimizer(self.model, sections, torch.device("cpu"), assembly.optimizer, assembly.schedule)
        self.idle = next(iter(self.optimizer.names))

    def step(self, step: int, lr: float = 1.0) -> None:
        """One update at ``lr`` times the run's learning rate."""
        self.optimizer.set(Progress(step=step, total_steps=10))
        for group in self.optimizer.torch.param_groups:
            group["lr"] *= lr
        for name, parameter in self.optimizer.names.items():
            parameter.grad = None if name == self.idle else parameter.detach().clone()
        self.optimizer.step()

    def state(self) -> dict[str, torch.Tensor]:
        """A copy of the parameters."""
        return {name: parameter.detach().clone() for name, parameter in self.optimizer.names.items()}

    def moved_since(self, before: Mapping[str, torch.Tensor]) -> list[str]:
        """The parameters that differ."""
        return [name for name, value in self.state().items() if not torch.equal(value, before[name])]


def hold_optimizer(loaded: LoadedConfig) -> None:
    """Hold the config's optimiser to what ``Optimizer`` promises."""
    example_assembly(loaded, meta=True)
    first, second = Moved(loaded), Moved(loaded)
    before = first.state()
    for step in range(3):
        first.step(step)
    moved = first.moved_since(before)
    expect(first.idle not in moved, "it moves parameters that have no gradient")
    names = first.optimizer.names
    still = [name for name in names if name not in {first.idle, *moved} and before[name].any()]
    expect(not still, f"it does not move {still[:1]}")
    expect(all(bool(x.isfinite().all()) for x in names.values()), "it moves parameters to what is not finite")
    length, was = (sum(float(x.detach().square().sum()) for x in each.values()) for each in (names, before))
    expect(length < was, "it moves parameters along the gradient, expected against it")
    saved = {name: value.clone() for name, value in first.optimizer.tensors().items()}
    for name, value in saved.items():
        own = names[name.rpartition(".")[0]].shape
        fits = value.dim() == 0 or value.shape == own
        expect(
            fits, f"its state {name} is {list(value.shape)}, expected that of the parameter, {list(own)}, or a number"
        )
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load(saved)
    for step in range(3, 6):
        first.step(step)
        second.step(step)
    other = second.moved_since(first.state())
    expect(not other, f"a copy with the same state moves {other[:1]} elsewhere: keep state in the optimiser's own")
    before = first.state()
    first.step(6, lr=0.0)
    expect(not first.moved_since(before), "it moves parameters at a learning rate of 0: read group['lr'] in each step")


def hold_schedule(schedule: Schedule) -> None:
    """Hold a schedule to what ``Schedule`` promises."""
    for total, begin in itertools.product(TOTALS, (0, 1, 5)):
        steps = [Progress(step=step, total_steps=total, steps_per_epoch=3) for step in range(begin, total)]
        found = [schedule.left(progress, begin) for progress in steps]
        for progress, left in zip(steps, found, strict=True):
            sound = isinstance(left, float | int) and 0 <= left <= 1
            expect(sound, f"{left} is left at step {progress.step} of {total}, expected a number from 0 to 1")
        again = [schedule.left(progress, begin) for progress in reversed(steps)][::-1]
        expect(found == again, "left gives another number when asked again: it must be a function of its arguments")
        stable = schedule.stable_steps(total, begin)
        expect(0 <= stable <= total, f"{stable} of {total} steps are stable")
        for longer, (progress, left) in itertools.product((total + 1, 3 * total), zip(steps, found, strict=True)):
            there = Progress(step=progress.step, total_steps=longer, steps_per_epoch=3)
            expect(
                progress.step >= stable or schedule.left(there, begin) == left,
                f"step {progress.step} is another one in a run of {longer} than in one of {total}, "
                f"of which stable_steps says that {stable} are the same",
            )
