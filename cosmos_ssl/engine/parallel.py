"""Ranks that share one copy of the weights: ``training.parallel: fsdp`` and ``hsdp``, by PyTorch's ``fully_shard``.

Towers are sharded, student's and teacher's: each of their blocks by itself, so that one block's weights are whole at a
time, and then the rest of the tower. Heads and losses stay whole on every rank, as do towers' single numbers: they are
small beside towers, and their weights are read and moved outside of ``forward``, too. Gradients of what is whole are
averaged by ``exchange.GradientMean``, those of shards by PyTorch as backward goes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

from cosmos_ssl.api import GroupFeatures
from cosmos_ssl.config import Config
from cosmos_ssl.config.ranks import shards
from cosmos_ssl.engine.layout import Split, host_memory
from cosmos_ssl.errors import UserError
from cosmos_ssl.functional import all_max, is_sharded, local, world_size
from cosmos_ssl.models.model import Model
from cosmos_ssl.models.precision import DTYPES
from cosmos_ssl.models.transformer import Block

_NEEDS = (2, 10)
"""Version of torch: older ones keep no parameters whole, or know no sums in place of means."""


class Sharding:
    """How the ranks of a run share weights, by its config."""

    def __init__(self, config: Config, device: torch.device, precision: str) -> None:
        """Raises ConfigError where the ranks cannot be divided so, UserError where torch is too old."""
        self.device, self.precision = device, precision
        self.average_in = torch.bfloat16 if config.training.average_in == "bf16" else torch.float32
        ranks, self.shards = world_size(), shards(config, world_size())
        self.on = self.shards > 1
        """Whether any rank holds less than all."""
        if self.on:
            if tuple(map(int, torch.__version__.split(".")[:2])) < _NEEDS:
                needed = ".".join(map(str, _NEEDS))
                raise UserError(f"training.parallel={config.training.parallel} needs torch {needed} or newer")
            _register_features()
            from torch.distributed.device_mesh import init_device_mesh

            sizes = {"replicate": ranks // self.shards, "shard": self.shards}
            sizes = sizes if sizes["replicate"] > 1 else {"shard": ranks}
            self.mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

    def split(self, files: int | Literal["auto"]) -> Split:
        """How checkpoints are shared out to files. A collective."""
        ranks = world_size() if self.on else 1
        if ranks == 1 or files != "auto":
            return Split(files, ranks, host_memory())
        least = -all_max(torch.tensor(-host_memory(), dtype=torch.int64, device=self.device))
        return Split(files, ranks, int(least))

    def share(self, model: Model) -> None:
        """Leave this rank its part of each tower, of weights that are the same on all ranks."""
        if not self.on:
            return
        # in-place changes of what a part returns are refused anyway
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        for tower in model.towers.values():
            whole = {parameter for parameter in tower.parameters() if not parameter.dim()}
            for parameter in tower.parameters():
                parameter.data = parameter.data.contiguous()
            for module in (*blocks(tower), tower):
                self._share(module, whole)

    def _share(self, module: nn.Module, whole: set[nn.Parameter]) -> None:
        """``whole``: parameters that stay as they are."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        narrow = None
        if isinstance(module, Block):  # all of it computes in autocast's precision: cast before it is sent
            module.sharded, narrow = True, DTYPES[self.precision]
        policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=self.average_in, cast_forward_inputs=False)
        # asked for, so that the root too, and a teacher, which has no backward pass, is left sharded
        fully_shard(module, mesh=self.mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=whole)
        if self.device.type == "cpu":  # gloo knows no means
            cast(Any, module).set_force_sum_reduction_for_comms(True)


@cache
def _register_features() -> None:
    """Have torch find the tensors in what towers return: by their gradients it sees a backward pass come. From 2.13 on
    it looks into dataclasses by itself.
    """
    names = [each.name for each in fields(GroupFeatures)]

    def flatten(features: GroupFeatures) -> tuple[list[Any], None]:
        return [getattr(features, name) for name in names], None

    def unflatten(values: Iterable[Any], _: object) -> GroupFeatures:
        return GroupFeatures(**dict(zip(names, values, strict=True)))

    register_pytree_node(GroupFeatures, flatten, unflatten)


def blocks(tower: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a tower, inner ones first: members of a list, of one class, with parameters in modules of
    their own.
    """
    found = []
    for module in tower.modules():
        members = list(module.children())
        alike = len(members) > 1 and len({type(member) for member in members}) == 1
        if isinstance(module, nn.ModuleList | nn.Sequential) and alike:
            found += [each for each in members if any(any(True for _ in x.parameters()) for x in each.children())]
    return found[::-1]


def _sharded(model: nn.Module) -> list[Any]:
    """The modules of a model whose weights are there while they are called alone, roots first."""
    return [module for module in model.modules() if hasattr(module, "set_reshard_after_forward")]


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """While entered, all of the model is whole on every rank: ranks may call it unequally often, by any method.

    A collective as it is entered. What is changed in its weights meanwhile is lost.
    """
    held = _sharded(model)
    try:
        for module in held:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        yield
    finally:
        for module in held:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


class Parts:
    """While entered, the parameters of these models are plain tensors: what this rank holds of each, in its memory.

    For what moves each number by numbers at the same place, such as a moving average; the objects are always the same.
    """

    def __init__(self, *models: nn.Module) -> None:
        self.models = models
        self._held: list[tuple[dict[str, Any], str, Tensor, Tensor]] | None = None

    def __enter__(self) -> None:
        if self._held is None:
            modules = {id(module): module for model in self.models for module in model.modules()}.values()
            self._held = [
                (module._parameters, name, x, nn.Parameter(local(x), requires_grad=x.requires_grad))
                for module in modules
                for name, x in module._parameters.items()
                if x is not None and is_sharded(x)
            ]
        for own, name, _, part in self._held:
            own[name] = part

    def __exit__(self, *error: object) -> None:
        for own, name, whole, _ in self._held or ():
            own[name] = whole
