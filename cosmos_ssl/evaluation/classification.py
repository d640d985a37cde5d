"""Zero-shot classification: class vectors from names and templates, accuracy of pictures against them.

Shape letters: N pictures, C classes, D shared width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cosmos_ssl.api import Encoder, normalise
from cosmos_ssl.evaluation.features import Job, text_features

SIMPLE_TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of a {}.", "{}")
TEMPLATE_SETS = ("simple", "openai")
CLASS_FILES = ("classes.txt", "classnames.txt")
"""Files beside shards in which class names are sought, one a line (clip-benchmark's sets have the second)."""


def load_templates(templates: str | Sequence[str]) -> list[str]:
    """Templates with ``{}`` for the class name: the set ``simple``, OpenAI's 80 (``openai``), or those given.

    Raises ValueError for a set that is not known and a template without ``{}``.
    """
    if templates == "simple":
        return list(SIMPLE_TEMPLATES)
    if templates == "openai":
        from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES  # takes seconds

        return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    found = [templates] if isinstance(templates, str) else list(templates)
    wrong = [template for template in found if "{}" not in template]
    if wrong or not found:
        told = f"'{wrong[0]}' has no {{}} for the class name" if wrong else "none are given"
        raise ValueError(f"templates: {told}. Give templates such as 'a photo of a {{}}.', or one of: {', '.join(TEMPLATE_SETS)}")
    return found


def load_class_names(names: str | Sequence[str]) -> list[str]:
    """Class names in the order of their labels: ``imagenet``, a text file with one a line, or a list.

    Raises ValueError where the file cannot be read or there are fewer than two.
    """
    if names == "imagenet":
        from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

        return list(IMAGENET_CLASSNAMES)
    if isinstance(names, str):
        try:
            found = [line.strip() for line in Path(names).expanduser().read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"class_names: {names} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    else:
        found = list(names)
    if len(found) < 2:
        raise ValueError(f"class_names: {len(found)} given, at least 2 are needed")
    return found


def class_vectors(encoder: Encoder, names: Sequence[str], templates: Sequence[str], job: Job | None = None) -> Tensor:
    """The classifier [C, D]: normalised mean of the normalised features of every template (CLIP, section 3.1.4)."""
    return normalise(text_features(encoder, names, job or Job(), templates=templates)).to(encoder.device)


def accuracy(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """``top1``, ``top5`` and ``mean_per_class_top1`` of scores [N, C] against labels int64 [N], as shares.

    A label outside 0..C-1 is a class that cannot be found. Of equal scores the right one comes last.
    """
    known = (labels >= 0) & (labels < scores.shape[1])
    right = scores.gather(1, labels.clamp(0, scores.shape[1] - 1)[:, None])
    ahead = scores.shape[1] - 1 - (scores < right).sum(1)
    hit = known & (ahead < 1)
    classes = labels.unique()
    per_class = torch.stack([hit[labels == label].double().mean() for label in classes]).mean()
    return {
        "top1": hit.double().mean().item(),
        "top5": (known & (ahead < 5)).double().mean().item(),
        "mean_per_class_top1": per_class.item(),
    }
