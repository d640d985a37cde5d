"""The garbage collector's schedule: off within a run, on again after it, and at the same steps on all ranks."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from cosmos_ssl.engine import garbage
from cosmos_ssl.engine.garbage import collected_on_schedule


@pytest.fixture
def unfrozen() -> Iterator[None]:
    """As a program of its own finds it; the tests' has frozen what it imports."""
    gc.unfreeze()
    yield
    gc.freeze()


@pytest.mark.usefixtures("unfrozen")
def test_it_is_collected_at_steps_that_all_ranks_make(monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda: collected.append(step))
    with pytest.raises(OSError, match="lost"), collected_on_schedule() as stepped:
        assert not gc.isenabled()
        for step in range(37, 161):
            stepped(step)
        assert collected == [37, 50, 100, 150] and gc.get_freeze_count()
        raise OSError("lost")
    assert gc.isenabled() and not gc.get_freeze_count()
    monkeypatch.setattr(gc, "get_freeze_count", lambda: 1)
    for name in ("freeze", "unfreeze"):
        monkeypatch.setattr(gc, name, lambda: pytest.fail("the caller's are left alone"))
    with collected_on_schedule() as stepped:
        stepped(step := 1)
    assert collected[-1] == 1


@pytest.mark.usefixtures("unfrozen")
def test_a_run_leaves_it_as_it_was(tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "EVERY", 4)
    inside: list[bool] = []
    evaluator, collect = tiny.Mean(), gc.collect
    evaluate = evaluator.evaluate
    monkeypatch.setattr(evaluator, "evaluate", lambda *a, **k: (gc.isenabled() or 1 / 0) and evaluate(*a, **k))
    monkeypatch.setattr(gc, "collect", lambda *of: inside.append(gc.isenabled()) or collect(*of))
    tiny.make_trainer(tmp_path, evaluators={"mean": evaluator}).train()
    assert inside[:3] == [False] * 3  # after steps 1, 4, 8
    assert gc.isenabled() and not gc.get_freeze_count()
