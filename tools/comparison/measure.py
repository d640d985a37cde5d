"""One run of a comparison, in a process of its own: train it, then measure what its student and teacher can do.

On scenes, in per cent, of validation scenes that no run trains on:

- retrieval: R@1 and R@5 of the scene's caption among those of all validation scenes, and of the picture among all.
- classification: which of the 24 classes (colour and shape) the large object is, zero-shot, by the text "a large NAME".
- segmentation: zero-shot mIoU over the 24 classes of the pixels of objects, by SCLIP's protocol with one window and "a
  NAME".
- similarity peak: how often the patch most similar to the text "a NAME" lies on that object, over all objects of all
  scenes. It needs no head, so it compares all methods.
- attention peak: how often the patch that COSMOS's cross-attention head looks at most for that text lies on that
  object; and how often it does if the text names all objects of the scene but that one. Other methods have none.

A patch lies on an object if the exact mask has a pixel of it there; the line ``any patch`` says how often that is by
chance. On other data retrieval alone is measured, with the mean ranks.
"""

from __future__ import annotations

import io
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comparison.plan import FIGURES, RANKS, RESULT, ROLES

if TYPE_CHECKING:
    from torch import Tensor

    from cosmos_ssl.api import Role


def train_and_evaluate(recipe: str, folder: Path, overrides: Sequence[str]) -> None:
    """Train and write the figures of student and teacher, unless that is done."""
    import cosmos_ssl

    cosmos_ssl.train(f"compare/{recipe}.yaml", [f"output_dir={folder}", *overrides])
    result = folder / RESULT
    if result.exists():
        return
    figures = {f"{role}/{name}": value for role in ROLES for name, value in evaluate(folder, role).items()}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figures["speed"] = statistics.median(row["samples_per_second"] for row in rows if "samples_per_second" in row)
    part = result.with_suffix(".part")
    part.write_text(json.dumps(figures, indent=1) + "\n")
    part.replace(result)


def evaluate(folder: Path, role: Role) -> dict[str, float]:
    """The figures of one role: shares in per cent, and ranks."""
    import cosmos_ssl
    from cosmos_ssl.build import Builder
    from cosmos_ssl.config import load_config
    from cosmos_ssl.evaluation.features import Job
    from cosmos_ssl.evaluation.tasks import TASKS, Options

    loaded = load_config(folder / "config.yaml")
    data = loaded.config.evaluators["retrieval"].options.get("data") or Builder(loaded).held_out()
    assert loaded.config.data is not None and data is not None
    scenes = loaded.config.data.type == "scenes"
    templates = {"retrieval": None, "classification": ["a large {}"], "segmentation": ["a {}"]}
    encoder = cosmos_ssl.load(folder, which=role)
    found: dict[str, float] = {}
    for task in templates if scenes else ("retrieval",):
        found |= TASKS[task](Options(data=data, templates=templates[task]), Job()).run(encoder, Job()).metrics
    if scenes:
        found |= peaks(encoder, data)
    shares = {name: 100 * found[name] for name in FIGURES if name in found}
    return shares | {name: found[name] for name in RANKS}


def peaks(encoder: Any, data: str) -> dict[str, float]:
    """Find where similarity and attention peak, over all objects of all scenes of the shards ``data``."""
    import torch

    from cosmos_ssl.data.scenes import CLASS_NAMES
    from cosmos_ssl.evaluation.attention_maps import patch_scores
    from cosmos_ssl.evaluation.classification import class_vectors

    vectors = class_vectors(encoder, CLASS_NAMES, ["a {}"])
    found: dict[str, list[Tensor]] = defaultdict(list)
    for pixels, pictures, classes, on in scene_objects(encoder, data):

        def hits(scores: Tensor, on: Tensor = on) -> Tensor:
            """Return whether the best patch of each row [M, N] lies on the row's object."""
            return on.gather(1, scores.argmax(1, keepdim=True))[:, 0].float()

        found["any_patch"].append(on.float().mean(1))
        found["similarity_peak"].append(hits(patch_scores(encoder, pixels, vectors)[pictures, classes].flatten(1)))
        others = [
            classes[(pictures == picture) & (classes != own)] for picture, own in zip(pictures, classes, strict=True)
        ]
        for name, named in {"attention_peak": classes[:, None], "attention_peak_left_out": others}.items():
            texts = encoder.tokenize(
                [" and ".join(f"a {CLASS_NAMES[number]}" for number in row.tolist()) for row in named]
            )
            if (weights := encoder.cross_attention(pixels[pictures], texts)) is not None:
                found[name].append(hits(weights["text"]))
    return {name: torch.cat(values).mean().item() for name, values in found.items()}


def scene_objects(encoder: Any, data: str, batch_size: int = 128) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Pictures [B, 3, H, W]; of each of their objects: its picture [M], its class [M], which patches lie on it, bool
    [M, N].
    """
    import numpy as np
    import torch
    from PIL import Image
    from torch.nn import functional as F

    from cosmos_ssl.data import open_shards

    shards, patch = open_shards(data), encoder.spec.image.patch_size
    for start in range(0, len(shards), batch_size):
        samples = [shards.read(index) for index in range(start, min(start + batch_size, len(shards)))]
        masks = torch.from_numpy(
            np.stack([np.array(Image.open(io.BytesIO(sample.extras["mask.png"]))) for sample in samples])
        ).long()
        pairs = [
            (picture, value - 1) for picture, mask in enumerate(masks) for value in mask.unique().tolist() if value
        ]
        pictures, classes = (torch.tensor(column) for column in zip(*pairs, strict=True))
        on = F.max_pool2d((masks[pictures] == classes[:, None, None] + 1).float(), patch).flatten(1).bool()
        yield torch.stack([encoder.preprocess(sample.decode()) for sample in samples]), pictures, classes, on
