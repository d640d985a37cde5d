"""Classification by nearest neighbours, for runs with and without text."""

from __future__ import annotations

from collections.abc import Hashable
from typing import ClassVar

import torch
from torch import Tensor

from cosmos_ssl.api import DataError, Encoder, Evaluation, Evaluator, Modality, Spec, normalise
from cosmos_ssl.evaluation.classification import accuracy
from cosmos_ssl.evaluation.knn import knn_scores
from cosmos_ssl.evaluation.pictures import draw_neighbours
from cosmos_ssl.evaluation.samples import EvaluationData, check_positive, items_of_all, label_of, rows_of_all

SHOWN, NEAREST = 6, 6


class KNearestNeighbours(Evaluator):
    """Labels pictures of ``data`` by the nearest ones of ``train_data`` in the frozen tower's features before the projection.

    Both are shards or a folder with one folder a class; ``data`` None is the training set's validation data. ``k`` neighbours vote with
    weight exp(cosine / ``temperature``) (DINO, arXiv 2104.14294). ``label`` names the member or the JSON key with each sample's class;
    classes of two folders are the same if their names are. ``max_samples`` and ``max_train_samples`` take evenly spread ones;
    ``workers`` are threads that decode, ``batch_size`` pictures are encoded at once.
    """

    modalities: ClassVar[tuple[Modality, ...]] = ("image",)

    def __init__(
        self,
        spec: Spec,
        *,
        train_data: str | list[str],
        data: str | list[str] | None = None,
        k: int = 20,
        temperature: float = 0.07,
        label: str = "cls",
        batch_size: int = 256,
        workers: int | None = None,
        max_samples: int | None = None,
        max_train_samples: int | None = None,
    ) -> None:
        check_positive(k=k, temperature=temperature, batch_size=batch_size)
        self.train_data = EvaluationData(train_data, option="train_data", workers=workers, max_samples=max_train_samples)
        self.data = EvaluationData(
            data, fallback=spec.validation_data, workers=workers, max_samples=max_samples, numbered_by=self.train_data
        )
        self.k = k
        self.temperature = temperature
        self.label = label
        self.batch_size = batch_size

    def prepare(self) -> None:
        """Look for the data. Raises DataError."""
        self.train_data.check(label=self.label)
        self.data.check(label=self.label)

    def evaluate(self, encoder: Encoder, *, pictures: bool = False) -> Evaluation:
        """``top1``, ``top5``, ``mean_per_class_top1``; picture ``neighbours``. Raises DataError."""
        train, train_labels, train_places = self._features(encoder, self.train_data)
        test, test_labels, test_places = self._features(encoder, self.data)
        numbers = {label: number for number, label in enumerate(dict.fromkeys(train_labels))}
        known = torch.tensor([numbers[label] for label in train_labels], device=train.device)
        votes = knn_scores(train, known, test, classes=len(numbers), k=self.k, temperature=self.temperature)
        metrics = accuracy(votes.cpu(), torch.tensor([numbers.get(label, -1) for label in test_labels]))
        if not pictures:
            return Evaluation(metrics=metrics)
        rows = []
        for n in torch.linspace(0, len(test) - 1, min(SHOWN, len(test))).round().long().tolist():
            near = (normalise(train) @ normalise(test[n])).topk(min(NEAREST, len(train))).indices.tolist()
            found = [(self.train_data.read(train_places[i]).decode(), train_labels[i] == test_labels[n]) for i in near]
            rows.append((self.data.read(test_places[n]).decode(), found))
        return Evaluation(metrics=metrics, pictures={"neighbours": draw_neighbours(rows)})

    def _features(self, encoder: Encoder, data: EvaluationData) -> tuple[Tensor, list[Hashable], list[int]]:
        """Features [N, W], labels and places of all samples."""
        features, labels, places = [], list[Hashable](), list[int]()
        for batch in data.batches(encoder, self.batch_size):
            features.append(encoder.image_features(batch.pixels))
            places += batch.indices
            for sample in batch.samples:
                label = label_of(sample, self.label)
                if not isinstance(label, Hashable):
                    raise DataError(f"{self.label}: sample {sample.key} has a list or a table where a label is due")
                labels.append(label)
        return rows_of_all(features, encoder.device), items_of_all(labels), items_of_all(places)
