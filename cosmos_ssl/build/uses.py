"""What is done with a trained model, by the name of its checkpoint: ``cosmos_ssl.embed``, ``attend`` and ``export``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from cosmos_ssl import __version__
from cosmos_ssl.build.reading import load, open_model
from cosmos_ssl.build.weights import Source, find_source, roles_of
from cosmos_ssl.config import load_config
from cosmos_ssl.config.ranks import started_ranks
from cosmos_ssl.engine.distributed import SHARING, as_run_errors, joined_world, pick_device
from cosmos_ssl.engine.metrics import read_rows
from cosmos_ssl.engine.run_folder import RunFolder
from cosmos_ssl.errors import UserError
from cosmos_ssl.evaluation import embedding
from cosmos_ssl.evaluation.attending import draw_page, opened_pictures, pair
from cosmos_ssl.evaluation.attention_maps import has_attention
from cosmos_ssl.evaluation.embedding_input import What, open_samples
from cosmos_ssl.evaluation.embedding_output import check_output
from cosmos_ssl.evaluation.samples import threads_of_this_process
from cosmos_ssl.files import checkpoint_step, storage_faults
from cosmos_ssl.functional import world_size
from cosmos_ssl.functional.together import from_first
from cosmos_ssl.interop.export import export as write_form
from cosmos_ssl.interop.forms import FORMS
from cosmos_ssl.interop.model_card import Origin
from cosmos_ssl.interop.programs.writing import check_packages
from cosmos_ssl.interop.publish import check_account, publish
from cosmos_ssl.models.encoder import ModelEncoder


def _no_progress(done: int, total: int) -> None:
    pass


def _absolute(name: str) -> str:
    """The name of data, or several that ``::`` joins, as it can be read from any folder."""
    parts = (part if "://" in part else str(Path(part).expanduser().absolute()) for part in name.split("::"))
    return "::".join(parts)


def rank_device(device: str) -> str:
    """The device as ranks are asked for it. Raises UserError where several would have the same one."""
    if started_ranks() > 1 and device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: each rank has a device of its own. Give auto, cpu or cuda")
    return device


def check_embedding(model: str | Path, data: Sequence[str], output: Path, *, what: What | None = None) -> None:
    """Raise what ``embed`` would of what can be seen before a model is read; what is fetched or indexed is kept."""
    find_source(model)
    check_output(output, _what(data, open_samples(data)[1], what))


def _what(names: Sequence[str], usual: What, wanted: What | None) -> What:
    """What is embedded of data that usually is ``usual``. Raises UserError for pictures of texts."""
    if usual == "text" and wanted not in (None, "text"):
        raise UserError(f"--what {wanted}: {names[0]} holds texts alone")
    return wanted or usual


def embed(
    model: str | Path | ModelEncoder,
    data: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    what: What | None = None,
    texts: str = "txt",
    dtype: str = "float32",
    batch_size: int = 256,
    workers: int | None = None,
    overwrite: bool = False,
    which: str = "student",
    device: str = "auto",
    overrides: Sequence[str] = (),
    trust_code: bool = False,
    progress: Callable[[int, int], None] = _no_progress,
) -> embedding.Report:
    """Write unit vectors of a folder of pictures, picture files, shards, or the lines of a text file, as ``cosmos-ssl
    embed`` does.

    ``model`` is what ``evaluate`` takes; ``output`` ends in ``.parquet``, or in ``.npy`` (with its ``.keys.txt`` and
    ``.meta.json``). ``what`` is ``image``, ``text`` or ``both`` (None: ``text`` of a text file, else ``image``),
    ``texts`` the captions of shards: ``txt``, or a field of the JSON. The same call again continues what was
    interrupted. Under torchrun or srun all ranks share the work, and all return when the file is there. Raises
    UserError for what cannot be used, and where ``output`` holds other embeddings (unless ``overwrite``); StorageError.
    """
    names = [str(one) for one in ([data] if isinstance(data, str | Path) else data)]
    with joined_world(rank_device(device), wait=SHARING), as_run_errors(), storage_faults("embed: storage fails"):
        samples, usual = open_samples(names)
        what = _what(names, usual, what)
        source: str | Path | Source | ModelEncoder = model
        if world_size() > 1 and not isinstance(model, ModelEncoder):
            device = str(pick_device(device))
            found = from_first(lambda: find_source(model))  # one rank fetches; all read the same checkpoint
            source = found if found.folder is not None else find_source(model)
        encoder, checkpoint = open_model(source, which, device=device, overrides=overrides, trust_code=trust_code)
        request = embedding.Request(
            samples=samples,
            what=what,
            texts=texts,
            dtype=dtype,
            batch_size=batch_size,
            workers=workers or threads_of_this_process(),
            overrides=overrides,
            about={
                "checkpoint": checkpoint,
                "which": which,
                "cosmos_ssl": __version__,
                "data": list(map(_absolute, names)),
            },
        )
        return embedding.embed(encoder, request, Path(output), overwrite=overwrite, progress=progress)


def attend(
    model: str | Path | ModelEncoder,
    images: str | Path | Sequence[str | Path],
    texts: str | Sequence[str] = (),
    *,
    output: str | Path,
    segment: Sequence[str] = (),
    all_pairs: bool = False,
    which: str = "student",
    device: str = "auto",
    overrides: Sequence[str] = (),
    trust_code: bool = False,
) -> Path:
    """Draw where words look in pictures and pictures in words, or zero-shot segmentation, as ``cosmos-ssl attend``
    does; its page.

    ``model`` is what ``evaluate`` takes; ``images`` are files; ``texts`` one for each of them, one for all, or all with
    all of them (``all_pairs``); ``segment`` are class names, by which each place of a picture is coloured. ``output``
    is a folder that gets ``index.html``, ``grid.png`` and a picture of each. Raises UserError, StorageError.
    """
    paths = [Path(image) for image in ([images] if isinstance(images, str | Path) else images)]
    said = [texts] if isinstance(texts, str) else list(texts)
    if not said and not segment:
        raise UserError("--text or --segment: give at least one text, or class names such as --segment 'cat,grass,sky'")
    if len(segment) == 1 or isinstance(segment, str):
        raise UserError(f"--segment '{''.join(segment)}': name at least two classes, such as 'cat,grass,sky'")
    pairs = pair(len(paths), len(said), all_pairs=all_pairs) if said else []
    opened = opened_pictures(paths)
    encoder, checkpoint = open_model(model, which, device=device, overrides=overrides, trust_code=trust_code)
    if pairs and not has_attention(encoder):
        raise UserError(
            f"{checkpoint} has no cross-attention head, so no text looks at a picture in it. --segment works "
            "without one; --text does not"
        )
    told = [(image, said[text]) for image, text in pairs]
    return draw_page(encoder, opened, told, segment, Path(output), subtitle=f"{checkpoint}, {which}")


class Exported(NamedTuple):
    """What was written for another library."""

    roles: tuple[str, ...]
    notes: list[str]
    """For people: what the other library does otherwise."""


def export(
    model: str | Path | ModelEncoder,
    form: str,
    output: str | Path | None = None,
    *,
    which: str | None = None,
    licence: str = "other",
    push: str | None = None,
    private: bool = False,
    overrides: Sequence[str] = (),
    trust_code: bool = False,
) -> Exported:
    """Write a model for another library, or as programs, as ``cosmos-ssl export`` does.

    ``form`` is ``openclip``, ``huggingface``, ``timm``, ``official``, ``onnx`` or ``torch``, ``output`` a new or empty
    folder. ``which`` None is the student; of the official form, all roles that are there. ``licence`` is the hub's
    identifier for the card, such as ``mit``. ``push``, ``ORG/NAME``, also uploads the folder to the Hugging Face hub,
    where nobody else sees it if it is ``private``; then ``output`` may be None. Raises UserError for what the form has
    no place for, and for what the hub refuses.
    """
    if form not in FORMS:
        raise UserError(f"--format {form}: give one of {', '.join(FORMS)}")
    if output is None and push is None:
        raise UserError("--output: give a folder, or --push ORG/NAME")
    check_packages(form)
    if push is not None:
        check_account(push)
    models, roles, origin = _opened(model, form, which, overrides=overrides, trust_code=trust_code)
    origin = replace(origin, licence=licence, repository=push)
    with ExitStack() as stack:
        made = Path(output or Path(stack.enter_context(TemporaryDirectory())) / origin.name.replace("/", "_"))
        notes = write_form(models, form, made, origin)
        if push is not None:
            notes.append(f"on the hub: {publish(made, push, private=private)}")
    return Exported(roles, notes)


def _opened(
    model: str | Path | ModelEncoder, form: str, which: str | None, *, overrides: Sequence[str], trust_code: bool
) -> tuple[dict[str, ModelEncoder], tuple[str, ...], Origin]:
    """The models to write, by the names that they get, the roles that they are, and where they come from."""
    if isinstance(model, ModelEncoder):
        role = which or "student"
        return {role: model}, (role,), Origin(name="model", checkpoint="a loaded model")
    source = find_source(model)
    roles: tuple[str, ...] = roles_of(source) if form == "official" and which is None else (which or "student",)
    models = {role: load(source, role, overrides=overrides, trust_code=trust_code) for role in roles}
    if form == "official" and not set(roles) <= {"student", "teacher"}:  # a callback's: the form has no other name
        models = {"student": models[roles[0]]}
    return models, roles, _origin(str(model), source)


def _origin(given: str, source: Source) -> Origin:
    """The name of a model and, of a run's, its config and what was logged; where what was read is its run's last
    checkpoint, the results of the run, too.
    """
    run = source.run
    if source.folder is None or run is None:
        return Origin(name=Path(given).stem or "model", checkpoint=given)
    files = RunFolder(run)
    result, config = files.result(), load_config(run / "config.yaml", reading=True).config
    step = checkpoint_step(source.folder) or 0
    return Origin(
        name=config.name,
        checkpoint=f"{config.name}, step {step:,}",
        metrics=result["metrics"] if result is not None and result["step"] == step else {},
        recipe=config.model_dump(),
        history=[row for row in read_rows(files.metrics) if row["step"] <= step],
    )
