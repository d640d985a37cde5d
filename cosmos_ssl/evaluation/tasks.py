"""The tasks of ``cosmos_ssl.evaluate``: one role's model and data to named numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cosmos_ssl.api import DataError, Encoder, Modality, Sample, UserError
from cosmos_ssl.data import Folder
from cosmos_ssl.data.folder import picture_folder
from cosmos_ssl.evaluation.attentive_probe import attentive_probe as pooled
from cosmos_ssl.evaluation.attentive_probe import labelled_tokens, scores_of
from cosmos_ssl.evaluation.bootstrap import Outcome
from cosmos_ssl.evaluation.caption_sets import find_caption_set
from cosmos_ssl.evaluation.class_sets import find_class_data
from cosmos_ssl.evaluation.classification import (
    accuracy_of,
    accuracy_outcomes,
    class_vectors,
    load_templates,
    outcomes_of,
)
from cosmos_ssl.evaluation.features import Job, Loaded, numbered, sharded_features, text_features
from cosmos_ssl.evaluation.knn import knn_scores
from cosmos_ssl.evaluation.linear_probe import linear_probe as fitted
from cosmos_ssl.evaluation.naming import repeated
from cosmos_ssl.evaluation.pairs import (
    PairSet,
    judge,
    pair_metrics,
    pair_outcomes,
    read_aro,
    read_mmvp,
    read_sugarcrepe,
    read_winoground,
)
from cosmos_ssl.evaluation.picture_files import PictureFiles
from cosmos_ssl.evaluation.protocols import (
    Labelled,
    Scores,
    classify,
    labelled_features,
    retrieve,
    sharded_pictures,
    trained_ahead,
)
from cosmos_ssl.evaluation.retrieval import fold_metrics, rank_outcomes
from cosmos_ssl.evaluation.samples import EvaluationData, Samples, class_of
from cosmos_ssl.evaluation.segmentation import (
    SegmentationProtocol,
    areas,
    model_input,
    segment,
    segmentation_metrics,
    segmentation_outcomes,
)
from cosmos_ssl.evaluation.segmentation_sets import find_segmentation_data
from cosmos_ssl.evaluation.sharded import Sharded
from cosmos_ssl.evaluation.task_names import ON_FEATURES, PURPOSES
from cosmos_ssl.functional import rank
from cosmos_ssl.models.encoder import ModelEncoder

FOLD, _FOLDED = 1000, "coco_karpathy"
"""Pictures of a fold of COCO's 5,000."""
_log = logging.getLogger("cosmos_ssl.evaluation")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a user asks of a task. What a task does not read is None."""

    data: str
    """Shards, or a folder whose layout is recognised."""
    texts: str = "txt"
    """The texts that retrieval looks for: ``txt``, or a key of the samples' JSON."""
    set_name: str | None = None
    """Which known set, where ``data`` holds several."""
    label: str = "cls"
    """The member or the key of the JSON that holds a sample's class."""
    class_names: str | Sequence[str] | None = None
    """A text file with one a line, ``imagenet``, or the names; None is what comes with the data."""
    templates: str | Sequence[str] | None = None
    """``openai``, ``simple``, ``openclip_simple``, or templates with ``{}``; None is the set's own, else ``simple``."""
    train_data: str | None = None
    """Training samples of ``knn`` and the probes; None is the training split of a known set."""
    max_train_samples: int | None = None
    """So many evenly spread training samples; None is all."""
    k: int = 20
    """Neighbours."""
    temperature: float = 0.07
    """Of the neighbours' votes."""
    csa: bool = True
    """Correlative self-attention in the last block, for segmentation."""


class Found(NamedTuple):
    """What was found of one role."""

    metrics: dict[str, float]
    samples: int
    """Pictures that it was found of; of pairs, examples."""
    outcomes: Mapping[str, Outcome]
    """Of metrics, how each sample counts."""
    keys: Sequence[Hashable]
    """What tells each sample from the others of the data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task on its data, which is looked for when this is made; ``run`` evaluates one role."""

    set_name: str
    """The known set that the data is (``coco``, ``flickr30k``, ...), else empty."""
    run: Callable[[Encoder, Job], Found]
    about: Mapping[str, Any] = field(default_factory=dict)
    """What a report says of how it was evaluated."""


@contextmanager
def _flags() -> Iterator[None]:
    """Let a ValueError of an evaluator's option be a UserError of the flag of that name."""
    try:
        yield
    except ValueError as error:
        option, colon, told = str(error).partition(": ")
        if not colon or option not in Options.__dataclass_fields__ or option == "data":
            raise
        raise UserError(f"--{option.replace('_', '-')}: {told}") from error


def retrieval(options: Options, job: Job) -> Task:
    """Image-text retrieval, as the evaluator ``retrieval`` has it, on COCO, Flickr30k, shards or a folder.

    Raises DataError.
    """
    folder = picture_folder(options.data)
    if folder is None and options.set_name is not None:
        raise DataError(f"data: {options.data} is no folder, which the set '{options.set_name}' is read from")
    known = find_caption_set(folder, options.set_name) if folder is not None else None
    data: Samples = _given(options.data) if known is None else known.complete(job)

    def run(encoder: Encoder, job: Job) -> Found:
        found = retrieve(encoder, data, job, texts=options.texts)
        owners, metrics = torch.tensor(found.owners), found.metrics
        if known is not None and known.name == _FOLDED and len(found.places) >= 2 * FOLD:
            folds = fold_metrics(found.images.whole(), found.encoded.whole(), owners, FOLD, score=encoder.match)
            metrics = metrics | {f"1k/{name}": value for name, value in folds.items()}
        return Found(metrics, len(found.places), rank_outcomes(found.ranks, owners), found.places)

    return Task(set_name="" if known is None else known.name, run=run, about={"texts": options.texts})


def _given(data: str) -> Samples:
    found = EvaluationData(data)
    found.check()
    return found.samples


def classification(options: Options, job: Job) -> Task:
    """Zero-shot classification, as the evaluator ``classification`` has it, with the names and templates of the set.

    Raises DataError.
    """
    data = find_class_data(options.data, wanted=options.set_name)
    templates = options.templates or data.templates or "simple"
    with _flags():
        names, said = data.names(options.class_names), load_templates(templates)
    if (told := repeated(names)) and rank() == 0:
        _log.warning("class names: %s", told)

    def run(encoder: Encoder, job: Job) -> Found:
        found = classify(encoder, data.samples, job, names=names, templates=said, label=options.label)
        outcomes = accuracy_outcomes(found.scores, torch.tensor(found.labels))
        return Found(found.metrics, len(found.places), outcomes, found.places)

    return Task(
        set_name=data.set_name, run=run, about={"classes": len(names), "templates": templates, "label": options.label}
    )


def knn(options: Options, job: Job) -> Task:
    """The nearest training pictures' labels, as the evaluator ``knn`` has it. Raises DataError."""
    scores = partial(knn_scores, k=options.k, temperature=options.temperature)
    return _trained(options, scores, {"k": options.k, "temperature": options.temperature})


def linear_probe(options: Options, job: Job) -> Task:
    """A linear classifier of frozen features (``linear_probe``). Raises DataError."""

    def scores(train: Sharded, labels: Tensor, test: Tensor, /, *, classes: int) -> Tensor:
        return fitted(train, labels, classes=classes)[0].scores(test)

    return _trained(options, scores, {})


def attentive_probe(options: Options, job: Job) -> Task:
    """A learned pooling of frozen patch tokens, and a linear classifier (``attentive_probe``). Raises DataError."""

    def read(encoder: Encoder, *given: Any, **named: Any) -> Labelled:
        device.append(encoder.device)
        return labelled_tokens(encoder, *given, **named)

    def scores(train: Sharded, labels: Tensor, test: Tensor, /, *, classes: int) -> Tensor:
        return scores_of(pooled(train.whole(), labels, classes=classes, device=device[-1])[0], test)

    device: list[torch.device] = []
    return _trained(options, scores, {}, read)


def _trained(
    options: Options, scores: Scores, about: Mapping[str, Any], read: Callable[..., Labelled] = labelled_features
) -> Task:
    """A task on what ``read`` gives, the tower's features before the projection: ``scores`` of test features from
    training features.
    """
    data = find_class_data(options.data, wanted=options.set_name)
    if options.train_data is not None:
        given = find_class_data(options.train_data)
        train = given.samples if given.train is None else given.train()  # of a folder that holds all splits
    elif data.train is not None:
        train = data.train()
    else:
        raise DataError(
            "--train-data: name the training samples, since no training split is known to belong to the data"
        )

    # two folders may number their classes differently; shards know nothing of their names
    by_name = options.label == "cls" and isinstance(data.samples, Folder) and isinstance(train, Folder)

    def label(sample: Sample) -> Hashable:
        return class_of(sample, "class_name" if by_name else options.label)

    def run(encoder: Encoder, job: Job) -> Found:
        name = f"{options.label} by name" if by_name else options.label
        known = read(encoder, train, replace(job, max_samples=options.max_train_samples), label, name=name)
        test = read(encoder, data.samples, job, label, name=name)
        ahead, labels = trained_ahead(known, test, scores)
        return Found(accuracy_of(ahead, labels), len(test.places), outcomes_of(ahead, labels), test.places)

    more = {"train_data": options.train_data, "max_train_samples": options.max_train_samples, "label": options.label}
    return Task(set_name=data.set_name, run=run, about={**about, **more})


def segmentation(options: Options, job: Job) -> Task:
    """Zero-shot segmentation by the protocol of the set, on its pictures and masks, or on shards with masks.

    Raises DataError.
    """
    if not isinstance(options.class_names, str | None):
        raise UserError("--class-names: segmentation takes a file")
    data = find_segmentation_data(options.data, wanted=options.set_name, names=options.class_names)
    if isinstance(data.samples, PictureFiles):
        data = replace(data, samples=data.samples.complete(job, "pictures or masks are not there"))
    names = [name for of_class in data.names for name in of_class]
    owners = torch.tensor([number for number, of_class in enumerate(data.names) for _ in of_class])
    with _flags():
        templates = load_templates(options.templates or "openai")

    def run(encoder: Encoder, job: Job) -> Found:
        spec = encoder.spec.image
        if not isinstance(encoder, ModelEncoder) or spec is None:
            raise UserError("this model has no dense inference, which segmentation needs")
        own = SegmentationProtocol(
            short_side=spec.image_size, window=spec.image_size, stride=max(1, spec.image_size // 2)
        )
        protocol = replace(data.protocol or own, csa=options.csa)
        vectors = class_vectors(encoder, names, templates, job)

        def counted(sample: Sample, picture: Tensor) -> Tensor:
            pixels, labels = (
                model_input(picture.to(encoder.device), protocol, spec),
                sample.extras["labels"].to(encoder.device),
            )
            found = segment(
                encoder, pixels, vectors, owners.to(encoder.device), labels.shape, protocol, spec.patch_size
            )
            return areas(found, labels, len(data.names))

        def compute(loaded: Sequence[Loaded]) -> tuple[Tensor, list[str]]:
            return torch.stack([counted(sample, picture) for _, sample, picture in loaded]), [
                one.sample.key for one in loaded
            ]

        few = replace(job, batch_size=min(job.batch_size, 16))  # whole pictures wait for their turn
        found, keys = sharded_features(
            data,
            lambda picture: picture,
            compute,
            few,
            name=f"segmentation {protocol} {names} {templates}",
            background=encoder.spec.background,
        )
        rows = found.whole()
        return Found(segmentation_metrics(rows.sum(0)), len(keys), segmentation_outcomes(rows), keys)

    return Task(set_name=data.set_name, run=run, about={"templates": options.templates or "openai", "csa": options.csa})


def _pairs(read: Callable[[Path, Job], PairSet]) -> Callable[[Options, Job], Task]:
    """The task of a set of examples that ``read`` finds in a folder. Raises DataError."""

    def task(options: Options, job: Job) -> Task:
        folder = picture_folder(options.data)
        if folder is None:
            raise DataError(f"data: {options.data} is no folder")
        data = read(folder, job).complete(job)

        def run(encoder: Encoder, job: Job) -> Found:
            pictures, _, keys = sharded_pictures(
                encoder, data.samples(), job, encoder.match_image, lambda sample: sample.key, name="match_image"
            )
            images = pictures.whole()
            usable = data.without(set(data.pictures) - set(keys))
            texts = list(dict.fromkeys(text for example in usable.examples for text in example.texts))
            encoded = text_features(encoder, texts, job, to_match=True)
            image_at, text_at = numbered(keys), numbered(texts)
            verdicts = [
                judge(
                    encoder.match(
                        images[[image_at[picture] for picture in example.pictures]].to(encoder.device),
                        encoded[[text_at[text] for text in example.texts]].to(encoder.device),
                    ).cpu()
                )
                for example in usable.examples
            ]
            told = (usable.name, usable.examples, verdicts)
            return Found(pair_metrics(*told), len(usable.examples), pair_outcomes(*told), usable.examples)

        return Task(set_name=data.name, run=run)

    return task


mmvp = _pairs(lambda folder, job: read_mmvp(folder))
sugarcrepe = _pairs(read_sugarcrepe)
aro = _pairs(read_aro)
winoground = _pairs(lambda folder, job: read_winoground(folder))

TASKS: Mapping[str, Callable[[Options, Job], Task]] = {name: globals()[name] for name in PURPOSES}


def check_model(task: str, encoder: Encoder) -> None:
    """Raise UserError where the model lacks a tower that the task needs."""
    needed: tuple[Modality, ...] = ("image",) if task in ON_FEATURES else ("image", "text")
    for modality in needed:
        if getattr(encoder.spec, modality) is None:
            raise UserError(f"this model has no {modality} tower, which {task} needs")
