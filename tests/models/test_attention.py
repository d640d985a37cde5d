"""Attention: every backend and every cut into calls equals a plain loop, forward and gradient."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cosmos_ssl.api import UserError
from cosmos_ssl.models import attention as module
from cosmos_ssl.models.attention import (
    Packing,
    attention,
    backend_report,
    explain_backend,
    packed_attention,
    put_rows,
    ranges,
    resolve_backend,
    take_rows,
)

RNG = np.random.default_rng(0)
RAGGED = RNG.integers(1, 9, 30)
# key lengths, query lengths (None: every key asks)
LENGTHS: dict[str, tuple[list[int], list[int] | None]] = {
    "one": ([5], None),
    "equal": ([4] * 6, None),
    "two runs": ([9] * 20 + [3] * 60, None),
    "sorted": (sorted(RAGGED.tolist()), None),
    "unsorted": (RAGGED.tolist(), None),
    "one asks": (sorted(RAGGED.tolist()), [1] * 30),
    "one or all": ([4] * 50 + [4] * 3 + [7] * 40 + [7] * 2, [1] * 50 + [4] * 3 + [1] * 40 + [7] * 2),
    "last few": ([5, 5, 8, 8, 8], [2, 2, 3, 3, 8]),
}


def inputs(rows: list[int], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """q, k and v as strided views, as one linear map makes them."""
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(n, 3, 2, 8, generator=g, dtype=torch.float64).to(device, dtype) for n in rows]
    return [t.requires_grad_()[:, i] for i, t in enumerate(x)]


def outcome(function: Callable[[], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of a weighted sum of it."""
    out = function()
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    return [out, *torch.autograd.grad((out * weight).sum(), leaves)]


@pytest.mark.parametrize("limit", [1, 64, 10_000])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", LENGTHS)
def test_packed_is_a_loop(monkeypatch: pytest.MonkeyPatch, name: str, causal: bool, limit: int) -> None:
    monkeypatch.setitem(module._BUCKET_ROWS, "cpu", limit)
    keys, queries = (None if n is None else np.array(n) for n in LENGTHS[name])
    rows = [int((keys if queries is None else queries).sum()), int(keys.sum()), int(keys.sum())]
    qkv = inputs(rows, torch.float64)
    results = []
    for backend in ("sdpa", "reference"):
        packing = Packing(keys, queries, causal=causal, backend=backend)
        results.append(outcome(lambda packing=packing: packed_attention(*qkv, packing), qkv))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


def allow(monkeypatch: pytest.MonkeyPatch, *runs: str) -> list[tuple[str, torch.dtype, int, bool]]:
    """Kernels that are said to run, on any device; what was asked, in order."""
    asked = []

    def fault(name: str, device_type: str, dtype: torch.dtype, head_width: int, deterministic: bool) -> str | None:
        asked.append((name, dtype, head_width, deterministic))
        return None if name in runs else f"{name} is of no use here"

    monkeypatch.setattr(module, "_fault", fault)
    return asked


@pytest.mark.usefixtures("varlen_on_cpu")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", LENGTHS)
def test_varlen_is_a_loop(monkeypatch: pytest.MonkeyPatch, name: str, causal: bool) -> None:
    """Ends, longest sequences and direction of the mask as PyTorch's operator takes them."""
    allow(monkeypatch, "varlen")
    keys, queries = (None if n is None else np.array(n) for n in LENGTHS[name])
    qkv = inputs([int(n.sum()) for n in (keys if queries is None else queries, keys, keys)], torch.float64)
    results = []
    for backend in ("varlen", "auto", "reference"):
        packing = Packing(keys, queries, causal=causal, backend=backend)
        results.append(outcome(lambda packing=packing: packed_attention(*qkv, packing), qkv))
        assert ("buckets" in vars(packing), "ends" in vars(packing)) == (False, backend != "reference")
    for a, b, c in zip(*results, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, atol=1e-11, rtol=0)
    q, k, v = (x.detach()[None] for x in inputs([5, 5, 5], torch.float64))
    assert torch.equal(attention(q, k, v, backend="varlen"), attention(q, k, v, backend="sdpa"))


def test_which_backend_serves_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    """xformers, varlen, sdpa, in this order; the reasons are those of what was passed over."""
    for runs, chosen, said in (
        (("xformers", "varlen"), "xformers", "xformers (auto)"),
        (("varlen",), "varlen", "varlen (auto; xformers is of no use here)"),
        ((), "sdpa", "sdpa (auto; xformers is of no use here; varlen is of no use here)"),
    ):
        asked = allow(monkeypatch, *runs)
        assert resolve_backend("auto", "cuda", torch.bfloat16, 48) == chosen
        assert {query[1:] for query in asked} == {(torch.bfloat16, 48, False)}
        assert explain_backend("auto", "cuda", torch.bfloat16, 48) == said
        assert explain_backend("sdpa", "cuda", torch.bfloat16, 48) == "sdpa"
        assert backend_report()["auto"] == chosen
    with pytest.raises(UserError, match="varlen was asked for, but varlen is of no use here"):
        resolve_backend("varlen", "cuda")


@pytest.mark.parametrize("name", ["xformers", "varlen"])
def test_a_kernel_is_tried_where_hooks_of_a_checkpoint_hold(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Inside of a checkpointed block and without gradients the verdict is that of any other place."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *sizes, device, **options: zeros(*sizes, **options))
    seen = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        seen.append((q.dtype, q.shape, packing.causal))
        return q.exp() * k.exp() * v  # which save what they gave

    monkeypatch.setitem(module._KERNELS, name, kernel)

    def block(x: Tensor) -> Tensor:
        module._fault.cache_clear()
        with torch.no_grad():
            found.append(module._fault(name, "cuda", torch.float64, 24, False))
        return x.exp()

    found: list[str | None] = []
    x = torch.ones(2, requires_grad=True)
    checkpoint(block, x, use_reentrant=False).sum().backward()
    assert found == [None, None] and seen == [(torch.float64, (3, 1, 24), True)] * 2
    monkeypatch.setitem(module._KERNELS, name, lambda *_: 1 / 0)
    module._fault.cache_clear()
    reason = module._fault(name, "cuda", torch.bfloat16, 24, True)
    assert reason is not None
    assert reason.startswith(
        f"{name} does not run with torch {torch.__version__} (bfloat16, heads 24 wide, deterministic)"
    )
    module._fault.cache_clear()


def test_reference_is_the_formula() -> None:
    q, k, v = (x.detach() for x in inputs([3, 5, 5], torch.float64))
    out = packed_attention(q, k, v, Packing(np.array([2, 3]), np.array([1, 2]), causal=True, backend="reference"))
    for row, last_key, start in (
        (0, 2, 0),
        (1, 4, 2),
        (2, 5, 2),
    ):  # the last query sees all, the one before all but one
        for head in range(2):
            weights = (k[start:last_key, head] @ q[row, head] / 8**0.5).softmax(0)
            torch.testing.assert_close(out[row, head], weights @ v[start:last_key, head])


def test_calls_are_few() -> None:
    """A run of equal lengths is one call without copies, and short runs share one."""
    images = Packing(np.repeat([197, 37], [16, 48]))
    assert [(b.count, b.keys, b.key_index) for b in images.buckets] == [(16, 197, None), (48, 37, None)]
    few = Packing(np.array([3, 4, 5, 6]), causal=True)
    assert [(b.count, b.keys, b.mask) for b in few.buckets] == [(4, 6, None)]
    captions = np.sort(RNG.integers(5, 40, 512))
    assert len(Packing(captions, causal=True).buckets) <= 35
    assert len(Packing(captions, causal=True, device="meta").buckets) <= 2


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_lengths(causal: bool, masked: bool, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    queries = 5 if causal else 3
    q, k, v = (torch.randn(4, n, 2, 8, generator=g, dtype=dtype, requires_grad=True) for n in (queries, 5, 5))
    lengths = torch.tensor([1, 5, 3, 2]) if masked else None
    results = [
        outcome(lambda b=backend: attention(q, k, v, causal=causal, key_lengths=lengths, backend=b), [q, k, v])
        for backend in ("auto", "reference")
    ]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 if dtype == torch.float32 else 1e-11, rtol=0)
    if masked and not causal:
        alone = attention(q[2:3], k[2:3, :3], v[2:3, :3])
        torch.testing.assert_close(results[0][0][2:3], alone, atol=1e-5, rtol=0)


def test_rows_and_ranges() -> None:
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([4, 0, 5])
    assert torch.equal(take_rows(x, rows), x[rows])
    assert torch.equal(put_rows(x[:3], rows, 7), torch.zeros(7, 2, dtype=x.dtype).index_copy(0, rows, x[:3]))
    assert torch.autograd.gradcheck(lambda y: take_rows(y, rows), x)
    assert torch.autograd.gradcheck(lambda y: put_rows(y, rows, 7), x[:3])
    assert ranges(np.array([5, 0, 2]), np.array([2, 0, 3])).tolist() == [5, 6, 2, 3, 4]
    assert ranges(np.array([], int), np.array([], int)).tolist() == []


def test_backends_that_cannot_run_say_why() -> None:
    assert resolve_backend("auto", "cpu") == "sdpa"
    assert resolve_backend("reference", torch.device("cpu")) == "reference"
    with pytest.raises(UserError, match="xformers was asked for, but xformers has no operator for the device 'cpu'"):
        resolve_backend("xformers", "cpu")
    with pytest.raises(UserError, match=r"no backend named 'xformer'\. Did you mean 'xformers'\?"):
        resolve_backend("xformer", "cpu")
    q = torch.zeros(1, 2, 1, 8)
    with pytest.raises(UserError, match="xformers"):
        attention(q, q, q, backend="xformers")
    with pytest.raises(UserError, match="xformers"):
        packed_attention(q[0], q[0], q[0], Packing(np.array([2]), backend="xformers"))
    report = backend_report()
    assert set(report) == {"auto", "xformers", "varlen", "sdpa"}
    assert report["auto"] in ("sdpa", "varlen", "xformers")


@pytest.mark.skipif(importlib.util.find_spec("xformers") is None, reason="xformers is not installed")
def test_xformers_is_quiet() -> None:
    """Its import warning is not shown; what it said is in the report."""
    code = "from cosmos_ssl.models.attention import _xformers; _xformers()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout + run.stderr == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_backends_are_sdpa(name: str, causal: bool, dtype: torch.dtype) -> None:
    """varlen has no float32; a wheel of xformers for another CUDA does not run."""
    keys, queries = (None if n is None else np.array(n) for n in LENGTHS[name])
    rows = [int((keys if queries is None else queries).sum()), int(keys.sum()), int(keys.sum())]
    qkv = inputs(rows, dtype, "cuda")
    results = []
    kernels = [kernel for kernel in ("xformers", "varlen") if not module._fault(kernel, "cuda", dtype, 8, False)]
    assert "varlen" in kernels or dtype == torch.float32
    for backend in ("sdpa", *kernels):
        packing = Packing(keys, queries, causal=causal, device="cuda", backend=backend)
        results.append(outcome(lambda packing=packing: packed_attention(*qkv, packing), qkv))
    for a, b in ((a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True)):
        torch.testing.assert_close(a, b, atol=1e-4 if dtype == torch.float32 else 3e-2, rtol=1e-2)
