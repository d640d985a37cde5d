"""Several ranks from Python: ``train`` starts them, or a script of one's own is among those of torchrun."""

import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import cosmos_ssl
from cosmos_ssl.build.ranks import split_ranks
from cosmos_ssl.errors import UserError

SCRIPT = Path(__file__).with_name("own_script.py")


@pytest.fixture
def own(monkeypatch):
    """The script as a module that other processes find, too."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    yield importlib.import_module("own_script")
    del sys.modules["own_script"]


@pytest.mark.slow
def test_ranks_that_train_starts_and_those_of_torchrun_are_the_same_run(own, tmp_path):
    rows = own.Rows()
    metrics = cosmos_ssl.train(own.own_config(str(tmp_path), "train"), ["profile.nproc=2"], writers=[rows])
    assert "RANK" not in os.environ and len(rows.losses) == 2
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, SCRIPT, tmp_path], env=os.environ | place | {"RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        assert [rank.wait(120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    assert json.loads((tmp_path / "script.json").read_text()) == [metrics["loss/spread"], *rows.losses]
    for run in ("train", "script"):
        (state,) = (tmp_path / run / "checkpoints").glob("*/state.json")
        assert json.loads(state.read_text())["ranks"] == 2


def test_what_ranks_from_python_refuse(own, tmp_path):
    class Local(own.Spread):
        """No other process finds it."""

    config = own.own_config(str(tmp_path), "local")
    config["losses"]["spread"]["type"] = Local
    with pytest.raises(UserError, match=r"other processes cannot import .* Define its classes at the top of a module"):
        cosmos_ssl.train(config, ["profile.nproc=2"])
    with pytest.raises(UserError, match=r"batch_size: 8 cannot be shared by 3 ranks"):
        cosmos_ssl.train(config, ["profile.nproc=3"])
    for text in ("profile.nodes=2", "profile.nproc=0", "profile.nproc=x"):
        with pytest.raises(UserError, match=f"{text}: from Python profile.nproc=N is known"):
            split_ranks([text])
    assert split_ranks(["a=1", "profile.nproc=4"]) == (["a=1"], 4)
