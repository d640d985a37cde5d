"""``cosmos-ssl data check``: what is wrong with shards, a folder of pictures or tables, and shards without it."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_ssl.cli.common import add_json, table, write_json
from cosmos_ssl.cli.data.common import add_command, add_continue, add_max_pixels, own_schema, storage
from cosmos_ssl.cli.progress import progress
from cosmos_ssl.errors import EXIT_DONE, EXIT_FAULTS, UserError

if TYPE_CHECKING:
    from cosmos_ssl.shards.check import ShardReport

_CAPTIONS = (
    "captions that each sample must have: dreamlip, pixelprose, txt, json:KEY, all; of a folder: txt; of a table: all"
    " (default: those that 'data prepare' noted beside the shards)"
)


def add_parser(commands: Any) -> None:
    """Add the command."""
    check = add_command(
        commands, "check", "decode every sample; exit code 3 where faults were found", folder=True, table=True
    )
    check.add_argument("--captions", metavar="SCHEMA", help=_CAPTIONS)
    fix = "write shards without the faults into a folder beside, NAME-fixed"
    check.add_argument("--fix", action="store_true", help=fix)
    check.add_argument("--output", type=Path, metavar="DIR", help="another folder for --fix")
    add_continue(check, "an interrupted --fix")
    add_max_pixels(check, "faults")
    add_json(check)
    check.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> int:
    from cosmos_ssl.data.folder import picture_folder
    from cosmos_ssl.data.table import is_table
    from cosmos_ssl.shards.check import check_folder, check_shards, check_table

    folder = picture_folder(arguments.urls)
    noun = "table" if is_table(arguments.urls) else "shard" if folder is None else "folder"
    if noun != "shard" and arguments.fix:
        what = "a folder of pictures" if folder is not None else "a table"
        raise UserError(f"--fix: shards can be fixed; {what} can be made into shards by 'data prepare captions'")
    captions = arguments.captions or (own_schema(arguments.urls) if noun == "shard" else None)
    with storage(), progress("shards checked" if noun == "shard" else "parts checked") as told:
        options: dict[str, Any] = {"captions": captions, "max_pixels": arguments.max_pixels, "progress": told}
        if folder is not None:
            reports = check_folder(folder, **options)
        else:
            reports = (check_table if noun == "table" else check_shards)(arguments.urls, **options)
    faults, notes = Counter[str](), Counter[str]()
    for report in reports:
        faults.update(report.faults)
        notes.update(report.notes)
    samples, size = sum(r.samples for r in reports), sum(r.size for r in reports)
    print(f"{len(reports):,} {noun}s, {samples:,} samples, {size:,} bytes")
    rows = [(r.name, reason, f"{count:,}", r.examples[reason]) for r in reports for reason, count in r.faults.items()]
    if rows:
        print(table([(noun.upper(), "REASON", "COUNT", "FIRST"), *rows]), end="")
        print(f"{faults.total():,} faults: " + ", ".join(f"{reason} {count:,}" for reason, count in faults.items()))
    else:
        print("no faults")
    for what, count in notes.items():
        first = next(report for report in reports if what in report.notes)
        print(f"no fault, {what}: {count:,} ({first.name}: {first.examples[what]})")
    if arguments.json:
        totals = {f"{noun}s": len(reports), "samples": samples, "bytes": size, "faults": faults, "notes": notes}
        write_json(arguments.json, {**totals, f"by_{noun}": [asdict(report) for report in reports]})
    if arguments.fix and rows:
        _fix(reports, captions, arguments)
    return EXIT_FAULTS if rows else EXIT_DONE


def _fix(reports: Sequence[ShardReport], captions: str | None, arguments: argparse.Namespace) -> None:
    from cosmos_ssl.shards.fix import fix_shards, fixed_folder

    folder = arguments.output or fixed_folder(arguments.urls)
    with storage(), progress("shards fixed") as told:
        sizes = fix_shards(arguments.urls, reports, folder, captions=captions, resume=arguments.resume, progress=told)
    gone = f" ({len(reports) - len(sizes):,} shards had none)" if len(reports) > len(sizes) else ""
    print(f"fixed: {len(sizes):,} shards, {sum(sizes.values()):,} samples in {folder}{gone}")
