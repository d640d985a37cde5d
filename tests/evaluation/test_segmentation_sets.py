"""Segmentation sets in the folders in which people have them: small ones of each layout, and what their masks mean."""

import numpy as np
import pytest
from PIL import Image

from cosmos_ssl.api import BadSample, DataError, UserError
from cosmos_ssl.data.scenes import SceneOptions, write_scenes
from cosmos_ssl.evaluation.features import Job
from cosmos_ssl.evaluation.picture_files import PictureFiles
from cosmos_ssl.evaluation.segmentation_sets import find_segmentation_data, read_class_names


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 2), (9, 9, 9)).save(path)


def mask(path, *values, palette=False):
    """One row of pixels with these values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.array([values], np.uint8))
    if palette:
        image.putpalette([value for n in range(256) for value in (n, 255 - n, n)])
    image.save(path)


def voc(root, folder="VOCdevkit/VOC2012"):
    top = root / folder
    for name in ("2007_b", "2007_a", "2007_c"):
        picture(top / f"JPEGImages/{name}.jpg")
        mask(top / f"SegmentationClass/{name}.png", 0, 1, 20, 255, palette=True)
    (top / "ImageSets/Segmentation").mkdir(parents=True)
    (top / "ImageSets/Segmentation/val.txt").write_text("2007_b\n2007_a\n")


def context(root):
    top = root / "VOC2010"
    picture(top / "JPEGImages/2008_a.jpg")
    mask(top / "SegmentationClassContext/2008_a.png", 0, 1, 59, 255)
    (top / "ImageSets/SegmentationContext").mkdir(parents=True)
    (top / "ImageSets/SegmentationContext/val.txt").write_text("2008_a\n")


def cityscapes(root, end, *values):
    picture(root / "cityscapes/leftImg8bit/val/ulm/ulm_0_leftImg8bit.png")
    mask(root / f"cityscapes/gtFine/val/ulm/ulm_0_gtFine_{end}.png", *values)


def labels(found, index=0):
    return found.read(index).extras["labels"][0].tolist()


@pytest.mark.parametrize("inner", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc(tmp_path, inner):
    voc(tmp_path)
    found = find_segmentation_data(str(tmp_path / inner), wanted="voc21")
    assert [file.key for file in found.samples.files] == ["2007_a.jpg", "2007_b.jpg"]
    assert (
        labels(found) == [0, 1, 20, 255] and len(found.names) == 21 and found.names[20] == ["television", "tv monitor"]
    )
    assert len(found.names[0]) > 5 and found.names[0][0] == "background" and found.protocol.area_thd == 0.1
    found = find_segmentation_data(str(tmp_path / inner), wanted="voc20")
    assert labels(found) == [255, 0, 19, 255] and len(found.names) == 20 and found.set_name == "voc20"
    with pytest.raises(
        DataError, match=r"several sets are read from .*\. Say which, such as --set voc20\. They are: voc20, voc21"
    ):
        find_segmentation_data(str(tmp_path / inner))


def test_context(tmp_path):
    context(tmp_path)
    found = find_segmentation_data(str(tmp_path), wanted="context60")
    assert (
        labels(found) == [0, 1, 59, 255]
        and found.names[0] == ["background"]
        and found.names[59] == ["wood"]
        and len(found.names) == 60
    )
    found = find_segmentation_data(str(tmp_path / "VOC2010"), wanted="context59")
    assert labels(found) == [255, 0, 58, 255] and len(found.names) == 59
    assert [of_class[0] for of_class in found.names] == sorted(
        (of_class[0] for of_class in found.names),
        key=lambda name: "tvmonitor" if name == "television" else name.replace(" ", ""),
    )


def test_coco_as_it_is_converted_for_mmsegmentation(tmp_path):
    top = tmp_path / "coco_stuff164k"
    picture(top / "images/val2017/000000000139.jpg")
    mask(top / "annotations/val2017/000000000139_labelTrainIds.png", 0, 80, 170, 255)
    mask(top / "annotations/val2017/000000000139_instanceTrainIds.png", 1, 80, 0, 255)
    found = find_segmentation_data(str(tmp_path), wanted="coco_stuff")
    assert labels(found) == [0, 80, 170, 255] and len(found.names) == 171
    assert [found.names[n] for n in (0, 79, 80, 170)] == [["person"], ["toothbrush"], ["banner"], ["wood"]]
    found = find_segmentation_data(str(tmp_path), wanted="coco_object")
    assert labels(found) == [1, 80, 0, 255] and len(found.names) == 81 and found.names[80] == ["toothbrush"]


@pytest.mark.parametrize(
    ("pictures", "masks"),
    [
        ("images/val2017", "annotations/val2017"),
        ("val2017", "stuffthingmaps/val2017"),
        ("val2017", "stuffthingmaps_trainval2017/val2017"),
    ],
)
def test_coco_as_it_is_released(tmp_path, pictures, masks):
    """Numbers of COCO's 182 less one: 0 person, 12 stop sign (11 is none), 89 toothbrush, 91 banner, 181 wood; 255 is
    nothing.
    """
    picture(tmp_path / pictures / "000000000139.jpg")
    mask(tmp_path / masks / "000000000139.png", 0, 12, 89, 91, 181, 255)
    found = find_segmentation_data(str(tmp_path), wanted="coco_stuff")
    named = [found.names[n][0] if n != 255 else "-" for n in labels(found)]
    assert named == ["person", "stop sign", "toothbrush", "banner", "wood", "-"]
    assert labels(found) == [0, 11, 79, 80, 170, 255]
    assert labels(find_segmentation_data(str(tmp_path), wanted="coco_object")) == [1, 12, 80, 0, 0, 0]


def test_cityscapes(tmp_path):
    cityscapes(tmp_path, "labelIds", 0, 7, 11, 33)
    found = find_segmentation_data(str(tmp_path))
    assert labels(found) == [255, 0, 2, 18] and found.set_name == "cityscapes" and found.protocol.short_side == 560
    cityscapes(tmp_path, "labelTrainIds", 0, 2, 18, 255)
    found = find_segmentation_data(str(tmp_path / "cityscapes"))
    assert labels(found) == [0, 2, 18, 255] and found.names[18] == ["bicycle"] and len(found.names) == 19


def test_ade20k(tmp_path):
    picture(tmp_path / "ADEChallengeData2016/images/validation/ADE_val_00000001.jpg")
    mask(tmp_path / "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png", 0, 1, 150)
    found = find_segmentation_data(str(tmp_path))
    assert (
        labels(found) == [255, 0, 149]
        and len(found.names) == 150
        and found.names[149] == ["flag"]
        and found.set_name == "ade20k"
    )


def test_scenes(tmp_path):
    options = SceneOptions(train_samples=4, validation_samples=4, image_size=32)
    folder = write_scenes(tmp_path / "scenes", options)
    found = find_segmentation_data(options.pattern(folder, "val"))
    assert found.protocol is None and not found.set_name and len(found) == 4
    sample = found.read(1)
    seen = set(sample.extras["labels"].unique().tolist()) - {255}
    sentences = (folder / "classes.txt").read_text().splitlines()
    text = " ".join(found.samples.read(1).captions["txt"])
    assert seen and all(found.names[n] == [sentences[n]] and sentences[n] in text for n in seen)


def test_missing_files(tmp_path):
    voc(tmp_path)
    (tmp_path / "VOCdevkit/VOC2012/SegmentationClass/2007_a.png").unlink()
    found = find_segmentation_data(str(tmp_path), wanted="voc20")
    with pytest.raises(
        DataError, match=r"1 of 2 pictures or masks are not there \(2007_a\.png\)\. Go on without them: --allow-missing"
    ):
        found.samples.complete(Job(), "pictures or masks are not there")
    assert [file.key for file in found.samples.complete(Job(allow_missing=True), "").files] == ["2007_b.jpg"]
    with pytest.raises(BadSample, match=r"no file: .*2007_a\.png"):
        found.read(0)
    (tmp_path / "VOCdevkit/VOC2012/SegmentationClass/2007_a.png").write_bytes(b"no picture")
    with pytest.raises(BadSample, match=r"unreadable mask: 2007_a\.jpg"):
        found.read(0)
    picture(tmp_path / "VOCdevkit/VOC2012/SegmentationClass/2007_a.png")
    with pytest.raises(BadSample, match="one byte a pixel"):
        found.read(0)
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(DataError, match=r"val.txt cannot be read"):
        find_segmentation_data(str(tmp_path), wanted="voc20")


def test_names_of_ones_own(tmp_path):
    voc(tmp_path)
    own = tmp_path / "own.txt"
    own.write_text("\n".join(["sky, wall", *(f"thing {n}" for n in range(20))]))
    found = find_segmentation_data(str(tmp_path), wanted="voc21", names=str(own))
    assert found.names[:2] == [["sky", "wall"], ["thing 0"]]
    with pytest.raises(DataError, match=r"own\.txt holds 21 classes, voc20 has 20"):
        find_segmentation_data(str(tmp_path), wanted="voc20", names=str(own))
    own.write_text("a\n\nb\n")
    with pytest.raises(DataError, match="line 2 of"):
        read_class_names(own)
    with pytest.raises(DataError, match="cannot be read"):
        read_class_names(tmp_path / "nothing")


def test_what_is_not_there(tmp_path):
    with pytest.raises(DataError, match="holds no set that is known"):
        find_segmentation_data(str(tmp_path))
    with pytest.raises(DataError, match=r"known as ade20k \(looked for images/validation and annotations/validation\)"):
        find_segmentation_data(str(tmp_path), wanted="ade20k")
    with pytest.raises(UserError, match=r"no set named 'voc22'\. Did you mean 'voc21'"):
        find_segmentation_data(str(tmp_path), wanted="voc22")
    assert not PictureFiles(name="x", files=[]).complete(Job(), "").files
