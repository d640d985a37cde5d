"""Classification by nearest neighbours, for runs with and without text."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from cosmos_ssl.api import Count, Encoder, Evaluation, Evaluator, Few, Modality, Size, Spec, Temperature
from cosmos_ssl.evaluation.features import Job
from cosmos_ssl.evaluation.knn import knn_scores, neighbours
from cosmos_ssl.evaluation.pictures import draw_neighbours
from cosmos_ssl.evaluation.protocols import Labelled, labelled_features, trained_accuracy
from cosmos_ssl.evaluation.samples import EvaluationData, class_of, evenly_spread
from cosmos_ssl.functional import gather_objects

SHOWN, NEAREST = 6, 6


class KNearestNeighbours(Evaluator):
    """Labels pictures of ``data`` by the nearest ones of ``train_data`` in the frozen tower's features before the
    projection.

    Both are shards or a folder with one folder a class; ``data`` None is the training set's validation data. ``k``
    neighbours vote with weight exp(cosine / ``temperature``) (DINO, arXiv 2104.14294). ``label`` names the member or
    the JSON key with each sample's class; classes of two folders are the same if their names are. ``max_samples`` and
    ``max_train_samples`` take evenly spread ones; ``workers`` are threads that decode, ``batch_size`` pictures are
    encoded at once.
    """

    modalities: ClassVar[tuple[Modality, ...]] = ("image",)

    def __init__(
        self,
        spec: Spec,
        *,
        train_data: str | list[str],
        data: str | list[str] | None = None,
        k: Count = 20,
        temperature: Temperature = 0.07,
        label: str = "cls",
        batch_size: Size = 256,
        workers: Few | None = None,
        max_samples: Count | None = None,
        max_train_samples: Count | None = None,
    ) -> None:
        self.train_data = EvaluationData(train_data, option="train_data")
        self.data = EvaluationData(data, fallback=spec.validation_data, numbered_by=self.train_data)
        self.job = Job(
            batch_size=batch_size, workers=workers, max_samples=max_samples, allow_missing=True, data=self.data.name
        )
        self.train_job = replace(self.job, max_samples=max_train_samples, data=self.train_data.name)
        self.k = k
        self.temperature = temperature
        if not label:
            raise ValueError("label: an empty name. Give cls, or another member or key of the JSON")
        self.label = label

    def prepare(self) -> None:
        """Look for the data. Raises DataError."""
        self.train_data.check(label=self.label)
        self.data.check(label=self.label)

    def evaluate(self, encoder: Encoder, *, pictures: bool = False) -> Evaluation:
        """``top1``, ``top5``, ``mean_per_class_top1``; picture ``neighbours``. Raises DataError."""
        train = self._features(encoder, self.train_data, self.train_job)
        test = self._features(encoder, self.data, self.job)
        metrics = trained_accuracy(train, test, partial(knn_scores, k=self.k, temperature=self.temperature))
        if not any(gather_objects(pictures)):
            return Evaluation(metrics=metrics)
        shown = evenly_spread(len(test.rows), SHOWN)  # rows of all ranks, whichever of them draws
        few = torch.cat([test.rows.block(n, n + 1) for n in shown])
        places = neighbours(train.rows, few, min(NEAREST, len(train.rows)))[1].tolist()
        if not pictures:
            return Evaluation(metrics=metrics)

        def picture(data: EvaluationData, of: Labelled, number: int) -> Tensor:
            return data.picture(of.places[number], encoder.spec.background)

        rows = []
        for n, near in zip(shown, places, strict=True):
            found = [(picture(self.train_data, train, i), train.labels[i] == test.labels[n]) for i in near]
            rows.append((picture(self.data, test, n), found))
        return Evaluation(metrics=metrics, pictures={"neighbours": draw_neighbours(rows)})

    def _features(self, encoder: Encoder, data: EvaluationData, job: Job) -> Labelled:
        return labelled_features(
            encoder, data.samples, job, lambda sample: class_of(sample, self.label), name=self.label
        )
