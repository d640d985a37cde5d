"""What is said of several ranks on this machine when they have ended."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from cosmos_ssl_launch import local
from cosmos_ssl_launch.local import _outcome, _wait


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


def test_all_ranks_that_stood_still_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first has said so itself; one that has lost another is not one of them."""
    stood = (
        "nothing has happened for 30 min (training.timeout_minutes): rank {}, step {}. Stacks of all threads are in x"
    )
    said = [io.StringIO(), *(io.StringIO(f"a warning\n{stood.format(rank, 5 + rank)}\n") for rank in (1, 2))]
    assert _outcome([74] * 4, [*said, io.StringIO("another rank was lost\n")], tmp_path, 0) == 74
    told = capsys.readouterr().err.splitlines()
    assert told[:2] == [f"rank {rank}: {stood.format(rank, 5 + rank)}" for rank in (1, 2)] and len(told) <= 3


class Rank:
    """Stands for a process, whose code is known once it was asked for; one without is in state D: nothing ends it."""

    pid = 7

    def __init__(self, code: int | None) -> None:
        self.code, self.killed = code, False
        self.returncode: int | None = None

    def poll(self) -> int | None:
        self.returncode = self.code
        return self.code

    def kill(self) -> None:
        self.killed = True


@pytest.mark.parametrize("stuck", [0, 1])
def test_a_rank_that_cannot_be_ended_is_left_behind(
    stuck: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also the first one, which waits for others: that another has failed is seen all the same."""
    monkeypatch.setattr(local, "GRACE", 0.0)
    monkeypatch.setattr(local, "STUCK", 0.1)
    ranks = [Rank(1), Rank(1)]
    ranks[stuck].code = None
    codes = _wait(ranks)
    assert codes[stuck] == -9 and codes[1 - stuck] == 1 and ranks[stuck].killed
    assert f"rank {stuck} (process 7) is not ended by SIGKILL: it waits" in capsys.readouterr().err
    assert _outcome([1, -9], [io.StringIO(), io.StringIO()], Path(), 0) == 1
