"""One rank of the loss on a fixed global batch, as a program: RANK WORLD FOLDER NEGATIVES. Writes what test_loss.py
compares.

The global batch is the same for every WORLD; a rank takes its share, and what it finds is the loss, and the
gradients of its images, of its captions and of all parameters.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from cosmos_ssl_flair.loss import Flair
from cosmos_ssl_flair.pooling import FlairPool

from cosmos_ssl.api import Features, GroupFeatures, Progress, Spec, StepContext, TowerSpec, Views, ViewSpec
from cosmos_ssl.functional import gather

SAMPLES, CAPTIONS, PATCHES, WIDTH, D = 6, 3, 5, 12, 16


def main(rank: int, world: int, folder: Path, negatives: int | None) -> None:
    """Compute and save."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.manual_seed(0)
    spec = Spec(
        embed_dim=D,
        image=TowerSpec(width=WIDTH),
        text=TowerSpec(width=D),
        image_views={"global": ViewSpec(views=1)},
        text_views={"global": ViewSpec(views=CAPTIONS)},
        heads={"pool": {"pooled": D}},
        attention="sdpa",
    )
    head = FlairPool(spec, num_heads=4).double()
    head.chunk = 100
    loss = Flair(spec, head="pool", negative_captions=negatives).double()
    shapes = (1, SAMPLES, PATCHES, WIDTH), (1, SAMPLES, D), (CAPTIONS, SAMPLES, D)
    everyone = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    share = slice(rank * SAMPLES // world, (rank + 1) * SAMPLES // world)
    tokens, images, texts = (x[:, share].clone().requires_grad_() for x in everyone)
    context = StepContext(
        views=Views(keys=[""] * tokens.shape[1]),
        student=Features(
            image={"global": GroupFeatures(views=(0,), projected=images, tokens=tokens, token_views=(0,))}
        ),
        teacher=None,
        gathered={
            "student": Features(
                text={"global": GroupFeatures(views=tuple(range(CAPTIONS)), projected=gather(texts, dim=1))}
            ),
            "teacher": Features(),
        },
        progress=Progress(step=4, total_steps=9),
        head=lambda name, *args: {"pool": head}[name].respond(*args),
    )
    total = sum(loss(context).terms.values())
    parameters = [*head.parameters(), *loss.parameters()]
    gradients = torch.autograd.grad(total, [tokens, images, texts, *parameters])
    torch.save([total.detach(), *gradients], folder / f"{world}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]) or None)
