"""The checks of parts by their kind, and a short training."""

from __future__ import annotations

import json
import math
import pickle
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

import cosmos_ssl
from cosmos_ssl import registry
from cosmos_ssl.api import (
    Augmenter,
    BadSample,
    Callback,
    CropGroup,
    Head,
    ImageCrops,
    Loss,
    Need,
    Optimizer,
    RunInfo,
    Sample,
    Schedule,
    Teacher,
    Tower,
    Writer,
)
from cosmos_ssl.api.views import map_tensors
from cosmos_ssl.data.collate import Collator, checked_crops
from cosmos_ssl.engine.metrics import read_rows
from cosmos_ssl.errors import CosmosError
from cosmos_ssl.models.contract import blaming, checked_pixels, untouched
from cosmos_ssl.testing.callbacks import check_hooks
from cosmos_ssl.testing.examples import (
    PROGRESS,
    example_assembly,
    example_config,
    example_samples,
    example_spec,
    reader,
    small_config,
    unshadowed,
)
from cosmos_ssl.testing.model import ModelCheck, expect
from cosmos_ssl.testing.moving import hold_optimizer, hold_schedule
from cosmos_ssl.testing.ranks import check_ranks

PART = "part"
"""What the part under test is called in the config of a check."""


def small_run(folder: Path | str, config: Mapping[str, Any] | None = None, *, steps: int = 4) -> list[dict[str, float]]:
    """Train a small COSMOS on 8 pictures of ``scenes`` for some steps, in seconds; the rows of its ``metrics.jsonl``,
    one a step.

    ``config`` is merged over that of the run: add a loss or a head, put another teacher or augmenter in the place of
    its own; a ``type`` may be a class. All that is written lies in ``folder``, one run a folder. Raises as ``train``.
    """
    cosmos_ssl.train(small_config(str(folder), steps, config))
    return [row for row in read_rows(Path(folder) / "run" / "metrics.jsonl") if "loss" in row]


def check_options(group: str, part: str | type[Any]) -> None:
    """Every option of a part has a type that a config can hold, a default of that type and a line in the docs."""
    with _checking(group, part):
        pass


def check_loss(
    part: str | type[Loss], /, *, around: Mapping[str, Any] | None = None, ranks: int = 1, **options: Any
) -> None:
    """Hold a loss to the contract, with these options.

    ``around`` is merged over ``example_config``: other heads to read (``{"heads": {"mine": {"type": ...}}}``), other
    views. The loss must be made of documented options, ask only for what there is, and return named finite scalars, the
    same ones for the same batch and state, in bfloat16 too; gradients must reach all that it asks for; what it moves
    must be buffers, so that a step can be undone; and another copy with its state must go on as it does. With ``ranks``
    (2 or 3) so many processes that share the batch must find the same loss and gradients as one, and the same buffers
    on every rank.
    """
    with _checking("losses", part):
        check = ModelCheck({"losses": {"clip": None, PART: {"type": part, **options}}}, around)
        check.run(f"losses.{PART}")
        if ranks != 1:
            check_ranks(check, f"losses.{PART}", ranks)


def check_head(part: str | type[Head], /, *, around: Mapping[str, Any] | None = None, **options: Any) -> None:
    """Hold a head to the contract, with these options; ``around`` as of ``check_loss``.

    As a loss, and: each output has its width and is the same when asked for alone (unless samples mix); ``unread``
    names exactly the parameters that an output does not reach; a sample's output depends on no other sample unless
    ``mixes_samples``.
    """
    with _checking("heads", part):
        needs = [Need(head=PART), Need(head=PART, role="teacher")]

        def reading(*more: Need) -> ModelCheck:
            heads, losses = {PART: {"type": part, **options}}, {"clip": None, "reads": {"type": reader(*needs, *more)}}
            return ModelCheck({"heads": heads, "losses": losses}, around)

        check = reading()
        if rest := check.needs_without_gradient(PART):  # what such an output reads is trained by way of another reader
            check = reading(*rest)
        check.run(f"heads.{PART}")
        check.head(PART)


def check_tower(part: str | type[Tower], /, *, around: Mapping[str, Any] | None = None, **options: Any) -> None:
    """Hold a tower to the contract, with these options; ``around`` as of ``check_loss``.

    It encodes what is asked for of every group: pooled and projected features, and as far as its capabilities say
    tokens and masked patches, one group whole and with patches hidden and left out at once; gradients reach every
    parameter that ``unread`` does not name; features depend on nothing that is hidden, and of a causal tower on nothing
    that comes later.
    """
    with _checking("towers", part) as cls:
        modality = cls.modality
        tower = {"model": {modality: {"type": part, **options}}}
        capabilities = ModelCheck(tower, around).assembly.model.towers[modality].capabilities
        needs = [Need(modality=modality), Need(modality=modality, role="teacher", group="global")]
        if "tokens" in capabilities:
            needs += [Need(modality=modality, group="global", kind="tokens", views=(0,))]
        if "masks" in capabilities:
            needs += [Need(modality=modality, group="global", kind="masked_tokens", hidden=True)]
            needs += [Need(modality=modality, group="global", kind="tokens", hidden=True)]
        if "drop" in capabilities:
            needs += [Need(modality=modality, group="global", kind="tokens", hidden="drop")]
        config = {**tower, "heads": {"cross": None}, "losses": {"clip": None, "reads": {"type": reader(*needs)}}}
        check = ModelCheck(config, around)
        check.run(f"model.{modality}")
        check.tower(modality)


def check_teacher(part: str | type[Teacher], /, *, around: Mapping[str, Any] | None = None, **options: Any) -> None:
    """Hold a teacher to the contract, with these options; ``around`` as of ``check_loss``.

    It makes a second model that takes no gradients and shares nothing with the student, moves that model alone,
    returns numbers, and another copy with its state goes on as it does.
    """
    with _checking("teachers", part) as cls:
        reads = [Need(modality="image"), *([Need(modality="image", role="teacher")] if cls.present else [])]
        config = {"losses": {"clip": None, "reads": {"type": reader(*reads)}}, "teacher": {"type": part, **options}}
        ModelCheck(config, around).teacher()


def check_optimizer(part: str | type[Optimizer], /, *, around: Mapping[str, Any] | None = None, **options: Any) -> None:
    """Hold an optimiser to the contract, with these options; ``around`` as of ``check_loss``.

    It moves parameters against their gradients, by the learning rate of their group, and those without a gradient not
    at all; its state is tensors shaped like the parameter, or numbers, and a copy with it goes on to the same bits.
    """
    with _checking("optimizers", part):
        moving = {
            "optimizer": {"type": part, "lr": 1e-2, **options},
            "schedule": {"type": "constant", "warmup_steps": 0},
        }
        hold_optimizer(example_config(moving, around))


def check_schedule(part: str | type[Schedule], /, *, around: Mapping[str, Any] | None = None, **options: Any) -> None:
    """Hold a schedule to the contract, with these options; ``around`` as of ``check_loss``.

    What is left lies between 0 and 1 and is a function of the step, and the steps that are called stable are the same
    in longer runs.
    """
    with _checking("schedules", part):
        hold_schedule(example_assembly(example_config({"schedule": {"type": part, **options}}, around)).schedule)


def check_augmenter(
    part: str | type[Augmenter],
    /,
    *,
    around: Mapping[str, Any] | None = None,
    samples: Sequence[Sample] | None = None,
    **options: Any,
) -> None:
    """Hold an augmenter to the contract, with these options, on ``samples`` (default: ``example_samples()``).

    Crops, and masks of texts, are of the groups on offer, of their shapes, a function of sample, ``rng`` and progress
    alone, in a copy sent to another process too; ``finish`` gives finite floats, a function of crops and parameters,
    whatever else is in the batch.
    """
    with _checking("augmenters", part) as cls:
        config = {"augmenters": {cls.modality: {"type": part, **options}}, "heads": {"cross": None}}
        config["losses"] = {"clip": None, "reads": {"type": reader(Need(modality=cls.modality))}}
        assembly = ModelCheck(config, around).assembly
        augmenter, spec = assembly.augmenters[cls.modality], assembly.spec
        given = list(samples or example_samples())
        collator = Collator(len(given))
        for seed, sample in enumerate(given):
            crops = checked_crops(_crops(augmenter, sample, seed), spec.views(cls.modality), cls.modality, "crop")
            collator.add(sample, {cls.modality: crops}, np.random.default_rng(seed))
        for name, group in collator.batch(assembly.tokenizer, augmenter).image.items():
            if group.masks is not None and spec.image is not None:
                patches = group.pixels[0, 0, 0].numel() // spec.image.patch_size**2
                found = group.masks.shape[-1]
                expect(found == patches, f"masks of '{name}' are of {found} patches, expected {patches}")
            _check_finish(augmenter, name, group)


def check_writer(
    part: str | type[Writer],
    /,
    *,
    folder: Path | str,
    read: Callable[[Path], Iterable[tuple[int, str, float]]] | None = None,
    **options: Any,
) -> None:
    """Hold a writer to the contract, with these options; it writes within ``folder``, which is empty.

    It is built and opens nothing until it is started; it takes numbers that are not finite, and pictures; it goes on in
    the folder of a run that was cut off. ``read`` gives all that stands in the run's folder, as step, name and value:
    then each number is there, and once, though steps came again.
    """
    with _checking("writers", part) as cls:
        folder = Path(folder)
        wanted: dict[tuple[int, str], float] = {}
        reported: dict[int, frozenset[str]] = {}
        for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):  # step 3 comes again
            writer: Writer = cls(example_spec(), **options)
            writer.part_name = PART
            expect(start or not any(folder.iterdir()), "it opens something before it is started")
            run = RunInfo(folder=folder, name="check", id="0123456789abcdef", step=start, config={"name": "check"})
            writer.start(run)
            for step in steps:
                values = {"loss": step / 8, "loss/part": 1.0 / step, "bad": math.nan}
                wanted |= {(step, name): value for name, value in values.items()}
                picture = {"eval/student/grid": torch.zeros(3, 4, 5, dtype=torch.uint8)}
                if not (writer.appends and step in reported):
                    writer.scalars(step, values)
                    writer.pictures(step, picture)
                reported[step] = frozenset(values)
            writer.sync()
            writer.close()
        if read is not None:
            found = [(step, name) for step, name, value in read(folder) if math.isfinite(value)]
            finite = {place: value for place, value in wanted.items() if math.isfinite(value)}
            twice = {place for place in found if found.count(place) > 1}
            expect(not twice, f"step and name stand there twice: {sorted(twice)}")
            missing = [place for place, value in finite.items() if (*place, value) not in set(read(folder))]
            expect(not missing, f"step and name are missing, or of another value: {missing}")


def check_callback(part: str | type[Callback], /, *, around: Mapping[str, Any] | None = None, **options: Any) -> None:
    """Hold a callback to the contract, with these options; ``around`` as of ``check_loss``.

    Around some steps of the small model it changes no name, shape or ``requires_grad``, and with ``watches`` nothing at
    all; two runs of it do the same; one that goes on from its saved state and the weights does as the one that went
    through.
    """
    with _checking("callbacks", part):
        config = {"callbacks": {PART: {"type": part, **options}}}
        check_hooks(example_config(around, config))


def _crops(augmenter: Augmenter, sample: Sample, seed: int) -> Mapping[str, Any]:
    """The views of one sample, found to be a function of sample and seed."""
    augmenter.set_progress(PROGRESS)
    found = augmenter.crop(sample, np.random.default_rng(seed))
    for number, other in enumerate((augmenter, pickle.loads(pickle.dumps(augmenter)))):
        for progress in (replace(PROGRESS, step=PROGRESS.total_steps - 1), PROGRESS):
            other.set_progress(progress)
        with torch.random.fork_rng(devices=()):
            for start in (random.seed, np.random.seed, torch.manual_seed):
                cast(Callable[[int], object], start)(seed + 100)
            again = other.crop(sample, np.random.default_rng(seed))
        why = "all randomness must come from it" if number == 0 else "what it needs must survive pickling"
        expect(_same(found, again), f"crop gives other views for the same sample and rng{' in a copy' * number}: {why}")
    if sample.image is not None and augmenter.modality == "image":
        try:
            augmenter.crop(replace(sample, image=b"no picture"), np.random.default_rng(seed))
        except BadSample:
            pass
        else:
            expect(False, "crop takes a picture that cannot be decoded, expected BadSample (sample.decode() raises it)")
    return found


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, ImageCrops) and isinstance(second, ImageCrops):
        return all(_same(getattr(first, name), getattr(second, name)) for name in ("pixels", "params", "masks"))
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(_same(first[name], second[name]) for name in first)
    return bool(first == second)


def _check_finish(augmenter: Augmenter, name: str, group: CropGroup) -> None:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        with blaming(augmenter, "augmenters.image"), untouched(group):
            x = checked_pixels(group, augmenter.finish(group)).pixels
        torch.manual_seed(1)
        again = augmenter.finish(group).pixels
    expect(bool(x.isfinite().all()), f"finish gives numbers in '{name}' that are not finite")
    drawn = f"finish draws random numbers for '{name}': draw them in crop and hand them over as params"
    expect(torch.equal(x, again), drawn)
    for i in range(x.shape[1]):
        alone = augmenter.finish(map_tensors(group, lambda tensor, i=i: tensor[:, [i]]))  # type: ignore[misc]
        close = torch.allclose(alone.pixels, x[:, [i]], rtol=1e-5, atol=1e-5)
        expect(close, f"finish gives sample {i} of '{name}' other pixels in a batch than alone")


@contextmanager
def _checking(group: str, part: str | type[Any]) -> Iterator[type[Any]]:
    """The class of a part, whose options must be in order too; what goes wrong names the part."""
    name = part if isinstance(part, str) else f"{part.__module__}:{part.__qualname__}"
    try:
        record = registry.find(group, unshadowed(group, part) if isinstance(part, str) else registry.class_name(part))
        name = str(record) if record.distribution != registry.CODE else name
        cls = registry.load(record)
        yield cls
        _check_options(record, cls)  # at last: a missing line of docs hides nothing
    except (AssertionError, CosmosError) as error:
        raise AssertionError(f"{name}: {error}") from error
    except Exception as error:
        error.add_note(f"while {name} was checked")
        raise


def _check_options(record: registry.Record, cls: type[Any]) -> None:
    for option in registry.options_of(cls):
        line = f"``{option.name}: what it is``"
        expect(option.doc, f"the option '{option.name}' has no docs: write {line} in the docstring of the class")
        if option.required or not _is_plain(option.default):
            continue
        _, faults = registry.check_options(record, cls, {option.name: option.default})
        wrong = " ".join(message for key, message in faults if key)
        expect(not wrong, f"the default of '{option.name}' is none of its own type ({option.type_name}): {wrong}")


def _is_plain(value: Any) -> bool:
    """Return whether a config could hold the value as it is."""
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
