"""Zero-shot classification on shards or a folder."""

from __future__ import annotations

import torch

from cosmos_ssl.api import Count, DataError, Encoder, Evaluation, Evaluator, Few, Size, Spec
from cosmos_ssl.evaluation.classification import CLASS_FILES, load_class_names, load_templates
from cosmos_ssl.evaluation.features import Job
from cosmos_ssl.evaluation.pictures import Match, draw_matches
from cosmos_ssl.evaluation.protocols import classify
from cosmos_ssl.evaluation.samples import EvaluationData

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
        batch_size: Size = 256,
        workers: Few | None = None,
        max_samples: Count | None = None,
    ) -> None:
        self.data = EvaluationData(data, fallback=spec.validation_data)
        self.job = Job(batch_size=batch_size, workers=workers, max_samples=max_samples, allow_missing=True, data=self.data.name)
        self.names = None if class_names is None else load_class_names(class_names)
        self.templates = load_templates(templates)
        if not label:
            raise ValueError("label: an empty name. Give cls, or another member or key of the JSON")
        self.label = label

    def prepare(self) -> None:
        """Look for the data, and for the names where they are to lie there. Raises DataError."""
        self.data.check(label=self.label)
        if self.names is None:
            self._names_beside()

    def evaluate(self, encoder: Encoder, *, pictures: bool = False) -> Evaluation:
        """``top1``, ``top5``, ``mean_per_class_top1``; picture ``classes``. Raises DataError."""
        names = self.names if self.names is not None else self._names_beside()
        found = classify(encoder, self.data.samples, self.job, names=names, templates=self.templates, label=self.label)
        if not pictures:
            return Evaluation(metrics=found.metrics)
        matches = []
        for n in torch.linspace(0, len(found.places) - 1, min(SHOWN, len(found.places))).round().long().tolist():
            scores, own = found.scores[n], found.labels[n]
            lines = [(names[i], float(scores[i]), i == own) for i in scores.topk(min(BEST, len(names))).indices.tolist()]
            picture = self.data.samples.read(found.places[n]).decode()
            matches.append(Match(picture=picture, found=lines, note=f"is: {names[own]}"))
        return Evaluation(metrics=found.metrics, pictures={"classes": draw_matches(matches)})

    def _names_beside(self) -> list[str]:
        paths = [self.data.folder / name for name in CLASS_FILES]
        found = next((path for path in paths if path.is_file()), None)
        if found is None and len(self.data.class_names) > 1:
            return list(self.data.class_names)
        if found is None:
            raise DataError(f"class_names: give them, since {self.data.folder} holds none of {', '.join(CLASS_FILES)}")
        return load_class_names(str(found))
