"""From caption tables and images to shards: tables stored, images indexed, both joined, shards written; any stage can
be continued.
"""

from __future__ import annotations

import io
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cosmos_ssl.data.captions import DREAMLIP_FIELDS
from cosmos_ssl.errors import DataError, UserError
from cosmos_ssl.files import storage_faults, written_whole
from cosmos_ssl.liveness import OnStage
from cosmos_ssl.shards.output import Output, in_processes, numbers
from cosmos_ssl.shards.prepare.images import load_index, open_images
from cosmos_ssl.shards.prepare.joining import NO_ROW, REPEATED, join, open_mapped
from cosmos_ssl.shards.prepare.rows import Rows, TableNote, Wanted, check_table, pieces, store_rows
from cosmos_ssl.shards.prepare.sentences import SPLITTERS, whole
from cosmos_ssl.shards.prepare.tables import find_tables, stamps
from cosmos_ssl.shards.prepare.writing import ShardWriter

PRESETS: Mapping[str, Mapping[str, str]] = {
    "dreamlip": {name: name for name in DREAMLIP_FIELDS},
    "pixelprose": {"original_caption": "original_caption", "vlm_caption": "caption"},
}
"""Columns of the published tables and the fields that the caption schema of that name reads."""
_WHOLE = {"pixelprose": {"original_caption"}}  # one sentence, however many full stops


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareOptions:
    """What is made of what. Raises UserError for values that make no sense."""

    schema: str
    """dreamlip, pixelprose or captions (any columns)."""
    tables: Sequence[str]
    images: Sequence[str]
    output: Path
    caption_columns: Sequence[str] = ()
    url_column: str | None = None
    image_column: str | None = None
    samples_per_shard: int = 5000
    name: str = "train"
    rule: str | None = None
    """How captions are cut into sentences; by default as published where the tables are, else carefully."""
    decode: bool = True
    max_pixels: int = 1 << 26
    workers: int = 1

    def __post_init__(self) -> None:
        for option in ("samples_per_shard", "workers", "max_pixels"):
            if getattr(self, option) < 1:
                raise UserError(f"--{option.replace('_', '-')}: {getattr(self, option)} is not positive")
        if self.sentence_rule not in SPLITTERS:
            raise UserError(f"--sentences: no rule '{self.rule}'. Known: {', '.join(SPLITTERS)}")
        if not self.columns:
            raise UserError("--caption-columns: which columns hold captions? Name them, such as short,long")
        if taken := {"key", "url", "image"} & set(self.columns.values()):
            raise UserError(
                f"--caption-columns: '{min(taken)}' is the name of something else in a sample's JSON. Rename "
                "that column"
            )
        if not self.name or not all(c.isalnum() or c in "-_" for c in self.name) or len(self.name) > 64:
            raise UserError(f"--name: '{self.name}' is no name for shards: letters, digits, - and _ are")

    @property
    def columns(self) -> Mapping[str, str]:
        """Caption columns and the fields that they become."""
        preset = PRESETS.get(self.schema, {})
        return {c: preset.get(c, c) for c in self.caption_columns} if self.caption_columns else preset

    @property
    def sentence_rule(self) -> str:
        """The rule by which captions are cut."""
        return self.rule or ("published" if self.schema in PRESETS else "careful")

    @property
    def splitters(self) -> dict[str, Callable[[str], list[str]]]:
        """How the captions of each field are cut into sentences."""
        uncut = _WHOLE.get(self.schema, ())
        return {name: whole if name in uncut else SPLITTERS[self.sentence_rule] for name in self.columns.values()}

    @property
    def caption_schema(self) -> str:
        """The ``data.caption_schema`` that reads these shards."""
        return (
            self.schema
            if self.schema in PRESETS and not self.caption_columns
            else f"json:{','.join(self.columns.values())}"
        )


@dataclass(slots=True)
class Counts:
    """How rows and images were found to belong together, and what became of them."""

    rows: int = 0
    images: int = 0
    matched: int = 0
    samples: int = 0
    shards: int = 0
    bytes: int = 0
    rows_without_image: int = 0
    rows_repeated: int = 0
    images_without_row: int = 0
    images_repeated: int = 0
    images_without_url: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    """Rows that could not be used, by reason."""
    examples: dict[str, str] = field(default_factory=dict)
    listed: dict[str, int] = field(default_factory=dict)
    """Caption fields that held lists already, and in how many samples."""


class Preparation:
    """One run of ``cosmos-ssl data prepare``."""

    def __init__(self, options: PrepareOptions, progress: OnStage = lambda what, done, total: None) -> None:
        self.options = options
        self.progress = progress
        self.tables = find_tables(options.tables)
        self.images = open_images(options.images)
        self.wanted = Wanted(
            captions=options.columns,
            by_url=self.images.by_url,
            url_column=options.url_column,
            image_column=options.image_column,
            root=self.images.root,
        )
        for table in self.tables:
            check_table(table, self.wanted)

    def run(self, *, resume: bool = False, missing: Path | None = None) -> Counts:
        """Write the shards; of finished work its counts. Raises UserError, DataError, StorageError."""
        output, identity = Output(self.options.output.absolute()), self.identity()
        with output.claimed(identity, resume=resume):
            if (report := output.report) is not None:
                if missing is not None:
                    raise UserError(
                        "--list-missing: this output is finished and its index is gone; ask for the list in a --dry-run"
                    )
                return Counts(**report["counts"])
            counts, plan = self._join(output)
            self._write(output, plan, counts)
            if missing is not None:
                self._list_missing(output, missing)
            sizes = {name: output.note(f"{name}.json")["samples"] for name in plan["names"]}
            schema = self.options.caption_schema
            output.finish(sizes, {"identity": identity, "caption_schema": schema, "counts": asdict(counts)})
        return counts

    def dry_run(self, missing: Path | None = None) -> Counts:
        """Count what would match; nothing is kept. Raises UserError, DataError, OSError."""
        beside = next(f for f in self.options.output.absolute().parents if f.is_dir())
        with tempfile.TemporaryDirectory(dir=beside, prefix=".dry-run-") as folder:
            output = Output(Path(folder))
            output.work.mkdir()
            counts, _ = self._join(output, captions=False)
            if missing is not None:
                self._list_missing(output, missing)
        return counts

    def identity(self) -> dict[str, Any]:
        """Return what the shards depend on, in plain values."""
        options = self.options
        kept = ("samples_per_shard", "name", "decode", "max_pixels", "url_column", "image_column")
        return {
            "tables": stamps(self.tables),
            "images": self.images.identity(),
            "captions": dict(options.columns),
            "rule": options.sentence_rule,
            **{name: getattr(options, name) for name in kept},
        }

    def _stems(self, output: Output) -> list[Path]:
        return [output.work / f"table-{i:04d}" for i in range(len(self.tables))]

    def _join(self, output: Output, *, captions: bool = True) -> tuple[Counts, Any]:
        """Tables, images and the join, each only where it is not done yet."""
        if (plan := output.note("plan.json")) is None:
            self._store(output, captions)
            notes = self.images.index(output, self.options.workers, self.progress)
            keys = Rows(self._stems(output)).keys()
            join(output.work, keys, (load_index(output.work, part)["key"] for part in range(len(notes))))
            plan = self._plan(output, notes)
            output.put("plan.json", plan)
        return Counts(**plan["counts"]), plan

    def _store(self, output: Output, captions: bool) -> None:
        """Store the rows of the tables that are not stored yet; of a single one progress is told while it is read."""
        stems = zip(self.tables, self._stems(output), strict=True)
        todo = [(table, stem) for table, stem in stems if not stem.with_suffix(".json").is_file()]
        sizes = [table.stat().st_size for table, _ in todo]
        done, total = 0, sum(sizes)

        def told(read: int) -> None:
            self.progress("bytes of tables read", done + read, total)

        if len(todo) == 1 or self.options.workers == 1:
            for (table, stem), size in zip(todo, sizes, strict=True):
                told(0)
                store_rows(table, stem, self.wanted, captions=captions, told=told)
                done += size
            return
        told(0)
        store = partial(store_rows, wanted=self.wanted, captions=captions)
        for number, _ in in_processes(self.options.workers, store, todo):
            done += sizes[number]
            told(0)

    def _plan(self, output: Output, notes: Sequence[Mapping[str, int]]) -> dict[str, Any]:
        """Return where each shard begins, and what was matched."""
        row_of = open_mapped(output.work / "row_of", np.dtype(np.int64))
        counts, part_sizes, starts, begin = Counts(), list[int](), list[int](), 0
        for part in range(len(notes)):
            picture = load_index(output.work, part)["picture"]
            rows = row_of[begin : begin + len(picture)]
            places = np.flatnonzero(rows >= 0)
            offset = -counts.matched % self.options.samples_per_shard
            starts += (begin + places[offset :: self.options.samples_per_shard]).tolist()
            counts.matched += len(places)
            counts.images_without_row += int(((rows == NO_ROW) & picture).sum())
            counts.images_repeated += int((rows == REPEATED).sum())
            part_sizes.append(len(picture))
            begin += len(picture)
        state = open_mapped(output.work / "state", np.dtype(np.uint8))
        for first in range(0, len(state), 1 << 24):
            found = np.bincount(state[first : first + (1 << 24)], minlength=3)
            counts.rows_without_image += int(found[0])
            counts.rows_repeated += int(found[2])
        counts.images = sum(note["images"] for note in notes)
        counts.images_without_url = sum(note["without a URL"] for note in notes)
        for stem in self._stems(output):
            table = TableNote.of(stem)
            counts.rows += table.rows
            for reason, count in table.faults.items():
                counts.bad[reason] = counts.bad.get(reason, 0) + count
                counts.examples.setdefault(reason, ", ".join(table.examples[reason]))
        counts.shards = len(starts)
        names = [f"{self.options.name}-{number}.tar" for number in numbers(len(starts))]
        return {"counts": asdict(counts), "part_sizes": part_sizes, "starts": [*starts, begin], "names": names}

    def _write(self, output: Output, plan: Mapping[str, Any], counts: Counts) -> None:
        """Write the shards that are not there yet, and add to the counts what went into each."""
        if not plan["names"]:
            raise DataError(self._nothing_matched(output, counts))
        writer = ShardWriter(
            folder=output.folder,
            work=output.work,
            images=self.images,
            rows=Rows(self._stems(output)),
            row_of=open_mapped(output.work / "row_of", np.dtype(np.int64)),
            part_sizes=plan["part_sizes"],
            starts=plan["starts"],
            names=plan["names"],
            splitters=self.options.splitters,
            max_pixels=self.options.max_pixels,
            decode=self.options.decode,
        )
        left_out, done = Counter[str](), 0

        def add(note: Mapping[str, Any]) -> None:
            nonlocal done
            counts.samples += note["samples"]
            counts.bytes += note["size"]
            for reason, name, detail in note["left_out"]:
                left_out[reason] += 1
                counts.examples.setdefault(reason, f"{name}: {detail}" if detail else name)
            for name, count in note["listed"].items():
                counts.listed[name] = counts.listed.get(name, 0) + count
            done += note["samples"] + len(note["left_out"])

        notes = [output.note(f"{name}.json") for name in plan["names"]]
        for note in filter(None, notes):
            add(note)
        self.progress("samples written", done, counts.matched)
        jobs = [(shard,) for shard, note in enumerate(notes) if note is None]
        for _, note in in_processes(self.options.workers, writer.write, jobs):
            add(note)
            self.progress("samples written", done, counts.matched)
        for reason, count in left_out.most_common():
            counts.bad[reason] = counts.bad.get(reason, 0) + count
        if counts.samples == 0:
            what = ", ".join(f"{reason} {count:,}" for reason, count in counts.bad.items())
            example = next(iter(counts.examples.values()))
            raise DataError(f"--output: not one of {counts.matched:,} samples can be used: {what} ({example})")

    def _nothing_matched(self, output: Output, counts: Counts) -> str:
        """Why there is no sample, with a row and an image to compare."""
        rows, index = Rows(self._stems(output)), load_index(output.work, 0)
        row = rows.name(0) if len(rows) else "-"
        image = self.images.name(output.work, 0, index[0]) if len(index) else "-"
        return (
            f"--images: not one of {counts.rows:,} rows names one of {counts.images:,} images."
            f" The first row names {row!r}, the first image is {image!r}"
        )

    def _list_missing(self, output: Output, path: Path) -> None:
        """One line for each row without an image, image without a row, and row left out: what, name, reason."""
        with storage_faults(f"--list-missing {path}: cannot be written"), written_whole(path) as file:
            text = io.TextIOWrapper(file, "utf-8", "backslashreplace", write_through=True)
            text.writelines(map("{}\n".format, self._missing(output)))
            text.detach()

    def _missing(self, output: Output) -> Iterator[str]:
        rows, number = Rows(self._stems(output)), 0
        for state in pieces(output.work / "state", np.dtype(np.uint8)):
            for place in np.flatnonzero(state != 1).tolist():
                yield f"row\t{rows.name(number + place)}\t{'repeated' if state[place] == 2 else 'no image'}"
            number += len(state)
        row_of, begin = open_mapped(output.work / "row_of", np.dtype(np.int64)), 0
        plan = output.note("plan.json")
        for part, size in enumerate(plan["part_sizes"]):
            index = load_index(output.work, part)
            found = row_of[begin : begin + size]
            begin += size
            for place in np.flatnonzero((found < 0) & index["picture"]).tolist():
                name = self.images.name(output.work, part, index[place])
                yield f"image\t{name}\t{'repeated' if found[place] == REPEATED else 'no row'}"
        for shard in plan["names"]:
            for reason, row, detail in (output.note(f"{shard}.json") or {"left_out": []})["left_out"]:
                yield f"sample\t{row}\t{reason}{': ' * bool(detail)}{detail}"
