"""The packed transformer: pruning, checkpointing, drop path, csa, layouts."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from cosmos_ssl.models.attention import Packing
from cosmos_ssl.models.transformer import Block, Blocks, LayerScale, head_widths, joined, lay_out, layer_of, pick_views

LENGTHS = np.array([3, 3, 5, 7])
WIDTH = 16


def blocks(width: int = WIDTH, **options: object) -> Blocks:
    torch.manual_seed(0)
    return Blocks(3, width, 2, **options).double()  # type: ignore[arg-type]


def through(block: Block, x: Tensor, packing: Packing) -> Tensor:
    return joined(*block((x, None, None), packing))


def rows(seed: int = 1) -> Tensor:
    return torch.randn(
        int(LENGTHS.sum()),
        WIDTH,
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
        requires_grad=True,
    )


def gradients(model: Blocks, out: Tensor) -> list[Tensor]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    return list(torch.autograd.grad((out * weight).sum(), list(model.parameters())))


@pytest.mark.parametrize("causal", [False, True])
def test_what_the_last_block_keeps_is_what_all_rows_would_be(causal: bool) -> None:
    model, x = blocks(), rows()
    keep = np.zeros(len(x), bool)
    keep[np.cumsum(LENGTHS) - 1] = True
    keep[6:11] = True  # one sequence as a whole
    if not causal:
        keep[[0, 2, 12, 13]] = True
    read, every = lay_out(LENGTHS, keep, causal=causal), lay_out(LENGTHS, np.ones(len(x), bool), causal=causal)
    assert every.read is None
    pruned, whole = model(x, read), model(x, every)[torch.from_numpy(keep)]
    torch.testing.assert_close(pruned, whole, atol=1e-12, rtol=0)
    for a, b in zip(gradients(model, pruned), gradients(model, whole), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    places = np.flatnonzero(keep)[[3, 1]]
    torch.testing.assert_close(pruned[read.rows(places)], model(x, every)[torch.from_numpy(places)], atol=1e-12, rtol=0)


def test_sequences_do_not_see_one_another() -> None:
    model, x = blocks(), rows().detach()
    out = model(x, lay_out(LENGTHS, np.ones(len(x), bool)))
    for part, expected in zip(x.split(LENGTHS.tolist()), out.split(LENGTHS.tolist()), strict=True):
        alone = model(part, lay_out(np.array([len(part)]), np.ones(len(part), bool)))
        torch.testing.assert_close(alone, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_gradient_checkpointing_gives_equal_gradients(drop_path: float) -> None:
    keep = np.zeros(int(LENGTHS.sum()), bool)
    keep[np.cumsum(LENGTHS) - 1] = True
    found = []
    for which, again in ((False, []), (True, [0, 1, 2]), ("alternate", [0, 2])):
        model = blocks(drop_path=drop_path, layer_scale=0.5, grad_checkpointing=which)
        calls: Counter[int] = Counter()
        for number, block in enumerate(model):
            block.norm1.register_forward_pre_hook(lambda *_, calls=calls, number=number: calls.update([number]))
        torch.manual_seed(3)
        found.append(gradients(model, model(rows(), lay_out(LENGTHS, keep))))
        assert [number for number in range(3) if calls[number] == 2] == again
    for same in zip(*found, strict=True):
        assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_backward_makes_the_output_of_gelu_anew_to_the_same_bits(dtype: torch.dtype | None) -> None:
    def trained(recompute: bool) -> tuple[list[Tensor], list[bool]]:
        model = blocks().float()
        kept: list[weakref.ref[torch.UntypedStorage]] = []
        for block in model:
            block.mlp.recompute = recompute
            block.mlp.act.register_forward_hook(
                lambda module, given, out: kept.append(weakref.ref(out.untyped_storage()))
            )
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            out = model(rows().float(), lay_out(LENGTHS, np.ones(int(LENGTHS.sum()), bool)))
        alive = [ref() is not None for ref in kept]
        return gradients(model, out.float()), alive

    (plain, all_alive), (found, none_alive) = trained(False), trained(True)
    assert all(all_alive) and not any(none_alive) and len(all_alive) == len(none_alive) == 3
    assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_under_autocast_the_stream_stays_narrow_and_weights_are_cast_a_block_at_a_time(checkpointing: bool) -> None:
    """2 % of features and gradients, where a float32 stream and LayerNorm kept 1 %; master gradients are float32."""

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            casts[func.overloadpacket.__name__] += 1
            return func(*args, **kwargs or {})

    casts: Counter[str] = Counter()
    model = Blocks(3, 128, 2, layer_scale=0.5, grad_checkpointing=checkpointing)
    weights = dict(model.named_parameters())
    weights["1.mlp.fc1.bias"].requires_grad_(False)
    trained = [weight for weight in weights.values() if weight.requires_grad]
    x, keep = torch.randn(int(LENGTHS.sum()), 128), np.arange(LENGTHS.sum()) % 2 == 0
    scale = torch.randn(int(keep.sum()), 128)
    exact = model(x, lay_out(LENGTHS, keep))
    wanted = torch.autograd.grad((exact * scale).sum(), trained)
    with torch.autocast("cpu", torch.bfloat16), Casts():
        rough = model(x, lay_out(LENGTHS, keep))
    assert (casts["_to_copy"], casts["_foreach_copy_"]) == (1, 3)  # of the input; of each block's weights
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Casts():
        assert torch.equal(model(x, lay_out(LENGTHS, keep)), rough)
    assert casts["_foreach_copy_"] == 4  # all blocks at once
    assert rough.dtype == torch.bfloat16
    found = torch.autograd.grad((rough.float() * scale).sum(), trained)
    for a, b in zip([rough.float(), *found], [exact, *wanted], strict=True):
        assert b.dtype == torch.float32 and (a - b).norm() < 0.02 * b.norm()
    with pytest.raises(RuntimeError), torch.autocast("cpu", torch.bfloat16):
        model(x[:, 1:], lay_out(LENGTHS, keep))
    assert all(weight is weights[name] for name, weight in model.named_parameters())


def test_drop_path_drops_branches_of_whole_sequences_and_keeps_the_mean() -> None:
    model = blocks(drop_path=0.4)
    assert [round(block.drop_path, 2) for block in model] == [0, 0.2, 0.4]
    assert [block.drop_path for block in blocks(drop_path=0.4, drop_path_uniform=True)] == [0.4] * 3
    block = model[2].eval()
    torch.nn.init.zeros_(block.norm2.weight)  # so that the second branch does not depend on the first
    count, x = 4000, torch.randn(3, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        still = through(block, x, Packing(np.array([3]))) - x
        moving = through(block.train(), x.repeat(count, 1), Packing(np.full(count, 3))).view(count, 3, WIDTH) - x
    assert len(torch.unique(moving.flatten(1).round(decimals=9), dim=0)) == 4  # each branch kept or left out
    torch.testing.assert_close(moving.mean(0), still, atol=0.03, rtol=0)


def test_layer_scale_scales_both_branches() -> None:
    model = blocks(layer_scale=1e-9)
    assert isinstance(model[0].ls1, LayerScale)
    x = rows().detach()
    torch.testing.assert_close(model(x, lay_out(LENGTHS, np.ones(len(x), bool))), x, atol=1e-7, rtol=0)


def test_csa_is_its_formula_in_the_last_block_alone() -> None:
    model = blocks()
    x = rows().detach()[:5]
    layout = lay_out(np.array([5]), np.ones(5, bool))
    before = through(model[1], through(model[0], x, layout.packing), layout.packing)
    block = model[2]
    q, k, v = block.attn.qkv(block.norm1(before)).view(5, 3, 2, -1).permute(1, 2, 0, 3)
    scale = q.shape[-1] ** -0.5
    attended = ((q @ q.mT * scale).softmax(-1) + (k @ k.mT * scale).softmax(-1)) @ v
    after = before + block.attn.proj(attended.transpose(0, 1).flatten(1))
    after = after + block.mlp(block.norm2(after))
    torch.testing.assert_close(model(x, layout, csa=True), after, atol=1e-12, rtol=0)


def test_names_are_those_of_the_checkpoints() -> None:
    parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    assert {n for n, _ in blocks().named_parameters()} == {
        f"{i}.{p}.{w}" for i in range(3) for p in parts for w in ("weight", "bias")
    }


def test_compiled_blocks_compute_the_same() -> None:
    model, x = blocks(drop_path=0.2), rows()
    keep = np.arange(len(x)) % 2 == 0
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        out = model(x, lay_out(LENGTHS, keep))
        found.append([out, *gradients(model, out)])
        model.compile(backend="aot_eager", fullgraph=True)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_blocks_stay_compiled_for_all_that_a_run_asks_of_them() -> None:
    """Two widths, a student in training and evaluation, a teacher; all rows or those read: more variants than torch
    allows by default.
    """
    torch.compiler.reset()
    for width in (16, 24):
        x = torch.randn(int(LENGTHS.sum()), width, dtype=torch.float64)
        student, teacher = blocks(width), blocks(width).requires_grad_(False).eval()
        expected = student(x, lay_out(LENGTHS, np.ones(len(x), bool))).detach()
        for model in (student, teacher):
            model.compile(backend="eager", fullgraph=True)  # raises where it would fall back
        for keep in (np.ones(len(x), bool), np.arange(len(x)) % 2 == 0):
            for model, grad in ((student.train(), True), (student.eval(), False), (teacher, False)):
                with torch.set_grad_enabled(grad):
                    torch.testing.assert_close(model(x, lay_out(LENGTHS, keep)), expected[torch.from_numpy(keep)])


def test_steps_of_other_lengths_compile_nothing_anew() -> None:
    """Under autocast, with the last rows read: a student's forward and backward passes, a teacher's forward passes."""
    torch.compiler.reset()
    counters.clear()
    student, teacher = blocks().float(), blocks().float().requires_grad_(False).eval()
    for model in (student, teacher):
        model.compile(backend="eager")
    graphs = []
    for lengths in (LENGTHS, LENGTHS[::-1].copy(), np.array([4, 19]), np.array([2, 2, 2, 31, 7, 5, 3])):
        keep = np.isin(np.arange(lengths.sum()), np.cumsum(lengths) - 1)
        x = torch.randn(int(lengths.sum()), WIDTH)
        with torch.autocast("cpu", torch.bfloat16):
            student(x, lay_out(lengths, keep, causal=True)).float().sum().backward()
            with torch.no_grad():
                teacher(x, lay_out(lengths, keep, causal=True))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and set(graphs) == {graphs[0]} and not counters["graph_break"]


def test_layers_and_views() -> None:
    assert [
        layer_of(n, 4) for n in ("class_token", "norm_pre.weight", "blocks.2.norm1.bias", "norm.bias", "projection")
    ] == [0, 0, 3, 4, 4]
    x = torch.arange(5)
    assert pick_views(x, (1, 2, 3)).tolist() == [1, 2, 3]
    assert pick_views(x, (3, 1)).tolist() == [3, 1]
    assert pick_views(x, (0, 1, 2, 3, 4)).data_ptr() == x.data_ptr()


def test_widths_of_heads() -> None:
    """Each once, wherever a transformer lies in a model."""
    assert head_widths(nn.ModuleList([Blocks(2, 64, 4), nn.Sequential(Blocks(1, 96, 3)), Blocks(1, 32, 2)])) == [16, 32]
