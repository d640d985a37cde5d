"""``cosmos-ssl eval``: a trained or released checkpoint on the data of a task."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cosmos_ssl.cli.common import add_json, reports_to_stdout, table, write_json
from cosmos_ssl.cli.place import add_place, carry_out
from cosmos_ssl.cli.progress import stages
from cosmos_ssl.cli.weights import add_batches, add_source, options_of, positive, reading
from cosmos_ssl.errors import EXIT_DONE, UserError
from cosmos_ssl.evaluation.task_names import ALL, ON_FEATURES, PURPOSES

_PRECISIONS = ("auto", "fp32", "amp_bf16", "amp_fp16")
_SHORT = {"bf16": "amp_bf16", "fp16": "amp_fp16"}


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "eval",
        help="evaluate a trained or released checkpoint",
        description="Evaluate a checkpoint. An evaluation that was interrupted goes on when the same command is given "
        "again; with several ranks (--profile, torchrun, srun) all share the work. "
        "key=value overrides reach the model's config (model.text.heads=4).",
        epilog="tasks: "
        + "; ".join(f"{name} ({purpose})" for name, purpose in PURPOSES.items())
        + f"; {ALL} (every known set in --data and the folders directly below it, in one table)",
    )
    add_source(parser, required=False)
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="C",
        help="other checkpoints to evaluate alike, with bootstrap intervals; without --checkpoint the first is it",
    )
    parser.add_argument("--task", required=True, metavar="T", help=", ".join((*PURPOSES, ALL)))
    parser.add_argument(
        "--data", metavar="PATH", help="shards or a folder (default: what the run was evaluated on, with its options)"
    )
    parser.add_argument(
        "--which",
        metavar="ROLE",
        help="whose weights: student, teacher, both, or a callback's name (default: student and teacher)",
    )
    parser.add_argument("--set", dest="set_name", metavar="NAME", help="which known set, where the data holds several")
    parser.add_argument("--texts", metavar="FIELD", help="retrieval: txt, or a key of the JSON (default: txt)")
    parser.add_argument("--label", metavar="FIELD", help="member or key of the JSON with the class (default: cls)")
    parser.add_argument(
        "--class-names", metavar="FILE", help="one a line, in the order of the labels (default: those of the data)"
    )
    parser.add_argument(
        "--templates",
        metavar="T",
        help="openai, simple, openclip_simple, or one with {} (default: the set's own, else simple)",
    )
    _add_training(parser)
    parser.add_argument(
        "--no-csa", dest="csa", action="store_false", help="segmentation: the last block attends as in training"
    )
    parser.add_argument("--max-samples", type=positive, metavar="N", help="only so many evenly spread samples")
    parser.add_argument(
        "--allow-missing", action="store_true", help="leave out samples that are missing or cannot be read"
    )
    add_batches(parser)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    precision = "of the model's arithmetic (default: auto, of a run its own where the device is fast in it, else fp32)"
    parser.add_argument(
        "--precision", type=lambda text: _SHORT.get(text, text), choices=_PRECISIONS, default="auto", help=precision
    )
    add_json(parser)
    add_place(parser)
    parser.set_defaults(run=_eval)


def _add_training(parser: argparse.ArgumentParser) -> None:
    """Add the flags of tasks that learn from features."""
    parser.add_argument(
        "--train-data", metavar="PATH", help="knn, probes: shards or a folder (default: the set's training split)"
    )
    parser.add_argument(
        "--max-train-samples", type=positive, metavar="N", help="knn, probes: so many evenly spread ones of them"
    )
    parser.add_argument("-k", type=positive, metavar="N", help="knn: neighbours (default: 20)")


def _eval(arguments: argparse.Namespace) -> int:
    if arguments.json and not arguments.json.parent.is_dir():
        raise UserError(f"--json {arguments.json}: there is no folder {arguments.json.parent}")
    if arguments.checkpoint is None:
        if not arguments.compare:
            raise UserError("--checkpoint: name what to evaluate, or several after --compare")
        arguments.checkpoint, *arguments.compare = arguments.compare
    folder = Path(f"{arguments.json if arguments.json and not reports_to_stdout(arguments) else 'eval'}.slurm")
    work, check = partial(_on_this_rank, arguments), partial(_check, arguments)
    return carry_out("eval", arguments, work, folder=folder, check=check)


def _check(arguments: argparse.Namespace) -> None:
    from cosmos_ssl.build.evaluate import check_evaluation

    options = options_of(arguments, check_evaluation)
    check_evaluation([arguments.checkpoint, *arguments.compare], **options)


def _on_this_rank(arguments: argparse.Namespace) -> int:
    from cosmos_ssl.build.evaluate import evaluate
    from cosmos_ssl.engine.distributed import SHARING, World, as_run_errors, joined_world

    with joined_world(arguments.device, wait=SHARING), as_run_errors():
        with reading(shown=World().first), stages(shown=World().first) as told:
            report = evaluate(
                arguments.checkpoint,
                **options_of(arguments, evaluate),
                progress=lambda what, done, total: told(f"{what}, batches", done, total),
            )
        if World().first:
            _report(arguments, report)
    return EXIT_DONE


def _report(arguments: argparse.Namespace, report: Mapping[str, Any]) -> None:
    from cosmos_ssl.evaluation.comparison import comparison_rows

    if arguments.compare:
        print(table(comparison_rows(report["comparison"])), end="")
    elif arguments.task == ALL:
        _all(report)
    else:
        _one(arguments, report)
    if arguments.json:
        write_json(arguments.json, report)


def _all(report: Mapping[str, Any]) -> None:
    from cosmos_ssl.evaluation.report import notes, suite_rows

    print(table(suite_rows(report["reports"])), end="")
    for task, set_name in sorted({(one["task"], one["set"]) for one in report["reports"]}):
        for note in notes(task, set_name)[-1:]:
            print(f"note: {task} {set_name}: {note}")
    for name, why in report["left_out"].items():
        print(f"left out: {name}: {why}")


def _one(arguments: argparse.Namespace, report: Mapping[str, Any]) -> None:
    from cosmos_ssl.evaluation.report import markdown, metric_rows, notes

    metrics, set_name = report["metrics"], report["set"]
    print(table(metric_rows(metrics)), end="")
    of_set = f" of {set_name}" if set_name else ""
    print(f"{report['samples']:,} samples{of_set}, {report['precision']} on {report['device']}")
    if arguments.task not in ON_FEATURES and arguments.max_samples is None:
        row = markdown(Path(arguments.checkpoint).name.removesuffix(".pt"), set_name, metrics)
        print(row and f"\n{row}", end="")
    for note in notes(arguments.task, set_name):
        print(f"note: {note}")
