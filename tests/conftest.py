"""Fixtures that tests of several folders share."""

from __future__ import annotations

import gc
import importlib
import io
import json
import multiprocessing
import re
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from PIL import Image
from torch import Tensor

from cosmos_ssl import registry
from cosmos_ssl.cli import main
from cosmos_ssl.config import Config
from cosmos_ssl.data import storage

LOADED = re.compile(r"^the (student|teacher) of .+: [\d,]+ of [\d,]+ tensors.*\n", re.MULTILINE)

Command = Callable[..., tuple[int, str, str]]
Install = Callable[..., Path]
ONE_STEP = {
    "extends": "quickstart",
    "model": {"image": {"layers": 1, "width": 64}, "text": {"layers": 1, "width": 64, "heads": 2}, "embed_dim": 32},
    "data": {"train_samples": 16, "validation_samples": 24},
    "loader": {"workers": 0},
    "schedule": {"max_steps": 1, "warmup_steps": 1},
    "training": {"batch_size": 8},
    "evaluators": None,
    "logging": {"tensorboard": False},
}

# what ranks would take seconds for
multiprocessing.set_forkserver_preload(["pytest", "torch", "torch._dynamo", "cosmos_ssl.testing"])


def pytest_collection_finish() -> None:
    """What is imported by now is not looked through by the collection of garbage that every run begins with."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def in_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[Any, Any]]:
    """Run ``function(rank, world, path of a store, *arguments, results)`` as so many processes; ``results``."""

    def run(function: Callable[..., None], world: int, *arguments: Any) -> dict[Any, Any]:
        with torch.multiprocessing.Manager() as manager:
            results = manager.dict()
            given = (world, str(tmp_path_factory.mktemp("ranks") / "store"), *arguments, results)
            torch.multiprocessing.start_processes(function, given, world, start_method="forkserver")
            return dict(results)

    return run


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """``command("plugins", "list")``, in this process as a user would run it, returns exit code, standard output, and
    standard error without the line of each load.
    """

    def command(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main(argv)
        except SystemExit as left:  # argparse's way
            code = left.code if isinstance(left.code, int) else 1
        out, err = capsys.readouterr()
        return code, out, LOADED.sub("", err)

    return command


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a distribution that does not exist: its metadata and modules, in a temporary folder on the path.

    ``install(name, version, entries={"losses/triplet": "module:Class"}, modules={"module": source}, requires=[...])``
    returns that folder.
    """
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def install(
        name: str,
        version: str = "1.0",
        *,
        entries: Mapping[str, str],
        modules: Mapping[str, str] | None = None,
        requires: Sequence[str] = (),
    ) -> Path:
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = [
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
            *(f"Requires-Dist: {text}\n" for text in requires),
        ]
        (info / "METADATA").write_text("".join(lines))
        sections = [
            f"[cosmos_ssl.{group}]\n{part} = {path}\n"
            for key, path in entries.items()
            for group, part in [key.split("/")]
        ]
        (info / "entry_points.txt").write_text("\n".join(sections))
        for module, source in (modules or {}).items():
            (site / f"{module}.py").write_text(source)
        importlib.invalidate_caches()
        registry.forget()
        return site

    yield install
    registry.forget()
    for module, loaded in list(sys.modules.items()):
        if str(getattr(loaded, "__file__", None) or "").startswith(str(site)):
            del sys.modules[module]


@pytest.fixture(scope="session")
def varlen_on_cpu() -> None:
    """The operators of PyTorch's ``varlen_attn``, which run on CUDA alone, by their formula on the CPU."""
    from torch.nn.attention import varlen

    def pieces(q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, causal: bool) -> Iterator[list[Tensor]]:
        """Of each sequence q, k, v and the weights."""
        assert q_ends.dtype == k_ends.dtype == torch.int32
        cut = [x.tensor_split(ends[1:-1].long()) for x, ends in ((q, q_ends), (k, k_ends), (v, k_ends))]
        for a, b, c in zip(*cut, strict=True):
            logits = torch.einsum("qhd,khd->hqk", a, b) / a.shape[-1] ** 0.5
            hidden = torch.ones(len(a), len(b), dtype=torch.bool).triu(1 + len(b) - len(a))  # the last sees all
            yield [a, b, c, (logits.masked_fill(hidden, -torch.inf) if causal else logits).softmax(-1)]

    def forward(q, k, v, q_ends, k_ends, max_q, max_k, causal, *_):  # type: ignore[no-untyped-def]
        assert (max_q, max_k) == (q_ends.diff().max(), k_ends.diff().max())
        out = [torch.einsum("hqk,khd->qhd", w, c) for _, _, c, w in pieces(q, k, v, q_ends, k_ends, causal)]
        return torch.cat(out), q.new_zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)

    def backward(grad, q, k, v, out, lse, q_ends, k_ends, max_q, max_k, causal, *_):  # type: ignore[no-untyped-def]
        found = []
        grads = grad.tensor_split(q_ends[1:-1].long())
        for g, (a, b, c, w) in zip(grads, pieces(q, k, v, q_ends, k_ends, causal), strict=True):
            dw = torch.einsum("qhd,khd->hqk", g, c)
            dlogits = w * (dw - (dw * w).sum(-1, keepdim=True)) / a.shape[-1] ** 0.5
            to_keys = [torch.einsum("hqk,qhd->khd", x, y) for x, y in ((dlogits, a), (w, g))]
            found.append([torch.einsum("hqk,khd->qhd", dlogits, b), *to_keys])
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    varlen._varlen_attn.register_kernel("cpu", forward)
    varlen._varlen_attn_backward.register_kernel("cpu", backward)


@pytest.fixture(scope="session")
def one_step_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one step, to be read; its data, 16 and 24 scenes, are ``../scenes``."""
    import cosmos_ssl

    folder = tmp_path_factory.mktemp("one_step")
    config = folder / "tiny.yaml"
    config.write_text(json.dumps(ONE_STEP))
    cosmos_ssl.train(config, [f"output_dir={folder}/run", f"data.folder={folder}/scenes"])
    return folder / "run"


# pages in a real browser


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless Chromium, driven by Selenium; for tests marked ``browser``."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)  # as root, and in containers with little shared memory
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium: Any) -> Iterator[Any]:
    """That Chromium in a window of 1,280 x 900, light; the test fails on errors in the page's console."""
    chromium.set_window_size(1280, 900)
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    chromium.get_log("browser")
    yield chromium
    severe = [entry["message"] for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"]
    assert not severe, severe


# shards made on the spot


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of this test alone, no waits between attempts to read, and no storage that has answered before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(storage, "_answered", set())
    monkeypatch.setattr(storage, "RETRY_SECONDS", (0.001, 0.001))


def jpeg(number: int, side: int = 24) -> bytes:
    """A picture whose colour tells its number."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (number % 256, number // 256, 77)).save(buffer, "png")
    return buffer.getvalue()


def members_of(number: int) -> dict[str, bytes]:
    """A sample as the tests' shards hold it, by extension."""
    table = {
        "raw_caption": [f"raw {number}"],
        "longIB_captions": [f"long {number} a", f"long {number} b"],
        "number": number,
    }
    return {
        "png": jpeg(number),
        "json": json.dumps(table).encode(),
        "txt": f"text {number}".encode(),
        "cls": str(number % 5).encode(),
    }


def write_tar(
    path: Path, samples: Sequence[tuple[str, Mapping[str, bytes]]], format: int = tarfile.USTAR_FORMAT
) -> Path:
    """A shard of (key, {extension: bytes})."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for key, parts in samples:
            for extension, body in parts.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
    return path


@pytest.fixture
def tar() -> Callable[..., Path]:
    """``write_tar``."""
    return write_tar


@pytest.fixture
def parts() -> Callable[[int], dict[str, bytes]]:
    """``members_of``."""
    return members_of


@pytest.fixture
def shards(tmp_path: Path) -> Callable[..., str]:
    """Make shards of these sizes; their pattern. Samples are numbered through."""

    def make(
        *sizes: int, folder: str = "shards", change: Callable[[int, dict[str, bytes]], Any] = lambda i, m: None
    ) -> str:
        number = 0
        for shard, size in enumerate(sizes):
            samples = []
            for _ in range(size):
                found = members_of(number)
                change(number, found)
                samples.append((f"key{number:05d}", found))
                number += 1
            write_tar(tmp_path / folder / f"a-{shard:03d}.tar", samples)
        return str(tmp_path / folder / f"a-{{000..{len(sizes) - 1:03d}}}.tar")

    return make


# recipes made small


# What makes parts small, by type: sizes alone, so that what is tested is the recipe.
SHRUNK: dict[str, dict[str, Any]] = {
    "clip_vit": {"width": 64, "layers": 1, "patch_size": 8, "image_size": 32},
    "clip_text": {"width": 64, "layers": 1, "heads": 1},
    "timm": {"model": "test_vit", "image_size": 32, "pretrained": False},
    "clip": {"context_length": 24},
    "multi_crop": {"global_crops_size": 32, "local_crops_size": 16},
    "resize_crop": {"size": 32},
    "cross_attention": {"num_heads": 2},
    "projection": {"hidden_dim": 24, "output_dim": 32},
    "caption_decoder": {"layers": 1, "width": 32, "num_heads": 2},
    "dino_projection": {"hidden_dim": 24, "bottleneck_dim": 12, "output_dim": 40},
    "dinov2_projection": {"hidden_dim": 24, "bottleneck_dim": 12, "output_dim": 40},
}


@pytest.fixture(scope="session")
def small() -> Callable[[Config], list[str]]:
    """Overrides that make the model, views and heads of a config small."""

    def overrides(config: Config) -> list[str]:
        parts = {"model.image": config.model.image, "model.text": config.model.text, "tokenizer": config.tokenizer}
        parts |= {"augmenters.image": config.augmenters.image, "augmenters.text": config.augmenters.text}
        parts |= {f"heads.{name}": head for name, head in config.heads.items()}
        sizes = [
            f"{path}.{option}={value}"
            for path, part in parts.items()
            if part is not None
            for option, value in SHRUNK.get(part.type, {}).items()
        ]
        image = config.augmenters.image
        groups = image.options.get("groups", {}) if image is not None else {}
        return ["model.embed_dim=32", *sizes, *(f"augmenters.image.groups.{name}.size=32" for name in groups)]

    return overrides
