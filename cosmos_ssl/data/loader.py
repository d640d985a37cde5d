"""Batches: the samples of a step read, cropped and tokenised whole inside one worker process.

What a batch holds is a pure function of (seed, step, rank): workers, prefetching and restarts change nothing.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from cosmos_ssl.api import Augmenter, BadSample, Dataset, Modality, PluginError, Progress, Sample, Tokenizer
from cosmos_ssl.api.part import describe
from cosmos_ssl.api.views import CroppedViews
from cosmos_ssl.data.budget import Replacement
from cosmos_ssl.data.captions import check_texts
from cosmos_ssl.data.collate import Collator, checked_crops
from cosmos_ssl.data.limits import check_open_files, check_shared_memory
from cosmos_ssl.data.order import Order, replacement, sample_rng
from cosmos_ssl.data.workers import Failure, StatusLines, WorkerStart, held_signals, lost_worker
from cosmos_ssl.errors import TrainingError
from cosmos_ssl.pictures import BACKGROUND

MAX_ATTEMPTS = 32
"""Bad samples in a row at one position before the data as a whole is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedBatch:
    """One rank's share of a step."""

    step: int
    views: CroppedViews
    replaced: tuple[Replacement, ...] = ()
    """The bad samples met on the way, to be counted when the batch is consumed."""

    def pin_memory(self) -> LoadedBatch:
        """The same batch in page-locked memory (the name that PyTorch's loader looks for)."""
        return replace(self, views=self.views.pin_memory())


class Loader:
    """Makes the batches of one rank. ``workers`` 0 works in this process and gives the same batches.

    Raises UserError where ``world`` ranks cannot share the batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        *,
        image: Augmenter | None = None,
        text: Augmenter | None = None,
        tokenizer: Tokenizer | None = None,
        workers: int,
        rank: int = 0,
        world: int = 1,
        prefetch: int = 2,
        pin_memory: bool = False,
        background: str = BACKGROUND,
        total_steps: int = 0,
    ) -> None:
        """``total_steps``: of the run, for augmenters that go by it."""
        assert order.lanes % world == 0, (order.lanes, world)
        self.dataset = dataset
        self.order = order
        self.workers = workers
        self._prefetch = prefetch
        self._pin_memory = pin_memory
        self._stop = multiprocessing.get_context().Event()
        augmenters: dict[Modality, Augmenter | None] = {"text": text, "image": image}
        self._batches = _Batches(
            dataset=dataset,
            order=order,
            augmenters={modality: augmenter for modality, augmenter in augmenters.items() if augmenter is not None},
            tokenizer=tokenizer,
            background=background,
            total_steps=total_steps,
            rank=rank,
            world=world,
            status=StatusLines(workers),
            stop=self._stop,
        )

    def batches(self, start_step: int, stop_step: int) -> Iterator[LoadedBatch]:
        """The batches of steps ``start_step`` to ``stop_step`` (not included), in order.

        Raises OSError where storage fails, StorageError where a worker is killed, TrainingError where an augmenter
        or a data set fails or no sample can be used.
        """
        if start_step >= stop_step:
            return
        if self.workers == 0:
            yield from (_opened(self._batches[step]) for step in range(start_step, stop_step))
            return
        self.check_limits()
        self._stop.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # more workers than cores: the user's choice
            iterator = _start(self._torch_loader(range(start_step, stop_step)))
        processes = iterator._workers
        try:
            for _ in range(start_step, stop_step):
                try:
                    result = next(iterator)
                except (RuntimeError, OSError, EOFError) as error:  # the loader's own: those of samples come as values
                    ending = wait([process.sentinel for process in processes], timeout=1)  # pipes close before it ends
                    for process in processes:
                        process.join(1 if process.sentinel in ending else 0)
                    raise lost_worker(processes, error) from error
                yield _opened(result)
        finally:
            self._stop.set()
            iterator._shutdown_workers()
            for process in processes:  # stuck in a read: they ignore the polite signal
                if process.is_alive():
                    process.kill()

    def check_limits(self) -> None:
        """Raise UserError where the machine has no room for the batches under way."""
        if self.workers == 0:
            return
        batches = self.workers * self._prefetch + 1  # and the one in use
        offers = [spec for specs in self._batches.offers.values() for spec in specs.values()]
        pixels = sum(3 * spec.views * spec.size**2 for spec in offers if spec.size is not None)
        check_shared_memory(batches * pixels * (self.order.batch_size // self._batches.world))
        check_open_files(batches * 4 * len(offers))  # of a group at most: pixels, parameters, masks; tokens, lengths

    def where(self) -> str:
        """Return what the workers are at, for the message of a run that hangs."""
        return "; ".join(
            f"loader worker {number}: {line}" for number, line in enumerate(self._batches.status.read()) if line
        )

    def _torch_loader(self, steps: range) -> DataLoader[LoadedBatch | Failure]:
        return DataLoader(
            self._batches,
            batch_size=None,
            sampler=steps,
            num_workers=min(self.workers, len(steps)),
            prefetch_factor=self._prefetch,
            pin_memory=self._pin_memory,
            collate_fn=_same,
            worker_init_fn=WorkerStart(),
            generator=torch.Generator(),  # the global one must not depend on the number of restarts
        )


def _start(loader: DataLoader[Any]) -> Any:
    """Start the workers, without PyTorch's handler that raises in the midst of a step when one of them dies."""
    with held_signals():
        if threading.current_thread() is not threading.main_thread():
            return iter(loader)
        before = signal.getsignal(signal.SIGCHLD)
        iterator = iter(loader)
        signal.signal(signal.SIGCHLD, before)
        return iterator


def _opened(result: LoadedBatch | Failure) -> LoadedBatch:
    if isinstance(result, Failure):
        result.raise_()
    return cast(LoadedBatch, result)


def _same(result: Any) -> Any:
    return result


@dataclass(eq=False, kw_only=True)
class _Batches(TorchDataset["LoadedBatch | Failure"]):
    """Step -> batch, or the error that prevented it."""

    dataset: Dataset
    order: Order
    augmenters: Mapping[Modality, Augmenter]
    """Texts first: they are cheap, and may show that a sample is bad."""
    tokenizer: Tokenizer | None
    background: str
    total_steps: int
    rank: int
    world: int
    status: StatusLines
    stop: Any
    at: str = ""
    """What is being worked on, for messages."""

    def __post_init__(self) -> None:
        self.offers = {modality: augmenter.offers() for modality, augmenter in self.augmenters.items()}

    def __getitem__(self, step: int) -> LoadedBatch | Failure:
        try:
            return self._build(step)
        except (Exception, SystemExit) as error:  # a part that calls sys.exit has failed
            worker = get_worker_info()
            where = f"step {step:,}" if worker is None else f"loader worker {worker.id}, step {step:,}"
            return Failure.of(error, f"data: {where}, {self.at}")

    def _build(self, step: int) -> LoadedBatch:
        per_epoch, total = self.order.steps_per_epoch, self.total_steps
        progress = Progress(step=step, total_steps=total, steps_per_epoch=per_epoch)
        for augmenter in self.augmenters.values():
            augmenter.set_progress(progress)
        epoch, _ = self.order.epoch_of(self.order.place(step))
        indices = self.order.rank_batch(step, self.rank, self.world)
        positions = self.order.rank_positions(step, self.rank, self.world)
        collator = Collator(len(indices))
        replaced: list[Replacement] = []
        for index, position in zip(indices.tolist(), positions.tolist(), strict=True):
            if self.stop.is_set() and get_worker_info() is not None:
                raise TrainingError("the loader is being closed")  # nobody waits for it
            sample, crops, rng = self._views(index, epoch, position, replaced)
            collator.add(sample, crops, rng)
        self._begin("collecting the batch" + (f", {describe(self.tokenizer, 'tokenizer')}" if self.tokenizer else ""))
        views = collator.batch(self.tokenizer, self.augmenters.get("text"))
        return LoadedBatch(step=step, views=views, replaced=tuple(replaced))

    def _begin(self, work: str) -> None:
        """Note what is worked on from now on; in a worker for the trainer to see, too."""
        self.at = work
        worker = get_worker_info()
        if worker is not None:
            self.status.write(worker.id, work)

    def _views(
        self, index: int, epoch: int, position: int, replaced: list[Replacement]
    ) -> tuple[Sample, Mapping[Modality, Mapping[str, Any]], np.random.Generator]:
        """Sample ``index``, or the one that stands in for it, its views, and what draws the masks of its texts.

        Raises TrainingError when none can be used.
        """
        for attempt in range(MAX_ATTEMPTS):
            if attempt:
                index = replacement(self.order.seed, epoch, position, attempt, self.order.samples)
            shard = self.dataset.describe(index)
            self._begin(describe(self.dataset, f"reading sample {index} of {shard}"))
            sample = None
            try:
                sample = self.dataset.read(index).on(self.background)
                return sample, *self._crops(sample, shard, epoch, position, attempt)
            except BadSample as error:
                key = sample.key if sample is not None else ""
                replaced.append(
                    Replacement(shard=shard, index=index, key=key, reason=error.reason, detail=error.detail)
                )
        last = replaced[-1]
        raise TrainingError(
            f"data: {MAX_ATTEMPTS} samples in a row could not be used, the last one {last.key or last.index} of "
            f"{last.shard}"
            f" ({last.reason}{': ' * bool(last.detail)}{last.detail}). 'cosmos-ssl data check' lists what is wrong"
        )

    def _crops(
        self, sample: Sample, shard: str, epoch: int, position: int, attempt: int
    ) -> tuple[dict[Modality, Mapping[str, Any]], np.random.Generator]:
        """Return what each augmenter makes of a sample, and what texts were drawn by."""
        views = {}
        texts = sample_rng(self.order.seed, epoch, position, attempt, text=True)
        for modality, augmenter in self.augmenters.items():
            whose = describe(augmenter, f"augmenters.{modality}")
            self._begin(f"{whose} on sample {sample.key} of {shard}")
            if modality == "text":
                self._check_captions(sample, shard)
            rng = texts if modality == "text" else sample_rng(self.order.seed, epoch, position, attempt, text=False)
            views[modality] = checked_crops(augmenter.crop(sample, rng), self.offers[modality], modality, whose)
        return views, texts

    def _check_captions(self, sample: Sample, shard: str) -> None:
        """Raise PluginError where the data set gives something else than lists of sentences, BadSample where none or no
        good ones.
        """
        captions = sample.captions
        if not isinstance(captions, Mapping) or not all(map(_are_sentences, captions.values())):
            raise PluginError(
                f"{describe(self.dataset, 'data')}: sample {sample.key} of {shard} has the captions "
                f"{str(captions)[:80]}, expected lists of sentences by field, such as {{'txt': ['a dog']}}"
            )
        if not any(captions.values()):
            raise BadSample("no caption")
        check_texts(sample.captions)


def _are_sentences(texts: Any) -> bool:
    return (
        isinstance(texts, Sequence)
        and not isinstance(texts, str | bytes)
        and all(isinstance(text, str) for text in texts)
    )
