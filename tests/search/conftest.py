"""A model of one step with a cross-attention head and its shards, and a search over them that is served."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import cosmos_ssl
from cosmos_ssl.search.opening import Opening, open_index
from cosmos_ssl.search.routes import About, Routes
from cosmos_ssl.search.searcher import Searcher
from cosmos_ssl.search.server import Server, listen

TINY = {
    "extends": "quickstart",
    "model": {"image": {"layers": 1, "width": 64}, "text": {"layers": 1, "width": 64, "heads": 2}, "embed_dim": 32},
    "data": {"train_samples": 16, "validation_samples": 24},
    "loader": {"workers": 0},
    "schedule": {"max_steps": 1, "warmup_steps": 1},
    "training": {"batch_size": 8},
    "evaluators": None,
    "logging": {"tensorboard": False},
}


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one step; its data is ``../scenes``."""
    folder = tmp_path_factory.mktemp("search")
    config = folder / "tiny.yaml"
    config.write_text(json.dumps(TINY))
    cosmos_ssl.train(config, [f"output_dir={folder}/run", f"data.folder={folder}/scenes"])
    return folder / "run"


@pytest.fixture(scope="session")
def searcher(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    """A search over the 24 pictures that the run validates on, and over their captions."""
    encoder = cosmos_ssl.load(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        index = open_index(encoder, [f"{run.parent}/scenes/val-*.tar"], Opening(with_texts=True))
    return Searcher(encoder, index)


@pytest.fixture(scope="session")
def server(searcher: Searcher) -> Iterator[Server]:
    """That search, served at a free port."""
    server = Server(listen(0), Routes(searcher, About(model="tiny", data="scenes", top=12)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
