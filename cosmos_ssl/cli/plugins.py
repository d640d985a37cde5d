"""``cosmos-ssl plugins``: the parts that are installed."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cosmos_ssl import __version__, registry
from cosmos_ssl.cli.common import add_json, table, write_json
from cosmos_ssl.cli.plugins_new import KINDS, new_plugin
from cosmos_ssl.errors import EXIT_DONE, EXIT_FAULTS, PluginError, UserError, did_you_mean


def add_parser(subparsers: Any) -> None:
    """Add the command and its actions."""
    parser = subparsers.add_parser("plugins", help="list the parts that are installed, show one, check all, begin a new one")
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    action = actions.add_parser("list", help="all parts, from metadata alone")
    add_json(action)
    action.set_defaults(run=_list)

    action = actions.add_parser("show", help="a part's options, and what it requires and offers")
    action.add_argument("part", metavar="PART", help="NAME or GROUP/NAME, such as losses/clip")
    add_json(action)
    action.set_defaults(run=_show)

    action = actions.add_parser("check", help="import every part and report the broken ones (exit code 3)")
    add_json(action)
    action.set_defaults(run=_check)

    action = actions.add_parser("new", help="write a plugin project that works: a part, its test, pyproject.toml")
    action.add_argument("name", metavar="NAME", help="of the package and its folder, such as my-losses")
    action.add_argument("--kind", required=True, choices=KINDS, help="what it offers")
    action.add_argument("--output", type=Path, default=Path(), metavar="DIR", help="where the folder is made (default: here)")
    action.set_defaults(run=_new)


def _installed() -> tuple[registry.Record, ...]:
    registry.check_installed()
    return registry.records()


def _as_json(record: registry.Record) -> dict[str, str]:
    return {
        "group": record.group,
        "name": record.name,
        "distribution": record.distribution,
        "version": record.version,
        "object": record.object_path,
    }


# ---------------------------------------------------------------------------- list, check


def _list(arguments: argparse.Namespace) -> int:
    records = _installed()
    print(f"cosmos-ssl {__version__}, plugin API {registry.API_VERSION}")
    rows = [(record.group, registry.spelling(record), record.source, record.object_path) for record in records]
    print(table([("GROUP", "NAME", "FROM", "OBJECT"), *rows]), end="")
    if arguments.json:
        write_json(arguments.json, [_as_json(record) for record in records])
    return EXIT_DONE


def _check(arguments: argparse.Namespace) -> int:
    records = _installed()
    broken: dict[registry.Record, str] = {}
    for record in records:
        try:
            registry.load(record)
        except PluginError as error:
            broken[record] = str(error)
            print(error)
    print(f"{len(records) - len(broken)} of {len(records)} parts can be used")
    if arguments.json:
        write_json(arguments.json, [{**_as_json(record), "error": broken.get(record)} for record in records])
    return EXIT_FAULTS if broken else EXIT_DONE


def _new(arguments: argparse.Namespace) -> int:
    folder = new_plugin(arguments.name, arguments.kind, arguments.output)
    print(f"{folder}: {', '.join(path.relative_to(folder).as_posix() for path in sorted(folder.rglob('*.*')))}")
    print(f"Install and test it: pip install -e {folder} && cd {folder} && python -m pytest")
    return EXIT_DONE


# ---------------------------------------------------------------------------- show


def _show(arguments: argparse.Namespace) -> int:
    record = _named(arguments.part)
    cls = registry.load(record)
    options = registry.options(cls)
    reserved = registry.GROUPS[record.group].reserved
    facts = _facts(cls)
    print(record)
    if cls.__doc__:
        print("\n".join(f"  {line}".rstrip() for line in inspect.cleandoc(cls.__doc__).splitlines()))
    rows = [(option.name, option.type_name, _default(option), option.doc) for option in options]
    print("\nOptions" + ("" if rows else ": none") + (f" (and {', '.join(reserved)}, handled by the engine)" if reserved else ""))
    if rows:
        print(table([("NAME", "TYPE", "DEFAULT", "MEANING" if any(row[3] for row in rows) else ""), *rows], indent="  "), end="")
    for title, lines in facts.items():
        print(f"\n{title}")
        print("".join(f"  {line}\n" for line in lines or ["nothing"]), end="")
    if arguments.json:
        described = [
            {"name": o.name, "type": o.type_name, "required": o.required, "default": None if o.required else o.default, "doc": o.doc}
            for o in options
        ]
        write_json(arguments.json, {**_as_json(record), "options": described, **{title.lower(): lines for title, lines in facts.items()}})
    return EXIT_DONE


def _named(text: str) -> registry.Record:
    """The part that NAME or GROUP/NAME means. Raises UserError where it means none or several."""
    group, slash, name = text.rpartition("/")
    if slash and group not in registry.GROUPS:
        raise UserError(f"no group named '{group}'.{did_you_mean(group, list(registry.GROUPS))} Groups: {', '.join(registry.GROUPS)}")
    if slash:
        return registry.find(group, name)
    records = _installed()
    bare = name.rpartition(":")[2]
    groups = [group for group in registry.GROUPS if any((record.group, record.name) == (group, bare) for record in records)]
    if not groups:
        raise UserError(f"no part named '{name}'.{did_you_mean(name, [record.name for record in records])} See: cosmos-ssl plugins list")
    if len(groups) > 1:
        raise UserError(f"'{name}' is the name of several parts. Write {' or '.join(f'{group}/{name}' for group in groups)}")
    return registry.find(groups[0], name)


def _default(option: registry.Option) -> str:
    if option.required:
        return "(required)"
    if isinstance(option.default, float):
        return f"{option.default:.6g}"
    return registry.shown(option.default)


def _facts(cls: type[Any]) -> dict[str, list[str]]:
    """What a part requires and offers, told by one that is built for COSMOS's shapes; empty where it cannot be built so."""
    import torch

    from cosmos_ssl.api import Spec, TowerSpec, ViewSpec

    spec = Spec(
        embed_dim=512,
        batch_size=1024,
        has_teacher=True,
        context_length=77,
        vocab_size=49_408,
        image=TowerSpec(width=768, image_size=224, patch_size=16),
        text=TowerSpec(width=512),
        image_views={"global": ViewSpec(views=2, size=224), "local": ViewSpec(views=6, size=96)},
        text_views={"global": ViewSpec(views=2), "local": ViewSpec(views=6)},
    )
    try:
        with torch.device("meta"):
            part = cls(spec)
            facts: dict[str, list[str]] = {}
            if hasattr(part, "outputs"):
                needs = {name: part.requires([name]) for name in part.outputs()}
                facts["Requires"] = [f"for {name}: {_need(need, of_head=True)}" for name in needs for need in needs[name]]
            elif hasattr(part, "requires"):
                facts["Requires"] = [_need(need, of_head=False) for need in part.requires()]
            if hasattr(part, "offers"):
                facts["Offers"] = list(_views(part.offers()))
            if hasattr(part, "outputs"):
                facts["Outputs"] = [f"{name}, width {width}" for name, width in part.outputs().items()]
            if hasattr(part, "capabilities"):
                facts["Capabilities"] = sorted(part.capabilities)
            return facts
    except Exception:  # options that must be given, or another model around it: then only the docs can tell
        return {}


def _need(need: Any, *, of_head: bool) -> str:
    if need.head is not None:
        outputs = "all outputs" if need.outputs is None else " and ".join(f"'{name}'" for name in need.outputs)
        text = f"{outputs} of head '{need.head}'"
    else:
        group = "all groups" if need.group == "*" else f"group '{need.group}'"
        views = "" if need.views is None else f", view {', '.join(str(view + 1) for view in need.views)}"
        text = f"{need.modality} {need.kind} of {group}{views}"
    role = "" if of_head else f"{need.role}: "  # a head runs on the role of its reader
    return f"{role}{text}{', with pads' if need.pads else ''}{', gathered over ranks' if need.gathered else ''}"


def _views(offered: Mapping[str, Any]) -> Iterable[str]:
    for name, views in offered.items():
        size = f" of {views.size} x {views.size} pixels" if views.size else ""
        yield f"{name}: {views.views} views{size}{', with masks' if views.masks else ''}"
