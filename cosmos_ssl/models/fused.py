"""The transformer's operations that are one kernel each on CUDA in 16 bits, and their gradients.

Shape letters: T rows, W width, N width inside the MLP, P blocks of rows that are summed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from cosmos_ssl.functional.kernels import Kernels

_TILE, _BLOCKS, _ROWS = 128, 256, 4
"""Rows of a tile of a product; programs that share the rows of a sum, each with at least so many."""
_WIDEST = 4096
"""Columns of a row that one program holds."""


def usable(x: Tensor) -> bool:
    """Return whether rows like ``x`` [T, W] are served here: 16 bits, on CUDA, where Triton runs, and not compiled.

    A compiler fuses by itself.
    """
    if not x.is_cuda or torch.compiler.is_compiling() or x.dim() != 2 or x.shape[1] > _WIDEST:
        return False
    return KERNELS.fault(x.device, x.dtype) is None


def _try(device: torch.device, dtype: torch.dtype) -> None:
    x = torch.zeros(3, 16, device=device, dtype=dtype, requires_grad=True)
    norm = nn.LayerNorm(16, device=device, dtype=dtype)
    make = functools.partial(nn.utils.skip_init, nn.Linear, device=device, dtype=dtype)  # draws no numbers
    wide, narrow = make(16, 48), make(48, 16)
    total, normed = add_norm(x, x, norm.bias, norm)
    total, q, k, v = norm_project(total, normed, norm.bias, norm, wide, 1)
    total, branch = norm_mlp(total, (q + k + v).flatten(1), norm.bias, norm, wide, narrow)
    (total + branch).sum().backward()


KERNELS = Kernels("the transformer, unless compiled", _try, (torch.bfloat16, torch.float16))


# ---------------------------------------------------------------------------- operations


def _kernels() -> Any:
    from cosmos_ssl.models import kernels

    return kernels


def _shares(rows: int) -> int:
    return max(1, min(_BLOCKS, -(-rows // _ROWS)))


def _sums(like: Tensor, blocks: int, columns: int) -> Tensor:
    return like.new_empty(blocks, columns, dtype=torch.float32)


def _like_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x) if keep else 0, len(weight)), x.new_empty(len(x), len(weight))


@custom_op("cosmos_ssl::linear_gelu", mutates_args=())
def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """x weight^T + bias [T, N], empty unless kept, and its GELU."""
    out = _like_linear_gelu(x, weight, bias, keep)
    _kernels().linear_gelu(x, weight, bias, *out)
    return out


def _like_gelu_grad(grad: Tensor, weight: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sums = _sums(hidden, -(-len(hidden) // _TILE), hidden.shape[1])
    return torch.empty_like(hidden), torch.empty_like(hidden), sums


@custom_op("cosmos_ssl::gelu_grad", mutates_args=())
def _gelu_grad(grad: Tensor, weight: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(grad weight) GELU'(hidden) [T, N], GELU(hidden), and sums of the first by blocks of rows [P, N]."""
    out = _like_gelu_grad(grad, weight, hidden)
    _kernels().gelu_grad(grad, weight, hidden, *out)
    return out


def _like_add_norm(
    x: Tensor, branch: Tensor | None, bias: Tensor | None, weight: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    moments = [x.new_empty(len(x), dtype=torch.float32) for _ in range(2)]
    return x.new_empty(0) if branch is None else torch.empty_like(x), torch.empty_like(x), moments[0], moments[1]


@custom_op("cosmos_ssl::add_norm", mutates_args=())
def _add_norm(
    x: Tensor, branch: Tensor | None, bias: Tensor | None, weight: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x + branch + bias [T, W], empty without a branch; its LayerNorm, and its rows' means and scales [T]."""
    out = _like_add_norm(x, branch, bias, weight, shift, eps)
    _kernels().add_norm(x, branch, bias, weight, shift, eps, *out)
    return out


def _like_add_norm_grad(
    grad: Tensor, through: Tensor | None, total: Tensor, means: Tensor, scales: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(total), _sums(total, _shares(len(total)), 3 * total.shape[1])


@custom_op("cosmos_ssl::add_norm_grad", mutates_args=())
def _add_norm_grad(
    grad: Tensor, through: Tensor | None, total: Tensor, means: Tensor, scales: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of the sum [T, W]; sums of weight's, shift's and its own by blocks of rows [P, 3 W]."""
    out = _like_add_norm_grad(grad, through, total, means, scales, weight)
    _kernels().add_norm_grad(grad, through, total, means, scales, weight, *out)
    return out


def _like_stack(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    width = 3 * q.shape[1] * q.shape[2]
    return q.new_empty(len(q), width), _sums(q, _shares(len(q)), width)


@custom_op("cosmos_ssl::stack", mutates_args=())
def _stack(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Three of [T, H, d] side by side [T, 3 W], and sums of that by blocks of rows [P, 3 W]."""
    out = _like_stack(q, k, v)
    _kernels().stack(q, k, v, *out)
    return out


def _like_column_sums(first: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
    return first.new_empty(first.shape[1] + second.shape[1], dtype=dtype)


@custom_op("cosmos_ssl::column_sums", mutates_args=())
def _column_sums(first: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
    """Of [P, N] and [Q, M], end to end: [N + M]."""
    out = _like_column_sums(first, second, dtype)
    _kernels().column_sums(first, second, out)
    return out


for _op, _like in (
    (_linear_gelu, _like_linear_gelu),
    (_gelu_grad, _like_gelu_grad),
    (_add_norm, _like_add_norm),
    (_add_norm_grad, _like_add_norm_grad),
    (_stack, _like_stack),
    (_column_sums, _like_column_sums),
):
    _op.register_fake(_like)


@register_flop_formula(torch.ops.cosmos_ssl.linear_gelu)
def _linear_gelu_flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * weight[0]


@register_flop_formula(torch.ops.cosmos_ssl.gelu_grad)
def _gelu_grad_flops(grad: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * grad[0] * grad[1] * weight[1]


# ---------------------------------------------------------------------------- with gradients


def _normed(x: Tensor, branch: Tensor | None, bias: Tensor | None, *norm: Any) -> tuple[Tensor, ...]:
    """The sum, its norm, and the rows' means and scales."""
    total, *found = _add_norm(x.contiguous(), None if branch is None else branch.contiguous(), bias, *norm)
    return x if branch is None else total, *found


class _AddNorm(torch.autograd.Function):
    """A residual sum and its LayerNorm."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, bias: Tensor | None, weight: Tensor, shift: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        total, normed, means, scales = _normed(x, branch, bias, weight, shift, eps)
        ctx.save_for_backward(total, means, scales, weight)
        return total, normed

    @staticmethod
    def backward(ctx: Any, through: Tensor | None, grad: Tensor) -> tuple[Tensor | None, ...]:
        found, sums = _add_norm_grad(grad.contiguous(), through, *ctx.saved_tensors)
        gains, shifts, biases = _column_sums(sums, sums[:, :0], found.dtype).chunk(3)
        return found, found, biases if ctx.needs_input_grad[2] else None, gains, shifts, None


def add_norm(x: Tensor, branch: Tensor, bias: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """x + branch + bias [T, W], and its norm."""
    found = _AddNorm.apply(x, branch, bias, norm.weight, norm.bias, norm.eps)  # type: ignore[no-untyped-call]
    return cast(tuple[Tensor, Tensor], found)


class _NormProject(torch.autograd.Function):
    """A residual sum, and queries, keys and values of its LayerNorm by one product."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, bias: Tensor | None, gain: Tensor, shift: Tensor, eps: float,
        weight: Tensor, offset: Tensor, heads: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.set_materialize_grads(False)
        total, normed, means, scales = _normed(x, branch, bias, gain, shift, eps)
        ctx.save_for_backward(total, means, scales, gain, normed, weight)
        return total, *torch.addmm(offset, normed, weight.t()).view(len(x), 3, heads, -1).unbind(1)

    @staticmethod
    def backward(ctx: Any, through: Tensor | None, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *kept, normed, weight = ctx.saved_tensors
        stacked, sums = _stack(*(grad if grad[0].is_contiguous() else grad.contiguous() for grad in grads))
        found, moments = _add_norm_grad(stacked @ weight, through, *kept)
        needed, width = ctx.needs_input_grad, found.shape[1]
        offsets, gains, shifts, biases = _column_sums(sums, moments, found.dtype).split([3 * width, *[width] * 3])
        of_weight = stacked.t() @ normed if needed[6] else None
        return (
            found, found if needed[1] else None, biases if needed[2] else None, gains, shifts, None,
            of_weight, offsets, None,
        )  # fmt: skip


def norm_project(
    x: Tensor, branch: Tensor | None, bias: Tensor | None, norm: nn.LayerNorm, linear: nn.Linear, heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x + branch + bias [T, W], and queries, keys and values of its norm, [T, H, d]; x alone without a branch."""
    given = x, branch, bias, norm.weight, norm.bias, norm.eps, linear.weight, linear.bias, heads
    return cast(tuple[Tensor, Tensor, Tensor, Tensor], _NormProject.apply(*given))  # type: ignore[no-untyped-call]


class _NormMlp(torch.autograd.Function):
    """A residual sum, and two linear maps of its LayerNorm with GELU between, whose output backward makes anew."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, bias: Tensor | None, gain: Tensor, shift: Tensor, eps: float,
        weight: Tensor, offset: Tensor, out: Tensor, keep: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        total, normed, means, scales = _normed(x, branch, bias, gain, shift, eps)
        hidden, active = _linear_gelu(normed, weight, offset, keep)
        ctx.save_for_backward(total, means, scales, gain, normed, weight, out, hidden)
        return total, active @ out.t()

    @staticmethod
    def backward(ctx: Any, through: Tensor | None, grad: Tensor) -> tuple[Tensor | None, ...]:
        *kept, normed, weight, out, hidden = ctx.saved_tensors
        grad, needed = grad.contiguous(), ctx.needs_input_grad
        inner, active, sums = _gelu_grad(grad, out, hidden)
        of_weights = inner.t() @ normed if needed[6] else None, grad.t() @ active if needed[8] else None
        del active
        found, moments = _add_norm_grad(inner @ weight, through, *kept)
        sizes = [len(weight), *[found.shape[1]] * 3]
        offsets, gains, shifts, biases = _column_sums(sums, moments, found.dtype).split(sizes)
        return (
            found, found, biases if needed[2] else None, gains, shifts, None,
            of_weights[0], offsets, of_weights[1], None,
        )  # fmt: skip


def norm_mlp(
    x: Tensor, branch: Tensor, bias: Tensor | None, norm: nn.LayerNorm, inner: nn.Linear, outer: nn.Linear
) -> tuple[Tensor, Tensor]:
    """x + branch + bias [T, W], and outer(GELU(inner(its norm))) without the last bias, [T, W]."""
    weights = norm.weight, norm.bias, inner.weight, inner.bias, outer.weight
    keep = torch.is_grad_enabled() and any(given.requires_grad for given in (x, branch, *weights))
    given = x, branch, bias, *weights[:2], norm.eps, *weights[2:], keep
    return cast(tuple[Tensor, Tensor], _NormMlp.apply(*given))  # type: ignore[no-untyped-call]
