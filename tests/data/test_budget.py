"""The count of bad samples and the share at which a run stops."""

from __future__ import annotations

import json

import pytest

from cosmos_ssl.data import BadSampleBudget, Replacement
from cosmos_ssl.errors import TrainingError


def bad(shard: str, reason: str = "undecodable") -> Replacement:
    return Replacement(shard=shard, index=1, key="k", reason=reason)


def test_within_the_budget_faults_are_counted() -> None:
    budget = BadSampleBudget(0.01)
    budget.add([bad("a.tar"), bad("b.tar"), bad("b.tar", "no caption")], 100)
    for _ in range(20):
        budget.add([], 100)
    assert budget.bad == 3 and budget.samples == 2100 and budget.reasons == {"undecodable": 2, "no caption": 1}
    assert (
        budget.summary()
        == "data: 3 of 2,103 samples read could not be used: undecodable 2, no caption 1; worst shard b.tar with 2"
    )
    assert BadSampleBudget().summary() == ""


def test_past_the_budget_the_worst_shard_is_named() -> None:
    budget = BadSampleBudget(0.01)
    budget.add([bad("a.tar")] * 2 + [bad("b.tar")] * 8, 64)
    with pytest.raises(TrainingError, match=r"11 of 139 samples read .*worst shard b\.tar with 9 \(allowed: 1\.00%\)"):
        budget.add([bad("b.tar")], 64)


def test_never_more_are_bad_than_were_read() -> None:
    budget = BadSampleBudget(0.01)
    with pytest.raises(TrainingError, match="40 of 72 samples read could not be used"):
        budget.add([bad("a.tar")] * 40, 32)


def test_one_percent_of_a_long_run_is_allowed() -> None:
    budget = BadSampleBudget(0.01)
    for _ in range(100):
        budget.add([bad("a.tar")], 100)
    with pytest.raises(TrainingError):
        budget.add([bad("a.tar")] * 3, 100)


def test_the_count_goes_on_after_a_restart() -> None:
    budget, other = BadSampleBudget(), BadSampleBudget()
    budget.add([bad("a.tar"), bad("a.tar", "too large")], 10)
    other.load_state_dict(json.loads(json.dumps(budget.state_dict())))
    assert other.state_dict() == budget.state_dict() and other.summary() == budget.summary()
    other.add([bad("new.tar")], 10)
    assert other.bad == 3
