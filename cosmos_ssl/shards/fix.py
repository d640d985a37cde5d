"""Shards without their faults: bad and repeated samples left out, captions put into lists, all else byte for byte."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from cosmos_ssl.data.captions import as_sentences, schema_fields
from cosmos_ssl.data.scan import cores, expand, scan
from cosmos_ssl.data.storage import Reader, is_local, local_path, stat
from cosmos_ssl.data.tar import members_in, sample_key
from cosmos_ssl.errors import UserError
from cosmos_ssl.files import written_whole
from cosmos_ssl.liveness import OnProgress, alive
from cosmos_ssl.shards.check import ShardReport
from cosmos_ssl.shards.output import TAR_END, Output, in_processes


def fixed_folder(urls: str | Sequence[str]) -> Path:
    """The folder beside that of the shards: ``cc3m`` -> ``cc3m-fixed``.

    Raises UserError where they lie in several or far away.
    """
    names = expand(urls)
    if not all(map(is_local, names)):
        raise UserError("--fix: shards that are not files of this machine cannot be fixed beside the old ones")
    folders = {local_path(name).absolute().parent for name in names}
    if len(folders) > 1:
        raise UserError(f"--fix: these shards lie in {len(folders)} folders; fix those of one at a time")
    folder = folders.pop()
    return folder.with_name(f"{folder.name}-fixed")


def fix_shards(
    urls: str | Sequence[str],
    reports: Sequence[ShardReport],
    folder: Path,
    *,
    captions: str | None,
    resume: bool = False,
    progress: OnProgress = alive,
) -> dict[str, int]:
    """Write the shards that ``check_shards`` reported on into ``folder`` under their names; samples of each.

    Shards without faults are linked, or copied where the file system cannot link; one of which nothing is left is not
    written. Raises UserError, OSError.
    """
    names = list(dict.fromkeys(expand(urls)))
    sizes = {r.name: r.samples - len(r.bad) for r in reports if r.samples > len(r.bad)}
    if not sizes:
        raise UserError("--fix: no sample is left that can be used")
    output = Output(folder.absolute())
    identity = {"shards": [[r.name, r.samples, r.size, sum(r.faults.values())] for r in reports], "captions": captions}
    with output.claimed(identity, resume=resume):
        if output.report is None:
            jobs = [
                (url, report, captions, output.folder / report.name)
                for url, report in zip(names, reports, strict=True)
                if report.name in sizes and not (output.folder / report.name).is_file()
            ]
            for done, _ in enumerate(in_processes(cores(), _fix, jobs), 1):
                progress(done, len(jobs))
            output.finish(sizes, {"identity": identity, "caption_schema": captions, "counts": sizes})
        report = output.report
        assert report is not None
        return dict(report["counts"])


def _fix(url: str, report: ShardReport, captions: str | None, path: Path) -> None:
    if not report.faults or set(report.faults) == {"miscounted"}:
        try:
            os.link(local_path(url), path)
        except OSError:  # another file system, or one without links
            with local_path(url).open("rb") as old, written_whole(path) as new:
                shutil.copyfileobj(old, new, 1 << 20)
        return
    found = stat(url)
    headers = scan(url, found.size)
    bad, strings = set(report.bad), set(report.strings)
    reader = Reader()
    with written_whole(path) as file:
        for index, (offset, length) in enumerate(zip(headers.offsets.tolist(), headers.lengths.tolist(), strict=True)):
            if index in bad:
                continue
            sample = reader.read(url, found, offset, length)
            file.write(b"".join(_listed(sample, captions)) if index in strings and captions else sample)
        file.write(TAR_END)


def _listed(sample: bytes, captions: str) -> Iterable[bytes]:
    """The members of a sample, with lists in the place of the strings of its JSON."""
    for member in members_in(sample):
        if sample_key(member.name)[1] != "json":
            yield sample[member.start : member.end]
            continue
        table = json.loads(sample[member.data : member.data + member.size])
        table |= {
            name: as_sentences(table[name]) for name in schema_fields(captions) if isinstance(table.get(name), str)
        }
        body = json.dumps(table, ensure_ascii=False).encode("utf-8", "replace")
        head = tarfile.TarInfo(member.name)
        head.size = len(body)
        yield head.tobuf(tarfile.GNU_FORMAT) + body + bytes(-len(body) % 512)
