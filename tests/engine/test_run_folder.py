"""A run's folder: whose it is, and that one job alone holds it."""

import io
import json
import logging
import os
import socket
import subprocess
import sys

import pytest
from rich.console import Console

from cosmos_ssl.cli.common import execute
from cosmos_ssl.engine.run_folder import RunFolder
from cosmos_ssl.engine.watch import Watch, lines
from cosmos_ssl.errors import UserError
from cosmos_ssl.identity import Identity


def test_two_trainers_of_one_process_do_not_share_a_folder(tmp_path):
    with RunFolder(tmp_path / "a").locked():
        with pytest.raises(UserError, match="in use by a live run"), RunFolder(tmp_path / "a").locked():
            pass
        with RunFolder(tmp_path / "b").locked():
            pass
    with RunFolder(tmp_path / "a").locked():
        pass


def test_who_holds_a_folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert folder.holder() is None and not folder.path.exists()
    with folder.locked():
        assert folder.holder() == "this very process"
        code = "import sys; from cosmos_ssl.engine.run_folder import *; print(RunFolder(Path(sys.argv[1])).holder())"
        command = [sys.executable, "-c", code, str(folder.path)]
        asked = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
        assert asked == [f"process {os.getpid()} on {socket.gethostname()}\n"] * 2, "asking does not end the lock"
    assert folder.holder() is None


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=f"output_dir: {tmp_path}/file/run cannot be written: Not a directory"),
        RunFolder(tmp_path / "file/run").locked(),
    ):
        pass


def told(config, **data):
    return Identity.of(config, data)


def test_a_folder_belongs_to_one_config_and_one_data_set(tiny, tmp_path):
    folder, config = RunFolder(tmp_path), tiny.make_config()
    folder.check_identity(told(config, samples=20))
    assert not any(tmp_path.iterdir())  # looking claims nothing
    folder.record(config, {})
    folder.check_identity(told(tiny.make_config(loader={"workers": 3}, logging={"every_steps": 9}), samples=20))
    with pytest.raises(
        UserError, match=rf"run folder {tmp_path} belongs to another config \(optimizer.lr: 0.05 -> 0.1\)"
    ) as caught:
        folder.check_identity(told(tiny.make_config(optimizer={"lr": 0.1}), samples=20))
    assert (
        f"--fork {tmp_path} takes over weights, optimiser and step, model.pretrained={tmp_path} the weights alone"
        in str(caught.value)
    )
    with pytest.raises(UserError, match=r"belongs to another data set \(data, samples: 20 -> 24\)"):
        folder.check_identity(told(config, samples=24))


def test_what_was_not_known_is_written_down_when_a_run_goes_on(tiny, tmp_path):
    """An identity as older versions wrote it, without contents, is that of the same run; from then on contents
    count.
    """
    config = tiny.make_config()
    older = {"config": config.model_dump(), "data": {"samples": 20}}
    (tmp_path / "identity.json").write_text(json.dumps(older))
    folder = RunFolder(tmp_path)
    folder.check_identity(told(config, samples=20, content="a"))
    assert json.loads((tmp_path / "identity.json").read_text()) == older
    folder.identify(finished=True)
    with pytest.raises(UserError, match="data, content: 'a' -> 'b'"):
        folder.check_identity(told(config, samples=20, content="b"))


def test_shards_that_have_changed_can_be_accepted(tiny, tmp_path, caplog):
    folder, config = RunFolder(tmp_path), tiny.make_config()
    folder.check_identity(told(config, samples=20))
    folder.record(config, {})
    with pytest.raises(
        UserError, match=r"Give another output_dir, or loader.changed_data=accept to go on with the shards of now"
    ):
        folder.check_identity(told(config, samples=24))
    folder.check_identity(told(config, samples=24), accept_data=True)
    with pytest.raises(UserError, match=r"is finished, with other data \(data, samples: 20 -> 24\)"):
        folder.identify(finished=True)
    folder.record(config, {})
    assert (
        "the shards have changed since this run began (data, samples: 20 -> 24); it goes on with those of now"
        in caplog.text
    )
    folder.check_identity(told(config, samples=24))
    with pytest.raises(UserError, match=r"another config \(optimizer.lr: 0.05 -> 0.1, data, samples: 24 -> 20\)"):
        folder.check_identity(told(tiny.make_config(optimizer={"lr": 0.1}), samples=20), accept_data=True)


def test_changed_versions_are_told(tiny, tmp_path, caplog):
    folder = RunFolder(tmp_path)
    folder.record(tiny.make_config(), {"losses.match": "match (mine 1.0)"})
    assert not caplog.text
    folder.record(tiny.make_config(), {"losses.match": "match (mine 1.1)"})
    assert "losses.match: match (mine 1.0) -> match (mine 1.1)" in caplog.text


def test_names_do_not_act_on_a_terminal(tmp_path, capsys):
    """What comes from data and others' parts is shown, on the console, in the log and as the error that ends a run."""
    name = "a\x1b[2J\r\u202eb"
    shown = io.StringIO()
    with lines(Console(file=shown, width=300)), RunFolder(tmp_path).logged():
        logging.getLogger("cosmos_ssl.engine").warning("sample %s", name)
        Watch(Console(file=shown, width=300), 1, 1).table(name, {f"{name}/student/x": 1.0})

    def fail():
        raise UserError(f"shard {name}")

    assert execute(fail) == 2
    said = (shown.getvalue(), (tmp_path / "log.txt").read_text(), capsys.readouterr().err)
    assert all("a\\x1b[2J\\r\\u202eb" in text and "\x1b" not in text and "\r" not in text for text in said)
