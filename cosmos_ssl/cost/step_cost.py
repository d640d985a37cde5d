"""What a training step costs: FLOPs of its stages, parameters, and memory kept for the backward pass, module by
module.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from cosmos_ssl.api import (
    Augmenter,
    CropGroup,
    Features,
    ImageGroup,
    Progress,
    Sample,
    TextGroup,
    UserError,
    Views,
    ViewSpec,
)
from cosmos_ssl.api.views import map_tensors, tensors_in
from cosmos_ssl.config import Config
from cosmos_ssl.cost.flops import counted, trace
from cosmos_ssl.data.collate import Collator, checked_crops, text_masks
from cosmos_ssl.engine.assembly import Assembly
from cosmos_ssl.engine.forward import Forward
from cosmos_ssl.engine.state import RunState
from cosmos_ssl.models.contract import blaming
from cosmos_ssl.models.precision import resolve_precision

SHORTEST = 3
"""Tokens of the shortest caption: its start, a word, its end."""
SPREAD = 6
"""Standard deviation of the lengths of captions, in tokens."""
CAPTION_TOKENS = 19.5
"""Mean length of captions that is assumed, or the context length where that is less: DreamLIP's sentences with both
ends, in CLIP's tokens.
"""
_PICTURE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleCost:
    """What one module of a role's model takes, with all inside it: ``image.blocks.0``, ``teacher.text``."""

    name: str
    flops: float
    """Of its forward pass, per sample."""
    parameters: int
    activations: float
    """Bytes that it keeps for the backward pass, per sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """A step's cost.

    FLOPs and bytes are per sample, of float32 on the CPU; see ``cosmos_ssl.cost.flops`` for what counts.
    """

    samples: int
    flops: Mapping[str, float]
    """By stage: ``student``, ``heads``, ``losses``, ``student_backward``, ``losses_backward``, ``teacher``; and
    ``total``.
    """
    parameters: Mapping[str, int]
    """``trained``, ``frozen``, ``teacher``."""
    activations: float
    """Bytes kept for the backward pass, per sample; parameters are not among them."""
    modules: Sequence[ModuleCost]
    uncounted: Mapping[str, int]
    """Operations that may hold matrix products and were not counted, by name, with how often the step ran them."""
    difference: float
    """FLOPs that PyTorch's counter finds in the student's forward pass and losses beyond those traced: 0 where both see
    all.
    """


def measure_step(
    assembly: Assembly,
    config: Config,
    *,
    samples: int = 2,
    caption_tokens: float | None = None,
    device: torch.device | None = None,
    resting: frozenset[str] = frozenset(),
) -> StepCost:
    """Run one step of ``assembly`` on made-up samples, in which the losses ``resting`` have no part, and count.

    Forward passes are traced by fvcore, backward passes counted as they run by PyTorch's ``FlopCounterMode``. All
    samples have captions of the same lengths, so that what towers cost a sample does not depend on ``samples``; a loss
    that compares all with all, and masks that are drawn, do. Every sample is encoded once: accumulation would encode it
    again.

    Raises UserError where ``caption_tokens`` cannot be.
    """
    device = device or torch.device("cpu")
    config = config.model_copy(update={"training": config.training.model_copy(update={"compile": False})})
    state = RunState(assembly, config, device)
    precision = resolve_precision(config.training.precision, device) if device.type == "cuda" else "fp32"
    forward = Forward(assembly, precision=precision, device=device)
    forward.rest(resting)
    views = make_views(assembly, samples, caption_tokens).to(device)
    progress = Progress(step=0, total_steps=1)
    flops: dict[str, dict[str, int]] = {}
    uncounted: Counter[str] = Counter()

    def traced(stage: str, model: nn.Module | None, run: Callable[[], Any]) -> Any:
        """``run()``, traced; what it returns."""
        kept: list[Any] = []

        def once() -> list[Tensor]:
            kept.append(run())
            return tensors_in(kept[0])

        flops[stage], unknown = trace(model, once) if model is not None else ({"": 0}, Counter[str]())
        uncounted.update(unknown)
        return kept[0] if kept else None

    teacher = traced(
        "teacher", state.models["teacher"] if forward.plan.teacher else None, lambda: forward.teacher(views)
    )
    student = traced("encode", state.model, lambda: forward.student(views))
    # a trace has what its outputs need
    traced("losses", state.model, lambda: dict(forward.losses(views, student, teacher, progress).logs))
    kept, backward, of_forward = _run(forward, views, teacher, progress, uncounted)

    heads = sum(count for name, count in flops["encode"].items() if name.startswith("heads.") and name.count(".") == 1)
    stages = {
        "student": flops["encode"][""] - heads,
        "heads": heads,
        "losses": flops["losses"][""],
        **backward,
        "teacher": flops["teacher"][""],
    }
    stages["total"] = sum(stages.values())
    return StepCost(
        samples=samples,
        flops={stage: count / samples for stage, count in stages.items()},
        parameters=_parameters(state),
        activations=kept[""] / samples,
        modules=_modules(state, flops, kept, samples),
        uncounted=dict(uncounted.most_common()),
        difference=(of_forward - flops["encode"][""] - flops["losses"][""]) / samples,
    )


def _run(
    forward: Forward, views: Views, teacher: Features | None, progress: Progress, uncounted: Counter[str]
) -> tuple[Counter[str], dict[str, int], int]:
    """The step with gradients, cut between features and losses: bytes kept by module, FLOPs of the two backward passes,
    of forward.
    """
    model = forward.assembly.model
    model.zero_grad(set_to_none=True)
    with counted() as of_forward, kept_tensors(model) as kept:
        student = forward.student(views)
        leaves = map_tensors(student, lambda x: x.detach().requires_grad_(x.requires_grad))
        loss = forward.losses(views, leaves, teacher, progress).loss
    with counted() as of_losses:
        loss.backward()
    pairs = [
        (output, leaf.grad)
        for output, leaf in zip(tensors_in(student), tensors_in(leaves), strict=True)
        if leaf.grad is not None and output.requires_grad
    ]
    with counted() as of_student:
        torch.autograd.backward([output for output, _ in pairs], [grad for _, grad in pairs])
    model.zero_grad(set_to_none=True)
    uncounted.update(of_losses.uncounted + of_student.uncounted)
    return kept, {"student_backward": of_student.flops, "losses_backward": of_losses.flops}, of_forward.flops


@contextmanager
def kept_tensors(model: nn.Module) -> Iterator[Counter[str]]:
    """Bytes that autograd keeps for the backward pass, by module of the model with all inside it (``""``: all); each
    storage once.

    Parameters and buffers, which are there anyway, are left out.
    """
    found: Counter[str] = Counter()
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    inside: list[str] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            parts = inside[-1].split(".") if inside else []
            for depth in range(len(parts) + 1):
                found[".".join(parts[:depth])] += storage.nbytes()
        return tensor

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: inside.append(name)

    def leave(*_: Any) -> None:
        inside.pop()

    hooks = []
    for name, module in model.named_modules():
        if name:
            hooks += [
                module.register_forward_pre_hook(enter(name)),
                module.register_forward_hook(leave, always_call=True),
            ]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield found
    finally:
        for hook in hooks:
            hook.remove()


def _parameters(state: RunState) -> dict[str, int]:
    counts = {"trained": 0, "frozen": 0, "teacher": 0}
    for parameter in state.model.parameters():
        counts["trained" if parameter.requires_grad else "frozen"] += parameter.numel()
    if "teacher" in state.models:
        counts["teacher"] = sum(parameter.numel() for parameter in state.models["teacher"].parameters())
    return counts


def _modules(
    state: RunState, flops: Mapping[str, Mapping[str, int]], kept: Mapping[str, int], samples: int
) -> list[ModuleCost]:
    """Student first, then the teacher; what takes nothing is left out."""
    found = []
    for prefix, model, stages in (
        ("", state.model, ("encode", "losses")),
        ("teacher.", state.models.get("teacher"), ("teacher",)),
    ):
        for name, module in model.named_modules() if model is not None else ():
            cost = ModuleCost(
                name=prefix + name if name else "teacher" if prefix else "student",
                flops=sum(flops[stage].get(name, 0) for stage in stages) / samples,
                parameters=sum(parameter.numel() for parameter in module.parameters()),
                activations=0.0 if prefix else kept.get(name, 0) / samples,
            )
            if cost.flops or cost.parameters or cost.activations:
                found.append(cost)
    return found


# ---------------------------------------------------------------------------- made-up samples


def make_views(assembly: Assembly, samples: int, caption_tokens: float | None = None) -> Views:
    """Views of the numbers and sizes that the augmenters offer: noise, and random tokens of ``caption_tokens`` on
    average.

    Masks are drawn by the augmenter. Raises UserError for a mean length that captions cannot have.
    """
    spec = assembly.spec
    generator = torch.Generator().manual_seed(0)
    image: dict[str, ImageGroup] = {}
    if spec.image_views:
        image = _image_views(assembly.augmenters["image"], spec.image_views, samples, generator)
    text: dict[str, TextGroup] = {}
    if spec.text_views:
        assert assembly.tokenizer is not None
        lengths = iter(
            caption_lengths(
                sum(view.views for view in spec.text_views.values()), caption_tokens, spec.context_length
            ).tolist()
        )
        pad = assembly.tokenizer.pad_id
        for name, view in spec.text_views.items():
            own = torch.tensor([next(lengths) for _ in range(view.views)])[:, None].expand(-1, samples).contiguous()
            tokens = torch.randint(
                1, spec.vocab_size - 1, (view.views, samples, spec.context_length), generator=generator
            )
            tokens[tokens == pad] = pad + 1 if pad + 1 < spec.vocab_size else pad - 1
            places = torch.arange(spec.context_length) - own[..., None] + 1
            text[name] = TextGroup(
                tokens=tokens.masked_fill(places == 0, spec.vocab_size - 1).masked_fill(places > 0, pad), lengths=own
            )
            if view.masks:
                draws = [np.random.default_rng(number) for number in range(samples)]
                masks = text_masks(assembly.augmenters["text"], name, text[name], draws)
                text[name] = replace(text[name], masks=masks)
    return Views(keys=[str(n) for n in range(samples)], image=image, text=text)


def caption_lengths(captions: int, mean: float | None, most: int) -> Tensor:
    """Random lengths of one sample's captions, int64 [captions]; their mean is ``mean`` as nearly as whole
    numbers can.
    """
    mean = min(CAPTION_TOKENS, most) if mean is None else mean
    if not SHORTEST <= mean <= most:
        raise UserError(f"--caption-tokens: {mean:g} is not between {SHORTEST} and the context length of {most}")
    spread = torch.randn(captions, generator=torch.Generator().manual_seed(1)) * SPREAD
    lengths = (mean + spread - spread.mean()).round().long().clamp(SHORTEST, most)
    while missing := round(mean * captions) - int(lengths.sum()):
        sign = 1 if missing > 0 else -1
        able = ((lengths + sign >= SHORTEST) & (lengths + sign <= most)).nonzero()[: abs(missing), 0]
        lengths[able] += sign
    return lengths


def _image_views(
    augmenter: Augmenter, offers: Mapping[str, ViewSpec], samples: int, generator: torch.Generator
) -> dict[str, ImageGroup]:
    """Noise; masks, and sizes that are not on offer, are those of crops."""
    known = all(view.size and not view.masks for view in offers.values())
    crops = {} if known else noise_crops(augmenter, offers, samples, generator)
    groups = {}
    for name, view in offers.items():
        shape = crops[name].pixels.shape if crops else (view.views, samples, 3, view.size or 0, view.size or 0)
        groups[name] = ImageGroup(
            pixels=torch.randn(shape, generator=generator),
            params=torch.zeros(view.views, samples, 0),
            masks=crops[name].masks if crops else None,
        )
    return groups


def noise_crops(
    augmenter: Augmenter, offers: Mapping[str, ViewSpec], samples: int, generator: torch.Generator
) -> Mapping[str, CropGroup]:
    """Cut crops of a picture of noise, as a worker does."""
    picture = io.BytesIO()
    noise = torch.randint(0, 256, (_PICTURE, _PICTURE, 3), dtype=torch.uint8, generator=generator)
    Image.fromarray(noise.numpy()).save(picture, "PNG")
    collator = Collator(samples)
    with blaming(augmenter, "augmenters.image"):
        for number in range(samples):
            sample = Sample(key=str(number), image=picture.getvalue())
            crops = augmenter.crop(sample, np.random.default_rng(number))
            collator.add(sample, {"image": checked_crops(crops, offers, "image", "augmenters.image")})
    return collator.batch(None).image
