"""What is said of several ranks on this machine when they have ended."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from cosmos_ssl_launch.local import _outcome


@pytest.mark.parametrize("aborted", [0, 1])
def test_the_rank_that_nccl_has_ended_is_named_with_its_last_collectives(
    aborted: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = [io.StringIO(), io.StringIO("another rank was lost\n" if aborted == 0 else "terminate called\n")]
    codes = [-6, 74] if aborted == 0 else [74, -6]
    flights = tmp_path / f"nccl_rank{aborted}"
    flights.touch()
    began = flights.stat().st_mtime
    assert _outcome(codes, said, tmp_path, began) == 74
    told = capsys.readouterr().err
    assert told.startswith(f"rank {aborted} ended by SIGABRT; its last collectives are in {flights} (read by torch.")
    assert told.endswith("flight_recorder): terminate called\n" if aborted else "flight_recorder)\n")
    assert _outcome(codes, said, tmp_path, began + 1) == 74  # of an earlier start
    assert "collectives" not in capsys.readouterr().err
