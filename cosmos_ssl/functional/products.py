"""Matrix products as they run: FLOPs of the operators that compute them, and a count of a step's.

2 FLOPs for each multiply-add, masked and causal attention in full, as PyTorch's ``FlopCounterMode`` has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


class Products(TorchDispatchMode):
    """Adds up the FLOPs of what runs while entered, backward passes included, and changes nothing of it.

    What is compiled stays so, and is counted as far as it calls PyTorch's operators, as it does for products.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self._formulas = FlopCounterMode(display=False, custom_mapping=formulas()).flop_registry

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Look at compiled code when it runs, not while it is compiled."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **kwargs or {}, out_val=out))
        return out


def formulas() -> dict[Any, Callable[..., int]]:
    """FLOPs of attention operators that PyTorch's counter does not know, or takes for padded."""

    def forward(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(q, k, v))

    def backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(grad, q, k, v))

    def packed(first: int, ends: int, products: int) -> Callable[..., int]:
        """``first``: the argument that holds q.

        The forward pass has two products of this size, the backward pass five.
        """

        def formula(*args: Any, **_: Any) -> int:
            q, k, v = args[first : first + 3]
            return products * packed_products(q.shape, k.shape, v.shape, *args[ends : ends + 2])

        formula._get_raw = True  # type: ignore[attr-defined]  # tensors, not their shapes
        return formula

    def vector(matrix: Any, _: Any, *__: Any, **___: Any) -> int:
        return int(2 * math.prod(matrix))

    found: dict[Any, Callable[..., int]] = {
        torch.ops.aten.mv: vector,
        torch.ops.aten.dot: vector,
        torch.ops.aten.vdot: vector,
        torch.ops.aten.addmv: lambda _, matrix, *__, **___: int(2 * math.prod(matrix)),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: forward,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        torch.ops.aten._flash_attention_forward: packed(0, 3, 2),
        torch.ops.aten._flash_attention_backward: packed(1, 6, 5),
        torch.ops.aten._efficient_attention_forward: packed(0, 4, 2),
        torch.ops.aten._efficient_attention_backward: packed(1, 6, 5),
    }
    for space in (torch.ops.xformers_flash, torch.ops.xformers_flash3):
        if hasattr(space, "flash_fwd"):
            found |= {space.flash_fwd: packed(0, 3, 2), space.flash_bwd: packed(2, 7, 5)}
    with suppress(ImportError):  # an older PyTorch has no such operators
        import_module("torch.nn.attention.varlen")
        varlen = torch.ops.torch_attn
        found |= {varlen._varlen_attn: packed(0, 3, 2), varlen._varlen_attn_backward: packed(1, 6, 5)}
    return found


def packed_products(
    q: Sequence[int], k: Sequence[int], v: Sequence[int], q_ends: Tensor | None, k_ends: Tensor | None
) -> int:
    """Multiply-adds of attention over [B, L, H, d], or over sequences laid end to end with ends 0, e1, e2, ...: [T, H,
    d].
    """
    pairs = (
        math.prod(q[:-3]) * q[-3] * k[-3]
        if q_ends is None or k_ends is None
        else int((q_ends.diff() * k_ends.diff()).sum())
    )
    return pairs * q[-2] * (q[-1] + v[-1])
