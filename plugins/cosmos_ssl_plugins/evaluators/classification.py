"""Zero-shot classification on shards or a folder."""

from __future__ import annotations

import torch

from cosmos_ssl.api import DataError, Encoder, Evaluation, Evaluator, Sample, Spec
from cosmos_ssl.evaluation.classification import CLASS_FILES, accuracy, class_vectors, load_class_names, load_templates
from cosmos_ssl.evaluation.pictures import Match, draw_matches
from cosmos_ssl.evaluation.samples import EvaluationData, check_positive, items_of_all, label_of, rows_of_all

SHOWN, BEST = 8, 3


class Classification(Evaluator):
    """Pictures against class names put into templates.

    ``data`` are shards or a folder with one folder a class (None: the training set's validation data). ``class_names`` is a list in the
    order of the labels, a text file with one a line, ``imagenet``, or None: ``classes.txt`` or ``classnames.txt`` beside the shards or in
    the folder, else the names of its class folders. ``templates`` is a list with ``{}`` for the name, ``simple``, or ``openai`` (the 80
    of CLIP). ``label`` names the member or the JSON key with each sample's class: its number from 0, or its name. ``max_samples`` takes
    evenly spread ones; ``workers`` are threads that decode, ``batch_size`` pictures are encoded at once.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        data: str | list[str] | None = None,
        class_names: str | list[str] | None = None,
        templates: str | list[str] = "simple",
        label: str = "cls",
        batch_size: int = 256,
        workers: int | None = None,
        max_samples: int | None = None,
    ) -> None:
        check_positive(batch_size=batch_size)
        self.data = EvaluationData(data, fallback=spec.validation_data, workers=workers, max_samples=max_samples)
        self.names = None if class_names is None else load_class_names(class_names)
        self.templates = load_templates(templates)
        self.label = label
        self.batch_size = batch_size

    def prepare(self) -> None:
        """Look for the data, and for the names where they are to lie there. Raises DataError."""
        self.data.check(label=self.label)
        if self.names is None:
            self._names_beside()

    def evaluate(self, encoder: Encoder, *, pictures: bool = False) -> Evaluation:
        """``top1``, ``top5``, ``mean_per_class_top1``; picture ``classes``. Raises DataError."""
        names = self.names if self.names is not None else self._names_beside()
        vectors = class_vectors(encoder, names, self.templates, self.batch_size)
        scores, labels, places = [], list[int](), list[int]()
        for batch in self.data.batches(encoder, self.batch_size):
            labels += [self._number(sample, names) for sample in batch.samples]
            scores.append((encoder.encode_image(batch.pixels) @ vectors.T).cpu())
            places += batch.indices
        found, labels, places = rows_of_all(scores, torch.device("cpu")), items_of_all(labels), items_of_all(places)
        metrics = accuracy(found, torch.tensor(labels))
        if not pictures:
            return Evaluation(metrics=metrics)
        matches = []
        for n in torch.linspace(0, len(places) - 1, min(SHOWN, len(places))).round().long().tolist():
            best = found[n].topk(min(BEST, len(names))).indices.tolist()
            lines = [(names[i], float(found[n, i]), i == labels[n]) for i in best]
            matches.append(Match(picture=self.data.read(places[n]).decode(), found=lines, note=f"is: {names[labels[n]]}"))
        return Evaluation(metrics=metrics, pictures={"classes": draw_matches(matches)})

    def _names_beside(self) -> list[str]:
        paths = [self.data.folder / name for name in CLASS_FILES]
        found = next((path for path in paths if path.is_file()), None)
        if found is None and len(self.data.class_names) > 1:
            return list(self.data.class_names)
        if found is None:
            raise DataError(f"class_names: give them, since {self.data.folder} holds none of {', '.join(CLASS_FILES)}")
        return load_class_names(str(found))

    def _number(self, sample: Sample, names: list[str]) -> int:
        label = label_of(sample, self.label)
        number = names.index(label) if label in names else label
        if not isinstance(number, int) or not 0 <= number < len(names):
            raise DataError(f"{self.label}: sample {sample.key} has the label '{label}', which is none of the {len(names)} classes")
        return number
