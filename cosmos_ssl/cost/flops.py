"""Counting matrix products: by fvcore in a traced forward pass, module by module, and by PyTorch's own counter in what
runs.

FLOPs are those of matrix products (linear maps, convolutions, einsum, attention's two), 2 for each multiply-add, masked
and causal attention in full, as PyTorch's ``FlopCounterMode`` has it; fvcore counts a multiply-add as one, and is
doubled here. Element-wise operations, norms, reductions, and what moves or draws numbers are left out by convention; an
operation that is neither known as such nor counted is reported as uncounted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cosmos_ssl.functional.products import formulas, packed_products

Handle: TypeAlias = Callable[[list[Any], list[Any]], int]
"""Inputs and outputs of a node of a traced graph -> multiply-adds."""

# Without matrix products (or a factorisation of one small matrix), and not marked as point-wise or as a view by PyTorch
# itself. In-place forms, backward passes and the ``native_`` and underscored forms of these count as named.
_NAMES = """
Bool Float Implicit Int IntImplicit ScalarImplicit __and__ __contains__ __getitem__ __is__ __isnot__ __not__ __or__
_set_item adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d all amax amin aminmax any append arange argmax
argmin argsort avg_pool1d avg_pool2d batch_norm batch_norm_impl_index batch_norm_with_update bernoulli
binary_cross_entropy binary_cross_entropy_with_logits bincount bucketize cat celu chunk clone concat constant_pad_nd
contiguous copy cosine_embedding_loss cosine_similarity cross_entropy_loss cudnn_batch_norm cummax cumprod cumsum diff
dim dropout efficientzerotensor embedding embedding_dense empty empty_like empty_strided exponential eye fill flip
floor_divide foreach_add foreach_mul frobenius_norm full full_like fused_dropout fused_rms_norm gather ger glu
group_norm gumbel_softmax histc hstack huber_loss index index_add index_copy index_fill index_put index_put_impl
index_select instance_norm is_floating_point isin isnan item kl_div kthvalue l1_loss layer_norm len lift lift_fresh
linalg_cholesky_ex linalg_norm linalg_solve_triangular linalg_vecdot linalg_vector_norm linspace list
local_scalar_dense log_sigmoid log_sigmoid_forward log_softmax logcumsumexp logsumexp margin_ranking_loss masked_fill
masked_scatter masked_select max max_pool2d max_pool2d_with_indices mean median meshgrid min miopen_batch_norm
mkldnn_max_pool2d mse_loss multinomial nan_to_num nanmean nansum new_empty new_empty_strided new_full new_ones
new_zeros nll_loss nll_loss2d nll_loss_forward nonzero nonzero_numpy norm normal normal_functional normalize numel
one_hot ones ones_like outer pad pairwise_distance pin_memory pixel_shuffle pixel_unshuffle prod promote_types put
rand rand_like randint randint_like randn randn_like randperm reflection_pad2d repeat repeat_interleave
replication_pad2d resize resolve_conj resolve_neg rms_norm roll rot90 safe_softmax scalar_tensor scatter scatter_add
scatter_reduce searchsorted select select_scatter set size slice slice_scatter smooth_l1_loss soft_margin_loss softmax
softmin sort split_with_sizes_copy stack std std_mean storage_offset stride sum take take_along_dim tensor tile to
to_copy topk trace tril tril_indices triplet_margin_loss triu triu_indices unfold unfold_copy uniform unique unique2
unique_consecutive unsafe_index unsafe_index_put unsafe_split unsafe_split_with_sizes unsafe_view upsample_bicubic2d
upsample_bicubic2d_aa upsample_bilinear2d upsample_bilinear2d_aa upsample_linear1d upsample_nearest2d
upsample_nearest_exact2d var var_mean vstack weight_norm weight_norm_interface zero zeros zeros_like
"""
_FREE = frozenset(_NAMES.split())


def is_free(operation: str) -> bool:
    """Return whether an operation, by its full name (``aten::add_``), is left out by convention: it has no matrix
    product.
    """
    space, _, name = operation.partition("::")
    if space == "prim":
        return not name.startswith(("PythonOp", "Call", "Loop", "If"))
    if space != "aten":
        return space in ("prims", "c10d", "_c10d_functional", "fsdp", "profiler", "cosmos_ssl")
    if name.startswith(("_foreach", "_fused_adam", "_amp_")):
        return True
    base = (
        name.strip("_").removeprefix("native_").removesuffix("_data").removesuffix("_backward").removesuffix("_dense")
    )
    if not _FREE.isdisjoint((name, base, name.strip("_"))):
        return True
    packets = [
        getattr(torch.ops.aten, each) for each in {name, name.rstrip("_"), base} if hasattr(torch.ops.aten, each)
    ]
    forms = [getattr(packet, form) for packet in packets for form in packet.overloads()]
    return any(torch.Tag.pointwise in form.tags or form.is_view for form in forms)


# ---------------------------------------------------------------------------- the forward pass, by fvcore


def _shape(value: Any) -> list[int]:
    """The sizes of a tensor in a traced graph."""
    sizes = value.type().sizes()
    assert sizes is not None, f"a traced graph does not know the sizes of {value}"
    return cast(list[int], sizes)


def _product(inner: Callable[[list[Any]], int]) -> Handle:
    """A product of whose elements each costs ``inner(inputs)`` multiply-adds."""
    return lambda inputs, outputs: math.prod(_shape(outputs[0])) * inner(inputs)


def _convolution(inputs: list[Any], outputs: list[Any]) -> int:
    """Every weight meets every place of the output, or of the input where the convolution is transposed."""
    transposed = next(value for value in (i.toIValue() for i in inputs[3:]) if isinstance(value, bool))
    x, weight, out = _shape(inputs[0]), _shape(inputs[1]), _shape(outputs[0])
    return x[0] * math.prod(weight) * math.prod((x if transposed else out)[2:])


def _einsum(inputs: list[Any], outputs: list[Any]) -> int:
    """Operands are contracted from left to right, as PyTorch does it; what one operand alone has is summed first."""
    equation: str = inputs[0].toIValue().replace(" ", "")
    shapes = [_shape(value) for value in inputs[1].node().inputs()]
    left_side, arrow, result = equation.partition("->")
    terms = left_side.split(",")
    hidden = max(len(shape) - len(term.replace("...", "")) for term, shape in zip(terms, shapes, strict=True))
    dots = "".join(
        chr(ord("\u03b1") + place) for place in range(hidden)
    )  # "..." stands for these, the last of them where it is shorter
    if not arrow:
        letters = left_side.replace(",", "").replace("...", "")
        result = "..." * ("..." in left_side) + "".join(
            sorted(letter for letter in set(letters) if letters.count(letter) == 1)
        )
    result = result.replace("...", dots)
    sizes: dict[str, int] = {}
    for number, shape in enumerate(shapes):
        own = len(shape) - len(terms[number].replace("...", ""))
        terms[number] = terms[number].replace("...", dots[hidden - own :])
        for label, size in zip(terms[number], shape, strict=True):
            sizes[label] = max(sizes.get(label, 1), size)
    total, left = 0, set(terms[0])
    for number, term in enumerate(terms[1:], 1):
        later = set(result).union(*terms[number + 1 :])
        total += math.prod(sizes[label] for label in left | set(term) if label in later or label in left & set(term))
        left = (left | set(term)) & later
    return total


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """q k^T and weights v: q [..., Lq, d], k [..., Lk, d], v [..., Lk, e]."""
    q, k, v = (_shape(value) for value in inputs[:3])
    return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _constant(value: Any) -> Tensor | None:
    """A tensor that stands in the graph as it is, or was only moved."""
    while value.node().kind() in ("aten::to", "aten::lift_fresh", "aten::detach", "aten::contiguous", "aten::alias"):
        value = next(iter(value.node().inputs()))
    found = value.toIValue()
    return found if isinstance(found, Tensor) else None


def _sequences(keys: int) -> Handle:
    """Attention of [B, L, H, d], or of sequences laid end to end whose ends in q and k are inputs ``keys`` and ``keys +
    1``.
    """

    def handle(inputs: list[Any], outputs: list[Any]) -> int:
        q, k, v = (_shape(value) for value in inputs[:3])
        ends = [_constant(value) for value in inputs[keys : keys + 2]]
        return packed_products(q, k, v, ends[0], ends[1])

    return handle


_HANDLES: dict[str, Handle] = {
    "aten::linear": _product(lambda inputs: _shape(inputs[1])[-1]),
    **{
        f"aten::{name}": _product(lambda inputs: _shape(inputs[0])[-1])
        for name in ("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner")
    },
    **{f"aten::{name}": _product(lambda inputs: _shape(inputs[1])[-1]) for name in ("addmm", "addmv", "baddbmm")},
    "aten::addbmm": lambda inputs, outputs: math.prod(_shape(inputs[1])) * _shape(inputs[2])[-1],
    **{
        f"aten::{name}": _convolution
        for name in ("_convolution", "convolution", "cudnn_convolution", "mkldnn_convolution")
    },
    "aten::einsum": _einsum,
    "aten::scaled_dot_product_attention": _attention,
    # what xformers' memory_efficient_attention runs
    "xformers_flash::flash_fwd": _sequences(3),
    "xformers_flash3::flash_fwd": _sequences(3),
    "torch_attn::_varlen_attn": _sequences(3),
    "cosmos_ssl::linear_gelu": lambda inputs, outputs: math.prod(_shape(outputs[1])) * _shape(inputs[1])[-1],
    "aten::_flash_attention_forward": _sequences(3),
    "aten::_efficient_attention_forward": _sequences(4),
}


class _Run(nn.Module):
    """A function on a model, as a module that fvcore can trace; the data are constants of the graph."""

    def __init__(self, model: nn.Module, run: Callable[[], Sequence[Tensor]]) -> None:
        super().__init__()
        self.model = model
        self.run = run

    def forward(self, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.run())


@torch.no_grad()
def trace(model: nn.Module, run: Callable[[], Sequence[Tensor]]) -> tuple[dict[str, int], Counter[str]]:
    """FLOPs of ``run()`` by module of ``model``, whose parts it calls (``""``: all), and what is uncounted. ``run``
    returns tensors.

    A module has what runs inside its call, and what runs inside its children's.
    """
    from fvcore.nn import FlopCountAnalysis

    uncounted: Counter[str] = Counter()

    def inside(inputs: list[Any], outputs: list[Any]) -> int:
        """Return what an ``autograd.Function`` does in its forward pass."""
        node = outputs[0].node()
        assert node.hasAttribute("Subgraph"), f"{node.pyname()} was not traced"
        return sum(one(each) for each in node.g("Subgraph").nodes())

    def one(node: Any) -> int:
        handle = inside if node.kind() == "prim::PythonOp" else _HANDLES.get(node.kind())
        if handle is None:
            uncounted.update([] if is_free(node.kind()) else [node.kind()])
            return 0
        return handle(list(node.inputs()), list(node.outputs()))

    functions = {f"prim::PythonOp.{each.__name__}": inside for each in _subclasses(torch.autograd.Function)}
    analysis = (
        FlopCountAnalysis(_Run(model, run), (torch.zeros(()),))
        .clear_op_handles()
        .set_op_handle(**_HANDLES, **functions)
    )
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    with _no_fast_path(), _PlainSizes():
        found = analysis.by_module()
    uncounted.update({name: count for name, count in analysis.unsupported_ops().items() if not is_free(name)})
    flops = {name.removeprefix("model").removeprefix("."): 2 * int(count) for name, count in found.items() if name}
    return flops | {"": 2 * int(found[""])}, uncounted


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)


class _PlainSizes(TorchFunctionMode):
    """Sizes are whole numbers as ever; in a trace they would be tensors, which parts do not expect."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **kwargs or {})
        if isinstance(found, torch.Size):
            return torch.Size([int(size) for size in found])
        return int(found) if func in _COUNTS else found


_COUNTS = (torch.Tensor.size, torch.Tensor.numel, torch.Tensor.nelement, torch.numel)


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Have ``nn.MultiheadAttention`` run its usual operations, which can be counted, also without gradients."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


# ---------------------------------------------------------------------------- what runs, by PyTorch


class _Seen(TorchDispatchMode):
    """Counts every operation that runs, by its full name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: Counter[tuple[str, Any]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations[func._schema.name, func._overloadpacket] += 1
        return func(*args, **kwargs or {})


@dataclass(slots=True)
class Counted:
    """What a ``counted`` block did, once it is left."""

    flops: int = 0
    uncounted: Counter[str] = field(default_factory=Counter)


@contextmanager
def counted() -> Iterator[Counted]:
    """Count the FLOPs of what runs inside, backward passes included, with PyTorch's ``FlopCounterMode``."""
    result = Counted()
    counter = FlopCounterMode(display=False, custom_mapping=formulas())
    with counter, _Seen() as seen:
        yield result
    result.flops = int(counter.get_total_flops())
    for (name, packet), count in seen.operations.items():
        if packet not in counter.flop_registry and not is_free(name):
            result.uncounted[name] += count
