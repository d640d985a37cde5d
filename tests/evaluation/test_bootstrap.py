"""Intervals of metrics, against samples that are drawn and counted one by one."""

import pytest
import torch

from cosmos_ssl.evaluation.bootstrap import Outcome, interval, resampled
from cosmos_ssl.evaluation.classification import accuracy, accuracy_outcomes
from cosmos_ssl.evaluation.pairs import Example, Verdict, pair_metrics, pair_outcomes
from cosmos_ssl.evaluation.retrieval import (
    fold_metrics,
    rank_metrics,
    rank_outcomes,
    retrieval_metrics,
    retrieval_ranks,
)
from cosmos_ssl.evaluation.segmentation import segmentation_metrics, segmentation_outcomes

torch.manual_seed(0)
OWNERS = torch.arange(9).repeat_interleave(torch.tensor([1, 2, 3, 1, 2, 3, 1, 2, 3]))
RANKS = retrieval_ranks(torch.randn(9, 4), torch.randn(18, 4), OWNERS)
SCORES, LABELS = torch.randn(12, 3), torch.tensor([0, 1, 2, 1, 0, 0, 2, 1, 1, -1, 5, 0])
AREAS = torch.randint(0, 9, (6, 3, 4)) * torch.tensor([1, 1, 0, 1])
AREAS[:, 0] = AREAS.amin(1)
EXAMPLES = [Example(("a",), ("b", "c"), group) for group in "xxyyy"]
VERDICTS = [Verdict(n % 2 == 0, n > 2) for n in range(5)]


@pytest.mark.parametrize(
    ("outcomes", "metrics"),
    [
        (rank_outcomes(RANKS, OWNERS), rank_metrics(RANKS)),
        (accuracy_outcomes(SCORES, LABELS), accuracy(SCORES, LABELS)),
        (segmentation_outcomes(AREAS), segmentation_metrics(AREAS.sum(0))),
        *((pair_outcomes(n, EXAMPLES, VERDICTS), pair_metrics(n, EXAMPLES, VERDICTS)) for n in ("winoground", "mmvp")),
    ],
)
def test_every_sample_once_is_the_metric(outcomes, metrics):
    count = max(int(outcome.units.max()) for outcome in outcomes.values()) + 1
    assert outcomes and all(
        outcome.of(torch.ones(1, count)).item() == pytest.approx(metrics[name], abs=1e-12)
        for name, outcome in outcomes.items()
    )


def test_a_resample_is_the_metric_of_the_drawn_samples():
    """Pictures are drawn with all their texts; a class that none was drawn of does not count."""
    drawn = torch.tensor([4, 4, 0, 2, 8, 8, 8, 1, 1])
    counts = drawn.bincount(minlength=9)[None]
    texts = torch.cat([OWNERS.eq(n).nonzero()[:, 0] for n in drawn])
    wanted = rank_metrics((RANKS[0][drawn], RANKS[1][texts]))
    for name, outcome in rank_outcomes(RANKS, OWNERS).items():
        assert outcome.of(counts).item() == pytest.approx(wanted[name], abs=1e-12)
    some = torch.tensor([0, 1, 1, 3, 4])  # of classes 0 and 1 alone
    found = accuracy_outcomes(SCORES, LABELS)["mean_per_class_top1"].of(some.bincount(minlength=12)[None])
    assert found.item() == pytest.approx(accuracy(SCORES[some], LABELS[some])["mean_per_class_top1"])


def test_the_interval_of_a_share_is_the_normal_ones():
    """Of 400 samples, a quarter right: 0.25 +- 1.96 sqrt(p (1 - p) / n), and equal seeds draw alike."""
    units = torch.arange(400)
    outcome = {"top1": Outcome(units, units % 4 == 0, torch.ones(400))}
    values = resampled(outcome, 400, resamples=2000)["top1"]
    assert interval(values) == pytest.approx((0.25 - 0.0424, 0.25 + 0.0424), abs=0.006)
    assert torch.equal(values[:10], resampled(outcome, 400, resamples=10)["top1"])
    assert not torch.equal(values[:10], resampled(outcome, 400, resamples=10, seed=1)["top1"])


def test_folds_are_sets_of_their_own():
    images, texts = torch.randn(9, 4), torch.randn(18, 4)
    wanted = []
    for fold in (slice(0, 4), slice(4, 8)):  # the ninth picture makes no fold of four
        own = torch.isin(OWNERS, torch.arange(9)[fold])
        wanted.append(retrieval_metrics(images[fold], texts[own], OWNERS[own] - fold.start))
    assert fold_metrics(images, texts, OWNERS, 4) == pytest.approx(
        {name: (value + wanted[1][name]) / 2 for name, value in wanted[0].items()}
    )
