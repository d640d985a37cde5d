"""Pictures of words and of classes: places, colours, sizes."""

from __future__ import annotations

import pytest
import torch

from cosmos_ssl.evaluation.attention_maps import AttentionMap
from cosmos_ssl.evaluation.pictures import (
    GAP,
    LINE,
    SIDE,
    WORD,
    WORD_GAP,
    class_colours,
    draw_attention,
    draw_classes,
    draw_words,
)


def test_words_take_as_many_lines_as_they_need() -> None:
    one = draw_words([("word", 1.0)])
    many = draw_words([("word", 0.5)] * 40 + [("x" * 500, 1.0)])
    height = WORD + WORD_GAP
    assert one.shape == (3, 3 * GAP + height + LINE, 2 * GAP + SIDE), "with a scale below, and no wider than that"
    lines = (many.shape[1] - one.shape[1]) / (WORD + 2 * WORD_GAP) + 1
    assert lines == int(lines) and 4 <= lines <= 8
    assert (many[:, :, -GAP:] == 255).all()
    assert one[:, GAP + 1, GAP + 1].tolist() == [255, 85, 55]  # the strongest ground
    assert draw_words([]).shape == one.shape


def test_a_larger_grid() -> None:
    black = torch.zeros(3, 8, 8, dtype=torch.uint8)
    found = AttentionMap(patches=torch.tensor([[1.0, 0.0]]), words=[("a", 1.0)])
    drawn = draw_attention([black, black], [found, found], side=200)
    assert drawn.shape == (3, 2 * GAP + 2 * (200 + GAP) + LINE, GAP + 3 * (200 + GAP))
    assert drawn[:, GAP + 100, 2 * GAP + 200].sum() > 300 > 20 > drawn[:, GAP + 100, 2 * GAP + 399].sum()


@pytest.mark.parametrize("count", [2, 21, 60])
def test_classes_are_told_apart(count: int) -> None:
    colours = torch.tensor(class_colours(count)).float()
    assert torch.cdist(colours, colours).fill_diagonal_(999).min() > (60 if count < 8 else 8)
    grey = torch.full((3, 2, 2), 100, dtype=torch.uint8)
    drawn = draw_classes(grey, torch.tensor([[0, 1], [1, 0]]))
    assert drawn[:, 0, 1].tolist() == [round(40 + 0.6 * value) for value in class_colours(2)[1]]
    assert torch.equal(drawn[:, 0, 0], drawn[:, 1, 1])
