"""Pictures and attention maps: sizes, places and colours."""

import pytest
import torch

from cosmos_ssl.evaluation.attention_maps import AttentionMap, attention_maps, scaled
from cosmos_ssl.evaluation.pictures import (
    GAP,
    LINE,
    SIDE,
    Match,
    class_colours,
    draw_attention,
    draw_classes,
    draw_matches,
    draw_neighbours,
    draw_segments,
    overlay,
)

RED = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 20, 30)


class Encoder:
    """Attention known by heart: four tokens a text, patches of a 2 x 3 grid."""

    class spec:  # noqa: N801
        class image:  # noqa: N801
            patch_size = 8

    class tokenizer:  # noqa: N801
        @staticmethod
        def decode(ids):
            return [f"w{i}" for i in ids]

    def tokenize(self, texts):
        return torch.tensor([[90, 1, 2, 3, 99, 0], [90, 99, 0, 0, 0, 0]])

    def lengths(self, tokens):
        return torch.tensor([5, 2])

    def cross_attention(self, pixels, tokens):
        words = torch.tensor([[0.5, 0.1, 0.3, 0.05, 0.05, 0.0], [0.5, 0.5, 0, 0, 0, 0]])
        return {"image": words, "text": torch.arange(12.0).view(2, 6)}


def test_attention_maps_are_scaled_and_without_marks():
    first, second = attention_maps(Encoder(), torch.zeros(2, 3, 16, 24), ["", ""])
    assert [piece for piece, _ in first.words] == ["w1", "w2", "w3"]
    assert [weight for _, weight in first.words] == pytest.approx([0.2, 1, 0])
    assert second.words == []
    torch.testing.assert_close(second.patches, torch.arange(6.0).view(2, 3) / 5)


def test_scaled():
    assert scaled(torch.tensor([2.0, 4, 3])).tolist() == [0, 1, 0.5]
    assert scaled(torch.full((3,), 0.2)).tolist() == [0, 0, 0]
    assert scaled(torch.empty(0)).tolist() == []


def dark_rows(picture: torch.Tensor) -> list[int]:
    """The rows of a picture [3, H, W] in which something is drawn."""
    return (picture < 200).any(0).any(1).nonzero()[:, 0].tolist()


def test_matches():
    rows = [
        Match(
            picture=RED, found=[("a very long text " * 20, 0.5, True), ("日本 \n two lines", 0.1, False)], note="note"
        )
        for _ in range(2)
    ]
    picture = draw_matches(rows)
    height = SIDE + 2 * GAP
    assert picture.dtype == torch.uint8 and picture.shape[1] == 2 * height
    assert picture[:, GAP + SIDE // 2, GAP + SIDE // 2].tolist() == [255, 0, 0]
    texts = picture[:, :height, 3 * GAP + SIDE :]
    green = texts[1].int() - texts[0].int() > 60
    assert green.any() and green.any(1).nonzero().max() < SIDE // 2
    assert (picture[:, :, -GAP:] == 255).all()  # nothing runs over the edge
    # the note, the lowest of a picture's lines, is nearer to the line above it than to the next picture
    note = dark_rows(picture[:, :height, 3 * GAP + SIDE :])[-1]
    assert note < GAP + SIDE and height + GAP - note > 2 * GAP
    short = draw_matches([Match(picture=RED, found=[("a", 0.5, True)], note="b")])
    assert short.shape[2] < 250 < picture.shape[2], "as wide as the texts are"


def test_neighbours_are_framed_by_their_label():
    picture = draw_neighbours([(RED, [(RED, True), (RED, False)]), (RED, [])])
    row = picture[:, GAP + SIDE // 2]
    same, other = row[:, 3 * GAP + SIDE - 1], row[:, 4 * GAP + 2 * SIDE - 1]
    assert same[1] > same[0]
    assert other[0] > other[1]


def test_attention():
    bright = AttentionMap(patches=torch.tensor([[0.0, 1.0]]), words=[("word", 1.0), ("so", 0.0), *[("many", 0.5)] * 60])
    picture = draw_attention([RED], [bright], side=SIDE)
    assert picture.shape[1] > 2 * SIDE  # no word is left out
    words = picture[:, : -LINE - 2 * GAP, 3 * GAP + 2 * SIDE :]
    lines = (words < 255).any(0).any(1)
    assert not lines[: GAP - 1].any() and (picture[:, :, -GAP:] == 255).all()
    shade = words[:, int(lines.nonzero()[0]), 1]
    assert shade.tolist() == [255, 85, 55]  # the ground of the first word, the strongest
    # below the columns the colours from little to much: of patches from black to bright, of words from white to the
    # strongest ground
    row = picture[:, -LINE - GAP + 9].float().T
    patches, ground = row[2 * GAP + SIDE : 3 * GAP + 2 * SIDE], row[3 * GAP + 2 * SIDE :]
    for scale, colours in (
        (patches, [(0, 0, 4), (188, 55, 84), (252, 255, 164)]),
        (ground, [(255, 170, 155), (255, 85, 55)]),
    ):
        assert all((scale - torch.tensor(colour)).abs().sum(1).min() < 45 for colour in colours)


def test_attention_is_as_wide_as_its_words():
    few = AttentionMap(patches=torch.tensor([[0.0, 1.0]]), words=[("a", 1.0)])
    assert draw_attention([RED], [few], side=SIDE).shape[2] == 4 * GAP + 3 * SIDE  # no narrower than a scale


def test_segments():
    colours = class_colours(2)
    drawn = draw_classes(RED, torch.zeros(20, 30, dtype=torch.long))
    picture = draw_segments([(RED, drawn, list(zip(colours, ["cat", "dog"], strict=True)))], side=SIDE)
    assert picture.shape[1] == 2 * GAP + SIDE and picture[:, GAP + SIDE // 2, GAP + SIDE // 2].tolist() == [255, 0, 0]
    assert picture[:, GAP + SIDE // 2, 2 * GAP + SIDE + SIDE // 2].tolist() == drawn[:, 0, 0].tolist()
    assert [picture[:, GAP + line * LINE + 9, 3 * GAP + 2 * SIDE + 5].tolist() for line in range(2)] == [
        list(c) for c in colours
    ]


def test_overlay_is_bright_where_the_weight_is():
    black = torch.zeros(3, 16, 32, dtype=torch.uint8)
    shown = overlay(black, torch.tensor([[0.0, 1.0]]))
    assert shown.dtype == torch.uint8
    assert shown[:, 8, 31].sum() > 300 > 20 > shown[:, 8, 0].sum()
