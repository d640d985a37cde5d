"""Pictures and texts that differ in one thing: MMVP-VLM (arXiv 2401.06209), SugarCrepe (2306.14610), Winoground
(2204.03162), ARO's relations and attributes of Visual Genome (2210.01936).

An example has I pictures and two texts, of which text i belongs to picture i.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from cosmos_ssl.api import DataError
from cosmos_ssl.evaluation.bootstrap import Outcome
from cosmos_ssl.evaluation.features import Job, numbered
from cosmos_ssl.evaluation.picture_files import PictureFile, PictureFiles
from cosmos_ssl.evaluation.text_files import read_json, read_text

MMVP_PICTURES = "MLLM_VLM Images"
ARO = ("relation", "attribution")
_ARO_LEAST = 25
"""Pairs of attributes with fewer examples do not count, as in the authors' program."""
Box: TypeAlias = tuple[int, int, int, int]
SUGARCREPE = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


class Example(NamedTuple):
    """One example: its pictures (by path from the folder), its texts, and the group that it is counted in."""

    pictures: tuple[str, ...]
    texts: tuple[str, str]
    group: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSet:
    """Examples, and the different pictures of them as samples."""

    name: str
    folder: Path
    examples: Sequence[Example]
    boxes: Mapping[str, Box] = field(default_factory=dict)
    """Of pictures that are a part of one: ``FILE#...`` -> left, top, right, bottom."""

    @property
    def pictures(self) -> list[str]:
        """Each picture once, in order of appearance."""
        return list(dict.fromkeys(picture for example in self.examples for picture in example.pictures))

    def samples(self) -> PictureFiles:
        """The pictures to be encoded."""
        files = [
            PictureFile(picture, self.folder / (picture.partition("#")[0] if box else picture), box=box)
            for picture in self.pictures
            for box in [self.boxes.get(picture)]
        ]
        return PictureFiles(name=self.name, files=files)

    def complete(self, job: Job) -> PairSet:
        """The set without examples whose pictures are not there.

        Raises DataError for these unless they may be missing.
        """
        there = self.samples().complete(job, f"pictures are not in {self.folder}")
        return self.without(set(self.pictures) - {file.key for file in there.files})

    def without(self, missing: set[str]) -> PairSet:
        """The examples that have none of these pictures. Raises DataError where none is left."""
        left = [example for example in self.examples if not missing.intersection(example.pictures)]
        if not left:
            raise DataError(f"data: not one example in {self.folder} can be used")
        return replace(self, examples=left)


def read_mmvp(folder: Path) -> PairSet:
    """MMVP-VLM: ``Questions.csv`` (number, category, statement; two a pair), ``MLLM_VLM Images/CATEGORY/N.jpg``."""
    path = folder / "Questions.csv"
    try:
        rows = list(csv.reader(io.StringIO(read_text(path), newline="")))[1:]
    except csv.Error as error:
        raise DataError(f"data: {path} is not MMVP-VLM's form: {error}") from error
    rows = [row for row in rows if any(row)]
    wrong = next((number for number, row in enumerate(rows, 2) if len(row) != 3), None)
    if wrong is not None or len(rows) % 2 or not rows:
        raise DataError(
            f"data: {path} is not MMVP-VLM's form: "
            f"{f'line {wrong}' if wrong else f'{len(rows)} statements are no pairs'}"
        )
    examples = [
        Example(
            pictures=tuple(f"{category}/{number.strip()}.jpg" for number in (first[0], second[0])),
            texts=(f"a photo of {first[2]}", f"a photo of {second[2]}"),
            group=category,
        )
        for first, second in zip(rows[::2], rows[1::2], strict=True)
        for category in [first[1].strip()]
    ]
    return PairSet(name="mmvp", folder=folder / MMVP_PICTURES, examples=examples)


def read_sugarcrepe(folder: Path, job: Job) -> PairSet:
    """SugarCrepe: its seven ``add_att.json`` ... (or below ``data/``), and COCO's ``val2017/`` beside them."""
    top = folder / "data" if (folder / "data" / f"{SUGARCREPE[0]}.json").is_file() else folder
    job.leave_out(
        [f"{name}.json" for name in SUGARCREPE if not (top / f"{name}.json").is_file()],
        len(SUGARCREPE),
        f"files are not in {top}",
    )
    examples = []
    for name in SUGARCREPE:
        if (top / f"{name}.json").is_file():
            examples += [
                Example((picture,), (right, wrong), name) for picture, right, wrong in _sugarcrepe(top / f"{name}.json")
            ]
    return PairSet(name="sugarcrepe", folder=folder / "val2017", examples=examples)


def _sugarcrepe(path: Path) -> list[tuple[str, str, str]]:
    try:
        return [
            (str(row["filename"]), str(row["caption"]), str(row["negative_caption"]))
            for row in read_json(path).values()
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"data: {path} is not SugarCrepe's form: {type(error).__name__} {error}") from error


def read_winoground(folder: Path) -> PairSet:
    """Winoground: ``examples.jsonl`` and ``images/NAME.png`` (or both below ``data/``)."""
    top = folder / "data" if (folder / "data" / "examples.jsonl").is_file() else folder
    path = top / "examples.jsonl"
    try:
        rows = [json.loads(line) for line in read_text(path).splitlines() if line.strip()]
        examples = [
            Example(
                (f"{row['image_0']}.png", f"{row['image_1']}.png"), (str(row["caption_0"]), str(row["caption_1"])), ""
            )
            for row in rows
        ]
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"data: {path} is not Winoground's form: {type(error).__name__} {error}") from error
    return PairSet(name="winoground", folder=top / "images", examples=examples)


def read_aro(folder: Path, job: Job) -> PairSet:
    """ARO's ``visual_genome_relation.json`` and ``visual_genome_attribution.json``, and ``images/`` beside them.

    An example is the part of a picture in a box, and a text with its false twin.
    """
    kinds = {kind: folder / f"visual_genome_{kind}.json" for kind in ARO}
    job.leave_out([path.name for path in kinds.values() if not path.is_file()], len(ARO), f"files are not in {folder}")
    examples, boxes = [], {}
    for kind, path in kinds.items():
        try:
            for row in read_json(path) if path.is_file() else ():
                x, y, width, height = (int(row[f"bbox_{side}"]) for side in "xywh")
                picture = f"{row['image_path']}#{x},{y},{width},{height}"
                boxes[picture] = (x, y, x + width, y + height)
                group = row["relation_name"] if kind == "relation" else "_".join(row["attributes"][:2])
                texts = (str(row["true_caption"]), str(row["false_caption"]))
                examples.append(Example((picture,), texts, f"{kind}/{group}"))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"data: {path} is not ARO's form: {type(error).__name__} {error}") from error
    return PairSet(name="aro", folder=folder / "images", examples=examples, boxes=boxes)


class Verdict(NamedTuple):
    """What was matched rightly in one example; equal scores are wrong."""

    text: bool
    """Every picture has its own text above the other."""
    image: bool
    """Every text (of a picture that is there) has its own picture above the other."""


def judge(scores: Tensor) -> Verdict:
    """Of the scores [I, 2] of an example's pictures and texts."""
    count = len(scores)
    own = scores.diagonal()
    others = ~torch.eye(count, 2, dtype=torch.bool)
    text = all(bool((own[i] > scores[i][others[i]]).all()) for i in range(count))
    image = all(bool((own[i] > scores[:, i][others[:, i]]).all()) for i in range(count))
    return Verdict(text, image)


def pair_outcomes(name: str, examples: Sequence[Example], verdicts: Sequence[Verdict]) -> dict[str, Outcome]:
    """What ``pair_metrics`` counts, as outcomes of the examples; ``accuracy`` of all groups alone."""
    units = torch.arange(len(examples))
    if name == "winoground":
        right = {"text_score": [v.text for v in verdicts], "image_score": [v.image for v in verdicts]}
        right["group_score"] = [v.text and v.image for v in verdicts]
        return {
            metric: Outcome(units, torch.tensor(values), torch.ones_like(units)) for metric, values in right.items()
        }
    hits = torch.tensor([v.image if name == "mmvp" else v.text for v in verdicts])
    parts = _aro_parts(examples) if name == "aro" else {"": list(range(len(examples)))}
    outcomes = {}
    for part, places in parts.items():
        groups = numbered([examples[n].group for n in places])
        owners = torch.tensor([groups[examples[n].group] for n in places])
        one = Outcome(units[places], hits[places], torch.ones_like(owners), owners)
        outcomes[f"accuracy/{part}".rstrip("/")] = one
    return outcomes


def _aro_parts(examples: Sequence[Example]) -> dict[str, list[int]]:
    """Where the examples of each kind lie; of pairs of attributes those that are there often enough, if any is."""
    counts = Counter(example.group for example in examples)
    found = {}
    for kind in dict.fromkeys(example.group.partition("/")[0] for example in examples):
        places = [n for n, example in enumerate(examples) if example.group.startswith(f"{kind}/")]
        often = [n for n in places if kind == "relation" or counts[examples[n].group] >= _ARO_LEAST]
        found[kind] = often or places
    return found


def pair_metrics(name: str, examples: Sequence[Example], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The set's own numbers, as shares: Winoground's text, image and group scores; elsewhere ``accuracy`` and that of
    each group; ARO's of its two kinds, each the mean over relations or pairs of attributes.

    ``accuracy`` is the mean over groups. MMVP-VLM asks which picture belongs to a text (of both), SugarCrepe which text
    to a picture.
    """
    if name in ("winoground", "aro"):
        once = torch.ones(1, len(examples))
        return {metric: one.of(once).item() for metric, one in pair_outcomes(name, examples, verdicts).items()}
    groups: dict[str, list[bool]] = {}
    for example, verdict in zip(examples, verdicts, strict=True):
        groups.setdefault(example.group, []).append(verdict.image if name == "mmvp" else verdict.text)
    shares = {group: sum(values) / len(values) for group, values in groups.items()}
    return {
        "accuracy": sum(shares.values()) / len(shares),
        **{f"accuracy/{group}": share for group, share in shares.items()},
    }
