"""The tasks of ``cosmos-ssl eval``: one role's model and data to named numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cosmos_ssl.api import DataError, Encoder
from cosmos_ssl.data import open_shards
from cosmos_ssl.data.folder import picture_folder
from cosmos_ssl.evaluation.caption_sets import CaptionSet, find_caption_set
from cosmos_ssl.evaluation.features import Job, Loaded, Samples, features_of, text_features
from cosmos_ssl.evaluation.retrieval import retrieval_metrics
from cosmos_ssl.evaluation.samples import EvaluationData


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a user asks of a task. What a task does not read is None."""

    data: str
    """Shards, or a folder whose layout is recognised."""
    texts: str = "txt"
    """The texts that retrieval looks for: ``txt``, or a key of the samples' JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task on its data, which is looked for when this is made; ``run`` evaluates one role."""

    set_name: str
    """The known set that the data is (``coco``, ``flickr30k``, ...), else empty."""
    run: Callable[[Encoder, Job], dict[str, float]]


def retrieval(options: Options, job: Job) -> Task:
    """Image-text retrieval, as the evaluator ``retrieval`` has it, on COCO, Flickr30k, shards or a folder. Raises DataError."""
    data = _captioned(options.data)
    if isinstance(data, CaptionSet):
        data = data.complete(job)

    def run(encoder: Encoder, job: Job) -> dict[str, float]:
        def compute(loaded: Sequence[Loaded]) -> tuple[Tensor, list[Any]]:
            notes = [[sample.key, list(sample.captions.get(options.texts, ())), list(sample.captions)] for sample, _ in loaded]
            return encoder.match_image(torch.stack([pixels for _, pixels in loaded])), notes

        rows, notes = features_of(data, encoder.preprocess, compute, job, name=f"match_image {options.texts}")
        if not any(texts for _, texts, _ in notes):
            key, _, others = notes[0]
            raise DataError(f"texts: samples such as {key} have no texts '{options.texts}'. They have: {', '.join(others) or 'none'}")
        job.leave_out([key for key, texts, _ in notes if not texts], len(notes), f"samples have no texts '{options.texts}'")
        kept = [texts for _, texts, _ in notes if texts]
        images = rows[torch.tensor([bool(texts) for _, texts, _ in notes])].to(encoder.device)
        owners = torch.tensor([number for number, texts in enumerate(kept) for _ in texts])
        found = text_features(encoder, [text for texts in kept for text in texts], job, to_match=True)
        return retrieval_metrics(images, found.to(encoder.device), owners, score=encoder.match)

    return Task(set_name=data.name if isinstance(data, CaptionSet) else "", run=run)


def _captioned(data: str) -> Samples:
    folder = picture_folder(data)
    known = find_caption_set(folder) if folder is not None else None
    return known or open_samples(data)


def open_samples(data: str, *, option: str = "data") -> Samples:
    """Shards, or a folder of pictures. Raises DataError where there is nothing to evaluate on."""
    found = EvaluationData(data, option=option)
    found.check()
    return found.samples if picture_folder(data) is not None else open_shards(data)


TASKS: Mapping[str, Callable[[Options, Job], Task]] = {
    "retrieval": retrieval,
}
