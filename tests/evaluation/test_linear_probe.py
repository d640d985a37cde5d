"""Logistic regression against scikit-learn, the choice of the penalty, and features of any scale."""

import numpy as np
import pytest
import torch

from cosmos_ssl.api import DataError
from cosmos_ssl.evaluation import linear_probe as module
from cosmos_ssl.evaluation.linear_probe import fit_logistic, linear_probe


def some(count=120, width=5, classes=4, spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    labels = torch.arange(count) % classes
    return centres[labels] + spread * torch.randn(count, width, generator=generator, dtype=torch.float64), labels


@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-4])
def test_equals_scikit_learn(penalty, monkeypatch):
    linear_model = pytest.importorskip("sklearn.linear_model")
    monkeypatch.setattr(module, "_ROWS", 4 * 50)  # three chunks
    x, y = some()
    ours = fit_logistic(x, y, classes=4, penalty=penalty)
    theirs = linear_model.LogisticRegression(C=1 / (len(x) * penalty), tol=1e-10, max_iter=10_000).fit(
        x.numpy(), y.numpy()
    )
    np.testing.assert_allclose(ours.weight, theirs.coef_, atol=2e-4)
    probabilities = ours.scores(x).softmax(1)
    np.testing.assert_allclose(probabilities, theirs.predict_proba(x.numpy()), atol=1e-4)


def test_the_gradient_vanishes_at_the_solution():
    x, y = some()
    found = fit_logistic(x, y, classes=4, penalty=0.1)
    weight, bias = found.weight.requires_grad_(), found.bias.requires_grad_()
    loss = torch.nn.functional.cross_entropy(x @ weight.T + bias, y) + 0.05 * weight.square().sum()
    loss.backward()
    assert weight.grad.abs().max() < 1e-6 and bias.grad.abs().max() < 1e-6


def test_the_best_penalty_on_held_out_samples_is_used():
    x, y = some(spread=3.0)
    probe, penalty = linear_probe(x, y, classes=4, penalties=(1.0, 1e-2, 1e-6))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, rest = order[:24], order[24:]
    unit = (x - x.mean(0)) / x.std(0)
    right = {
        p: (fit_logistic(unit[rest], y[rest], classes=4, penalty=p).scores(unit[held]).argmax(1) == y[held]).sum()
        for p in (1.0, 1e-2, 1e-6)
    }
    assert right[penalty] == max(right.values())
    assert penalty == max(p for p, n in right.items() if n == max(right.values()))
    torch.testing.assert_close(probe.scores(x), fit_logistic(unit, y, classes=4, penalty=penalty).scores(unit))


def test_scale_and_shift_of_features_do_not_matter():
    x, y = some()
    plain = linear_probe(x, y, classes=4)[0].scores(x)
    moved = x * torch.tensor([1e3, 1, 1e-3, 1, 10]) + 50
    torch.testing.assert_close(linear_probe(moved, y, classes=4)[0].scores(moved), plain, atol=1e-4, rtol=1e-4)


def test_classes_that_can_be_told_apart_are():
    x, y = some(spread=0.01)
    new, labels = some(spread=0.01, seed=0)
    assert (linear_probe(x.float(), y, classes=4)[0].scores(new.float()).argmax(1) == labels).all()


def test_too_few_samples():
    with pytest.raises(DataError, match="4 training samples are too few"):
        linear_probe(torch.eye(4), torch.arange(4), classes=4)


def test_a_start_saves_steps():
    x, y = some()
    near = fit_logistic(x, y, classes=4, penalty=0.1)
    one = fit_logistic(x, y, classes=4, penalty=0.1, steps=1, start=near)
    torch.testing.assert_close(one.weight, near.weight, atol=1e-5, rtol=0)
    far = fit_logistic(x, y, classes=4, penalty=0.1, steps=1)
    assert (far.weight - near.weight).abs().max() > 0.01
