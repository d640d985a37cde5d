"""``cosmos-ssl flops``: what a training step of configs costs, side by side."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cosmos_ssl.cli.common import add_json, number, number_table, write_json
from cosmos_ssl.errors import EXIT_DONE, UserError

if TYPE_CHECKING:
    from cosmos_ssl.cost.step_cost import StepCost

CONVENTION = (
    "2 FLOPs for each multiply-add of matrix products, masked and causal attention in full; nothing else is counted"
)
NOTES = """\
Forward passes are traced by fvcore (whose multiply-adds are doubled), backward passes counted as they run by PyTorch's
counter. Captions have the same lengths in every sample: what towers and heads cost a sample hardly depends on --samples
(short texts are padded to share calls of attention). It does in losses that compare all samples of a batch, and where
masked patches are drawn."""
STAGES = {
    "student": "student, forward: towers",
    "heads": "student, forward: heads",
    "student_backward": "student, backward: towers and heads",
    "losses": "losses, forward",
    "losses_backward": "losses, backward",
    "teacher": "teacher, forward",
    "total": "total",
}


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "flops",
        description="Runs one step of each config on made-up samples of its views' numbers and sizes, and counts; no "
        f"data is read. The rule: {CONVENTION}. With --card it counts launches, bytes, FLOPs, peak memory and host "
        "waits of a whole update, stage by stage, and estimates time, memory and hours on that card.",
        epilog="key.sub=value arguments override single values of all configs and may stand anywhere.",
    )
    parser.add_argument(
        "configs", metavar="CONFIG", nargs="+", help="files, or names of configs that come with cosmos-ssl"
    )
    parser.add_argument(
        "--depth", type=_whole(0), default=2, metavar="N", help="levels of modules shown (default: %(default)s)"
    )
    parser.add_argument(
        "--samples", type=_whole(1), metavar="N", help="samples of the step (default: 2; 64 a card with --card)"
    )
    length = "mean length of captions (default: 19.5, or the context length where that is less)"
    parser.add_argument("--caption-tokens", type=float, metavar="N", help=length)
    device = "where to run: cpu, in float32 (default), or cuda, in the config's precision and attention"
    parser.add_argument("--device", choices=("cpu", "cuda"), help=device)
    card = "count a whole update instead, on a CUDA device that is not there, and estimate what it takes on this card"
    parser.add_argument("--card", choices=("a100", "h100", "h200", "b200"), help=card)
    parser.add_argument(
        "--ranks", type=_whole(1), metavar="W", help="with --card: as one of so many ranks, a card each (default: 1)"
    )
    add_json(parser)
    parser.set_defaults(run=_flops, overrides=[])


def _whole(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is no whole number from {least}")
        return int(text)

    return number


def _flops(arguments: argparse.Namespace) -> int:
    if arguments.card:
        if arguments.device:
            raise UserError("--card counts on a device that is not there: leave --device out")
        from cosmos_ssl.cli.flops_card import report

        return report(arguments)
    if arguments.ranks:
        raise UserError("--ranks needs --card")
    from cosmos_ssl.config import load_config

    arguments.device, arguments.samples = arguments.device or "cpu", arguments.samples or 2
    fixed = ["evaluators=null", *(["training.attention=auto"] if arguments.device == "cpu" else [])]
    loaded = [load_config(config, [*fixed, *arguments.overrides]) for config in arguments.configs]
    from cosmos_ssl.build import Builder  # after stage one, which needs no torch
    from cosmos_ssl.cost.step_cost import measure_step
    from cosmos_ssl.engine.distributed import pick_device

    device = pick_device(arguments.device)
    builders = [Builder(each) for each in loaded]  # a wrong option of the last is said before the first is run
    options = {"samples": arguments.samples, "caption_tokens": arguments.caption_tokens}
    costs = [measure_step(each.assemble("measure"), each.config, **options, device=device) for each in builders]
    names = [each.config.name for each in loaded]
    names = names if len(set(names)) == len(names) else list(arguments.configs)
    _print(names, costs, arguments)
    if arguments.json:
        rows = [
            {"config": config, "name": each.config.name, **_report(cost, arguments.depth)}
            for config, each, cost in zip(arguments.configs, loaded, costs, strict=True)
        ]
        about = {"convention": CONVENTION, **options, "device": arguments.device, "overrides": arguments.overrides}
        write_json(arguments.json, about | {"configs": rows})
    return EXIT_DONE


def _report(cost: StepCost, depth: int) -> dict[str, Any]:
    """A cost as JSON holds it; counts are FLOPs, bytes and numbers, per sample where they are not whole."""
    found = asdict(cost)
    del found["samples"]
    return found | {"modules": [module for module in found["modules"] if _depth(module["name"]) <= depth]}


def _depth(name: str) -> int:
    """Levels below a role's model: 0 for the student and the teacher, 2 for ``image.blocks`` and
    ``teacher.image.blocks``.
    """
    return 0 if name in ("student", "teacher") else name.removeprefix("teacher.").count(".") + 1


def _print(names: Sequence[str], costs: Sequence[StepCost], arguments: argparse.Namespace) -> None:
    print(
        f"Per sample of a step of {arguments.samples}, captions of {arguments.caption_tokens or 19.5:g} tokens on "
        f"average, on {arguments.device}."
    )
    print(f"Rule: {CONVENTION}.", NOTES, sep="\n")
    _side_by_side("GFLOP", names, {text: [cost.flops[stage] / 1e9 for cost in costs] for stage, text in STAGES.items()})
    parameters = {kind: [cost.parameters[kind] / 1e6 for cost in costs] for kind in costs[0].parameters}
    _side_by_side("PARAMETERS (MILLIONS)", names, parameters)
    kept = {"activations of the student": [cost.activations / 2**20 for cost in costs]}
    _side_by_side("KEPT FOR THE BACKWARD PASS (MIB)", names, kept)
    shown = [
        {module.name: module for module in cost.modules if _depth(module.name) <= arguments.depth} for cost in costs
    ]
    if len(costs) == 1:
        rows = {
            name: [each.flops / 1e9, each.parameters / 1e6, each.activations / 2**20] for name, each in shown[0].items()
        }
        number_table("MODULE", ["FORWARD GFLOP", "PARAMETERS (M)", "KEPT (MIB)"], rows)
    else:
        modules = {name: [each[name].flops / 1e9 if name in each else 0.0 for each in shown] for name in _merged(shown)}
        _side_by_side("MODULE, FORWARD GFLOP", names, {name: values for name, values in modules.items() if any(values)})
    for name, cost in zip(names, costs, strict=True):
        listed = [f"{operation} ({count} times)" for operation, count in cost.uncounted.items()]
        if cost.difference:
            listed.append(
                f"{number(abs(cost.difference) / 1e9)} GFLOP by which PyTorch's counter differs in the forward pass"
            )
        print(f"\nNot counted in {name}: {', '.join(listed) or 'nothing'}", end="")
    print()


def _merged(shown: Sequence[Mapping[str, Any]]) -> list[str]:
    """All names, each after what stands before it in its own config, the teacher's at the end."""
    found: list[str] = []
    for names in shown:
        place = 0
        for name in names:
            if name in found:
                place = found.index(name) + 1
            else:
                found.insert(place, name)
                place += 1
    return sorted(found, key=lambda name: name.startswith("teacher"))


def _side_by_side(title: str, names: Sequence[str], rows: Mapping[str, Sequence[float]]) -> None:
    """Print a column for each config, and beside all but the first their ratio to it."""
    heads = [names[0]] + [head for name in names[1:] for head in (name, "ratio")]
    beside = {
        text: [first, *(x for each in others for x in (each, each / first if first else None))]
        for text, (first, *others) in rows.items()
    }
    number_table(title, heads, beside)
