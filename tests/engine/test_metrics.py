"""Rows and writers, also on a full disk, after a crash, and where a writer fails."""

import io
import json
import os

import torch
from rich.console import Console

from cosmos_ssl.engine.metrics import JsonLines, Writers, cut_rows, read_rows
from cosmos_ssl.engine.watch import Watch


def test_rows_keep_every_bit_and_have_no_nan(tmp_path):
    writer = JsonLines(tmp_path / "m.jsonl")
    value = torch.tensor(0.1).item()
    writer.scalars(3, {"loss": value, "bad": float("nan")})
    writer.close()
    assert list(read_rows(tmp_path / "m.jsonl")) == [{"step": 3, "loss": value, "bad": None}]


def test_cutting_back_drops_later_rows_and_broken_lines(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 2, 3)) + '{"step": 1, "lo')
    cut_rows(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2}\n'
    cut_rows(tmp_path / "absent.jsonl", 2)
    assert not (tmp_path / "absent.jsonl").exists()


def test_a_full_disk_keeps_rows_waiting(tmp_path, monkeypatch, caplog):
    path = tmp_path / "m.jsonl"
    writers = Writers([JsonLines(path)])
    writers.scalars(1, {"loss": 1.0})
    real = os.write

    def half(handle, data):
        real(handle, data[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", half)
    writers.scalars(2, {"loss": 2.0})
    writers.scalars(3, {"loss": 3.0})
    assert [row["step"] for row in read_rows(path)] == [1]
    assert path.read_bytes().endswith(b"\n")
    monkeypatch.setattr(os, "write", real)
    writers.scalars(4, {"loss": 4.0})
    writers.close()
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4]
    assert caplog.text.count("No space left") == 1


def test_a_signal_that_would_come_too_late_is_warned_of_once(monkeypatch, caplog):
    monkeypatch.setenv("COSMOS_SIGNAL_DELAY_S", "10")
    watch = Watch(Console(file=io.StringIO()), 100, 10, lambda: 5.0)
    row = {"epoch": 0.1, "loss": 1.0, "lr": 0.1, "samples_per_second": 1.0, "data_wait": 0.0}
    watch.logged(1, row, 1.9)
    assert not caplog.records
    watch.logged(2, row, 2.1)
    watch.logged(3, row, 2.1)
    assert [record.getMessage() for record in caplog.records] == [
        "a step and a save take 7 s, over 70 % of the 10 s between the signal and the end of the job: raise the "
        "profile's signal_delay_s"
    ]
