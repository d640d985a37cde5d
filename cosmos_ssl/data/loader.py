"""Batches: the samples of a step read, cropped and tokenised whole inside one worker process.

What a batch holds is a pure function of (seed, step, rank): workers, prefetching and restarts change nothing.
"""

from __future__ import annotations

import math
import multiprocessing
import pickle
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from cosmos_ssl.api import (
    Augmenter,
    BadSample,
    Dataset,
    ImageCrops,
    ImageGroup,
    Part,
    PluginError,
    Sample,
    SampleViews,
    TextGroup,
    Tokenizer,
    Views,
    ViewSpec,
)
from cosmos_ssl.data.budget import Replacement
from cosmos_ssl.data.captions import check_texts
from cosmos_ssl.data.limits import check_open_files, check_shared_memory
from cosmos_ssl.data.order import Order, replacement, sample_rng
from cosmos_ssl.data.workers import Board, Failure, WorkerStart, held_signals, lost
from cosmos_ssl.errors import TrainingError
from cosmos_ssl.pictures import BACKGROUND

MAX_ATTEMPTS = 32
"""Bad samples in a row at one position before the data as a whole is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedBatch:
    """One rank's share of a step."""

    step: int
    views: Views
    """uint8 crops [V, B, 3, H, W] as the augmenter made them, token ids [V, B, S]; extras as lists of B."""
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
    ) -> None:
        assert order.lanes % world == 0, (order.lanes, world)
        self.dataset = dataset
        self.order = order
        self.workers = workers
        self._prefetch = prefetch
        self._pin_memory = pin_memory
        self._stop = multiprocessing.get_context().Event()
        self._board = Board(workers)
        viewer = _SampleViewer(dataset, order, image, text, self._board, background)
        self._batches = _Batches(viewer, order, tokenizer, rank, world, self._stop)

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
                except (
                    RuntimeError,
                    OSError,
                    EOFError,
                ) as error:  # errors of samples come as values: this is the loader's own
                    ending = wait(
                        [process.sentinel for process in processes], timeout=1
                    )  # its pipes are closed before it has ended
                    for process in processes:
                        process.join(1 if process.sentinel in ending else 0)
                    raise lost(processes, error) from error
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
        offers = [spec for specs in self._batches.viewer.offers.values() for spec in specs.values()]
        pixels = sum(3 * spec.views * spec.size**2 for spec in offers if spec.size is not None)
        check_shared_memory(batches * pixels * (self.order.batch_size // self._batches.world))
        check_open_files(batches * 4 * len(offers))  # of a group at most: pixels, parameters, masks; tokens, lengths

    def where(self) -> str:
        """What the workers are at, for the message of a run that hangs."""
        return "; ".join(f"loader worker {number}: {line}" for number, line in enumerate(self._board.read()) if line)

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
        if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
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


class _Batches(TorchDataset["LoadedBatch | Failure"]):
    """Step -> batch, or the error that prevented it."""

    def __init__(
        self, viewer: _SampleViewer, order: Order, tokenizer: Tokenizer | None, rank: int, world: int, stop: Any
    ) -> None:
        self.viewer, self.order, self.tokenizer = viewer, order, tokenizer
        self.rank, self.world, self.stop = rank, world, stop

    def __getitem__(self, step: int) -> LoadedBatch | Failure:
        try:
            return self._build(step)
        except (Exception, SystemExit) as error:  # a part that calls sys.exit has failed
            worker = get_worker_info()
            where = f"step {step:,}" if worker is None else f"loader worker {worker.id}, step {step:,}"
            return Failure.of(error, f"data: {where}, {self.viewer.at}")

    def _build(self, step: int) -> LoadedBatch:
        epoch, _ = self.order.epoch_of(step)
        indices = self.order.rank_batch(step, self.rank, self.world)
        positions = self.order.rank_positions(step, self.rank, self.world)
        batch = _Collector(len(indices))
        replaced: list[Replacement] = []
        for index, position in zip(indices.tolist(), positions.tolist(), strict=True):
            if self.stop.is_set() and get_worker_info() is not None:
                raise TrainingError("the loader is being closed")  # nobody waits for it
            sample, views = self.viewer.make(index, epoch, position, replaced)
            batch.add(sample, views)
        self.viewer.at = (
            f"collecting the batch, tokenizer{_whose(self.tokenizer)}" if self.tokenizer else "collecting the batch"
        )
        return LoadedBatch(step=step, views=batch.views(self.tokenizer), replaced=tuple(replaced))


class _SampleViewer:
    """One position of an epoch -> the views there."""

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        image: Augmenter | None,
        text: Augmenter | None,
        board: Board,
        background: str,
    ) -> None:
        self.dataset, self.order, self.image, self.text, self.board = dataset, order, image, text, board
        self.background = background
        self.offers = {augmenter.modality: augmenter.offers() for augmenter in (image, text) if augmenter is not None}
        self._at = ""

    @property
    def at(self) -> str:
        """What is being worked on, for messages; in a worker it is put up for the trainer too."""
        return self._at

    @at.setter
    def at(self, text: str) -> None:
        self._at = text
        worker = get_worker_info()
        if worker is not None:
            self.board.write(worker.id, text)

    def make(self, index: int, epoch: int, position: int, replaced: list[Replacement]) -> tuple[Sample, SampleViews]:
        """Read and crop sample ``index``, or those that stand in for it. Raises TrainingError when none can be used."""
        seed = self.order.seed
        for attempt in range(MAX_ATTEMPTS):
            if attempt:
                index = replacement(seed, epoch, position, attempt, self.order.samples)
            shard = self.dataset.describe(index)
            self.at = f"reading sample {index} of {shard}{_whose(self.dataset)}"
            sample = None
            try:
                sample = self.dataset.read(index).on(self.background)
                return sample, self._views(sample, shard, epoch, position, attempt)
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

    def _views(self, sample: Sample, shard: str, epoch: int, position: int, attempt: int) -> SampleViews:
        crops: dict[str, Mapping[str, Any]] = {}
        for augmenter in (self.text, self.image):  # texts first: they are cheap, and may show that the sample is bad
            if augmenter is not None:
                modality, is_text = augmenter.modality, augmenter.modality == "text"
                whose = f"augmenters.{modality}{_whose(augmenter)}"
                self.at = f"{whose} on sample {sample.key} of {shard}"
                if is_text:
                    self._check_captions(sample, shard)
                rng = sample_rng(self.order.seed, epoch, position, attempt, text=is_text)
                crops[modality] = _checked(augmenter.crop(sample, rng), self.offers[modality], is_text, whose)
        return SampleViews(image=crops.get("image", {}), text=crops.get("text", {}))

    def _check_captions(self, sample: Sample, shard: str) -> None:
        """Raise PluginError where the data set gives something else than lists of sentences, BadSample where none or no
        good ones.
        """
        captions = sample.captions
        if not isinstance(captions, Mapping) or not all(map(_are_sentences, captions.values())):
            whose = f"data{_whose(self.dataset)}: sample {sample.key} of {shard} has the captions {str(captions)[:80]}"
            raise PluginError(f"{whose}, expected lists of sentences by field, such as {{'txt': ['a dog']}}")
        if not any(captions.values()):
            raise BadSample("no caption")
        check_texts(sample.captions)


def _are_sentences(texts: Any) -> bool:
    return (
        isinstance(texts, Sequence)
        and not isinstance(texts, str | bytes)
        and all(isinstance(text, str) for text in texts)
    )


def _whose(part: Part) -> str:
    """Whose part it is, behind its name in a message."""
    return f" ({part.part_source})" if part.part_source else ""


def _checked(views: Any, offers: Mapping[str, ViewSpec], is_text: bool, whose: str) -> Mapping[str, Any]:
    """The views of one sample. Raises PluginError where they are not those on offer."""
    if not isinstance(views, Mapping) or views.keys() != offers.keys():
        given = list(views) if isinstance(views, Mapping) else type(views).__name__
        raise PluginError(f"{whose} gave the groups {given}, expected those that it offers, {list(offers)}")
    for name, found in views.items():
        count, size = offers[name].views, offers[name].size
        if is_text:
            good = isinstance(found, Sequence) and len(found) == count and all(isinstance(text, str) for text in found)
            wanted, shown = f"{count} strings", repr(found)[:60]
        else:
            good = isinstance(found, ImageCrops) and found.pixels.dtype == torch.uint8 and len(found.pixels) == count
            good = (
                good
                and (size is None or found.pixels.shape[-2:] == (size, size))
                and offers[name].masks == (found.masks is not None)
            )
            side = "H, W" if size is None else f"{size}, {size}"
            wanted = f"ImageCrops of uint8 [{count}, 3, {side}] {'with' if offers[name].masks else 'without'} masks"
            shown = (
                f"{found.pixels.dtype} {list(found.pixels.shape)}"
                if isinstance(found, ImageCrops)
                else type(found).__name__
            )
            shown += " with masks" * (isinstance(found, ImageCrops) and found.masks is not None)
        if not good:
            raise PluginError(f"{whose} gave '{name}' as {shown}, expected {wanted}")
        if not is_text and not found.params.is_floating_point():
            raise PluginError(f"{whose} gave params of '{name}' as {found.params.dtype}, expected float32")
        if not is_text and found.masks is not None and found.masks.dtype != torch.bool:
            raise PluginError(f"{whose} gave masks of '{name}' as {found.masks.dtype}, expected bool")
    return views


class _Collector:
    """Writes the views of one sample after another into the tensors of the batch."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.samples: list[Sample] = []
        self.image: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
        self.text: dict[str, list[Sequence[str]]] = {}

    def add(self, sample: Sample, views: SampleViews) -> None:
        """The views of the next sample. Raises PluginError where they are of another shape than the first ones."""
        slot = len(self.samples)
        self.samples.append(sample)
        for name, crops in views.image.items():
            if slot == 0:
                self.image[name] = self._room(crops)
            for room, part in zip(self.image[name], (crops.pixels, crops.params, crops.masks), strict=True):
                if room is None or part is None:
                    continue
                if room[:, slot].shape != part.shape:
                    raise PluginError(
                        f"image views '{name}' are {list(part.shape)}, those of the batch's first sample "
                        f"{list(room[:, 0].shape)}"
                    )
                room[:, slot] = part
        for name, texts in views.text.items():
            self.text.setdefault(name, []).append(texts)

    def _room(self, crops: ImageCrops) -> tuple[Tensor, Tensor, Tensor | None]:
        def like(tensor: Tensor) -> Tensor:
            return _empty((tensor.shape[0], self.size, *tensor.shape[1:]), tensor.dtype)

        return like(crops.pixels), like(crops.params), None if crops.masks is None else like(crops.masks)

    def views(self, tokenizer: Tokenizer | None) -> Views:
        """The finished batch. Raises PluginError where extras cannot travel between processes."""
        shared = set.intersection(*(set(sample.extras) for sample in self.samples))
        extras = {name: [sample.extras[name] for sample in self.samples] for name in sorted(shared)}
        try:
            pickle.dumps(extras)  # what cannot be sent would be lost on the way, and the trainer left waiting
        except Exception as error:
            raise PluginError(f"the data set's extras ({', '.join(extras)}) cannot be pickled: {error}") from error
        return Views(
            keys=[sample.key for sample in self.samples],
            image={
                n: ImageGroup(pixels=pixels, params=params, masks=masks)
                for n, (pixels, params, masks) in self.image.items()
            },
            text=self._tokens(tokenizer) if self.text else {},
            extras=extras,
        )

    def _tokens(self, tokenizer: Tokenizer | None) -> dict[str, TextGroup]:
        """All texts of all groups in one call, view-major."""
        if tokenizer is None:
            raise PluginError("a text augmenter needs a tokenizer")
        groups = {
            name: [text for view in zip(*texts, strict=True) for text in view] for name, texts in self.text.items()
        }
        texts = [text for texts in groups.values() for text in texts]
        tokens, lengths = _checked_tokens(tokenizer, len(texts), tokenizer(texts))
        counts = [len(texts) for texts in groups.values()]
        return {
            name: TextGroup(tokens=ids.reshape(-1, self.size, ids.shape[1]), lengths=length.reshape(-1, self.size))
            for name, ids, length in zip(groups, tokens.split(counts), lengths.split(counts), strict=True)
        }


def _checked_tokens(tokenizer: Tokenizer, count: int, given: Any) -> tuple[Tensor, Tensor]:
    """Token ids and lengths of ``count`` texts. Raises PluginError."""
    whose, most = f"tokenizer{_whose(tokenizer)}", tokenizer.context_length
    wanted = f"expected ids int64 [{count}, at most {most}] and lengths int64 [{count}]"
    if not isinstance(given, tuple | list) or len(given) != 2 or not all(isinstance(x, Tensor) for x in given):
        raise PluginError(f"{whose} gave {type(given).__name__}, {wanted}")
    ids, lengths = given
    integers = all(x.dtype in (torch.int64, torch.int32) and x.device.type == "cpu" for x in given)
    if (
        not integers
        or ids.dim() != 2
        or len(ids) != count
        or not 1 <= ids.shape[1] <= most
        or lengths.shape != (count,)
    ):
        shown = " and ".join(f"{x.dtype} {list(x.shape)} on {x.device}" for x in given)
        raise PluginError(f"{whose} gave {shown}, {wanted}")
    for what, values, low, high in (("ids", ids, 0, tokenizer.vocab_size - 1), ("lengths", lengths, 1, ids.shape[1])):
        if count and not low <= int(values.min()) <= int(values.max()) <= high:
            raise PluginError(
                f"{whose} gave {what} from {int(values.min())} to {int(values.max())}, expected {low} to {high}"
            )
    return ids, lengths


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Room for a tensor; in a worker in shared memory from the start, so that nothing is copied to send it."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    empty = torch.empty(0, dtype=dtype)
    storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(math.prod(shape) * empty.element_size())
    return empty.set_(storage).view(shape)
