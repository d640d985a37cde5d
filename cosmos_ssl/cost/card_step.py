"""One whole step, counted on a CUDA device that is not there (``count``): what each of its stages costs."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cosmos_ssl.api import CropGroup, Progress, TextGroup
from cosmos_ssl.api.views import CroppedViews, map_tensors
from cosmos_ssl.config import Config
from cosmos_ssl.cost.count import DEVICE, OTHER, Count, Found
from cosmos_ssl.cost.step_cost import caption_lengths, noise_crops
from cosmos_ssl.data.loader import LoadedBatch
from cosmos_ssl.engine.ahead import on_device
from cosmos_ssl.engine.assembly import Assembly
from cosmos_ssl.engine.state import RunState
from cosmos_ssl.engine.step import Step
from cosmos_ssl.functional import local
from cosmos_ssl.models.attention import resolve_backend
from cosmos_ssl.models.precision import DTYPES

COPY = "copy to the device"
STAGES = (
    COPY,
    "augment",
    "teacher forward",
    "student forward",
    "losses",
    "backward",
    "gradient mean",
    "clip",
    "agree",
    "teacher update",
    "optimizer",
    OTHER,
)
"""In the order of a step; as the step itself marks them for a trace."""
RANK = 3
"""The rank that is counted, where there are as many."""
_GROWING = ("augment", "teacher forward", "student forward", "losses", "backward")
"""Stages whose memory grows with the samples, before the first step makes moments."""
_MIDDLE = 500
"""Steps, of an epoch each: what rests or warms up in the first epochs has done so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CardStep:
    """What one rank's step costs, once the first steps are over."""

    samples: int
    rank: int
    ranks: int
    precision: str
    attention: str
    """The backend."""
    found: Found
    state: int
    """Bytes that lie on the device between steps: weights, moments, a teacher."""
    per_sample: float
    """Bytes by which the peak grows with each sample."""

    @property
    def peak(self) -> int:
        """The most bytes that are in use at once."""
        return max(self.found.peaks.values())


def count_step(
    assembly: Assembly,
    config: Config,
    *,
    samples: int,
    caption_tokens: float | None = None,
    ranks: int = 1,
) -> CardStep:
    """Count an update of ``assembly`` on made-up samples, in a process of ``fake_device``; nothing is compiled.

    ``training.precision: auto`` is bfloat16 here.
    Peak memory at half as many samples tells which part of it grows with them. Raises UserError where
    ``caption_tokens`` cannot be.
    """
    training = config.training.model_copy(update={"compile": False})
    precision = "amp_bf16" if training.precision == "auto" else training.precision
    config = config.model_copy(update={"training": training})
    sizes = (max(1, samples // 2), samples)
    peaks, found = [], Found()
    with fake_ranks(ranks), Count(STAGES) as count:
        attention = resolve_backend(training.attention, DEVICE, DTYPES[precision] or torch.float32)
        state = RunState(assembly, config, DEVICE, precision)
        state.model.train()
        gc.collect()  # what was whole before it was shared out
        step = Step(assembly, state, training)
        for number, size in enumerate(sizes):  # the first one also makes moments, and looks closely
            views = map_tensors(make_batch(assembly, size, caption_tokens), count.pin)
            count.restart()
            for batch in on_device((LoadedBatch(step=0, views=views) for _ in "1"), DEVICE):
                step(batch.views, Progress(step=_MIDDLE + number, total_steps=2 * _MIDDLE))
            del batch
            found = count.restart()
            peaks.append(max(found.peaks[stage] for stage in _GROWING))
        state.model.zero_grad(set_to_none=True)
        idle = count.live
        peaks[0] += sum(local(moment).nbytes for moment in state.optimizer.tensors().values())
    per_sample = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0]) if sizes[1] > sizes[0] else (peaks[1] - idle) / samples
    return CardStep(
        samples=samples,
        rank=min(RANK, ranks - 1),
        ranks=ranks,
        precision=precision,
        attention=attention,
        found=found,
        state=idle,
        per_sample=per_sample,
    )


@contextmanager
def fake_ranks(ranks: int) -> Iterator[None]:
    """A world of ``ranks`` in which this process is one and nobody answers: collectives return at once."""
    if ranks == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=min(RANK, ranks - 1), world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def make_batch(assembly: Assembly, samples: int, caption_tokens: float | None = None) -> CroppedViews:
    """A batch as the loader gives it, on the host: crops of noise, random tokens, captions of different lengths.

    Raises UserError for a mean length that captions cannot have.
    """
    spec = assembly.spec
    image: Mapping[str, CropGroup] = {}
    if spec.image_views:
        generator = torch.Generator().manual_seed(0)
        image = noise_crops(assembly.augmenters["image"], spec.image_views, samples, generator)
    text: dict[str, TextGroup] = {}
    views = {name: view.views for name, view in (spec.text_views or {}).items()}
    if views:
        lengths = caption_lengths(sum(views.values()) * samples, caption_tokens, spec.context_length)
        for (name, count), own in zip(views.items(), lengths.split([n * samples for n in views.values()]), strict=True):
            tokens = torch.randint(1, spec.vocab_size, (count, samples, spec.context_length))
            text[name] = TextGroup(tokens=tokens, lengths=own.view(count, samples))
    return CroppedViews(keys=[str(number) for number in range(samples)], image=image, text=text)
