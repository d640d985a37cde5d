#!/usr/bin/env python3
"""Compare ``cosmos-ssl data prepare`` with a plain loop that does the same with a dictionary.

python tools/bench_prepare.py [--rows N] [--folder DIR] [--json FILE] makes captions and shards as img2dataset writes
them, for 100,000 rows and for a million. Memory is what all processes hold between them, without mapped files.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from bench import MIN_SECONDS, Row, make_ratio_row, make_row, report
from PIL import Image

from cosmos_ssl.data.captions import DREAMLIP_FIELDS
from cosmos_ssl.shards.keys import hashed
from cosmos_ssl.shards.output import TAR_END, tar_member
from cosmos_ssl.shards.prepare.joining import join

SHARD = 10_000
MB = 1e6
RUN = "import sys\nfrom cosmos_ssl.cli import main\nsys.exit(main(sys.argv[1:]))"


def url(number: int) -> str:
    return f"https://images.example.com/photos/{number * 7919 % 99_999_989}/{number}.jpg?width=640"


def captions(number: int) -> list[str]:
    sentence = f"The image number {number} shows a red circle beside a blue star on a plain ground. "
    return [f"a picture {number}", *(sentence * (1 + 4 * (place % 2)) for place in range(6))]


def make(folder: Path, rows: int, side: int) -> tuple[Path, Path]:
    """A CSV table and image shards of as many rows, in another order; every tenth image is missing."""
    if not (folder / "whole").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with (folder / "captions.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["Image Path", *DREAMLIP_FIELDS])
            writer.writerows([url(number), *captions(number)] for number in range(rows))
        pictures = [picture(seed, side) for seed in range(16)]
        order = np.random.default_rng(0).permutation(rows)
        order = order[order % 10 != 0]
        for shard, start in enumerate(range(0, len(order), SHARD)):
            with (folder / f"{shard:05d}.tar").open("wb") as file:
                for place, number in enumerate(order[start : start + SHARD].tolist()):
                    key = f"{shard:05d}{place:04d}"
                    table = {
                        "caption": "alt",
                        "url": url(number),
                        "key": key,
                        "status": "success",
                        "width": side,
                        "height": side,
                    }
                    file.write(
                        tar_member(f"{key}.jpg", pictures[number % 16])
                        + tar_member(f"{key}.json", json.dumps(table).encode())
                    )
                file.write(TAR_END)
        (folder / "whole").touch()
    return folder / "captions.csv", folder


def picture(seed: int, side: int) -> bytes:
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8))
    buffer = io.BytesIO()
    small.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "jpeg", quality=90)
    return buffer.getvalue()


def plain_loop(table: Path, images: Path, output: Path) -> int:
    """Do as a script of fifty lines would: captions in a dictionary, tarfile in and out, every picture decoded."""
    with table.open(newline="") as file:
        reader = csv.DictReader(file)
        found = {row["Image Path"]: row for row in reader}
    count = 0
    output.mkdir()
    out: tarfile.TarFile | None = None
    for shard in sorted(images.glob("*.tar")):
        parts: dict[str, bytes] = {}
        with tarfile.open(shard) as archive:
            for member in archive:
                extracted = archive.extractfile(member)
                parts[member.name.partition(".")[2]] = extracted.read() if extracted else b""
                if len(parts) < 2:
                    continue
                row = found.get(json.loads(parts["json"])["url"])
                if row is not None:
                    Image.open(io.BytesIO(parts["jpg"])).load()
                    lists = {name: [s.strip() for s in row[name].split(".") if s.strip()] for name in DREAMLIP_FIELDS}
                    if count % 5000 == 0:
                        if out is not None:
                            out.close()
                        out = tarfile.open(output / f"{count // 5000:05d}.tar", "w")  # noqa: SIM115
                    assert out is not None
                    for extension, body in (("jpg", parts["jpg"]), ("json", json.dumps(lists).encode())):
                        info = tarfile.TarInfo(f"{count:09d}.{extension}")
                        info.size = len(body)
                        out.addfile(info, io.BytesIO(body))
                    count += 1
                parts = {}
    if out is not None:
        out.close()
    return count


def private_bytes(parent: int) -> int:
    """Memory of a process and its children that the kernel cannot take back: no mapped files, and what forks share
    counts once.
    """
    children = Path(f"/proc/{parent}/task/{parent}/children")
    total = 0
    try:
        for number in (parent, *map(int, children.read_text().split())):
            rollup = Path(f"/proc/{number}/smaps_rollup").read_text()
            total += 1024 * int(rollup.partition("Pss_Anon:")[2].split()[0])
    except (OSError, IndexError):  # one has just ended
        return 0
    return total


def prepare(table: Path, images: Path, output: Path, workers: int, *, watched: bool = False) -> tuple[float, int, int]:
    """Run the command; return its seconds, the peak of its memory if it is ``watched``, and the rows written."""
    shutil.rmtree(output, ignore_errors=True)
    given = ["--table", table, "--images", images, "--output", output, "--workers", workers]
    start, peak = time.monotonic(), 0
    command = [sys.executable, "-c", RUN, "data", "prepare", "dreamlip", *map(str, given)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while watched and process.poll() is None:
        peak = max(peak, private_bytes(process.pid))
        time.sleep(0.2)
    if process.wait():
        raise SystemExit(process.returncode)
    seconds = time.monotonic() - start
    return seconds, peak, sum(json.loads((output / "sizes.json").read_text()).values())


def measure_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.tar"))


def measure_joins(rows: int) -> tuple[float, float]:
    """Return the seconds of the join by dealt files and of one by an SQLite table, both from names, on disk."""
    names = [url(number).encode() for number in range(rows)]
    order = np.random.default_rng(0).permutation(rows).tolist()
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        keys = (hashed(names[at : at + 8192]) for at in range(0, rows, 8192))
        other = (hashed([names[i] for i in order[at : at + 8192]]) for at in range(0, rows, 8192))
        found = join(Path(folder), keys, other)
        dealt = time.monotonic() - start
        assert found.tolist() == order
        start = time.monotonic()
        base = sqlite3.connect(f"{folder}/base")
        base.execute("PRAGMA journal_mode=OFF")
        base.execute("CREATE TABLE rows (key BLOB PRIMARY KEY, number INTEGER) WITHOUT ROWID")
        base.executemany(
            "INSERT INTO rows VALUES (?, ?)", ((key, number) for number, key in enumerate(_digests(names)))
        )
        for at in range(0, rows, 8192):
            for key in _digests([names[i] for i in order[at : at + 8192]]):
                base.execute("SELECT number FROM rows WHERE key = ?", (key,)).fetchone()
        sqlite = time.monotonic() - start
        base.close()
    return dealt, sqlite


def _digests(names: list[bytes]) -> Iterator[bytes]:
    from hashlib import blake2b

    return (blake2b(name, digest_size=16).digest() for name in names)


def main() -> int:
    """Print a table; exit with 1 if a row fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where data are made and kept (default: a temporary folder)")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the large table (default: %(default)s)")
    parser.add_argument("--small-rows", type=int, default=100_000, help="(default: %(default)s)")
    parser.add_argument(
        "--side", type=int, default=256, help="pixels of the pictures of the small set (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the lines there, as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        return report(list(measure(arguments.folder or Path(temporary), arguments)), arguments.json)


def measure(
    folder: Path, arguments: argparse.Namespace, prepare: Callable[..., tuple[float, int, int]] = prepare
) -> Iterator[Row]:
    """Yield the rows one after another."""
    small, large, out = arguments.small_rows, arguments.rows, folder / "out"
    table, images = make(folder / f"{small}-{arguments.side}", small, arguments.side)
    shutil.rmtree(folder / "plain", ignore_errors=True)
    start = time.monotonic()
    expected = plain_loop(table, images, folder / "plain")
    plain = time.monotonic() - start
    yield make_rate_row("plain loop", small, plain)
    yield make_rate_row("plain loop, written", measure_size(folder / "plain") / MB, plain, "MB/s")
    seconds, _, written = prepare(table, images, out, arguments.workers)
    name = f"prepare, {arguments.workers} processes"
    yield make_ratio_row(f"{name}, rows written", written, expected, "of the plain loop", at_least=1, at_most=1)
    yield make_rate_row(name, small, seconds)
    yield make_rate_row(f"{name}, written", measure_size(out) / MB, seconds, "MB/s")
    yield make_ratio_row("prepare / plain loop", plain, seconds, "times", at_least=2, sides_more_than=MIN_SECONDS)
    peaks = []
    for count in (small, large):
        table, images = make(folder / f"{count}-16", count, 16)
        seconds, peak, _ = prepare(table, images, out, arguments.workers, watched=True)
        peaks.append(peak / MB)
        yield make_rate_row(f"tiny pictures, {count:,} rows", count, seconds)
        yield make_row(f"private memory, {count:,} rows", peak / MB, "MB", more_than=1)
    yield make_row("growth of that memory", peaks[1] - peaks[0], "MB", at_most=64, more_than=None, sides=peaks)
    dealt, sqlite = measure_joins(large)
    yield make_rate_row(f"join by dealt files, {large:,} rows", large, dealt)
    yield make_rate_row(f"join by SQLite, {large:,} rows", large, sqlite)
    yield make_ratio_row("dealt files / SQLite", sqlite, dealt, "times", at_least=1, sides_more_than=MIN_SECONDS)


def make_rate_row(name: str, count: float, seconds: float, unit: str = "rows/s") -> Row:
    """Return the row of a rate."""
    return make_ratio_row(name, count, seconds, unit, sides_more_than=MIN_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
