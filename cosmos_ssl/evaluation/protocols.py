"""What a run's evaluators and ``cosmos-ssl eval`` do alike: retrieval, classification and labelled features of a set of
samples.

Shape letters: N pictures that could be used, M texts, C classes, W tower width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cosmos_ssl.api import DataError, Encoder, Sample
from cosmos_ssl.errors import listed
from cosmos_ssl.evaluation.classification import accuracy, accuracy_of, ahead_of, class_vectors
from cosmos_ssl.evaluation.features import Job, Loaded, digest, numbered, sharded_features, sharded_texts
from cosmos_ssl.evaluation.naming import spoken
from cosmos_ssl.evaluation.retrieval import rank_metrics, sharded_ranks
from cosmos_ssl.evaluation.samples import Samples, label_of, no_texts
from cosmos_ssl.evaluation.sharded import Sharded
from cosmos_ssl.functional import rank

_log = logging.getLogger("cosmos_ssl.evaluation")


def sharded_pictures(
    encoder: Encoder,
    data: Samples,
    job: Job,
    encode: Callable[[Tensor], Tensor],
    note: Callable[[Sample], Any],
    *,
    name: str,
) -> tuple[Sharded, list[int], list[Any]]:
    """Return what ``encode`` makes of all pictures that can be used, [N, ...] on the host of the rank that has computed
    it; the place of each in the data, and its ``note``. ``name`` tells what is encoded and noted. Raises DataError as
    ``sharded_features`` does.
    """

    def compute(loaded: Sequence[Loaded]) -> tuple[Tensor, list[Any]]:
        notes = [[one.place, note(one.sample)] for one in loaded]
        return encode(torch.stack([one.pixels for one in loaded])), notes

    background = encoder.spec.background
    rows, notes = sharded_features(data, encoder.preprocess, compute, job, name=name, background=background)
    return rows, [place for place, _ in notes], [noted for _, noted in notes]


class Scores(Protocol):
    """What learns to classify features."""

    def __call__(self, train: Sharded, labels: Tensor, test: Tensor, /, *, classes: int) -> Tensor:
        """Training features [N, W] with labels int64 [N], and other features [n, W] -> scores [n, C] of the latter.

        Called by all ranks, each with other features of its own.
        """
        ...


class Retrieved(NamedTuple):
    """Pictures and texts as ``Encoder.match`` takes them, on its device, and how well they find one another."""

    metrics: dict[str, float]
    images: Sharded
    encoded: Sharded
    texts: list[str]
    owners: list[int]
    """The picture of each text."""
    places: list[int]
    """Where each picture lies in the data."""
    ranks: tuple[Tensor, Tensor]
    """As ``retrieval_ranks`` has them, of all on every rank."""


def retrieve(encoder: Encoder, data: Samples, job: Job, *, texts: str = "txt") -> Retrieved:
    """Look for the captions ``texts`` of each sample, and for the picture of each caption; samples without one are left
    out.

    Raises DataError where these may not be missing, or where there are no others.
    """

    def compute(loaded: Sequence[Loaded]) -> tuple[Tensor | None, list[Any]]:
        pixels = [one.pixels for one in loaded if one.sample.captions.get(texts)]
        notes = [
            [n, sample.key, list(sample.captions.get(texts, ())), list(sample.captions)] for n, sample, _ in loaded
        ]
        return encoder.match_image(torch.stack(pixels)) if pixels else None, notes

    rows, notes = sharded_features(
        data, encoder.preprocess, compute, job, name=f"match_image {texts}", background=encoder.spec.background
    )
    told = [(place, own) for place, _, own, _ in notes if own]
    if not told:
        _, key, _, others = notes[0]
        raise no_texts(key, texts, others)
    job.leave_out([key for _, key, own, _ in notes if not own], len(notes), f"samples have no texts '{texts}'")
    found = [text for _, own in told for text in own]
    owners = [number for number, (_, own) in enumerate(told) for _ in own]
    images, encoded = rows.to(encoder.device), sharded_texts(encoder, found, job, to_match=True).to(encoder.device)
    ranks = sharded_ranks(images, encoded, torch.tensor(owners), score=encoder.match)
    return Retrieved(rank_metrics(ranks), images, encoded, found, owners, [place for place, _ in told], ranks)


class Classified(NamedTuple):
    """Cosines [N, C] of pictures and classes on the host, and how often the label has the greatest."""

    metrics: dict[str, float]
    scores: Tensor
    labels: list[int]
    places: list[int]
    """Where each picture lies in the data."""


def classify(
    encoder: Encoder, data: Samples, job: Job, *, names: Sequence[str], templates: Sequence[str], label: str = "cls"
) -> Classified:
    """Zero-shot classification among ``names``, of which a sample's label is one, or its number.

    Raises DataError for others.
    """
    numbers: dict[Hashable, int] = {name: number for number, name in reversed(list(enumerate(names)))}

    def number(sample: Sample) -> int:
        told = label_of(sample, label)
        found = numbers.get(told, told) if isinstance(told, Hashable) else told
        found = numbers.get(spoken(found), found) if isinstance(found, str) else found
        if not isinstance(found, int) or not 0 <= found < len(names):
            raise DataError(
                f"{label}: sample {sample.key} has the label '{told}', which is none of the {len(names)} class names"
            )
        return found

    distinct = list(dict.fromkeys(names))  # equal names have the very same score
    vectors = class_vectors(encoder, distinct, templates, job).cpu()
    rows, places, labels = sharded_pictures(
        encoder, data, job, encoder.encode_image, number, name=f"encode_image {label} {digest(list(names))}"
    )
    scores = rows.whole() @ vectors.T
    if len(distinct) < len(names):
        place = {name: number for number, name in enumerate(distinct)}
        scores = scores[:, [place[name] for name in names]]
    return Classified(accuracy(scores, torch.tensor(labels)), scores, labels, places)


class Labelled(NamedTuple):
    """The tower's features before the projection [N, W], on the encoder's device."""

    rows: Sharded
    labels: list[Hashable]
    places: list[int]
    """Where each picture lies in the data."""


def labelled_features(
    encoder: Encoder, data: Samples, job: Job, label: Callable[[Sample], Hashable], *, name: str
) -> Labelled:
    """Features of all samples and what ``label`` says of each; ``name`` tells one ``label`` from others.

    Raises DataError.
    """
    rows, places, labels = sharded_pictures(
        encoder, data, job, encoder.image_features, label, name=f"image_features {name}"
    )
    return Labelled(rows.to(encoder.device), labels, places)


def trained_accuracy(train: Labelled, test: Labelled, scores: Scores) -> dict[str, float]:
    """``accuracy`` on ``test`` of what ``scores`` learns from ``train``. Raises DataError (``trained_ahead``)."""
    return accuracy_of(*trained_ahead(train, test, scores))


def trained_ahead(train: Labelled, test: Labelled, scores: Scores) -> tuple[Tensor, Tensor]:
    """How many classes stand before the right one in what ``scores`` learns from ``train`` and says of ``test``, int64
    [N] on the host (``ahead_of``), and the labels int64 [N]: -1 for one that is not among those of ``train`` and cannot
    be found.

    Raises DataError where none of the labels is; that some are not is logged.
    """
    numbers = numbered(train.labels)
    wanted = list(dict.fromkeys(test.labels))
    strange = [label for label in wanted if label not in numbers]
    if strange:
        none, count = listed(map(repr, strange)), len(wanted) - len(strange)
        told = f"{count:,} of {len(wanted):,} labels are known: {none} are none of the training samples'"
        if len(strange) == len(wanted):
            raise DataError(f"{told}, which are {listed(map(repr, numbers))}")
        if rank() == 0:
            _log.warning("%s, and their samples cannot be found", told)
    known = torch.tensor([numbers[label] for label in train.labels], device=train.rows.own.device)
    labels = torch.tensor([numbers.get(label, -1) for label in test.labels])
    found = scores(train.rows, known, test.rows.own, classes=len(numbers)).cpu()
    ahead = ahead_of(found, labels[slice(*test.rows.bounds)])
    return Sharded(ahead, test.rows.ends).whole(), labels
