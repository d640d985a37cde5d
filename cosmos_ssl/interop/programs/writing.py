"""Towers traced by ``torch.export``, written as its programs or as ONNX, loaded again and compared with the model."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cosmos_ssl.api import Modality, UserError
from cosmos_ssl.api.part import describe
from cosmos_ssl.errors import first_line
from cosmos_ssl.interop.programs import inputs
from cosmos_ssl.interop.programs.towers import INPUTS, on_host, plain_tower, towers_of
from cosmos_ssl.models.encoder import ModelEncoder

BOUND = 1e-4
"""The largest difference of a number in a unit feature that a written program may have."""
OUTPUT = "features"
SUFFIX = {"onnx": ".onnx", "torch": ".pt2"}
_ONE_FILE = 1_800_000_000
"""Bytes of weights that go into the ONNX file itself, whose format ends at 2 GiB; of larger models they lie beside."""
_TEXTS = ("a photo of a cat", "", "many words, " * 60)
_NOISY = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")

Run = Callable[[Tensor], Tensor]


class Written(NamedTuple):
    """What was written."""

    modalities: list[Modality]
    tokenizer: bool
    """Whether a file says how texts become tokens."""
    notes: list[str]


def check_packages(form: str) -> None:
    """Raise UserError where packages that writing needs are not installed."""
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None] if form == "onnx" else []
    if missing:
        raise UserError(f"--format onnx needs {' and '.join(missing)}. Run: pip install 'cosmos-ssl[onnx]'")


def write(encoder: ModelEncoder, form: str, folder: Path) -> Written:
    """Write each tower as ``image`` and ``text`` with the form's suffix, and what their inputs need beside them.

    The batch is of any size, pictures and contexts are of the model's. Raises UserError for a tower that cannot be
    traced, and for one whose program says something else than the model.
    """
    check_packages(form)
    host, notes = on_host(encoder), []
    for modality in (modalities := towers_of(host)):
        path = folder / f"{modality}{SUFFIX[form]}"
        with _quiet(), torch.no_grad():
            program = _traced(host, modality)
            about, run = (_write_onnx if form == "onnx" else _write_torch)(program, modality, path)
            worst = None if run is None else _compare(host, modality, run)
        if worst is None:
            notes.append(f"{path.name}: {about}; not compared with the model, since onnxruntime is not installed")
            continue
        if not worst <= BOUND:  # a NaN too
            raise UserError(f"model.{modality} cannot be written as {form}: features differ by {worst:.1e}")
        notes.append(f"{path.name}: {about}; the largest difference of a number in a unit feature is {worst:.1e}")
    tokenizer, told = inputs.write(host, folder)
    return Written(modalities, tokenizer, [*notes, *told])


def _traced(encoder: ModelEncoder, modality: Modality) -> torch.export.ExportedProgram:
    """A tower's program, of any number of pictures or texts. Raises UserError."""
    tower, name = plain_tower(encoder, modality), INPUTS[modality]
    batch = {name: {0: torch.export.Dim("batch")}}
    try:
        program = torch.export.export(tower, (_example(encoder, modality, 2),), dynamic_shapes=batch, strict=False)
    except Exception as error:  # whatever another package's forward pass does that no program can
        told = describe(encoder.model.towers[modality], f"model.{modality}")
        raise UserError(f"{told} cannot be written as a program: {first_line(error)}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # lines of this machine's files are nobody's business
    return program


def _write_torch(program: torch.export.ExportedProgram, modality: Modality, path: Path) -> tuple[str, Run]:
    torch.export.save(program, path)
    module: nn.Module = torch.export.load(path).module()
    return f"torch.export of torch {torch.__version__}", module


def _write_onnx(program: torch.export.ExportedProgram, modality: Modality, path: Path) -> tuple[str, Run | None]:
    try:
        made = torch.onnx.export(
            program, (), dynamo=True, input_names=[INPUTS[modality]], output_names=[OUTPUT], verbose=False
        )
    except Exception as error:  # an operation that ONNX has not
        raise UserError(f"model.{modality} cannot be written as onnx: {first_line(error)}") from error
    assert made is not None
    made.model.graph.name = modality
    for value in (made.model.graph.inputs[0], made.model.graph.outputs[0]):
        value.shape = _named(value.shape)
    weights = sum(x.numel() * x.element_size() for x in program.state_dict.values())
    made.save(path, external_data=weights > _ONE_FILE)
    opset = made.model.opset_imports[""]
    if find_spec("onnxruntime") is None:
        return f"opset {opset}", None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {INPUTS[modality]: x.numpy()})[0])

    return f"opset {opset}, run by onnxruntime {version('onnxruntime')}", run


def _named(shape: Any) -> Any:
    """A shape whose first size is called ``batch``."""
    import onnx_ir

    return onnx_ir.Shape(["batch", *list(shape)[1:]])


def _compare(encoder: ModelEncoder, modality: Modality, run: Run) -> float:
    """The largest difference of a number in the unit features of one, two and three pictures or texts."""
    encode = encoder.encode_image if modality == "image" else encoder.encode_text
    given = [_example(encoder, modality, batch) for batch in (1, 2, 3)]
    return max((run(x) - encode(x)).abs().max().item() for x in given)


def _example(encoder: ModelEncoder, modality: Modality, batch: int) -> Tensor:
    """Random pixels; a text of the usual kind, an empty one and one too long, or random tokens without a tokenizer."""
    generator = torch.Generator().manual_seed(batch)
    if modality == "image":
        return torch.randn(batch, 3, *[encoder.model.towers[modality].spec.image_size] * 2, generator=generator)
    if encoder.tokenizer is not None:
        return encoder.tokenize(_TEXTS[:batch])
    rows = encoder.model.towers[modality].spec.vocab_size
    return torch.randint(1, max(rows, 2), (batch, encoder.spec.context_length), generator=generator)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' remarks on their own work from the terminal."""
    loggers: Sequence[logging.Logger] = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
