"""``cosmos-ssl plugins``: the parts that are installed."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cosmos_ssl import API_VERSION, __version__, registry
from cosmos_ssl.cli.common import add_json, table, write_json
from cosmos_ssl.cli.plugins_new import KINDS, new_plugin
from cosmos_ssl.errors import EXIT_DONE, EXIT_FAULTS, ConfigError, PluginError, UserError, did_you_mean


def add_parser(subparsers: Any) -> None:
    """Add the command and its actions."""
    parser = subparsers.add_parser("plugins")
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    action = actions.add_parser("list", help="all parts, from metadata alone")
    action.add_argument(
        "--markdown", action="store_true", help="a table with what each part requires and offers (imports them)"
    )
    add_json(action)
    action.set_defaults(run=_list)

    action = actions.add_parser("show", help="a part's options, and what it requires and offers")
    action.add_argument("part", metavar="PART", help="NAME or GROUP/NAME, such as losses/clip")
    action.epilog = "OPTION=value arguments say with which options it is asked what it requires and offers."
    add_json(action)
    action.set_defaults(run=_show, overrides=[])

    action = actions.add_parser("check", help="import every part and report the broken ones (exit code 3)")
    add_json(action)
    action.set_defaults(run=_check)

    action = actions.add_parser("new", help="write a plugin project that works: a part, its test, pyproject.toml")
    action.add_argument("plugin", metavar="NAME", help="of the package and its folder, such as my-losses")
    action.add_argument("--kind", required=True, choices=KINDS, help="what it offers")
    action.add_argument(
        "--output", type=Path, default=Path(), metavar="DIR", help="where the folder is made (default: here)"
    )
    action.set_defaults(run=_new)


def _installed() -> tuple[registry.Record, ...]:
    registry.check_installed()
    return registry.records()


def _as_json(record: registry.Record) -> dict[str, str]:
    return {name: getattr(record, name) for name in ("group", "name", "distribution", "version")} | {
        "object": record.object_path
    }


# ---------------------------------------------------------------------------- list, check


def _list(arguments: argparse.Namespace) -> int:
    records = _installed()
    if arguments.markdown:
        shown, faults = markdown(records)
        print(shown, end="")
        print(*faults, sep="\n", end="\n" if faults else "", file=sys.stderr)
        return EXIT_FAULTS if faults else EXIT_DONE
    print(f"cosmos-ssl {__version__}, plugin API {API_VERSION}")
    rows = [(record.group, registry.spelling(record), record.source, record.object_path) for record in records]
    print(table([("GROUP", "NAME", "FROM", "OBJECT"), *rows]), end="")
    if arguments.json:
        write_json(arguments.json, [_as_json(record) for record in records])
    return EXIT_DONE


def markdown(records: Iterable[registry.Record]) -> tuple[str, list[str]]:
    """A table of parts with what they require and offer, where words in quotes become code, and the faults of parts
    left out.
    """
    from cosmos_ssl.cli.plugins_facts import facts

    lines, faults = ["| part | requires | offers |", "|---|---|---|"], []
    for record in records:
        try:
            found = facts(record, registry.load(record), {})
        except PluginError as error:
            faults.append(str(error))
            continue
        unknown = ["by its options"] if found.unknown else []
        requires, offers = ("; ".join([*given, *unknown]) for given in (found.requires, found.offers))
        lines.append(f"| '{record.group}/{registry.spelling(record)}' | {requires} | {offers} |")
    return re.sub(r"'([^'\n]*)'", r"`\1`", "\n".join(lines)) + "\n", faults


def _check(arguments: argparse.Namespace) -> int:
    records = _installed()
    broken: dict[registry.Record, str] = {}
    for record in records:
        try:
            cls = registry.load(record)
            every = {option.name: None for option in registry.options_of(cls)}
            registry.check_options(record, cls, every)  # each has a type that a config can hold
        except PluginError as error:
            broken[record] = str(error)
            print(error)
    print(f"{len(records) - len(broken)} of {len(records)} parts can be used")
    if arguments.json:
        write_json(arguments.json, [{**_as_json(record), "error": broken.get(record)} for record in records])
    return EXIT_FAULTS if broken else EXIT_DONE


def _new(arguments: argparse.Namespace) -> int:
    folder = new_plugin(arguments.plugin, arguments.kind, arguments.output)
    print(f"{folder}: {', '.join(path.relative_to(folder).as_posix() for path in sorted(folder.rglob('*.*')))}")
    print(f"Install and test it: pip install -e {folder} && cd {folder} && python -m pytest")
    return EXIT_DONE


# ---------------------------------------------------------------------------- show


def _show(arguments: argparse.Namespace) -> int:
    from cosmos_ssl.cli.plugins_facts import facts

    record = _named(arguments.part)
    cls = registry.load(record)
    options = [one for option in registry.options_of(cls) for one in (option, *registry.nested_options(option))]
    reserved = registry.GROUPS[record.group].reserved[1:]
    found = facts(record, cls, _given(record, cls, arguments.overrides))
    print(record)
    if cls.__doc__:
        print("\n".join(f"  {line}".rstrip() for line in inspect.cleandoc(cls.__doc__).splitlines()))
    rows = [(option.name, option.type_name, _default(option), option.doc) for option in options]
    engines = f" (and {', '.join(reserved)}, handled by the engine)" if reserved else ""
    print(f"\nOptions{'' if rows else ': none'}{engines}")
    if rows:
        heads = ("NAME", "TYPE", "DEFAULT", "MEANING" if any(row[3] for row in rows) else "")
        print(table([heads, *rows], indent="  "), end="")
    for title, lines in (("Requires", found.requires), ("Offers", found.offers)):
        print(f"\n{title}", *(lines or ([] if found.unknown else ["nothing"])), sep="\n  ")
    if found.unknown:
        print(f"  {found.unknown}")
    if arguments.json:
        described = [
            {
                "name": o.name,
                "type": o.type_name,
                "required": o.required,
                "default": None if o.required else o.default,
                "doc": o.doc,
            }
            for o in options
        ]
        told = {"requires": list(found.requires), "offers": list(found.offers)}
        write_json(arguments.json, {**_as_json(record), "options": described, **told})
    return EXIT_DONE


def _given(record: registry.Record, cls: type[Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Options from the command line, in the constructor's types. Raises ConfigError for those it does not have."""
    from cosmos_ssl.config.source import fault, parse_overrides

    faults: list[str] = []
    given = parse_overrides(overrides, faults).plain()
    values, wrong = registry.check_options(record, cls, given)
    faults += [fault("command line", key, message) for key, message in wrong if key]
    if faults:
        raise ConfigError(faults)
    return values


def _named(text: str) -> registry.Record:
    """The part that NAME or GROUP/NAME means. Raises UserError where it means none or several."""
    group, slash, name = text.rpartition("/")
    if slash and group not in registry.GROUPS:
        hint = did_you_mean(group, list(registry.GROUPS))
        raise UserError(f"no group named '{group}'.{hint} Groups: {', '.join(registry.GROUPS)}")
    if slash:
        return registry.find(group, name)
    records = _installed()
    bare = name.rpartition(":")[2]
    groups = sorted({record.group for record in records if record.name == bare}, key=list(registry.GROUPS).index)
    if not groups:
        hint = did_you_mean(name, [record.name for record in records])
        raise UserError(f"no part named '{name}'.{hint} See: cosmos-ssl plugins list")
    if len(groups) > 1:
        raise UserError(
            f"'{name}' is the name of several parts. Write {' or '.join(f'{group}/{name}' for group in groups)}"
        )
    return registry.find(groups[0], name)


def _default(option: registry.Option) -> str:
    if option.required:
        return "(required)"
    if isinstance(option.default, float):
        return f"{option.default:.6g}"
    return registry.shown(option.default)
