"""The small model, batch and run that ``cosmos_ssl.testing`` checks parts with.

Shape letters as in ``cosmos_ssl.api.views``.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from cosmos_ssl import registry
from cosmos_ssl.api import (
    ALL,
    Augmenter,
    Features,
    GroupFeatures,
    HeadOutput,
    Hidden,
    ImageGroup,
    Loss,
    LossOutput,
    Modality,
    Need,
    Progress,
    Role,
    Sample,
    Spec,
    StepContext,
    TextGroup,
    Tokenizer,
    TowerSpec,
    Views,
    ViewSpec,
)
from cosmos_ssl.api.views import map_tensors
from cosmos_ssl.build import Builder
from cosmos_ssl.config import LoadedConfig, load_config, part_paths
from cosmos_ssl.config.loading import NAMED_BY_TYPE
from cosmos_ssl.config.source import from_plain, merge
from cosmos_ssl.engine.assembly import Assembly
from cosmos_ssl.errors import PluginError

SAMPLES = 6
PROGRESS = Progress(step=3, total_steps=10, steps_per_epoch=5)


def example_spec(**changes: Any) -> Spec:
    """The spec of a small model of both towers: groups ``global`` (with masks) and ``local`` of images and of texts, a
    head ``cross``.

    ``changes`` are fields of ``Spec``.
    """
    spec = Spec(
        embed_dim=32,
        batch_size=SAMPLES,
        steps_per_epoch=5,
        epochs=2,
        has_teacher=True,
        context_length=12,
        vocab_size=260,
        image=TowerSpec(width=32, image_size=32, patch_size=8),
        text=TowerSpec(width=24, vocab_size=260),
        image_views={"global": ViewSpec(views=2, size=32, masks=True), "local": ViewSpec(views=2, size=16)},
        text_views={"global": ViewSpec(views=2, masks=True), "local": ViewSpec(views=2)},
        heads={"cross": {"image": 32, "text": 32}},
    )
    return replace(spec, **changes)


def example_views(spec: Spec | None = None, *, samples: int = SAMPLES, seed: int = 0) -> Views:
    """A batch of random views as losses and heads see them, of every group that ``spec`` (default: ``example_spec()``)
    offers.

    Pixels are float [V, B, 3, H, W]; masks hide no patch, some or half of them; texts have 2 tokens to all of the
    context, of which masks hide a third.
    """
    spec = spec or example_spec()
    draw = torch.Generator().manual_seed(seed)
    patch = spec.image.patch_size if spec.image is not None else 1

    def image(group: ViewSpec) -> ImageGroup:
        size = group.size or 32
        pixels = torch.randn(group.views, samples, 3, size, size, generator=draw)
        share = torch.rand(group.views, samples, 1, generator=draw) / 2
        share[:, ::3] = 0  # methods with masks leave some samples whole
        masks = torch.rand(group.views, samples, (size // max(1, patch)) ** 2, generator=draw) < share
        masks[:, 1::3, 0] = True
        return ImageGroup(
            pixels=pixels, params=torch.zeros(group.views, samples, 0), masks=masks if group.masks else None
        )

    def text(group: ViewSpec) -> TextGroup:
        lengths = torch.randint(2, spec.context_length + 1, (group.views, samples), generator=draw)
        tokens = torch.randint(1, spec.vocab_size, (group.views, samples, spec.context_length), generator=draw)
        pads = torch.arange(spec.context_length) >= lengths[..., None]
        masks = (tokens % 3 == 0) & ~pads if group.masks else None
        return TextGroup(tokens=tokens.masked_fill(pads, 0), lengths=lengths, masks=masks)

    return Views(
        keys=[f"sample{i}" for i in range(samples)],
        image={name: image(group) for name, group in spec.image_views.items()},
        text={name: text(group) for name, group in spec.text_views.items()},
    )


def example_samples(count: int = 4) -> list[Sample]:
    """Samples as a data set holds them: noisy JPEG pictures, wide, tall and small, with a few captions and a label
    each.
    """
    from PIL import Image

    draw = np.random.default_rng(0)
    samples = []
    for i in range(count):
        width, height = [(80, 60), (48, 96), (20, 24), (64, 64)][i % 4]
        coarse = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG")
        captions = {
            "raw_caption": [f"Picture {i} of a test."],
            "short": ["A dog.", "Two cats sit.", "It rains.", "Red and blue.", "Noise."],
        }
        samples.append(Sample(key=f"sample{i}", image=file.getvalue(), captions=captions, extras={"label": i}))
    return samples


def example_features(
    needs: Sequence[Need],
    spec: Spec | None = None,
    *,
    views: Views | None = None,
    role: Role = "student",
    seed: int = 0,
) -> Features:
    """Random features of ``views`` (default: ``example_views(spec)``) that hold what ``needs`` ask of ``role``, and
    nothing else.

    Every view of a group is there; all tensors are leaves that take gradients. Outputs of heads are [2, B, width]. What
    a need has ``hidden``, a student's loss finds by ``Features.of``.
    """
    spec = spec or example_spec()
    views = views or example_views(spec)
    draw = torch.Generator().manual_seed(seed)
    needs = [need for need in needs if need.role == role and need.kind != "views"]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).requires_grad_()

    def features(modality: Modality, name: str, hidden: Hidden = False) -> GroupFeatures | None:
        asked = [need for need in needs if need.modality == modality and need.group in (ALL, name)]
        kinds = {need.kind for need in asked if hidden == ((role == "student" and need.hidden) or False)}
        tower = spec.image if modality == "image" else spec.text
        if not kinds or tower is None:
            return None
        group = views.of(modality)[name]
        (count, samples), every = group.shape, tuple(range(group.shape[0]))
        places = (
            (group.pixels.shape[-1] // tower.patch_size) ** 2 if isinstance(group, ImageGroup) else spec.context_length
        )
        masked = 0 if group.masks is None else int(group.masks.sum())
        return GroupFeatures(
            views=every,
            pooled=random(count, samples, tower.width),
            projected=random(count, samples, spec.embed_dim) if "projected" in kinds else None,
            tokens=random(count, samples, places, tower.width) if "tokens" in kinds else None,
            token_views=every if "tokens" in kinds else (),
            masked_tokens=random(masked, tower.width) if "masked_tokens" in kinds else None,
        )

    image = {name: found for name in views.image if (found := features("image", name)) is not None}
    text = {name: found for name in views.text if (found := features("text", name)) is not None}
    forms: dict[tuple[Modality, Hidden], dict[str, GroupFeatures]] = {}
    for need in needs:
        if need.modality is not None and need.hidden:
            key = (need.modality, need.hidden)
            made = {name: x for name in views.of(need.modality) if (x := features(need.modality, name, need.hidden))}
            forms.setdefault(key, made)
    heads: dict[str, dict[str, Tensor]] = {}
    for need in needs:
        widths = spec.heads[need.head] if need.head is not None else {}
        given = {name: random(2, len(views), widths[name]) for name in need.outputs or widths}
        if need.head is not None:
            heads[need.head] = {**given, **heads.get(need.head, {})}
    return Features(image=image, text=text, heads=heads, forms=forms if role == "student" else {})


def example_context(loss: Loss, spec: Spec | None = None, *, views: Views | None = None, seed: int = 0) -> StepContext:
    """Return what ``loss`` reads in one step of one process, random: for tests that compare its values with a plain
    formula.
    """
    needs = loss.requires()
    student = example_features(needs, spec, views=views, seed=seed)
    teacher = example_features(needs, spec, views=views, role="teacher", seed=seed + 1)
    given: dict[Role, Features] = {"student": student, "teacher": map_tensors(teacher, Tensor.detach)}

    def no_head(name: str, *args: Any, **kwargs: Any) -> HeadOutput:
        raise NotImplementedError(f"there is no head '{name}' to call: replace ctx.head by one of your own")

    return StepContext(
        views=views or example_views(spec),
        student=student,
        teacher=given["teacher"],
        gathered=given,  # one process: what is gathered is what is there
        progress=PROGRESS,
        head=no_head,
    )


# ---------------------------------------------------------------------------- the parts around the one under test


class ExampleCrops(Augmenter):
    """Stands for the image augmenter of a model whose views ``example_views`` draws."""

    modality: ClassVar[Modality] = "image"

    def __init__(self, spec: Spec) -> None:
        """No options."""

    def offers(self) -> Mapping[str, ViewSpec]:
        """``global`` with masks, and ``local``."""
        return example_spec().image_views

    def crop(self, sample: Sample, rng: np.random.Generator) -> Mapping[str, Any]:
        """Never called."""
        raise NotImplementedError("example_views draws these views")


class ExampleTexts(ExampleCrops):
    """Stands for the text augmenter."""

    modality: ClassVar[Modality] = "text"

    def offers(self) -> Mapping[str, ViewSpec]:
        """``global`` with masks, and ``local``."""
        return example_spec().text_views

    def mask(self, name: str, tokens: Tensor, lengths: Tensor, rng: np.random.Generator) -> Tensor:
        """Every third id is hidden."""
        return tokens % 3 == 0


class ExampleTokenizer(Tokenizer):
    """One token a byte, 1 before and 2 after them, 0 for pads."""

    def __init__(self, spec: Spec) -> None:
        """No options."""
        self.vocab_size, self.context_length, self.pad_id = 260, 12, 0

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids int64 [n, 12] and lengths int64 [n]."""
        rows = [[1, *(byte + 3 for byte in text.encode()[:10]), 2] for text in texts]
        ids = torch.tensor([row + [0] * (12 - len(row)) for row in rows], dtype=torch.int64).view(-1, 12)
        return ids, self.lengths(ids)


class ReadsNeeds(Loss):
    """Means of all that a part gives, in fixed random directions, so that every gradient is one of a kind."""

    def __init__(self, spec: Spec) -> None:
        """No options."""
        super().__init__()

    needs: ClassVar[Sequence[Need]] = ()

    def requires(self) -> Sequence[Need]:
        """The needs of the class."""
        return self.needs

    def forward(self, ctx: StepContext) -> LossOutput:
        """One term a tensor that was asked of the student, a metric where it takes no gradient; what is asked of the
        teacher is there to be computed.
        """
        found: dict[str, Tensor] = {}
        for need in self.needs:
            if need.role == "teacher" or need.kind == "views":
                continue
            if need.head is not None:
                found |= {f"{need.head}_{name}": x for name, x in ctx.student.heads[need.head].items()}
            elif need.modality is not None:
                groups = ctx.student.of(need.modality, hidden=need.hidden).items()
                asked = {name: group for name, group in groups if need.group in (ALL, name)}
                form = "" if need.hidden is None else f"_{need.hidden}"
                found |= {
                    f"{need.modality}_{name}_{need.kind}{form}": getattr(x, need.kind) for name, x in asked.items()
                }
        trained = {name: directed(x) for name, x in found.items() if x.requires_grad}
        return LossOutput(
            terms=trained, metrics={name: directed(x) for name, x in found.items() if name not in trained}
        )


def directed(x: Tensor) -> Tensor:
    """The mean of ``x`` in a random direction that its shape decides, float32."""
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(x.numel()))
    return (x.float() * direction.to(x.device)).mean()


def reader(*needs: Need) -> type[Loss]:
    """A loss that reads these needs."""
    return type(
        "Reads", (ReadsNeeds,), {"needs": needs, "__module__": __name__, "__qualname__": f"Reads{abs(hash(needs))}"}
    )


# ---------------------------------------------------------------------------- model and run


def example_config(*changes: Mapping[str, Any] | None) -> LoadedConfig:
    """The config of the small model behind ``example_spec``, with ``changes`` merged over it (a ``type`` may be a
    class).
    """
    tree: dict[str, Any] = {
        "name": "example",
        "model": {
            "embed_dim": 32,
            "image": {
                "type": "clip_vit",
                "width": 32,
                "heads": 2,
                "layers": 1,
                "patch_size": 8,
                "image_size": 32,
                "mask_token": True,
            },
            "text": {"type": "clip_text", "width": 24, "heads": 2, "layers": 1, "mask_token": True},
        },
        "tokenizer": {"type": ExampleTokenizer},
        "augmenters": {"image": {"type": ExampleCrops}, "text": {"type": ExampleTexts}},
        "heads": {"cross": {"type": "cross_attention", "num_heads": 4}},
        "losses": {"clip": {"type": "clip"}},
        "teacher": {"type": "ema", "momentum_teacher": 0.9},
        "training": {"batch_size": SAMPLES, "precision": "fp32", "device": "cpu"},
    }
    return load_config(_merged(tree, *changes))


def example_assembly(loaded: LoadedConfig, *, meta: bool = False) -> Assembly:
    """The parts of a config, wired; no data set."""
    return Builder(loaded).assemble("check" if meta else "measure")


def small_config(folder: str, steps: int, changes: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The quickstart on towers of one layer and 8 pictures of 32 pixels, one batch, with all that it writes inside
    ``folder``.
    """
    tree: dict[str, Any] = {
        "extends": "quickstart",
        "name": "small",
        "output_dir": f"{folder}/run",
        "model": {
            "embed_dim": 32,
            "image": {"type": "clip_vit", "width": 64, "layers": 1, "patch_size": 8, "image_size": 32},
            "text": {"type": "clip_text", "width": 64, "heads": 2, "layers": 1},
        },
        "augmenters": {
            "image": {"type": "multi_crop", "global_crops_size": 32, "local_crops_size": 16, "local_crops_number": 1},
            "text": {"type": "text_crop", "num_sampled_captions": 3},
        },
        "data": {
            "type": "scenes",
            "train_samples": 8,
            "validation_samples": 8,
            "image_size": 32,
            "folder": f"{folder}/scenes",
        },
        "loader": {"workers": 0},
        "optimizer": {"lr": 2e-3},
        "schedule": {"epochs": steps, "warmup_steps": 1},
        "training": {"batch_size": 8, "device": "cpu"},
        "evaluators": None,
        "logging": {"every_steps": 1, "tensorboard": False},
    }
    return _merged(tree, changes)


def unshadowed(group: str, name: str) -> str:
    """Return the name of the component that the tests of a package mean by ``name``.

    In a config, a name without a package means cosmos-ssl's own component if there is one. Here it means the other
    package's, so that a new version of cosmos-ssl with a component of that name does not change what a test tests. A
    warning names both.

    Raises:
        PluginError: If several other packages offer the name.
    """
    records = [record for record in registry.records() if (record.group, record.name) == (group, name)]
    others = [record for record in records if not record.own]
    own = next((record for record in records if record.own), None)
    if own is None or not others:
        return name
    qualified = " or ".join(f"'{record.qualified}'" for record in others)
    if len(others) > 1:
        sources = " and ".join(record.source for record in records)
        raise PluginError(f"{group}/{name} is offered by {sources}. Write {qualified}")
    warnings.warn(
        f"{group}/{name} is offered by {others[0].source} and {own.source}. The one of {others[0].distribution} is "
        f"tested. In a config the name means the one of {own.distribution}. Write {qualified}",
        stacklevel=2,
    )
    return others[0].qualified


def _merged(tree: Mapping[str, Any], *changes: Mapping[str, Any] | None) -> dict[str, Any]:
    """Mappings merged by key; a part of another ``type`` replaces the one before it."""
    root = from_plain(tree, "example")
    for change in changes:
        named = from_plain(change or {}, "config").plain()
        for path, group, keys in part_paths(named):
            section, _, key = path.rpartition(".")
            name = keys.get("type", key if section in NAMED_BY_TYPE else None)
            if isinstance(name, str) and (meant := unshadowed(group, name)) != name:
                cast(dict[str, Any], keys)["type"] = meant
        root = merge(root, from_plain(named, "config"))
    plain: dict[str, Any] = root.plain()
    return plain
