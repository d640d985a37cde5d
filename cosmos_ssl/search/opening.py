"""An index of a folder of pictures, shards or a file of embeddings; what is not embedded yet is, into the user's cache.

The cache is ``search/`` in the project's cache folder: a file for each model's weights and data, named by a digest of
both. A job that was ended goes on where it was.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cosmos_ssl.api import BadSample, DataError, UserError
from cosmos_ssl.data.cache import cache_root, digest, lock
from cosmos_ssl.data.scan import spread
from cosmos_ssl.evaluation.embedding import Report, Request, embed
from cosmos_ssl.evaluation.embedding_input import What, WithSource, open_samples
from cosmos_ssl.evaluation.embedding_output import FORMATS, read_meta
from cosmos_ssl.evaluation.features import weights_digest
from cosmos_ssl.evaluation.samples import threads_of_this_process
from cosmos_ssl.files import storage_faults
from cosmos_ssl.liveness import OnStage
from cosmos_ssl.models.encoder import ModelEncoder
from cosmos_ssl.search.index import Index, Texts
from cosmos_ssl.search.nearest import ENGINES, Vectors, as_vectors

_LOOKED_AT = 16  # samples that are looked at for captions
_log = logging.getLogger("cosmos_ssl.search")


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """How pictures are opened for a search."""

    engine: str = "plain"
    """``plain`` or ``faiss``."""
    texts: str | None = None
    """The field of the captions; None is ``txt``, or the first that is there."""
    with_texts: bool = False
    """Embed the captions as well, so that texts are found for pictures."""
    batch_size: int = 256
    workers: int | None = None
    overrides: Sequence[str] = ()
    progress: OnStage = lambda what, done, total: None


class _Read(NamedTuple):
    """A file of embeddings."""

    vectors: Vectors
    keys: list[str]
    texts: list[str]
    """Of its rows that are texts, whose vectors are ``said``."""
    said: Vectors | None
    meta: Mapping[str, Any]

    @property
    def left_out(self) -> int:
        """Samples that could not be embedded."""
        return sum(count for count, _ in self.meta.get("bad", {}).values())


def open_index(
    encoder: ModelEncoder, data: Sequence[str], opening: Opening, *, pictures: Sequence[str] | None = None
) -> Index:
    """The index of ``data``: a folder of pictures, picture files, shards, or a file of ``cosmos-ssl embed``, whose
    pictures are those that it was made of unless ``pictures`` names them.

    Raises UserError for what cannot be searched, StorageError.
    """
    if "image" not in encoder.model.towers:
        raise UserError("search finds pictures, and this model has no image tower")
    file, read = _embeddings(data), None
    if file is not None:
        read = _read(file)
        _check_model(encoder, read, file)
        samples = _samples_of(read, pictures)
    elif pictures:
        raise UserError("--pictures: only for --data that is a file of embeddings; pictures and shards are their own")
    else:
        samples, kind = open_samples(data)
        if kind == "text":
            raise DataError(f"data: {data[0]} holds texts; name a folder of pictures, shards or a file of embeddings")
    field = None if samples is None else _caption_field(samples, opening.texts)
    if read is None:
        assert samples is not None
        read = _read(_embedded(encoder, samples, "image", "txt", opening))
    if not len(read.keys):
        raise UserError(f"data: {file} holds no embeddings of pictures. Run: cosmos-ssl embed --what image")
    engine = ENGINES[opening.engine]
    texts = None
    if read.said is not None:
        texts = Texts(nearest=engine(read.said), texts=read.texts)
    elif opening.with_texts and samples is not None and field is not None and "text" in encoder.model.towers:
        found = _read(_embedded(encoder, samples, "text", field, opening))
        assert found.said is not None
        texts = Texts(nearest=engine(found.said), texts=found.texts)
    return Index(engine(read.vectors), read.keys, samples=samples, left_out=read.left_out, captions=field, texts=texts)


def _embeddings(data: Sequence[str]) -> Path | None:
    """The file of embeddings that is named, or that is the only one of the folder that is named."""
    if len(data) != 1 or "://" in data[0]:
        return None
    path = Path(data[0]).expanduser()
    if path.suffix in FORMATS:
        if not path.is_file():
            raise DataError(f"data: {path}: there is no such file")
        return path
    if path.is_dir():
        found = sorted(file for form in FORMATS for file in path.glob(f"*{form}") if _is_ours(file))
        if len(found) > 1:
            raise DataError(f"data: {path} holds {len(found)} files of embeddings. Name one, such as {found[0]}")
        return found[0] if found else None
    return None


def _is_ours(file: Path) -> bool:
    try:
        return read_meta(file) is not None
    except UserError:
        return False


def _embedded(encoder: ModelEncoder, samples: WithSource, what: What, field: str, opening: Opening) -> Path:
    """The file of the cache that holds the embeddings of these samples, made or gone on with where it is not there."""
    request = Request(
        samples=samples,
        what=what,
        texts=field,
        batch_size=opening.batch_size,
        workers=opening.workers or threads_of_this_process(),
        overrides=opening.overrides,
    )
    with storage_faults("data cannot be read"):
        name = digest([json.dumps(request.identity(encoder), sort_keys=True)])
    folder = cache_root() / "search"
    output = folder / f"{name}.{'npy' if what == 'image' else 'parquet'}"
    damaged = output.exists() and not _is_ours(output)
    told = f"{'pictures' if what == 'image' else 'samples with texts'} embedded"
    with storage_faults(f"embeddings cannot be kept in {folder} (XDG_CACHE_HOME names another place)"):
        folder.mkdir(parents=True, exist_ok=True)
        with lock(output.with_suffix(".lock"), _tell_of_another):  # which waits too, and finds them
            report = embed(
                encoder,
                request,
                output,
                overwrite=damaged,
                progress=lambda done, total: opening.progress(told, done, total),
            )
    _tell(report)
    return output


def _tell_of_another() -> None:
    _log.warning("another search embeds the same data; this one waits for it")


def _tell(report: Report) -> None:
    if 0 < report.kept < report.samples:
        _log.warning("%s of %s samples had been embedded before", f"{report.kept:,}", f"{report.samples:,}")
    for reason, (count, key) in report.bad.items():
        _log.warning("%s of %s samples left out: %s, such as %s", f"{count:,}", f"{report.samples:,}", reason, key)


def _read(file: Path) -> _Read:
    """Raises UserError for what is no file of embeddings."""
    fault = f"data: {file} is no file that cosmos-ssl embed has written, or it is damaged"
    try:
        meta = read_meta(file)
        found = (_read_parquet if file.suffix == ".parquet" else _read_npy)(file, meta or {})
    except (UserError, ValueError, KeyError, TypeError, EOFError) as error:  # pyarrow's own errors are ValueErrors
        raise UserError(fault) from error
    if meta is None or found.vectors.ndim != 2 or len(found.vectors) != len(found.keys):
        raise UserError(fault)
    return found


def _read_npy(file: Path, meta: Mapping[str, Any]) -> _Read:
    array = np.load(file, mmap_mode="r", allow_pickle=False)
    vectors = array if array.dtype == np.float32 else as_vectors(array)
    lines = file.with_suffix(".keys.txt").read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    if meta["job"]["what"] == "text":
        return _Read(vectors[:0], [], lines, vectors, meta)
    return _Read(vectors, lines, [], None, meta)


def _read_parquet(file: Path, meta: Mapping[str, Any]) -> _Read:
    from pyarrow import parquet

    table = parquet.read_table(file, columns=["key", "modality", "text", "embedding"])
    column = table["embedding"].combine_chunks()
    vectors = as_vectors(column.flatten().to_numpy(zero_copy_only=False)).reshape(len(column), column.type.list_size)
    is_text = np.array(table["modality"].to_pylist()) == "text"
    keys = [key for key, text in zip(table["key"].to_pylist(), is_text, strict=True) if not text]
    texts = [text for text in table["text"].to_pylist() if text is not None]
    return _Read(vectors[~is_text], keys, texts, vectors[is_text] if is_text.any() else None, meta)


def _check_model(encoder: ModelEncoder, read: _Read, file: Path) -> None:
    """Raise UserError for embeddings of other weights: queries say nothing of these."""
    if read.meta.get("job", {}).get("weights") != weights_digest(encoder.model):
        of = ", ".join(str(read.meta[name]) for name in ("checkpoint", "which") if name in read.meta) or "other weights"
        raise UserError(f"data: {file} holds embeddings of {of}. Give that --checkpoint and --which, or embed again")


def _samples_of(read: _Read, pictures: Sequence[str] | None) -> WithSource | None:
    """What embeddings were made of; None where it is not there any more, or not the same."""
    names = pictures or read.meta.get("data")
    if not names:
        _log.warning("these embeddings do not tell where their pictures lie: hits are shown by key. See --pictures")
        return None
    try:
        samples, _ = open_samples(names)
        now = {f"data.{name}": value for name, value in samples.identity().items()}
    except (DataError, OSError) as error:
        if pictures:
            raise
        _log.warning("pictures of the embeddings cannot be read (%s): hits are shown by key. See --pictures", error)
        return None
    job = read.meta.get("job", {})
    if any(job[name] != now[name] for name in ("data.samples", "data.digest") if name in job and name in now):
        told = f"{', '.join(names)}: not the pictures that were embedded (names or numbers differ)"
        if pictures:
            raise UserError(f"--pictures {told}")
        _log.warning("%s: hits are shown by key. Embed again, or see --pictures", told)
        return None
    return samples


def _caption_field(samples: WithSource, wanted: str | None) -> str | None:
    """The field of the captions; None where there are none. Raises DataError without the ``wanted`` one."""
    seen: dict[str, None] = {}
    for place in spread(len(samples), _LOOKED_AT):
        try:
            captions = samples.read(place).captions
        except BadSample:
            continue
        seen |= dict.fromkeys(name for name, texts in captions.items() if texts)
    if wanted is not None and wanted not in seen:
        raise DataError(f"--texts {wanted}: samples have no such captions. They have: {', '.join(seen) or 'none'}")
    return wanted or ("txt" if "txt" in seen else next(iter(seen), None))
