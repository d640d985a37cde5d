"""``cosmos-ssl eval``: a trained or released checkpoint on the data of a task."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cosmos_ssl.cli.checkpoint import add_trust_code
from cosmos_ssl.cli.common import add_json, table, write_json
from cosmos_ssl.cli.progress import stages
from cosmos_ssl.errors import EXIT_DONE, CheckpointError, UserError, did_you_mean

if TYPE_CHECKING:
    import torch

    from cosmos_ssl.api import Role
    from cosmos_ssl.evaluation.features import Store
    from cosmos_ssl.evaluation.tasks import Options, Task
    from cosmos_ssl.models.encoder import ModelEncoder

TASKS = {
    "retrieval": "image-text retrieval: COCO (annotations/, val2017/), Flickr30k (Karpathy's split), shards, a folder with texts",
    "classification": "zero-shot: ImageNet (val/WNID/), the ten sets of torchvision's readers, a folder a class, shards with labels",
    "knn": "nearest neighbours on frozen features, of the same data and its training split",
    "linear_probe": "logistic regression on frozen features, likewise",
    "segmentation": "zero-shot, by SCLIP's protocol: VOC, Context, COCO, Cityscapes, ADE20K, shards with mask.png",
    "mmvp": "MMVP-VLM: which of two pictures a text is of (Questions.csv)",
    "sugarcrepe": "which of two texts a picture is of (add_att.json ..., COCO's val2017/)",
    "winoground": "both (examples.jsonl, images/)",
}
ROLES = ("student", "teacher")
_PRECISIONS = ("fp32", "bf16", "fp16")


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "eval",
        help="evaluate a trained or released checkpoint",
        description="Evaluate a checkpoint. An evaluation that was interrupted goes on when the same command is given again; "
        "under torchrun all ranks share the work. key=value overrides reach the model's config (model.text.heads=4).",
        epilog="tasks: " + "; ".join(f"{name} ({purpose})" for name, purpose in TASKS.items()),
    )
    kinds = "a run folder, one of its checkpoints, an official file, a released name, or an OpenCLIP model"
    parser.add_argument("--checkpoint", required=True, metavar="C", help=kinds)
    parser.add_argument("--task", required=True, metavar="T", help=", ".join(TASKS))
    parser.add_argument("--data", metavar="PATH", help="shards or a folder (default: what the run was evaluated on, with its options)")
    parser.add_argument("--which", choices=(*ROLES, "both"), help="whose weights (default: all that are there)")
    parser.add_argument("--set", dest="set_name", metavar="NAME", help="which known set, where the data holds several")
    parser.add_argument("--texts", metavar="FIELD", help="retrieval: txt, or a key of the JSON (default: txt)")
    parser.add_argument("--label", metavar="FIELD", help="member or key of the JSON with the class (default: cls)")
    parser.add_argument("--class-names", metavar="FILE", help="one a line, in the order of the labels (default: those of the data)")
    parser.add_argument("--templates", metavar="T", help="openai, simple, or one with {} (default: the set's own, else simple)")
    parser.add_argument("--train-data", metavar="PATH", help="knn, linear_probe: shards or a folder (default: the set's training split)")
    parser.add_argument("-k", type=_positive, metavar="N", help="knn: neighbours (default: 20)")
    parser.add_argument("--no-csa", dest="csa", action="store_false", help="segmentation: the last block attends as in training")
    parser.add_argument("--max-samples", type=_positive, metavar="N", help="only so many evenly spread samples")
    parser.add_argument("--max-train-samples", type=_positive, metavar="N", help="knn, linear_probe: likewise of the training samples")
    parser.add_argument("--allow-missing", action="store_true", help="leave out samples that are missing or cannot be read")
    parser.add_argument("--batch-size", type=_positive, default=256, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--workers", type=_positive, metavar="N", help="threads that decode (default: one a core, at most 8)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    parser.add_argument("--precision", choices=_PRECISIONS, default="fp32", help="of the model's arithmetic (default: %(default)s)")
    add_trust_code(parser)
    add_json(parser)
    parser.set_defaults(run=_eval, overrides=[])


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above zero")
    return int(text)


def _eval(arguments: argparse.Namespace) -> int:
    if arguments.task not in TASKS:
        raise UserError(f"--task: no task named '{arguments.task}'.{did_you_mean(arguments.task, list(TASKS))} Tasks: {', '.join(TASKS)}")
    if arguments.json and not arguments.json.parent.is_dir():
        raise UserError(f"--json {arguments.json}: there is no folder {arguments.json.parent}")
    from cosmos_ssl.engine.distributed import World, joined_world, named_losses

    with joined_world(arguments.device), named_losses():
        checkpoint, set_name, metrics = _evaluate(arguments)
        if World().first:
            _report(arguments, checkpoint, set_name, metrics)
    return EXIT_DONE


def _evaluate(arguments: argparse.Namespace) -> tuple[str, str, dict[str, float]]:
    """What was read, the known set that the data is, and the metrics of all roles as ``ROLE/NAME``."""
    from cosmos_ssl.build import load
    from cosmos_ssl.engine.distributed import World, pick_device
    from cosmos_ssl.evaluation.features import Job
    from cosmos_ssl.evaluation.tasks import TASKS as FUNCTIONS
    from cosmos_ssl.evaluation.tasks import check_model

    checkpoint = _found(arguments.checkpoint)
    evaluator = {} if arguments.data else _evaluator_of_run(checkpoint, arguments.task)
    metrics: dict[str, float] = {}
    task: Task | None = None
    jobs: list[Job] = []
    with stages(shown=World().first) as told:
        for role in _roles(checkpoint, arguments.which):
            given = {"overrides": arguments.overrides, "trust_code": arguments.trust_code}
            encoder = load(checkpoint, role, device=pick_device(arguments.device), **given)
            encoder.dtype = _dtype(arguments.precision)
            check_model(arguments.task, encoder)
            options = _options(arguments, evaluator, encoder)
            job = Job(
                store=_store(checkpoint, encoder, options, arguments),
                batch_size=arguments.batch_size,
                workers=arguments.workers,
                max_samples=arguments.max_samples or evaluator.get("max_samples"),
                allow_missing=arguments.allow_missing,
                progress=lambda what, done, total: told(f"{what}, batches", done, total),
            )
            task = task or FUNCTIONS[arguments.task](options, job)
            jobs.append(job)
            metrics |= {f"{role}/{name}": value for name, value in task.run(encoder, job).items()}
    assert task is not None
    for job in jobs:
        job.store.clear()
    return str(checkpoint) if checkpoint.is_dir() else arguments.checkpoint, task.set_name, metrics


def _found(given: str) -> Path:
    """The file or folder that is read: of a run folder its newest checkpoint, the same for all roles and ranks."""
    from cosmos_ssl.engine.checkpoint import latest_checkpoint
    from cosmos_ssl.engine.distributed import World
    from cosmos_ssl.interop.hub import checkpoint_path

    world = World()
    world.from_first(lambda: checkpoint_path(given))  # one rank fetches
    path = checkpoint_path(given)
    is_run = path.is_dir() and not (path / "manifest.json").exists()
    return world.from_first(lambda: latest_checkpoint(path) or path) if is_run else path


def _roles(checkpoint: Path, which: str | None) -> tuple[Role, ...]:
    """The roles asked for; without ``--which`` those that are there. Raises CheckpointError where both are asked for and one is there."""
    from cosmos_ssl.interop.foreign import foreign_roles

    if which in ROLES:
        return (cast("Role", which),)
    own: tuple[Role, ...] = ("student", "teacher") if (checkpoint / "teacher.safetensors").is_file() else ("student",)
    there = foreign_roles(checkpoint) or own
    if which == "both" and len(there) == 1:
        raise CheckpointError(f"{checkpoint} holds the {there[0]} alone: leave out --which both")
    return there


def _dtype(precision: str) -> torch.dtype | None:
    import torch

    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _options(arguments: argparse.Namespace, evaluator: Mapping[str, Any], encoder: ModelEncoder) -> Options:
    """What the flags say; where the data is that of the run's own evaluator, its options hold too."""
    from dataclasses import fields

    from cosmos_ssl.evaluation.tasks import Options

    known = {field.name for field in fields(Options)}
    told = {**evaluator, **{name: value for name, value in vars(arguments).items() if value is not None}}
    told["data"] = told.get("data") or encoder.spec.validation_data
    if told["data"] is None:
        raise UserError(f"--data: name what to evaluate on, since {arguments.checkpoint} does not tell it")
    return Options(**{name: value for name, value in told.items() if name in known})


def _evaluator_of_run(checkpoint: Path, task: str) -> dict[str, Any]:
    """The options of the run's own evaluator of this task, if there is one; several shards are joined by ``::``."""
    from cosmos_ssl.config import load_config

    config = checkpoint.parent.parent / "config.yaml"
    is_ours = (checkpoint / "manifest.json").is_file() and config.is_file()
    evaluators = load_config(config).tree["evaluators"] if is_ours else {}
    found: Mapping[str, Any] = next((part for part in evaluators.values() if part["type"].rpartition(":")[2] == task), {})
    given = {name: value for name, value in found.items() if value is not None}
    return {n: "::".join(v) if n in ("data", "train_data") and isinstance(v, list) else v for n, v in given.items()}


def _store(checkpoint: Path, encoder: ModelEncoder, options: Options, arguments: argparse.Namespace) -> Store:
    """The folder for what is computed, whose name tells model, task and precision; what others left behind long ago is removed."""
    from dataclasses import asdict

    from cosmos_ssl import __version__
    from cosmos_ssl.data.storage import cache_root
    from cosmos_ssl.evaluation.features import Store, digest, weights_digest

    about = {
        "version": __version__,
        "checkpoint": str(checkpoint.resolve() if checkpoint.exists() else checkpoint),  # the same weights may stand in another model
        "weights": weights_digest(encoder.model),
        "overrides": arguments.overrides,
        "image": None if encoder.spec.image is None else asdict(encoder.spec.image),
        "precision": arguments.precision,
        "task": arguments.task,
        "options": asdict(options),
    }
    store = Store(cache_root() / "evaluations" / digest(about))
    store.clear_old()
    return store


def _report(arguments: argparse.Namespace, checkpoint: str, set_name: str, metrics: dict[str, float]) -> None:
    from cosmos_ssl.evaluation.report import markdown, metric_rows, notes

    print(table(metric_rows(metrics)), end="")
    row = markdown(Path(arguments.checkpoint).name.removesuffix(".pt"), set_name, metrics)
    if row and arguments.max_samples is None:
        print(f"\n{row}", end="")
    for note in notes(arguments.task, set_name):
        print(f"note: {note}")
    if arguments.json:
        write_json(arguments.json, {"task": arguments.task, "checkpoint": checkpoint, "metrics": metrics})
