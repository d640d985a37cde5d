"""SuperClass against its formula, a text at a time; what is counted, over steps and ranks."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from cosmos_ssl.testing import check_loss, example_context, example_spec, example_views
from cosmos_ssl_plugins.losses.superclass import SuperClass


def test_loss_and_gradients_are_those_of_the_formula() -> None:
    """Over two steps of four texts a picture: each weighs by all texts that were seen so far."""
    torch.manual_seed(0)
    spec = example_spec(vocab_size=40)
    loss = SuperClass(spec)
    seen: Counter[int] = Counter()
    texts = 0
    for seed in range(2):
        views = example_views(spec, seed=seed)
        ctx = example_context(loss, spec, views=views, seed=seed)
        images = ctx.student.of("image", hidden=False)["global"].pooled
        assert images is not None
        leaves = [images, *loss.parameters()]
        output = loss(ctx)
        sets = [
            [set(view[b, : int(lengths[b])].tolist()) for group in views.text.values()
             for view, lengths in zip(group.tokens, group.lengths, strict=True)]
            for b in range(len(views))
        ]  # fmt: skip
        texts += sum(map(len, sets))
        seen.update(token for of_sample in sets for tokens in of_sample for token in tokens)
        log_p = (images @ loss.classifier.weight.T + loss.classifier.bias).log_softmax(-1)
        pairs = []
        for b, of_sample in enumerate(sets):
            for tokens in of_sample:
                idf = {c: math.log((1 + texts) / (1 + seen[c])) for c in tokens}
                pairs += [-sum(w * log_p[v, b, c] for c, w in idf.items()) / sum(idf.values()) for v in range(2)]
        plain = torch.stack(pairs).mean()
        torch.testing.assert_close(output.terms["tokens"], plain, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(
            torch.autograd.grad(output.terms["tokens"], leaves), torch.autograd.grad(plain, leaves), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert {c: int(n) for c, n in enumerate(loss.documents) if n} == seen and int(loss.texts) == texts


def test_what_every_text_has_is_no_class() -> None:
    spec = example_spec(vocab_size=9)
    loss, views = SuperClass(spec), example_views(spec)
    for group in views.text.values():
        group.tokens[..., 0] = 7
    targets, held = loss._targets(torch.cat([loss._hot(group) for group in views.text.values()]))
    assert not targets[:, 7].any() and 0 < held < 8
    only, none = loss._targets(torch.nn.functional.one_hot(torch.full((1, 3), 7), 9).float())
    assert not only.any() and not none  # a text of nothing else says nothing


@pytest.mark.parametrize("around", [{}, {"model": {"text": None}, "heads": {"cross": None}}], ids=["both", "no text"])
def test_keeps_to_the_contract(around: dict[str, object]) -> None:
    check_loss("superclass", around=around, ranks=2)


@pytest.mark.parametrize("lacking", [{"image": None}, {"vocab_size": 0}])
def test_needs_pictures_and_tokens(lacking: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"needs model\.image, and a tokenizer"):
        SuperClass(example_spec(**lacking))
