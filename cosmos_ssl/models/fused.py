"""The transformer's operations that are one kernel on CUDA in 16 bits, with their gradients; ``kernels`` has the kernels.

Shape letters: T rows, W width, N width inside the MLP, P blocks of rows that are summed.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.library import custom_op

_log = logging.getLogger("cosmos_ssl.models")
_TILE, _BLOCKS, _ROWS = 128, 256, 4
"""Rows of a tile of a product; programs that share the rows of a sum, each with at least so many."""
_WIDEST = 4096
"""Columns of a row that one program holds."""


def usable(x: Tensor) -> bool:
    """Return whether rows like ``x`` [T, W] are served here: 16 bits, on CUDA, where Triton runs, and not compiled.

    A compiler fuses by itself.
    """
    if x.dtype not in (torch.bfloat16, torch.float16) or not x.is_cuda or torch.compiler.is_compiling():
        return False
    return x.dim() == 2 and x.shape[1] <= _WIDEST and _fault(x.device, x.dtype) is None


@functools.cache
def _fault(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run so, found by trying them forward and back; None where they can."""
    try:
        own = saved_tensors_hooks(lambda x: x, lambda x: x)  # not those of a checkpointed block around this
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False), own:
            x, weight = (torch.zeros(n, 16, device=device, dtype=dtype, requires_grad=True) for n in (3, 48))
            bias = torch.zeros(48, device=device, dtype=dtype, requires_grad=True)
            total, normed = add_norm(x, x, bias[:16], bias[:16], bias[:16], 1e-5)
            q, k, v = project(normed, weight, bias, 1)
            out = mlp((q + k + v).flatten(1), weight, bias, weight.t().contiguous())
            (out + total).sum().backward()
    except Exception as error:  # a wheel of another GPU or compiler fails in many ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        _log.warning("fused kernels do not run on %s (%s): the transformer's operations are PyTorch's", device, reason)
        return reason
    return None


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
    x: Tensor, branch: Tensor, bias: Tensor | None, weight: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    moments = [x.new_empty(len(x), dtype=torch.float32) for _ in range(2)]
    return torch.empty_like(x), torch.empty_like(x), moments[0], moments[1]


@custom_op("cosmos_ssl::add_norm", mutates_args=())
def _add_norm(
    x: Tensor, branch: Tensor, bias: Tensor | None, weight: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x + branch + bias [T, W], its LayerNorm, and its rows' means and scales [T]."""
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


def _like_column_sums(sums: Tensor, dtype: torch.dtype) -> Tensor:
    return sums.new_empty(sums.shape[1], dtype=dtype)


@custom_op("cosmos_ssl::column_sums", mutates_args=())
def _column_sums(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """[P, N] -> [N]."""
    out = _like_column_sums(sums, dtype)
    _kernels().column_sums(sums, out)
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


# ---------------------------------------------------------------------------- with gradients


class _Mlp(torch.autograd.Function):
    """Two linear maps with GELU between, whose output backward makes anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, keep: bool) -> Tensor:
        hidden, active = _linear_gelu(x, weight, bias, keep)
        ctx.save_for_backward(x, weight, out, hidden)
        return active @ out.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, out, hidden = ctx.saved_tensors
        grad = grad.contiguous()
        inner, active, sums = _gelu_grad(grad, out, hidden)
        needed = ctx.needs_input_grad
        return (
            inner @ weight if needed[0] else None,
            inner.t() @ x if needed[1] else None,
            _column_sums(sums, grad.dtype) if needed[2] else None,
            grad.t() @ active if needed[3] else None,
            None,
        )


def mlp(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """GELU(x weight^T + bias) out^T: x [T, W], weight [N, W], bias [N], out [W, N] -> [T, W]."""
    keep = torch.is_grad_enabled() and any(given.requires_grad for given in (x, weight, bias, out))
    return cast(Tensor, _Mlp.apply(x, weight, bias, out, keep))  # type: ignore[no-untyped-call]


class _AddNorm(torch.autograd.Function):
    """A residual sum and its LayerNorm."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, bias: Tensor | None, weight: Tensor, shift: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        total, normed, means, scales = _add_norm(x, branch, bias, weight, shift, eps)
        ctx.save_for_backward(total, means, scales, weight)
        return total, normed

    @staticmethod
    def backward(ctx: Any, through: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        total, means, scales, weight = ctx.saved_tensors
        grad = torch.zeros_like(total) if grad is None else grad.contiguous()
        through = None if through is None else through.contiguous()
        found, sums = _add_norm_grad(grad, through, total, means, scales, weight)
        gains, shifts, biases = _column_sums(sums, weight.dtype).chunk(3)
        return found, found, biases if ctx.needs_input_grad[2] else None, gains, shifts, None


def add_norm(
    x: Tensor, branch: Tensor, bias: Tensor | None, weight: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + branch + bias [T, W], and its LayerNorm with ``weight`` and ``shift`` [W]."""
    return cast(tuple[Tensor, Tensor], _AddNorm.apply(x, branch, bias, weight, shift, eps))  # type: ignore[no-untyped-call]


class _Project(torch.autograd.Function):
    """Queries, keys and values by one product, and one product of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        q, k, v = torch.addmm(bias, x, weight.t()).view(len(x), 3, heads, -1).unbind(1)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = (grad if grad[0].is_contiguous() else grad.contiguous() for grad in grads)
        stacked, sums = _stack(*rows)
        needed = ctx.needs_input_grad
        return (
            stacked @ weight if needed[0] else None,
            stacked.t() @ x if needed[1] else None,
            _column_sums(sums, x.dtype) if needed[2] else None,
            None,
        )


def project(x: Tensor, weight: Tensor, bias: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """x weight^T + bias as queries, keys and values [T, H, d]: x [T, W], weight [3 W, W]."""
    return cast(tuple[Tensor, Tensor, Tensor], _Project.apply(x, weight, bias, heads))  # type: ignore[no-untyped-call]
