"""Labelled sets in the folders in which people have them: small ones of each layout."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data import ImageNetInfo

from cosmos_ssl.api import BadSample, DataError, UserError
from cosmos_ssl.evaluation.class_sets import KNOWN, class_sets_in, find_class_data
from cosmos_ssl.evaluation.classification import load_class_names


def picture(path, shade=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (100 * shade, 0, 0)).save(path)


def lines(path, *text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(text) + "\n")


def food101(root):
    names = {"apple_pie": ["apple_pie/1"], "waffles": ["waffles/2", "waffles/3"]}
    for split in ("train", "test"):
        lines(root / f"food-101/meta/{split}.json", json.dumps(names))
    for n, name in enumerate(("apple_pie/1", "waffles/2", "waffles/3")):
        picture(root / f"food-101/images/{name}.jpg", n)


def cifar(root, folder, files, meta, key, names):
    (root / folder).mkdir()
    for number, file in enumerate(files):
        data = np.full((2, 3072), number, np.uint8)
        (root / folder / file).write_bytes(pickle.dumps({"data": data, key: [0, 1]}))
    (root / folder / meta[0]).write_bytes(pickle.dumps({meta[1]: names}))


def cifar10(root):
    files = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
    cifar(root, "cifar-10-batches-py", files, ("batches.meta", "label_names"), "labels", ["airplane", "automobile"])


def cifar100(root):
    names = ["apple", "aquarium_fish"]
    cifar(root, "cifar-100-python", ["train", "test"], ("meta", "fine_label_names"), "fine_labels", names)


def sun397(root):
    lines(root / "SUN397/ClassName.txt", "/a/abbey", "/a/apartment_building/outdoor")
    picture(root / "SUN397/a/apartment_building/outdoor/sun_b.jpg", 1)
    picture(root / "SUN397/a/abbey/sun_a.jpg", 0)


def cars(root):
    io = pytest.importorskip("scipy.io")
    kit = root / "stanford_cars/devkit"
    kit.mkdir(parents=True)
    names = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012"], dtype=object)
    io.savemat(kit / "cars_meta.mat", {"class_names": names})
    rows = np.array([("1.jpg", 2), ("2.jpg", 1)], dtype=[("fname", object), ("class", object)])
    for path in (kit / "cars_train_annos.mat", root / "stanford_cars/cars_test_annos_withlabels.mat"):
        io.savemat(path, {"annotations": rows})
    for split in ("train", "test"):
        picture(root / f"stanford_cars/cars_{split}/1.jpg", 1)
        picture(root / f"stanford_cars/cars_{split}/2.jpg", 0)


def fgvc_aircraft(root):
    data = root / "fgvc-aircraft-2013b/data"
    lines(data / "variants.txt", "707-320", "A300B4")
    for split in ("trainval", "test"):
        lines(data / f"images_variant_{split}.txt", "0034309 A300B4", "0034958 707-320")
    picture(data / "images/0034309.jpg", 1)
    picture(data / "images/0034958.jpg", 0)


def dtd(root):
    for split in ("train", "test"):
        lines(root / f"dtd/dtd/labels/{split}1.txt", "banded/b_1.jpg", "polka-dotted/p_1.jpg")
    picture(root / "dtd/dtd/images/banded/b_1.jpg", 0)
    picture(root / "dtd/dtd/images/polka-dotted/p_1.jpg", 1)


def pets(root):
    for split in ("trainval", "test"):
        lines(root / f"oxford-iiit-pet/annotations/{split}.txt", "Abyssinian_1 1 1 1", "american_bulldog_7 2 2 1")
    picture(root / "oxford-iiit-pet/images/Abyssinian_1.jpg", 0)
    picture(root / "oxford-iiit-pet/images/american_bulldog_7.jpg", 1)


def flowers(root):
    io = pytest.importorskip("scipy.io")
    (root / "flowers-102").mkdir()
    io.savemat(root / "flowers-102/imagelabels.mat", {"labels": np.array([1, 2, 1, 2])})
    io.savemat(
        root / "flowers-102/setid.mat", {"trnid": np.array([1, 2]), "valid": np.array([3]), "tstid": np.array([4, 3])}
    )
    for n in range(1, 5):
        picture(root / f"flowers-102/jpg/image_{n:05d}.jpg", (n + 1) % 2)


def caltech101(root):
    for n, name in enumerate(("BACKGROUND_Google", "Faces")):
        picture(root / f"caltech101/101_ObjectCategories/{name}/image_0001.jpg", n)


NAMES = {
    "food101": ["apple pie", "waffles"],
    "cifar10": ["airplane", "automobile"],
    "cifar100": ["apple", "aquarium fish"],
    "sun397": ["abbey", "apartment building outdoor"],
    "cars": ["AM General Hummer SUV 2000", "Acura RL Sedan 2012"],
    "fgvc_aircraft": ["707-320", "A300B4"],
    "dtd": ["banded", "polka-dotted"],
    "pets": ["Abyssinian", "American Bulldog"],
    "flowers": ["pink primrose", "hard-leaved pocket orchid"],
    "caltech101": ["background", "off-center face"],
}


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Some readers compare files with hashes of the real ones: here they do not."""
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda *_: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    (tmp_path / "data").mkdir()


@pytest.mark.parametrize("name", KNOWN)
def test_known_sets(name, tmp_path):
    pytest.importorskip("clip_benchmark")
    root = tmp_path / "data"
    globals()[name](root)
    inside = root / KNOWN[name].marker.partition("/")[0]
    for found in (find_class_data(str(root)), find_class_data(str(root), wanted=name), find_class_data(str(inside))):
        assert found.set_name == name and list(found.class_names[:2]) == NAMES[name]
        assert all(template.count("{}") == 1 and "{c}" not in template for template in found.templates)
    samples = [found.samples.read(n) for n in range(len(found.samples))]
    assert {sample.extras["cls"] for sample in samples} == {0, 1}
    if not name.startswith("cifar"):  # the shade of a picture is its class, but for food's third
        shades = [min(1, round(sample.decode()[0].float().mean().item() / 100)) for sample in samples]
        assert shades == [sample.extras["cls"] for sample in samples]
    assert found.samples.identity()["samples"] == len(samples)
    if name.startswith("cifar"):
        assert not hasattr(found.samples, "sources")
    else:
        assert all(Path(found.samples.sources(n)[0]).is_file() for n in range(len(samples)))
    assert (found.train is None) == (name in ("sun397", "caltech101"))
    if found.train is not None:
        assert len(found.train()) >= 2


def test_several_sets_in_one_folder(tmp_path):
    pytest.importorskip("clip_benchmark")
    root = tmp_path / "data"
    dtd(root)
    sun397(root)
    with pytest.raises(DataError, match=r"holds several sets\. Say which, such as --set dtd\. They are: dtd, sun397"):
        find_class_data(str(root))
    assert find_class_data(str(root), wanted="sun397").set_name == "sun397"
    with pytest.raises(
        DataError, match=r"does not hold the set 'pets': there is no oxford-iiit-pet/annotations/ in it"
    ):
        find_class_data(str(root), wanted="pets")
    with pytest.raises(UserError, match=r"no set named 'food'\. Did you mean 'food101'"):
        find_class_data(str(root), wanted="food")


def test_pictures_that_are_not_there_or_damaged(tmp_path):
    pytest.importorskip("clip_benchmark")
    root = tmp_path / "data"
    dtd(root)
    (root / "dtd/dtd/images/banded/b_1.jpg").unlink()
    (root / "dtd/dtd/images/polka-dotted/p_1.jpg").write_bytes(b"no picture")
    found = find_class_data(str(root)).samples
    with pytest.raises(BadSample, match=r"no file: .*b_1\.jpg"):
        found.read(0)
    with pytest.raises(BadSample, match="undecodable"):
        found.read(1).decode()
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    (root / "dtd/dtd/images/polka-dotted/p_1.jpg").write_bytes(eps)
    with pytest.raises(BadSample, match="cannot identify image file"):
        found.read(1).decode()
    Image.new("LA", (8, 6), 0).save(root / "dtd/dtd/images/polka-dotted/p_1.jpg", "PNG")
    assert found.read(1).on("teal").decode()[:, 0, 0].tolist() == [0, 128, 128]
    (root / "dtd/dtd/labels/test1.txt").write_text("")
    with pytest.raises(DataError, match=r"data: dtd in .* holds no picture"):
        find_class_data(str(root))
    (root / "dtd/dtd/labels/test1.txt").unlink()
    with pytest.raises(DataError, match=r"data: dtd in .* cannot be read"):
        find_class_data(str(root))


def test_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "clip_benchmark", None)
    monkeypatch.delitem(__import__("sys").modules, "clip_benchmark.datasets", raising=False)
    dtd(tmp_path / "data")
    with pytest.raises(UserError, match=r"pip install 'cosmos-ssl\[eval\]'"):
        find_class_data(str(tmp_path / "data"))


@pytest.mark.parametrize("inner", ["", "val"])
def test_imagenet(tmp_path, inner):
    for n, wnid in enumerate(("n01443537", "n15075141")):  # goldfish and toilet paper: classes 1 and 999
        picture(tmp_path / "data/val" / wnid / f"ILSVRC2012_val_{n:08d}.JPEG")
    picture(tmp_path / "data/train/n01443537/n01443537_1.JPEG")
    found = find_class_data(str(tmp_path / "data" / inner))
    assert [found.samples.read(n).extras["cls"] for n in range(2)] == [1, 999] and not found.set_name
    assert found.names()[1] == "goldfish" and found.names()[999] == "toilet paper" and found.templates == "openai"
    assert len(found.train()) == 1 and found.train().read(0).extras["cls"] == 1
    picture(tmp_path / "data/val/n99999999/x.JPEG")
    found = find_class_data(str(tmp_path / "data"))  # of another set: neighbours need no words for its classes
    assert len(found.samples) == 3 and found.train is not None
    with pytest.raises(DataError, match=r"WordNet numbers that are not all ImageNet's, and none of classes\.txt"):
        found.names()


def test_all_of_imagenet_is_known_as_such(tmp_path):
    for wnid in ImageNetInfo("imagenet-1k").label_names():
        (tmp_path / "data/val" / wnid).mkdir(parents=True)
    picture(tmp_path / "data/val/n01443537/x.JPEG")
    assert find_class_data(str(tmp_path / "data")).set_name == "imagenet"


def test_folders_by_class(tmp_path):
    picture(tmp_path / "data/red_fox/1.png")
    picture(tmp_path / "data/cat/1.png")
    found = find_class_data(str(tmp_path / "data"))
    assert found.names() == ["cat", "red fox"] and not found.set_name and found.templates is None
    for given, expected in (
        (["a cat", "a fox"], ["a cat", "a fox"]),  # other names, in the order of the folders
        (["Red Fox", "cat"], ["cat", "Red Fox"]),
        (["wolf", "red_fox", "cat"], ["cat", "red_fox", "wolf"]),  # of more classes than there are folders
    ):
        lines(tmp_path / "data/classes.txt", *given)
        assert find_class_data(str(tmp_path / "data")).names() == expected
    lines(tmp_path / "data/classes.txt", "red fox", "house cat")
    with pytest.raises(
        DataError, match=r"classes.txt: name 1, 'red fox', stands in the place of the class folder 'cat'\. Give every"
    ):
        find_class_data(str(tmp_path / "data")).names()
    assert len(find_class_data(str(tmp_path / "data")).samples) == 2  # names do not matter to neighbours
    with pytest.raises(DataError, match="--class-names: 3 class names are given for 2 classes"):
        find_class_data(str(tmp_path / "data")).names(["a", "b", "c"])
    with pytest.raises(DataError, match="does not exist"):
        find_class_data(str(tmp_path / "date"))


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_folders_by_split_and_class(tmp_path, name):
    for path in ("train/cat/1.png", "train/cat/2.png", "train/fox/1.png", f"{name}/cat/1.png", f"{name}/fox/1.png"):
        picture(tmp_path / "data" / path)
    found = find_class_data(str(tmp_path / "data"))
    assert found.names() == ["cat", "fox"] and len(found.samples) == 2 and len(found.train()) == 3
    lines(tmp_path / "data/classes.txt", "a cat", "a fox")
    assert find_class_data(str(tmp_path / "data")).names() == ["a cat", "a fox"]
    lines(tmp_path / f"data/{name}/classes.txt", "one cat", "one fox")
    assert find_class_data(str(tmp_path / "data")).names() == ["one cat", "one fox"]


@pytest.mark.parametrize(
    ("name", "folder", "count"),
    [
        ("imagenet_v2", "imagenetv2-matched-frequency-format-val", 1000),
        ("imagenet_a", "imagenet-a", 200),
        ("imagenet_r", "imagenet-r", 200),
        ("imagenet_sketch", "sketch", 1000),
    ],
)
def test_variants_of_imagenet(tmp_path, name, folder, count):
    """Their folders tell the classes: numbers in V2 (10 after 9), WordNet numbers elsewhere; A and R have 200."""
    wnids, names = ImageNetInfo("imagenet-1k").label_names(), load_class_names("imagenet")
    own = [1000 // count * n for n in range(count)]
    for n in own:
        (tmp_path / folder / (str(n) if name == "imagenet_v2" else wnids[n])).mkdir(parents=True)
    last = tmp_path / folder / (str(own[10]) if name == "imagenet_v2" else wnids[own[10]])
    picture(last / "a.jpeg")
    (tmp_path / folder / "README.txt").write_text("about it")
    for data in (tmp_path, tmp_path / folder):
        found = find_class_data(str(data))
        assert (found.set_name, found.templates, len(found.samples)) == (name, "openai", 1)
        assert found.names() == [names[n] for n in own] and found.samples.read(0).extras["cls"] == 10
    assert class_sets_in(tmp_path) == [name] == class_sets_in(tmp_path / folder)
    next(path for path in (tmp_path / folder).iterdir() if path.is_dir() and path != last).rmdir()
    with pytest.raises(DataError, match=f"does not hold the {count} class folders of {name}: {count - 1} are there"):
        find_class_data(str(tmp_path), wanted=name)
    with pytest.raises(DataError, match=f"does not hold the set '{name}': there is no {folder}/ in it"):
        find_class_data(str(last), wanted=name)


def test_objectnet(tmp_path):
    """Of its folders those whose label ImageNet has, by its own tables."""
    top = tmp_path / "objectnet-1.0"
    labels = {"banana": "Banana", "air_freshener": "Air freshener", "bath_towel": "Bath towel"}
    lines(top / "mappings/folder_to_objectnet_label.json", json.dumps(labels))
    lines(top / "mappings/objectnet_to_imagenet_1k.json", json.dumps({"Bath towel": "bath towel", "Banana": "banana"}))
    for folder in labels:
        picture(top / "images" / folder / "x.png")
    found = find_class_data(str(tmp_path))
    assert found.set_name == "objectnet" and found.names() == ["banana", "bath towel"]
    samples = [found.samples.read(n) for n in range(len(found.samples))]
    assert [(one.key, one.extras["cls"]) for one in samples] == [("banana/x.png", 0), ("bath_towel/x.png", 1)]
    (top / "images/banana/x.png").unlink()
    (top / "images/banana").rmdir()
    with pytest.raises(DataError, match="lacks 1 class folders of objectnet, such as banana"):
        find_class_data(str(tmp_path))
    lines(top / "mappings/objectnet_to_imagenet_1k.json", "[]")
    with pytest.raises(DataError, match="ObjectNet's tables"):
        find_class_data(str(tmp_path))
