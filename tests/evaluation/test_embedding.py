"""Embeddings: the vectors are the encoder's, every row has its key, and a job goes on wherever it was stopped."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from cosmos_ssl.api import DataError, Spec, TowerSpec, UserError
from cosmos_ssl.evaluation import embedding, features
from cosmos_ssl.evaluation.embedding import Request, embed
from cosmos_ssl.evaluation.embedding_input import open_samples
from cosmos_ssl.evaluation.feature_store import FeatureStore
from cosmos_ssl.models.encoder import ModelEncoder
from cosmos_ssl.models.model import Model
from cosmos_ssl_plugins.tokenizers.clip import ClipTokenizer
from cosmos_ssl_plugins.towers.clip_text import ClipText
from cosmos_ssl_plugins.towers.clip_vit import ClipViT


def make(seed: int = 0, *, text: bool = True) -> ModelEncoder:
    torch.manual_seed(seed)
    tokenizer = ClipTokenizer(Spec(embed_dim=16), context_length=12)
    image = TowerSpec(width=24, image_size=16, patch_size=8)
    spec = Spec(embed_dim=16, context_length=12, vocab_size=tokenizer.vocab_size, image=image, text=TowerSpec(width=16))
    towers: dict[str, Any] = {"image": ClipViT(spec, width=24, layers=1, heads=2, patch_size=8, image_size=16)}
    if text:
        towers["text"] = ClipText(spec, width=16, layers=1, heads=2)
    return ModelEncoder(Model(towers, {}, {}, 16), spec, tokenizer)


@pytest.fixture(scope="module")
def encoder() -> ModelEncoder:
    return make()


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def encoded(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 24, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def shard(path: Path, samples: Mapping[str, Mapping[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for extension, body in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Seven samples in two shards whose keys are the same; the second of the first is broken."""
    for name, first, count in (("a", 0, 4), ("b", 4, 3)):
        samples = {
            f"{n:03d}": {
                "png": encoded(first + n),
                "txt": f"picture {first + n}".encode(),
                "json": json.dumps({"long": [f"of {first + n}", "and more"]}).encode(),
            }
            for n in range(count)
        }
        if name == "a":
            samples["001"]["png"] = b"no picture"
        shard(tmp_path / f"{name}.tar", samples)
    return f"{tmp_path}/{{a,b}}.tar"


def job(data: str, **options: Any) -> Request:
    samples, what = open_samples([data])
    return Request(samples=samples, **{"what": what, "batch_size": 2, "workers": 2, **options})


def vectors(encoder: ModelEncoder, numbers: list[int]) -> np.ndarray[Any, Any]:
    """What the encoder gives for the pictures one by one."""
    rows = [
        encoder.encode_image(encoder.preprocess(Image.open(io.BytesIO(encoded(number))))[None]) for number in numbers
    ]
    return torch.cat(rows).numpy()


def rows(path: Path) -> list[dict[str, Any]]:
    return list(parquet.read_table(path).to_pylist())


def test_transparent_pictures_are_put_on_the_models_background(encoder: ModelEncoder, tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    Image.new("LA", (20, 30), 0).save(tmp_path / "clips/a.png")
    for number, background in enumerate(("white", "#102030")):
        own = ModelEncoder(encoder.model, replace(encoder.spec, background=background), encoder.tokenizer)
        embed(own, job(str(tmp_path / "clips")), tmp_path / f"{number}.npy")
        expected = own.encode_image(own.preprocess(Image.new("RGB", (20, 30), background))[None])
        np.testing.assert_allclose(np.load(tmp_path / f"{number}.npy"), expected.numpy(), atol=1e-6)


def test_pictures_of_shards(encoder: ModelEncoder, shards: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "e.parquet"
    report = embed(encoder, job(shards, about={"checkpoint": "c"}), out)
    assert (report.rows, report.bad, report.kept) == (6, {"undecodable": (1, "001")}, 0)
    found = rows(out)
    assert [(row["source"], row["key"], row["modality"], row["text"]) for row in found] == [
        ("a.tar", "000", "image", None),
        ("a.tar", "002", "image", None),
        ("a.tar", "003", "image", None),
        ("b.tar", "000", "image", None),
        ("b.tar", "001", "image", None),
        ("b.tar", "002", "image", None),
    ]
    np.testing.assert_allclose([row["embedding"] for row in found], vectors(encoder, [0, 2, 3, 4, 5, 6]), atol=1e-6)
    schema = parquet.read_schema(out)
    assert str(schema.field("embedding").type) == "fixed_size_list<element: float>[16]"
    meta = json.loads(schema.metadata[b"cosmos_ssl"])
    assert (meta["checkpoint"], meta["rows"], meta["job"]["what"], meta["job"]["data.samples"]) == ("c", 6, "image", 7)
    assert len(meta["job"]["weights"]) == 64
    assert [path.name for path in out.parent.iterdir()] == ["e.parquet"]


def test_both_modalities_row_by_row(encoder: ModelEncoder, shards: str, tmp_path: Path) -> None:
    embed(encoder, job(shards, what="both", texts="long", dtype="float16"), tmp_path / "e.parquet")
    found = rows(tmp_path / "e.parquet")
    assert [(row["key"], row["modality"], row["text"]) for row in found[3:6]] == [
        ("002", "image", None),
        ("002", "text", "of 2"),
        ("002", "text", "and more"),
    ]
    images = [row["embedding"] for row in found if row["modality"] == "image"]
    np.testing.assert_allclose(images, vectors(encoder, [0, 2, 3, 4, 5, 6]), atol=1e-3)
    texts = encoder.encode_text(encoder.tokenize([row["text"] for row in found if row["text"]]))
    np.testing.assert_allclose([row["embedding"] for row in found if row["text"]], texts.numpy(), atol=1e-3)
    assert str(parquet.read_schema(tmp_path / "e.parquet").field("embedding").type).startswith(
        "fixed_size_list<element: halffloat>"
    )


def test_lines_of_a_file(encoder: ModelEncoder, tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("a cat\n\n  a dog\r\nlast")
    report = embed(encoder, job(str(path)), tmp_path / "e.npy")
    assert report.bad == {"no text": (1, "2")}
    expected = encoder.encode_text(encoder.tokenize(["a cat", "a dog", "last"]))
    found = np.load(tmp_path / "e.npy")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (tmp_path / "e.keys.txt").read_text() == "1\n3\n4\n"
    assert json.loads((tmp_path / "e.meta.json").read_text())["rows"] == 3


def test_folders_and_files(encoder: ModelEncoder, tmp_path: Path) -> None:
    for number, name in enumerate(["x/one.png", "x/two.png", "y/three.png"]):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number))
    embed(encoder, job(str(tmp_path / "pictures")), tmp_path / "e.parquet")
    assert [(row["key"], row["source"]) for row in rows(tmp_path / "e.parquet")] == [
        ("x/one.png", "x"),
        ("x/two.png", "x"),
        ("y/three.png", "y"),
    ]
    paths = [str(tmp_path / "pictures" / name) for name in ("y/three.png", "x/one.png")]
    samples, what = open_samples(paths)
    embed(encoder, Request(samples=samples, what=what), tmp_path / "f.npy")
    np.testing.assert_allclose(np.load(tmp_path / "f.npy"), vectors(encoder, [2, 0]), atol=1e-6)
    assert (tmp_path / "f.keys.txt").read_text().splitlines() == paths


class Stopped(Exception):
    """Stands for a kill."""


def stopping(after: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= after:
            raise Stopped

    return progress


@pytest.mark.parametrize("name", ["e.parquet", "e.npy"])
@pytest.mark.parametrize("after", [2, 4, 6, 7])
def test_a_stopped_job_goes_on(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, after: int
) -> None:
    encoder = make()
    with pytest.raises(Stopped):
        embed(encoder, job(shards), tmp_path / name, progress=stopping(after))
    assert not (tmp_path / name).exists()
    folder = tmp_path / f"{name}.parts"
    (folder / "tmpabc.part").write_bytes(b"half a part")
    calls = []
    monkeypatch.setattr(encoder, "preprocess", lambda image: calls.append(1) or ModelEncoder.preprocess(encoder, image))
    report = embed(encoder, job(shards), tmp_path / name)
    assert report.kept == after
    assert len(calls) == 7 - after
    assert (report.rows, report.bad) == (6, {"undecodable": (1, "001")})
    assert not folder.exists()
    found = np.load(tmp_path / name) if name.endswith("npy") else [row["embedding"] for row in rows(tmp_path / name)]
    np.testing.assert_allclose(found, vectors(encoder, [0, 2, 3, 4, 5, 6]), atol=1e-6)


@pytest.mark.parametrize("name", ["e.parquet", "e.npy"])
def test_a_job_stopped_while_it_is_put_together(
    encoder: ModelEncoder, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    get, seen = FeatureStore.get, []

    def failing(store: FeatureStore, piece: str) -> Any:
        seen.append(piece)
        if len(seen) == 6:  # four pieces are looked for, then the second is copied
            raise Stopped
        return get(store, piece)

    monkeypatch.setattr(FeatureStore, "get", failing)
    with pytest.raises(Stopped):
        embed(encoder, job(shards), tmp_path / name)
    assert not (tmp_path / name).exists()
    report = embed(encoder, job(shards), tmp_path / name)
    assert (report.rows, report.kept) == (6, 7)


def test_finished_jobs_are_left_alone(encoder: ModelEncoder, shards: str, tmp_path: Path) -> None:
    for name in ("e.parquet", "e.npy"):
        out = tmp_path / name
        first = embed(encoder, job(shards), out)
        before = out.stat().st_mtime_ns
        (tmp_path / f"{name}.parts").mkdir()  # of a process killed at the very end
        again = embed(encoder, job(shards, batch_size=3), out)
        assert (again.rows, again.bad, again.kept) == (first.rows, first.bad, 7)
        assert out.stat().st_mtime_ns == before and not (tmp_path / f"{name}.parts").exists()
        with pytest.raises(
            UserError,
            match=rf"{name} holds other embeddings \(weights: \w{{8}}\.\.\. -> \w{{8}}\.\.\.\)\. Give another",
        ):
            embed(make(1), job(shards), out)
        with pytest.raises(UserError, match=r"\(dtype: float32 -> float16\)"):
            embed(encoder, job(shards, dtype="float16"), out)
        embed(make(1), job(shards), out, overwrite=True)
        found = np.load(out) if name.endswith("npy") else [row["embedding"] for row in rows(out)]
        np.testing.assert_allclose(found, vectors(make(1), [0, 2, 3, 4, 5, 6]), atol=1e-6)


def test_parts_of_another_job_are_not_mixed_in(encoder: ModelEncoder, shards: str, tmp_path: Path) -> None:
    out = tmp_path / "e.parquet"
    with pytest.raises(Stopped):
        embed(encoder, job(shards), out, progress=stopping(4))
    with pytest.raises(
        UserError,
        match=r"e\.parquet\.parts holds the beginning of another job \(weights: .*Give another output, or --over",
    ):
        embed(make(1), job(shards), out)
    with pytest.raises(UserError, match=r"part_size: 2 -> 3"):
        embed(encoder, job(shards, batch_size=3), out)
    assert embed(make(1), job(shards), out, overwrite=True).kept == 0
    np.testing.assert_allclose([row["embedding"] for row in rows(out)], vectors(make(1), [0, 2, 3, 4, 5, 6]), atol=1e-6)


def test_pieces_that_are_damaged_or_of_the_version_before_are_computed_again(
    encoder: ModelEncoder, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "e.parquet"
    with pytest.raises(Stopped):
        embed(encoder, job(shards), out, progress=stopping(4))
    folder = tmp_path / "e.parquet.parts"
    for number, piece in enumerate(sorted(folder.glob("*.pt"))):
        data = bytearray(piece.read_bytes())
        data[100] ^= 255
        (piece if number else piece.rename(folder / "000000.npz")).write_bytes(data)
    report = embed(encoder, job(shards), out)
    assert (report.rows, report.kept) == (6, 0) and not folder.exists()
    np.testing.assert_allclose([row["embedding"] for row in rows(out)], vectors(encoder, [0, 2, 3, 4, 5, 6]), atol=1e-6)
    monkeypatch.setattr(FeatureStore, "get", lambda *_: None)  # damaged between computing and putting together
    with pytest.raises(OSError, match=r"\.pt in .*e\.parquet\.parts was damaged\. Run the same command again"):
        embed(encoder, job(shards), out, overwrite=True)


def test_parts_stay_few(encoder: ModelEncoder, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "PIECES", 2)
    with pytest.raises(Stopped):
        embed(encoder, job(shards), tmp_path / "e.parquet", progress=stopping(4))
    assert len(list((tmp_path / "e.parquet.parts").glob("*.pt"))) == 1
    assert embed(encoder, job(shards), tmp_path / "e.parquet").kept == 4
    assert len(rows(tmp_path / "e.parquet")) == 6


def test_two_processes_do_not_write_the_same_file(encoder: ModelEncoder, shards: str, tmp_path: Path) -> None:
    def meanwhile(done: int, total: int) -> None:
        with pytest.raises(UserError, match=r"e\.npy is being written by another process"):
            embed(encoder, job(shards), tmp_path / "e.npy")

    embed(encoder, job(shards), tmp_path / "e.npy", progress=meanwhile)


def test_a_folder_that_is_not_ours_is_never_touched(encoder: ModelEncoder, shards: str, tmp_path: Path) -> None:
    theirs, output = tmp_path / "theirs", tmp_path / "e.npy"
    theirs.mkdir()
    for name in ("thesis.txt", "x.part", "000001.npz"):
        (theirs / name).write_text("theirs")
    folder = tmp_path / "e.npy.parts"
    for place in (
        lambda: shutil.copytree(theirs, folder),
        lambda: folder.symlink_to(theirs),
        lambda: folder.write_text("theirs"),
    ):
        place()
        for overwrite in (False, True):
            with pytest.raises(UserError, match=r"e\.npy\.parts is no beginning of embeddings"):
                embed(encoder, job(shards), output, overwrite=overwrite)
        assert not output.exists() and len(list(theirs.iterdir())) == 3
        assert len(list(folder.iterdir())) == 3 if folder.is_dir() else folder.read_text() == "theirs"
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
        else:
            folder.unlink()


def test_a_full_disk_keeps_the_old_embeddings(
    encoder: ModelEncoder, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "e.npy"
    embed(encoder, job(shards), output)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("e.*")}
    fsync = os.fsync

    def full(handle: int) -> None:
        if not Path(f"/proc/self/fd/{handle}").readlink().parent.name.endswith(".parts"):
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        embed(encoder, job(shards, dtype="float16"), output, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("e.*") if path.is_file()} == before


def test_bad_input(encoder: ModelEncoder, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"ends in \.parquet or \.npy"):
        embed(encoder, job(shards), tmp_path / "e.csv")
    with pytest.raises(UserError, match="an array cannot tell images from texts"):
        embed(encoder, job(shards, what="both"), tmp_path / "e.npy")
    with pytest.raises(UserError, match="--what both: this model has no text tower"):
        embed(make(text=False), job(shards, what="both"), tmp_path / "e.parquet")
    with pytest.raises(
        DataError,
        match=r"not one of 7 samples can be embedded \(6 no text 'lang', such as 000 \(it has: txt, long\), 1 undec",
    ):
        embed(encoder, job(shards, what="both", texts="lang"), tmp_path / "e.parquet")
    assert sorted(path.name for path in tmp_path.iterdir() if "e.parquet" in path.name) == []
    (tmp_path / "other.parquet").write_bytes(b"PAR1 of somebody")
    with pytest.raises(UserError, match="exists and is no file of embeddings"):
        embed(encoder, job(shards), tmp_path / "other.parquet")
    np.save(tmp_path / "other.npy", np.zeros(3))
    with pytest.raises(UserError, match="exists and is no file of embeddings"):
        embed(encoder, job(shards), tmp_path / "other.npy")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        UserError, match=r"Parquet needs pyarrow\. Run: pip install 'cosmos-ssl\[eval\]', or give a \.npy file"
    ):
        embed(encoder, job(shards), tmp_path / "e.parquet")


def test_data_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(encoded(0))
    for given, message in (
        ([f"{tmp_path}/pictur.png"], r"pictur\.png does not exist\. Did you mean 'picture\.png'\?"),
        ([f"{tmp_path}/picture.png", "x.tar"], "pictures and shards are mixed"),
        (["a.txt", "b.txt"], "2 text files. Give one"),
        ([f"{tmp_path}/no.txt"], r"no\.txt cannot be read: No such file"),
        ([f"{tmp_path}/no.tar"], r"no\.tar"),
    ):
        with pytest.raises(DataError, match=message):
            open_samples(given)


def test_pictures_that_change_under_their_names(
    encoder: ModelEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither whole nor half a job is taken for that of other pictures; nor what changed meanwhile."""
    folder, out = tmp_path / "pictures", tmp_path / "e.npy"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(encoded(number))
    size = len(encoded(0))

    def change(number: int, time: int) -> None:
        (folder / "0.png").write_bytes(encoded(number)[:size].ljust(size, b"\0"))
        os.utime(folder / "0.png", ns=(time, time))

    for given in (str(folder), str(folder / "0.png")):
        change(0, 10**18)
        embed(encoder, job(given), out, overwrite=True)
        assert embed(encoder, job(given), out).kept
        change(9, 10**18 + 1)
        with pytest.raises(UserError, match=r"e.npy holds other embeddings \(.*data.files: "):
            embed(encoder, job(given), out)
    monkeypatch.setattr(embedding, "write_embeddings", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    half = tmp_path / "half.npy"
    with pytest.raises(KeyboardInterrupt):
        embed(encoder, job(str(folder)), half)
    change(8, 10**18 + 2)
    with pytest.raises(UserError, match=r"half.npy.parts holds the beginning of another job \(.*data.files: "):
        embed(encoder, job(str(folder)), half)
    monkeypatch.undo()
    with pytest.raises(DataError, match="files were changed while they were embedded, and nothing is written"):
        embed(
            encoder, job(str(folder)), half, overwrite=True, progress=lambda done, total: change(7, 10**18 + 3 + done)
        )
    assert not half.exists() and not half.with_name("half.npy.parts").exists()
    assert embed(encoder, job(str(folder)), half).rows == 4


def test_vectors_that_are_not_finite(shards: str, tmp_path: Path) -> None:
    broken = make()
    with torch.no_grad():
        next(iter(broken.model.towers["image"].parameters())).fill_(torch.nan)
    with pytest.raises(
        UserError, match=r"features of 1 of 1 samples are not finite numbers|features of 2 of 2 samples"
    ):
        embed(broken, job(shards), tmp_path / "e.parquet")
    assert not (tmp_path / "e.parquet").exists()


def test_nothing_of_somebody_elses_is_removed(encoder: ModelEncoder, shards: str, tmp_path: Path) -> None:
    """A folder of the name of the parts, a link to one, and a beginning whose table is damaged stop a job, also with
    --overwrite.
    """
    out, parts, theirs = tmp_path / "e.npy", tmp_path / "e.npy.parts", tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("mine")

    def refused() -> None:
        with pytest.raises(UserError, match=r"e\.npy\.parts is no beginning of embeddings, or its job.json is damaged"):
            embed(encoder, job(shards), out, overwrite=True)

    parts.symlink_to(theirs)
    refused()
    parts.unlink()
    theirs.rename(parts)
    refused()
    (parts / "job.json").write_text("{")
    refused()
    assert (parts / "thesis.txt").read_text() == "mine"
    for path in parts.iterdir():
        path.unlink()
    assert embed(encoder, job(shards), out).rows == 6, "an empty one is that of a job that was killed as it began"


def _ranks_embed(rank: int, world: int, path: str, data: str, out: str, stop: int, results: Any) -> None:
    """As a rank of a world; the second is killed when it has done ``stop`` samples (0: never)."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)

    def progress(done: int, total: int) -> None:
        if stop and rank == 1 and done >= stop:
            os._exit(9)

    encoder = make(int(stop < 0 and rank))  # below 0: with other weights
    try:
        report = embed(encoder, job(data, batch_size=1), Path(out), progress=progress)
        results[rank] = report.samples, report.rows, dict(report.bad), report.kept
    except UserError as error:
        Path(f"{out}.said").write_text(str(error))
        raise
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["e.parquet", "e.npy"])
def test_ranks_write_what_one_process_writes_also_after_a_kill(
    encoder: ModelEncoder, shards: str, tmp_path: Path, name: str, in_ranks: Callable[..., dict[Any, Any]]
) -> None:
    def written(folder: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}

    for folder in ("one", "two", "killed", "resumed"):
        (tmp_path / folder).mkdir()
    embed(encoder, job(shards, batch_size=1), tmp_path / "one" / name)
    whole = (7, 6, {"undecodable": (1, "001")})
    assert in_ranks(_ranks_embed, 2, shards, str(tmp_path / "two" / name), 0) == dict.fromkeys(range(2), (*whole, 0))
    assert written("two") == written("one") and len(written("one")) == (1 if name == "e.parquet" else 3)

    with pytest.raises(torch.multiprocessing.ProcessExitedException):
        in_ranks(_ranks_embed, 2, shards, str(tmp_path / "killed" / name), 2)
    there = list((tmp_path / "killed" / f"{name}.parts").glob("*.pt"))
    assert there and not (tmp_path / "killed" / name).exists()
    shutil.copytree(tmp_path / "killed", tmp_path / "resumed", dirs_exist_ok=True)
    report = embed(encoder, job(shards, batch_size=1), tmp_path / "killed" / name)
    assert report.kept == len(there), "by one process"
    found = in_ranks(_ranks_embed, 3, shards, str(tmp_path / "resumed" / name), 0)
    assert found == {n: (*whole, len(there)) for n in range(3)}, "by three"
    assert written("killed") == written("resumed") == written("one")


def test_ranks_that_read_other_weights_are_named(
    shards: str, tmp_path: Path, in_ranks: Callable[..., dict[Any, Any]]
) -> None:
    with pytest.raises(torch.multiprocessing.ProcessRaisedException):
        in_ranks(_ranks_embed, 2, shards, str(tmp_path / "e.npy"), -1)
    said = (tmp_path / "e.npy.said").read_text()
    assert said.startswith("rank 1 (") and "has other weights than the first rank" in said
