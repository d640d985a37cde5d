"""The recipe: it builds as it is; shrunk to procedural scenes it trains and retrieves by the pooled score."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import cosmos_ssl_flair
import pytest
import torch
from cosmos_ssl_flair.pooling import FlairPool
from torch import Tensor, nn
from torch.nn import functional as F

import cosmos_ssl
from cosmos_ssl.api import Encoder, UserError
from cosmos_ssl.data import open_shards

SMALL = [
    "data={type: scenes, train_samples: 48, validation_samples: 20, image_size: 32}",
    "evaluators.retrieval={data: null, batch_size: 8}",
    "model={embed_dim: 32, image: {width: 64, layers: 1, image_size: 32, patch_size: 8}, text: {width: 64, "
    "layers: 1, heads: 1}}",
    *(
        "tokenizer.context_length=40",
        "augmenters.image.size=32",
        "augmenters.text={num_sampled_captions: 3, num_global_captions: 3}",
    ),
    *("training={batch_size: 12, precision: fp32}", "optimizer.lr=3e-3", "schedule={epochs: 2, warmup_steps: 1}"),
    *("loader.workers=0", "logging={every_steps: 1, tensorboard: false}"),
]


def train(folder: Path, *overrides: str) -> list[dict[str, float]]:
    """Train the small recipe in a folder; the rows of its metrics."""
    cosmos_ssl.train(
        cosmos_ssl_flair.RECIPE,
        [*SMALL, f"data.folder={folder / 'scenes'}", f"output_dir={folder / 'run'}", *overrides],
    )
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def scores_of_pairs(head: FlairPool, images: Tensor, texts: Tensor) -> Tensor:
    """Patches [B, P, D] and texts [T, D] -> [B, T], a pair at a time, by torch.nn.MultiheadAttention."""
    pool = nn.MultiheadAttention(texts.shape[1], head.num_heads, batch_first=True, add_zero_attn=True)
    pool.load_state_dict(
        {
            "in_proj_weight": head.qkv.weight,
            "in_proj_bias": head.qkv.bias,
            "out_proj.weight": head.proj.weight,
            "out_proj.bias": head.proj.bias,
        }
    )
    scores = torch.empty(len(images), len(texts))
    with torch.no_grad():
        for i, image in enumerate(images):
            for j, text in enumerate(texts):
                found = pool(head.norm_q(text)[None], head.norm_k(image), head.norm_v(image), need_weights=False)[0][0]
                scores[i, j] = F.cosine_similarity(found, text, dim=0)
    return scores


def held_out(model: Encoder, folder: Path) -> tuple[Tensor, Tensor]:
    """Pictures and their texts, one each, as ``match`` wants them."""
    [shard] = (folder / "scenes").glob("val*.tar")
    shards = open_shards(str(shard))
    samples = [shards.read(index) for index in range(20)]
    images = model.match_image(torch.stack([model.preprocess(sample.decode()) for sample in samples]))
    assert all(len(sample.captions["txt"]) == 1 for sample in samples)
    return images, model.match_text(model.tokenize([sample.captions["txt"][0] for sample in samples]))


@pytest.mark.parametrize("negatives", ["null", "1"])
def test_trains_and_retrieves_by_the_pooled_score(negatives: str, tmp_path: Path) -> None:
    rows = train(tmp_path, f"losses.flair.negative_captions={negatives}")
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 8 and steps[-1]["loss"] < steps[0]["loss"]
    for row in steps:
        assert row["loss"] == pytest.approx(
            row["loss/flair/text_conditioned"] + row["loss/flair/multi_positive"], rel=1e-4
        )
    [*_, found] = [row for row in rows if "retrieval/student/image_to_text_R@1" in row]

    model = cosmos_ssl.load(tmp_path / "run")
    head = model.model.head("pool")
    assert isinstance(head, FlairPool)
    images, texts = held_out(model, tmp_path)
    scores = scores_of_pairs(head, images, texts)
    torch.testing.assert_close(model.match(images, texts), scores, rtol=1e-4, atol=1e-5)
    for direction, table in (("image_to_text", scores), ("text_to_image", scores.T)):
        ranks = (table > table.diag()[:, None]).sum(1)
        assert found[f"retrieval/student/{direction}_mean_rank"] == pytest.approx(ranks.float().mean().item() + 1)
        assert found[f"retrieval/student/{direction}_R@5"] == pytest.approx((ranks < 5).float().mean().item())


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    """The head answers to a loss, so batches cannot be encoded in parts; options are checked when the config is."""
    with pytest.raises(UserError, match=r"losses\.flair calls a head"):
        train(tmp_path, "training.micro_batch_size=4")
    with pytest.raises(UserError, match=r"losses\.flair\.negative_captions: 4 of the 3 captions"):
        train(tmp_path, "losses.flair.negative_captions=4")
    with pytest.raises(UserError, match=r"heads\.pool\.num_heads: model\.embed_dim \(32\) is not a multiple of 5"):
        train(tmp_path, "heads.pool.num_heads=5")


def test_the_recipe_builds_as_it_is_and_its_command_holds() -> None:
    def run(*command: str) -> str:
        program = Path(sys.executable).parent / command[0]
        done = subprocess.run([str(program), *command[1:]], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    recipe = run("python", "-m", "cosmos_ssl_flair").strip()
    assert recipe == cosmos_ssl_flair.RECIPE
    [line] = [line for line in Path(recipe).read_text().splitlines() if line.startswith("# Command:")]
    program, flag, place, *overrides = shlex.split(line.partition(":")[2])
    assert (program, flag, place) == ("cosmos-launch", "--config", "$(python -m cosmos_ssl_flair)")
    assert "ok" in run("cosmos-ssl", "config", "check", recipe, *overrides)


def test_the_readme_s_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both blocks as they stand, the first on fewer samples."""
    fewer = [
        "data={train_samples: 64, validation_samples: 8, folder: scenes}",
        "schedule={epochs: 1, warmup_steps: 1}",
        "loader.workers=0",
    ]
    real = cosmos_ssl.train
    monkeypatch.setattr(cosmos_ssl, "train", lambda recipe, overrides: real(recipe, [*overrides, *fewer]))
    monkeypatch.chdir(tmp_path)
    names = {"picture": torch.zeros(3, 80, 60, dtype=torch.uint8)}
    text = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    first, second = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    exec(first, names)
    assert "retrieval/student/image_to_text_R@1" in capsys.readouterr().out
    exec(second, names)
    assert names["images"].shape == (1, 16, 128) and names["texts"].shape == (2, 128)
    assert re.fullmatch(r"tensor\(\[\[[-\d., ]+\]\]\)", capsys.readouterr().out.strip())
