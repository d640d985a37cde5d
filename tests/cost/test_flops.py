"""Counted FLOPs: by hand for small models, and by PyTorch's own counter."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from cosmos_ssl.cost.flops import counted, is_free, trace
from cosmos_ssl.functional import info_nce
from cosmos_ssl.models.attention import Packing, packed_attention
from cosmos_ssl.models.transformer import Blocks, lay_out


def traced(run: Callable[[], Tensor]) -> int:
    """FLOPs of a function that is no module's."""
    flops, uncounted = trace(nn.Identity(), lambda: [run()])
    assert not uncounted
    return flops[""]


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------- by hand


def test_linear_maps() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 2, bias=False))
    first, second = 2 * 12 * 5 * 7, 2 * 12 * 7 * 2
    flops, uncounted = trace(model, lambda: [model(noise(3, 4, 5))])
    assert flops == {"": first + second, "0": first, "1": 0, "2": second} and not uncounted
    with counted() as found:
        model(noise(3, 4, 5)).sum().backward()  # the input of the first map needs no gradient
    assert found.flops == 2 * first + 3 * second and not found.uncounted


@pytest.mark.parametrize("causal", [False, True])
def test_one_attention(causal: bool) -> None:
    """Batch 2, 4 heads of 8: q k^T and weights v forward, five such products backward; causal ones in full."""
    q, k, v = (noise(2, 4, 6, 8) for _ in range(3))
    one = 2 * (2 * 4) * 6 * 6 * 8
    assert traced(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal)) == 2 * one
    for x in (q, k, v):
        x.requires_grad_()
    with counted() as found:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    with counted() as backward:
        out.sum().backward()
    assert (found.flops, backward.flops) == (2 * one, 5 * one) and not backward.uncounted


@pytest.mark.parametrize(
    ("backend", "lengths", "queries", "pairs"),
    [
        ("reference", [3, 5, 5, 9], None, 9 + 25 + 25 + 81),
        ("sdpa", [40] * 3 + [70] * 2, None, 3 * 40**2 + 2 * 70**2),  # a call for each length
        ("sdpa", [3, 4, 5, 6], None, 4 * 6 * 6),  # one call, padded to the longest
        ("sdpa", [40] * 3 + [70] * 2, [1] * 5, 3 * 40 + 2 * 70),
    ],
)
def test_packed_attention(backend: str, lengths: list[int], queries: list[int] | None, pairs: int) -> None:
    packing = Packing(np.array(lengths), None if queries is None else np.array(queries), causal=True, backend=backend)
    q, k, v = noise(sum(queries or lengths), 2, 8), noise(sum(lengths), 2, 8), noise(sum(lengths), 2, 8)
    assert traced(lambda: packed_attention(q, k, v, packing)) == 2 * 2 * 8 * 2 * pairs


def test_a_tower_of_two_layers_on_packed_sequences() -> None:
    """Sequences of 40, 40 and 70 rows of which the last block answers one each: it asks, maps out and feeds forward 3
    rows alone.
    """
    width, hidden, rows, read = 16, 64, 150, 3
    lengths = np.array([40, 40, 70])
    keep = np.zeros(rows, bool)
    keep[[0, 40, 80]] = True
    blocks = Blocks(2, width, 2, mlp_ratio=4.0)
    flops, uncounted = trace(blocks, lambda: [blocks(noise(rows, width), lay_out(lengths, keep, backend="sdpa"))])
    full = rows * (3 * width**2 + width**2 + 2 * width * hidden) + 2 * width * (2 * 40**2 + 70**2)
    last = rows * 2 * width**2 + read * (2 * width**2 + 2 * width * hidden) + 2 * width * rows
    assert (flops["0"], flops["1"], flops[""]) == (2 * full, 2 * last, 2 * (full + last)) and not uncounted
    assert flops["0.mlp"] == 2 * rows * 2 * width * hidden and flops["1.mlp.fc1"] == 2 * read * width * hidden


# ---------------------------------------------------------------------------- by PyTorch's counter

PRODUCTS: dict[str, Callable[[], Tensor]] = {
    "matmul, broadcast left": lambda: noise(6, 7) @ noise(5, 7, 8),
    "matmul, broadcast both": lambda: noise(3, 1, 4, 5) @ noise(2, 5, 6),
    "matmul of vectors": lambda: noise(4, 5) @ noise(5) + noise(4) @ noise(4, 4),
    "addmm": lambda: torch.addmm(noise(3), noise(2, 5), noise(5, 3)),
    "baddbmm": lambda: torch.baddbmm(noise(2, 2, 3), noise(2, 2, 5), noise(2, 5, 3)),
    "convolution in groups": lambda: F.conv2d(noise(2, 4, 9, 9), noise(6, 2, 3, 3), noise(6), stride=2, groups=2),
    "transposed convolution": lambda: F.conv_transpose2d(noise(2, 4, 5, 5), noise(4, 3, 2, 2), stride=2),
    "einsum": lambda: torch.einsum("vbd,ubd->vbu", noise(2, 3, 4), noise(5, 3, 4)),
    "einsum, summed before": lambda: torch.einsum("abc,cd->ad", noise(3, 4, 5), noise(5, 6)),
    "einsum with dots": lambda: torch.einsum("b...c,b...d->...cd", noise(2, 7, 4), noise(2, 7, 5)),
    "einsum without an arrow": lambda: torch.einsum("ij,jk", noise(2, 3), noise(3, 4)),
    "multi-head attention": lambda: nn.MultiheadAttention(8, 2, batch_first=True).eval()(*[noise(2, 7, 8)] * 3)[0],
    "inside a function": lambda: info_nce(noise(2, 3, 4), noise(5, 3, 4), torch.tensor(2.0), chunk=30),
    "attention with narrow values": lambda: F.scaled_dot_product_attention(
        noise(2, 3, 8), noise(2, 5, 8), noise(2, 5, 4)
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_as_pytorch_counts_them(name: str) -> None:
    with counted() as found:
        PRODUCTS[name]()
    assert traced(PRODUCTS[name]) == found.flops > 0
    if (
        "attention" not in name and name != "matmul of vectors"
    ):  # for these PyTorch has no formulas of its own on the CPU
        with FlopCounterMode(display=False) as counter:
            PRODUCTS[name]()
        assert counter.get_total_flops() == found.flops


# ---------------------------------------------------------------------------- what is said to be uncounted


def test_unknown_operations_are_listed() -> None:
    x = torch.eye(3) * 2
    flops, uncounted = trace(nn.Identity(), lambda: [torch.linalg.inv(x) @ x, torch.cdist(x, x)])
    assert flops[""] == 2 * 27 and uncounted == {"aten::linalg_inv": 1, "aten::cdist": 1}
    with counted() as found:
        torch.linalg.inv(x.requires_grad_()).sum().backward()
    assert (
        found.uncounted["aten::linalg_inv_ex"] == 1 and found.flops == 2 * 2 * 27
    )  # its backward pass is two products


@pytest.mark.parametrize(
    ("operation", "free"),
    [
        ("aten::add_", True),
        ("aten::native_layer_norm_backward", True),
        ("aten::_softmax_backward_data", True),
        ("aten::softplus_backward", True),
        ("aten::transpose_", True),
        ("prim::ListConstruct", True),
        ("aten::mm", False),
        ("aten::convolution_backward", False),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", False),
        ("aten::linalg_svd", False),
        ("aten::no_such", False),
        ("my_library::add", False),
        ("prim::PythonOp.Mine", False),
    ],
)
def test_what_is_left_out_by_convention(operation: str, free: bool) -> None:
    assert is_free(operation) == free


@pytest.fixture
def xformers_operators() -> Callable[..., Tensor]:
    """The operators that xformers' attention runs on CUDA, by name and arguments; here they give zeros."""
    if hasattr(torch.ops.xformers_flash, "flash_fwd"):
        pytest.skip("xformers has its own operators here")
    library = torch.library.Library("xformers_flash", "DEF")
    inputs = "Tensor query, Tensor key, Tensor value, "
    lengths = "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    library.define(f"flash_fwd({inputs}{lengths}Tensor? seqused_k, int max_seqlen_q, int max_seqlen_k) -> Tensor")
    grads = "Tensor, Tensor, Tensor"
    library.define(
        f"flash_bwd(bool share, Tensor grad, {inputs}Tensor out, Tensor lse, {lengths}int max_seqlen_q) -> ({grads})"
    )
    library.impl("flash_fwd", lambda q, k, v, *_: torch.zeros_like(q), "CPU")
    library.impl("flash_bwd", lambda share, grad, q, k, v, *_: (q + 0, k + 0, v + 0), "CPU")
    yield torch.ops.xformers_flash
    library._destroy()


def test_attention_of_xformers(xformers_operators: Callable[..., Tensor]) -> None:
    """Heads 2 of 8; queries 1 and 3, keys 4 and 5 laid end to end: 4 + 15 pairs.

    Without ends: every query meets every key.
    """
    q, k, v = noise(4, 2, 8), noise(9, 2, 8), noise(9, 2, 8)
    ends = [torch.tensor([0, 1, 4], dtype=torch.int32), torch.tensor([0, 4, 9], dtype=torch.int32)]
    forward, backward = xformers_operators.flash_fwd, xformers_operators.flash_bwd
    one = 2 * 2 * 8 * (4 + 15)
    assert traced(lambda: forward(q, k, v, *ends, None, 3, 5)) == 2 * one
    assert traced(lambda: forward(q, k, v, *(end.to(torch.int64) for end in ends), None, 3, 5)) == 2 * one
    assert traced(lambda: forward(q[None], k[None], v[None], None, None, None, 4, 9)) == 2 * 2 * 2 * 8 * 4 * 9
    with counted() as found:
        forward(q, k, v, *ends, None, 3, 5)
        backward(True, q, q, k, v, q, q, *ends, 3)
    assert found.flops == 2 * one + 5 * one and not found.uncounted


@pytest.mark.usefixtures("varlen_on_cpu")
def test_attention_of_varlen() -> None:
    """As above; PyTorch's own counter takes every sequence for as long as the longest."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = noise(4, 2, 8), noise(9, 2, 8), noise(9, 2, 8)
    ends = [torch.tensor([0, 1, 4], dtype=torch.int32), torch.tensor([0, 4, 9], dtype=torch.int32)]
    one = 2 * 2 * 8 * (4 + 15)
    assert traced(lambda: varlen_attn(q, k, v, *ends, 3, 5)) == 2 * one
    with counted() as found:
        varlen_attn(q.requires_grad_(), k, v, *ends, 3, 5).sum().backward()
    assert found.flops == 2 * one + 5 * one and not found.uncounted
