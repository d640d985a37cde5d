"""Sharded, chunked InfoNCE against the dense formula, on one rank and on several."""

import functools
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cosmos_ssl.functional import all_max, all_sum, gather, gather_many, info_nce, losses, sigmoid_loss


def dense(a, b, scale, negatives=None, symmetric=True):
    """Mean over view pairs of the symmetric cross-entropy, as written in the CLIP paper; rows know further ones, and
    are alone in MoCo.
    """
    target = torch.arange(a.shape[1])
    losses = []
    for x in a:
        for y in b:
            logits = scale * x @ y.T
            rows = logits if negatives is None else torch.cat([logits, scale * x @ negatives.T], 1)
            found = F.cross_entropy(rows, target)
            losses.append((found + F.cross_entropy(logits.T, target)) / 2 if symmetric else found)
    return torch.stack(losses).mean()


def dense_sigmoid(a, b, scale, bias):
    """Mean over view pairs of algorithm 1 of the SigLIP paper: summed over the columns, averaged over the rows."""
    signs = 2 * torch.eye(a.shape[1], dtype=a.dtype) - 1
    return torch.stack([-F.logsigmoid(signs * (scale * x @ y.T + bias)).sum() / len(x) for x in a for y in b]).mean()


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("chunk", [1, 60, 1 << 24])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("negatives", [None, unit(9, 5, seed=2)], ids=["alone", "queue"])
def test_equals_dense_loss_and_gradients(chunk, negatives, symmetric):
    def run(function):
        a = unit(3, 7, 5).requires_grad_()
        b = unit(2, 7, 5, seed=1).requires_grad_()
        scale = torch.tensor(14.3, dtype=torch.float64, requires_grad=True)
        loss = function(a, b, scale, negatives=negatives, symmetric=symmetric)
        return loss, *torch.autograd.grad(1.7 * loss, (a, b, scale))

    for ours, plain in zip(run(functools.partial(info_nce, chunk=chunk)), run(dense), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)


def test_weights_are_shares_of_views():
    a, b = unit(3, 6, 4), unit(2, 6, 4, seed=1)
    scale = torch.tensor(10.0, dtype=torch.float64)
    weighted = info_nce(a, b, scale, a_weights=[0.5, 0.25, 0.25], b_weights=[1.0, 0.0])
    plain = 0.5 * dense(a[:1], b[:1], scale) + 0.5 * dense(a[1:], b[:1], scale)
    torch.testing.assert_close(weighted, plain)


def test_no_gradient_to_a_teacher():
    a = unit(1, 4, 3).requires_grad_()
    info_nce(a, unit(1, 4, 3, seed=1), torch.tensor(5.0, dtype=torch.float64)).backward()
    assert a.grad is not None


def test_half_precision_is_computed_in_float32():
    a, b = unit(2, 8, 16), unit(2, 8, 16, seed=1)
    loss = info_nce(a.bfloat16(), b.bfloat16(), torch.tensor(14.0))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss.double(), dense(a.bfloat16().double(), b.bfloat16().double(), 14.0), rtol=1e-5, atol=1e-5
    )


def _rank(rank, world, path, results):
    warnings.simplefilter("error", FutureWarning)  # a collective by a name that PyTorch gives up
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    share = slice(rank * 8 // world, (rank + 1) * 8 // world)
    a = unit(3, 8, 5)[:, share].clone().requires_grad_()
    b = unit(2, 8, 5, seed=1)[:, share].clone().requires_grad_()
    scale = torch.tensor(14.3, dtype=torch.float64, requires_grad=True)
    everyone, _ = gather_many([b, b[:, :, :2]], dim=1)
    negatives = unit(6, 5, seed=2).requires_grad_()
    for symmetric in (True, False):
        loss = info_nce(a, everyone, scale, negatives=negatives, symmetric=symmetric, chunk=50)
        grads = torch.autograd.grad(loss, (a, b, scale), retain_graph=True)
        results[rank, symmetric] = [x.detach().clone() for x in (loss, *grads)]
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_global_batch_exactly(world, in_ranks):
    """Averaged over ranks, losses and gradients are those of the whole batch on one rank."""
    results = in_ranks(_rank, world)
    a, b = unit(3, 8, 5).requires_grad_(), unit(2, 8, 5, seed=1).requires_grad_()
    scale = torch.tensor(14.3, dtype=torch.float64, requires_grad=True)
    for symmetric in (True, False):
        ranks = [results[r, symmetric] for r in range(world)]
        loss = dense(a, b, scale, unit(6, 5, seed=2), symmetric)
        grad_a, grad_b, grad_scale = torch.autograd.grad(loss, (a, b, scale))
        torch.testing.assert_close(torch.stack([r[0] for r in ranks]).mean(), loss)
        torch.testing.assert_close(torch.cat([r[1] for r in ranks], 1) / world, grad_a)
        torch.testing.assert_close(torch.cat([r[2] for r in ranks], 1) / world, grad_b)
        torch.testing.assert_close(torch.stack([r[3] for r in ranks]).mean(), grad_scale)


def test_gather_alone_returns_its_input():
    x = torch.randn(3, 2)
    assert gather(x) is x


# ---------------------------------------------------------------------------- the sigmoid loss


def with_gradients(function, a, b, scale=14.3, bias=-2.1):
    """The loss and its gradients in a, b, scale and bias, of a multiple of it."""
    leaves = [a.clone().requires_grad_(), b.clone().requires_grad_()]
    leaves += [torch.tensor(value, dtype=a.dtype, requires_grad=True) for value in (scale, bias)]
    loss = function(*leaves)
    return loss, *torch.autograd.grad(1.7 * loss, leaves)


@pytest.mark.parametrize("chunk", [1, 60, 1 << 24])
def test_sigmoid_loss_equals_dense_loss_and_gradients(chunk):
    a, b = unit(3, 7, 5), unit(2, 7, 5, seed=1)
    chunked = with_gradients(lambda *x: sigmoid_loss(*x, chunk=chunk), a, b)
    for ours, plain in zip(chunked, with_gradients(dense_sigmoid, a, b), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)


def test_sigmoid_loss_passes_the_numerical_check_of_its_gradients():
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (7.0, -1.5))
    inputs = (unit(2, 3, 4).requires_grad_(), unit(2, 3, 4, seed=1).requires_grad_(), scale, bias)
    assert torch.autograd.gradcheck(lambda *x: sigmoid_loss(*x, chunk=20), inputs)


def test_sigmoid_loss_weighs_views():
    a, b = unit(3, 6, 4), unit(2, 6, 4, seed=1)
    scale, bias = (torch.tensor(x, dtype=torch.float64) for x in (10.0, -3.0))
    weighted = sigmoid_loss(a, b, scale, bias, a_weights=[0.5, 0.25, 0.25], b_weights=[1.0, 0.0])
    plain = 0.5 * dense_sigmoid(a[:1], b[:1], scale, bias) + 0.5 * dense_sigmoid(a[1:], b[:1], scale, bias)
    torch.testing.assert_close(weighted, plain)


def test_sigmoid_loss_without_gradient_to_some_inputs():
    a = unit(1, 4, 3).requires_grad_()
    sigmoid_loss(a, unit(1, 4, 3, seed=1), torch.tensor(5.0, dtype=torch.float64), torch.tensor(-5.0)).backward()
    assert a.grad is not None


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (100.0, -80.0), (30.0, -15.0)])
def test_sigmoid_loss_keeps_small_losses_and_gradients_in_float32(scale, bias):
    """Sure matches: what is left of the loss (1e-8 in one case) must not drown in what cancels."""
    b = unit(1, 64, 128)
    a = F.normalize(b + 0.01 * unit(1, 64, 128, seed=1), dim=-1)
    exact = with_gradients(dense_sigmoid, a, b, scale, bias)
    for ours, value in zip(with_gradients(sigmoid_loss, a.float(), b.float(), scale, bias), exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours.double() - value).norm() <= 1e-4 * value.norm()


def test_sigmoid_loss_of_half_precision_is_computed_in_float32():
    a, b = unit(2, 8, 16).bfloat16(), unit(2, 8, 16, seed=1).bfloat16()
    loss = sigmoid_loss(a, b, torch.tensor(14.0), torch.tensor(-2.0))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), dense_sigmoid(a.double(), b.double(), 14.0, -2.0), rtol=1e-5, atol=1e-5)


def _sigmoid_rank(rank, world, path, results):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    share = slice(rank * 8 // world, (rank + 1) * 8 // world)
    shares = unit(3, 8, 5)[:, share], unit(2, 8, 5, seed=1)[:, share]
    found = with_gradients(lambda a, b, *scalars: sigmoid_loss(a, gather(b, dim=1), *scalars, chunk=50), *shares)
    results[rank] = [x.detach().clone() for x in found]
    numbers = torch.tensor([rank, -rank, 3.0 * rank], requires_grad=True)
    results[f"most {rank}"] = all_max(numbers), all_sum(numbers), numbers.detach().clone()
    dist.destroy_process_group()


def test_ranks_share_the_sigmoid_loss_exactly(in_ranks):
    """Averaged over two ranks, losses and gradients are those of the whole batch on one; so are sums and maxima."""
    results = in_ranks(_sigmoid_rank, 2)
    ranks = [results[r] for r in range(2)]
    reduced = [results[f"most {r}"] for r in range(2)]
    loss, grad_a, grad_b, grad_scale, grad_bias = with_gradients(dense_sigmoid, unit(3, 8, 5), unit(2, 8, 5, seed=1))
    exact = {"rtol": 1e-10, "atol": 1e-12}
    for number, expected in ((0, loss), (3, grad_scale), (4, grad_bias)):
        torch.testing.assert_close((ranks[0][number] + ranks[1][number]) / 2, expected, **exact)
    torch.testing.assert_close(torch.cat([r[1] for r in ranks], 1) / 2, grad_a, **exact)
    torch.testing.assert_close(torch.cat([r[2] for r in ranks], 1) / 2, grad_b, **exact)
    for rank, (most, total, own) in enumerate(reduced):
        assert most.tolist() == [1, 0, 3] and total.tolist() == [1, -1, 3] and not most.requires_grad
        assert own.tolist() == [rank, -rank, 3 * rank]  # left as it was


def test_largest_value_alone_is_the_value():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    assert torch.equal(all_max(x), x.detach()) and not all_max(x).requires_grad


# ---------------------------------------------------------------------------- coarse products


class Tf32(TorchDispatchMode):
    """Products as CUDA's tensor cores have them in TF32: factors of float32 rounded to 10 bits, sums in float32."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            args = [((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for x in args]
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("function", [info_nce, lambda a, b, scale: sigmoid_loss(a, b, scale, torch.tensor(-10.0))])
def test_products_in_tf32_are_near_those_in_float64(function):
    """At the largest scale that is learned, 100, with positives that are alike: 2^-11 of each factor."""
    b = unit(2, 96, 64, seed=1)
    a = F.normalize(b + 0.3 * unit(2, 96, 64), dim=-1)
    found = []
    for dtype, mode in ((torch.float64, nullcontext()), (torch.float32, Tf32())):
        leaves = [x.to(dtype).requires_grad_() for x in (a, b, torch.tensor(100.0))]
        with mode:
            loss = function(*leaves)
            found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for exact, coarse in zip(*found, strict=True):
        assert 0 < (coarse - exact).norm() / exact.norm() < 1e-3


@pytest.mark.parametrize(("gigabytes", "logits"), [(80, 80 << 20), (8, losses.CHUNK)])
def test_a_card_holds_more_logits_at_once(monkeypatch, gigabytes, logits):
    """A 256th of its memory, of 4 bytes each."""
    card = SimpleNamespace(total_memory=gigabytes << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert losses._chunk(SimpleNamespace(is_cuda=True, device="cuda", element_size=lambda: 4)) == logits
    assert losses._chunk(torch.zeros(1)) == losses.CHUNK
