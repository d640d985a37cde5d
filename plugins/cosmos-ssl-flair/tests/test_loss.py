"""The loss against the published formula, a pair at a time; over ranks; what it reads; what it refuses."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cosmos_ssl_flair.loss import Flair
from cosmos_ssl_flair.pooling import FlairPool
from torch import Tensor
from torch.nn import functional as F

from cosmos_ssl.api import Features, GroupFeatures, Progress, Spec, StepContext, TowerSpec, Views, ViewSpec

B, PATCHES, WIDTH, D, HEADS = 5, 7, 12, 16, 4
GROUPS = {"global": 2, "local": 1}
K = 3


def spec(**changes: object) -> Spec:
    return Spec(
        embed_dim=D,
        **{
            "image": TowerSpec(width=WIDTH),
            "text": TowerSpec(width=20),
            "image_views": {"global": ViewSpec(views=1)},
            "text_views": {name: ViewSpec(views=views) for name, views in GROUPS.items()},
            "heads": {"pool": {"pooled": D}, "cross": {"image": D, "text": D}},
            "attention": "sdpa",
        }
        | changes,
    )


class Setting:
    """A head, a loss and the features of a batch in float64, all of them leaves."""

    def __init__(self, **options: object) -> None:
        torch.manual_seed(0)
        self.head = FlairPool(spec(), num_heads=HEADS).double()
        self.loss = Flair(
            spec(), **{"head": "pool", "init_logit_scale": 7.0, "init_logit_bias": -3.0} | options
        ).double()
        self.tokens = torch.randn(1, B, PATCHES, WIDTH, dtype=torch.float64, requires_grad=True)
        self.images = torch.randn(1, B, D, dtype=torch.float64, requires_grad=True)
        self.texts = torch.randn(K, B, D, dtype=torch.float64, requires_grad=True)
        self.step = 5
        self.asked: list[Tensor | None] = []

    def context(self) -> StepContext:
        image = GroupFeatures(views=(0,), projected=self.images, tokens=self.tokens, token_views=(0,))
        parts = self.texts.split(list(GROUPS.values()))
        text = {
            name: GroupFeatures(views=tuple(range(len(x))), projected=x) for name, x in zip(GROUPS, parts, strict=True)
        }
        return StepContext(
            views=Views(keys=[""] * B),
            student=Features(image={"global": image}, text=text),
            teacher=None,
            gathered={"student": Features(text=text), "teacher": Features()},
            progress=Progress(step=self.step, total_steps=10),
            head=self._call,
        )

    def _call(self, name: str, tokens: Tensor, texts: Tensor, asked: Tensor | None = None) -> dict[str, Tensor]:
        assert name == "pool"
        self.asked.append(asked)
        return dict(self.head.respond(tokens, texts, asked))

    def gradients(self, value: Tensor) -> list[Tensor]:
        leaves = [self.tokens, self.images, self.texts, *self.head.parameters(), *self.loss.parameters()]
        return list(torch.autograd.grad(1.7 * value, leaves, materialize_grads=True, allow_unused=True))


def pooled(head: FlairPool, tokens: Tensor, text: Tensor) -> Tensor:
    """One image [P, W] pooled by one text [D]: softmax over patches and an empty token, written out."""
    patches = head.image_tokens(tokens)
    wq, wk, wv = head.qkv.weight.chunk(3)
    bq, bk, bv = head.qkv.bias.chunk(3)
    q = wq @ head.norm_q(text) + bq
    k, v = (
        torch.cat([norm(patches) @ w.T + b, torch.zeros(1, D)])
        for norm, w, b in ((head.norm_k, wk, bk), (head.norm_v, wv, bv))
    )
    d = D // HEADS
    found = [((k[:, i : i + d] @ q[i : i + d]) / math.sqrt(d)).softmax(0) @ v[:, i : i + d] for i in range(0, D, d)]
    return head.proj(torch.cat(found))


def dense(setting: Setting, compared: list[list[tuple[int, int]]], divisor: int) -> dict[str, Tensor]:
    """Both losses as sums over pairs; ``compared`` are the captions (k, j) that each image is compared with when
    pooled.
    """
    scale, bias = setting.loss.logit_scale.exp(), setting.loss.logit_bias

    def term(image: Tensor, text: Tensor, own: bool) -> Tensor:
        logit = scale * F.cosine_similarity(image, text, dim=0) + bias
        return -F.logsigmoid(logit if own else -logit)

    conditioned, positive = torch.zeros(()), torch.zeros(())
    for i in range(B):
        for k, j in compared[i]:
            text = setting.texts[k, j]
            conditioned = conditioned + term(pooled(setting.head, setting.tokens[0, i], text), text, i == j)
        for k, j in all_pairs():
            positive = positive + term(setting.images[0, i], setting.texts[k, j], i == j)
    return {"text_conditioned": conditioned / divisor / B, "multi_positive": positive / K / B}


def all_pairs() -> list[tuple[int, int]]:
    return [(k, j) for k in range(K) for j in range(B)]


def assert_same(setting: Setting, expected: dict[str, Tensor]) -> None:
    terms = setting.loss(setting.context()).terms
    assert terms.keys() == expected.keys()
    for name, value in terms.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)
    for ours, plain in zip(
        setting.gradients(sum(terms.values())), setting.gradients(sum(expected.values())), strict=True
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-8, atol=1e-11)


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("chunk", [1, 2 * B * D, 1 << 24])
def test_value_and_gradients_are_those_of_the_formula(chunk: int) -> None:
    setting = Setting(multi_positive_share=0.3)
    setting.head.chunk = chunk
    plain = dense(setting, [all_pairs()] * B, K)
    assert_same(
        setting, {"text_conditioned": 0.7 * plain["text_conditioned"], "multi_positive": 0.3 * plain["multi_positive"]}
    )


def test_without_the_multi_positive_loss_the_feature_is_not_read() -> None:
    setting = Setting(multi_positive_share=0)
    assert_same(setting, {"text_conditioned": dense(setting, [all_pairs()] * B, K)["text_conditioned"]})
    assert not [need for need in setting.loss.requires() if need.modality == "image" and need.kind == "projected"]


@pytest.mark.parametrize("chunk", [1, 1 << 24])
@pytest.mark.parametrize("negatives", [1, 2])
def test_drawn_captions_of_others(negatives: int, chunk: int) -> None:
    setting = Setting(negative_captions=negatives)
    setting.head.chunk = chunk
    setting.loss(setting.context())
    [asked] = setting.asked
    assert asked is not None and asked.shape == (B, K + negatives * (B - 1))
    compared = [[divmod(int(row), B) for row in rows] for rows in asked]
    for i, pairs in enumerate(compared):
        assert len(set(pairs)) == len(pairs)
        assert sorted(k for k, j in pairs if j == i) == list(range(K))  # all of its own
        assert all(sum(j == other for _, j in pairs) == negatives for other in range(B) if other != i)
    plain = dense(setting, compared, negatives)
    assert_same(setting, {name: 0.5 * value for name, value in plain.items()})


def test_draws_change_with_step_and_seed_and_are_even() -> None:
    counts = torch.zeros(K, B)
    seen = set()
    setting = Setting(negative_captions=1)
    for setting.step in range(60):
        setting.loss(setting.context())
        asked = setting.asked[-1]
        seen.add(tuple(asked.flatten().tolist()))
        counts += torch.bincount(asked[:, K:].flatten(), minlength=K * B).view(K, B)
    assert len(seen) > 50
    assert (counts.sum(0) == 60 * (B - 1)).all()
    assert (counts / counts.sum(0)).sub(
        1 / K
    ).abs().max() < 0.12  # standard deviation at most 0.06 were they independent
    for setting.loss.seed, again in ((0, True), (1, False)):  # a resumed run draws what it drew
        setting.step = 0
        setting.loss(setting.context())
        assert torch.equal(setting.asked[-1], setting.asked[0]) == again


def test_asking_for_all_captions_is_the_same_by_either_way() -> None:
    values = []
    for negatives in (None, K):
        setting = Setting(negative_captions=negatives)
        values.append(setting.loss(setting.context()).terms["text_conditioned"])
        assert setting.asked == [None]
    assert torch.equal(*values)


def test_a_small_loss_keeps_its_digits() -> None:
    """At a scale of 100 a sure match costs e^-100, which is no 0 from the difference of two large numbers."""
    setting = Setting(init_logit_scale=100, init_logit_bias=0, multi_positive_share=0)
    setting.loss.float()
    context = setting.context()
    score = torch.full((B, K * B), -1.0, dtype=torch.float32)
    for i in range(B):
        score[i, i::B] = 0.5
    context = replace(context, head=lambda *_: {"score": score})
    assert 0.9 < setting.loss(context).terms["text_conditioned"].item() / math.exp(-50) < 1.1


@pytest.mark.parametrize("negatives", [None, 1])
def test_ranks_share_the_global_batch_exactly(negatives: int | None, tmp_path: Path) -> None:
    """Averaged over two ranks, loss and gradients are those of one."""
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        command = [sys.executable, str(Path(__file__).with_name("ranks.py"))]
        ranks = [
            subprocess.Popen([*command, str(r), str(world), str(folder), str(negatives or 0)]) for r in range(world)
        ]
        assert [process.wait(timeout=120) for process in ranks] == [0] * world
    loss, tokens, images, texts, *parameters = torch.load(tmp_path / "1" / "1-0.pt")
    first, second = (torch.load(tmp_path / "2" / f"2-{rank}.pt") for rank in range(2))
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close((first[0] + second[0]) / 2, loss, **close)
    for place, whole in ((1, tokens), (2, images), (3, texts)):
        torch.testing.assert_close(torch.cat([first[place], second[place]], dim=1) / 2, whole, **close)
    for a, b, whole in zip(first[4:], second[4:], parameters, strict=True):
        torch.testing.assert_close((a + b) / 2, whole, **close)
    assert len(parameters) == 14


def test_the_scale_stays_within_bounds() -> None:
    setting = Setting()
    for start, end in ((9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        setting.loss.logit_scale.data.fill_(start)
        setting.loss.after_step()
        assert float(setting.loss.logit_scale.detach()) == pytest.approx(end)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "pol"}, r"head: no pooling head 'pol'. Heads of that kind: pool"),
        ({"head": "cross"}, r"head: no pooling head 'cross'"),
        ({"negative_captions": 0}, r"negative_captions: 0 of the 3 captions"),
        ({"negative_captions": 4}, r"negative_captions: 4 of the 3 captions"),
        ({"multi_positive_share": 1}, r"multi_positive_share: 1 is outside"),
        ({"multi_positive_share": -0.1}, r"multi_positive_share: -0.1 is outside"),
        ({"init_logit_scale": 0.5}, r"init_logit_scale: 0.5 is outside"),
        ({"init_logit_scale": 101}, r"init_logit_scale: 101 is outside"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Setting(**options)
