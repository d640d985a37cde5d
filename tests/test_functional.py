"""Sharded, chunked InfoNCE against the dense formula, on one rank and on several."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

from cosmos_ssl.functional import gather, gather_many, info_nce


def dense(a, b, scale):
    """Mean over view pairs of the symmetric cross-entropy, as written in the CLIP paper."""
    target = torch.arange(a.shape[1])
    losses = []
    for x in a:
        for y in b:
            logits = scale * x @ y.T
            losses.append((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2)
    return torch.stack(losses).mean()


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("chunk", [1, 60, 1 << 24])
def test_equals_dense_loss_and_gradients(chunk):
    def run(function):
        a = unit(3, 7, 5).requires_grad_()
        b = unit(2, 7, 5, seed=1).requires_grad_()
        scale = torch.tensor(14.3, dtype=torch.float64, requires_grad=True)
        loss = function(a, b, scale)
        return loss, *torch.autograd.grad(1.7 * loss, (a, b, scale))

    for ours, plain in zip(run(lambda *x: info_nce(*x, chunk=chunk)), run(dense), strict=True):
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
    torch.testing.assert_close(loss.double(), dense(a.bfloat16().double(), b.bfloat16().double(), 14.0), rtol=1e-5, atol=1e-5)


def _rank(rank, world, path, results):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    share = slice(rank * 8 // world, (rank + 1) * 8 // world)
    a = unit(3, 8, 5)[:, share].clone().requires_grad_()
    b = unit(2, 8, 5, seed=1)[:, share].clone().requires_grad_()
    scale = torch.tensor(14.3, dtype=torch.float64, requires_grad=True)
    everyone, _ = gather_many([b, b[:, :, :2]], dim=1)
    loss = info_nce(a, everyone, scale, chunk=50)
    grads = torch.autograd.grad(loss, (a, b, scale))
    results[rank] = [x.detach().clone() for x in (loss, *grads)]
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_global_batch_exactly(world, tmp_path):
    """Averaged over ranks, losses and gradients are those of the whole batch on one rank."""
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank, args=(world, str(tmp_path / "store"), results), nprocs=world)
        ranks = [results[r] for r in range(world)]
    a, b = unit(3, 8, 5).requires_grad_(), unit(2, 8, 5, seed=1).requires_grad_()
    scale = torch.tensor(14.3, dtype=torch.float64, requires_grad=True)
    loss = dense(a, b, scale)
    grad_a, grad_b, grad_scale = torch.autograd.grad(loss, (a, b, scale))
    torch.testing.assert_close(torch.stack([r[0] for r in ranks]).mean(), loss)
    torch.testing.assert_close(torch.cat([r[1] for r in ranks], 1) / world, grad_a)
    torch.testing.assert_close(torch.cat([r[2] for r in ranks], 1) / world, grad_b)
    torch.testing.assert_close(torch.stack([r[3] for r in ranks]).mean(), grad_scale)


def test_gather_alone_returns_its_input():
    x = torch.randn(3, 2)
    assert gather(x) is x
