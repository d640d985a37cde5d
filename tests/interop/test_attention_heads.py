"""Heads that a file does not tell: assumed in a line where one number is usual, asked for elsewhere."""

import json
import logging
from collections import defaultdict
from pathlib import Path

import open_clip
import pytest
import torch

import cosmos_ssl
from cosmos_ssl.errors import CheckpointError
from cosmos_ssl.interop.attention_heads import HEAD_WIDTH, USUAL, assume_heads
from cosmos_ssl.interop.export import Origin, export
from cosmos_ssl.interop.official import SIZES

COSMOS = [
    *("model.embed_dim=32", "heads={cross: {type: cross_attention}}", "teacher={type: ema}"),
    "losses.distill={type: cross_modality_distillation, head: cross}",
    *("model.image.width=384", "model.image.heads=6", "model.text.width=256", "model.text.heads=4"),
]


def test_usual_widths_are_those_of_published_models():
    """All widths in OpenCLIP's own table of which every model has heads 64 wide."""
    found = {"image": defaultdict(set), "text": defaultdict(set)}
    for path in (Path(open_clip.__file__).parent / "model_configs").glob("*.json"):
        config = json.loads(path.read_text())
        vision, text = config["vision_cfg"], config["text_cfg"]
        if "timm_model_name" not in vision and isinstance(vision.get("layers"), int):
            found["image"][vision["width"]].add(vision.get("head_width", 64))
        if "hf_model_name" not in text and "width" in text:
            found["text"][text["width"]].add(text["width"] / text.get("heads", 8))
    for tower, widths in found.items():
        assert sorted(width for width, heads in widths.items() if heads == {HEAD_WIDTH}) == list(USUAL[tower])


@pytest.mark.parametrize(
    ("image", "text", "said"),
    [
        (
            {"width": 768},
            {"width": 512},
            "taken to be 64 wide (12 of the image tower, 8 of the text tower)",
        ),  # COSMOS's own
        ({"width": 1024, "heads": 16}, {"width": 768}, "taken to be 64 wide (12 of the text tower)"),
        ({"width": 768, "heads": 6}, {"width": 128, "heads": 4}, ""),
    ],
)
def test_what_is_assumed(image, text, said):
    note = assume_heads({"image": {"type": "clip_vit", **image}, "text": {"type": "clip_text", **text}}, "x.pt")
    assert note.endswith(said) and bool(note) == bool(said)


@pytest.mark.parametrize(("image", "text"), [(1280, 1024), (1408, 1024), (192, 128), (1664, 1280)])
def test_what_is_asked_for(image, text):
    """ViT-H, ViT-g and bigG have heads 80, 88 and 104 wide; small ones any."""
    towers = {"image": {"type": "cosmos-ssl:clip_vit", "width": image}, "text": {"type": "clip_text", "width": text}}
    with pytest.raises(
        CheckpointError, match=rf"^x.pt does not tell .* its image tower \(width {image}\).*: say model.image.heads="
    ) as found:
        assume_heads(towers, "x.pt")
    assert ("model.text.heads=.." in str(found.value)) == (text not in USUAL["text"])


def test_a_file_that_does_not_tell(make, tmp_path, caplog, pixels):
    """As the authors' own: one line says what was taken; a file of ours tells, and nothing is assumed."""
    encoder = make(*COSMOS)
    export({"student": encoder}, "official", tmp_path / "out", Origin(name="small", checkpoint="small"))
    content = torch.load(tmp_path / "out" / "small.pt", weights_only=True)
    assert content.pop(SIZES) == {"model.image.heads": 6, "model.image.image_size": 32, "model.text.heads": 4}
    torch.save(content, tmp_path / "theirs.pt")
    with caplog.at_level(logging.INFO, "cosmos_ssl"):
        theirs = cosmos_ssl.load(tmp_path / "theirs.pt")
        cosmos_ssl.load(tmp_path / "theirs.pt", overrides=["model.image.heads=6", "model.text.heads=4"])
        cosmos_ssl.load(tmp_path / "out" / "small.pt")
    first, *others = (record.message for record in caplog.records)
    assert first.endswith(
        "tensors; heads, which it does not tell, are taken to be 64 wide (6 of the image tower, 4 of the text tower)"
    )
    assert len(others) == 2 and all(other.endswith(" tensors") for other in others)
    assert torch.equal(theirs.encode_image(pixels(encoder)), encoder.encode_image(pixels(encoder)))


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "other.bin"])
def test_an_openclip_file_alone(make, tmp_path, pixels, name):
    """Taken out of its folder, the safetensors file still tells; bare tensors do not, and are asked about."""
    encoder = make("model.image.image_size=38", "augmenters.image.global_crops_size=38")
    export({"student": encoder}, "openclip", tmp_path / "out", Origin(name="small", checkpoint="small"))
    alone = tmp_path / name
    if name.endswith(".bin"):
        torch.save(
            cosmos_ssl.interop.files.read_safetensors(tmp_path / "out" / "open_clip_model.safetensors")[1], alone
        )
        with pytest.raises(CheckpointError, match=r"other.bin does not tell how many attention heads"):
            cosmos_ssl.load(alone)
        return
    (tmp_path / "out" / name).rename(alone)
    again = cosmos_ssl.load(alone)
    assert again.spec.image == encoder.spec.image
    assert torch.equal(again.encode_image(pixels(encoder)), encoder.encode_image(pixels(encoder)))
