"""``cosmos-ssl data``: index and check shards or a folder of pictures, write the procedural scenes; the rest in files
beside this.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_ssl.cli import data_look, data_prepare, data_split
from cosmos_ssl.cli.common import add_json, table, write_json
from cosmos_ssl.cli.data_common import URLS, storage
from cosmos_ssl.cli.progress import progress
from cosmos_ssl.errors import EXIT_DONE, EXIT_FAULTS, UserError

if TYPE_CHECKING:
    from cosmos_ssl.shards.check import ShardReport

_URLS = f"{URLS}; or one folder of pictures"


def add_parser(subparsers: Any) -> None:
    """Add the command and its sub-commands."""
    parser = subparsers.add_parser("data", help="index, check and make training data")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    index = commands.add_parser("index", help="scan shards or a folder once, so that runs start at once")
    index.add_argument("urls", nargs="+", metavar="URLS", help=_URLS)
    index.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="where the manifest goes (default: beside the data, or the user's cache folder)",
    )
    index.add_argument(
        "--hash", action="store_true", help="hash every byte, not some of each file: no change goes unseen from then on"
    )
    add_json(index)
    index.set_defaults(run=_index)

    check = commands.add_parser("check", help="decode every sample; exit code 3 where faults were found")
    check.add_argument("urls", nargs="+", metavar="URLS", help=_URLS)
    check.add_argument(
        "--captions",
        metavar="SCHEMA",
        help="captions that each sample must have: dreamlip, pixelprose, txt, json:KEY, all; of a folder: txt"
        " (default: those that 'data prepare' noted beside the shards)",
    )
    check.add_argument(
        "--fix", action="store_true", help="write shards without the faults into a folder beside, NAME-fixed"
    )
    check.add_argument("--output", type=Path, metavar="DIR", help="another folder for --fix")
    check.add_argument("--continue", dest="resume", action="store_true", help="go on with an interrupted --fix")
    check.add_argument(
        "--max-pixels", type=int, default=1 << 26, metavar="N", help="larger pictures are faults (default: %(default)s)"
    )
    add_json(check)
    check.set_defaults(run=_check)

    scenes = commands.add_parser("scenes", help="write the procedural default data set")
    scenes.add_argument(
        "--output", type=Path, metavar="DIR", help="where the shards go (default: the user's cache folder)"
    )
    numbers = {
        "train-samples": 4096,
        "validation-samples": 512,
        "image-size": 64,
        "colours": 8,
        "seed": 0,
        "shard-samples": 1024,
    }
    for name, default in numbers.items():
        scenes.add_argument(f"--{name}", type=int, default=default, metavar="N", help="(default: %(default)s)")
    scenes.set_defaults(run=_scenes)

    for module in (data_prepare, data_split, data_look):
        module.add_parser(commands)


def _index(arguments: argparse.Namespace) -> int:
    from cosmos_ssl.data import Shards
    from cosmos_ssl.data.folder import picture_folder
    from cosmos_ssl.data.manifest import load_manifest, notices

    folder = picture_folder(arguments.urls)
    if folder is not None:
        return _index_folder(folder, arguments)
    with storage(), progress("shards indexed") as told:
        manifest = load_manifest(arguments.urls, cache_dir=arguments.cache_dir, full_hash=arguments.hash, progress=told)
    size = sum(shard.size for shard in manifest.shards)
    print(f"{len(manifest.shards):,} shards, {len(manifest):,} samples, {size:,} bytes")
    print(f"manifest: {manifest.path or 'kept nowhere: no folder can be written'}")
    _tell_hash(Shards(arguments.urls, manifest=manifest).identity())
    for line in notices(manifest):
        print(line)
    if arguments.json:
        shards = [{"name": s.name, "samples": s.samples, "bytes": s.size} for s in manifest.shards]
        write_json(arguments.json, {"shards": len(shards), "samples": len(manifest), "bytes": size, "by_shard": shards})
    return EXIT_DONE


def _tell_hash(identity: Mapping[str, Any]) -> None:
    if "full_hash" in identity:
        print(f"hash: {identity['full_hash']}, of every byte")


def _index_folder(folder: Path, arguments: argparse.Namespace) -> int:
    from cosmos_ssl.data.folder import Folder, folder_notices, load_folder

    with storage(), progress("parts indexed") as told:
        index = load_folder(folder, cache_dir=arguments.cache_dir, full_hash=arguments.hash, progress=told)
    print(f"{len(index):,} pictures, {len(index.classes):,} class folders, {len(index.folders()):,} folders in all")
    print(f"index: {index.path or 'kept nowhere: no folder can be written'}")
    _tell_hash(Folder(folder, cache_dir=arguments.cache_dir).identity())
    for line in folder_notices(index):
        print(line)
    if arguments.json:
        classes = [
            {"name": name, "samples": size}
            for name, size in zip(index.classes, index.class_sizes().tolist(), strict=True)
        ]
        write_json(arguments.json, {"samples": len(index), "by_class": classes})
    return EXIT_DONE


def _check(arguments: argparse.Namespace) -> int:
    from cosmos_ssl.data.folder import picture_folder
    from cosmos_ssl.shards.check import check_folder, check_shards
    from cosmos_ssl.shards.stats import default_schema

    folder = picture_folder(arguments.urls)
    noun = "shard" if folder is None else "folder"
    if folder is not None and arguments.fix:
        raise UserError(
            "--fix: shards can be fixed; a folder of pictures can be made into shards by 'data prepare captions'"
        )
    captions = arguments.captions or (default_schema(arguments.urls) if folder is None else None)
    with storage(), progress("shards checked" if folder is None else "parts checked") as told:
        options: dict[str, Any] = {"captions": captions, "max_pixels": arguments.max_pixels, "progress": told}
        reports = check_shards(arguments.urls, **options) if folder is None else check_folder(folder, **options)
    totals = _totals(report.faults for report in reports)
    samples, size = sum(r.samples for r in reports), sum(r.size for r in reports)
    print(f"{len(reports):,} {noun}s, {samples:,} samples, {size:,} bytes")
    rows = [(r.name, reason, f"{count:,}", r.examples[reason]) for r in reports for reason, count in r.faults.items()]
    if rows:
        print(table([(noun.upper(), "REASON", "COUNT", "FIRST"), *rows]), end="")
        print(
            f"{sum(totals.values()):,} faults: " + ", ".join(f"{reason} {count:,}" for reason, count in totals.items())
        )
    else:
        print("no faults")
    notes = _totals(report.notes for report in reports)
    for what, count in notes.items():
        first = next(report for report in reports if what in report.notes)
        print(f"no fault, {what}: {count:,} ({first.name}: {first.examples[what]})")
    if arguments.json:
        by_noun = {f"{noun}s": len(reports), "samples": samples, "bytes": size, "faults": totals, "notes": notes}
        report = {**by_noun, f"by_{noun}": [asdict(r) for r in reports]}
        write_json(arguments.json, report)
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


def _totals(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for found in counts:
        for reason, count in found.items():
            totals[reason] = totals.get(reason, 0) + count
    return totals


def _scenes(arguments: argparse.Namespace) -> int:
    from cosmos_ssl.data.scenes import SceneOptions, default_folder, write_scenes

    options = SceneOptions(
        train_samples=arguments.train_samples,
        validation_samples=arguments.validation_samples,
        image_size=arguments.image_size,
        colours=arguments.colours,
        seed=arguments.seed,
        shard_samples=arguments.shard_samples,
    )
    folder = write_scenes((arguments.output or default_folder(options)).absolute(), options)
    print(f"train: {options.pattern(folder, 'train')}  ({options.train_samples:,} samples)")
    print(f"val:   {options.pattern(folder, 'val')}  ({options.validation_samples:,} samples)")
    return EXIT_DONE
