"""Zero-shot classification: class vectors from names and templates, accuracy of pictures against them.

Shape letters: N pictures, C classes, D shared width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cosmos_ssl.api import Encoder, normalise
from cosmos_ssl.evaluation.bootstrap import Outcome
from cosmos_ssl.evaluation.features import Job, text_features
from cosmos_ssl.evaluation.text_files import read_text

SIMPLE_TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of a {}.", "{}")
_NOWHERE = 1 << 60
TEMPLATE_SETS = ("simple", "openai", "openclip_simple")


def load_templates(templates: str | Sequence[str]) -> list[str]:
    """Templates with ``{}`` for the class name: the set ``simple``, OpenAI's 80 (``openai``), OpenCLIP's seven
    (``openclip_simple``), or those given.

    Raises ValueError for a set that is not known and a template without ``{}``.
    """
    if templates == "simple":
        return list(SIMPLE_TEMPLATES)
    if templates in ("openai", "openclip_simple"):
        from open_clip import zero_shot_metadata as known  # takes seconds

        of_set = known.OPENAI_IMAGENET_TEMPLATES if templates == "openai" else known.SIMPLE_IMAGENET_TEMPLATES
        return [template("{}") for template in of_set]
    found = [templates] if isinstance(templates, str) else list(templates)
    wrong = [template for template in found if "{}" not in template]
    if wrong or not found:
        told = f"'{wrong[0]}' has no {{}} for the class name" if wrong else "none are given"
        raise ValueError(
            f"templates: {told}. Give templates such as 'a photo of a {{}}.', or one of: {', '.join(TEMPLATE_SETS)}"
        )
    return found


def load_class_names(names: str | Sequence[str]) -> list[str]:
    """Class names in the order of their labels: ``imagenet``, a text file with one a line, or a list.

    Raises ValueError where the file cannot be read or there are fewer than two.
    """
    if names == "imagenet":
        from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

        return list(IMAGENET_CLASSNAMES)
    if isinstance(names, str):
        found = [
            line.strip() for line in read_text(Path(names).expanduser(), "class_names").splitlines() if line.strip()
        ]
    else:
        found = list(names)
    if len(found) < 2:
        where = f"{names} holds {len(found)}" if isinstance(names, str) else f"{len(found)} given"
        raise ValueError(f"class_names: {where}, at least 2 are needed")
    return found


def class_vectors(encoder: Encoder, names: Sequence[str], templates: Sequence[str], job: Job | None = None) -> Tensor:
    """The classifier [C, D]: normalised mean of the normalised features of every template (CLIP, section 3.1.4)."""
    return normalise(text_features(encoder, names, job or Job(), templates=templates)).to(encoder.device)


def accuracy(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """``top1``, ``top5`` and ``mean_per_class_top1`` of scores [N, C] against labels int64 [N], as shares.

    A label outside 0..C-1 is a class that cannot be found. Classes stand in the order of a stable sort by falling
    score, as those of published figures do (``torch.topk``): of equal scores, such as those of equal names, the earlier
    class comes first. Among scores of minus infinity, which tell that a class was not found, the right one comes last.
    """
    return accuracy_of(ahead_of(scores, labels), labels)


def accuracy_of(ahead: Tensor, labels: Tensor) -> dict[str, float]:
    """The same of what ``ahead_of`` returns, int64 [N]."""
    hit = ahead < 1
    per_class = torch.stack([hit[labels == label].double().mean() for label in labels.unique()]).mean()
    return {
        "top1": hit.double().mean().item(),
        "top5": (ahead < 5).double().mean().item(),
        "mean_per_class_top1": per_class.item(),
    }


def accuracy_outcomes(scores: Tensor, labels: Tensor) -> dict[str, Outcome]:
    """The same as outcomes of the N pictures."""
    return outcomes_of(ahead_of(scores, labels), labels)


def outcomes_of(ahead: Tensor, labels: Tensor) -> dict[str, Outcome]:
    """The same of what ``ahead_of`` returns, int64 [N]."""
    units = torch.arange(len(labels))
    one, classes = torch.ones_like(units), labels.unique(return_inverse=True)[1]
    return {
        "top1": Outcome(units, ahead < 1, one),
        "top5": Outcome(units, ahead < 5, one),
        "mean_per_class_top1": Outcome(units, ahead < 1, one, classes),
    }


def ahead_of(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes stand before the right one, int64 [N]; all where it is none of them."""
    known = (labels >= 0) & (labels < scores.shape[1])
    place = labels.clamp(0, scores.shape[1] - 1)[:, None]
    right = scores.gather(1, place)
    later = torch.arange(scores.shape[1], device=scores.device) > place
    beaten = (scores < right) | ((scores == right) & later & (right > -torch.inf))
    ahead = scores.shape[1] - 1 - beaten.sum(1)
    return ahead.masked_fill(~known, _NOWHERE)
