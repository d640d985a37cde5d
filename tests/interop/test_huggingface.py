"""transformers.CLIPModel: the same features, pictures and texts prepared alike, and refusals of what it cannot
express.
"""

import json
import re

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from cosmos_ssl.errors import UserError
from cosmos_ssl.interop.export import Origin, export

SIZES = {
    "small": [],
    "heads of 64": ["model.image.width=128", "model.image.heads=null", "model.text.width=64", "model.text.heads=1"],
    "77 places, small patches": ["tokenizer.context_length=77", "model.image.patch_size=4", "model.image.layers=1"],
    "picture of no whole patches": ["model.image.image_size=38", "augmenters.image.global_crops_size=38"],
    "narrow and odd mlps": ["model.image.mlp_ratio=3.3", "model.text.mlp_ratio=2.7", "model.text.layers=3"],
    "smaller vocabulary": ["model.text.vocab_size=300"],
    "larger vocabulary": ["model.text.vocab_size=49420"],
}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out"


def write(encoder, folder):
    return export({"teacher": encoder}, "huggingface", folder, Origin(name="small", checkpoint="runs/small"))


@pytest.mark.parametrize("overrides", SIZES.values(), ids=SIZES.keys())
def test_features(make, pixels, words, folder, overrides):
    encoder = make(*overrides)
    write(encoder, folder)
    model, report = CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    images, tokens = pixels(encoder), words(encoder)
    with torch.no_grad():
        out = model.eval()(input_ids=tokens, pixel_values=images)
    expected = encoder.encode_image(images), encoder.encode_text(tokens)
    torch.testing.assert_close(out.image_embeds, expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(out.text_embeds, expected[1], atol=1e-5, rtol=0)
    logits = encoder.model.losses["clip"].logit_scale.exp() * expected[0] @ expected[1].T
    torch.testing.assert_close(out.logits_per_image, logits, atol=1e-4, rtol=0)


def test_texts_from_the_processor_to_features(make, folder):
    """Hugging Face pads with the end token and masks the pads, CLIP pads with 0: the features are the same."""
    encoder = make()
    write(encoder, folder)
    processor, model = CLIPProcessor.from_pretrained(folder), CLIPModel.from_pretrained(folder).eval()
    texts = ["a Red circle", "", "it's 2 blue stars! <br> x", "many words " * 60, "caf\u00e9 \u4f60\u597d \U0001f600"]
    tokens, batch = (
        encoder.tokenize(texts),
        processor(text=texts, padding="max_length", truncation=True, return_tensors="pt"),
    )
    assert batch["input_ids"].shape == (5, 16)
    lengths = encoder.lengths(tokens)
    assert torch.equal(batch["attention_mask"].sum(-1), lengths)
    assert all(
        torch.equal(theirs[:n], ours[:n]) for theirs, ours, n in zip(batch["input_ids"], tokens, lengths, strict=True)
    )
    with torch.no_grad():
        found = model.text_projection(model.text_model(**batch).pooler_output)
    torch.testing.assert_close(
        torch.nn.functional.normalize(found, dim=-1), encoder.encode_text(tokens), atol=1e-5, rtol=0
    )


HARD = [  # three that the tokenizer cleans, and five of which only ftfy and html make sense
    *(
        "salt &amp; pepper",
        "&amp;lt;b&amp;gt; it\u2019s &quot;so&quot;",
        "\u201ca\u201d &#39;b&#x27; &apos;c&#039; d&nbsp;e",
    ),
    *("caf\u00c3\u00a9", "\ufb01ne", "\uff37ide", "caf&eacute;", "&#8217;s"),
]


def test_what_the_tokenizer_cleans_and_what_it_does_not(make, folder):
    """Common entities and quotes as ours; the lines of the card make the rest the same, without which features are far
    off.
    """
    encoder = make()
    write(encoder, folder)
    ours = [
        row[:n].tolist() for row, n in zip(encoder.tokenize(HARD), encoder.lengths(encoder.tokenize(HARD)), strict=True)
    ]
    tokenizer = CLIPProcessor.from_pretrained(folder).tokenizer
    found = tokenizer(HARD)["input_ids"]
    assert [a == b for a, b in zip(found, ours, strict=True)] == [True] * 3 + [False] * 5
    lines: dict[str, object] = {}
    exec(re.search(r"import html\n\nimport ftfy\n", card := (folder / "README.md").read_text())[0], lines)
    exec(re.search(r"^def clean.*\n.*\n", card, re.MULTILINE)[0], lines)
    assert tokenizer([lines["clean"](text) for text in HARD])["input_ids"] == ours
    padded = torch.zeros(len(HARD), 16, dtype=torch.int64)
    for row, ids in zip(padded, found, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    off = (encoder.encode_text(padded) - encoder.encode_text(encoder.tokenize(HARD))).abs().amax(1)
    assert off[:3].max() < 1e-6 and off[3:].min() > 0.05


def test_pictures_from_the_processor(make, folder):
    """Rounded otherwise (1 of 255), and cut out a pixel beside for a quarter of all shapes; the lines of the card are
    exact.
    """
    encoder = make()
    write(encoder, folder)
    lines: dict[str, object] = {}
    card = (folder / "README.md").read_text()
    exec(
        f"from torchvision import transforms\n{re.search(r'^preprocess = .*?^[)]', card, re.DOTALL | re.MULTILINE)[0]}",
        lines,
    )
    processor = CLIPProcessor.from_pretrained(folder)
    for spare in range(9):  # pixels of the longer side beside the middle, once resized
        picture = Image.effect_noise((64, 64 + 2 * spare), 80).convert("RGB")
        ours = encoder.preprocess(picture)
        torch.testing.assert_close(lines["preprocess"](picture), ours, atol=1e-6, rtol=0)
        theirs = processor(images=picture, return_tensors="pt")["pixel_values"][0]
        steps = ((theirs - ours).abs().amax((1, 2)) * 255 * torch.tensor(encoder.spec.image.std)).max()
        off = (encoder.encode_image(theirs[None]) - encoder.encode_image(ours[None])).abs().max()
        assert (steps > 20 and off > 0.02) if spare % 4 == 3 else (steps < 1.01 and off < 0.01), (spare, steps, off)


def test_automatic_classes_and_the_tokenizer(make, folder):
    write(make(), folder)
    assert isinstance(AutoModel.from_pretrained(folder), CLIPModel)
    processor = AutoProcessor.from_pretrained(folder)
    assert isinstance(processor, CLIPProcessor) and isinstance(processor.image_processor, CLIPImageProcessor)
    for tokenizer in (CLIPTokenizer.from_pretrained(folder), processor.tokenizer):
        assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (
            49408,
            49406,
            49407,
            16,
        )
        assert tokenizer.pad_token_id == 49407
        assert tokenizer.decode(tokenizer("a red circle")["input_ids"], skip_special_tokens=True) == "a red circle"


def test_another_vocabulary_gets_no_tokenizer(make, folder):
    notes = write(make("model.text.vocab_size=300"), folder)
    assert notes == ["no tokenizer is written: the token ids are not those of CLIP's vocabulary"]
    assert not (folder / "vocab.json").exists()
    assert json.loads((folder / "config.json").read_text())["text_config"]["eos_token_id"] == 2


def test_the_bias_of_siglip_is_left_out_and_told(make, folder):
    notes = write(make("losses={clip: null, siglip: {type: siglip}}"), folder)
    assert (
        len(notes) == 1
        and notes[0].startswith("the bias of the logits, -")
        and notes[0].endswith("is left out: CLIPModel has none")
    )


@pytest.mark.parametrize(
    ("overrides", "place"),
    [
        (["model.image.registers=2"], r"model.image.registers \(2\)"),
        (["model.image.pre_norm=false"], "model.image.pre_norm=false"),
        (
            ["model.image.layer_scale=0.1", "model.text.layer_scale=0.1"],
            "model.image.layer_scale; model.text.layer_scale",
        ),
    ],
)
def test_what_it_has_no_place_for(make, folder, overrides, place):
    with pytest.raises(UserError, match=rf"^huggingface \(CLIPModel\) has no place for {place}$"):
        write(make(*overrides), folder)
    assert not folder.exists()
