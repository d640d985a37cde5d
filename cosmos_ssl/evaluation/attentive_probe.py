"""Classification of frozen patch tokens by a learned attention pooling, its learning rate chosen on held-out samples.

Shape letters: N samples, P patches, W width, H heads, C classes, b samples of a batch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cosmos_ssl.api import DataError, Encoder, Need, Sample, UserError
from cosmos_ssl.evaluation.features import Job
from cosmos_ssl.evaluation.protocols import Labelled, sharded_pictures
from cosmos_ssl.evaluation.samples import Samples, evenly_spread
from cosmos_ssl.functional import gather_objects, rank, world_size
from cosmos_ssl.models.encoder import ModelEncoder

RATES = (3e-4, 1e-3, 3e-3)
EPOCHS, BATCH, WEIGHT_DECAY, WARM_UP = 20, 256, 0.01, 0.1
"""Epochs, samples of a step, AdamW's decay, and the share of the steps in which the rate rises (ours, of the order of
V-JEPA's probes: arXiv 2404.08471)."""
_HELD_OUT = 0.2
_HEAD = 64
_SHARE = 0.3  # of the machine's memory: the pieces are held twice while they are joined


class AttentivePool(nn.Module):
    """A learned query of each head looks at all patches, and a linear map classifies what they find (CAE, arXiv
    2202.03026; AIM, arXiv 2401.08541; V-JEPA, arXiv 2404.08471, adds an MLP).

    Channels are shifted and scaled by ``mean`` and ``scale`` [W] first, as AIM's batch norm does.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, scale: Tensor, classes: int, generator: torch.Generator) -> None:
        super().__init__()
        width = len(mean)
        heads = width // _HEAD if width % _HEAD == 0 else 1
        self.query = nn.Parameter(torch.randn(heads, width // heads, generator=generator))
        self.key = nn.Parameter(torch.randn(width, width, generator=generator) * width**-0.5)
        self.value = nn.Parameter(torch.randn(width, width, generator=generator) * width**-0.5)
        self.weight = nn.Parameter(torch.zeros(classes, width))
        self.bias = nn.Parameter(torch.zeros(classes))
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """[b, P, W] -> [b, C].

        q (K x) is (K^T q) x, and a mean of V x is V of the mean, so that no patch meets a matrix [W, W].
        """
        tokens = (tokens.float() - self.mean) / self.scale
        queries = torch.einsum("hd,hdw->hw", self.query, self.key.unflatten(0, self.query.shape))
        weights = torch.einsum("bpw,hw->bhp", tokens, queries * self.query.shape[1] ** -0.5).softmax(2)
        seen = torch.einsum("bhp,bpw->bhw", weights, tokens)
        pooled = torch.einsum("bhw,hdw->bhd", seen, self.value.unflatten(0, self.query.shape)).flatten(1)
        return F.linear(pooled, self.weight, self.bias)


def labelled_tokens(
    encoder: Encoder, data: Samples, job: Job, label: Callable[[Sample], Hashable], *, name: str
) -> Labelled:
    """Patch tokens [N, P, W] of all samples, float16 in host memory, and what ``label`` says of each.

    Raises UserError where the image tower has no patches, or where they would take too much of the memory.
    """
    tower = encoder.model.towers.get("image") if isinstance(encoder, ModelEncoder) else None
    if not isinstance(encoder, ModelEncoder) or tower is None or "tokens" not in tower.capabilities:
        raise UserError("this model has no patch tokens, which attentive_probe needs")
    count, spec = len(evenly_spread(len(data), job.max_samples)), tower.spec
    size = count * (spec.image_size // spec.patch_size) ** 2 * spec.width * 2
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if size > _SHARE * there:
        raise UserError(
            f"{job.data}: the patches of {count:,} pictures take {size / 2**30:,.1f} GiB, more than {_SHARE:.0%} of "
            f"the memory ({there / 2**30:,.1f}). Give --max-train-samples or --max-samples"
        )

    def encode(pixels: Tensor) -> Tensor:
        found = encoder.features([Need(modality="image", kind="tokens")], pixels=pixels).image["global"].tokens
        assert found is not None
        return found[0].half()

    rows, places, labels = sharded_pictures(encoder, data, job, encode, label, name=f"image tokens {name}")
    return Labelled(rows, labels, places)


def fit(
    tokens: Tensor,
    labels: Tensor,
    *,
    classes: int,
    rate: float,
    device: torch.device,
    places: Tensor | None = None,
) -> AttentivePool:
    """A probe of tokens [N, P, W] with labels int64 [N], or of those at ``places``, by AdamW over ``EPOCHS``.

    What is drawn comes from one seed. The rate rises over the first tenth of the steps and falls to zero by a cosine.
    """
    generator = torch.Generator().manual_seed(0)
    places = torch.arange(len(tokens)) if places is None else places
    probe = AttentivePool(*_moments(tokens, places), classes, generator).to(device)
    optimizer = torch.optim.AdamW(probe.parameters(), weight_decay=WEIGHT_DECAY)
    size = min(BATCH, len(places))
    steps, step = EPOCHS * (len(places) // size), 0
    for _ in range(EPOCHS):
        order = places[torch.randperm(len(places), generator=generator)]
        for batch in order[: len(order) // size * size].split(size):
            done = (step + 1) / steps
            falling = 0.5 * (1 + math.cos(math.pi * max(0.0, done - WARM_UP) / (1 - WARM_UP)))
            optimizer.param_groups[0]["lr"] = rate * (done / WARM_UP if done < WARM_UP else falling)
            loss = F.cross_entropy(probe(tokens[batch].to(device)), labels[batch].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    return probe


def _moments(tokens: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of [N, P, W] at these places, summed in float64."""
    width = tokens.shape[-1]
    total, squares = torch.zeros(2, width, dtype=torch.float64)
    for batch in places.split(BATCH):
        x = tokens[batch].reshape(-1, width).double()
        total += x.sum(0)
        squares += x.square().sum(0)
    count = len(places) * tokens.shape[1]
    mean = total / count
    return mean.float(), (squares / count - mean.square()).clamp_min(1e-12).sqrt().float()


@torch.no_grad()
def scores_of(probe: AttentivePool, tokens: Tensor, places: Tensor | None = None) -> Tensor:
    """Logits [n, C] of tokens [n, P, W], or of those at ``places``, on the host."""
    places = torch.arange(len(tokens)) if places is None else places
    return torch.cat([probe(tokens[batch].to(probe.mean.device)).cpu() for batch in places.split(BATCH)])


def attentive_probe(
    train: Tensor, labels: Tensor, *, classes: int, device: torch.device, rates: Sequence[float] = RATES
) -> tuple[AttentivePool, float]:
    """The probe of training tokens [N, P, W] with labels int64 [N], and the learning rate it was trained with.

    Each rate is tried on all but a fifth of the samples, drawn at random; the one with the best accuracy there (of
    equals the lowest) is used on all. Ranks share the rates. Raises DataError where there are too few samples.
    """
    if not (split := int(len(train) * _HELD_OUT)):
        raise DataError(f"--train-data: {len(train)} training samples are too few for an attentive probe")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    held, rest = order[:split], order[split:]
    found: list[tuple[float, float]] = []
    for rate in sorted(rates)[rank() :: world_size()]:
        probe = fit(train, labels, classes=classes, rate=rate, device=device, places=rest)
        right = scores_of(probe, train, held).argmax(1) == labels[held]
        found.append((right.double().mean().item(), -rate))
    best = -max(item for part in gather_objects(found) for item in part)[1]
    return fit(train, labels, classes=classes, rate=best, device=device), best
