"""Batches: the same for any workers and ranks; bad samples replaced; failures told, never waited for."""

from __future__ import annotations

import gc
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cosmos_ssl.api import Augmenter, BadSample, ImageCrops, Progress, Sample, ViewSpec
from cosmos_ssl.data import LoadedBatch, Loader, Order, Shards
from cosmos_ssl.data.workers import WorkerStart
from cosmos_ssl.errors import PluginError, StorageError, TrainingError

Make = Callable[..., str]


def loader(pattern: str, views: dict[str, Any], batch: int = 8, dataset: Any = None, **options: Any) -> Loader:
    """A loader over all of these shards; options of Loader."""
    dataset = dataset or Shards(pattern, caption_schema="dreamlip")
    return Loader(dataset, Order(dataset.shard_sizes, batch, lanes=batch, seed=5), **views, **{"workers": 0, **options})


def same(a: LoadedBatch, b: LoadedBatch) -> bool:
    """Whether two batches hold the same to the last bit."""
    one, two = a.views, b.views
    image = all(
        torch.equal(getattr(one.image[n], f), getattr(two.image[n], f))
        for n in one.image
        for f in ("pixels", "params", "masks")
    )
    text = all(
        torch.equal(getattr(one.text[n], f), getattr(two.text[n], f))
        for n in one.text
        for f in ("tokens", "lengths", *(["masks"] if one.text[n].masks is not None else []))
    )
    return (
        image
        and text
        and a.step == b.step
        and list(one.keys) == list(two.keys)
        and one.extras == two.extras
        and a.replaced == b.replaced
    )


def by_progress(views: dict[str, Any], mask: Callable[..., Any]) -> dict[str, Any]:
    """The same views: parameters tell the step, and ``mask`` hides tokens of the first group of texts."""
    crops, texts = type(views["image"]), type(views["text"])

    def crop(self: Any, sample: Sample, rng: np.random.Generator) -> Mapping[str, ImageCrops]:
        told = torch.tensor([[self.progress.step, self.progress.fraction, self.progress.epoch]])
        return {"global": replace(crops.crop(self, sample, rng)["global"], params=told.expand(2, 3))}

    def offers(self: Any) -> Mapping[str, ViewSpec]:
        return {**texts.offers(self), "global": ViewSpec(views=2, masks=True)}

    def learn(self: Any, progress: Progress) -> None:
        self.progress = progress

    image = type("Curriculum", (crops,), {"crop": crop, "set_progress": learn})()
    return {**views, "image": image, "text": type("Cloze", (texts,), {"offers": offers, "mask": mask})()}


def half(self: Any, name: str, tokens: torch.Tensor, lengths: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Half of the tokens, pads too, which the loader leaves alone."""
    assert name == "global" and lengths.shape == (2,)
    return torch.from_numpy(rng.random(tokens.shape) < 0.5)


def test_augmenters_know_the_step_and_hide_tokens(shards: Make, views: dict[str, Any]) -> None:
    """A function of seed and step: the same from the middle on, in workers, and texts as without masks."""
    told, pattern = by_progress(views, half), shards(20)
    first = list(loader(pattern, told, total_steps=10).batches(0, 4))
    for step, batch in enumerate(first):
        params = batch.views.image["global"].params
        assert torch.equal(params, torch.tensor([step, step / 10, step / 2]).expand_as(params))
        group = batch.views.text["global"]
        real = torch.arange(12) < group.lengths[..., None]
        assert group.masks is not None and not group.masks[~real].any()
        assert 0.3 < group.masks[real].float().mean() < 0.7
        assert batch.views.text["local"].masks is None
    for workers in (0, 2):
        later = list(loader(pattern, told, total_steps=10, workers=workers).batches(2, 4))
        assert all(same(one, two) for one, two in zip(later, first[2:], strict=True))
    plain = next(iter(loader(pattern, views).batches(0, 1))).views
    assert torch.equal(plain.text["global"].tokens, first[0].views.text["global"].tokens)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "Cloze offers masks of texts, and draws none: it needs mask()"),
        (torch.zeros(2, 12), r"gave the masks of 'global' as torch.float32 \[2, 12\], expected bool \[2, 12\]"),
    ],
)
def test_masks_of_texts_that_cannot_be_used(shards: Make, views: dict[str, Any], given: Any, words: str) -> None:
    mask = Augmenter.mask if given is None else lambda self, *found: given
    with pytest.raises((PluginError, TrainingError), match=words):
        next(iter(loader(shards(20), by_progress(views, mask)).batches(0, 1)))


def test_a_batch_holds_what_the_augmenters_made(shards: Make, views: dict[str, Any]) -> None:
    (batch,) = loader(shards(20), views).batches(1, 2)
    group = batch.views.image["global"]
    assert group.pixels.shape == (2, 8, 3, 8, 8) and group.pixels.dtype == torch.uint8
    assert group.params.shape == (2, 8, 3) and group.masks is not None and group.masks.shape == (2, 8, 4)
    assert batch.views.text["global"].tokens.shape == (2, 8, 12) and batch.views.text["local"].tokens.shape == (
        1,
        8,
        12,
    )
    for slot, key in enumerate(batch.views.keys):
        number = int(key.removeprefix("key"))
        assert group.pixels[:, slot, 0].unique().tolist() == [number], "crops and keys belong together"
        text = bytes(batch.views.text["global"].tokens[1, slot].tolist()).rstrip(b"\0").decode()
        assert text.split()[1] == str(number), "so do texts"
        assert batch.views.extras["cls"][slot] == number % 5
    assert torch.equal(batch.views.text["local"].lengths, (batch.views.text["local"].tokens > 0).sum(2))


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(shards: Make, views: dict[str, Any], workers: int) -> None:
    plain = loader(shards(30, 20), views)
    expected = list(plain.batches(0, 14))
    found = list(loader(shards(30, 20), views, workers=workers).batches(0, 14))
    assert len(found) == 14 and all(map(same, expected, found))
    assert same(next(iter(plain.batches(9, 14))), expected[9]), "resumed in the second epoch"


def test_ranks_change_nothing(shards: Make, views: dict[str, Any]) -> None:
    pattern = shards(40)
    (whole,) = loader(pattern, views).batches(3, 4)
    parts = [next(loader(pattern, views, rank=r, world=4).batches(3, 4)) for r in range(4)]
    assert [key for part in parts for key in part.views.keys] == list(whole.views.keys)
    assert torch.equal(
        torch.cat([part.views.image["global"].pixels for part in parts], 1), whole.views.image["global"].pixels
    )
    assert torch.equal(
        torch.cat([part.views.text["global"].tokens for part in parts], 1), whole.views.text["global"].tokens
    )


def test_one_modality_alone(shards: Make, views: dict[str, Any]) -> None:
    pattern = shards(9, change=lambda number, members: [members.pop("json"), members.pop("txt")])
    (batch,) = loader(pattern, {"image": views["image"]}).batches(0, 1)
    assert not batch.views.text and not batch.replaced and len(batch.views) == 8


def test_crops_come_in_shared_memory(shards: Make, views: dict[str, Any]) -> None:
    (batch,) = loader(shards(9), views, workers=1).batches(0, 1)
    assert batch.views.image["global"].pixels.is_shared()


def test_the_global_random_state_is_left_alone(shards: Make, views: dict[str, Any]) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    list(loader(shards(9), views, workers=1).batches(0, 2))
    assert torch.equal(before, torch.get_rng_state())


# ---------------------------------------------------------------------------- bad samples


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_replaced_and_reported(shards: Make, views: dict[str, Any], workers: int) -> None:
    def change(number: int, members: dict[str, bytes]) -> None:
        if number in (3, 17):
            members["png"] = b"no picture"
        if number == 5:
            members["json"] = b"{}"

    batches = list(loader(shards(10, 10, change=change), views, batch=20, workers=workers).batches(0, 1))
    found = {(r.shard, r.key, r.reason) for r in batches[0].replaced}
    assert {
        ("a-000.tar", "key00003", "undecodable"),
        ("a-001.tar", "key00017", "undecodable"),
        ("a-000.tar", "key00005", "no caption"),
    } <= found
    keys = set(batches[0].views.keys)
    assert len(batches[0].views) == 20 and keys.isdisjoint({"key00003", "key00017", "key00005"})
    assert all(r.detail for r in batches[0].replaced if r.reason == "undecodable")


def test_transparent_pictures_are_put_on_the_background(shards: Make, views: dict[str, Any]) -> None:
    clear = io.BytesIO()
    Image.new("RGBA", (24, 24), (9, 9, 9, 0)).save(clear, "png")
    pattern = shards(8, change=lambda number, members: members.update(png=clear.getvalue()))
    for options, colour in (({}, [255]), ({"background": "#070707"}, [7])):
        (batch,) = loader(pattern, views, **options).batches(0, 1)
        assert batch.views.image["global"].pixels.unique().tolist() == colour


def test_a_replacement_depends_on_the_position_alone(shards: Make, views: dict[str, Any]) -> None:
    pattern = shards(20, change=lambda number, members: members.update(png=b"") if number < 5 else None)
    (whole,) = loader(pattern, views, batch=20).batches(0, 1)
    parts = [next(loader(pattern, views, batch=20, rank=r, world=2).batches(0, 1)) for r in (0, 1)]
    assert [key for part in parts for key in part.views.keys] == list(whole.views.keys)
    assert parts[0].replaced + parts[1].replaced == whole.replaced


class Captioned(Shards):
    """Gives every sample the same captions."""

    captions: Any

    def read(self, index: int) -> Sample:
        return replace(super().read(index), captions=self.captions)


@pytest.mark.parametrize(
    "captions", [{"txt": "abc"}, {"txt": b"abc"}, {"txt": ["a", 1]}, {"txt": None}, "abc", ["abc"]]
)
def test_captions_are_lists_of_sentences(shards: Make, views: dict[str, Any], captions: Any) -> None:
    data = Captioned(pattern := shards(9))
    data.captions, data.part_source = captions, "'mine' of my-data 0.3.1"
    message = "data ('mine' of my-data 0.3.1): sample key"
    with pytest.raises(
        PluginError, match=re.escape(message) + r"\d+ of a-000\.tar has the captions .*, expected lists of sentences"
    ):
        list(loader(pattern, views, dataset=data).batches(0, 1))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a " * 40_000, "caption too long"),
        ("q" * 1025, "caption too long"),
        ("!?" * 600, "caption too long"),
        ("\ud83d", "caption not Unicode"),
    ],
)
def test_texts_that_no_tokenizer_takes_are_bad_samples(
    shards: Make, views: dict[str, Any], text: str, reason: str
) -> None:
    data = Captioned(pattern := shards(9))
    data.captions = {"txt": ["good", text]}
    with pytest.raises(TrainingError, match=rf"32 samples in a row .*{reason}: [\d,]+ letters in 'txt'"):
        list(loader(pattern, views, dataset=data).batches(0, 1))


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_usable_stops_the_run(shards: Make, views: dict[str, Any], workers: int) -> None:
    pattern = shards(20, change=lambda number, members: members.update(png=b""))
    with pytest.raises(TrainingError, match=r"32 samples in a row could not be used.* of a-000\.tar \(undecodable: "):
        list(loader(pattern, views, workers=workers).batches(0, 1))


# ---------------------------------------------------------------------------- failures


class Failing(Shards):
    """Raises what it is told to when sample 13 is read."""

    def __init__(self, pattern: str, error: Exception) -> None:
        super().__init__(pattern, caption_schema="dreamlip")
        self.error = error

    def read(self, index: int) -> Sample:
        if index == 13:
            raise self.error
        return super().read(index)


class Odd(Exception):
    """Cannot be made again from its arguments."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__("odd")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(5, "Input/output error"), OSError, r"step \d+, reading sample 13 of a-001\.tar: Input/output error"),
        (ZeroDivisionError("a bug"), TrainingError, r"reading sample 13 of a-001\.tar: ZeroDivisionError: a bug"),
        (Odd(1, 2), TrainingError, "Odd: odd"),
        (TrainingError("as it is"), TrainingError, "as it is"),
    ],
)
def test_errors_reach_the_trainer(
    shards: Make, views: dict[str, Any], workers: int, error: Exception, kind: type[Exception], words: str
) -> None:
    pattern = shards(10, 10)
    with pytest.raises(kind, match=words) as caught:
        list(loader(pattern, views, dataset=Failing(pattern, error), workers=workers).batches(0, 4))
    assert "Traceback" in "".join(caught.value.__notes__), "the worker's traceback is kept for --debug"


def test_a_failing_augmenter_is_named(shards: Make, views: dict[str, Any]) -> None:
    views["image"].crop = None
    views["image"].part_source = "'mine' of my-crops 0.3.1"
    with pytest.raises(
        TrainingError,
        match=r"augmenters\.image \('mine' of my-crops 0\.3\.1\) on sample key\d+ of a-000\.tar: TypeError",
    ):
        list(loader(shards(9), views).batches(0, 1))


def test_views_of_changing_shape_are_refused(shards: Make, views: dict[str, Any]) -> None:
    crop, calls = views["image"].crop, []

    def changing(sample: Sample, rng: Any) -> Any:
        calls.append(sample)
        found = crop(sample, rng)
        if len(calls) == 3:
            found["global"] = replace(found["global"], params=found["global"].params[:, :1])
        return found

    views["image"].crop = changing
    with pytest.raises(
        PluginError, match=r"image views 'global' are \[2, 1\], those of the batch's first sample \[2, 3\]"
    ):
        list(loader(shards(9), views).batches(0, 1))


@pytest.mark.parametrize(
    ("modality", "changes", "message"),
    [
        ("image", {"local": None}, "gave the groups ['global', 'local'], expected those that it offers, ['global']"),
        ("image", {"global": [1]}, "gave 'global' as list, expected ImageCrops of uint8 [2, 3, 8, 8] with masks"),
        (
            "image",
            {"pixels": (2, 3, 8, 4)},
            "gave 'global' as torch.uint8 [2, 3, 8, 4] with masks, expected ImageCrops of uint8 [2, 3, 8, 8]",
        ),
        (
            "image",
            {"pixels": (1, 3, 8, 8)},
            "gave 'global' as torch.uint8 [1, 3, 8, 8] with masks, expected ImageCrops of uint8 [2, 3, 8, 8]",
        ),
        ("image", {"params": torch.int64}, "gave params of 'global' as torch.int64, expected float32"),
        ("image", {"masks": torch.uint8}, "gave masks of 'global' as torch.uint8, expected bool"),
        ("text", {"local": ["one", "two"]}, "gave 'local' as ['one', 'two'], expected 1 strings"),
        ("text", {"local": [None]}, "gave 'local' as [None], expected 1 strings"),
    ],
)
def test_views_that_are_not_on_offer_are_refused(
    shards: Make, views: dict[str, Any], modality: str, changes: dict[str, Any], message: str
) -> None:
    augmenter = views[modality]
    augmenter.part_source = "'mine' of my-crops 0.3.1"
    crop = augmenter.crop

    def changed(sample: Sample, rng: Any) -> Any:
        found = crop(sample, rng)
        if "pixels" in changes:
            shape = changes["pixels"]
            crops = ImageCrops(
                pixels=torch.zeros(shape, dtype=torch.uint8),
                params=torch.zeros(shape[0], 3),
                masks=torch.zeros(shape[0], 4) > 0,
            )
            return {"global": crops}
        if changes.keys() <= {"params", "masks"}:
            return {
                "global": replace(
                    found["global"], **{name: getattr(found["global"], name).to(to) for name, to in changes.items()}
                )
            }
        return {**found, **changes}

    augmenter.crop = changed
    with pytest.raises(PluginError) as caught:
        list(loader(shards(9), views).batches(0, 1))
    assert str(caught.value).startswith(f"augmenters.{modality} ('mine' of my-crops 0.3.1) {message}")


class Labelled(Shards):
    """Carries what cannot be pickled."""

    def read(self, index: int) -> Sample:
        sample = super().read(index)
        return Sample(key=sample.key, image=sample.image, captions=sample.captions, extras={"what": lambda: None})


def test_extras_that_cannot_travel_are_refused(shards: Make, views: dict[str, Any]) -> None:
    pattern = shards(9)
    with pytest.raises(PluginError, match=r"extras \(what\) cannot be pickled"):
        list(loader(pattern, views, dataset=Labelled(pattern), workers=1).batches(0, 1))


def _start(batches: Iterator[LoadedBatch]) -> list[int]:
    """Take a batch; the workers that were started for it: forks of this process, unlike multiprocessing's servers."""
    next(batches)
    children = map(int, Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())
    own = Path("/proc/self/cmdline").read_bytes()
    return [child for child in children if Path(f"/proc/{child}/cmdline").read_bytes() == own]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_worker_is_lost_storage(shards: Make, views: dict[str, Any]) -> None:
    batches = loader(shards(40), views, workers=2, prefetch=1).batches(0, 1000)
    before = signal.getsignal(signal.SIGCHLD)
    workers = _start(batches)
    assert signal.getsignal(signal.SIGCHLD) == before, "PyTorch's handler would raise in the midst of a step"
    os.kill(workers[0], signal.SIGKILL)
    with pytest.raises(StorageError, match=r"a loader worker was lost \(process \d+, SIGKILL; out of memory\?"):
        list(batches)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_workers_ignore_polite_signals_and_end_with_the_iterator(shards: Make, views: dict[str, Any]) -> None:
    batches = loader(shards(40), views, workers=2).batches(0, 1000)
    workers = _start(batches)
    for worker in workers:
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(worker, name)
    assert len([next(batches) for _ in range(20)]) == 20
    start = time.perf_counter()
    batches.close()
    assert time.perf_counter() - start < 4 and not any(Path(f"/proc/{worker}").exists() for worker in workers)


@pytest.mark.skipif(sys.platform != "linux", reason="signals of POSIX")
def test_a_signal_cannot_take_a_worker_that_has_not_started_yet(
    shards: Make, views: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it inherit that the trainer collects garbage on a schedule."""
    start = WorkerStart.__call__

    def signalled_first(self: WorkerStart, worker: int) -> None:
        for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(os.getpid(), name)
        start(self, worker)
        assert gc.isenabled() and gc.get_freeze_count()

    monkeypatch.setattr(WorkerStart, "__call__", signalled_first)
    gc.disable()
    try:
        assert len(list(loader(shards(40), views, workers=2).batches(0, 6))) == 6
    finally:
        gc.enable()


ORPHANS = """
import os, sys
from cosmos_ssl.api import Augmenter, ImageCrops, ViewSpec
from cosmos_ssl.data import Loader, Order, Shards
import torch
class Crops(Augmenter):
    modality = "image"
    def offers(self): return {"g": ViewSpec(views=1, size=4)}
    def crop(self, sample, rng):
        return {"g": ImageCrops(pixels=torch.zeros(1, 3, 4, 4, dtype=torch.uint8), params=torch.zeros(1, 0))}
data = Shards(sys.argv[1], caption_schema=None)
batches = Loader(data, Order(data.shard_sizes, 4, lanes=4, seed=0), image=Crops(), workers=2).batches(0, 10**6)
next(batches)
print(open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read(), flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's notice is Linux's")
def test_workers_die_with_their_parent(shards: Make) -> None:
    done = subprocess.run([sys.executable, "-c", ORPHANS, shards(9)], stdout=subprocess.PIPE, text=True, timeout=60)
    workers = done.stdout.split()
    assert done.returncode == -9 and len(workers) == 2
    deadline = time.monotonic() + 60
    while any(_runs(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(_runs(worker) for worker in workers)


def _runs(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_bad_sample_errors_travel_whole() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(BadSample("too large", "9x9")))
    assert (error.reason, error.detail) == ("too large", "9x9")
