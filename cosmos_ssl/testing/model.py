"""Checks of a part inside the small model: builds alike, trains, can be undone, goes on from its state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cosmos_ssl.api import Features, Head, ImageGroup, Modality, Need, ParameterRule, Progress, TextGroup, Views
from cosmos_ssl.api.views import map_tensors
from cosmos_ssl.engine.assembly import Assembly
from cosmos_ssl.engine.forward import Result
from cosmos_ssl.engine.step import Gradients
from cosmos_ssl.errors import listed
from cosmos_ssl.models.contract import blaming, checked_moves, is_matching
from cosmos_ssl.models.encoder import ModelEncoder
from cosmos_ssl.models.model import Model
from cosmos_ssl.testing.examples import PROGRESS, example_assembly, example_config, example_views


def expect(condition: object, message: str) -> None:
    """Raise AssertionError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise AssertionError(message)


class ModelCheck:
    """A config whose model is built twice and run as training would."""

    def __init__(self, config: Mapping[str, Any], around: Mapping[str, Any] | None) -> None:
        """Raises PluginError or ConfigError for a part that cannot be built, or requires what is not on offer."""
        self.loaded = example_config(around, config)
        self.assembly = example_assembly(self.loaded)
        self.views = example_views(self.assembly.spec)

    def build(self, seed: int = 0) -> Assembly:
        """Build all parts anew; steps draw by ``seed``."""
        assembly = example_assembly(self.loaded)
        return replace(assembly, spec=replace(assembly.spec, seed=seed))

    def run(self, path: str) -> None:
        """Hold the part under ``path`` to what is true of every part of a model."""
        first, second = self.assembly, example_assembly(self.loaded)
        self._built_alike(first.model, second.model)
        part = first.model.get_submodule(path.removeprefix("model."))
        _check_rules(cast(Any, part).parameter_rules(), part)
        for assembly in (first, second):
            assembly.start_teacher()
            assembly.model.train()
        step = Gradients(first)
        before, buffers = _state(first.model), dict(part.named_buffers())
        result = self._step(step)
        _finite({**result.logs, **{name: p.grad for name, p in first.model.named_parameters() if p.grad is not None}})
        step.restore_buffers()
        other = [name for name, buffer in part.named_buffers() if buffer is not buffers.get(name)]
        expect(
            not other,
            f"it puts another tensor into the place of its buffer {listed(other, limit=3)}, so that a step cannot be "
            "undone: write into the one there is (self.NAME.copy_(...))",
        )
        _equal(before, _state(first.model), "a step that is undone leaves {} changed: move nothing but buffers")
        again = self._step(step)
        expect(
            torch.equal(again.loss, result.loss),
            "one batch and state give two losses: keep state in buffers, draw from torch alone, go by progress alone",
        )
        move(first.model)
        first.teacher.update(first.followed, PROGRESS)
        second.model.load_state_dict(_state(first.model))
        second.teacher.load_state_dict(first.teacher.state_dict())
        ours, theirs = self._step(step), self._step(Gradients(second))
        expect(
            torch.equal(ours.loss, theirs.loss), "a copy with the same state gives another loss: keep state in buffers"
        )
        _equal(
            _state(first.model),
            _state(second.model),
            "a copy with the same state moves {} elsewhere: keep state in buffers",
        )
        _finite(self._step(Gradients(first, precision="amp_bf16")).logs, " under bfloat16")

    def _step(self, step: Gradients) -> Result:
        return step(self.views, PROGRESS)

    def _built_alike(self, first: Model, second: Model) -> None:
        """One seed gives one start, and the meta device (the check before training) the same parameters."""
        _equal(_state(first), _state(second), "two builds with one seed start {} differently: draw from torch alone")
        meta = example_assembly(self.loaded, meta=True).model
        shapes = {name: x.shape for name, x in first.named_parameters()}
        expect(
            shapes == {name: x.shape for name, x in meta.named_parameters()},
            "it has other parameters on the meta device",
        )
        real = [name for name, x in meta.named_parameters() if not x.is_meta]
        expect(not real, f"{', '.join(real)} is not on the device that it is built on: give no device")

    # ------------------------------------------------------------------ heads

    def needs_without_gradient(self, name: str) -> Sequence[Need]:
        """Return what the outputs of a head read that no gradient leaves by."""
        assembly = self.build()
        assembly.model.strict = True
        assembly.model.set_progress(PROGRESS)
        found = assembly.model.encode(self.views, assembly.plan.student).heads[name]
        without = [key for key, x in found.items() if not x.requires_grad]
        return list(assembly.model.head(name).requires(without)) if without else []

    def head(self, name: str) -> None:
        """Hold a head to what ``Head`` promises of its outputs."""
        model = self.assembly.model
        head, widths = model.head(name), model.head(name).outputs()
        known = self.assembly.spec.heads[name]
        expect(
            widths and dict(widths) == dict(known),
            f"outputs() gives {dict(widths)}, expected the same names and widths at each call",
        )
        with torch.no_grad():
            plan = self.assembly.plan.student
            features = plan.shown(f"heads.{name}", model.encode(self.views, plan))
        state = _state(head)
        together = self._outputs(head, features, self.views, tuple(widths))
        for output in widths:
            head.load_state_dict(state)
            head.requires_grad_(True).zero_grad(set_to_none=True)
            alone = self._outputs(head, features, self.views, (output,))
            close = head.mixes_samples or torch.allclose(alone[output], together[output], rtol=1e-4, atol=1e-5)
            expect(close, f"the output '{output}' is another one when asked for alone")
            if alone[output].requires_grad:
                (alone[output] * torch.randn_like(alone[output])).sum().backward()
            reached = {key for key, parameter in head.named_parameters() if parameter.grad is not None}
            unread = {
                key for key, _ in head.named_parameters() if any(fnmatchcase(key, p) for p in head.unread((output,)))
            }
            wrong = sorted(({key for key, _ in head.named_parameters()} - reached) ^ unread)
            expect(
                not wrong,
                f"unread([{output!r}]) is wrong about {', '.join(wrong)}: it names what this output does not reach",
            )
        head.load_state_dict(state)
        if not head.mixes_samples:
            self._samples_apart(head, features, tuple(widths))
        if is_matching(head):
            self._matches(model)
        else:
            lacking = getattr(head, "matches", False)
            expect(not lacking, "it matches pictures and texts, and lacks match_needs, match_input or match")

    def _outputs(
        self, head: Head, features: Features, views: Views, outputs: Sequence[str], seed: int = 0
    ) -> Mapping[str, Tensor]:
        torch.manual_seed(seed)
        return head(features, views, outputs)  # type: ignore[no-any-return]

    @torch.no_grad()
    def _samples_apart(self, head: Head, features: Features, outputs: Sequence[str]) -> None:
        """Half of the batch gives half of the outputs."""
        whole, other = (self._outputs(head, features, self.views, outputs, seed) for seed in (0, 1))
        if any(not torch.equal(whole[name], other[name]) for name in outputs):
            return  # it draws random numbers, other ones for other batches
        count = len(self.views) // 2
        half_features = map_tensors(features, lambda x: _first_of(x, self.views, count))
        half = self._outputs(head, half_features, self.views.slice(0, count), outputs)
        for name in outputs:
            expected = _first_of(whole[name], self.views, count)
            close = expected.shape == half[name].shape and torch.allclose(half[name], expected, rtol=1e-4, atol=1e-5)
            expect(
                close,
                f"the output '{name}' of a sample depends on others of the batch: say so with mixes_samples = True",
            )

    def _matches(self, model: Model) -> None:
        encoder = ModelEncoder(model, self.assembly.spec)
        image, text = self.views.image["global"], self.views.text["global"]
        scores = encoder.match(encoder.match_image(image.pixels[0]), encoder.match_text(text.tokens[0, :4]))
        wanted = [len(self.views), 4]
        expect(list(scores.shape) == wanted, f"match gives {list(scores.shape)}, expected [pictures, texts], {wanted}")
        expect(bool(scores.isfinite().all()), "match gives scores that are not finite")

    # ------------------------------------------------------------------ towers

    @torch.no_grad()
    def tower(self, modality: Modality) -> None:
        """Hold a tower to what its capabilities promise: what is hidden, or comes later, changes nothing."""
        model, plan = self.assembly.model, self.assembly.plan.student
        capabilities = model.towers[modality].capabilities
        torch.manual_seed(0)
        model.eval()
        before = model.encode(self.views, plan)
        after = model.encode(_changed(self.views, modality), plan)
        for (_, hidden), groups in before.forms.items():
            for name, group in groups.items() if hidden else ():
                masks, other = self.views.of(modality)[name].masks, after.forms[modality, hidden][name]
                pairs = [(group.pooled, other.pooled), (group.masked_tokens, other.masked_tokens)]
                if group.tokens is not None and masks is not None:
                    seen = ~masks[list(group.token_views)]
                    pairs.append((group.tokens[seen], other.tokens[seen]))  # type: ignore[index]
                same = all(x is None or torch.allclose(x, cast(Tensor, y), atol=1e-5) for x, y in pairs)
                expect(same, f"hidden={hidden!r}: features of '{name}' depend on patches that are masked")
        if "causal" in capabilities:
            text = self.views.text["global"]
            late = torch.arange(text.tokens.shape[-1]) >= text.tokens.shape[-1] // 2
            tokens = torch.where(late & (text.tokens > 0), text.tokens % 7 + 1, text.tokens)
            views = replace(self.views, text={**self.views.text, "global": replace(text, tokens=tokens)})
            x, y = (model.encode(v, plan).text["global"].tokens for v in (self.views, views))
            same = x is None or torch.allclose(x[:, :, ~late], cast(Tensor, y)[:, :, ~late], atol=1e-5)
            expect(same, "it says that it is causal, and tokens depend on those after them")

    # ------------------------------------------------------------------ teachers

    def teacher(self) -> None:
        """Hold the config's teacher to what ``Teacher`` promises."""
        first, second = self.assembly, example_assembly(self.loaded)
        student, teacher = first.model, first.teacher
        before = _state(student)
        first.start_teacher()
        _equal(before, _state(student), "start changes {} of the student")
        if not teacher.present:
            expect(not list(teacher.parameters()), "it is not present, and has parameters")
            expect(not teacher.update(student, PROGRESS), "it is not present, and its update returns something")
            return
        trained = [name for name, parameter in teacher.named_parameters() if parameter.requires_grad]
        expect(not trained, f"{listed(trained, limit=3)} takes gradients: a teacher must not")
        shared = {x.data_ptr() for x in student.parameters()} & {x.data_ptr() for x in teacher.parameters()}
        expect(not shared, "it shares parameters with the student: build its model anew")
        second.start_teacher()
        for number in range(4):
            move(student)
            second.model.load_state_dict(_state(student))
            if number == 2:
                second.teacher.load_state_dict(teacher.state_dict())
            self._update(first, number)
            if number >= 2:
                self._update(second, number)
        _equal(
            _state(teacher),
            _state(second.teacher),
            "a copy with the same state moves {} elsewhere: keep state in buffers",
        )
        Gradients(first)(self.views, PROGRESS)

    def _update(self, assembly: Assembly, number: int) -> None:
        student, teacher, before = assembly.followed, assembly.teacher, _state(assembly.model)
        with blaming(teacher, "teacher"):
            moved = checked_moves(teacher.update(student, Progress(step=number, total_steps=4, steps_per_epoch=2)))
        _equal(before, _state(assembly.model), "update changes {} of the student")
        _finite(
            {name: torch.as_tensor(value, dtype=torch.float64) for name, value in moved.items()}, " that update returns"
        )
        _finite(_state(teacher))
        graph = [
            name for name, parameter in teacher.named_parameters() if not parameter.is_leaf or parameter.requires_grad
        ]
        expect(not graph, f"update leaves a graph on {listed(graph, limit=3)}: work under torch.no_grad()")


# ---------------------------------------------------------------------------- small things


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def _equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor], message: str) -> None:
    """Same names and bits; ``message`` has a place for what differs."""
    other = [
        name
        for name in {**first, **second}
        if name not in first or name not in second or not torch.equal(first[name], second[name])
    ]
    expect(not other, message.format(f"{listed(other, limit=3)}"))


def _finite(values: Mapping[str, Tensor | None], where: str = "") -> None:
    wrong = [
        name
        for name, value in values.items()
        if value is not None and value.is_floating_point() and not value.isfinite().all()
    ]
    expect(not wrong, f"{listed(wrong, limit=3)}{where} is not finite")


@torch.no_grad()
def move(model: Model) -> None:
    """Change every parameter a little, and run the hooks, as an optimiser would."""
    draw = torch.Generator().manual_seed(len(list(model.parameters())))
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=draw).to(parameter), alpha=0.01)
    model.after_step()


def _check_rules(rules: Sequence[ParameterRule], part: nn.Module) -> None:
    names = [name for name, _ in part.named_parameters()]
    for rule in rules:
        expect(isinstance(rule, ParameterRule), f"parameter_rules gives {rule!r}, expected ParameterRule")
        matched = any(fnmatchcase(name, rule.match) for name in names)
        expect(
            matched,
            f"the parameter rule '{rule.match}' matches none of its parameters: "
            f"{', '.join(names[:8]) or 'it has none'}",
        )


def _changed(views: Views, modality: Modality) -> Views:
    """The same views, but for what masks hide."""
    if modality == "text":
        text = {
            name: group if group.masks is None else replace(group, tokens=group.tokens.where(~group.masks, 1))
            for name, group in views.text.items()
        }
        return replace(views, text=text)
    image = {}
    for name, group in views.image.items():
        pixels = group.pixels
        if group.masks is not None:
            side = math.isqrt(group.masks.shape[-1])
            masks = group.masks.unflatten(-1, (side, side)).float().flatten(0, 1)[:, None]
            whole = F.interpolate(masks, pixels.shape[-2:]).view(*pixels.shape[:2], 1, *pixels.shape[-2:])
            pixels = pixels + whole
        image[name] = replace(group, pixels=pixels)
    return replace(views, image=image)


def _first_of(x: Tensor, views: Views, count: int) -> Tensor:
    """The rows of the first samples: of [V, B, ...], or of the masked patches of a group, [M, ...]."""
    if x.dim() == 2:
        groups: list[ImageGroup | TextGroup] = [*views.image.values(), *views.text.values()]
        for group in groups:
            if group.masks is not None and int(group.masks.sum()) == len(x):
                return x[group.masks.nonzero()[:, 1] < count]
    return x[:, :count]
