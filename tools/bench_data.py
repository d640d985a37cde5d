#!/usr/bin/env python3
"""From tar shards of 640 x 427 JPEGs to a batch, beside the plain way: python tools/bench_data.py [--json FILE].

The plain way decodes with PIL, cuts and changes colours with torchvision's transforms on PIL pictures, turns views
into floats in the worker and tokenises caption by caption. Ours leaves uint8 views and tokens to the trainer, and does
the photometric work batched; ``whole`` counts that work too, on the same core. One thread, paired runs, medians.
The last rows read the same shards from a source that takes 5 ms a request.
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
from bench import Row, report, row
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


# ---------------------------------------------------------------------------- the source that takes its time


class Late(LocalFileSystem):  # type: ignore[misc]
    """The local file system behind 5 ms a request; counts requests and bytes over all processes."""

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


def loader(assembly: Assembly, shards: Shards, workers: int) -> Loader:
    """Ours, over a data set."""
    order = Order(shards.shard_sizes, BATCH, lanes=4, shuffle_samples=1 << 18, seed=0)
    parts = {
        "image": assembly.augmenters["image"],
        "text": assembly.augmenters["text"],
        "tokenizer": assembly.tokenizer,
    }
    return Loader(shards, order, **parts, workers=workers)  # type: ignore[arg-type]


def rate(batches: Iterator[Any]) -> float:
    """Samples a second of all batches after the first, which waits for the workers to start."""
    next(batches)
    start, count = time.perf_counter(), 0
    for _ in batches:
        count += BATCH
    return count / (time.perf_counter() - start)


# ---------------------------------------------------------------------------- the figures


def measure_cpu(assembly: Assembly, shards: Shards, pairs: int) -> list[Row]:
    """Worker side and whole, one thread, in milliseconds a sample."""
    plain = Plain(shards)
    own = loader(assembly, shards, workers=0)
    steps = len(shards) // BATCH
    times: dict[str, list[float]] = {"plain": [], "worker": [], "whole": []}
    plain.batch(range(2))
    for number in range(pairs):
        start = time.perf_counter()
        plain.batch(range(BATCH))
        times["plain"].append(time.perf_counter() - start)
        start = time.perf_counter()
        (batch,) = own.batches(number % steps, number % steps + 1)
        times["worker"].append(time.perf_counter() - start)
        for group in batch.views.image.values():
            assembly.augmenters["image"].finish(group)
        times["whole"].append(time.perf_counter() - start)
    rows = []
    for title, name, goal in (("worker side", "worker", 4), ("whole, with photometric work", "whole", 1.9)):
        ratio = statistics.median(a / b for a, b in zip(times["plain"], times[name], strict=True))
        rows.append(row(title, ratio, "x plain", least=goal))
    return rows + [
        row(f"{name}, time", 1e3 * statistics.median(found) / BATCH, "ms a sample") for name, found in times.items()
    ]


def measure_source(assembly: Assembly, pattern: str, folder: Path, pairs: int) -> list[Row]:
    """Rates with two workers from the local disk and from the late source."""
    fsspec.register_implementation("late", Late, clobber=True)
    rates: tuple[list[float], list[float]] = ([], [])
    samples = 0
    for number in range(pairs):
        sources = pattern, f"late://{pattern}"
        for source, found in zip(sources, rates, strict=True):
            shards = Shards(source, caption_schema="dreamlip", cache_dir=str(folder / f"cache{number}"))
            shards.prepare()
            if source.startswith("late"):
                shutil.rmtree(folder / f"cache{number}" / "blocks")  # what the look at captions has fetched
                (folder / f"cache{number}" / "blocks").mkdir()
                Late.requests.value = Late.bytes.value = 0
            samples = len(shards) // BATCH * BATCH
            found.append(rate(loader(assembly, shards, workers=2).batches(0, len(shards) // BATCH)))
    ratio = statistics.median(b / a for a, b in zip(*rates, strict=True))
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    return [
        row("late source", ratio, "of the local rate", least=0.8),
        row("late source, requests", Late.requests.value / samples, "a sample"),
        row("late source, bytes", Late.bytes.value / size, "of the shards"),
        row("local rate, 2 workers", statistics.median(rates[0]), "samples/s"),
    ]


def main() -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(description="Benchmark of the way from shards to batches.")
    parser.add_argument("--samples", type=int, default=640)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench_data"))
    threads = torch.get_num_threads()
    try:
        pattern = write_shards(folder, arguments.samples, 4)
        assembly = Builder(load_config("cosmos/vitb16_cc3m.yaml", ["evaluators=null"])).assemble("check")
        shards = Shards(pattern, caption_schema="dreamlip")
        shards.prepare()
        torch.set_num_threads(1)
        rows = measure_cpu(assembly, shards, arguments.pairs)
        rows += measure_source(assembly, pattern, folder, max(1, arguments.pairs // 2))
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(folder, ignore_errors=True)
    report(rows, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
