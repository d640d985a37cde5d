"""Embeddings as a file, put together from a resumable store beside it, ``OUTPUT.parts/``, which goes at the end."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cosmos_ssl.api import BadSample, DataError, UserError
from cosmos_ssl.evaluation.embedding_input import What, WithSource
from cosmos_ssl.evaluation.embedding_output import Row, Rows, check_output, read_meta, write_embeddings
from cosmos_ssl.evaluation.feature_store import FeatureStore, check_same
from cosmos_ssl.evaluation.features import Bad, Job, check_finite, part_size, pieces, weights_digest
from cosmos_ssl.evaluation.samples import Sources
from cosmos_ssl.files import storage_error
from cosmos_ssl.functional import gather_objects, rank
from cosmos_ssl.functional.together import from_first
from cosmos_ssl.liveness import OnProgress
from cosmos_ssl.models.encoder import ModelEncoder

_SEEN = 60.0
"""Seconds that a rank waits until it sees what the first has written: network file systems remember for as long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is embedded, and how."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What became of a request."""

    samples: int
    rows: int
    width: int
    """Numbers of a row."""
    bad: Mapping[str, tuple[int, str]]
    """Reason -> samples left out for it, and the key of the first."""
    kept: int
    """Samples that an earlier start had embedded."""


def embed(
    encoder: ModelEncoder,
    request: Request,
    output: Path,
    *,
    overwrite: bool = False,
    progress: OnProgress = lambda done, total: None,
) -> Report:
    """Write unit vectors of all samples to ``output``: ``.parquet``, or ``.npy`` with its ``.keys.txt`` and
    ``.meta.json``.

    Started again after it was killed, it goes on where it was, on any number of ranks. All ranks call this, and read
    and write the same folders; each embeds the piece that it is ready for next, the first puts them together, and what
    is written does not depend on their number. Raises UserError where ``output`` or what lies beside it belongs to
    another job (unless ``overwrite``), vectors are not finite, or ranks do not see the same; DataError where not one
    sample can be used, or where files change meanwhile; OSError.
    """
    check_output(output, request.what)
    for modality in ("image", "text"):
        if request.what in (modality, "both") and modality not in encoder.model.towers:
            raise UserError(f"--what {request.what}: this model has no {modality} tower")
    store = FeatureStore(output.with_name(f"{output.name}.parts"), needed=True)
    with _alone(output):
        identity = from_first(lambda: request.identity(encoder))
        size = part_size(len(request.samples), request.batch_size)
        job = {**identity, "part_size": size}

        def begin() -> Report | None:
            if (report := _whole(encoder, request, output, store, identity, overwrite=overwrite)) is None:
                store.claim(job, overwrite=overwrite)
            return report

        if (report := from_first(begin)) is not None:
            return report
        _check_same_everywhere(encoder, request, store, job)
        own = _compute(encoder, request, store, identity, progress)
        tallies = sorted(tally for theirs in gather_objects(own) for tally in theirs)
        report = _summed(tallies, len(request.samples), encoder.spec.embed_dim)
        from_first(lambda: _put_together(request, output, store, identity, report, tallies))
    return report


def _whole(
    encoder: ModelEncoder,
    request: Request,
    output: Path,
    store: FeatureStore,
    identity: Mapping[str, Any],
    *,
    overwrite: bool,
) -> Report | None:
    """What became of the request where its output is there already."""
    done = None if overwrite else read_meta(output)
    if done is None:
        return None
    check_same(done.get("job", {}), identity, f"{output} holds other embeddings")
    if store.beginning() is not None:  # killed between the last two lines of a job
        store.clear()
    bad = {reason: (count, key) for reason, (count, key) in done["bad"].items()}
    count, width = len(request.samples), encoder.spec.embed_dim
    return Report(samples=count, rows=done["rows"], width=width, bad=bad, kept=count)


def _put_together(
    request: Request,
    output: Path,
    store: FeatureStore,
    identity: Mapping[str, Any],
    report: Report,
    tallies: Sequence[_Tally],
) -> None:
    """Write the output of the pieces, which are then removed."""
    if Sources(request.samples).digest() != identity["data.files"]:
        store.clear()
        told = "data: files were changed while they were embedded, and nothing is written"
        raise DataError(f"{told}. Run the same command again")
    if not report.rows:
        store.clear()
        reasons = ", ".join(f"{number:,} {reason}, such as {key}" for reason, (number, key) in report.bad.items())
        told = f"data: not one of {report.samples:,} samples can be embedded"
        raise DataError(f"{told} ({reasons or 'there are none'})")
    meta = {**request.about, "job": identity, "rows": report.rows, "bad": report.bad}
    rows = _rows(store, [tally.name for tally in tallies])
    write_embeddings(output, rows, (report.rows, report.width), request.dtype, meta)
    store.clear()


def _check_same_everywhere(
    encoder: ModelEncoder, request: Request, store: FeatureStore, job: Mapping[str, Any]
) -> None:
    """Raise UserError on a rank that does not see the first rank's pieces, or has other weights or samples."""
    if rank() == 0:
        return
    end = time.monotonic() + _SEEN
    while not (there := store.beginning()) and time.monotonic() < end:
        time.sleep(0.1)
    place = f"rank {rank()} ({socket.gethostname()})"
    if there != job:
        told = f"{store.folder} is not the same folder for all ranks: {place} does not see what the first has begun"
        raise UserError(f"{told}. Give an --output on storage that they share")
    data = {f"data.{name}": value for name, value in request.samples.identity().items()}
    own = {"weights": weights_digest(encoder.model), **data}
    if strange := [name for name, value in own.items() if job.get(name) != value]:
        raise UserError(f"{place} has other {', '.join(strange)} than the first rank. Give what all ranks can read")


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Raise UserError on all ranks while another process writes the same output."""
    with ExitStack() as stack:
        from_first(lambda: stack.enter_context(_locked(output)))
        yield


@contextmanager
def _locked(output: Path) -> Iterator[None]:
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


class _Tally(NamedTuple):
    """What is known of a piece without its rows."""

    number: int
    name: str
    samples: int
    rows: int
    held: bool
    bad: dict[str, tuple[int, str]]
    """Reason -> samples left out for it, and the key of the first."""


class _Loaded(NamedTuple):
    """One sample as it is encoded: its rows, of which the first is the picture's where there is one."""

    rows: Sequence[Row]
    pixels: Tensor | None


def _compute(
    encoder: ModelEncoder,
    request: Request,
    store: FeatureStore,
    identity: Mapping[str, Any],
    progress: OnProgress,
) -> list[_Tally]:
    """Embed what this rank takes; what it knows of each piece that the store then holds."""

    def load(index: int) -> _Loaded | Bad:
        source = request.samples.describe(index)
        key = f"sample {index} of {source}"
        try:
            sample = request.samples.read(index)
            key = sample.key
            drawn = request.what != "text"
            pixels = encoder.preprocess(sample.on(encoder.spec.background).decode()) if drawn else None
        except BadSample as error:
            return Bad(index, key, error.reason)
        rows = [Row(key, source, "image", None)] if drawn else []
        if request.what != "image":
            texts = sample.captions.get(request.texts, ())
            if not texts:
                there = f" (it has: {', '.join(sample.captions)})" if sample.captions else ""
                return Bad(
                    index, f"{key}{there}", "no text" if request.texts == "txt" else f"no text '{request.texts}'"
                )
            rows += [Row(key, source, "text", text) for text in texts]
        return _Loaded(rows, pixels)

    def compute(loaded: Sequence[_Loaded]) -> tuple[Tensor, list[Any]]:
        rows = [row for one in loaded for row in one.rows]
        pixels = [one.pixels for one in loaded if one.pixels is not None]
        texts = [row.text for row in rows if row.text is not None]
        images = iter(encoder.encode_image(torch.stack(pixels)).cpu() if pixels else ())
        starts = range(0, len(texts), request.batch_size)
        said = (
            row
            for at in starts
            for row in encoder.encode_text(encoder.tokenize(texts[at : at + request.batch_size])).cpu()
        )
        vectors = torch.stack([next(images if row.text is None else said) for row in rows])
        check_finite(vectors, "samples")
        return vectors.to(getattr(torch, request.dtype)), [tuple(row) for row in rows]

    samples = range(len(request.samples))
    job = Job(store=store, batch_size=request.batch_size, workers=request.workers)
    tallies: list[_Tally] = []
    made = pieces(job, identity, samples, request.batch_size, load, compute, what="samples", in_turns=True)
    for number, name, piece, held in made:
        bad: dict[str, tuple[int, str]] = {}
        for _, key, reason in piece.bad:
            seen, first = bad.get(reason, (0, key))
            bad[reason] = (seen + 1, first)
        tallies.append(_Tally(number, name, len(piece.stamps), len(piece.notes), held, bad))
        if not held:  # the pieces before it are done, or other ranks are about them
            progress(min((number + 1) * part_size(len(samples), request.batch_size), len(samples)), len(samples))
    return tallies


def _summed(tallies: Sequence[_Tally], samples: int, width: int) -> Report:
    """What became of all pieces."""
    bad: dict[str, tuple[int, str]] = {}
    for tally in tallies:
        for reason, (count, key) in tally.bad.items():
            seen, first = bad.get(reason, (0, key))
            bad[reason] = (seen + count, first)
    rows, kept = sum(tally.rows for tally in tallies), sum(tally.samples for tally in tallies if tally.held)
    return Report(samples=samples, rows=rows, width=width, bad=bad, kept=kept)


def _rows(store: FeatureStore, names: Sequence[str]) -> Iterator[Rows]:
    for name in names:
        piece = store.get(name)
        if piece is None:
            raise OSError(f"{name}.pt in {store.folder} was damaged. Run the same command again")
        if piece.rows is not None:
            yield piece.rows.numpy(), [Row(*note) for note in piece.notes]
