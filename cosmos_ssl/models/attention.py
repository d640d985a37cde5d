"""Attention over sequences of equal length, and over sequences of any lengths laid end to end.

One family of functions serves all of our own towers and heads, on four backends: ``xformers`` and ``varlen`` (CUDA),
``sdpa`` (PyTorch, any device) and ``reference`` (a plain loop that the tests compare with). ``varlen`` is PyTorch's own
for sequences laid end to end; those of equal length are ``sdpa``'s there.

Shape letters: B sequences, H heads, d width of a head, Lq queries and Lk keys of one sequence;
T rows of a packed tensor, the sum of its sequences' lengths.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from cosmos_ssl.errors import UserError, did_you_mean
from cosmos_ssl.functional import upload
from cosmos_ssl.functional.kernels import tried

BACKENDS = ("auto", "xformers", "varlen", "sdpa", "reference")

# Short runs of sequences are padded to their neighbours as long as the padded bucket stays below this many
# rows: about where copying that many rows begins to cost more than one more call of the kernel.
_BUCKET_ROWS = {"cpu": 128, "cuda": 16_384}

Ints = NDArray[np.int64]


# ---------------------------------------------------------------------------- backends


@contextmanager
def _quiet_xformers() -> Iterator[None]:
    """Keep xformers from warning about what ``backend_report`` says better."""
    logger = logging.getLogger("xformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@functools.cache
def _xformers() -> tuple[ModuleType, ModuleType]:
    """xformers' operators and its masks."""
    with _quiet_xformers():
        from xformers import ops
        from xformers.ops.fmha import attn_bias

        return ops, attn_bias


def _by_xformers(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    ops, _ = _xformers()
    return cast(Tensor, ops.memory_efficient_attention(q[None], k[None], v[None], attn_bias=packing.bias)[0])


class _Varlen(torch.autograd.Function):
    """PyTorch's ``varlen_attn``, whose own backward pass makes two tensors of zeros besides."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        ends, window = packing.ends, [-1, 0 if packing.causal else -1]
        ctx.fixed = *ends, int(packing.query_lengths.max()), int(packing.lengths.max()), packing.causal
        ctx.window = window
        out, sums, state = torch.ops.torch_attn._varlen_attn(q, k, v, *ctx.fixed, None, window)
        ctx.save_for_backward(q, k, v, out, sums, state)
        return cast(Tensor, out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *kept, state = ctx.saved_tensors
        grads = torch.ops.torch_attn._varlen_attn_backward(grad, *kept, *ctx.fixed, state, None, ctx.window)
        return *grads, None


def _by_varlen(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    importlib.import_module("torch.nn.attention.varlen")  # registers its operations
    return cast(Tensor, _Varlen.apply(q, k, v, packing))  # type: ignore[no-untyped-call]


_KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor, Packing], Tensor]] = {
    "xformers": _by_xformers,
    "varlen": _by_varlen,
}
"""Attention in memory that grows with the rows alone, in the order in which ``auto`` takes it."""


@functools.cache
def _fault(name: str, device_type: str, dtype: torch.dtype, head_width: int, deterministic: bool) -> str | None:
    """Why a kernel cannot run so, found by trying it forward and back; None where it can."""
    if device_type != "cuda":
        return f"{name} has no operator for the device '{device_type}'"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"

    def trial() -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        packing = Packing(np.array([1, 2]), causal=True, device=device, backend=name)
        x = torch.zeros(3, 1, head_width, device=device, dtype=dtype, requires_grad=True)
        with _quiet_xformers():
            _KERNELS[name](x, x, x, packing).sum().backward()

    if reason := tried(trial, "cuda"):
        mode = f"{str(dtype).removeprefix('torch.')}, heads {head_width} wide{', deterministic' * deterministic}"
        return f"{name} does not run with torch {torch.__version__} ({mode}): {reason}"
    return None


def _faults(device: torch.device | str, dtype: torch.dtype, head_width: int) -> Iterator[tuple[str, str | None]]:
    """Each kernel and its fault, in the order of ``auto``."""
    mode = torch.device(device).type, dtype, head_width, torch.are_deterministic_algorithms_enabled()
    return ((name, _fault(name, *mode)) for name in _KERNELS)


def resolve_backend(
    name: str, device: torch.device | str, dtype: torch.dtype = torch.float16, head_width: int = 64
) -> str:
    """Return which backend serves ``name`` on a device: ``xformers``, ``varlen``, ``sdpa`` or ``reference``.

    ``auto`` is xformers where it runs (in this precision, for heads of this width), else varlen where that does, else
    sdpa. Raises UserError for a name that is no backend, and for one that cannot run, with the reason.
    """
    if name not in BACKENDS:
        raise UserError(
            f"training.attention: no backend named '{name}'.{did_you_mean(name, BACKENDS)} Available: "
            f"{', '.join(BACKENDS)}"
        )
    if name in ("sdpa", "reference"):
        return name
    for kernel, fault in _faults(device, dtype, head_width):
        if name in ("auto", kernel) and fault is None:
            return kernel
        if name == kernel:
            raise UserError(f"training.attention: {name} was asked for, but {fault}. Use 'auto' or 'sdpa'")
    return "sdpa"


def explain_backend(name: str, device: torch.device | str, dtype: torch.dtype, head_width: int) -> str:
    """Return what ``name`` is on a device, and why, for people. Raises as ``resolve_backend`` does."""
    chosen = resolve_backend(name, device, dtype, head_width)
    kind = torch.device(device).type
    if name != "auto" or kind != "cuda":
        return f"{chosen} (auto on {kind})" if name == "auto" else chosen
    faults = dict(_faults(device, dtype, head_width))
    passed = [faults[kernel] for kernel in list(_KERNELS)[: [*_KERNELS, "sdpa"].index(chosen)]]
    return f"{chosen} (auto{''.join(f'; {fault}' for fault in dict.fromkeys(passed))})"


def backend_report() -> dict[str, str]:
    """The backends, each with ``available`` or why it does not run on this machine, for bug reports."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    faults = _faults(device, torch.float16, 64)
    return {
        "auto": resolve_backend("auto", device),
        **{name: fault or "available" for name, fault in faults},
        "sdpa": "available",
    }


# ---------------------------------------------------------------------------- rows


class _TakeRows(torch.autograd.Function):
    """x[rows] for rows that are all different: its adjoint writes rows and need not add them up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.total = x.shape[0]
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return put_rows(grad, rows, ctx.total), None


class _PutRows(torch.autograd.Function):
    """The adjoint of _TakeRows: rows written into zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, total: int) -> Tensor:
        ctx.save_for_backward(rows)
        out = x.new_zeros(total, *x.shape[1:])
        out[rows] = x
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return take_rows(grad, rows), None, None


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of ``x`` [T, ...]: [R, ...]. No row may be named twice (which makes the gradient cheap)."""
    return cast(Tensor, _TakeRows.apply(x, rows))  # type: ignore[no-untyped-call]


def put_rows(x: Tensor, rows: Tensor, total: int) -> Tensor:
    """``x`` [R, ...] written to the given rows of zeros [total, ...]. No row may be named twice."""
    return cast(Tensor, _PutRows.apply(x, rows, total))  # type: ignore[no-untyped-call]


def ranges(starts: Ints, counts: Ints) -> Ints:
    """start, start + 1, ... count numbers of each, one after the other."""
    ends = np.cumsum(counts)
    return np.repeat(starts - ends + counts, counts) + np.arange(ends[-1] if len(ends) else 0, dtype=np.int64)


# ---------------------------------------------------------------------------- packing


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Neighbouring sequences that one call serves; padded where the index tensors are given."""

    count: int
    queries: int
    keys: int
    query_rows: int
    key_rows: int
    causal: bool
    mask: Tensor | None = None
    query_index: Tensor | None = None
    key_index: Tensor | None = None


class Packing:
    """Lengths of sequences laid end to end, with what every layer's attention needs, worked out once.

    ``lengths`` are the keys' of each sequence, ``query_lengths`` the queries', both on the host and at least 1;
    without ``query_lengths`` every key is a query too. With ``causal`` the last query stands at the last
    key, and each sees the keys up to its own place. Sequences of equal or near length should be
    neighbours: every run of equal lengths is one call on backend ``sdpa``.
    """

    def __init__(
        self,
        lengths: Ints,
        query_lengths: Ints | None = None,
        *,
        causal: bool = False,
        device: torch.device | str = "cpu",
        backend: str = "auto",
    ) -> None:
        self.lengths = np.asarray(lengths, np.int64)
        self.query_lengths = self.lengths if query_lengths is None else np.asarray(query_lengths, np.int64)
        self.causal = causal
        self.device = torch.device(device)
        self.backend = backend
        assert self.lengths.shape == self.query_lengths.shape
        assert self.query_lengths.min() >= 1
        assert self.lengths.min() >= 1

    @functools.cached_property
    def buckets(self) -> list[_Bucket]:
        """How backend ``sdpa`` cuts the sequences into calls."""
        q, k = self.query_lengths, self.lengths
        starts = np.flatnonzero(np.r_[True, (np.diff(q) != 0) | (np.diff(k) != 0)])
        limit = _BUCKET_ROWS.get(self.device.type, _BUCKET_ROWS["cuda"])
        cuts, widest = [0], max(q[0], k[0])
        for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(k)], strict=True):
            grown = max(widest, q[start], k[start])
            if start > cuts[-1] and grown * (stop - cuts[-1]) > limit:
                cuts.append(start)
                grown = max(q[start], k[start])
            widest = grown
        return [self._bucket(first, last) for first, last in zip(cuts, [*cuts[1:], len(k)], strict=True)]

    def _bucket(self, first: int, last: int) -> _Bucket:
        q, k = self.query_lengths[first:last], self.lengths[first:last]
        count, queries, keys = len(k), int(q.max()), int(k.max())
        ragged = bool((q != queries).any() or (k != keys).any())
        # PyTorch's own causal mask hides the pads too: they come last
        square = self.causal and bool((q == k).all())
        bucket = functools.partial(_Bucket, count, queries, keys, int(q.sum()), int(k.sum()), square and queries > 1)
        mask = None
        if not square and (ragged or (self.causal and queries > 1)):
            seen = np.arange(keys) < k[:, None, None]
            if self.causal:
                seen = seen & (np.arange(keys) <= np.arange(queries)[:, None] + (k - q)[:, None, None])
            (mask,) = upload(self.device, seen[:, None])
        if not ragged:
            return bucket(mask)
        steps = np.arange(count, dtype=np.int64)
        return bucket(mask, *upload(self.device, ranges(steps * queries, q), ranges(steps * keys, k)))

    @functools.cached_property
    def bias(self) -> Any:
        """xformers' description of the same."""
        _, masks = _xformers()
        lengths = self.query_lengths.tolist(), self.lengths.tolist()
        bias = masks.BlockDiagonalMask.from_seqlens(*lengths, device=self.device)
        return bias.make_causal_from_bottomright() if self.causal else bias

    @functools.cached_property
    def ends(self) -> tuple[Tensor, Tensor]:
        """varlen's description of the same: 0 and where each sequence ends, of queries and of keys, int32 [N + 1]."""
        ends = np.pad(np.cumsum([self.query_lengths, self.lengths], 1, np.int32), ((0, 0), (1, 0)))
        q_ends, k_ends = upload(self.device, ends)[0]
        return q_ends, k_ends

    @functools.cached_property
    def sequence_of_query(self) -> Tensor:
        """The number of the sequence that each query row belongs to, int64 [Tq]."""
        return upload(self.device, np.repeat(np.arange(len(self.lengths)), self.query_lengths))[0]


# ---------------------------------------------------------------------------- attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q k^T / sqrt d) v of sequences of equal length.

    q [B, Lq, H, d], k and v [B, Lk, H, d] -> [B, Lq, H, d]. ``causal`` needs Lq = Lk. ``key_lengths``,
    int [B], hides the keys at and after that place (each at least 1; always by sdpa or the reference).
    Raises UserError where ``backend`` cannot run.
    """
    assert not causal or q.shape[1] == k.shape[1]
    chosen = resolve_backend(backend, q.device, q.dtype, q.shape[-1])
    if chosen == "xformers" and key_lengths is None:
        ops, masks = _xformers()
        bias = masks.LowerTriangularMask() if causal else None
        return cast(Tensor, ops.memory_efficient_attention(q, k, v, attn_bias=bias))
    mask = None
    if key_lengths is not None:
        ends = key_lengths.to(k.device, non_blocking=True)[:, None]
        mask = (torch.arange(k.shape[1], device=k.device) < ends)[:, None, None]
    if causal and (mask is not None or chosen == "reference"):
        triangle = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()
        mask = triangle if mask is None else mask & triangle
    return _plain(q, k, v, mask) if chosen == "reference" else _sdpa(q, k, v, mask, causal and mask is None)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """softmax(q k^T / sqrt d) v within each sequence: q [Tq, H, d], k and v [Tk, H, d] -> [Tq, H, d].

    Exact on every backend. Raises UserError where the packing's backend cannot run.
    """
    chosen = resolve_backend(packing.backend, q.device, q.dtype, q.shape[-1])
    if chosen in _KERNELS:
        return _KERNELS[chosen](q, k, v, packing)
    if chosen == "reference":
        return _packed_reference(q, k, v, packing)
    buckets = packing.buckets
    if len(buckets) == 1:
        return _bucket_attention(q, k, v, buckets[0])
    queries = q.split_with_sizes([bucket.query_rows for bucket in buckets])
    keys, values = (x.split_with_sizes([bucket.key_rows for bucket in buckets]) for x in (k, v))
    return torch.cat([_bucket_attention(*parts) for parts in zip(queries, keys, values, buckets, strict=True)])


def _bucket_attention(q: Tensor, k: Tensor, v: Tensor, bucket: _Bucket) -> Tensor:
    if bucket.query_index is not None and bucket.key_index is not None:
        padded = bucket.count * bucket.keys
        q = put_rows(q, bucket.query_index, bucket.count * bucket.queries)
        k, v = put_rows(k, bucket.key_index, padded), put_rows(v, bucket.key_index, padded)
    q = q.view(bucket.count, bucket.queries, *q.shape[1:])
    k, v = (x.view(bucket.count, bucket.keys, *x.shape[1:]) for x in (k, v))
    out = _sdpa(q, k, v, bucket.mask, bucket.causal).flatten(0, 1)
    return out if bucket.query_index is None else take_rows(out, bucket.query_index)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """PyTorch's attention with our order of dimensions."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2)


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The formula as it stands."""
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v)


def _packed_reference(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    outs = []
    q_lengths, k_lengths = packing.query_lengths.tolist(), packing.lengths.tolist()
    for q_one, k_one, v_one in zip(
        *(x.split_with_sizes(n) for x, n in ((q, q_lengths), (k, k_lengths), (v, k_lengths))), strict=True
    ):
        seen = torch.ones(len(q_one), len(k_one), dtype=torch.bool, device=q.device)
        mask = seen.tril(len(k_one) - len(q_one)) if packing.causal else None
        outs.append(_plain(q_one[None], k_one[None], v_one[None], mask)[0])
    return torch.cat(outs)
