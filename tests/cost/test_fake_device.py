"""A step on a CUDA device that is not there: what it launches, moves and waits for; what is wrong there shows."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cosmos_ssl.config import Config, load_config
from cosmos_ssl.cost import fake_device
from cosmos_ssl.cost.card_step import STAGES, CardStep
from cosmos_ssl.errors import UserError

Run = Callable[..., Any]
Small = Callable[[Config], list[str]]
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = sorted(path for folder in ("methods", "cosmos/ablations") for path in (CONFIGS / folder).glob("*.yaml"))
COSMOS = str(CONFIGS / "methods" / "cosmos.yaml")
MEANT = "cosmos_ssl/engine/step.py"
"""Where the host waits for the device, once a step."""
THEIRS = {"lightly/loss/ntx_ent_loss.py", "PyTorch, in the backward pass"}
"""Where a loss of another library waits for masks."""


# ---------------------------------------------------------------------------- counted by hand


def test_a_module_counted_by_hand(run: Run, on_device: ModuleType) -> None:
    """4 rows from 3 to 5 in float32: x 48 bytes, weight 60, bias 20, result 80."""
    forward, backward = run(on_device.toy_module)
    product = 2 * 4 * 3 * 5
    assert forward == [
        ("addmm", 1, 20 + 48 + 60 + 80, product),
        ("relu_", 1, 80 + 80, 0),
        ("sum", 1, 80 + 4, 0),
    ]
    assert backward == [
        ("ones_like", 1, 4 + 4, 0),
        ("threshold_backward", 1, 4 + 80 + 80, 0),  # the gradient of the sum is one number, expanded
        ("mm", 1, 80 + 48 + 60, product),
        ("sum.dim_IntList", 1, 80 + 20, 0),
    ]


def test_single_operations(run: Run, on_device: ModuleType) -> None:
    """Launches and bytes; pictures, rows and lists of 4-byte numbers."""
    found = {name: run(on_device.operation, name) for name in on_device.OPERATIONS}
    attention = 2 * 2 * (2 * 4) * 6 * 6 * 8
    kept = 2 * 4 * 6 * 8
    assert {name: [row[1:] for row in rows] for name, rows in found.items()} == {
        "copies": [(1, 24, 0)],
        "a view moves nothing": [],
        "a cast that changes nothing": [],
        "a cast of nothing": [],
        "an expanded input is read once": [(1, 24 + 96, 0)],
        "one input twice": [(1, 96 + 96, 0)],
        "in place": [(1, 96 + 96 + 96, 0)],
        "in place, of a part": [(1, 48 + 48, 0)],
        "overwritten": [(1, 96, 0)],
        "copied over": [(1, 24 + 96, 0)],
        "rows taken": [(1, 16, 0), (1, 16 + 48 + 48, 0)],
        "rows put": [(1, 16, 0), (1, 16 + 48 + 48, 0)],
        "many small tensors": [(2, 200 * 8, 0)],  # 110 tensors a launch
        "one large tensor": [(2, 330 * 65536 * 8, 0)],  # 320 blocks of 65,536 a launch
        "attention": [(1, found["attention"][0][2], attention)],
        "attention in float32": [(1, found["attention in float32"][0][2], attention)],
    }
    # queries, keys and values are one tensor here; with the result, and the sums of rows in float32 beside it
    assert found["attention"][0][2] >= 2 * 2 * kept + 4 * kept // 8


def test_attention_of_packed_sequences_counts_their_own_lengths(run: Run, on_device: ModuleType) -> None:
    """3 and 5 rows in 2 heads of 8: q k^T and weights v forward, five such products backward."""
    pairs = 3 * 3 + 5 * 5
    assert run(on_device.packed_attention) == [2 * 2 * (2 * 8) * pairs, 5 * 2 * (2 * 8) * pairs]


def test_memory_in_use(run: Run, on_device: ModuleType) -> None:
    """Three tensors of 4,096 bytes, one at a time; a view keeps its memory."""
    live, most, left = run(on_device.memory)
    assert live == [4096, 4096, 8192, 4096, 4096] and most == 3 * 4096 and left == 0


# ---------------------------------------------------------------------------- what is wrong


def test_waits_and_copies(run: Run, on_device: ModuleType) -> None:
    """Each at the line that caused it."""
    here, blocking, host = " at on_device.py", "blocking copy to the device", "copy to the host"
    pageable = ["copy from memory that is not pinned" + here]
    expected: dict[str, tuple[list[str], list[str]]] = {
        "nothing": ([], []),
        "pinned": ([], []),
        "pageable": ([], pageable),
        "blocking": ([blocking + here], []),
        "blocking and pageable": ([blocking + here], pageable),
        "a number made on the host": ([blocking + here], pageable),
        "an index on the host": ([blocking + here], pageable),
        "item": (["local_scalar_dense" + here], []),
        "if": (["local_scalar_dense" + here], []),
        "tolist": ([host + here], []),
        "to the host": ([host + here], []),
        "to the host in time": ([], []),
        "nonzero": (["nonzero" + here], []),
        "synchronize": (["synchronize" + here], []),
        "numbers that are known": (["local_scalar_dense" + here], []),
        "a mask that is known": (["index by a mask" + here], []),
    }
    assert {name: run(on_device.fault, name) for name in on_device.FAULTS} == expected


def test_where_there_can_be_no_such_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"there is no g\+\+\. Install it"):
        fake_device.build()
    (tmp_path / "g++").write_text("#!/bin/sh\necho 'x.cpp:1: error: no such header' >&2; exit 1\n")
    (tmp_path / "g++").chmod(0o755)
    with pytest.raises(UserError, match=r"cannot compile .*: x\.cpp:1: error: no such header"):
        fake_device.build()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.6.0+cu124")
    with pytest.raises(UserError, match=r"PyTorch 2\.6\.0\+cu124: it is known for 2\.13 alone"):
        fake_device.build()


# ---------------------------------------------------------------------------- whole steps


def places(step: CardStep) -> set[str]:
    """Files where the host waits."""
    return {event.where.partition(":")[0] for event in step.found.waits}


def test_a_step(run: Run, on_device: ModuleType, small: Small) -> None:
    sizes = small(load_config(COSMOS).config)
    step = run(on_device.step, COSMOS, sizes, 6)
    assert step.precision == "amp_bf16" and not step.found.uncounted
    stages = {kernel.stage for kernel in step.found.kernels}
    assert stages == set(STAGES) - {"gradient mean"}
    assert sum(n * each.launches for each, n in step.found.kernels.items() if each.stage == "augment") == 2 * 4
    assert sum(count for event, count in step.found.waits.items() if event.where.startswith(MEANT)) == 1
    worse = run(on_device.step, COSMOS, sizes, 6, broken=["item", "blocking", "pageable"]).found
    assert worse.waits.total() == step.found.waits.total() + 2
    assert worse.pageable.total() == step.found.pageable.total() + 1
    with pytest.raises(RuntimeError, match="found at least two devices, cuda:0 and cpu"):
        run(on_device.step, COSMOS, sizes, 6, broken=["wrong device"])


def test_encoders_and_checkpoints(run: Run, on_device: ModuleType, small: Small) -> None:
    launches = run(on_device.encoders, COSMOS, small(load_config(COSMOS).config))
    assert launches.keys() == on_device.ENCODERS.keys() and min(launches.values()) > 0


def test_ranks_that_share_weights_hold_and_send_their_part(run: Run, on_device: ModuleType, small: Small) -> None:
    """Of 8 ranks, 4 of which share a copy: what lies between steps; weights gathered before each pass and let go."""
    sizes = small(load_config(COSMOS).config)
    kinds = {"replicate": [], "hsdp": ["training.parallel=hsdp", "training.parallel_shards=4"]}
    found = {kind: run(on_device.step, COSMOS, [*sizes, *how], 6, 8) for kind, how in kinds.items()}
    whole, shared = found["replicate"], found["hsdp"]
    assert not shared.found.uncounted and shared.found.waits.total() == whole.found.waits.total()
    assert shared.state < 0.7 * whole.state and shared.peak < whole.peak
    spans = {kind: {(k.stage, k.span) for k in step.found.kernels if k.sent} for kind, step in found.items()}
    passes = {("teacher forward", 4), ("student forward", 4), ("backward", 4)}
    assert passes <= spans["hsdp"] and not passes & spans["replicate"]


@pytest.mark.slow
def test_the_largest_recipe_fits_a_card(run: Run, on_device: ModuleType) -> None:
    """ViT-g/14, 32 samples a rank on 64 ranks, 8 of which share a copy."""
    path = str(CONFIGS / "cosmos" / "vitg14_merged30m.yaml")
    step = run(on_device.step, path, ["training.parallel_shards=8"], 32, 64)
    assert not step.found.uncounted and step.peak < 70 * 2**30


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 64])
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes(path: Path, ranks: int, run: Run, on_device: ModuleType, small: Small) -> None:
    step = run(on_device.step, str(path), small(load_config(path).config), 4, ranks)
    assert not step.found.uncounted and MEANT in places(step) <= {
        MEANT,
        *(THEIRS if path.stem == "slip" else ()),
    }
    assert any(kernel.sent for kernel in step.found.kernels) == (ranks > 1)


@pytest.mark.slow
def test_a_step_in_its_other_forms(run: Run, on_device: ModuleType, small: Small) -> None:
    """float16 with a scaler, micro-batches, blocks computed again, branches dropped, clipped."""
    forms = ["training.precision=amp_fp16", "training.micro_batch_size=3", "training.clip_grad_norm=1"]
    forms += [f"model.{tower}.grad_checkpointing=true" for tower in ("image", "text")]
    forms += ["training.attention=sdpa", "model.image.drop_path=0.1", "model.image.layers=2"]
    step = run(on_device.step, COSMOS, [*small(load_config(COSMOS).config), *forms], 6)
    assert step.precision == "amp_fp16" and not step.found.uncounted
    assert sum(count for event, count in step.found.waits.items() if event.where.startswith(MEANT)) == 1


@pytest.mark.slow
def test_the_budget_of_the_published_step(run: Run, on_device: ModuleType) -> None:
    """ViT-B/16, 64 samples with captions of 19.5 tokens: what it came to when it was last made cheaper.

    Its products are what tools/bench_step.py counts as it runs: 428 GFLOP a sample.
    """
    step = run(on_device.step, COSMOS, [], 64)
    kernels = step.found.kernels.items()
    assert sum(count * kernel.launches for kernel, count in kernels) <= 1390
    assert sum(count * kernel.bytes for kernel, count in kernels) <= 111e9
    assert sum(count * kernel.flops for kernel, count in kernels) == pytest.approx(64 * 428e9, rel=0.01)
    assert step.found.waits.total() == 1 and not step.found.pageable and step.peak <= 13 * 2**30
