"""Zero-shot segmentation: windows, thresholds and metrics against plain loops and torchmetrics."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F
from torchmetrics.classification import MulticlassJaccardIndex

from cosmos_ssl.evaluation.segmentation import (
    IGNORED,
    SegmentationProtocol,
    areas,
    decide,
    resized,
    segment,
    segmentation_metrics,
    window_logits,
    windows,
)


class Colours:
    """A model whose patch tokens are the mean colours of the patches (4 pixels a side)."""

    def __init__(self):
        self.calls = []

    def dense(self, pixels, *, csa=False):
        self.calls.append((tuple(pixels.shape), csa))
        return F.avg_pool2d(pixels, 4).flatten(2).transpose(1, 2), pixels.mean((2, 3))


def test_windows_end_at_the_border():
    assert windows(336, 224, 112) == [(0, 224), (112, 336)]
    assert windows(500, 224, 112) == [(0, 224), (112, 336), (224, 448), (276, 500)]
    assert windows(224, 224, 112) == [(0, 224)] and windows(100, 224, 112) == [(0, 100)]
    for length in range(1, 60):
        found = windows(length, 16, 8)
        assert found[0][0] == 0 and found[-1][1] == length and len(set(found)) == len(found)
        assert all(b[0] <= a[1] and b[0] - a[0] <= 8 for a, b in pairwise(found))


def test_size_of_pictures():
    protocol = SegmentationProtocol(short_side=336)
    assert resized(torch.zeros(3, 375, 500, dtype=torch.uint8), protocol).shape == (3, 336, 448)
    assert resized(torch.zeros(3, 500, 375, dtype=torch.uint8), protocol).shape == (3, 448, 336)
    assert resized(torch.zeros(3, 100, 1000, dtype=torch.uint8), protocol).shape == (3, 205, 2048)
    picture = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    same = resized(picture, SegmentationProtocol(short_side=40))
    assert torch.equal(same, picture.float())


@pytest.mark.parametrize(("height", "width"), [(16, 16), (24, 36), (21, 50), (10, 30)])
def test_logits_are_the_mean_over_windows(height, width):
    torch.manual_seed(0)
    protocol = SegmentationProtocol(window=16, stride=8, csa=False)
    pixels, vectors = torch.randn(3, height, width), F.normalize(torch.randn(5, 3), dim=-1)
    encoder = Colours()
    found = window_logits(encoder, pixels, vectors, protocol, 4)
    total, count = torch.zeros(5, height, width), torch.zeros(height, width)
    for y0, y1 in windows(height, 16, 8):
        for x0, x1 in windows(width, 16, 8):
            crop = pixels[:, y0:y1, x0:x1]
            crop = F.pad(crop, (0, -crop.shape[2] % 4, 0, -crop.shape[1] % 4))
            tokens = F.normalize(F.avg_pool2d(crop[None], 4)[0], dim=0)
            cosines = torch.einsum("dhw,qd->qhw", tokens, vectors)
            large = F.interpolate(cosines[None], size=crop.shape[1:], mode="bilinear", align_corners=False)[0]
            total[:, y0:y1, x0:x1] += large[:, : y1 - y0, : x1 - x0]
            count[y0:y1, x0:x1] += 1
    torch.testing.assert_close(found, total / count)
    assert len(encoder.calls) == 1 and encoder.calls[0][1] is False


def plain(logits, owners, protocol):
    """The rules of decision, a pixel at a time."""
    queries, height, width = logits.shape
    classes = int(owners.max()) + 1
    scores = torch.zeros(classes, height, width)
    for y in range(height):
        for x in range(width):
            shares = (logits[:, y, x] * protocol.scale).softmax(0)
            for q in range(queries):
                scores[owners[q], y, x] = max(scores[owners[q], y, x], shares[q])
    if protocol.area_thd is not None:
        found = scores.argmax(0)
        sizes = [int((found == c).sum()) for c in range(1, classes)]
        for c, size in enumerate(sizes, 1):
            if not size > protocol.area_thd * sum(sizes):
                scores[c] = 0
    out = torch.zeros(height, width, dtype=torch.long)
    for y in range(height):
        for x in range(width):
            best = int(scores[:, y, x].argmax())
            out[y, x] = best if scores[best, y, x] >= protocol.prob_thd else 0
    return out


@pytest.mark.parametrize("owners", [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2, 2, 3]])
@pytest.mark.parametrize("thresholds", [{}, {"prob_thd": 0.4}, {"area_thd": 0.25}, {"prob_thd": 0.5, "area_thd": 0.3}])
def test_decisions_equal_a_plain_loop(owners, thresholds):
    torch.manual_seed(len(owners))
    logits = F.interpolate(torch.randn(1, len(owners), 3, 4) / 10, size=(9, 12), mode="bilinear")[0]
    protocol = SegmentationProtocol(scale=30, **thresholds)
    found = decide(logits.clone(), torch.tensor(owners), protocol)
    assert torch.equal(found, plain(logits, torch.tensor(owners), protocol))
    assert len(found.unique()) > 1


def test_hand_worked_decision():
    # names: 0 and 1 are class 0, 2 is class 1; shares .3, .3, .4: class 1, though class 0 has more in sum
    logits = torch.tensor([0.3, 0.3, 0.4]).log()[:, None, None]
    owners = torch.tensor([0, 0, 1])
    assert decide(logits, owners, SegmentationProtocol(scale=1)).item() == 1
    assert decide(logits, owners, SegmentationProtocol(scale=1, prob_thd=0.41)).item() == 0


def test_colours_are_segmented():
    """A red left half and a blue right half, at the size of the labels."""
    pixels = torch.zeros(3, 32, 32)
    pixels[0, :, :16] = 1
    pixels[2, :, 16:] = 1
    protocol = SegmentationProtocol(window=16, stride=8)
    found = segment(Colours(), pixels, torch.eye(3), torch.arange(3), (64, 48), protocol, 4)
    assert found.shape == (64, 48) and (found[:, :22] == 0).all() and (found[:, 26:] == 2).all()


def test_metrics_equal_torchmetrics():
    torch.manual_seed(0)
    found = torch.randint(0, 6, (4, 20, 30))
    labels = torch.where(torch.rand(4, 20, 30) < 0.5, found, torch.randint(0, 6, (4, 20, 30)))
    labels[torch.rand(4, 20, 30) < 0.1] = IGNORED
    total = torch.stack([areas(f, y, 6) for f, y in zip(found, labels, strict=True)]).sum(0)
    reference = MulticlassJaccardIndex(6, ignore_index=IGNORED)
    reference.update(found, labels)
    metrics = segmentation_metrics(total)
    assert metrics["miou"] == pytest.approx(reference.compute().item())
    counted = labels != IGNORED
    assert metrics["pixel_accuracy"] == pytest.approx((found == labels)[counted].double().mean().item())
    recalls = [(found == c)[labels == c].double().mean().item() for c in range(6)]
    assert metrics["mean_accuracy"] == pytest.approx(sum(recalls) / 6)


def test_metrics_hand_worked():
    found = torch.tensor([[0, 0, 1, 1]])
    labels = torch.tensor([[0, 1, 1, IGNORED]])
    total = areas(found, labels, 3)
    assert total.tolist() == [[1, 1, 0], [2, 1, 0], [1, 2, 0]]
    # class 0: 1 of 2, class 1: 1 of 2, class 2 is nowhere and does not count
    assert segmentation_metrics(total) == pytest.approx({"miou": 0.5, "mean_accuracy": 0.75, "pixel_accuracy": 2 / 3})
