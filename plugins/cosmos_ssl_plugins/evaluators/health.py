"""Whether features are about to collapse, for runs with and without text."""

from __future__ import annotations

import logging
from typing import ClassVar

import torch
from torch import Tensor

from cosmos_ssl.api import Count, DataError, Encoder, Evaluation, Evaluator, Few, Modality, Sample, Share, Size, Spec
from cosmos_ssl.evaluation.features import Job, text_features
from cosmos_ssl.evaluation.health import alignment, effective_rank, match_entropy, uniformity
from cosmos_ssl.evaluation.protocols import sharded_pictures
from cosmos_ssl.evaluation.samples import EvaluationData
from cosmos_ssl.functional import rank

_log = logging.getLogger("cosmos_ssl.evaluation")


class Health(Evaluator):
    """Effective rank (RankMe, arXiv 2210.02885), alignment and uniformity (arXiv 2005.10242) of features.

    A positive pair is a picture and its first text, or the picture and its mirror image where the model has no text
    tower. ``data`` are shards or a folder (None: the training set's validation data); of its samples
    ``max_samples``, evenly spread, are taken. An effective rank below ``collapsed`` times the greatest possible one is
    told as a collapse. ``texts``, ``workers`` and ``batch_size`` as in ``retrieval``.
    """

    modalities: ClassVar[tuple[Modality, ...]] = ("image",)

    def __init__(
        self,
        spec: Spec,
        *,
        data: str | list[str] | None = None,
        texts: str = "txt",
        collapsed: Share = 0.05,
        batch_size: Size = 256,
        workers: Few | None = None,
        max_samples: Count = 4096,
    ) -> None:
        if not texts:
            raise ValueError("texts: an empty name. Give txt, or a key of the JSON")
        self.data = EvaluationData(data, fallback=spec.validation_data)
        self.job = Job(
            batch_size=batch_size, workers=workers, max_samples=max_samples, allow_missing=True, data=self.data.name
        )
        self.texts = texts
        self.collapsed = collapsed
        self.with_text = spec.text is not None

    def prepare(self) -> None:
        """Look for the data and its texts. Raises DataError."""
        self.data.check(texts=self.texts if self.with_text else None)

    def evaluate(self, encoder: Encoder, *, pictures: bool = False) -> Evaluation:
        """``image_effective_rank``, ``image_uniformity``, ``alignment``, ``tower_effective_rank`` (before the
        projection); with text ``text_effective_rank``, ``text_uniformity`` and, where the model has a temperature,
        ``match_entropy`` (in nats). Raises DataError.
        """

        def encode(pixels: Tensor) -> Tensor:
            parts = [encoder.image_features(pixels), encoder.encode_image(pixels)]
            return torch.cat(parts if self.with_text else [*parts, encoder.encode_image(pixels.flip(-1))], 1)

        def first(sample: Sample) -> str | None:
            return next(iter(sample.captions.get(self.texts, ())), None) if self.with_text else ""

        found, _, texts = sharded_pictures(encoder, self.data.samples, self.job, encode, first, name="health")
        rows = found.whole()[[text is not None for text in texts]].float()
        if len(rows) < 2:
            raise DataError(f"{self.data.name}: {len(rows)} samples can be used, health is of two at least")
        width = rows.shape[1] - encoder.spec.embed_dim * (1 if self.with_text else 2)
        tower, images, *mirrored = rows.split([width, *[encoder.spec.embed_dim] * (1 if self.with_text else 2)], 1)
        told = [text for text in texts if text is not None]
        others = text_features(encoder, told, self.job).float() if self.with_text else mirrored[0]
        ranked = {"tower": tower, "image": images} | ({"text": others} if self.with_text else {})
        metrics = {f"{name}_effective_rank": effective_rank(of) for name, of in ranked.items()}
        self._warn(metrics, {name: min(of.shape) for name, of in ranked.items()})
        metrics |= {f"{name}_uniformity": uniformity(of) for name, of in ranked.items() if name != "tower"}
        metrics["alignment"] = alignment(images, others)
        scale = getattr(encoder, "logit_scale", None)
        if self.with_text and scale is not None:
            metrics["match_entropy"] = match_entropy(images, others, scale)
        return Evaluation(metrics=metrics)

    def _warn(self, metrics: dict[str, float], most: dict[str, int]) -> None:
        """Say in one sentence what has collapsed."""
        names = [name for name, limit in most.items() if metrics[f"{name}_effective_rank"] < self.collapsed * limit]
        if names and rank() == 0:
            found = ", ".join(f"{name} {metrics[f'{name}_effective_rank']:.1f} of {most[name]}" for name in names)
            way = "lower the learning rate, or the teacher's temperature and momentum, and go on from before it"
            _log.warning("features collapse: their effective rank is %s; %s", found, way)
