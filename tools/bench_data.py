#!/usr/bin/env python3
"""Compare loading from shards of 640 x 427 JPEGs with a plain implementation: python tools/bench_data.py [--json FILE].

The plain implementation decodes with PIL, crops and changes colors with torchvision's transforms on PIL images, turns
views into floats in the worker and tokenizes caption by caption. Ours leaves uint8 views and tokens to the trainer, and
does the photometric work in batches. ``whole`` includes that work, on the same core. It uses one thread and reports
medians of paired runs. The last rows read the same shards from a source that takes 5 ms per request.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Value
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import open_clip
import torch
from bench import MIN_SECONDS, Row, make_duration_row, make_ratio_row, make_row, report
from fsspec.implementations.local import LocalFileSystem
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms as tv

from cosmos_ssl.build import Builder
from cosmos_ssl.config import load_config
from cosmos_ssl.data import Loader, Order, Shards
from cosmos_ssl.engine.assembly import Assembly

SIZE = (640, 427)
LATENCY = 0.005
BATCH = 32
WORDS = [
    f"{adjective} {noun}"
    for adjective in ("red", "small", "old", "bright")
    for noun in ("dog", "hill", "bird", "wall", "stone", "light")
]


def write_shards(folder: Path, samples: int, shards: int) -> str:
    """Pictures with some structure (about 60 kB each) and seven captions of several sentences; the shards' name."""
    rng, names = np.random.default_rng(0), random.Random(0)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:04d}.tar", "w") as tar:
            for number in range(shard, samples, shards):
                coarse = Image.fromarray(rng.integers(0, 256, (27, 40, 3), dtype=np.uint8)).resize(
                    SIZE, Image.Resampling.BICUBIC
                )
                picture = np.asarray(coarse, dtype=np.int16) + rng.integers(
                    -6, 7, (SIZE[1], SIZE[0], 3), dtype=np.int16
                )
                buffer = io.BytesIO()
                Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
                fields = ("raw", "shortIB", "longIB", "shortSV", "longSV", "shortLLA", "longLLA")
                captions = {
                    f"{field}_caption{'' if field == 'raw' else 's'}": [sentence(names) for _ in range(5)]
                    for field in fields
                }
                for extension, data in (("jpg", buffer.getvalue()), ("json", json.dumps(captions).encode())):
                    info = tarfile.TarInfo(f"{number:06d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return f"{folder}/{{0000..{shards - 1:04d}}}.tar"


def sentence(names: random.Random) -> str:
    """Some ten words."""
    return " ".join(names.choice(WORDS) for _ in range(names.randint(6, 14)))


# ---------------------------------------------------------------------------- the plain way


class PlainBlur:
    """PIL's Gaussian blur with a radius drawn in 0.1 .. 2."""

    def __call__(self, picture: Image.Image) -> Image.Image:
        return picture.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def plain_transforms() -> list[Callable[[Image.Image], torch.Tensor]]:
    """Two global and six local views."""

    def chain(
        size: int, scale: tuple[float, float], blur: float, solarize: float
    ) -> Callable[[Image.Image], torch.Tensor]:
        return tv.Compose(
            [
                tv.RandomResizedCrop(size, scale, interpolation=tv.InterpolationMode.BICUBIC),
                tv.RandomHorizontalFlip(),
                tv.RandomApply([tv.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
                tv.RandomGrayscale(0.2),
                tv.RandomApply([PlainBlur()], blur),
                tv.RandomApply([ImageOps.solarize], solarize),
                tv.ToTensor(),
                tv.Normalize((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)),
            ]
        )

    first, second = chain(224, (0.4, 1.0), 1.0, 0.0), chain(224, (0.4, 1.0), 0.1, 0.2)
    return [first, second, *[chain(96, (0.05, 0.4), 0.5, 0.0)] * 6]


class Plain:
    """The samples of shards the plain way."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self.transforms = plain_transforms()
        self.tokenizer = open_clip.get_tokenizer("ViT-B-16")

    def __call__(self, index: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        sample = self.shards.read(index)
        picture = Image.open(io.BytesIO(sample.image or b"")).convert("RGB")
        views = [transform(picture) for transform in self.transforms]
        sentences = sample.sentences()
        texts = [". ".join(random.sample(sentences, random.randint(1, 5))) for _ in range(2)] + random.sample(
            sentences, 6
        )
        return views, torch.cat([self.tokenizer([text]) for text in texts])

    def batch(self, indices: Sequence[int]) -> list[torch.Tensor]:
        """A collated batch."""
        samples = [self(index) for index in indices]
        return [torch.stack(views) for views in zip(*(views for views, _ in samples), strict=True)]


# ---------------------------------------------------------------------------- the source with latency


class Late(LocalFileSystem):  # type: ignore[misc]
    """The local file system with a latency of 5 ms; counts requests and bytes of all processes."""

    protocol = "late"
    cachable = False
    requests, bytes = Value("q", 0), Value("q", 0)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        time.sleep(LATENCY)
        data: bytes = super().cat_file(path, start, end, **options)
        with self.requests, self.bytes:
            self.requests.value += 1
            self.bytes.value += len(data)
        return data


def make_assembly() -> Assembly:
    """Return the augmenters and the tokenizer of COSMOS, among its other parts."""
    return Builder(load_config("cosmos/vitb16_cc3m.yaml", ["evaluators=null"])).assemble("check")


def make_loader(assembly: Assembly, shards: Shards, workers: int) -> Loader:
    """Return our loader over a dataset."""
    order = Order(shards.shard_sizes, BATCH, lanes=4, shuffle_samples=1 << 18, seed=0)
    parts = {
        "image": assembly.augmenters["image"],
        "text": assembly.augmenters["text"],
        "tokenizer": assembly.tokenizer,
    }
    return Loader(shards, order, **parts, workers=workers)  # type: ignore[arg-type]


def measure_rate(batches: Iterator[Any]) -> float:
    """Return the samples per second of all batches after the first, which waits for the workers to start.

    The rate is 0 if there is no second batch.
    """
    next(batches)
    start, count = time.perf_counter(), 0
    for _ in batches:
        count += BATCH
    return count / (time.perf_counter() - start)


# ---------------------------------------------------------------------------- what is measured


def make_loading(assembly: Assembly, shards: Shards) -> tuple[Callable[[int], Any], Callable[[Any], object]]:
    """Return our two stages: one loads the batch of a step, one does the photometric work on it."""
    own = make_loader(assembly, shards, workers=0)
    augmenter = assembly.augmenters["image"]

    def load(step: int) -> Any:
        (batch,) = own.batches(step, step + 1)
        return batch

    def augment(batch: Any) -> None:
        for group in batch.views.image.values():
            augmenter.finish(group)

    return load, augment


def measure_cpu(
    shards: Shards, load: Callable[[int], Any], augment: Callable[[Any], object], pairs: int, batch_size: int = BATCH
) -> list[Row]:
    """Measure the worker's part and the whole, on one thread."""
    plain = Plain(shards)
    steps = len(shards) // batch_size
    times: dict[str, list[float]] = {"plain": [], "worker": [], "whole": []}
    plain.batch(range(2))
    for number in range(pairs):
        start = time.perf_counter()
        plain.batch(range(batch_size))
        times["plain"].append(time.perf_counter() - start)
        start = time.perf_counter()
        batch = load(number % steps)
        times["worker"].append(time.perf_counter() - start)
        augment(batch)
        times["whole"].append(time.perf_counter() - start)
    rows = []
    for title, name, goal in (("worker side", "worker", 4), ("whole, with photometric work", "whole", 1.9)):
        sides = times["plain"], times[name]
        rows.append(make_ratio_row(title, *sides, "x plain", at_least=goal, sides_more_than=MIN_SECONDS * batch_size))
    return rows + [
        make_duration_row(f"{name}, time", statistics.median(seconds) / batch_size, "ms a sample")
        for name, seconds in times.items()
    ]


def measure_source(
    assembly: Assembly, pattern: str, folder: Path, pairs: int, *, protocol: str = "late://", workers: int = 2
) -> list[Row]:
    """Measure the rates from the local disk and from the source with latency."""
    fsspec.register_implementation("late", Late, clobber=True)
    rates: tuple[list[float], list[float]] = ([], [])
    samples = 0
    for number in range(pairs):
        cache = folder / f"cache{number}"
        for source, measured in zip((pattern, f"{protocol}{pattern}"), rates, strict=True):
            shards = Shards(source, caption_schema="dreamlip", cache_dir=str(cache))
            shards.prepare()
            shutil.rmtree(cache / "blocks", ignore_errors=True)  # what reading the first captions has fetched
            (cache / "blocks").mkdir(parents=True)
            Late.requests.value = Late.bytes.value = 0
            samples = len(shards) // BATCH * BATCH
            batches = make_loader(assembly, shards, workers=workers).batches(0, len(shards) // BATCH)
            measured.append(measure_rate(batches))
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    return [
        make_ratio_row("late source", rates[1], rates[0], "of the local rate", at_least=0.8),
        make_ratio_row("late source, requests", Late.requests.value, samples, "a sample"),
        make_ratio_row("late source, bytes", Late.bytes.value, size, "of the shards", at_least=0.5),
        make_row("local rate, 2 workers", statistics.median(rates[0]), "samples/s"),
    ]


def main() -> int:
    """Print a table; exit with 1 if a row fails."""
    parser = argparse.ArgumentParser(description="Benchmark of the way from shards to batches.")
    parser.add_argument("--samples", type=int, default=640)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench_data"))
    threads = torch.get_num_threads()
    try:
        pattern = write_shards(folder, arguments.samples, 4)
        assembly = make_assembly()
        shards = Shards(pattern, caption_schema="dreamlip")
        shards.prepare()
        torch.set_num_threads(1)
        rows = measure_cpu(shards, *make_loading(assembly, shards), arguments.pairs)
        rows += measure_source(assembly, pattern, folder, max(1, arguments.pairs // 2))
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(folder, ignore_errors=True)
    return report(rows, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
