"""Embeddings as a file, put together from a resumable store beside it, ``OUTPUT.parts/``, which goes at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from cosmos_ssl.liveness import OnProgress
from cosmos_ssl.models.encoder import ModelEncoder


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

    Started again after it was killed, it goes on where it was. Raises UserError where ``output`` or what lies beside
    it belongs to another job (unless ``overwrite``), or vectors are not finite; DataError where not one sample can be
    used, or where files change meanwhile; OSError.
    """
    check_output(output, request.what)
    for modality in ("image", "text"):
        if request.what in (modality, "both") and modality not in encoder.model.towers:
            raise UserError(f"--what {request.what}: this model has no {modality} tower")
    store = FeatureStore(output.with_name(f"{output.name}.parts"), needed=True)
    identity = request.identity(encoder)
    with _alone(output):
        done = None if overwrite else read_meta(output)
        if done is not None:
            check_same(done.get("job", {}), identity, f"{output} holds other embeddings")
            if store.beginning() is not None:  # killed between the last two lines of a job
                store.clear()
            bad = {reason: (count, key) for reason, (count, key) in done["bad"].items()}
            count, width = len(request.samples), encoder.spec.embed_dim
            return Report(samples=count, rows=done["rows"], width=width, bad=bad, kept=count)
        size = part_size(len(request.samples), request.batch_size)
        store.claim({**identity, "part_size": size}, overwrite=overwrite)
        report, names = _compute(encoder, request, store, identity, progress)
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
        write_embeddings(output, _rows(store, names), (report.rows, report.width), request.dtype, meta)
        store.clear()
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
) -> tuple[Report, list[str]]:
    """Return what becomes of the request, and the names of the pieces that the store then holds."""

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
    names: list[str] = []
    bad: dict[str, tuple[int, str]] = {}
    done = rows = kept = 0
    for name, piece, held in pieces(job, identity, samples, request.batch_size, load, compute, what="samples"):
        names.append(name)
        done, rows, kept = done + len(piece.stamps), rows + len(piece.notes), kept + held * len(piece.stamps)
        for _, key, reason in piece.bad:
            seen, first = bad.get(reason, (0, key))
            bad[reason] = (seen + 1, first)
        if not held:
            progress(done, len(samples))
    return Report(samples=len(samples), rows=rows, width=encoder.spec.embed_dim, bad=bad, kept=kept), names


def _rows(store: FeatureStore, names: Sequence[str]) -> Iterator[Rows]:
    for name in names:
        piece = store.get(name)
        if piece is None:
            raise OSError(f"{name}.pt in {store.folder} was damaged. Run the same command again")
        if piece.rows is not None:
            yield piece.rows.numpy(), [Row(*note) for note in piece.notes]
