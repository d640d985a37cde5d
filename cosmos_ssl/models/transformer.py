"""The pre-norm transformer of our own towers, on packed sequences.

Shape letters: T rows of all sequences laid end to end, R rows that the last block answers, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cosmos_ssl.functional import upload
from cosmos_ssl.models import fused
from cosmos_ssl.models.adapters import is_plain
from cosmos_ssl.models.attention import Ints, Packing, packed_attention, take_rows

Recomputed: TypeAlias = bool | Literal["alternate"]
"""Which blocks the backward pass computes again: none, all, or every other one, the first among them."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How sequences lie in a packed tensor, and which of its rows the last block answers."""

    packing: Packing
    read: Tensor | None
    """Rows of [T, W] that the last block keeps; None is all of them."""
    read_packing: Packing
    _rank: Ints

    def rows(self, packed_rows: Ints) -> Tensor:
        """Return where these packed rows, all of them read, lie in the last block's output, on the device."""
        return upload(self.packing.device, self._rank[packed_rows])[0]


def lay_out(
    lengths: Ints,
    keep: NDArray[np.bool_],
    *,
    causal: bool = False,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Layout:
    """Lay sequences of these lengths end to end; ``keep``, bool [T], marks the rows that anyone reads.

    Every sequence has at least one such row; of a causal sequence they are its last row or all of its rows.
    """
    packing = Packing(lengths, causal=causal, device=device, backend=backend)
    rank = np.cumsum(keep) - 1
    if keep.all():
        return Layout(packing, None, packing, rank)
    query_lengths = np.add.reduceat(keep, np.cumsum(lengths) - lengths, dtype=np.int64)
    (read,) = upload(device, np.flatnonzero(keep))
    return Layout(packing, read, Packing(lengths, query_lengths, causal=causal, device=device, backend=backend), rank)


class SelfAttention(nn.Module):
    """The linear maps of self-attention: queries, keys and values from one matrix, in this order, and out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, W] -> queries, keys and values [T, H, d]."""
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)
        return q, k, v

    def project_rows(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, W] -> queries [R, H, d] of these rows alone, keys and values [T, H, d] of all."""
        if not is_plain(self.qkv):  # which has no rows of its own for queries
            q, k, v = self.project(x)
            return take_rows(q, rows), k, v
        sizes = [x.shape[-1], 2 * x.shape[-1]]
        q_weight, kv_weight = self.qkv.weight.split_with_sizes(sizes)
        q_bias, kv_bias = self.qkv.bias.split_with_sizes(sizes)
        k, v = F.linear(x, kv_weight, kv_bias).view(len(x), 2, self.heads, -1).unbind(1)
        return F.linear(take_rows(x, rows), q_weight, q_bias).view(len(rows), self.heads, -1), k, v


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), as OpenAI's CLIP and DFN have it."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        return F.silu(1.702 * x) / 1.702


Activation = Literal["gelu", "quick_gelu", "gelu_tanh"]
_ACTIVATIONS: Mapping[Activation, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "quick_gelu": QuickGELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
}


class Mlp(nn.Module):
    """Two linear maps with an activation (GELU, the exact one) between, whose output, the largest of a block, backward
    computes anew.
    """

    def __init__(self, width: int, hidden: int, activation: Activation = "gelu") -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = _ACTIVATIONS[activation]()
        self.activation = activation
        self.fc2 = nn.Linear(hidden, width)
        self.recompute = True

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        hidden = self.fc1(x)
        active = self.act(hidden)
        # a compiler chooses what to keep
        if not self.recompute or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return cast(Tensor, self.fc2(active))
        kept, place, act = hidden.detach(), active.data_ptr(), self.act

        def pack(saved: Tensor) -> Tensor | torch.Size:
            return saved.shape if saved.data_ptr() == place else saved

        def unpack(packed: Tensor | torch.Size) -> Tensor:
            return packed if isinstance(packed, Tensor) else act(kept).view(packed)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return cast(Tensor, self.fc2(active))


class LayerScale(nn.Module):
    """A learned factor of each channel of a residual branch (CaiT, section 2)."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        return x * self.gamma


class _Cast(torch.autograd.Function):
    """Weights in another precision, all by one launch, and their gradients back by one."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.held = weights[0].dtype
        cast = tuple(torch.empty_like(weight, dtype=dtype) for weight in weights)
        torch._foreach_copy_(cast, weights)
        ctx.mark_non_differentiable(
            *(x for x, needed in zip(cast, ctx.needs_input_grad[1:], strict=True) if not needed)
        )
        return cast

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [grad for grad in grads if grad is not None]
        wide = [torch.empty_like(grad, dtype=ctx.held) for grad in given]
        torch._foreach_copy_(wide, given)
        found = iter(wide)
        return None, *(None if grad is None else next(found) for grad in grads)


@contextmanager
def narrowed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """While entered under autocast, all of ``module`` computes in its precision, weights cast at once, norms too."""
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    with torch.autocast(device.type, enabled=False), _cast(module, dtype):
        yield


@contextmanager
def _cast(module: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """While entered, the weights of ``module`` are ``dtype``, if any; their gradients stay as wide as they were."""
    if dtype is None:
        yield
        return
    held = [
        (own, name) for part in module.modules() if (own := part._parameters) for name in own if own[name] is not None
    ]
    weights = [cast(nn.Parameter, own[name]) for own, name in held]
    try:
        for (own, name), weight in zip(held, _Cast.apply(dtype, *weights), strict=True):  # type: ignore[no-untyped-call]
            own[name] = weight
        yield
    finally:
        for (own, name), weight in zip(held, weights, strict=True):
            own[name] = weight


class LayerNorm(nn.LayerNorm):
    """Of the input's own precision, with sums in float32: autocast's is float32, and so would be all that follows."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    ``drop_path`` is the probability with which a branch of a whole sequence is left out in training, the
    others being scaled up (stochastic depth); it draws from the device's own random state.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        activation: Activation = "gelu",
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.kernels = "auto"
        """``training.kernels``."""
        self.recompute = False
        """Whether the backward pass computes all of it again, so that nothing but its input is kept."""
        self.sharded = False
        """Whether ranks share its weights, which are there while it is called alone, cast to what it computes in."""
        self.norm1 = nn.LayerNorm(width, norm_eps)
        self.attn = SelfAttention(width, heads)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, norm_eps)
        self.mlp = Mlp(width, hidden, activation)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)

    def forward(self, stream: Stream, packing: Packing, rows: Tensor | None = None, csa: bool = False) -> Stream:
        """[T, W] -> [T, W]; with ``rows`` only these are computed, [R, W], and ``packing`` has them as queries.

        The last branch is left for what comes next to add: ``joined`` does. ``csa``: softmax(q q^T / sqrt d) v +
        softmax(k k^T / sqrt d) v (SCLIP, Wang et al. 2024, section 3.2).
        """
        x, q, k, v = self.before_attention(*stream, rows)
        if csa:
            attended = packed_attention(q, q, v, packing) + packed_attention(k, k, v, packing)
        else:
            attended = packed_attention(q, k, v, packing)
        factors = None
        if self.training and self.drop_path:
            share, drawn = 1 - self.drop_path, torch.empty(len(packing.lengths), 2, 1, device=x.device, dtype=x.dtype)
            factors = drawn.bernoulli_(share).div_(share)[packing.sequence_of_query]
        x, branch, bias = self.after_attention(x if rows is None else take_rows(x, rows), attended.flatten(1), factors)
        return x, branch, bias.clone() if self.sharded and bias is not None else bias

    def before_attention(
        self, x: Tensor, branch: Tensor | None, bias: Tensor | None, rows: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The sum so far [T, W], and queries, keys and values [T, H, d]; with ``rows`` the queries of these alone, [R,
        H, d].
        """
        if rows is None and self._fuses(x, self.attn.qkv):
            return fused.norm_project(x, branch, bias, self.norm1, self.attn.qkv, self.attn.heads)
        if branch is not None and self._fuses(x):
            x, normed = fused.add_norm(x, branch, bias, self.norm1)
        else:
            x = joined(x, branch, bias)
            normed = self.norm1(x)
        return x, *(self.attn.project(normed) if rows is None else self.attn.project_rows(normed, rows))

    def _fuses(self, x: Tensor, *maps: nn.Module) -> bool:
        """Whether kernels serve rows like ``x``, and these linear maps, whose weights they read."""
        return self.kernels == "auto" and is_plain(*maps) and fused.usable(x)

    def after_attention(self, x: Tensor, attended: Tensor, factors: Tensor | None) -> Stream:
        """What follows attention, [R, W]; ``factors`` [R, 2, 1] of both branches, from drop path."""
        proj, fc2 = self.attn.proj, self.mlp.fc2
        first, second = (None, None) if factors is None else (factors[:, 0], factors[:, 1])
        if self.mlp.activation != "gelu" or not self._fuses(x, proj, self.mlp.fc1, fc2):
            x = joined(x, *_scaled(self.ls1, first, proj(attended), None))
            return x, *_scaled(self.ls2, second, self.mlp(self.norm2(x)), None)
        branch, bias = _scaled(self.ls1, first, attended @ proj.weight.t(), proj.bias)
        x, branch = fused.norm_mlp(x, branch, bias, self.norm2, self.mlp.fc1, fc2)
        return x, *_scaled(self.ls2, second, branch, fc2.bias)


Stream: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None]
"""Rows [T, W]; a branch [T, W] and its bias [W] that are still to be added to them."""


def joined(x: Tensor, branch: Tensor | None, bias: Tensor | None) -> Tensor:
    """The sum of a stream [T, W]."""
    if branch is None:
        return x
    return x + (branch if bias is None else branch + bias)


def _scaled(
    scale: nn.Module, factors: Tensor | None, branch: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A branch times its scales, with the bias that is still to be added to it."""
    if isinstance(scale, nn.Identity) and factors is None:
        return branch, bias
    branch = scale(branch if bias is None else branch + bias)
    return branch if factors is None else branch * factors, None


def _run(block: Block, dtype: torch.dtype | None, *arguments: Any) -> Stream:
    """What a block leaves; while gradients are kept, its weights are cast to ``dtype`` by itself, so that theirs come
    one block after the other, and are averaged over ranks meanwhile.
    """
    with _cast(block, dtype if torch.is_grad_enabled() and not block.sharded else None):
        return cast(Stream, block(*arguments))


class Blocks(nn.ModuleList):
    """The blocks of a tower, one after the other; the last computes only the rows that are read."""

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int | None,
        *,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        drop_path_uniform: bool = False,
        grad_checkpointing: Recomputed = False,
        activation: Activation = "gelu",
        norm_eps: float = 1e-5,
        kernels: str = "auto",
    ) -> None:
        """``heads`` is width / 64 where None, ``drop_path`` the last block's rate, growing linearly from 0; with
        ``drop_path_uniform`` it is every block's, as in DINOv2.

        ``kernels`` is ``training.kernels``: ``auto`` or ``plain``.

        Raises ValueError.
        """
        if heads is None:
            if width % 64:
                raise ValueError(f"heads: must be given, since width {width} is no multiple of 64")
            heads = width // 64
        check_sizes(width=width, layers=layers, heads=heads)
        if width % heads:
            raise ValueError(f"heads: {heads} heads cannot share a width of {width}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path: {drop_path:g} is no share below 1")
        rates = [drop_path if drop_path_uniform else drop_path * i / max(1, layers - 1) for i in range(layers)]
        hidden = int(width * mlp_ratio)
        if hidden < 1:
            raise ValueError(f"mlp_ratio: {mlp_ratio:g} leaves the MLP no width")
        kind: dict[str, Any] = {"layer_scale": layer_scale, "activation": activation, "norm_eps": norm_eps}
        super().__init__(Block(width, heads, hidden, drop_path=rate, **kind) for rate in rates)
        for number, block in enumerate(self):
            block.kernels = kernels
            block.recompute = grad_checkpointing is True or (grad_checkpointing == "alternate" and number % 2 == 0)
            block.mlp.recompute = not block.recompute  # it computes all anew, and would keep what this needs

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Have torch compile the blocks in place, except for the attention, whose lengths differ at each step."""
        import torch._dynamo.config as dynamo  # takes seconds

        # all blocks share it: widths, roles, evaluation, rows read or all
        dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
        for block in self:
            for name in ("before_attention", "after_attention"):
                setattr(block, name, torch.compile(getattr(block, name), *args, **{"dynamic": True} | kwargs))

    def __iter__(self) -> Iterator[Block]:
        return cast(Iterator[Block], super().__iter__())

    def forward(self, x: Tensor, layout: Layout, *, csa: bool = False) -> Tensor:
        """[T, W] -> [R, W], or [T, W] where every row is read; ``csa`` changes the last block's attention.

        Under autocast all of it, the residual stream too, has autocast's precision, and so has the output.
        """
        device, last = x.device.type, len(self) - 1
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        narrow = None if torch.is_grad_enabled() or any(block.sharded for block in self) else dtype
        with torch.autocast(device, enabled=False), _cast(self, narrow):
            stream: Stream = (x if dtype is None else x.to(dtype), None, None)
            for i, block in enumerate(self):
                ends = i == last
                packing, rows = (layout.read_packing, layout.read) if ends else (layout.packing, None)
                arguments = (block, dtype, stream, packing, rows, csa and ends)
                if block.recompute and torch.is_grad_enabled():
                    stream = checkpoint(_run, *arguments, use_reentrant=False)
                else:
                    stream = _run(*arguments)
            return joined(*stream)


def head_widths(model: nn.Module) -> list[int]:
    """The widths of the heads of its transformers, each once."""
    layers = [module for module in model.modules() if isinstance(module, SelfAttention)]
    return sorted({layer.proj.in_features // layer.heads for layer in layers})


def check_sizes(**sizes: float) -> None:
    """Raise ValueError for an option that is not above zero."""
    for name, size in sizes.items():
        if not size > 0:
            raise ValueError(f"{name}: {size:g} is not above zero")


def pick_views(x: Tensor, views: Sequence[int]) -> Tensor:
    """These views of [V, ...], without a copy where they are all, or neighbours in order."""
    if tuple(views) == tuple(range(views[0], views[0] + len(views))):
        return x[views[0] : views[0] + len(views)]
    return x[list(views)]


def project(pooled: Tensor, projection: Tensor, bias: Tensor | None) -> Tensor:
    """Pooled features [..., W] in the shared space, [..., D]."""
    return pooled @ projection if bias is None else pooled @ projection + bias


def layer_of(name: str, head: int) -> int:
    """The depth of a tower's parameter: 0 before the blocks, N + 1 in ``blocks.N``, ``head`` after them."""
    parts = name.split(".")
    if parts[0] == "blocks":
        return int(parts[1]) + 1
    return head if parts[0] in ("norm", "projection", "projection_bias") else 0
