"""A model of one step with a cross-attention head and its shards, and a search over them that is served."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import cosmos_ssl
from cosmos_ssl.search.opening import Opening, open_index
from cosmos_ssl.search.routes import About, Routes
from cosmos_ssl.search.searcher import Searcher
from cosmos_ssl.search.server import Server, listen


@pytest.fixture(scope="session")
def run(one_step_run: Path) -> Path:
    """The folder of a run of one step; its data is ``../scenes``."""
    return one_step_run


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
