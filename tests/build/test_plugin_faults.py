"""Other packages' parts that break: one line names the part, its distribution and version, and what was expected.

No traceback is shown without ``--debug``; the run's log has it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cosmos_ssl.errors import CosmosError
from cosmos_ssl.testing.examples import small_config
from cosmos_ssl_launch import main

Install = Callable[..., Path]
Run = Callable[..., tuple[int, str]]

SOUND = """
from cosmos_ssl.api import *
from dataclasses import replace
import numpy as np
import torch
from torch import nn

NAN = float("nan")

class SoundLoss(Loss):
    def __init__(self, spec): super().__init__(); self.weight = nn.Parameter(torch.ones(()))
    def requires(self): return [Need(modality="image", group="global")]
    def forward(self, ctx):
        return LossOutput(terms={"term": self.weight * ctx.student.image["global"].unit.std(1).mean()})

class SoundHead(Head):
    def __init__(self, spec): super().__init__(); self.map = nn.Linear(spec.embed_dim, 5)
    def outputs(self): return {"out": 5}
    def requires(self, outputs): return [Need(modality="image", group="global")]
    def forward(self, features, views, outputs): return {"out": self.map(features.image["global"].projected)}

class Reads(SoundLoss):
    def requires(self): return [Need(head="part")]
    def forward(self, ctx):
        return LossOutput(terms={"term": self.weight * ctx.student.heads["part"]["out"].std(1).mean()})

class ReadsTeacher(SoundLoss):
    def requires(self): return [Need(modality="image", group="global"), Need(role="teacher", modality="image")]
    def forward(self, ctx):
        return LossOutput(terms={"term": super().forward(ctx).terms["term"] * ctx.teacher.image["global"].unit.sum()})

class SoundTower(Tower):
    modality = "image"
    def __init__(self, spec):
        super().__init__()
        self.spec = TowerSpec(width=7, image_size=32, patch_size=8)
        self.a, self.b = nn.Linear(3, 7), nn.Linear(7, spec.embed_dim)
    def forward(self, groups, plan):
        found = {}
        for name, wanted in plan.items():
            pooled = self.a(groups[name].pixels[list(wanted.views)].mean((3, 4)))
            found[name] = GroupFeatures(views=wanted.views, pooled=pooled, projected=self.b(pooled))
        return found

class SoundAugmenter(Augmenter):
    modality = "image"
    def __init__(self, spec): pass
    def offers(self): return {"global": ViewSpec(views=1, size=32)}
    def crop(self, sample, rng): return {"global": ImageCrops(pixels=sample.decode()[None], params=torch.zeros(1, 0))}
    def finish(self, group): return replace(group, pixels=group.pixels / 255)

class SoundTeacher(Teacher):
    def __init__(self, spec): super().__init__()
    def update(self, student, progress): return {}

class SoundEvaluator(Evaluator):
    modalities = ("image",)
    def __init__(self, spec): pass
    def evaluate(self, encoder, *, pictures=False): return Evaluation(metrics={"x": 1.0})

class Encodes(SoundEvaluator):
    def evaluate(self, encoder, *, pictures=False):
        return Evaluation(metrics={"x": encoder.encode_image(torch.zeros(2, 3, 32, 32)).sum().item()})

class SoundTokenizer(Tokenizer):
    def __init__(self, spec): self.vocab_size, self.context_length, self.pad_id = 4, 3, 0
    def __call__(self, texts): return torch.ones(len(texts), 3, dtype=torch.int64), torch.full((len(texts),), 3)

class SoundDataset(Dataset):
    def __init__(self, spec): pass
    def prepare(self): pass
    @property
    def shard_sizes(self): return np.array([8])
    def read(self, index): return Sample(key=str(index))
"""
PLACES = {
    "augmenters": {"augmenters": {"image": {"type": "part"}}},
    "datasets": {"data": {"type": "part"}},
    "evaluators": {"evaluators": {"part": {"type": "part"}}},
    "heads": {"heads": {"part": {"type": "part"}}, "losses": {"sound": {"type": "reads"}}},
    "losses": {"losses": {"part": {"type": "part"}}},
    "teachers": {"teacher": {"type": "part"}, "losses": {"sound": {"type": "reads_teacher"}}},
    "tokenizers": {
        "tokenizer": {"type": "part"},
        "model": {"text": {"type": "clip_text", "width": 64, "heads": 2, "layers": 1}},
        "augmenters": {"text": {"type": "text_crop"}},
    },
    "towers": {"model": {"image": {"type": "part"}}},
}
NOUNS = {name: name.removesuffix("es" if name == "losses" else "s").capitalize() for name in PLACES}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs keep their scenes."""
    return tmp_path_factory.mktemp("scenes")


@pytest.fixture
def run(install: Install, tmp_path: Path, scenes: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run(group, methods, ...)`` trains pictures alone with such a part; exit code and what was said on standard
    error.

    ``methods`` is the body of the class ``Part`` over a sound one, or the whole module.
    """

    def run(
        group: str, methods: str, *flags: str, whole: bool = False, requires: tuple[str, ...] = (), **changes: Any
    ) -> tuple[int, str]:
        body = "\n".join(f"    {line}" for line in methods.splitlines())
        source = f"from sound_parts import *\nclass Part(Sound{NOUNS[group]}):\n{body}" if not whole else methods
        install(
            "my-parts",
            "0.3.1",
            entries={f"{group}/part": "my_parts:Part"},
            modules={"my_parts": source},
            requires=requires,
        )
        readers = {"sound": "SoundLoss", "reads": "Reads", "reads_teacher": "ReadsTeacher"}
        entries = {f"losses/{name}": f"sound_parts:{cls}" for name, cls in readers.items()} | {
            "evaluators/encodes": "sound_parts:Encodes"
        }
        install("sound-parts", entries=entries, modules={"sound_parts": SOUND})
        alone = {
            "model": {"text": None},
            "tokenizer": None,
            "augmenters": {"text": None},
            "heads": None,
            "teacher": {"type": "none"},
        }
        alone |= {
            "losses": {"clip": None, "distill": None, "sound": {"type": "sound"}},
            "data": {"folder": str(scenes)},
        }
        tree = small_config(str(tmp_path), 2, alone)
        config = tmp_path / "x.yaml"
        config.write_text(json.dumps({**tree, "extends": "quickstart"}))
        overrides = [f"{key}={value}" for key, value in changes.items()]
        place = tmp_path / "y.yaml"
        place.write_text(json.dumps({"extends": str(config), **PLACES[group]}))
        capsys.readouterr()
        code = main(["--config", str(place), *flags, *overrides])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, err

    return run


@pytest.mark.parametrize("group", [group for group in PLACES if group != "datasets"])
def test_sound_parts_train(run: Run, group: str) -> None:
    assert run(group, "pass") == (0, "")


WHOSE = "('part' of my-parts 0.3.1)"
PATH = "(my-parts 0.3.1, my_parts:Part)"


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("import einops_x", f"losses/part {PATH} cannot be imported: ModuleNotFoundError: No module named 'einops_x'"),
        ("import sys; sys.exit(0)", f"losses/part {PATH} cannot be imported: SystemExit: 0"),
        (
            "class Part: pass",
            f"losses/part {PATH} is no Loss: expected a subclass of cosmos_ssl.api.Loss, found the class Part",
        ),
        (
            "from cosmos_ssl.api import Loss\nclass Part(Loss): pass",
            f"losses/part {PATH} is an incomplete Loss: it does not define",
        ),
    ],
)
def test_modules_that_cannot_be_used(run: Run, module: str, words: str) -> None:
    code, err = run("losses", module, whole=True)
    assert code == 2 and f"y.yaml:1  losses.part.type: {words}" in err and err.count("\n") == 1, err


BEFORE = {  # found before training: group, methods, what is said
    "reserved": (
        "losses",
        "def __init__(self, spec, *, loss_weight: float = 1.0): super().__init__()",
        f"losses/part {PATH} has an option named 'loss_weight', which is reserved for the config. Rename it",
    ),
    "untyped": (
        "losses",
        "def __init__(self, spec, *, t=1): super().__init__()",
        "my_parts:Part: the option 't' has no type",
    ),
    "built": (
        "heads",
        "def __init__(self, spec): {}['x']",
        f"heads/part {PATH} failed when it was built: KeyError: 'x'",
    ),
    "leaves": (
        "heads",
        "def __init__(self, spec): raise SystemExit(0)",
        f"heads/part {PATH} failed when it was built: SystemExit: 0",
    ),
    "refuses": ("heads", "def __init__(self, spec): raise ValueError('not so')", f"heads.part: not so {WHOSE}"),
    "requires": ("losses", "def requires(self): return self.nothing", f"losses.part {WHOSE} failed: AttributeError"),
    "needs": (
        "losses",
        "def requires(self): return ['image']",
        f"losses.part {WHOSE} requires ['image'], expected a list of Need",
    ),
    "not on offer": (
        "losses",
        "def requires(self): return [Need(modality='image', group='huge')]",
        f"losses.part {WHOSE} reads the image views 'huge', which augmenters.image does not make",
    ),
    "widths": (
        "heads",
        "def outputs(self): return ['out']",
        f"heads.part {WHOSE} gives the outputs ['out'], expected a mapping",
    ),
    "offers": (
        "augmenters",
        "def offers(self): return {'a': 1}",
        f"augmenters.image {WHOSE} offers {{'a': 1}}, expected a mapping",
    ),
    "no spec": (
        "towers",
        "def __init__(self, spec): nn.Module.__init__(self)",
        f"model.image {WHOSE} has no spec, expected",
    ),
    "wrong tower": ("towers", "modality = 'text'", f"model.image {WHOSE} encodes texts, expected a tower of images"),
    "unread": ("towers", "def unread(self, plan): return plan.nothing", f"model.image {WHOSE} failed: AttributeError"),
    "prepare": ("evaluators", "def prepare(self): return {}['x']", f"evaluators.part {WHOSE} failed: KeyError: 'x'"),
    "sizes": (
        "datasets",
        "shard_sizes = [8]",
        f"data {WHOSE} gives the shard_sizes [8], expected counts from 0 on as an array, int64 [shards]",
    ),
    "data": ("datasets", "def prepare(self): return {}['x']", f"data {WHOSE} failed: KeyError: 'x'"),
}


@pytest.mark.parametrize(("group", "methods", "words"), BEFORE.values(), ids=list(BEFORE))
def test_found_before_training(run: Run, tmp_path: Path, group: str, methods: str, words: str) -> None:
    code, err = run(group, methods)
    assert code == 2 and words in err and err.count("\n") == 1, err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_needs_a_newer_cosmos_ssl(run: Run) -> None:
    code, err = run("losses", "pass", requires=("cosmos-ssl>=99",))
    assert code == 2 and "losses/part (my-parts 0.3.1, my_parts:Part) needs cosmos-ssl >=99, and this is " in err


def test_two_distributions_of_one_name(run: Run, install: Install) -> None:
    install("other-parts", "1.0", entries={"losses/part": "other_parts:X"})
    code, err = run("losses", "pass")
    assert code == 2 and err.count("\n") == 1, err
    assert (
        "losses.part.type: losses/part is offered by my-parts 0.3.1 and other-parts 1.0. Write 'my-parts:part' "
        "or 'other-parts:part'." in err
    )


CONTRACT = {  # broken while training, and told without a cause: what is said, with what was expected
    "loss: type": (
        "losses",
        "def forward(self, ctx): return 1",
        f"losses.part {WHOSE} returned int, expected LossOutput",
    ),
    "loss: unnamed": (
        "losses",
        "def forward(self, ctx): return LossOutput(terms={'': self.weight})",
        f"losses.part {WHOSE} returned a term named '', expected a name",
    ),
    "loss: vector": (
        "losses",
        "def forward(self, ctx): return LossOutput(terms={'a': self.weight.expand(3)})",
        f"losses.part {WHOSE} returned 'a' of shape [3], expected a scalar tensor",
    ),
    "loss: float": (
        "losses",
        "def forward(self, ctx): return LossOutput(terms={'a': self.weight}, metrics={'m': 1.0})",
        f"losses.part {WHOSE} returned 'm' as float, expected a scalar tensor",
    ),
    "loss: nothing": (
        "losses",
        "def forward(self, ctx): return LossOutput(terms={})",
        f"losses.part {WHOSE} returned no terms",
    ),
    "loss: no gradient for its own": (
        "losses",
        "def forward(self, ctx): return LossOutput(terms={'a': ctx.student.image['global'].unit.std(1).mean()})",
        f"losses.part {WHOSE}: no gradient reaches losses.part.weight. Let a loss read what they compute, or "
        "freeze them: optimizer.rules",
    ),
    "head: type": (
        "heads",
        "def forward(self, features, views, outputs): return 1",
        f"heads.part {WHOSE} returned int, expected a mapping",
    ),
    "head: missing": (
        "heads",
        "def forward(self, features, views, outputs): return {'x': 1}",
        f"heads.part {WHOSE} did not return its output 'out', but x",
    ),
    "head: width": (
        "heads",
        "def outputs(self): return {'out': 6}",
        f"heads.part {WHOSE} returned 'out' of shape [2, 8, 5], expected [V, 8, 6], "
        "[V, 8, N, 6] for tokens, or [M, 6] for masked patches",
    ),
    "head: samples": (
        "heads",
        "def forward(self, features, views, outputs): return {'out': "
        "self.map(features.image['global'].projected[:, 1:])}",
        f"heads.part {WHOSE} returned 'out' of shape [2, 7, 5], expected [V, 8, 5], "
        "[V, 8, N, 5] for tokens, or [M, 5] for masked patches",
    ),
    "tower: type": (
        "towers",
        "def forward(self, groups, plan): return []",
        f"model.image {WHOSE} returned list, expected a mapping of view",
    ),
    "tower: width": (
        "towers",
        "def __init__(self, spec): super().__init__(spec); self.b = nn.Linear(7, 9)",
        f"model.image {WHOSE} returned projected of 'global' of shape [2, 8, 9], expected [2, 8, 32]",
    ),
    "tower: group": (
        "towers",
        "def forward(self, groups, plan): return {'local': 1}",
        f"model.image {WHOSE} returned 'global' as NoneType, expected GroupFeatures",
    ),
    "augmenter: groups": (
        "augmenters",
        "def crop(self, sample, rng): return {'local': super().crop(sample, rng)['global']}",
        f"augmenters.image {WHOSE} gave the groups ['local'], expected those that it offers, ['global']",
    ),
    "augmenter: size": (
        "augmenters",
        "def offers(self): return {'global': ViewSpec(views=1, size=16)}",
        f"augmenters.image {WHOSE} gave 'global' as torch.uint8 [1, 3, 32, 32], expected ImageCrops of uint8 [1, "
        "3, 16, 16] without masks",
    ),
    "augmenter: finish": (
        "augmenters",
        "def finish(self, group): return group",
        f"augmenters.image {WHOSE} finish returned torch.uint8 pixels of shape [1, 8, 3, 32, 32], expected "
        "floats [1, 8, 3, H, W]",
    ),
    "teacher: update": (
        "teachers",
        "def update(self, student, progress): return 0.9",
        f"teacher {WHOSE} returned 0.9 from update, expected a mapping of names to numbers",
    ),
    "evaluator: type": (
        "evaluators",
        "def evaluate(self, encoder, *, pictures=False): return {'x': 1}",
        f"evaluators.part {WHOSE} returned dict, expected Evaluation(metrics={{name: number}})",
    ),
    "augmenter: device": (
        "augmenters",
        "def finish(self, group): return replace(group, pixels=(group.pixels / 255).to('meta'))",
        f"augmenters.image {WHOSE} returned pixels from finish as torch.float32 on meta, expected floats on cpu",
    ),
    "augmenter: in place": (
        "augmenters",
        "def finish(self, group):\n    group.pixels.mul_(2)\n    return super().finish(group)",
        f"augmenters.image {WHOSE} changed its input of shape [1, 8, 3, 32, 32] in place, expected a tensor of "
        "its own (clone it first)",
    ),
    "tower: complex": (
        "towers",
        "def forward(self, groups, plan):\n"
        "    return {n: replace(g, pooled=g.pooled.to(torch.complex64)) for n, g in super().forward(groups, "
        "plan).items()}",
        f"model.image {WHOSE} returned pooled of 'global' as torch.complex64 on cpu, expected floats on cpu",
    ),
    "tower: in place": (
        "towers",
        "def forward(self, groups, plan):\n    groups['global'].pixels.add_(1)\n    return "
        "super().forward(groups, plan)",
        f"model.image {WHOSE} changed its input of shape [2, 8, 3, 32, 32] in place, expected",
    ),
    "head: device": (
        "heads",
        "def forward(self, features, views, outputs): return {'out': super().forward(features, views, "
        "outputs)['out'].to('meta')}",
        f"heads.part {WHOSE} returned 'out' as torch.float32 on meta, expected floats on cpu",
    ),
    "head: integers": (
        "heads",
        "def forward(self, features, views, outputs): return {'out': super().forward(features, views, "
        "outputs)['out'].long()}",
        f"heads.part {WHOSE} returned 'out' as torch.int64 on cpu, expected floats on cpu",
    ),
    "head: in place": (
        "heads",
        "def forward(self, features, views, outputs):\n"
        "    features.image['global'].projected.detach().mul_(2)\n    return super().forward(features, views, outputs)",
        f"heads.part {WHOSE} changed its input of shape [2, 8, 32] in place, expected",
    ),
    "loss: complex": (
        "losses",
        "def forward(self, ctx): return LossOutput(terms={'a': self.weight * 1j})",
        f"losses.part {WHOSE} returned 'a' as torch.complex64 on cpu, expected floats on cpu",
    ),
    "loss: complex metric": (
        "losses",
        "def forward(self, ctx): return LossOutput(terms={'a': self.weight}, metrics={'m': self.weight * 1j})",
        f"losses.part {WHOSE} returned 'm' as torch.complex64, expected a real number",
    ),
    "loss: detached beside another": (
        "losses",
        "def forward(self, ctx): return LossOutput(terms={'a': self.weight.detach()})",
        f"losses.part {WHOSE} returned terms without a gradient, expected terms computed from the student's features",
    ),
    "loss: in place": (
        "losses",
        "def forward(self, ctx):\n    ctx.student.image['global'].projected.detach().mul_(2)\n    return "
        "super().forward(ctx)",
        f"losses.part {WHOSE} changed its input of shape [2, 8, 32] in place, expected",
    ),
    "tokenizer: type": (
        "tokenizers",
        "def __call__(self, texts): return 1",
        f"tokenizer {WHOSE} gave int, expected ids int64 [64, at most 3] and lengths int64 [64]",
    ),
    "tokenizer: floats": (
        "tokenizers",
        "def __call__(self, texts): return torch.ones(len(texts), 3), torch.ones(len(texts))",
        f"tokenizer {WHOSE} gave torch.float32 [64, 3] on cpu and torch.float32 [64] on cpu, expected ids int64",
    ),
    "tokenizer: ids": (
        "tokenizers",
        "def __call__(self, texts): return super().__call__(texts)[0] * 4, super().__call__(texts)[1]",
        f"tokenizer {WHOSE} gave ids from 4 to 4, expected 0 to 3",
    ),
    "tokenizer: lengths": (
        "tokenizers",
        "def __call__(self, texts): return super().__call__(texts)[0], super().__call__(texts)[1] - 3",
        f"tokenizer {WHOSE} gave lengths from 0 to 0, expected 1 to 3",
    ),
    "evaluator: pictures": (
        "evaluators",
        "def evaluate(self, encoder, *, pictures=False): return Evaluation(metrics={}, pictures={'p': "
        "torch.zeros(3, 4, 4)})",
        f"evaluators.part {WHOSE} returned the picture 'p' torch.float32 of shape [3, 4, 4], expected uint8 [3, H, W]",
    ),
    "evaluator: numbers": (
        "evaluators",
        "def evaluate(self, encoder, *, pictures=False): return Evaluation(metrics={'x': 'high'})",
        f"evaluators.part {WHOSE} returned 'x': 'high' among its metrics, expected names and numbers",
    ),
}


@pytest.mark.parametrize(("group", "methods", "words"), CONTRACT.values(), ids=list(CONTRACT))
def test_a_breach_of_the_contract(run: Run, tmp_path: Path, group: str, methods: str, words: str) -> None:
    code, err = run(group, methods)
    assert code == 2 and err.startswith(words) and err.count("\n") == 1, err
    assert words in (tmp_path / "run" / "log.txt").read_text()


def test_losses_without_any_gradient(run: Run) -> None:
    code, err = run(
        "losses",
        "def forward(self, ctx): return LossOutput(terms={'a': self.weight.detach()})",
        **{"losses.sound": "null"},
    )
    assert (
        code == 2
        and err
        == f"losses.part {WHOSE} returned terms without a gradient, expected terms computed from the student's "
        "features\n"
    )


FAILS = {  # raises while training: exit code, where the line begins
    "loss": ("losses", "def forward(self, ctx): fail", 2, f"losses.part {WHOSE} failed: NameError: "),
    "loss: after the step": ("losses", "def after_step(self): fail", 2, f"losses.part {WHOSE} failed: NameError: "),
    "head": (
        "heads",
        "def forward(self, features, views, outputs): fail",
        2,
        f"heads.part {WHOSE} failed: NameError: ",
    ),
    "tower": ("towers", "def forward(self, groups, plan): fail", 2, f"model.image {WHOSE} failed: NameError: "),
    "augmenter": (
        "augmenters",
        "def crop(self, sample, rng): fail",
        1,
        f"data: step 0, augmenters.image {WHOSE} on sample ",
    ),
    "finish": ("augmenters", "def finish(self, group): fail", 2, f"augmenters.image {WHOSE} failed: NameError: "),
    "teacher: start": ("teachers", "def start(self, build, student): fail", 2, f"teacher {WHOSE} failed: NameError: "),
    "teacher: update": (
        "teachers",
        "def update(self, student, progress): fail",
        2,
        f"teacher {WHOSE} failed: NameError: ",
    ),
    "evaluator": (
        "evaluators",
        "def evaluate(self, encoder, *, pictures=False): fail",
        2,
        f"evaluators.part {WHOSE} failed: NameError: ",
    ),
    "tokenizer": (
        "tokenizers",
        "def __call__(self, texts): fail",
        1,
        f"data: step 0, collecting the batch, tokenizer {WHOSE}: NameError",
    ),
    "dataset": ("datasets", "def read(self, index): fail", 1, "data: step 0, reading sample "),
}


@pytest.mark.parametrize(("group", "methods", "wanted", "start"), FAILS.values(), ids=list(FAILS))
def test_an_error_while_training(run: Run, tmp_path: Path, group: str, methods: str, wanted: int, start: str) -> None:
    code, err = run(group, methods)
    assert code == wanted and err.startswith(start) and WHOSE in err and err.count("\n") == 1, err
    assert "NameError: name 'fail' is not defined" in err
    log = (tmp_path / "run" / "log.txt").read_text()
    assert err.strip() in log and "Traceback" in log and 'my_parts.py", line' in log


@pytest.mark.parametrize("name", ["loss", "augmenter", "finish", "teacher: update", "evaluator", "dataset"])
def test_a_part_that_calls_exit_has_failed(run: Run, name: str) -> None:
    group, methods, wanted, start = FAILS[name]
    code, err = run(group, methods.replace("fail", "raise SystemExit(0)"))
    assert (
        code == wanted
        and err.startswith(start.removesuffix("NameError: "))
        and err.endswith(": SystemExit: 0\n")
        and WHOSE in err
    ), err


def test_exit_in_a_worker(run: Run) -> None:
    code, err = run("augmenters", "def crop(self, sample, rng): raise SystemExit", **{"loader.workers": 1})
    assert code == 1 and WHOSE in err and err.endswith(": SystemExit\n") and err.count("\n") == 1, err


def test_exit_where_a_part_is_built(run: Run) -> None:
    code, err = run("losses", "def __init__(self, spec): raise SystemExit(0)")
    assert code == 2 and f"losses/part {PATH} failed when it was built: SystemExit: 0" in err, err


def test_exit_from_rules(run: Run) -> None:
    code, err = run("losses", "def parameter_rules(self): raise SystemExit(0)")
    assert code == 2 and err == f"losses.part {WHOSE} failed: SystemExit: 0\n", err


def test_exit_from_a_hook_that_nobody_watches_over(run: Run) -> None:
    code, err = run("losses", "def train(self, mode=True): raise SystemExit(0)")
    assert code == 1 and err.endswith("my_parts.py:3 called sys.exit(0) in the midst of the run\n"), err


def test_a_tower_that_fails_in_an_evaluation(run: Run) -> None:
    """Whoever calls it: the part that failed is named, not the evaluator around it."""
    method = "def forward(self, groups, plan):\n    return super().forward(groups, plan) if self.training else fail"
    code, err = run("towers", method, **{"evaluators.x": "{type: encodes}"})
    assert code == 2 and err.startswith(f"model.image {WHOSE} failed: NameError: ") and err.count("\n") == 1, err


def test_an_error_in_a_worker(run: Run, tmp_path: Path) -> None:
    code, err = run(
        "augmenters", "def crop(self, sample, rng): raise RuntimeError('first\\nsecond')", **{"loader.workers": 1}
    )
    assert (
        code == 1
        and err.count("\n") == 1
        and err.startswith(f"data: loader worker 0, step 0, augmenters.image {WHOSE} on sample ")
    ), err
    assert err.endswith(": RuntimeError: first\n")
    log = (tmp_path / "run" / "log.txt").read_text()
    assert 'my_parts.py", line' in log and "second" in log


def test_debug_shows_where(run: Run) -> None:
    with pytest.raises(CosmosError) as caught:
        run("losses", "def forward(self, ctx): fail", "--debug")
    assert isinstance(caught.value.__cause__, NameError)


def test_debug_shows_where_in_a_worker(run: Run) -> None:
    with pytest.raises(CosmosError) as caught:
        run("augmenters", "def crop(self, sample, rng): fail", "--debug", **{"loader.workers": 1})
    assert any('my_parts.py", line' in note for note in caught.value.__notes__)


NANS = {
    "loss": (
        "losses",
        "def forward(self, ctx): return LossOutput(terms={'a': self.weight * NAN})",
        f"losses.part {WHOSE}",
    ),
    "head": (
        "heads",
        "def forward(self, features, views, outputs): return {'out': super().forward(features, views, "
        "outputs)['out'] * NAN}",
        f"heads.part {WHOSE}",
    ),
    "tower": (
        "towers",
        "def __init__(self, spec): super().__init__(spec); self.a.weight.data.fill_(NAN)",
        f"model.image {WHOSE}",
    ),
    "augmenter": (
        "augmenters",
        "def finish(self, group): return replace(group, pixels=group.pixels * NAN)",
        f"augmenters.image {WHOSE}",
    ),
}


@pytest.mark.parametrize(("group", "methods", "named"), NANS.values(), ids=list(NANS))
def test_what_is_not_finite_is_traced_to_its_part(
    run: Run, tmp_path: Path, group: str, methods: str, named: str
) -> None:
    code, err = run(group, methods, **{"training.max_nonfinite_steps": 2})
    assert code == 1 and err.startswith(
        f"step 2: {named} is not finite, 2 steps in a row (training.max_nonfinite_steps). Samples of"
    )
    assert err.count("\n") == 1
    assert f"step 1: {named} is not finite, so the update is skipped" in (tmp_path / "run" / "log.txt").read_text()


def test_a_teacher_that_is_not_finite(run: Run) -> None:
    start = (
        "def start(self, build, student):\n    super().start(build, student)\n    "
        "self.model.image.projection.data.fill_(NAN)"
    )
    code, err = run("teachers", start, **{"training.max_nonfinite_steps": 1})
    assert code == 1 and err.startswith("step 1: the teacher's model.image is not finite, 1 steps in a row"), err


def test_a_class_from_code_is_named_too(tmp_path: Path) -> None:
    import cosmos_ssl
    from cosmos_ssl.api import Loss, LossOutput, Need, PluginError, Spec, StepContext

    class Faulty(Loss):
        def __init__(self, spec: Spec) -> None:
            super().__init__()

        def requires(self) -> list[Need]:
            return [Need(modality="image")]

        def forward(self, ctx: StepContext) -> LossOutput:
            raise KeyError("x")

    with pytest.raises(PluginError, match=r"^losses\.mine \(the class .*Faulty\) failed: KeyError: 'x'$"):
        cosmos_ssl.train(small_config(str(tmp_path), 1, {"losses": {"mine": {"type": Faulty}}}))
