"""Losses over the global batch, exact in memory of a chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from cosmos_ssl.functional.collective_time import collective_time
from cosmos_ssl.functional.collectives import rank, world_size
from cosmos_ssl.functional.upload import upload

CHUNK = 1 << 24
"""Logits held at once, in elements; on CUDA as many as fill ``_SHARE`` of the memory, if these are more."""

_SHARE = 1 / 256


class _InfoNCE(torch.autograd.Function):
    """InfoNCE in chunks of rows: nothing of size B x N outlives its chunk, forward or backward."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, scale: Tensor, weights: Tensor, chunk: int, negatives: Tensor, ways: int
    ) -> Tensor:
        (v, rows, _), (u, columns, _) = a.shape, b.shape
        start = rank() * rows
        row_lse = a.new_empty(v, rows, u)
        column_lse = a.new_full((v, u, columns), -torch.inf)
        for part in _chunks(rows, v * u * (columns + len(negatives)), chunk):
            logits = _logits(a[:, part], b, scale)
            row_lse[:, part] = logits.logsumexp(3)
            if len(negatives):
                further = _logits(a[:, part], negatives[None], scale).logsumexp(3)
                row_lse[:, part] = torch.logaddexp(row_lse[:, part], further)
            if ways == 2:
                column_lse = torch.logaddexp(column_lse, logits.logsumexp(1))
        if (
            ways == 2 and world_size() > 1
        ):  # unit vectors: a logit is at most scale, and float64 holds exp(-2 scale) of any sane scale
            sums = (column_lse - scale).double().exp()
            with collective_time.during(sums):
                dist.all_reduce(sums)
            column_lse = sums.log().to(a.dtype) + scale
        own = slice(start, start + rows)
        positive = torch.einsum("vbd,ubd->vbu", a, b[:, own]) * scale
        ctx.save_for_backward(a, b, scale, weights, row_lse, column_lse, negatives)
        ctx.chunk, ctx.start, ctx.ways = chunk, start, ways
        lse = row_lse + column_lse[:, :, own].transpose(1, 2) if ways == 2 else row_lse
        return (weights * (lse - ways * positive).mean(1)).sum() / ways

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        a, b, scale, weights, row_lse, column_lse, negatives = ctx.saved_tensors
        (v, rows, _), (u, columns, _) = a.shape, b.shape
        grad_a = torch.empty_like(a) if ctx.needs_input_grad[0] else None
        grad_b = torch.zeros_like(b) if ctx.needs_input_grad[1] else None
        grad_scale = torch.zeros_like(scale)
        weight = (weights * (grads[0] / (ctx.ways * rows))).view(v, 1, u, 1)
        for part in _chunks(rows, v * u * (columns + len(negatives)), ctx.chunk):
            logits = _logits(a[:, part], b, scale)
            g = (logits - row_lse[:, part].unsqueeze(3)).exp_()
            if ctx.ways == 2:
                g += (logits - column_lse.unsqueeze(1)).exp_()
            m = torch.arange(g.shape[1], device=a.device)
            g[:, m, :, m + ctx.start + part.start] -= ctx.ways  # the positive of each row, once a direction
            g *= weight
            grad_scale += (g * logits).sum() / scale
            _pull(g.view(-1, u * columns) * scale, a, b, part, grad_a, grad_b)
            if len(negatives):
                logits = _logits(a[:, part], negatives[None], scale)  # [V, m, 1, K]
                g = (weight * (logits - row_lse[:, part].unsqueeze(3)).exp_()).sum(2)
                grad_scale += (g * logits[:, :, 0]).sum() / scale
                if grad_a is not None:
                    grad_a[:, part] += (g * scale) @ negatives
        return grad_a, grad_b, grad_scale if ctx.needs_input_grad[2] else None, None, None, None, None


class _Sigmoid(torch.autograd.Function):
    """The pairwise sigmoid loss in chunks of rows, like ``_InfoNCE``."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, weights: Tensor, chunk: int) -> Tensor:
        (v, rows, _), (u, columns, _) = a.shape, b.shape
        start = rank() * rows
        sums = a.new_zeros(v, u)
        for part in _chunks(rows, v * u * columns, chunk):
            logits = _turn_own(_logits(a[:, part], b, scale).add_(bias), start + part.start)
            sums -= F.logsigmoid(logits.neg_()).sum((1, 3))
        ctx.save_for_backward(a, b, scale, bias, weights)
        ctx.chunk, ctx.start = chunk, start
        return (weights * sums).sum() / rows

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        a, b, scale, bias, weights = ctx.saved_tensors
        (v, rows, _), (u, columns, _) = a.shape, b.shape
        grad_a = torch.empty_like(a) if ctx.needs_input_grad[0] else None
        grad_b = torch.zeros_like(b) if ctx.needs_input_grad[1] else None
        grad_scale, grad_bias = torch.zeros_like(scale), torch.zeros_like(bias)
        weight = (weights * (grads[0] / rows)).view(v, 1, u, 1)
        for part in _chunks(rows, v * u * columns, ctx.chunk):
            logits = _logits(a[:, part], b, scale)
            first = ctx.start + part.start
            g = _turn_own(_turn_own(logits + bias, first).sigmoid_(), first)
            g *= weight
            grad_scale += (g * logits).sum() / scale
            grad_bias += g.sum()
            _pull(g.view(-1, u * columns) * scale, a, b, part, grad_a, grad_b)
        needed = ctx.needs_input_grad
        return grad_a, grad_b, grad_scale if needed[2] else None, grad_bias if needed[3] else None, None, None


def _turn_own(logits: Tensor, first: int) -> Tensor:
    """Change the sign where row m meets column ``first + m`` of [V, m, U, N], in place: a sample and itself."""
    m = torch.arange(logits.shape[1], device=logits.device)
    logits[:, m, :, m + first] *= -1
    return logits


def _pull(g: Tensor, a: Tensor, b: Tensor, part: slice, grad_a: Tensor | None, grad_b: Tensor | None) -> None:
    """Gradients of the similarities of some rows, [V x m, U x N], to those of both sides."""
    d = a.shape[-1]
    if grad_a is not None:
        grad_a[:, part] = (g @ b.view(-1, d)).view(a.shape[0], -1, d)
    if grad_b is not None:
        grad_b += (g.T @ a[:, part].reshape(-1, d)).view(b.shape)


def _chunks(rows: int, elements_a_row: int, chunk: int) -> list[slice]:
    step = max(1, chunk // elements_a_row)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _logits(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """[V, m, D], [U, N, D] -> scaled similarities [V, m, U, N]."""
    (v, m, d), (u, n, _) = a.shape, b.shape
    return (a.reshape(-1, d) @ b.reshape(-1, d).T).mul_(scale).view(v, m, u, n)


def info_nce(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    *,
    negatives: Tensor | None = None,
    symmetric: bool = True,
    a_weights: Sequence[float] | None = None,
    b_weights: Sequence[float] | None = None,
    chunk: int | None = None,
) -> Tensor:
    """InfoNCE over the global batch, in both directions unless told otherwise, averaged over all pairs of views.

    Sample m of every view of ``a`` belongs to global sample ``rank * B + m`` of every view of ``b``.
    Cross-entropy of ``scale * a b^T`` in both directions (CLIP, arXiv 2103.00020, figure 3; over view
    pairs: COSMOS, arXiv 2412.01814, section 3).

    Args:
        a: unit vectors of this rank, [V, B, D].
        b: unit vectors of all ranks, gathered with gradients, [U, N, D].
        scale: the inverse temperature, a scalar of at most 300.
        negatives: unit vectors of no sample in the batch, such as a queue of past ones, the same on all ranks, [K, D]:
            what each row of ``a`` is told apart from beside ``b`` (MoCo, arXiv 1911.05722). They take no gradient.
        symmetric: False leaves out the direction from ``b`` to ``a``: a query finds its key, as in MoCo.
        a_weights, b_weights: share of each view, summing to 1 (default: equal); a pair weighs their product.
        chunk: logits held at once, in elements (default: by the device).

    Returns:
        A scalar, the mean over this rank's samples; averaged over ranks it is the dense loss, and so
        are gradients that are averaged over ranks.
    """
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    weights = _weights(a, b, a_weights, b_weights, dtype)
    others = a.new_empty(0, a.shape[-1], dtype=dtype) if negatives is None else negatives.detach().to(dtype)
    a, b = a.to(dtype).contiguous(), b.to(dtype).contiguous()
    chunk = chunk or _chunk(a)
    return cast(Tensor, _InfoNCE.apply(a, b, scale.to(dtype), weights, chunk, others, 1 + symmetric))  # type: ignore[no-untyped-call]


def sigmoid_loss(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    a_weights: Sequence[float] | None = None,
    b_weights: Sequence[float] | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The pairwise sigmoid loss over the global batch, averaged over all pairs of views.

    -log sigmoid(z (scale a b^T + bias)), z = 1 for a sample and itself and -1 for two samples, summed over the
    columns and averaged over the rows (SigLIP, arXiv 2303.15343, algorithm 1). No collective is needed.

    Args:
        a: unit vectors of this rank, [V, B, D].
        b: unit vectors of all ranks, gathered with gradients, [U, N, D].
        scale, bias: scalars.
        a_weights, b_weights: share of each view, summing to 1 (default: equal); a pair weighs their product.
        chunk: logits held at once, in elements (default: by the device).

    Returns:
        A scalar, the mean over this rank's samples; averaged over ranks it is the dense loss, and so
        are gradients that are averaged over ranks.
    """
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    weights = _weights(a, b, a_weights, b_weights, dtype)
    a, b = a.to(dtype).contiguous(), b.to(dtype).contiguous()
    chunk = chunk or _chunk(a)
    return cast(Tensor, _Sigmoid.apply(a, b, scale.to(dtype), bias.to(dtype), weights, chunk))  # type: ignore[no-untyped-call]


def _chunk(a: Tensor) -> int:
    """Logits held at once on the device of ``a``."""
    if not a.is_cuda:
        return CHUNK
    room = torch.cuda.get_device_properties(a.device).total_memory * _SHARE
    return max(CHUNK, int(room) // a.element_size())


def _weights(
    a: Tensor, b: Tensor, a_weights: Sequence[float] | None, b_weights: Sequence[float] | None, dtype: torch.dtype
) -> Tensor:
    """Of each pair of views, [V, U], on the device."""
    pairs = torch.outer(_shares(a.shape[0], a_weights), _shares(b.shape[0], b_weights))
    return upload(a.device, pairs.to(dtype))[0]


def _shares(views: int, weights: Sequence[float] | None) -> Tensor:
    return torch.tensor([1 / views] * views if weights is None else weights, dtype=torch.float64)
