"""The encoder: preprocessing as in OpenCLIP, features, what it leaves as it was, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cosmos_ssl.api import Need, PluginError, Spec, TowerSpec, UserError
from cosmos_ssl.models.encoder import ModelEncoder, resize_crop
from cosmos_ssl.models.model import Model
from cosmos_ssl_plugins.heads.cross_attention import CrossAttention
from cosmos_ssl_plugins.losses.cross_modality_distillation import CrossModalityDistillation
from cosmos_ssl_plugins.losses.siglip import SigLip
from cosmos_ssl_plugins.tokenizers.clip import ClipTokenizer
from cosmos_ssl_plugins.towers.clip_text import ClipText
from cosmos_ssl_plugins.towers.clip_vit import ClipViT

WORDS = ["a cat", "two small dogs on a red sofa", ""]


def make(*, text=True, heads=True, image_size=32):
    torch.manual_seed(0)
    tokenizer = ClipTokenizer(Spec(embed_dim=16), context_length=12)
    spec = Spec(
        embed_dim=16,
        context_length=12,
        vocab_size=tokenizer.vocab_size,
        image=TowerSpec(width=24, image_size=image_size, patch_size=8),
        text=TowerSpec(width=16),
    )
    towers = {"image": ClipViT(spec, width=24, layers=2, heads=2, patch_size=8, image_size=image_size)}
    if text:
        towers["text"] = ClipText(spec, width=16, layers=1, heads=2)
    cross = {"cross": CrossAttention(spec, num_heads=4)} if heads else {}
    return ModelEncoder(Model(towers, cross, {}), spec, tokenizer)


@pytest.fixture(scope="module")
def encoder():
    return make()


def picture(width, height):
    rng = np.random.default_rng(width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("size", [(48, 64), (97, 33), (32, 32), (20, 31), (32, 45), (301, 300)])
def test_preprocess_equals_openclip(encoder, size):
    from open_clip.transform import image_transform

    expected = image_transform(32, is_train=False)(picture(*size))
    torch.testing.assert_close(encoder.preprocess(picture(*size)), expected, rtol=0, atol=1e-6)


def test_preprocess_of_a_tensor_is_that_of_the_picture(encoder):
    image = picture(50, 40)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(encoder.preprocess(pixels), encoder.preprocess(image))
    assert resize_crop(pixels, 16).shape == (3, 16, 16)


def test_preprocess_of_other_colour_modes(encoder):
    grey = picture(40, 40).convert("L")
    assert torch.equal(encoder.preprocess(grey), encoder.preprocess(grey.convert("RGB")))


def test_preprocess_of_paths_and_of_transparent_pictures(encoder, tmp_path):
    image = picture(50, 40)
    image.save(tmp_path / "a.png")
    for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
        assert torch.equal(encoder.preprocess(path), encoder.preprocess(image))
    plain = ModelEncoder(encoder.model, replace(encoder.spec, background="#102030"), encoder.tokenizer)
    for mode in ("RGBA", "LA"):
        clear = Image.new(mode, (64, 48), 0)
        assert torch.equal(encoder.preprocess(clear), encoder.preprocess(Image.new("RGB", (64, 48), "white")))
        assert torch.equal(plain.preprocess(clear), plain.preprocess(Image.new("RGB", (64, 48), "#102030")))
    with pytest.raises(FileNotFoundError):
        encoder.preprocess(tmp_path / "none.png")


@pytest.mark.parametrize("size", [(7, 300), (301, 5), (1, 40), (33, 1600)])
def test_very_long_pictures_are_cut_first(size, monkeypatch):
    from open_clip.transform import image_transform

    long = picture(*size).point(
        lambda value: 96 + value // 4
    )  # nothing to clip between PIL's two passes, whose order may be another
    expected = image_transform(32, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))(long) * 255
    areas, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, to, *rest: areas.append(to[0] * to[1]) or resize(self, to, *rest)
    )
    assert (resize_crop(long, 32).float() - expected).abs().max() < 1.5
    tall = Image.new("RGB", (1, 100_000), "red")
    for strip in (tall, tall.transpose(Image.Transpose.ROTATE_90)):
        assert resize_crop(strip, 32)[:, 31, 31].tolist() == [255, 0, 0]
    assert max(areas) == 32 * 32


def test_features_are_unit_unless_told_otherwise(encoder):
    pixels, tokens = torch.randn(3, 3, 32, 32), encoder.tokenize(WORDS)
    for encode, given in ((encoder.encode_image, pixels), (encoder.encode_text, tokens)):
        raw = encode(given, normalize=False)
        assert raw.shape == (3, 16)
        assert not raw.requires_grad
        torch.testing.assert_close(encode(given), torch.nn.functional.normalize(raw, dim=-1))
    features = encoder.image_features(pixels)
    torch.testing.assert_close(features @ encoder.model.image.projection, encoder.encode_image(pixels, normalize=False))


def test_a_text_does_not_depend_on_its_neighbours(encoder):
    together = encoder.encode_text(encoder.tokenize(WORDS))
    for row, words in zip(together, WORDS, strict=True):
        torch.testing.assert_close(encoder.encode_text(encoder.tokenize(words))[0], row)


def test_words_do_where_token_ids_do(encoder):
    tokens, pixels = encoder.tokenize(WORDS), torch.randn(3, 3, 32, 32)
    assert torch.equal(encoder.encode_text(WORDS), encoder.encode_text(tokens))
    assert torch.equal(encoder.match_text(tuple(WORDS)), encoder.match_text(tokens))
    assert encoder.encode_text("a red heart").shape == encoder.match_text("a red heart").shape == (1, 16)
    found, expected = encoder.cross_attention(pixels, WORDS), encoder.cross_attention(pixels, tokens)
    assert torch.equal(found["text"], expected["text"])


def test_words_for_a_tower_of_few_ids_are_folded_and_told(encoder, caplog):
    few = make(heads=False)
    few.model.text = ClipText(few.spec, width=16, layers=1, heads=2, vocab_size=50)
    ids, found = encoder.tokenize(WORDS), few.tokenize(WORDS)
    assert found.max() == 49 and torch.equal(few.lengths(found), encoder.lengths(ids))
    assert torch.equal(found[ids < ids.max()], ids[ids < ids.max()] % 49)
    assert few.encode_text(WORDS).shape == (3, 16)
    assert [r.getMessage()[:45] for r in caplog.records] == ["this model has 50 token ids, its tokenizer 49"]


def test_lengths(encoder):
    tokens = encoder.tokenize(WORDS)
    _, lengths = encoder.tokenizer(WORDS)
    assert torch.equal(encoder.lengths(tokens), lengths)
    padded = torch.where(torch.arange(12) < lengths[:, None], tokens, tokens.max())  # as Hugging Face pads CLIP's texts
    assert torch.equal(encoder.lengths(padded), lengths)
    without = ModelEncoder(encoder.model, encoder.spec)
    assert torch.equal(without.lengths(tokens), lengths)


def test_training_mode_comes_back(encoder):
    model = encoder.model
    model.train()
    encoder.encode_image(torch.randn(1, 3, 32, 32))
    assert model.training
    assert model.image.blocks[0].training
    with pytest.raises(ValueError, match="pixels has shape"):
        encoder.encode_image(torch.randn(1, 32, 32))
    assert model.training
    model.eval()
    encoder.encode_image(torch.randn(1, 3, 32, 32))
    assert not model.training


def test_autocast_gives_float32_near_the_exact_features(encoder):
    rough = ModelEncoder(encoder.model, encoder.spec, encoder.tokenizer, dtype=torch.bfloat16)
    pixels = torch.randn(4, 3, 32, 32)
    features = rough.encode_image(pixels)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, encoder.encode_image(pixels), rtol=0, atol=0.05)
    assert not torch.equal(features, encoder.encode_image(pixels))


def test_dense(encoder):
    pixels = torch.randn(2, 3, 24, 40)
    tokens, pooled = encoder.dense(pixels)
    assert tokens.shape == (2, 15, 16)
    torch.testing.assert_close(pooled, encoder.encode_image(pixels, normalize=False))
    other, _ = encoder.dense(pixels, csa=True)
    assert not torch.allclose(tokens, other)


def test_cross_attention(encoder):
    pixels, tokens = torch.randn(3, 3, 32, 32), encoder.tokenize(WORDS)
    weights = encoder.cross_attention(pixels, tokens)
    assert weights["image"].shape == (3, 12)
    assert weights["text"].shape == (3, 16)
    for weight in weights.values():
        torch.testing.assert_close(weight.sum(1), torch.ones(3))
    pads = torch.arange(12) >= encoder.lengths(tokens)[:, None]
    assert (weights["image"][pads] == 0).all()
    alone = encoder.cross_attention(pixels[1:2], tokens[1:2])  # each picture asks its own text
    torch.testing.assert_close(alone["image"][0], weights["image"][1])
    assert make(heads=False).cross_attention(pixels, tokens) is None


def test_refusals(encoder):
    mute = make(text=False, heads=False)
    with pytest.raises(UserError, match="has no text tower"):
        mute.encode_text(encoder.tokenize("a"))
    with pytest.raises(UserError, match="no tokenizer"):
        ModelEncoder(encoder.model, encoder.spec).tokenize("a")
    plain = make(heads=False)
    plain.model.image.capabilities = frozenset()
    plain.model.image.part_name = "other"
    with pytest.raises(UserError, match="image tower 'other' has no dense inference"):
        plain.dense(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("preprocess", 7, r"^a picture is a path, a PIL image or uint8 \[3, H, W\], not int$"),
        ("preprocess", torch.zeros(3, 8, 8), r"^a picture is .*, not torch.float32 \[3, 8, 8\]$"),
        ("preprocess", torch.zeros(8, 8, 3, dtype=torch.uint8), r"^a picture is .*, not torch.uint8 \[8, 8, 3\]$"),
        ("preprocess", Image.new("F", (4, 4), -1), r"no picture that can be read \(values from -1 to -1\)$"),
        ("preprocess", Image.new("RGB", (0, 4)), "^a picture without pixels$"),
        ("preprocess", __file__, r"test_encoder\.py: no picture that can be read \(cannot identify image file\)$"),
        ("encode_text", 7, "^texts are a string or a list of strings, not int$"),
        ("encode_text", ["a", 7], "^texts are a string or a list of strings, not list$"),
        (
            "encode_text",
            torch.ones(12, dtype=torch.long),
            r"^token ids are whole numbers \[B, S\], not torch.int64 \[12\]$",
        ),
        ("encode_text", torch.ones(1, 12), r"^token ids are whole numbers \[B, S\], not torch.float32 \[1, 12\]$"),
        (
            "encode_image",
            "a.png",
            r"^pixels is str, expected float \[B, 3, H, W\]: torch.stack of what preprocess gives$",
        ),
        (
            "encode_image",
            torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
            r"^pixels has shape \[1, 3, 32, 32\], expected float ",
        ),
    ],
)
def test_wrong_types_are_refused_in_a_sentence(encoder, method, given, message):
    with pytest.raises(UserError, match=message):
        getattr(encoder, method)(given)


def test_what_it_says_of_itself(encoder):
    scaled = make()
    assert scaled.logit_scale is None
    distil = CrossModalityDistillation(replace(encoder.spec, heads={"cross": {"image": 16, "text": 16}}), head="cross")
    scaled.model.losses.update({"distill": distil, "own": SigLip(scaled.spec, init_logit_scale=7.0)})
    assert scaled.logit_scale == pytest.approx(7)
    assert scaled.to("cpu") is scaled and scaled.eval() is scaled and not scaled.model.training
    assert repr(scaled) == (
        "ModelEncoder(image: ClipViT, width 24, 32 px, patches of 8 px; text: ClipText, width 16, 12 tokens; "
        "embed_dim 16; on cpu)"
    )
    assert scaled.to("meta").device == torch.device("meta")


def test_device_is_where_the_model_is(encoder):
    assert encoder.device == torch.device("cpu")
    assert ModelEncoder(encoder.model, encoder.spec, device="cpu").device == torch.device("cpu")


# ---------------------------------------------------------------------------- what evaluators may read


def test_features_are_what_a_loss_would_be_given(encoder):
    pixels = torch.stack([encoder.preprocess(picture(40, 40)), encoder.preprocess(picture(50, 40))])
    ids = encoder.tokenize(WORDS[:2])
    needs = [
        Need(head="cross"),
        Need(modality="text", group="global", kind="tokens"),
        Need(modality="image", group="global", kind="tokens", hidden="drop"),  # nothing is hidden here
    ]
    found = encoder.features(needs, pixels=pixels, tokens=ids)
    assert {name: x.shape for name, x in found.heads["cross"].items()} == {"image": (1, 2, 16), "text": (1, 2, 16)}
    torch.testing.assert_close(found.image["global"].projected[0], encoder.encode_image(pixels, normalize=False))
    assert found.of("image", hidden="drop")["global"].tokens.shape == (1, 2, 16, 24)
    length = int(encoder.lengths(ids)[0])
    torch.testing.assert_close(found.text["global"].tokens[0, 0, length - 1], found.text["global"].pooled[0, 0])
    assert encoder.decode(ids[0, 1:3].tolist()) == ["a", "cat"]
    with pytest.raises(PluginError, match="the caller reads the text views 'global'"):
        encoder.features(needs[1:], pixels=pixels)
    with pytest.raises(UserError, match=r"has no head 'caption'\. Heads: cross"):
        encoder.respond("caption", pixels)


def test_a_head_answers_an_evaluator():
    class Asked(CrossAttention):
        def respond(self, x):
            assert not self.training and not torch.is_grad_enabled()
            return {"twice": 2 * x}

    encoder = make()
    encoder.model.heads["cross"] = Asked(encoder.spec, num_heads=4)
    assert encoder.respond("cross", torch.ones(2))["twice"].tolist() == [2, 2]
