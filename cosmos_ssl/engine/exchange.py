"""What ranks exchange in a step: planned features for the losses, means of gradients, moments of the features."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cosmos_ssl.api import ALL, Features, GroupFeatures, Hidden, Kind, Modality, Need, Role
from cosmos_ssl.api.views import map_tensors, tensors_in
from cosmos_ssl.errors import TrainingError, listed
from cosmos_ssl.functional import all_max, all_sum, gather_many, gather_objects, is_sharded, local, world_size
from cosmos_ssl.functional.collective_time import collective_time
from cosmos_ssl.functional.placement import sum_of_parts
from cosmos_ssl.models.plan import Plan

BUCKET = 25 << 20
"""Bytes of gradients that are averaged in one collective."""

ALIGNMENT = {"cuda": 16}
"""Bytes of a kernel's widest read: means of gradients begin at multiples of it. Not on the host, where gloo adds in an
order that goes by the place.
"""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def gather_features(plan: Plan, student: Features, teacher: Features | None) -> dict[Role, Features]:
    """The planned features and head outputs of all ranks, by one collective: [V, ranks x B, ...], with gradients."""
    wanted: dict[Role, Features] = {"teacher": Features(), "student": _select(plan.student.gathered, student)}
    if plan.teacher is not None and teacher is not None:
        wanted["teacher"] = _select(plan.teacher.gathered, teacher)
    gathered = iter(gather_many(tensors_in(wanted), dim=1))
    return map_tensors(wanted, lambda _: next(gathered))


def _select(needs: Sequence[Need], features: Features) -> Features:
    """Those of ``features`` that are needed from all ranks; outputs for masked patches, [M, width], stay behind."""
    kinds: dict[tuple[Modality, Hidden | None], dict[str, set[Kind]]] = {}
    heads: dict[str, dict[str, Tensor]] = {}
    for need in needs:
        if need.head is not None:
            given = features.heads[need.head]
            names = given if need.outputs is None else need.outputs
            heads.setdefault(need.head, {}).update({name: given[name] for name in names if given[name].dim() >= 3})
        elif need.modality is not None:
            other = features.forms.get((need.modality, need.hidden), {}) if need.hidden is not None else {}
            for name in features.of(need.modality, hidden=need.hidden):
                if need.group in (ALL, name):
                    form = need.hidden if name in other else None
                    kinds.setdefault((need.modality, form), {}).setdefault(name, set()).add(need.kind)

    def chosen(modality: Modality, hidden: Hidden | None = None) -> dict[str, GroupFeatures]:
        groups = features.of(modality, hidden=hidden)
        found: dict[str, GroupFeatures] = {}
        for name, wanted in kinds.get((modality, hidden), {}).items():
            tensors: dict[str, Any] = {kind: getattr(groups[name], kind) for kind in sorted(wanted)}
            found[name] = GroupFeatures(views=groups[name].views, **tensors)
        return found

    forms = {form: chosen(*form) for form in features.forms if form in kinds}
    return Features(image=chosen("image"), text=chosen("text"), heads=heads, forms=forms)


class GradientMean:
    """Averages gradients over ranks while the backward pass runs, in buckets that never change.

    PyTorch's own wrapper lays its buckets anew after the first step, so that a resumed run adds in another order
    than one that was never stopped. Here the order of the parameters alone decides, and the same sums come out.
    """

    def __init__(self, parameters: Iterable[Tensor], dtype: torch.dtype | None = None) -> None:
        """``parameters``: all that are trained, in an order that is the same on every rank.

        ``dtype``: what gradients are sent and added up in (default: their own).
        """
        self.on = True
        self.dtype = dtype
        self.buckets: list[list[Tensor]] = [[]]
        for parameter in reversed(list(parameters)):  # backward reaches the last ones first
            full = sum(p.numel() * p.element_size() for p in self.buckets[-1]) >= BUCKET
            other = bool(self.buckets[-1]) and self.buckets[-1][0].dtype != parameter.dtype
            if full or other:
                self.buckets.append([])
            self.buckets[-1].append(parameter)
        self._left = [len(bucket) for bucket in self.buckets]
        self._next = 0
        self._running: list[tuple[list[Tensor], Tensor, Any]] = []
        for number, bucket in enumerate(self.buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(self._hook(number))

    def _hook(self, number: int) -> Callable[[Tensor], None]:
        def reached(parameter: Tensor) -> None:
            if self.on:
                self._left[number] -= 1
                self._send()

        return reached

    def _send(self, *, whole: bool = False) -> None:
        """Start the buckets that are complete, in their order; ``whole``: all of them."""
        while self._next < len(self.buckets) and (whole or self._left[self._next] == 0):
            bucket = self.buckets[self._next]
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat(_aligned(grads)).div_(world_size()).to(self.dtype or grads[0].dtype)
            self._running.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
            self._next += 1

    def finish(self) -> None:
        """Start what is left, wait for all, and put the means into ``grad``."""
        self._send(whole=True)
        for bucket, flat, work in self._running:
            with collective_time.during(flat):
                work.wait()
            flat = flat.to(bucket[0].dtype)
            place = 0
            for parameter in bucket:
                parameter.grad = flat[place : place + parameter.numel()].view_as(parameter)
                place += parameter.numel() + _gap(parameter)
        self._left = [len(bucket) for bucket in self.buckets]
        self._next = 0
        self._running.clear()


def _gap(x: Tensor) -> int:
    """Elements that are left free after ``x`` in a bucket."""
    return -x.numel() % (ALIGNMENT.get(x.device.type, 1) // x.element_size() or 1)


def _aligned(grads: Sequence[Tensor]) -> list[Tensor]:
    """Return what a bucket is made of: the gradients, flat, and zeros for the gaps."""
    gaps = [_gap(grad) for grad in grads]
    zeros = grads[0].new_zeros(max(gaps))
    parts = zip((grad.reshape(-1) for grad in grads), (zeros[:gap] for gap in gaps), strict=True)
    return [part for pair in parts for part in pair if part.numel()]


@torch.no_grad()
def share_start(replicas: Mapping[str, Tensor]) -> None:
    """Take the first rank's values: what is drawn follows from the instructions that a CPU has, too.

    Not of what is sharded: it was shared before.
    """
    for tensor in replicas.values() if world_size() > 1 else ():
        if not is_sharded(tensor):
            given = tensor.contiguous()
            dist.broadcast(given, 0)
            tensor.copy_(given)


def check_replicas(replicas: Mapping[str, Tensor], owner: Callable[[str], str]) -> None:
    """Raise TrainingError unless these tensors are the same on all ranks, to the bit: with the first parameter that is
    not, else buffer, its ``owner``, and on which rank. Of what is sharded every copy must be the same.

    A collective: all ranks call it.
    """
    if world_size() == 1 or not replicas:
        return
    # the sum of a tensor's bits, read as whole numbers; the largest of ~x is that of the least x
    bits = [local(x).reshape(-1).view(_BITS[x.element_size()]) for x in replicas.values()]
    own = torch.stack([x.sum(dtype=torch.int64) for x in bits])
    if sharded := {place: x for place, x in enumerate(replicas.values()) if is_sharded(x)}:
        own[list(sharded)] = sum_of_parts(own[list(sharded)], list(sharded.values()))
    most, least = all_max(torch.stack([own, ~own]))
    names = list(replicas)
    differing = [names[place] for place in (most != ~least).nonzero().flatten().tolist()]
    if not differing:
        return
    found = next((name for name in differing if isinstance(replicas[name], nn.Parameter)), None)
    name = found or differing[0]
    told = gather_objects(own[names.index(name)].item())
    others = [str(rank) for rank, value in enumerate(told) if value != told[0]]
    advice = "move it by what all ranks share (all_sum, Need(gathered=True)), or register it with persistent=False"
    raise TrainingError(
        f"ranks have come apart: {name} of rank {listed(others)} is not the first rank's (tensors that differ: "
        f"{len(differing)}). {owner(name)} does not do the same on all ranks, or a device is faulty. No checkpoint is "
        f"written; the same command goes on from the last one{'' if found else f'. Where it is a buffer: {advice}'}"
    )


class RunningStatistics:
    """Keeps those of batch norm the same on all ranks, each of which adds its own batch: a teacher encodes by them."""

    def __init__(self, model: nn.Module) -> None:
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        found = [x for norm in norms for x in (norm.running_mean, norm.running_var) if x is not None]
        self._own = found if world_size() > 1 else []

    @torch.no_grad()
    def share(self) -> None:
        """Put the mean over ranks into each. A collective: all ranks call it."""
        if self._own:
            means = all_sum(torch.cat(self._own)) / world_size()
            for own, mean in zip(self._own, means.split([len(own) for own in self._own]), strict=True):
                own.copy_(mean)


@torch.no_grad()
def moments(student: Features) -> dict[str, Tensor]:
    """Mean and mean square of this rank's unit features by modality, [2, D], of the first group that has any."""
    found = {}
    for modality, groups in (("image", student.image), ("text", student.text)):
        features = next((group for group in groups.values() if group.projected is not None), None)
        if features is not None:
            unit = features.unit[0].double()
            found[modality] = torch.stack([unit.mean(0), unit.square().mean(0)])
    return found


def spread(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Collapse signs, from all ranks' ``moments``: the standard deviation of unit features x sqrt(D).

    1 is isotropic, 0 collapsed. A collective: all ranks call it.
    """
    if not own:
        return {}
    mean, mean_square = all_sum(torch.cat(list(own.values()), 1)) / world_size()
    deviation = (mean_square - mean**2).clamp(min=0).sqrt()
    parts = deviation.split([each.shape[1] for each in own.values()])
    return {f"spread/{modality}": part.mean() * len(part) ** 0.5 for modality, part in zip(own, parts, strict=True)}
