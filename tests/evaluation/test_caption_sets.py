"""COCO and Flickr30k in the folders in which people have them."""

import json

import pytest
from PIL import Image

from cosmos_ssl.api import BadSample, DataError, UserError
from cosmos_ssl.evaluation.caption_sets import caption_sets_in, find_caption_set
from cosmos_ssl.evaluation.features import Job


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (9, 9, 9)).save(path)


@pytest.fixture
def coco(tmp_path):
    """Three pictures of COCO val2017, out of order, with five captions or six."""
    numbers = (9, 2, 5)
    images = [{"id": n, "file_name": f"{n:012d}.jpg", "height": 6, "width": 8, "license": 1} for n in numbers]
    notes = [{"id": 100 * n + k, "image_id": n, "caption": f"caption {k}\n of {n} "} for k in range(5) for n in numbers]
    notes.append({"id": 1, "image_id": 2, "caption": "one more"})
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/captions_val2017.json").write_text(
        json.dumps({"info": {}, "images": images, "annotations": notes})
    )
    for image in images:
        picture(tmp_path / "val2017" / image["file_name"])
    return tmp_path


@pytest.fixture
def flickr(tmp_path):
    """Karpathy's table of four pictures, two of them of the test split."""
    images = [
        {
            "filename": f"{n}.jpg",
            "split": split,
            "imgid": n,
            "sentids": [],
            "sentences": [{"raw": f"Text {k} of {n}.", "tokens": [], "imgid": n, "sentid": k} for k in range(5)],
        }
        for n, split in ((36979, "train"), (1007129816, "test"), (65567, "val"), (1009434119, "test"))
    ]
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": images, "dataset": "flickr30k"}))
    for image in images:
        picture(tmp_path / "flickr30k-images" / image["filename"])
    return tmp_path


def test_coco(coco):
    found = find_caption_set(coco).complete(Job())
    assert found.name == "coco" and [file.key for file in found.files] == [f"{n:012d}.jpg" for n in (2, 5, 9)]
    assert found.files[0].captions == [*(f"caption {k} of 2" for k in range(5)), "one more"]
    sample = found.read(2)
    assert sample.captions["txt"][4] == "caption 4 of 9" and sample.decode().shape == (3, 6, 8)


def test_flickr30k(flickr):
    found = find_caption_set(flickr).complete(Job())
    assert found.name == "flickr30k" and [file.key for file in found.files] == ["1007129816.jpg", "1009434119.jpg"]
    assert found.read(1).captions["txt"] == [f"Text {k} of 1009434119." for k in range(5)]
    (flickr / "flickr30k-images").rename(flickr / "flickr30k_images")
    assert len(find_caption_set(flickr).complete(Job())) == 2


def test_missing_pictures_are_named(coco):
    (coco / "val2017/000000000005.jpg").unlink()
    found = find_caption_set(coco)
    with pytest.raises(DataError, match=r"1 of 3 pictures are not in .*val2017 \(000000000005.jpg\).*--allow-missing"):
        found.complete(Job())
    assert [file.key for file in found.complete(Job(allow_missing=True)).files] == [
        "000000000002.jpg",
        "000000000009.jpg",
    ]
    with pytest.raises(BadSample, match=r"no file: .*000000000005.jpg"):
        found.read(1)
    for path in (coco / "val2017").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="not one picture with a caption"):
        found.complete(Job(allow_missing=True))


def test_missing_captions_are_named(coco):
    path = coco / "annotations/captions_val2017.json"
    table = json.loads(path.read_text())
    table["annotations"] = [note for note in table["annotations"] if note["image_id"] != 9]
    path.write_text(json.dumps(table))
    with pytest.raises(DataError, match=r"1 of 3 pictures have no caption \(000000000009.jpg\)"):
        find_caption_set(coco).complete(Job())


@pytest.mark.parametrize("content", ["{", '{"images": []}', '{"images": [{"id": 1}], "annotations": []}', "[]"])
def test_annotations_of_another_form(coco, content):
    (coco / "annotations/captions_val2017.json").write_text(content)
    with pytest.raises(DataError, match=r"captions_val2017.json is (no JSON|not COCO's form)"):
        find_caption_set(coco)


def test_folders_without_annotations(coco, tmp_path):
    (coco / "annotations/captions_val2017.json").unlink()
    with pytest.raises(DataError, match=r"looks like COCO, and has no annotations/captions_val2017.json"):
        find_caption_set(coco)
    (coco / "annotations").rmdir()
    assert find_caption_set(coco) is None
    (coco / "flickr30k-images").mkdir()
    with pytest.raises(
        DataError, match=r"holds Flickr30k's pictures, and none of dataset_flickr30k.json, flickr_annotations_30k.csv"
    ):
        find_caption_set(coco)


def test_identity_tells_captions_apart(coco):
    before = find_caption_set(coco).identity()
    path = coco / "annotations/captions_val2017.json"
    path.write_text(path.read_text().replace("one more", "one other"))
    assert find_caption_set(coco).identity() != before


def test_coco_2014_by_karpathys_split(tmp_path):
    """His table names the folder of each picture; clip-benchmark's has COCO's own form."""
    images = [
        {
            "filepath": f"{part}2014",
            "filename": f"COCO_{part}2014_{n:012d}.jpg",
            "split": split,
            "cocoid": n,
            "sentences": [{"raw": f"Text {k}\n of {n}."} for k in range(5)],
        }
        for n, part, split in ((9, "train", "train"), (7, "val", "restval"), (5, "val", "test"), (3, "val", "test"))
    ]
    for image in images:
        picture(tmp_path / "images" / image["filepath"] / image["filename"])
    table = tmp_path / "annotations/dataset_coco.json"
    table.parent.mkdir()
    table.write_text(json.dumps({"images": images, "dataset": "coco"}))
    found = find_caption_set(tmp_path).complete(Job())
    assert found.name == "coco_karpathy" and [file.key for file in found.files] == [
        f"val2014/COCO_val2014_{n:012d}.jpg" for n in (5, 3)
    ]
    assert found.read(1).captions["txt"] == [f"Text {k} of 3." for k in range(5)]
    (tmp_path / "images/val2014/COCO_val2014_000000000005.jpg").unlink()
    with pytest.raises(
        DataError, match=r"1 of 2 pictures are not in .*images \(val2014/COCO_val2014_000000000005.jpg\)"
    ):
        find_caption_set(tmp_path).complete(Job())
    table.unlink()
    tables = {
        "images": [{"id": 3, "file_name": "COCO_val2014_000000000003.jpg"}],
        "annotations": [{"image_id": 3, "caption": "one"}],
    }
    (tmp_path / "coco_test_karpathy.json").write_text(json.dumps(tables))
    found = find_caption_set(tmp_path).complete(Job())
    assert found.name == "coco_karpathy" and found.read(0).captions["txt"] == ["one"]


CAPTIONS = ['A dog, "Rex".', "Two"]
QUOTED = json.dumps(CAPTIONS).replace('"', '""')
FLICKR = {
    "flickr_annotations_30k.csv": f'raw,sentids,split,filename,img_id\n"{QUOTED}","[0, '
    '1]",test,1.jpg,0\n"[""no""]",[2],train,2.jpg,1\n',
    "flickr30k_test_karpathy.txt": 'image,caption\n1.jpg,A dog, "Rex".\n1.jpg,Two\n',
    "results_20130124.token": '1.jpg#0\tA dog, "Rex".\n1.jpg#1\tTwo\n2.jpg#0\tno\n',
    # Kaggle's; in one line of it a bar is missing
    "results.csv": 'image_name| comment_number| comment\n1.jpg| 0| A dog, "Rex".\n1.jpg| 1   Two\n2.jpg| 0| no\n',
}


@pytest.mark.parametrize("name", FLICKR)
def test_flickr30k_in_other_tables(tmp_path, name, caplog):
    for n in (1, 2):
        picture(tmp_path / "flickr30k_images" / f"{n}.jpg")
    (tmp_path / name).write_text(FLICKR[name])
    found = find_caption_set(tmp_path).complete(Job())
    assert (found.files[0].key, found.files[0].captions) == ("1.jpg", CAPTIONS)
    if name.startswith("results"):
        assert (
            found.name == "flickr30k_all"
            and len(found) == 2
            and "tells no split, so all 2 pictures are taken; test.txt beside" in caplog.text
        )
        (tmp_path / "test.txt").write_text("1\n")
        found = find_caption_set(tmp_path).complete(Job())
    assert found.name == "flickr30k" and len(found) == 1
    (tmp_path / name).write_bytes(b"\xff\xd8\n\n\x00")
    with pytest.raises(DataError, match="it is no text"):
        find_caption_set(tmp_path)
    (tmp_path / name).write_text("a\nb\n")
    with pytest.raises(DataError, match=r"is no table of filename, split and raw|line 2 is no picture and its caption"):
        find_caption_set(tmp_path)


def test_several_sets_in_one_folder(coco, flickr):
    with pytest.raises(
        DataError, match=r"holds several sets\. Say which, such as --set coco\. They are: coco, flickr30k"
    ):
        find_caption_set(coco)
    assert find_caption_set(coco, "flickr30k").name == "flickr30k"
    with pytest.raises(
        DataError, match=r"does not hold the captions of 'coco_karpathy' \(looked for dataset_coco.json"
    ):
        find_caption_set(coco, "coco_karpathy")
    with pytest.raises(UserError, match=r"no set named 'flickr'\. Did you mean 'flickr30k'"):
        find_caption_set(coco, "flickr")


def test_long_captions_of_urban1k(tmp_path):
    """``Urban1k/image/N.jpg`` and ``Urban1k/caption/N.txt``; a folder of another name is none."""
    for n in (2, 10):
        picture(tmp_path / f"Urban1k/image/{n}.jpg")
        (tmp_path / "Urban1k/caption").mkdir(exist_ok=True)
        (tmp_path / f"Urban1k/caption/{n}.txt").write_text(f"A long\ntext of {n}.\n")
    for folder in (tmp_path, tmp_path / "Urban1k"):
        found = find_caption_set(folder).complete(Job())
        assert found.name == "urban1k" and [file.key for file in found.files] == ["10.jpg", "2.jpg"]
        assert found.read(1).captions["txt"] == ["A long text of 2."]
        assert caption_sets_in(folder) == ["urban1k"]
    (tmp_path / "Urban1k").rename(tmp_path / "other")
    assert find_caption_set(tmp_path / "other") is None


def test_long_captions_of_dci(tmp_path):
    """All splits of ``splits.json``; the caption is the short text and the extra one."""
    top = tmp_path / "densely_captioned_images"
    (top / "annotations").mkdir(parents=True)
    for n in (1, 2):
        note = {
            "image": f"sa_{n}.jpg",
            "short_caption": f"Short {n}.",
            "extra_caption": "More\nof it.",
            "mask_data": {},
        }
        (top / f"annotations/sa_{n}.json").write_text(json.dumps(note))
        picture(top / f"photos/sa_{n}.jpg")
    (top / "splits.json").write_text(json.dumps({"train": ["sa_2.json"], "test": ["sa_1.json"]}))
    for folder in (tmp_path, top):
        found = find_caption_set(folder).complete(Job())
        assert found.name == "dci" and [file.key for file in found.files] == ["sa_2.jpg", "sa_1.jpg"]
        assert found.read(1).captions["txt"] == ["Short 1. More of it."]
    (top / "annotations/sa_1.json").write_text("{}")
    with pytest.raises(DataError, match=r"splits.json is not DCI's form: KeyError 'image'"):
        find_caption_set(top)


def test_long_captions_of_docci(tmp_path):
    rows = [
        {"example_id": f"{split}_0", "split": split, "image_file": f"{split}_0.jpg", "description": f"Of {split}."}
        for split in ("train", "test", "qual_dev")
    ]
    (tmp_path / "docci_descriptions.jsonlines").write_text("\n".join(map(json.dumps, rows)))
    picture(tmp_path / "images/test_0.jpg")
    found = find_caption_set(tmp_path, "docci").complete(Job())
    assert len(found) == 1 and found.read(0).captions["txt"] == ["Of test."]
    (tmp_path / "docci_descriptions.jsonlines").write_text("{")
    with pytest.raises(DataError, match=r"is not DOCCI's form: JSONDecodeError"):
        find_caption_set(tmp_path)
