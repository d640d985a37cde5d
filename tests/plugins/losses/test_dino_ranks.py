"""DINO, iBOT, KoLeo, the coding rate and batch norm of heads: several ranks together are one rank with the whole batch,
float64 to 1e-6 and closer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cosmos_ssl.api import (
    Features,
    GroupFeatures,
    ImageGroup,
    Loss,
    Progress,
    Spec,
    StepContext,
    TowerSpec,
    Views,
    ViewSpec,
)
from cosmos_ssl.functional import gather
from cosmos_ssl_plugins.heads.per_group import BatchNorm
from cosmos_ssl_plugins.losses.coding_rate import CodingRate
from cosmos_ssl_plugins.losses.dino import Dino
from cosmos_ssl_plugins.losses.ibot import Ibot
from cosmos_ssl_plugins.losses.koleo import Koleo

BATCH, WIDTH, K, PATCHES, WORLD = 6, 5, 7, 9, 2
SPEC = Spec(
    embed_dim=WIDTH,
    batch_size=BATCH,
    image=TowerSpec(width=WIDTH, patch_size=1),
    image_views={"global": ViewSpec(views=2, masks=True), "local": ViewSpec(views=3)},
    heads={"mine": {"global": K, "local": K, "global_masked": K, "global_patches": K}},
)
Found = dict[str, Tensor]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masks(step: int) -> Tensor:
    """[2, B, N]; the ranks' counts differ, and at the second step the last rank has no masked patch."""
    counts = (
        torch.tensor([[0, 1, 9, 3, 2, 0], [4, 4, 0, 1, 0, 1]])
        if step == 0
        else torch.tensor([[2, 5, 3, 0, 0, 0], [1, 0, 6, 0, 0, 0]])
    )
    return torch.arange(PATCHES) < counts[..., None]


def context(step: int, weight: Tensor, share: slice) -> StepContext:
    """Logits are a linear map, ``weight`` [W, K], of features of the samples in ``share``; the teacher's have another
    one.
    """
    hidden = masks(step)[:, share]
    everywhere = draw(2, BATCH, PATCHES, WIDTH, seed=step + 40)[:, share]
    patches = everywhere[hidden]
    whole, parts = (draw(views, BATCH, WIDTH, seed=step + seed)[:, share] for views, seed in ((2, 10), (3, 20)))
    teacher = draw(WIDTH, K, seed=99)
    student = {"global": whole @ weight, "local": parts @ weight, "global_masked": patches @ weight}
    group = ImageGroup(
        pixels=torch.empty(2, hidden.shape[1], 3, 1, 1), params=torch.empty(2, hidden.shape[1], 0), masks=hidden
    )
    pooled = whole @ weight[:, :WIDTH]
    return StepContext(
        views=Views(keys=[""] * hidden.shape[1], image={"global": group}),
        student=Features(image={"global": GroupFeatures(views=(0, 1), pooled=pooled)}, heads={"mine": student}),
        teacher=Features(
            heads={
                "mine": {
                    "global": whole.flip(0) @ teacher,
                    "global_masked": patches.flip(-1) @ teacher,
                    "global_patches": everywhere.flip(-1) @ teacher,
                }
            }
        ),
        gathered={"student": Features(image={"global": GroupFeatures(views=(0, 1), pooled=gather(pooled, dim=1))})},
        progress=Progress(step=step, total_steps=2),
        head=lambda *_: {},
    )


def losses() -> dict[str, Loss]:
    return {
        "dino": Dino(SPEC, head="mine"),
        "dino_sinkhorn": Dino(SPEC, head="mine", centering="sinkhorn"),
        "ibot": Ibot(SPEC, head="mine"),
        "ibot_all": Ibot(SPEC, head="mine", center_over="all"),
        "ibot_sinkhorn": Ibot(SPEC, head="mine", centering="sinkhorn"),
        "koleo": Koleo(SPEC),
        "coding_rate": CodingRate(SPEC, head="mine"),
        "coding_rate_mean": CodingRate(SPEC, head="mine", features="mean"),
    }


def rank_losses(ranks: int) -> dict[str, Loss]:
    """Losses of one rank's samples. A process alone divides the covariance by N for ``ranks`` by a larger ``eps``."""
    eps = 0.5 * math.sqrt(ranks)
    return {
        "koleo_rank": Koleo(SPEC, scope="rank"),
        "coding_rate_rank": CodingRate(SPEC, head="mine", eps=eps, gamma=0.3, scope="rank"),
    }


def normalised(share: slice) -> Found:
    """Batch norm: output and gradients of rows [V, B, W], view by view, and rows of which the ranks have unlike
    numbers.
    """
    torch.manual_seed(0)
    head = nn.Sequential(
        nn.Linear(WIDTH, 8), BatchNorm(8), nn.ReLU(), nn.Linear(8, 4), BatchNorm(4, affine=False)
    ).double()
    x = draw(2, BATCH, WIDTH, seed=1)[:, share].requires_grad_()
    output = torch.stack([head(view) for view in x])
    (output * draw(2, BATCH, 4, seed=3)[:, share]).sum(-1).mean().backward()
    assert x.grad is not None
    weights = {f"mean of {name}": p.grad for name, p in head.named_parameters() if p.grad is not None}
    rows = draw(2, BATCH, PATCHES, WIDTH, seed=2)[:, share][masks(0)[:, share]]
    return {"output": output.detach(), "input": x.grad, "masked": head(rows).detach(), **weights}


def everything(share: slice) -> dict[str, Found]:
    return {"batch norm": normalised(share), **steps(losses(), share)}


def steps(losses: dict[str, Loss], share: slice) -> dict[str, Found]:
    """Per loss and step: the loss and the gradient of ``weight``, both to be averaged over ranks, and the buffers, the
    same on all.
    """
    found: dict[str, Found] = {}
    for step in range(2):
        for name, loss in losses.items():
            loss.double()
            weight = draw(WIDTH, K, seed=step).requires_grad_()
            output = loss(context(step, weight, share))
            term = torch.stack(list(output.terms.values())).sum()
            term.backward()
            assert weight.grad is not None
            buffers = {key: value.clone() for key, value in loss.named_buffers()}
            metrics = {f"mean of {key}": value.detach().double() for key, value in output.metrics.items()}
            found[f"{name} {step}"] = {
                "mean of loss": term.detach(),
                "mean of gradient": weight.grad,
                **metrics,
                **buffers,
            }
    return found


def share_of(rank: int) -> slice:
    return slice(rank * BATCH // WORLD, (rank + 1) * BATCH // WORLD)


def work(rank: int, world: int, path: str, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    results[rank] = everything(share_of(rank)) | steps(rank_losses(1), share_of(rank))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(in_ranks: Callable[..., dict[Any, Any]]) -> tuple[dict[str, Found], list[dict[str, Found]]]:
    results = in_ranks(work, WORLD)
    return everything(slice(0, BATCH)), [results[rank] for rank in range(WORLD)]


@pytest.mark.parametrize("case", [f"{name} {step}" for name in losses() for step in range(2)])
def test_losses(case: str, runs: tuple[dict[str, Found], list[dict[str, Found]]]) -> None:
    one, ranks = runs[0][case], [rank[case] for rank in runs[1]]
    assert {len(found) for found in (one, *ranks)} == {len(one)} and one["mean of loss"] != 0
    for key, expected in one.items():
        if key.startswith("mean"):
            torch.testing.assert_close(
                torch.stack([rank[key] for rank in ranks]).mean(0), expected, rtol=1e-9, atol=1e-12
            )
        else:
            assert expected.any()
            for rank in ranks:
                torch.testing.assert_close(rank[key], expected, rtol=1e-9, atol=1e-12)


def test_losses_of_each_rank(runs: tuple[dict[str, Found], list[dict[str, Found]]]) -> None:
    """Each rank finds what a process with its samples alone does."""
    for rank, found in enumerate(runs[1]):
        for case, expected in steps(rank_losses(WORLD), share_of(rank)).items():
            torch.testing.assert_close(found[case], expected, rtol=1e-9, atol=1e-12)


def test_batch_norm(runs: tuple[dict[str, Found], list[dict[str, Found]]]) -> None:
    one, ranks = runs[0]["batch norm"], [rank["batch norm"] for rank in runs[1]]
    for key, expected in one.items():
        if key.startswith("mean"):
            found = torch.stack([rank[key] for rank in ranks]).mean(0)
        elif key == "masked":
            counts = masks(0).sum(-1)
            found = torch.empty_like(expected)
            owner = (
                (torch.arange(BATCH) * WORLD // BATCH).expand_as(counts).flatten().repeat_interleave(counts.flatten())
            )
            for number, rank in enumerate(ranks):
                found[owner == number] = rank[key]
        else:
            found = torch.cat([rank[key] for rank in ranks], 1) / (WORLD if key == "input" else 1)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
