"""The attentive probe: its formula, what it finds that a mean over patches does not, and its learning rate's choice."""

import pytest
import torch

from cosmos_ssl.api import DataError
from cosmos_ssl.evaluation import attentive_probe as module
from cosmos_ssl.evaluation.attentive_probe import AttentivePool, attentive_probe, fit, scores_of

CPU = torch.device("cpu")


def some(count=600, patches=6, width=8, seed=0):
    """One patch, which a channel marks, tells the class by the sign of another; all others say as much, at random, so
    that a mean over patches tells little.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(count, patches, width, generator=generator)
    labels = torch.randint(0, 2, (count,), generator=generator)
    tokens[..., 0] = 0
    tokens[..., 1] *= 4
    place = torch.randint(0, patches, (count,), generator=generator)
    tokens[torch.arange(count), place, 0] = 10.0
    tokens[torch.arange(count), place, 1] = 8.0 * labels - 4
    return tokens.half(), labels


def test_the_pool_is_attention():
    """Of each head's query over keys and values, by torch's own attention."""
    mean, scale = torch.randn(128), torch.rand(128) + 0.5
    pool = AttentivePool(mean, scale, 3, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(pool.weight)
    tokens = torch.randn(4, 5, 128)
    x = (tokens - mean) / scale
    keys, values = ((x @ matrix.T).unflatten(2, (2, 64)).transpose(1, 2) for matrix in (pool.key, pool.value))
    query = pool.query[None, :, None].expand(4, -1, -1, -1)
    seen = torch.nn.functional.scaled_dot_product_attention(query, keys, values).flatten(1)
    torch.testing.assert_close(pool(tokens), seen @ pool.weight.T + pool.bias, atol=1e-4, rtol=1e-4)


def test_it_finds_the_patch_that_tells(monkeypatch):
    """Where a linear classifier of the mean does not; twice the same, and with the rate that held-out samples chose."""
    monkeypatch.setattr(module, "BATCH", 32)
    train, labels = some()
    test, truth = some(seed=1)
    probe, rate = attentive_probe(train, labels, classes=2, device=CPU, rates=(1e-6, 1e-2))
    assert rate == 1e-2
    assert (scores_of(probe, test).argmax(1) == truth).double().mean() > 0.95
    again = attentive_probe(train, labels, classes=2, device=CPU, rates=(1e-2,))[0]
    assert all(torch.equal(a, b) for a, b in zip(probe.state_dict().values(), again.state_dict().values(), strict=True))
    means = test.float().mean(1)
    solved = torch.linalg.lstsq(train.float().mean(1), labels[:, None] * 2.0 - 1).solution
    assert ((means @ solved > 0)[:, 0] == truth.bool()).double().mean() < 0.9


def test_scale_and_shift_of_channels_do_not_matter():
    train, labels = some(count=40)
    wide = train.float()
    moved = wide * torch.tensor([1e2, 1, 1e-2, 1, 10, 1, 1, 1]) + 50
    plain, other = (fit(x, labels, classes=2, rate=1e-2, device=CPU) for x in (wide, moved))
    torch.testing.assert_close(scores_of(other, moved), scores_of(plain, wide), atol=2e-2, rtol=2e-2)


def test_too_few_samples():
    with pytest.raises(DataError, match="4 training samples are too few"):
        attentive_probe(torch.zeros(4, 2, 8), torch.arange(4), classes=4, device=CPU)


def test_some_places_are_these_samples_alone():
    train, labels = some(count=40)
    places = torch.arange(3, 30)
    ours, plain = (
        fit(x, y, classes=2, rate=1e-2, device=CPU, places=own)
        for x, y, own in ((train, labels, places), (train[places], labels[places], None))
    )
    assert torch.equal(scores_of(ours, train, places), scores_of(plain, train[places]))
