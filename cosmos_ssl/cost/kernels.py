"""What one operation does on a CUDA device: how many kernels are launched, what they read and write, what they send.

Bytes are those that an operation must move where nothing it reads is in a cache: every place of its inputs once, and of
its outputs. Places behind an expanded dimension are one place.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cosmos_ssl.functional import world_size

_FREE = {"alias", "detach", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_FREE |= {"_reshape_alias", "_unsafe_view", "set_", "resize_"}
"""Without a kernel, and not marked as views by PyTorch."""
_OVERWRITES = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_"}
_OVERWRITES |= {"normal_", "uniform_", "bernoulli_", "random_", "exponential_"}
"""Write what they change without reading it."""
_GATHERS = {"index", "index_select", "gather", "take", "embedding", "_unsafe_index"}
"""Read of their first tensor only what they return."""
_SCATTERS = {"index_put_", "_index_put_impl_", "index_copy_", "index_add_", "index_fill_", "scatter_", "scatter_add_"}
"""Write of what they change only as much as they are given."""
_KERNELS = {
    "_flash_attention_backward": 3,  # rows' sums; keys, values and queries; queries' gradients to their dtype
    "_scaled_dot_product_flash_attention_backward": 3,
    "_scaled_dot_product_efficient_attention_backward": 2,
    "_varlen_attn_backward": 3,
    "native_layer_norm_backward": 2,  # of the input; of weight and bias
    "slice_backward": 2,  # zeros, then a copy
    "select_backward": 2,
    "constant_pad_nd": 2,
    "eye": 2,
    "logsumexp": 7,
    "nonzero": 3,
    "sort": 4,
    "argsort": 4,
    "topk": 4,
    "embedding_dense_backward": 6,  # sorts
}
"""Kernels of operations that launch more than one (ATen's sources)."""
_CHUNK, _BLOCKS = 1 << 16, 320
_TENSORS = (110, 64, 48, 36, 30)
"""ATen's MultiTensorApply.cuh: elements of a block; blocks of a launch; tensors of a launch, by the number of lists."""


def is_view(func: Any) -> bool:
    """Return whether an operation moves nothing: a view, or memory alone."""
    name = func._schema.name.partition("::")
    return bool(func.is_view) or name[0] in ("prim", "profiler") or name[2] in _FREE


def launches(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Kernels and copies that an operation launches."""
    name = func._schema.name.partition("::")[2]
    if name.startswith(("_foreach", "_fused_adam", "_amp_foreach")):
        return _multi_tensor(name, args)
    if name == "index_put_" and len(args) > 3 and args[3]:
        return 6  # sorts, to add in a fixed order
    return _KERNELS.get(name, 1)


def _multi_tensor(name: str, args: Sequence[Any]) -> int:
    """Launches over lists of tensors, cut as ATen cuts them; one for each tensor where dtypes differ in a way that
    has no such kernel.
    """
    lists = [arg for arg in args if isinstance(arg, list | tuple) and arg and isinstance(arg[0], Tensor)]
    mixed = any(len({tensor.dtype for tensor in column}) > 1 for column in zip(*lists, strict=False))
    if mixed and name not in ("_foreach_copy_", "_fused_adamw_", "_fused_adam_"):
        return len(lists[0])
    if name.startswith("_fused_adam"):
        lists = lists[:4]  # the last one holds the steps, read beside
    depth = len(lists) + (not name.endswith("_") and "norm" not in name)
    most = _TENSORS[min(depth, len(_TENSORS)) - 1]
    found = tensors = blocks = 0
    for tensor in lists[0]:
        left = math.ceil(tensor.numel() / _CHUNK)
        tensors += bool(left)
        while left:
            taken = min(left, _BLOCKS - blocks)
            left, blocks = left - taken, blocks + taken
            if blocks == _BLOCKS or (not left and tensors == most):
                found, tensors, blocks = found + 1, int(left > 0), 0
    return found + bool(blocks) + ("norm" in name)  # which adds up the blocks' sums


def written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation changes."""
    return [tensor for tensor, changed, _ in _given(func, args, kwargs) if changed]


def moved(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    """Bytes that an operation reads and writes on the device."""
    name = func._schema.name.partition("::")[2]
    reads: dict[Any, int] = {}
    writes: dict[Any, int] = {}
    given = list(_given(func, args, kwargs))
    for number, (tensor, written, is_out) in enumerate(given):
        if tensor.device.type == "cpu":
            continue
        if written:
            writes[_region(tensor)] = _touched(tensor)
        if not (written and (is_out or name in _OVERWRITES)) and not (number == 0 and name in _GATHERS | _SCATTERS):
            reads[_region(tensor)] = _touched(tensor)
    mutated = {region[0] for region in writes}
    for tensor in tree_leaves(out):
        if isinstance(tensor, Tensor) and tensor.device.type != "cpu" and _region(tensor)[0] not in mutated:
            writes[_region(tensor)] = _touched(tensor)
    total = sum(reads.values())
    if name in _GATHERS:
        total += min(sum(writes.values()), _touched(given[0][0]))
    if name in _SCATTERS:
        values = max((_touched(tensor) for tensor, _, _ in given[1:]), default=0)
        return total + values * (2 if "add" in name or (len(args) > 3 and args[3] is True) else 1)
    return total + sum(writes.values())


def _given(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[tuple[Tensor, bool, bool]]:
    """Every tensor that an operation is given, whether it is written, and whether it is for the result alone."""
    for number, (name, written, is_out) in enumerate(_arguments(func)):
        value = args[number] if number < len(args) else kwargs.get(name)
        for tensor in (value,) if isinstance(value, Tensor) else value if isinstance(value, list | tuple) else ():
            if isinstance(tensor, Tensor):
                yield tensor, written, is_out


@functools.cache
def _arguments(func: Any) -> list[tuple[str, bool, bool]]:
    """Of each argument: name, whether it is written, and whether it is for the result alone (``out=``)."""
    kept = {"grads"} if "_fused_adam" in func._schema.name else set()  # written where a scaler is given, alone
    return [
        (each.name, each.alias_info is not None and each.alias_info.is_write and each.name not in kept, each.is_out)
        for each in func._schema.arguments
    ]


def _region(tensor: Tensor) -> tuple[Any, ...]:
    """Return where a tensor lies."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _touched(tensor: Tensor) -> int:
    """Bytes of the places that a tensor reaches."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)
    return math.prod(sizes) * tensor.element_size()


def sent(func: Any, args: Sequence[Any]) -> int:
    """Bytes that this rank sends in a collective, in a ring."""
    name = func._schema.name.partition("::")[2]
    sizes = [sum(t.numel() * t.element_size() for t in tree_leaves(arg) if isinstance(t, Tensor)) for arg in args]
    largest, ranks = max(sizes, default=0), len(talking(args))
    return round(largest * (ranks - 1) / ranks * (2 if "allreduce" in name else 1))


def talking(args: Sequence[Any]) -> list[int]:
    """The ranks that take part in a collective."""
    for group in tree_leaves(args):
        if isinstance(group, torch.ScriptObject) and "ProcessGroup" in str(group._type()):
            return dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))
    return list(range(world_size()))


def is_collective(func: Any) -> bool:
    """Return whether an operation talks to other ranks."""
    return str(func._schema.name).startswith(("c10d::", "_c10d_functional::"))
