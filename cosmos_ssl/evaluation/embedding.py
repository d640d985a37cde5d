"""Embeddings of pictures and texts as a file: computed part by part, so that a job that was killed goes on where it
was.

Beside the output lies ``OUTPUT.parts/`` while the work lasts: ``job.json`` says what is computed from what, each part
is a file that is either whole or not there, and at the end the output is put together from them under a temporary name.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosmos_ssl.api import BadSample, DataError, UserError
from cosmos_ssl.evaluation.embedding_io import Row, What, WithSource, check_output, read_meta, write_embeddings
from cosmos_ssl.evaluation.features import check_finite, weights_digest
from cosmos_ssl.evaluation.samples import Sources, read_ahead
from cosmos_ssl.files import storage_error, written_whole
from cosmos_ssl.models.encoder import ModelEncoder

_PARTS = 1024  # at most: more files than this slow a shared file system down
_PART = re.compile(r"job\.json|\d{6}\.npz|tmp\w+\.part|\.nfs\w+")
Bad: TypeAlias = tuple[str, str]
"""A sample that cannot be used: its reason, and its key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is computed from what, and how."""

    samples: WithSource
    what: What
    texts: str = "txt"
    """The captions that are texts: ``txt``, or a field of the JSON."""
    dtype: str = "float32"
    batch_size: int = 256
    workers: int = 4
    """Threads that read and decode."""
    overrides: Sequence[str] = ()
    """Those of the model's config: with its weights they make it what it is."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What else the output says of the model."""

    def identity(self, encoder: ModelEncoder) -> dict[str, Any]:
        """All that the numbers depend on, as JSON holds it; ``data.files`` are sizes and times."""
        data = {
            f"data.{name}": value
            for name, value in {**self.samples.identity(), "files": Sources(self.samples).digest()}.items()
        }
        options = {"what": self.what, "texts": self.texts, "dtype": self.dtype}
        return {"weights": weights_digest(encoder.model), "overrides": list(self.overrides), **options, **data}

    @property
    def part_size(self) -> int:
        """Samples of a part: a batch, or several where there would be more than a thousand parts."""
        return self.batch_size * max(1, -(-len(self.samples) // (self.batch_size * _PARTS)))

    @property
    def parts(self) -> list[range]:
        """The samples of each part."""
        return [
            range(start, min(start + self.part_size, len(self.samples)))
            for start in range(0, len(self.samples), self.part_size)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What became of a job."""

    samples: int
    rows: int
    width: int
    """Numbers of a row."""
    bad: Mapping[str, tuple[int, str]]
    """Reason -> samples left out for it, and the key of the first."""
    kept: int
    """Samples that an earlier start of the job had embedded."""


def _silent(done: int, total: int) -> None:
    pass


def embed(
    encoder: ModelEncoder,
    job: Job,
    output: Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = _silent,
) -> Report:
    """Write unit vectors of all samples to ``output``: ``.parquet``, or ``.npy`` with its ``.keys.txt`` and
    ``.meta.json``.

    Started again after it was killed, it goes on at the next part. Raises UserError where ``output`` or what lies
    beside it belongs to another job (unless ``overwrite``), or vectors are not finite; DataError where not one sample
    can be used, or where files change meanwhile; OSError.
    """
    check_output(output, job.what)
    for modality in ("image", "text"):
        if job.what in (modality, "both") and modality not in encoder.model.towers:
            raise UserError(f"--what {job.what}: this model has no {modality} tower")
    folder = output.with_name(f"{output.name}.parts")
    identity = job.identity(encoder)
    with _alone(output):
        done = None if overwrite else read_meta(output)
        if done is not None:
            _check_same(done.get("job", {}), identity, f"{output} holds other embeddings")
            if _beginning(folder) is not None:  # killed between the last two lines of a job
                shutil.rmtree(folder, ignore_errors=True)
            bad = {reason: (count, key) for reason, (count, key) in done["bad"].items()}
            count, width = len(job.samples), encoder.spec.embed_dim
            return Report(samples=count, rows=done["rows"], width=width, bad=bad, kept=count)
        kept = _claim(folder, {**identity, "part_size": job.part_size}, overwrite)
        _compute(encoder, job, folder, progress)
        if Sources(job.samples).digest() != identity["data.files"]:
            shutil.rmtree(folder)
            raise DataError(
                "data: files were changed while they were embedded, and nothing is written. Run the same command again"
            )
        report = _assemble(folder, job, output, identity, sum(len(job.parts[part]) for part in kept))
        shutil.rmtree(folder)
    return report


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Raise UserError while another process writes the same output."""
    from filelock import FileLock, Timeout

    path = output.with_name(f".{output.name}.lock")
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(f"{output} is being written by another process") from error
    except NotImplementedError:  # a file system without locks
        yield
        return
    except OSError as error:
        raise storage_error(error, f"--output {output} cannot be written") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def _claim(folder: Path, job: Mapping[str, Any], overwrite: bool) -> list[int]:
    """Make the folder of this job's parts, or find it there; the numbers of the parts in it."""
    path = folder / "job.json"
    there = _beginning(folder)
    if there and there != job:
        if not overwrite:
            _check_same(there, job, f"{folder} holds the beginning of another job")
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    for left in folder.glob("*.part"):  # of a process that was killed while it wrote
        left.unlink()
    if not path.exists():
        with written_whole(path) as file:
            file.write(json.dumps(job, indent=2).encode())
    return [int(part.stem) for part in folder.glob("*.npz")]


def _beginning(folder: Path) -> dict[str, Any] | None:
    """The job that ``folder`` is the beginning of, empty where nothing is told yet; None where there is none.

    Raises UserError for what is no such folder: nothing of somebody else's is ever removed.
    """
    if not folder.is_symlink() and not folder.exists():
        return None
    found: Any = None
    if not folder.is_symlink() and folder.is_dir() and all(_PART.fullmatch(path.name) for path in folder.iterdir()):
        if not (path := folder / "job.json").exists():
            return {}  # killed as it began
        with suppress(OSError, ValueError):
            found = json.loads(path.read_bytes())
    if not isinstance(found, dict) or "part_size" not in found:
        raise UserError(
            f"{folder} is no beginning of embeddings, or its job.json is damaged. Move it away, or give another output"
        )
    return found


def _check_same(there: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
    names = [name for name in {**there, **wanted} if there.get(name) != wanted.get(name)]
    if names:
        changes = ", ".join(f"{name}: {_short(there.get(name))} -> {_short(wanted.get(name))}" for name in names)
        raise UserError(f"{what} ({changes}). Give another output, or --overwrite")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:8]}..."


# ---------------------------------------------------------------------------- parts


class _Loaded(NamedTuple):
    """One sample as it is encoded: its rows, of which the first is the picture's where there is one."""

    rows: Sequence[Row]
    pixels: Tensor | None


class _Part(NamedTuple):
    """What was computed of one part."""

    vectors: NDArray[Any]
    rows: list[Row]
    bad: list[Bad]


def _compute(encoder: ModelEncoder, job: Job, folder: Path, progress: Callable[[int, int], None]) -> None:
    """Write every part that is not there yet."""
    todo = [(part, indices) for part, indices in enumerate(job.parts) if not _path(folder, part).exists()]
    batches = [
        (part, indices[at : at + job.batch_size])
        for part, indices in todo
        for at in range(0, len(indices), job.batch_size)
    ]
    done = len(job.samples) - sum(len(indices) for _, indices in todo)
    progress(done, len(job.samples))
    held: list[_Part] = []
    with closing(read_ahead(batches, partial(_load, encoder, job), job.workers)) as loaded:
        for number, (part, results) in enumerate(loaded, 1):
            held.append(_encode(encoder, job, results))
            if number == len(batches) or batches[number][0] != part:
                _write(_path(folder, part), held)
                held = []
            done += len(results)
            progress(done, len(job.samples))


def _load(encoder: ModelEncoder, job: Job, index: int) -> _Loaded | Bad:
    """Sample ``index``, decoded; or why it cannot be used."""
    source = job.samples.describe(index)
    key = f"sample {index} of {source}"
    try:
        sample = job.samples.read(index)
        key = sample.key
        pixels = None if job.what == "text" else encoder.preprocess(sample.on(encoder.spec.background).decode())
        rows = [] if pixels is None else [Row(key, source, "image", None)]
        if job.what != "image":
            texts = sample.captions.get(job.texts, ())
            if not texts:
                there = f" (it has: {', '.join(sample.captions)})" if sample.captions else ""
                return "no text" if job.texts == "txt" else f"no text '{job.texts}'", f"{key}{there}"
            rows += [Row(key, source, "text", text) for text in texts]
        return _Loaded(rows, pixels)
    except BadSample as error:
        return error.reason, key


def _encode(encoder: ModelEncoder, job: Job, results: Sequence[_Loaded | Bad]) -> _Part:
    """The vectors of one batch, in the order of its rows."""
    good = [result for result in results if isinstance(result, _Loaded)]
    bad = [result for result in results if not isinstance(result, _Loaded)]
    rows = [row for loaded in good for row in loaded.rows]
    pixels = [loaded.pixels for loaded in good if loaded.pixels is not None]
    texts = [row.text for row in rows if row.text is not None]
    images = iter(encoder.encode_image(torch.stack(pixels)).cpu() if pixels else ())
    starts = range(0, len(texts), job.batch_size)
    said = (
        row for at in starts for row in encoder.encode_text(encoder.tokenize(texts[at : at + job.batch_size])).cpu()
    )
    vectors = [next(images if row.text is None else said) for row in rows]
    found = torch.stack(vectors) if vectors else torch.empty(0, encoder.spec.embed_dim)
    check_finite(found, "samples")
    return _Part(found.numpy().astype(job.dtype), rows, bad)


def _path(folder: Path, part: int) -> Path:
    return folder / f"{part:06d}.npz"


def _write(path: Path, batches: Sequence[_Part]) -> None:
    """Write a part; it is never there by half."""
    notes = {
        "rows": [row for batch in batches for row in batch.rows],
        "bad": [item for batch in batches for item in batch.bad],
    }
    with written_whole(path) as file:
        vectors = np.concatenate([batch.vectors for batch in batches])
        np.savez(file, vectors=vectors, notes=np.frombuffer(json.dumps(notes).encode(), np.uint8))


def _read(path: Path) -> _Part:
    """A part from its file. One that storage has damaged is removed, and StorageError says so."""
    try:
        with np.load(path, allow_pickle=False) as part:
            notes = json.loads(part["notes"].tobytes())
            return _Part(
                part["vectors"], [Row(*row) for row in notes["rows"]], [(reason, key) for reason, key in notes["bad"]]
            )
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
        path.unlink()
        raise OSError(f"{path} was damaged and has been removed. Run the same command again") from error


def _assemble(folder: Path, job: Job, output: Path, identity: Mapping[str, Any], kept: int) -> Report:
    """Put the parts together. Raises DataError where there is nothing in them."""
    paths = [_path(folder, part) for part in range(len(job.parts))]
    bad: dict[str, tuple[int, str]] = {}
    count = width = 0
    for part in map(_read, paths):
        count, width = count + len(part.rows), part.vectors.shape[1]
        for reason, key in part.bad:
            seen, first = bad.get(reason, (0, key))
            bad[reason] = (seen + 1, first)
    if not count:
        shutil.rmtree(folder)
        reasons = ", ".join(f"{number:,} {reason}, such as {key}" for reason, (number, key) in bad.items())
        raise DataError(
            f"data: not one of {len(job.samples):,} samples can be embedded ({reasons or 'there are none'})"
        )
    meta = {**job.about, "job": identity, "rows": count, "bad": bad}
    write_embeddings(output, ((part.vectors, part.rows) for part in map(_read, paths)), (count, width), job.dtype, meta)
    return Report(samples=len(job.samples), rows=count, width=width, bad=bad, kept=kept)
