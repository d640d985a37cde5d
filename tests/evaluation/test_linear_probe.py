"""Logistic regression against scikit-learn, the choice of the penalty, features of any scale, and several ranks."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cosmos_ssl.api import DataError
from cosmos_ssl.evaluation import linear_probe as module
from cosmos_ssl.evaluation.linear_probe import fit_logistic, linear_probe
from cosmos_ssl.evaluation.sharded import Sharded


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


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.bytes = max([self.bytes, *(x.nbytes for x in tree_leaves(output) if isinstance(x, torch.Tensor))])
        return output


def probe_on_rank(rank, world_size, path, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world_size)
    x, y = some(count=2000, width=40, spread=3.0)
    half = len(x) // world_size
    shard = Sharded(x[rank * half : (rank + 1) * half], [n * half for n in range(world_size + 1)])
    calls, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda tensor, *args, **kwargs: (calls.append(tensor.numel()), all_reduce(tensor))[1]
    with LargestTensor() as largest:
        probe, penalty = linear_probe(shard, y, classes=4)
    whole = linear_probe(x, y, classes=4)[0]  # rows that every rank holds are split among them
    test = some(count=500, width=40, spread=3.0, seed=0)
    accuracy = (probe.scores(test[0]).argmax(1) == test[1]).double().mean().item()
    results[rank] = (*map(torch.Tensor.numpy, (*probe, *whole)), penalty, accuracy, largest.bytes / x.nbytes, calls)
    dist.destroy_process_group()


def test_two_ranks_fit_what_one_fits_on_half_of_the_rows_each(in_ranks):
    [(weight, bias, *_, penalty, accuracy, share, _)] = in_ranks(probe_on_rank, 1).values()
    assert share == pytest.approx(1, rel=0.01)
    gradient = weight.size + bias.size + 1
    for found_weight, found_bias, from_whole, *_, found, reached, share, calls in in_ranks(probe_on_rank, 2).values():
        np.testing.assert_allclose(found_weight, weight, atol=1e-5)
        np.testing.assert_allclose(found_bias, bias, atol=1e-5)
        np.testing.assert_allclose(from_whole, weight, atol=1e-5)
        assert (found, reached) == (penalty, accuracy)
        assert share <= 0.51
        others = sum(size != gradient for size in calls)  # of two probes
        assert others <= 2 * (3 + 2 * len(module.PENALTIES)), "one all-reduce per closure"
