"""What the tests run on a CUDA device that is not there, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from cosmos_ssl.build import Builder
from cosmos_ssl.config import load_config
from cosmos_ssl.cost.card_step import CardStep, count_step
from cosmos_ssl.cost.count import DEVICE, Count, Found
from cosmos_ssl.engine.checkpoint import to_host
from cosmos_ssl.interop.programs.towers import on_host, plain_tower
from cosmos_ssl.models.encoder import ModelEncoder

Row = tuple[str, int, int, int]
"""Name, launches, bytes, FLOPs."""


def rows(found: Found) -> list[Row]:
    """What was launched, in order of first use."""
    return [(k.name, n * k.launches, n * k.bytes, n * k.flops) for k, n in found.kernels.items()]


def events(found: Found) -> tuple[list[str], list[str]]:
    """What waits, and what copies from memory that is not pinned, with the file that it does so in."""
    waits, pageable = (
        [f"{event.what} at {event.where.partition(':')[0]}" for event in counter.elements()]
        for counter in (found.waits, found.pageable)
    )
    return waits, pageable


# ---------------------------------------------------------------------------- single operations


def toy_module() -> tuple[list[Row], list[Row]]:
    """A linear map of 4 rows from 3 to 5, ReLU in place, the sum: forward and backward."""
    with Count() as count:
        layer = nn.Linear(3, 5).to(DEVICE)
        x = torch.ones(4, 3, device=DEVICE)
        count.restart()
        loss = F.relu_(layer(x)).sum()
        forward = count.restart()
        loss.backward()
        return rows(forward), rows(count.restart())


OPERATIONS: dict[str, Callable[[], Any]] = {
    "copies": lambda: torch.zeros(2, 3).to(DEVICE),
    "a view moves nothing": lambda: filled(4, 6).t()[1:].view(-1, 2, 2).expand(3, -1, -1, -1),
    "a cast that changes nothing": lambda: filled(4, 6).to(torch.float32).to(DEVICE),
    "a cast of nothing": lambda: filled(0, 6).to(torch.bfloat16),
    "an expanded input is read once": lambda: filled(1, 6).expand(4, 6) + 1,
    "one input twice": lambda: torch.mul(*[filled(4, 6)] * 2),
    "in place": lambda: filled(4, 6).add_(filled(4, 6)),
    "in place, of a part": lambda: filled(4, 6)[:2].mul_(2),
    "overwritten": lambda: filled(4, 6).zero_(),
    "copied over": lambda: filled(4, 6).copy_(filled(1, 6)),
    "rows taken": lambda: filled(100, 6)[torch.arange(2).pin_memory().to(DEVICE, non_blocking=True)],
    "rows put": lambda: filled(100, 6).index_copy_(0, torch.arange(2, device=DEVICE), filled(2, 6)),
    "many small tensors": lambda: torch._foreach_add_([filled(1) for _ in range(200)], 1),
    "one large tensor": lambda: torch._foreach_add_([filled(330 << 16)], 1),
    "attention": lambda: F.scaled_dot_product_attention(*[filled(2, 4, 6, 8, dtype=torch.bfloat16)] * 3),
    "attention in float32": lambda: F.scaled_dot_product_attention(*[filled(2, 4, 6, 8)] * 3),
}


def filled(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=DEVICE)


def operation(name: str) -> list[Row]:
    with Count() as count:
        OPERATIONS[name]()
        return rows(count.found)


def packed_attention() -> list[int]:
    """FLOPs forward and backward over sequences of 3 and 5, 2 heads of 8, in a buffer of lengths copied at once."""
    with Count() as count:
        q, k, v = (filled(8, 2, 8, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
        copied = torch.tensor([9, 0, 3, 8], dtype=torch.int32).pin_memory().to(DEVICE, non_blocking=True)
        ends = copied[1:]
        out = varlen_attn(q, k, v, ends, ends, 5, 5)
        forward = count.restart()
        out.sum().backward()
        return [sum(n * kernel.flops for kernel, n in found.kernels.items()) for found in (forward, count.found)]


def memory() -> tuple[list[int], int, int]:
    """Bytes in use after each line, the most by stage ``work``, and what is left."""
    with Count() as count:
        live = []
        x = filled(1 << 10)
        live.append(count.live)
        y = x[:4]
        live.append(count.live)
        with count.during("work"):
            z = x + filled(1 << 10)
        live.append(count.live)
        del z
        live.append(count.live)
        del x
        live.append(count.live)
        del y
        return live, count.found.peaks["work"], count.live


# ---------------------------------------------------------------------------- faults


def _lengths_read() -> None:
    lengths = torch.tensor([3, 5]).pin_memory().to(DEVICE, non_blocking=True)
    assert (lengths.cumsum(0) + 1)[1].item() == 9


def _mask_read() -> None:
    mask = torch.tensor([True, False, True]).pin_memory().to(DEVICE, non_blocking=True)
    assert filled(3, 4)[mask].shape == (2, 4)


FAULTS: dict[str, Callable[[], Any]] = {
    "nothing": lambda: filled(3).add_(1),
    "pinned": lambda: torch.ones(3).pin_memory().to(DEVICE, non_blocking=True),
    "pageable": lambda: torch.ones(3).to(DEVICE, non_blocking=True),
    "blocking": lambda: torch.ones(3).pin_memory().to(DEVICE),
    "blocking and pageable": lambda: filled(3).copy_(torch.ones(3)),
    "a number made on the host": lambda: torch.tensor(1.0, device=DEVICE),
    "an index on the host": lambda: filled(3)[torch.tensor([1, 2])],
    "item": lambda: filled(3).sum().item(),
    "if": lambda: bool(filled(3).sum() > 1),
    "tolist": lambda: filled(3).tolist(),
    "to the host": lambda: filled(3).cpu(),
    "to the host in time": lambda: torch.empty(3, pin_memory=True).copy_(filled(3), non_blocking=True),
    "nonzero": lambda: filled(3).nonzero(),
    "synchronize": lambda: torch.cuda.Event().synchronize(),
    "numbers that are known": _lengths_read,
    "a mask that is known": _mask_read,
}


def fault(name: str) -> tuple[list[str], list[str]]:
    with Count() as count:
        FAULTS[name]()
        return events(count.found)


def wrong_device() -> Tensor:
    return filled(3) + torch.ones(3)


# ---------------------------------------------------------------------------- whole steps


def step(config: str, overrides: Sequence[str], samples: int, ranks: int = 1, broken: Sequence[str] = ()) -> CardStep:
    """``broken``: what the student's image tower does besides: names in FAULTS, or ``wrong device``."""
    loaded = load_config(config, ["evaluators=null", *overrides, f"training.batch_size={samples * ranks}"])
    assembly = Builder(loaded).assemble("measure")
    if broken:
        tower = assembly.model.image
        assert tower is not None
        tower.register_forward_pre_hook(lambda *_: [FAULTS.get(name, wrong_device)() for name in broken] and None)
    return count_step(assembly, loaded.config, samples=samples, ranks=ranks)


ENCODERS: dict[str, Callable[[ModelEncoder, Tensor, Tensor], Any]] = {
    "encode_image": lambda encoder, pixels, tokens: encoder.encode_image(pixels),
    "encode_text": lambda encoder, pixels, tokens: encoder.encode_text(tokens),
    "image_features": lambda encoder, pixels, tokens: encoder.image_features(pixels),
    "match": lambda encoder, pixels, tokens: encoder.match(encoder.match_image(pixels), encoder.match_text(tokens)),
    "dense": lambda encoder, pixels, tokens: encoder.dense(pixels, csa=True),
    "cross_attention": lambda encoder, pixels, tokens: encoder.cross_attention(pixels, tokens),
    "snapshot": lambda encoder, pixels, tokens: to_host(encoder.model.state_dict()),
    "export": lambda encoder, pixels, tokens: encoded_on_the_host(encoder, tokens),
}


def encoded_on_the_host(encoder: ModelEncoder, tokens: Tensor) -> None:
    """What a program is made of: plain towers in host memory, of a model that lies on the device."""
    host = on_host(encoder)
    assert {x.device.type for x in (*host.model.parameters(), *host.model.buffers())} == {"cpu"}
    assert {x.device.type for x in encoder.model.parameters()} == {"cuda"}
    side = encoder.model.image.spec.image_size
    for modality, given in (("image", torch.zeros(3, 3, side, side)), ("text", tokens.cpu())):
        assert plain_tower(host, modality)(given).device.type == "cpu"


def encoders(config: str, overrides: Sequence[str]) -> dict[str, int]:
    """Launches of each method of an encoder on the device."""
    loaded = load_config(config, ["evaluators=null", *overrides])
    assembly = Builder(loaded).assemble("measure")
    found = {}
    with Count() as count:
        model = assembly.model.to(DEVICE).requires_grad_(False)
        encoder = ModelEncoder(model, assembly.spec, assembly.tokenizer, dtype=torch.bfloat16)
        side = encoder.preprocess(Image.new("RGB", (40, 40))).shape[-1]
        tokens = encoder.tokenize(["a cat", "two dogs on grass", "x"])
        for name, method in ENCODERS.items():
            count.restart()
            method(encoder, torch.zeros(3, 3, side, side), tokens)
            found[name] = sum(n * kernel.launches for kernel, n in count.found.kernels.items())
    return found
