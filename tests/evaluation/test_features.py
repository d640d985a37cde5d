"""Features of all samples of a set: order, what is kept of an evaluation that was ended, samples that cannot be
used.
"""

import io
import logging
import os
from dataclasses import replace

import pytest
import torch
from PIL import Image

from cosmos_ssl.api import BadSample, DataError, Sample, UserError
from cosmos_ssl.evaluation import features
from cosmos_ssl.evaluation.feature_store import FeatureStore
from cosmos_ssl.evaluation.features import Job, digest, sharded_features, text_features, weights_digest


class Grey(Sample):
    """A sample that needs no decoding."""

    def decode(self):
        return torch.full((3, 2, 2), int(self.key), dtype=torch.uint8)


class Numbers:
    """Twenty pictures, each of one grey; the numbers in ``bad`` cannot be read."""

    def __init__(self, count=20, bad=()):
        self.count, self.bad = count, bad
        self.reads = []

    def __len__(self):
        return self.count

    def read(self, index):
        self.reads.append(index)
        if index in self.bad:
            raise BadSample("no file", f"{index}.jpg")
        return Grey(key=str(index))

    def identity(self):
        return {"count": self.count}


def compute(loaded):
    return torch.stack([one.pixels[:, 0, 0] for one in loaded]), [one.sample.key for one in loaded]


def run(data, job, compute=compute):
    rows, notes = sharded_features(data, lambda picture: picture.float(), compute, job, name="grey")
    return rows.whole(), notes


def test_rows_and_notes_are_in_order():
    rows, notes = run(Numbers(), Job(batch_size=3, workers=3))
    assert rows[:, 1].tolist() == list(range(20)) and notes == [str(n) for n in range(20)]


def test_transparent_pictures_are_put_on_the_models_background():
    class Clear(Numbers):
        def read(self, index):
            file = io.BytesIO()
            Image.new("LA", (2, 2), 0).save(file, "png")
            return Sample(key=str(index), image=file.getvalue())

    for options, shade in (({}, 255), ({"background": "#030303"}, 3)):
        rows, _ = sharded_features(Clear(2), lambda picture: picture.float(), compute, Job(), name="grey", **options)
        assert rows.whole().unique().tolist() == [shade]


def test_evenly_spread_samples():
    assert run(Numbers(), Job(max_samples=3))[1] == ["0", "6", "13"]  # the rule of cosmos_ssl.data.scan
    assert len(run(Numbers(), Job(max_samples=50))[1]) == 20


def test_what_was_computed_is_kept_and_not_computed_again(tmp_path):
    job = Job(store=FeatureStore(tmp_path / "store"), batch_size=4)
    batches = []

    def until_the_third(loaded):
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(len(loaded))
        return compute(loaded)

    with pytest.raises(KeyboardInterrupt):
        run(Numbers(), job, until_the_third)
    kept = sorted((tmp_path / "store").glob("*.pt"))
    assert len(kept) == 2
    content = bytearray(kept[0].read_bytes())
    content[300] ^= 1  # a disk that changed a bit
    kept[0].write_bytes(content)
    data = Numbers()
    rows, notes = run(data, job)
    assert sorted(data.reads) in ([*range(4), *range(8, 20)], list(range(4, 20)))
    expected = run(Numbers(), Job(batch_size=4))
    assert torch.equal(rows, expected[0]) and notes == expected[1]
    again = Numbers()
    run(again, job)
    assert not again.reads
    run(again := Numbers(19), job)
    assert len(again.reads) == 19, "other data has other pieces"
    job.store.clear()
    assert not (tmp_path / "store").exists()


def test_pieces_stay_few(tmp_path, monkeypatch):
    """A large set has several batches in a piece; what is computed and what is read again is the same."""
    expected = run(Numbers(bad=(5,)), job := Job(batch_size=3, allow_missing=True))
    monkeypatch.setattr(features, "PIECES", 3)
    told = []
    job = replace(job, store=FeatureStore(tmp_path / "store"), progress=lambda *done: told.append(done))
    sizes = []

    def counted(loaded):
        sizes.append(len(loaded))
        return compute(loaded)

    rows, notes = run(Numbers(bad=(5,)), job, counted)
    assert torch.equal(rows, expected[0]) and notes == expected[1] and sizes == [3, 2, 3, 3, 3, 3, 2]
    assert told == [("pictures", n, 7) for n in (3, 6, 7)] and len(list((tmp_path / "store").glob("*.pt"))) == 3
    run(data := Numbers(), job)
    assert sorted(data.reads) == [*range(5), 5, *range(5, 9)], "the whole piece, when a sample of it is mended"


def test_a_sample_that_was_mended_is_read_again(tmp_path):
    job = Job(store=FeatureStore(tmp_path / "store"), batch_size=4, allow_missing=True)
    assert len(run(Numbers(bad=(5, 6)), job)[1]) == 18
    assert len(run(data := Numbers(bad=(5, 6)), job)[1]) == 18 and sorted(data.reads) == [5, 6]
    assert run(data := Numbers(bad=(6,)), job)[1] == [str(n) for n in range(20) if n != 6]
    assert sorted(data.reads) == [4, 5, 5, 6, 6, 7]
    assert run(Numbers(), job)[1] == [str(n) for n in range(20)]


class Files(Numbers):
    """Twenty pictures, each from a file that holds its grey."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def read(self, index):
        self.reads.append(index)
        return Grey(key=(self.folder / str(index)).read_text())

    def sources(self, index):
        return [str(self.folder / str(index))]


def test_what_is_kept_is_of_files_as_they_are(tmp_path):
    """A picture that was changed under its name, in content and time alone, is read again with its batch."""
    data, job = Files(tmp_path / "data"), Job(store=FeatureStore(tmp_path / "store"), batch_size=4)
    data.folder.mkdir()
    for n in range(20):
        (data.folder / str(n)).write_text(f"{n:03d}")
    run(data, job)
    run(data, job)
    assert sorted(data.reads) == list(range(20)), "as long as nothing changes"
    (data.folder / "5").write_text("105")
    os.utime(data.folder / "5", ns=(10**18, 10**18))
    rows, _ = run(data, job)
    assert sorted(data.reads[20:]) == [4, 5, 6, 7] and rows[5, 0] == 105

    def changes(loaded):
        (data.folder / "0").write_text("200")
        os.utime(data.folder / "0", ns=(10**18, len(data.reads)))
        return compute(loaded)

    job.store.clear()
    with pytest.raises(
        DataError, match=r"data: 1 files were changed while they were evaluated on \(.*/0\)\. Run the same"
    ):
        run(data, job, changes)
    data.reads.clear()
    assert run(data, job)[0][0, 0] == 200 and 0 in data.reads and len(data.reads) < 20


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_refused(value):
    def wrong(loaded):
        rows, notes = compute(loaded)
        return rows.where(rows != 7, value), notes

    with pytest.raises(
        UserError, match=r"features of 1 of 20 pictures are not finite numbers: its weights are damaged"
    ):
        run(Numbers(), Job(batch_size=4), wrong)


def test_a_store_that_cannot_be_written_is_told_once(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        rows, _ = run(Numbers(), Job(store=FeatureStore(tmp_path / "file" / "store"), batch_size=4))
    assert len(rows) == 20 and caplog.text.count("cannot be written") == 1


def test_unusable_samples(caplog):
    data = Numbers(bad=(0, 1, 2, 7, 8, 9, 10))
    with pytest.raises(
        DataError,
        match=r"7 of 20 pictures cannot be used \(sample 0: no file: 0.jpg, .*, and 3 more\).*--allow-missing",
    ):
        run(data, Job(batch_size=3))
    with caplog.at_level(logging.WARNING):
        rows, _ = run(data, Job(batch_size=3, allow_missing=True))
    assert rows[:, 0].tolist() == [3, 4, 5, 6, *range(11, 20)] and "left out" in caplog.text
    with pytest.raises(DataError, match="not one picture"):
        run(Numbers(2, bad=(0, 1)), Job(allow_missing=True))


class Lengths:
    """A text encoder whose feature is the length of the text."""

    def __init__(self):
        self.texts = []

    def tokenize(self, texts):
        self.texts += texts
        return torch.tensor([[len(text)] for text in texts])

    def encode_text(self, tokens):
        return tokens.float()

    def match_text(self, tokens):
        return -tokens.float()


def test_texts(tmp_path):
    texts = ["a" * n for n in range(1, 11)]
    job = Job(store=FeatureStore(tmp_path), batch_size=4)
    encoder = Lengths()
    assert text_features(encoder, texts, job)[:, 0].tolist() == list(range(1, 11))
    assert text_features(encoder, texts, job, to_match=True)[:, 0].tolist() == list(range(-1, -11, -1))
    assert text_features(encoder, texts, job)[3].item() == 4 and len(encoder.texts) == 20
    in_templates = text_features(encoder, texts, job, templates=["{}", "a {}.."])
    assert in_templates[:, 0].tolist() == [n + 2 for n in range(1, 11)] and encoder.texts[20:24] == [
        "a",
        "a a..",
        "aa",
        "a aa..",
    ]


def _rank(rank, world, path, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    for count in (2, 20):
        data, encoder = Numbers(count, bad=(3, 4)), Lengths()
        rows, notes = run(data, Job(allow_missing=True))
        texts = text_features(encoder, ["a" * n for n in range(1, count + 1)], Job())
        results[rank, count] = (
            rows[:, 0].tolist(),
            notes,
            texts[:, 0].tolist(),
            sorted(data.reads),
            len(encoder.texts),
        )
    torch.distributed.destroy_process_group()


def test_ranks_share_what_fits_one_batch_and_all_get_all(in_ranks):
    results = in_ranks(_rank, 3)
    for count in (2, 20):
        ranks = [results[rank, count] for rank in range(3)]
        good = [n for n in range(count) if n not in (3, 4)]
        for rows, notes, texts, _, _ in ranks:
            assert rows == good and notes == [str(n) for n in good] and texts == list(range(1, count + 1))
        assert sorted(n for *_, reads, _ in ranks for n in reads) == list(range(count))
        most = -(-count // 3)
        assert all(len(reads) <= most and said <= most for *_, reads, said in ranks)


@pytest.mark.parametrize("option", ["batch_size", "workers", "max_samples"])
def test_numbers_below_one(option):
    with pytest.raises(ValueError, match=f"^{option}: 0 is not above zero"):
        Job(**{option: 0})


def test_digests():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
    model = torch.nn.Linear(2, 2)
    before = weights_digest(model)
    assert before == weights_digest(model)
    with torch.no_grad():
        model.bias[0] += 1
    assert weights_digest(model) != before
