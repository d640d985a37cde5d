"""Zero-shot classification on shards or a folder."""

from __future__ import annotations

import logging

from cosmos_ssl.api import Count, DataError, Encoder, Evaluation, Evaluator, Few, Size, Spec
from cosmos_ssl.evaluation.classification import load_class_names, load_templates
from cosmos_ssl.evaluation.features import Job
from cosmos_ssl.evaluation.naming import in_order_of_folders, repeated, spoken, wordnet
from cosmos_ssl.evaluation.pictures import Match, draw_matches
from cosmos_ssl.evaluation.protocols import classify
from cosmos_ssl.evaluation.retrieval import best_first
from cosmos_ssl.evaluation.samples import CLASS_FILES, EvaluationData, evenly_spread
from cosmos_ssl.functional import rank

_log = logging.getLogger("cosmos_ssl.evaluation")
SHOWN, BEST = 8, 3


class Classification(Evaluator):
    """Pictures against class names put into templates.

    ``data`` are shards or a folder with one folder a class (None: the training set's validation data). ``class_names``
    is a list in the order of the labels, a text file with one a line, ``imagenet``, or None: ``classes.txt`` or
    ``classnames.txt`` beside the shards or in the folder, else the names of its class folders, underscores as spaces.
    Names of class folders may come in any order, others come in that of the folders. ``templates`` is a list with
    ``{}`` for the name, ``simple``, ``openai`` (the 80 of CLIP) or ``openclip_simple`` (OpenCLIP's seven). ``label``
    names the member or the JSON key with each sample's class: its number from 0, or its name. ``max_samples`` takes
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
        self.job = Job(
            batch_size=batch_size, workers=workers, max_samples=max_samples, allow_missing=True, data=self.data.name
        )
        self.names = None if class_names is None else load_class_names(class_names)
        self.templates = load_templates(templates)
        if not label:
            raise ValueError("label: an empty name. Give cls, or another member or key of the JSON")
        self.label = label

    def prepare(self) -> None:
        """Look for the data, and for the names where they are to lie there. Raises DataError."""
        self.data.check(label=self.label)
        if (told := repeated(self._class_names())) and rank() == 0:
            _log.warning("class_names: %s", told)

    def evaluate(self, encoder: Encoder, *, pictures: bool = False) -> Evaluation:
        """``top1``, ``top5``, ``mean_per_class_top1``; picture ``classes``. Raises DataError."""
        names = self._class_names()
        found = classify(encoder, self.data.samples, self.job, names=names, templates=self.templates, label=self.label)
        if not pictures:
            return Evaluation(metrics=found.metrics)
        matches = []
        for n in evenly_spread(len(found.places), SHOWN):
            scores, own = found.scores[n], found.labels[n]
            lines = [(names[i], float(scores[i]), i == own) for i in best_first(scores)[:BEST]]
            picture = self.data.picture(found.places[n], encoder.spec.background)
            matches.append(Match(picture=picture, found=lines, note=f"is: {names[own]}"))
        return Evaluation(metrics=found.metrics, pictures={"classes": draw_matches(matches)})

    def _class_names(self) -> list[str]:
        """The name of each class in the order of the labels. Raises DataError."""
        folders, file = self.data.class_names, self.data.class_file
        if self.names is None and file is None and (len(folders) < 2 or wordnet(folders)):
            raise DataError(
                f"class_names: give them, since none of {', '.join(CLASS_FILES)} lies beside {self.data.name}"
            )
        if self.names is None and file is None:
            return list(map(spoken, folders))
        names = load_class_names(str(file)) if self.names is None else self.names
        source = str(file) if self.names is None else "class_names"
        return in_order_of_folders(names, folders, source) if folders else names
