"""Exact accumulation: losses over the whole batch, while towers and heads hold one micro-batch at a time.

It changes memory, not the result: every micro-batch is encoded without a graph, the losses see all outputs once, then
each micro-batch is encoded again, with the same randomness, and receives the gradients of its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.profiler import record_function

from cosmos_ssl.api import Features, PluginError, Progress, Views
from cosmos_ssl.api.views import map_tensors, tensors_in
from cosmos_ssl.engine.assembly import Assembly
from cosmos_ssl.engine.forward import Forward, Result


def accumulate(
    forward: Forward,
    views: Views,
    teacher: Features | None,
    progress: Progress,
    size: int,
    backward: Callable[[Tensor], None],
) -> Result:
    """Leave the gradients of the batch in ``.grad``; ``backward`` runs that of the loss."""
    parts = [views.slice(start, start + size) for start in range(0, len(views), size)]
    encoded: list[Features] = []
    with torch.no_grad():
        for number, part in enumerate(parts):
            forward.seed(progress, number)
            encoded.append(forward.student(part))
    student = map_tensors(_join(encoded), lambda x: x.detach().requires_grad_(x.is_floating_point()))
    result = forward.losses(views, student, teacher, progress)
    backward(result.loss)
    leaves = tensors_in(student)
    for number, part in enumerate(parts):
        forward.seed(progress, number)
        start = number * size
        pairs = [
            (output, leaf.grad[:, start : start + output.shape[1]])
            for output, leaf in zip(tensors_in(forward.student(part)), leaves, strict=True)
            if leaf.grad is not None and output.requires_grad
        ]
        with record_function("backward"):
            torch.autograd.backward([output for output, _ in pairs], [grad for _, grad in pairs])
    return result


def _join(parts: Sequence[Features]) -> Features:
    """Micro-batches of features as one: every tensor is [V, b, ...] and is joined along its samples.

    Raises PluginError for a head that gives masked patches, [M, W], of which it did not ask for the features.
    """
    for name, outputs in parts[0].heads.items():
        if any(x.dim() == 2 for x in outputs.values()):
            raise PluginError(f"training.micro_batch_size: heads.{name} gives outputs of masked patches. Leave it out")
    columns = zip(*map(tensors_in, parts), strict=True)
    joined = iter([torch.cat(column, dim=1) for column in columns])
    return map_tensors(parts[0], lambda _: next(joined))


def refuse_accumulation(assembly: Assembly) -> None:
    """Raise PluginError, naming the parts, where some cannot work on micro-batches."""
    model = assembly.model
    heads = {name: model.head(name) for name in assembly.plan.student.heads}
    reasons = [f"heads.{name} mixes samples" for name, head in heads.items() if head.mixes_samples]
    reasons += [f"heads.{name} moves buffers" for name, head in heads.items() if list(head.buffers())]
    reasons += [f"losses.{name} calls a head" for name in model.losses if model.loss(name).calls_heads]
    student = assembly.plan.student
    if any(group.masked_tokens for group in (*student.image.values(), *student.text.values())):
        reasons.append("masked patches are read")
    if reasons:
        raise PluginError(
            f"training.micro_batch_size: exact accumulation is impossible here: {'; '.join(reasons)}. Leave it out"
        )
