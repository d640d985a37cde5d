"""Pictures and attention maps: sizes, places and colours."""

import pytest
import torch

from cosmos_ssl.evaluation.attention_maps import AttentionMap, attention_maps, scaled
from cosmos_ssl.evaluation.pictures import GAP, SIDE, Match, draw_attention, draw_matches, draw_neighbours, overlay

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


def test_matches():
    rows = [Match(picture=RED, found=[("a very long text " * 20, 0.5, True), ("日本 \n two lines", 0.1, False)], note="") for _ in range(2)]
    picture = draw_matches(rows)
    assert picture.dtype == torch.uint8
    assert picture.shape[1] == GAP + 2 * (SIDE + GAP)
    assert picture[:, GAP + SIDE // 2, GAP + SIDE // 2].tolist() == [255, 0, 0]
    text = picture[:, GAP : GAP + 20, 2 * GAP + SIDE :]
    green = (text[1].int() - text[0].int() > 60).any()
    assert green
    assert (picture[:, :, -GAP:] == 255).all()  # nothing runs over the edge


def test_neighbours_are_framed_by_their_label():
    picture = draw_neighbours([(RED, [(RED, True), (RED, False)]), (RED, [])])
    row = picture[:, GAP + SIDE // 2]
    same, other = row[:, 3 * GAP + SIDE - 1], row[:, 4 * GAP + 2 * SIDE - 1]
    assert same[1] > same[0]
    assert other[0] > other[1]


def test_attention():
    bright = AttentionMap(patches=torch.tensor([[0.0, 1.0]]), words=[("word", 1.0), ("so", 0.0), *[("many", 0.5)] * 200])
    picture = draw_attention([RED], [bright])
    assert picture.shape[1:] == (2 * GAP + SIDE, 3 * GAP + 2 * SIDE + 420 + GAP)
    assert (picture[:, -GAP:] == 255).all()  # words that do not fit are left out
    shade = picture[:, GAP + 1, 3 * GAP + 2 * SIDE + 1]
    assert shade[0] > shade[1]


def test_overlay_is_bright_where_the_weight_is():
    black = torch.zeros(3, 16, 32, dtype=torch.uint8)
    shown = overlay(black, torch.tensor([[0.0, 1.0]]))
    assert shown.dtype == torch.uint8
    assert shown[:, 8, 31].sum() > 300 > 20 > shown[:, 8, 0].sum()
