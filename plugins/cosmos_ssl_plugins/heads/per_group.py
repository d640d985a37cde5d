"""What projection heads share: one output a view group, batch norm over all ranks.

Shape letters: n rows of any views, W width of the input, K width of the output, M masked patches.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from cosmos_ssl.api import Features, Head, HeadOutput, Modality, Need, Spec, Views
from cosmos_ssl.functional import gather, world_size

MASKED = "_masked"
PATCHES = "_patches"


class PerGroup(Head):
    """A head whose outputs are named as view groups: ``global`` [V, B, K]; and ``global_masked`` [M, K] where masks are
    drawn, for some heads ``global_patches`` [V, B, N, K] too.

    ``reads`` is what each output is computed from, ``mlp`` maps rows [n, W] to [n, K].
    """

    mlp: nn.Module

    def __init__(self, reads: Mapping[str, Need], width: int) -> None:
        super().__init__()
        self.reads = dict(reads)
        self.width = width

    def outputs(self) -> Mapping[str, int]:
        """Every group, all of one width."""
        return dict.fromkeys(self.reads, self.width)

    def requires(self, outputs: Collection[str]) -> list[Need]:
        """The features of these groups."""
        return [self.reads[name] for name in outputs]

    def forward(self, features: Features, views: Views, outputs: Collection[str]) -> HeadOutput:
        """These outputs, from one pass over all their rows, or from one for each view if batch norm mixes them."""
        inputs = {name: found(features, self.reads[name]) for name in outputs}
        if self.mixes_samples:
            return {
                name: torch.stack([self._rows(view) for view in x]) if x.dim() > 2 else self.mlp(x)
                for name, x in inputs.items()
            }
        rows = [x.flatten(0, -2) for x in inputs.values()]
        parts = self.mlp(torch.cat(rows)).split([len(x) for x in rows])
        return {
            name: part.view(*x.shape[:-1], self.width) for (name, x), part in zip(inputs.items(), parts, strict=True)
        }

    def _rows(self, view: Tensor) -> Tensor:
        rows: Tensor = self.mlp(view.flatten(0, -2))
        return rows.view(*view.shape[:-1], self.width)


def group_needs(spec: Spec, modality: Modality = "image", *, projected: bool = False) -> dict[str, Need]:
    """The features of every group of a modality by output name; masked patches too, which have no projected form."""
    needs = {
        name: Need(modality=modality, group=name, kind="projected" if projected else "pooled")
        for name in spec.views(modality)
    }
    masked = [] if projected else [name for name, view in spec.views(modality).items() if view.masks]
    return needs | {name + MASKED: Need(modality=modality, group=name, kind="masked_tokens") for name in masked}


def found(features: Features, need: Need) -> Tensor:
    """Return what a need of one group or one output of a head asked for: [V, B, W], [M, W] or [V, B, N, W]."""
    if need.head is not None:
        assert need.outputs is not None
        return features.heads[need.head][need.outputs[0]]
    assert need.modality is not None
    asked: Tensor = getattr(features.of(need.modality, hidden=need.hidden)[need.group], need.kind)
    return asked


class BatchNorm(nn.BatchNorm1d):
    """Batch norm by the rows of all ranks, [n, W] -> [n, W], in training and evaluation alike.

    Student and teacher each use the statistics of their own batch, as in BYOL and DINO; none are kept, since
    a projection head is left behind after training. Ranks may have different numbers of rows.
    """

    def __init__(self, width: int, *, affine: bool = True) -> None:
        super().__init__(width, affine=affine, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised rows, float32 at least where there are several ranks."""
        if world_size() == 1:
            return super().forward(x)
        x = x if x.dtype == torch.float64 else x.float()
        mean = x.sum(0) / max(1, len(x))
        ranks = gather(torch.cat([x.new_full((1,), len(x)), mean, (x - mean).square().sum(0)])[None])
        count, means, squares = ranks.split([1, *2 * [x.shape[1]]], dim=1)
        mean = (count * means).sum(0) / count.sum()
        variance = (squares + count * (means - mean).square()).sum(0) / count.sum()
        x = (x - mean) * (variance + self.eps).rsqrt()
        return x * self.weight + self.bias if self.affine else x


def global_batch_norm(module: nn.Module) -> nn.Module:
    """Put ``BatchNorm`` in the place of every BatchNorm1d inside ``module``."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d):
            setattr(module, name, BatchNorm(child.num_features, affine=child.affine))
        else:
            global_batch_norm(child)
    return module
