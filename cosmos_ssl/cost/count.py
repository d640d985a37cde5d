"""Runs code on a CUDA device that is not there, and counts: kernels, bytes, FLOPs, memory, and waits of the host.

Host tensors are real. Those on the device are fake: shapes and dtypes without numbers, so a step takes seconds, and
needs no memory for what it computes. Small tensors that come from the host, and whole numbers computed of them, have
their numbers beside them, so that lengths, indices and masks are what they are.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import weakref
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
import torch.nn.attention.varlen  # registers its operations
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from cosmos_ssl.cost.flops import is_free
from cosmos_ssl.cost.kernels import is_collective, is_view, launches, moved, sent, talking, written
from cosmos_ssl.functional.products import formulas

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
_KNOWN_BYTES = 1 << 22
"""Larger tensors have no numbers."""
_BLOCK = 512
"""Bytes; PyTorch's allocator gives out whole blocks of them."""
HALF = (torch.bfloat16, torch.float16)
OTHER = "other"
_COPIES = frozenset({"_to_copy", "copy_"})
_INDEXED = frozenset({"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"})
"""Operations that take indices on the host, and copy them."""
_SHAPED_BY_NUMBERS = frozenset({"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"})
"""Operations whose result is as long as numbers on the device say: the host waits for them."""
_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent), contextlib.__file__)


class Kernel(NamedTuple):
    """What an operation launched, in one stage; operations alike are counted together."""

    stage: str
    name: str
    launches: int
    bytes: int
    """Read and written on the device."""
    flops: int
    """Of matrix products."""
    precision: str
    """Of its products: ``half``, ``tf32`` or ``float``."""
    sent: int
    """Bytes to other ranks."""
    span: int
    """From the first to the last of the ranks that it talks to, both counted; 0 where it talks to none."""
    carried: int
    """Bytes from or to the host."""


class Event(NamedTuple):
    """What makes the host wait, or copies from memory that is not pinned."""

    stage: str
    what: str
    where: str
    """File and line of the code that is not PyTorch's."""


@dataclass(slots=True)
class Found:
    """What was counted."""

    kernels: Counter[Kernel] = field(default_factory=Counter)
    waits: Counter[Event] = field(default_factory=Counter)
    """Times the host stands still until the device has done all it was given; copies that block are among them."""
    pageable: Counter[Event] = field(default_factory=Counter)
    """Copies to the device from memory that is not pinned."""
    peaks: Counter[str] = field(default_factory=Counter)
    """The most bytes that were in use on the device, by stage."""
    uncounted: Counter[str] = field(default_factory=Counter)
    """Operations that may hold matrix products and were not counted."""


class _Storage:
    """Memory of the device: a number for an address, and its bytes as far as they are known."""

    __slots__ = ("bytes", "known", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.bytes = 0
        self.known: Tensor | None = None


class _Fakes(FakeTensorMode):
    """Makes fake tensors, and never copies to the device for real, as it would do with constants."""

    avoid_device_init = True


class Count(TorchDispatchMode):
    """Counts while entered; ``stage`` names what runs. One at a time, in a process of ``fake_device``.

    Marks of ``torch.profiler.record_function`` whose names are in ``stages`` set the stage. Raises RuntimeError, as
    CUDA does, where an operation mixes devices.
    """

    _active: ClassVar[list[Count]] = []

    def __init__(self, stages: Collection[str] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = Found()
        self.stage = OTHER
        self.stages = frozenset(stages)
        self.live = 0
        """Bytes in use on the device, each tensor in whole blocks of the allocator."""
        self._entered: list[str] = []
        self._fake = _Fakes(allow_non_fake_inputs=True)
        self._storages: dict[int, _Storage] = {}
        self._pinned: set[int] = set()
        self._numbers = itertools.count(1)
        self._formulas = FlopCounterMode(display=False, custom_mapping=formulas()).flop_registry
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        # The data of a real tensor cannot be replaced by a fake, so modules that are moved get new parameters; and a
        # number becomes a tensor of the host before it is copied, so that the copy is seen.
        future = torch.__future__
        for value, change in (
            (future.get_overwrite_module_params_on_conversion(), future.set_overwrite_module_params_on_conversion),
            (torch._C._only_lift_cpu_tensors(), torch._C._set_only_lift_cpu_tensors),
        ):
            self._stack.callback(change, value)
            change(True)
        for owner, name, answer in (
            (FakeTensor, "data_ptr", lambda tensor: self.address(tensor)),
            (FakeTensor, "tolist", lambda tensor: tensor.cpu().tolist()),
            (F, "scaled_dot_product_attention", _attention),
            (torch.UntypedStorage, "resize_", lambda storage, size: self._resize(storage, size)),
        ):
            self._stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, answer)
        self._stack.callback(_foreach_utils._foreach_supported_types.remove, FakeTensor)
        _foreach_utils._foreach_supported_types.append(FakeTensor)  # as real tensors of the device are
        Count._active.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        Count._active.remove(self)
        self._stack.close()

    def restart(self) -> Found:
        """Count anew from here on; what was found so far. What is in use on the device stays in use."""
        found, self.found = self.found, Found()
        self._note_memory()
        return found

    def pin(self, tensor: Tensor) -> Tensor:
        """Take a tensor of the host for pinned."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._pinned:
            self._pinned.add(storage._cdata)
            weakref.finalize(storage, self._pinned.discard, storage._cdata)
        return tensor

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Name what runs inside."""
        self._enter(stage)
        try:
            yield
        finally:
            self._leave()

    def _enter(self, stage: str) -> None:
        self._entered.append(self.stage)
        self.stage = stage
        self._note_memory()

    def _leave(self) -> None:
        self.stage = self._entered.pop()
        self._note_memory()

    def _note_memory(self) -> None:
        self.found.peaks[self.stage] = max(self.found.peaks[self.stage], self.live)

    @staticmethod
    def note_wait(what: str) -> None:
        """Note that the host waits, in the count that is under way."""
        for count in Count._active[-1:]:
            count.found.waits[Event(count.stage, what, _where())] += 1

    # ------------------------------------------------------------------ one operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "full_tensor") for kind in types):
            return NotImplemented  # of a DTensor: what it does to this rank's part comes here by itself
        kwargs = kwargs or {}
        name = _name(func)
        if func._schema.name.startswith("profiler::"):
            self._mark(name, args)
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors) and (device is None or device.type != "cuda"):
            return self._on_host(func, name, args, kwargs)
        if name in ("_local_scalar_dense", "is_nonzero", "equal"):
            self.note_wait(name.strip("_"))
            known = self._known(tensors[0]) if name != "equal" else None
            return torch.zeros((), dtype=tensors[0].dtype).item() if known is None else known.item()
        if (name == "_to_copy" and device is not None and device.type == "cpu") or (
            name == "copy_" and not isinstance(args[0], FakeTensor)
        ):
            return self._to_host(func, name, args, kwargs)
        if name == "record_stream":
            return None
        self._check_copies(name, args, kwargs, tensors)
        masked = name in _INDEXED and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        if name in _SHAPED_BY_NUMBERS or (masked and (name == "index" or args[2].numel() > 1)):
            self.note_wait(f"{name.strip('_')} by a mask" if masked else name.strip("_"))
        if name in _SHAPED_BY_NUMBERS or (masked and name == "index"):
            out = self._shaped(func, args, kwargs)
        else:
            with self._fake:
                out = func(*args, **kwargs)
        self._track(out)
        if not is_view(func):
            self._follow(func, name, args, kwargs, tensors, out)
            self._add(func, args, kwargs, tensors, out)
        return out

    def _mark(self, name: str, args: Any) -> None:
        if name.startswith("_record_function_enter"):
            self._enter(args[0] if args[0] in self.stages else self.stage)
        else:
            self._leave()

    def _on_host(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Real work; memory is pinned in name alone."""
        if name == "is_pinned":
            return args[0].untyped_storage()._cdata in self._pinned
        if name == "_pin_memory":
            return self.pin(args[0].clone())
        if kwargs.get("pin_memory"):
            return self.pin(func(*args, **kwargs | {"pin_memory": False}))
        return func(*args, **kwargs)

    def _to_host(self, func: Any, name: str, args: Any, kwargs: Any) -> Tensor:
        """A copy to the host, real: what is known, or zeros."""
        fake = args[0] if name == "_to_copy" else args[1]
        known = self._known(fake)
        value = torch.zeros(fake.shape, dtype=fake.dtype) if known is None else known.clone()
        asynchronous = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        if name == "_to_copy":
            out = value.to(kwargs.get("dtype"))
            if asynchronous:
                self.pin(out)  # as PyTorch does
        else:
            out = args[0].copy_(value)
            asynchronous = asynchronous and out.untyped_storage()._cdata in self._pinned
        if not asynchronous:
            self.note_wait("copy to the host")
        self._add(func, args, kwargs, [fake], out)
        return out

    def _check_copies(self, name: str, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> None:
        """Note copies to the device that block, or come from memory that is not pinned."""
        if name in _COPIES:
            source = args[0] if name == "_to_copy" else args[1]
            asynchronous = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            sources = [(source, asynchronous)]
        elif name in _INDEXED:
            sources = [(tensor, False) for tensor in tensors if tensor.dim()]
        else:
            return
        for source, asynchronous in sources:
            if isinstance(source, FakeTensor):
                continue
            if not asynchronous:
                self.note_wait("blocking copy to the device")
            if source.untyped_storage()._cdata not in self._pinned:
                self.found.pageable[Event(self.stage, "copy from memory that is not pinned", _where())] += 1

    def _shaped(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation whose result is as long as numbers say; where they are unknown, as long as it can be."""

        def known(tensor: FakeTensor) -> Tensor:
            found = self._known(tensor)
            return torch.ones((), dtype=tensor.dtype).expand(tensor.shape) if found is None else found

        def faked(tensor: Tensor) -> Tensor:
            with self._fake:
                return torch.empty_like(tensor, device=DEVICE)

        return tree_map_only(Tensor, faked, func(*tree_map_only(FakeTensor, known, args), **kwargs))

    # ------------------------------------------------------------------ memory and numbers

    def _track(self, out: Any) -> None:
        """Count new memory, until it is freed."""
        for tensor in tree_leaves(out):
            if isinstance(tensor, FakeTensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._storages:
                    self._storages[storage._cdata] = _Storage(next(self._numbers))
                    self._hold(storage)
                    weakref.finalize(storage, self._free, storage._cdata).atexit = False

    def _hold(self, storage: torch.UntypedStorage) -> None:
        """Count the memory of a storage, in whole blocks, as it is now."""
        held = self._storages[storage._cdata]
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self.live += size - held.bytes
        held.bytes = size
        self._note_memory()

    def _free(self, storage: int) -> None:
        self.live -= self._storages.pop(storage).bytes

    def _resize(self, storage: torch.UntypedStorage, size: int) -> Any:
        """``resize_`` of a storage, by which ``fully_shard`` frees what it has gathered: no operation tells of it."""
        found = _resize(storage, size)
        if storage._cdata in self._storages:
            self._hold(storage)
        return found

    def address(self, tensor: Tensor) -> int:
        """A number for where a tensor lies, like that of ``data_ptr``."""
        number = self._storages[tensor.untyped_storage()._cdata].number
        return (number << 40) + int(tensor.storage_offset()) * tensor.element_size()

    def _known(self, tensor: Tensor) -> Tensor | None:
        """The numbers of a tensor, on the host and in the same memory for all views of it; None where unknown."""
        if not isinstance(tensor, FakeTensor):
            return tensor
        storage = self._storages.get(tensor.untyped_storage()._cdata)
        if storage is None or storage.known is None:
            return None
        return storage.known.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _learn(self, tensor: Tensor, value: Tensor) -> None:
        """Keep the numbers of a small tensor."""
        found = tensor.untyped_storage()
        if found.nbytes() > _KNOWN_BYTES:
            return
        storage = self._storages[found._cdata]
        if storage.known is None:
            storage.known = torch.zeros(found.nbytes(), dtype=torch.uint8)
        known = self._known(tensor)
        assert known is not None
        known.copy_(value)

    def _follow(self, func: Any, name: str, args: Any, kwargs: Any, tensors: Sequence[Tensor], out: Any) -> None:
        """Keep numbers up with an operation: copies, and whatever is computed of whole numbers alone."""
        changed = [tensor for tensor in tree_leaves(out) if isinstance(tensor, FakeTensor)]
        if name in _COPIES:
            source = self._known(args[0] if name == "_to_copy" else args[1])
            if source is not None:
                self._learn(changed[0], source)
                return
        small = sum(tensor.numel() * tensor.element_size() for tensor in changed) <= _KNOWN_BYTES
        numbers = [self._known(tensor) for tensor in tensors]
        whole = not any(tensor.is_floating_point() or tensor.is_complex() for tensor in (*tensors, *changed))
        certain = torch.Tag.nondeterministic_seeded not in func.tags and not is_collective(func)
        if small and whole and certain and all(known is not None for known in numbers):
            given, options = tree_map_only(FakeTensor, self._known, (args, kwargs))
            if "device" in options:
                options["device"] = "cpu"
            found = [value for value in tree_leaves(func(*given, **options)) if isinstance(value, Tensor)]
            for tensor, value in zip(changed, found, strict=True):
                self._learn(tensor, value)
            return
        for target in written(func, args, kwargs):
            if isinstance(target, FakeTensor):
                self._storages[target.untyped_storage()._cdata].known = None

    # ------------------------------------------------------------------ what it cost

    def _add(self, func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor], out: Any) -> None:
        size = moved(func, args, kwargs, out)
        collective = is_collective(func)
        ranks = sorted(talking(args)) if collective else []
        if not size and not collective:
            return  # nothing to do, nothing launched
        formula, flops = self._formulas.get(func._overloadpacket), 0
        if formula is not None:
            flops = formula(*tree_map_only(FakeTensor, self._or_known, args), **kwargs, out_val=out)
        elif not is_free(func._schema.name):
            self.found.uncounted[func._schema.name] += 1
        kernel = Kernel(
            stage=self.stage,
            name=str(func).removeprefix("aten.").removesuffix(".default"),
            launches=launches(func, args, kwargs),
            bytes=0 if collective else size,
            flops=flops,
            precision=_precision(tensors),
            sent=sent(func, args) if collective else 0,
            span=ranks[-1] - ranks[0] + 1 if ranks else 0,
            carried=size if _name(func) in _COPIES and len({x.device.type for x in (*tensors, out)}) > 1 else 0,
        )
        self.found.kernels[kernel] += 1

    def _or_known(self, tensor: FakeTensor) -> Tensor:
        """Whole numbers as they are, where a count of products depends on them: the ends of packed sequences."""
        known = None if tensor.is_floating_point() else self._known(tensor)
        return tensor if known is None else known


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention`` as CUDA has it: FlashAttention for 16 bits without a mask, else the
    memory-efficient kernel, which takes a mask as what is added.
    """
    if not isinstance(q, FakeTensor):
        return _sdpa(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if q.dtype in HALF and attn_mask is None:
        return cast(Tensor, aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0])
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(attn_mask.logical_not(), -torch.inf)
        attn_mask = attn_mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    found = aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, trained, dropout_p, is_causal, scale=scale)
    return cast(Tensor, found[0])


_sdpa = F.scaled_dot_product_attention
_resize = torch.UntypedStorage.resize_


def _name(func: Any) -> str:
    return cast(str, func._schema.name.partition("::")[2])


def _precision(tensors: Sequence[Tensor]) -> str:
    if any(tensor.dtype in HALF for tensor in tensors):
        return "half"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "float"


def _where() -> str:
    """File and line of the innermost code that is neither Python's, nor PyTorch's, nor of this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame = frame.f_back
    if frame is None:
        return "PyTorch, in the backward pass"
    return f"{frame.f_globals['__name__'].replace('.', '/')}.py:{frame.f_lineno}"
