"""The transformer's kernels: in Triton's interpreter, compiled for cards, and on one, against the plain code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cosmos_ssl.models import fused
from cosmos_ssl.models.transformer import Blocks, lay_out

HALF = (torch.bfloat16, torch.float16)
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled, dropped, computed again": {"layer_scale": 0.5, "drop_path": 0.3, "grad_checkpointing": True},
}


def trained(form: str, lengths: list[int], dtype: torch.dtype, device: str, width: int, pruned: bool) -> list[Tensor]:
    """Features, and gradients of the input and all weights, in float64."""
    torch.manual_seed(0)
    model = Blocks(2, width, 2, mlp_ratio=3.5, **FORMS[form])
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, float("norm" in name and "weight" in name), 0.2)
    x = torch.randn(sum(lengths), width)
    keep = np.arange(len(x)) % 3 == 0 if pruned else np.ones(len(x), bool)
    keep[np.cumsum(lengths) - 1] = True
    scale = torch.randn(int(keep.sum()), width)
    model, x = model.to(device, dtype), x.to(device, dtype).requires_grad_()
    torch.manual_seed(1)
    out = model(x, lay_out(np.array(lengths), keep, device=device, backend="sdpa"))
    (out * scale.to(out)).sum().backward()
    if not pruned:
        with torch.no_grad():
            assert torch.equal(out, model(x, lay_out(np.array(lengths), keep, device=device, backend="sdpa")))
    grads = [weight.grad for weight in model.parameters()]
    return [each.detach().double().cpu() for each in (out, x.grad, *grads) if each is not None]


def compare(form: str, lengths: list[int], dtype: torch.dtype, device: str, width: int, pruned: bool) -> None:
    """What kernels make is as near to float64 as what PyTorch's operations make, tensor by tensor."""
    usable = fused.usable
    slack = 3 if (device, dtype) == ("cpu", torch.bfloat16) else 1.3  # Triton's interpreter cuts bfloat16 off
    try:
        fused.usable = lambda x: x.dtype in HALF
        found = trained(form, lengths, dtype, device, width, pruned)
        fused.usable = lambda x: False
        plain, exact = (trained(form, lengths, each, device, width, pruned) for each in (dtype, torch.float64))
        for number, (a, b, c) in enumerate(zip(found, plain, exact, strict=True)):
            assert (a - c).norm() <= slack * (b - c).norm() + 1e-3 * c.norm(), (number, form, dtype, pruned)
    finally:
        fused.usable = usable


def interpreted() -> None:
    """Compare on the host; runs where Triton interprets (``tests/functional/test_kernels.py``)."""
    from triton import language as tl
    from triton.runtime import interpreter

    from cosmos_ssl.models import kernels

    dot = interpreter.interpreter_builder.create_dot

    def wide_dot(*operands: Any) -> Any:
        """Triton's interpreter takes the bits of bfloat16 for numbers."""
        wide = [
            interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
            if getattr(x, "dtype", None) == tl.bfloat16
            else x
            for x in operands
        ]
        return dot(*wide)

    interpreter.interpreter_builder.create_dot = wide_dot
    fused._BLOCKS, fused._TILE, kernels.TILE = 2, 16, 16  # several of each
    kernels._PRODUCT |= {"TILE": 16, "DEPTH": 16}
    compare("plain", [1, 3, 13], torch.float16, "cpu", 20, pruned=False)
    for form, dtype in zip(FORMS, HALF, strict=True):
        compare(form, [1, 3, 13], dtype, "cpu", 20, pruned=True)
    x, weight = torch.randn(150, 12).half(), torch.randn(36, 12).half()  # rows of more tiles than share a cache
    hidden, active = fused._linear_gelu(x, weight, weight[:, 0].contiguous(), True)
    torch.testing.assert_close(hidden, F.linear(x, weight, weight[:, 0]), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(active, F.gelu(hidden), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("name", "constants", "warps"),
    [
        ("_linear_gelu", {"KEEP": True, "TILE": 128, "DEPTH": 64}, 8),
        ("_gelu_grad", {"TILE": 128, "DEPTH": 64}, 8),
        ("_add_norm", {"BRANCH": True, "BIAS": True, "WIDE": 1024}, 4),
        ("_add_norm_grad", {"THROUGH": True, "ROWS": 4, "WIDE": 1024}, 8),
        ("_stack", {"ROWS": 4, "WIDE": 1024}, 8),
        ("_column_sums", {"ROWS": 64, "COLUMNS": 32}, 4),
    ],
)
def test_kernels_compile_for_a_card(
    name: str, constants: dict[str, int], warps: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """For an H100, without one: products by its tensor cores, in memory that cards from an A100 on have."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from cosmos_ssl.models import kernels

    kernel = getattr(kernels, name)
    types = dict.fromkeys(("sums", "means", "scales", "first", "second"), "*fp32") | {"eps": "fp32"}
    numbers = {"share", "along", "across", "q_row", "k_row", "v_row", "m", "n", "k_", "w", "p", "q_", "n1", "n2"}
    signature = {
        arg: "constexpr" if arg in constants else types.get(arg, "i32" if arg in numbers else "*bf16")
        for arg in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    made = compile(
        source,
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "num_stages": 3, "enable_fp_fusion": True},
    )
    assert ("wgmma.mma_async" in made.asm["ptx"]) == ("DEPTH" in constants)
    assert made.metadata.shared <= 99 << 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", HALF)
def test_a_card_is_as_exact_as_the_plain_code(form: str, dtype: torch.dtype) -> None:
    assert fused.KERNELS.fault(torch.device("cuda", 0), dtype) is None
    compare(form, [1, 7, 197, 197, 37], dtype, "cuda", 768, pruned=True)
    compare(form, [3, 5], dtype, "cuda", 40, pruned=form != "plain")


if __name__ == "__main__":
    interpreted()
