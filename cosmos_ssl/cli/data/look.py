"""``cosmos-ssl data stats`` and ``data show``: what is in shards, in numbers and as a model would see it."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_ssl.cli.common import add_json, table, write_json
from cosmos_ssl.cli.data.common import add_command, own_schema, storage
from cosmos_ssl.cli.progress import progress
from cosmos_ssl.errors import EXIT_DONE, DataError, UserError

if TYPE_CHECKING:
    from cosmos_ssl.api import Tokenizer
    from cosmos_ssl.data import Shards, TableData
    from cosmos_ssl.evaluation.contact_sheet import SampleLook

_ROOM = 2048
"""Tokens that a text may have for its length to be told exactly."""


def add_parser(commands: Any) -> None:
    """Add the two commands."""
    stats = add_command(commands, "stats", "samples, image sizes, sentences and tokens of captions", table=True)
    schemas = "dreamlip, pixelprose, txt, json:KEY, all (default: as noted beside the shards, else all)"
    stats.add_argument("--captions", metavar="SCHEMA", help=schemas)
    looked_at = "evenly spread samples to look at, 0: all (default: %(default)s)"
    stats.add_argument("--samples", type=int, default=20_000, metavar="N", help=looked_at)
    tokenizers = "a tokenizer that takes context_length (default: %(default)s)"
    stats.add_argument("--tokenizer", default="clip", metavar="NAME", help=tokenizers)
    cut = "where the model cuts texts (default: %(default)s)"
    stats.add_argument("--context-length", type=int, default=77, metavar="N", help=cut)
    add_json(stats)
    stats.set_defaults(run=_stats)

    show = add_command(commands, "show", "pictures and a page of the views that a config draws of samples", table=True)
    config = "a file, or the name of a config that comes with cosmos-ssl"
    show.add_argument("--config", required=True, metavar="CONFIG", help=config)
    show.add_argument("--output", type=Path, required=True, metavar="DIR", help="where index.html and the PNG files go")
    spread = "evenly spread samples (default: %(default)s)"
    show.add_argument("--samples", type=int, default=8, metavar="N", help=spread)
    show.add_argument("--seed", type=int, metavar="N", help="of the views (default: the config's training.seed)")
    show.epilog = "key.sub=value arguments override single values of the config."
    show.set_defaults(run=_show, overrides=[])


def _stats(arguments: argparse.Namespace) -> int:
    from cosmos_ssl.shards.stats import collect_stats

    if arguments.samples < 0:
        raise UserError(f"--samples: {arguments.samples} is negative; 0 looks at all")
    urls, schema = arguments.urls, arguments.captions or own_schema(arguments.urls) or "all"
    tokenizer = _tokenizer(arguments.tokenizer)
    with storage(), progress("samples looked at") as told:
        stats = collect_stats(urls, captions=schema, tokenizer=tokenizer, samples=arguments.samples, progress=told)
    found = stats.as_json(arguments.context_length)
    size = f"{stats.shards:,} shards, {stats.samples:,} samples, {stats.bytes:,} bytes"
    print(f"{size}; looked at {stats.looked_at:,}, captions: {schema}")
    if stats.unusable:
        print(f"could not be used: {_listed(stats.unusable)}")
    rows: list[tuple[str, ...]] = [("", "MEAN", "LEAST", "5 %", "HALF", "95 %", "MOST")]
    for name, key in (("width, px", "width"), ("height, px", "height"), ("image, bytes", "image_bytes")):
        rows.append(_row(name, found[key]))
    rows.append(_row("sentences a sample", found["sentences"]))
    for name, values in found["fields"].items():
        rows.append(_row(f"{name}: sentences", values["sentences"]))
        rows.append(_row(f"{name}: tokens a sentence", values["tokens_per_sentence"]))
        rows.append(_row(f"{name}: tokens a caption", values["tokens_per_caption"]))
    print(table(rows), end="")
    print(f"formats: {_listed(stats.formats)}")
    if stats.with_alpha:
        print(f"{stats.with_alpha:,} pictures with transparency (put on model.background)")
    if schema == "all":
        taken, left = (", ".join(found[key]) or "none" for key in ("fields", "left_out"))
        print(f"captions are taken from: {taken}; not from (bookkeeping, addresses, hashes): {left}")
    if found["fields"]:
        head = ("FIELD", "SAMPLES", f"SENTENCES CUT AT {arguments.context_length}", "CAPTIONS CUT")
        cut = [
            (name, f"{v['samples']:,}", f"{v['sentences_cut']:.2%}", f"{v['captions_cut']:.2%}")
            for name, v in found["fields"].items()
        ]
        print(table([head, *cut]), end="")
    if arguments.json:
        write_json(arguments.json, {"captions": schema, "context_length": arguments.context_length, **found})
    return EXIT_DONE


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{what} {count:,}" for what, count in counts.most_common())


def _row(name: str, values: Mapping[str, float]) -> tuple[str, ...]:
    if not values["count"]:
        return (name, *["-"] * 6)
    return (name, f"{values['mean']:,.1f}", *(f"{values[f'p{level}']:,.0f}" for level in (0, 5, 50, 95, 100)))


def _tokenizer(name: str) -> Tokenizer:
    from cosmos_ssl import registry
    from cosmos_ssl.api import Spec, Tokenizer

    record = registry.find("tokenizers", name)
    cls = registry.load(record)
    options, wrong = registry.check_options(record, cls, {"context_length": _ROOM})
    if wrong:
        raise UserError(f"--tokenizer {name}: {wrong[0][1]}")
    made = cls(Spec(embed_dim=1), **options)
    assert isinstance(made, Tokenizer)
    return made


def _show(arguments: argparse.Namespace) -> int:
    from cosmos_ssl.config import load_config

    if arguments.samples < 1:
        raise UserError(f"--samples: {arguments.samples} is not positive")
    loaded = load_config(arguments.config, arguments.overrides)
    from cosmos_ssl.api import BadSample  # after the config's first checks, which need no torch
    from cosmos_ssl.build import Builder
    from cosmos_ssl.data.scan import spread
    from cosmos_ssl.evaluation.contact_sheet import look

    augmenters, spec = Builder(loaded).for_views()
    seed = loaded.config.training.seed if arguments.seed is None else arguments.seed
    wanted = loaded.config.data.options.get("caption_schema", "dreamlip") if loaded.config.data else None
    with storage():
        shards, schema, notes = _open(arguments.urls, wanted if "text" in augmenters else None)
        looks: list[SampleLook] = []
        skipped: list[str] = []
        for index in spread(len(shards), arguments.samples):
            try:
                sample = shards.read(index).on(spec.background)
                looks.append(look(sample, augmenters, spec.image, seed=seed, position=index))
            except BadSample as error:
                skipped.append(f"sample {index}: {error}")
        if not looks:
            raise DataError(f"data: not one of {len(skipped)} samples can be shown: {skipped[0]}")
        subtitle = f"views as {loaded.config.name} draws them; seed {seed}; captions: {schema}"
        page = _write(arguments.output, looks, subtitle, notes + skipped)
    for line in notes + skipped:
        print(line)
    print(f"{len(looks)} samples: {page}")
    return EXIT_DONE


def _open(urls: list[str], wanted: str | None) -> tuple[Shards | TableData, str | None, list[str]]:
    """The shards by the schema of the config; where they have no captions by it, by their own, with a notice."""
    from cosmos_ssl.data import Shards
    from cosmos_ssl.data.table import Columns, TableData, is_table

    if is_table(urls):
        captions = None if wanted is not None else ()
        table = TableData(urls, columns=Columns(caption_columns=captions), texts=wanted is not None)
        table.prepare()
        return table, ", ".join(table.index.chosen.captions) or None, []
    shards = Shards(urls, caption_schema=wanted)
    if wanted is None:
        return shards, None, []
    try:
        shards.prepare()
        return shards, wanted, []
    except DataError:
        own = own_schema(urls)
        if own is None or own == wanted:
            raise
    said = f"no captions by the config's schema '{wanted}'; shown by '{own}'. Train with data.caption_schema={own}"
    return Shards(urls, caption_schema=own, manifest=shards.manifest), own, [said]


def _write(folder: Path, looks: list[SampleLook], subtitle: str, notes: list[str]) -> Path:
    from torchvision.io import encode_png

    from cosmos_ssl.evaluation.contact_sheet import contact_sheet
    from cosmos_ssl.evaluation.page import Page
    from cosmos_ssl.files import written_whole

    folder.mkdir(parents=True, exist_ok=True)
    page = Page("What the model sees", subtitle)
    for note in notes:
        page.text(note)
    for number, found in enumerate(looks):
        page.section(found.key).figure(found.picture, f"{found.picture.shape[2]} x {found.picture.shape[1]} pixels")
        for name, views in found.images.items():
            for view, pixels in enumerate(views, 1):
                page.figure(pixels, f"{name} {view} of {len(views)}")
        rows = [(name, view, text) for name, texts in found.texts.items() for view, text in enumerate(texts, 1)]
        if rows:
            page.table([("TEXT GROUP", "VIEW", "TEXT"), *rows])
        with written_whole(folder / f"{number:03d}.png") as file:
            file.write(encode_png(contact_sheet(found)).numpy().tobytes())
    page.write(folder / "index.html")
    return folder / "index.html"
