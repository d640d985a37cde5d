"""``cosmos-ssl eval``: a trained or released checkpoint on the data of a task."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cosmos_ssl.cli.common import add_json, table, write_json
from cosmos_ssl.errors import EXIT_DONE, CheckpointError, UserError, did_you_mean

if TYPE_CHECKING:
    from cosmos_ssl.api import Role
    from cosmos_ssl.evaluation.features import Job
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

Progress = Callable[[str, int, int], None]


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "eval",
        help="evaluate a trained or released checkpoint",
        description="Evaluate a checkpoint. An evaluation that was interrupted goes on when the same command is given again; "
        "under torchrun all ranks share the work. key=value overrides reach the model's config (model.text.heads=4).",
        epilog="tasks: " + "; ".join(f"{name} ({purpose})" for name, purpose in TASKS.items()),
    )
    parser.add_argument("--checkpoint", required=True, metavar="C", help="a run folder, a checkpoint, an official file, or a released name")
    parser.add_argument("--task", required=True, metavar="T", help=", ".join(TASKS))
    parser.add_argument("--data", metavar="PATH", help="shards or a folder (default: what the run was evaluated on)")
    parser.add_argument("--which", choices=(*ROLES, "both"), help="whose weights (default: all that are there)")
    parser.add_argument("--set", dest="set_name", metavar="NAME", help="which known set, where the data holds several")
    parser.add_argument("--texts", default="txt", metavar="FIELD", help="retrieval: txt, or a key of the JSON (default: %(default)s)")
    parser.add_argument("--label", default="cls", metavar="FIELD", help="member or key of the JSON with the class (default: %(default)s)")
    parser.add_argument("--class-names", metavar="FILE", help="one a line, in the order of the labels (default: those of the data)")
    parser.add_argument("--templates", metavar="T", help="openai, simple, or one with {} (default: the set's own, else simple)")
    parser.add_argument("--train-data", metavar="PATH", help="knn, linear_probe: shards or a folder (default: the set's training split)")
    parser.add_argument("-k", type=_positive, default=20, metavar="N", help="knn: neighbours (default: %(default)s)")
    parser.add_argument("--no-csa", dest="csa", action="store_false", help="segmentation: the last block attends as in training")
    parser.add_argument("--max-samples", type=_positive, metavar="N", help="only so many evenly spread samples")
    parser.add_argument("--allow-missing", action="store_true", help="leave out samples that are missing or cannot be read")
    parser.add_argument("--batch-size", type=_positive, default=256, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--workers", type=_positive, metavar="N", help="threads that decode (default: one a core, at most 8)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    parser.add_argument("--precision", choices=_PRECISIONS, default="fp32", help="of the model's arithmetic (default: %(default)s)")
    add_json(parser)
    parser.set_defaults(run=_eval, overrides=[])


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above zero")
    return int(text)


def _eval(arguments: argparse.Namespace) -> int:
    if arguments.task not in TASKS:
        raise UserError(f"--task: no task named '{arguments.task}'.{did_you_mean(arguments.task, list(TASKS))} Tasks: {', '.join(TASKS)}")
    from cosmos_ssl.engine.distributed import World, joined_world, named_losses

    with joined_world(arguments.device), named_losses():
        set_name, metrics = _evaluate(arguments)
        if World().first:
            _report(arguments, set_name, metrics)
    return EXIT_DONE


def _evaluate(arguments: argparse.Namespace) -> tuple[str, dict[str, float]]:
    """The known set that the data is, and the metrics of all roles as ``ROLE/NAME``."""
    from cosmos_ssl.engine.distributed import World
    from cosmos_ssl.evaluation.features import Job, Store, threads_of_this_process
    from cosmos_ssl.evaluation.tasks import TASKS as FUNCTIONS
    from cosmos_ssl.interop.hub import checkpoint_path

    world = World()
    world.from_first(lambda: checkpoint_path(arguments.checkpoint))  # one rank fetches
    checkpoint = checkpoint_path(arguments.checkpoint)
    metrics: dict[str, float] = {}
    with _progress(shown=world.first) as progress:
        job = Job(
            batch_size=arguments.batch_size,
            workers=arguments.workers or threads_of_this_process(),
            max_samples=arguments.max_samples,
            allow_missing=arguments.allow_missing,
            progress=progress,
        )
        task: Task | None = None
        stores: list[Store] = []
        for role, encoder in _encoders(checkpoint, arguments):
            options = _options(arguments, checkpoint, encoder)
            task = task or FUNCTIONS[arguments.task](options, job)
            job = _stored(job, encoder, options, arguments)
            stores.append(job.store)
            metrics |= {f"{role}/{name}": value for name, value in task.run(encoder, job).items()}
    assert task is not None
    for store in stores:
        store.clear()
    return task.set_name, metrics


def _encoders(checkpoint: Path, arguments: argparse.Namespace) -> Iterator[tuple[Role, ModelEncoder]]:
    """Each role asked for and its model; without ``--which`` those that the checkpoint holds. Raises CheckpointError."""
    import torch

    from cosmos_ssl.build import load
    from cosmos_ssl.engine.distributed import World, pick_device

    found = False
    first: CheckpointError | None = None
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[arguments.precision]
    for role in ROLES if arguments.which in (None, "both") else (arguments.which,):
        try:
            encoder = load(checkpoint, cast("Role", role), device=pick_device(arguments.device), overrides=arguments.overrides)
        except CheckpointError as error:
            if arguments.which is not None:
                raise
            first = first or error
            if found and World().first:
                print(f"the {role} is left out: {error}", file=sys.stderr)
            continue
        found = True
        encoder.dtype = dtype
        yield cast("Role", role), encoder
    if not found:
        assert first is not None
        raise first


def _options(arguments: argparse.Namespace, checkpoint: Path, encoder: ModelEncoder) -> Options:
    from cosmos_ssl.evaluation.tasks import Options

    data = arguments.data or _data_of_run(checkpoint, arguments.task) or encoder.spec.validation_data
    if data is None:
        raise UserError(f"--data: name what to evaluate on, since {arguments.checkpoint} does not tell it")
    return Options(
        data=data,
        texts=arguments.texts,
        set_name=arguments.set_name,
        label=arguments.label,
        class_names=arguments.class_names,
        templates=arguments.templates,
        train_data=arguments.train_data or _data_of_run(checkpoint, arguments.task, "train_data"),
        k=arguments.k,
        csa=arguments.csa,
    )


def _data_of_run(checkpoint: Path, task: str, key: str = "data") -> str | None:
    """What the run's own evaluator of this task works on, if there is one."""
    from cosmos_ssl.config import load_config

    configs = (folder / "config.yaml" for folder in (checkpoint, checkpoint.parent.parent))
    config = next((path for path in configs if path.is_file()), None)
    evaluators = load_config(config).tree["evaluators"] if config is not None else {}
    data = next((part[key] for part in evaluators.values() if part["type"] == task and part.get(key)), None)
    return "::".join(data) if isinstance(data, list) else data


def _stored(job: Job, encoder: ModelEncoder, options: Options, arguments: argparse.Namespace) -> Job:
    """The job with a folder for what is computed, whose name tells model, task and precision."""
    from dataclasses import asdict, replace

    from cosmos_ssl import __version__
    from cosmos_ssl.data.storage import cache_root
    from cosmos_ssl.evaluation.features import Store, digest, weights_digest

    about = {
        "version": __version__,
        "weights": weights_digest(encoder.model),
        "overrides": arguments.overrides,
        "image": None if encoder.spec.image is None else asdict(encoder.spec.image),
        "precision": arguments.precision,
        "task": arguments.task,
        "options": asdict(options),
    }
    return replace(job, store=Store(cache_root() / "evaluations" / digest(about)))


def _report(arguments: argparse.Namespace, set_name: str, metrics: dict[str, float]) -> None:
    from cosmos_ssl.evaluation.report import markdown, metric_rows, note

    print(table(metric_rows(metrics)), end="")
    row = markdown(Path(arguments.checkpoint).name.removesuffix(".pt"), set_name, metrics)
    if row and arguments.max_samples is None:
        print(f"\n{row}", end="")
    if note(set_name):
        print(f"note: {note(set_name)}")
    if arguments.json:
        write_json(arguments.json, {"task": arguments.task, "checkpoint": arguments.checkpoint, "metrics": metrics})


@contextmanager
def _progress(*, shown: bool) -> Iterator[Progress]:
    """A bar for each kind of work on a terminal; elsewhere a line at every tenth of what takes long."""
    if shown and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress as Bars

        with Bars(console=Console(stderr=True), transient=True) as bars:
            tasks: dict[str, Any] = {}

            def bar(what: str, done: int, total: int) -> None:
                if what not in tasks or done == 1:
                    tasks[what] = bars.add_task(what, total=total)
                bars.update(tasks[what], completed=done, total=total)

            yield bar
        return

    def line(what: str, done: int, total: int) -> None:
        if shown and total >= 20 and done * 10 // total > (done - 1) * 10 // total:
            print(f"{what}: {done:,} of {total:,} batches", file=sys.stderr, flush=True)

    yield line
