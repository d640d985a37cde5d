"""Bad samples: what was replaced, the count of it, and the share at which a run must stop."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cosmos_ssl.errors import TrainingError

MINIMUM_SAMPLES = 1000
"""The share is taken of this many samples at least, so that one early fault stops nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """One sample that could not be used."""

    shard: str
    index: int
    key: str
    reason: str
    detail: str = ""


class BadSampleBudget:
    """Counts bad samples by shard and reason as batches are consumed; part of a run's state."""

    def __init__(self, share: float = 0.01, *, minimum: int = MINIMUM_SAMPLES) -> None:
        self.share = share
        self.minimum = minimum
        self.samples = 0
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)

    def add(self, replaced: Sequence[Replacement], samples: int) -> None:
        """Count a consumed batch of ``samples``. Raises TrainingError past the budget."""
        self.samples += samples
        for item in replaced:
            self.counts[item.shard][item.reason] += 1
        if replaced and self.bad > self.share * max(self.samples, self.minimum):
            raise TrainingError(f"{self.summary()} (allowed: {self.share:.2%}). 'cosmos-ssl data check' lists them")

    @property
    def bad(self) -> int:
        """Bad samples met so far."""
        return sum(counts.total() for counts in self.counts.values())

    @property
    def reasons(self) -> dict[str, int]:
        """Bad samples by reason, most frequent first."""
        return dict(sum(self.counts.values(), Counter[str]()).most_common())

    def summary(self) -> str:
        """One line: how many, why, and the worst shard; empty where there was none."""
        if not self.counts:
            return ""
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.reasons.items())
        name, worst = max(self.counts.items(), key=lambda item: item[1].total())
        read = self.samples + self.bad  # every bad one was replaced, perhaps by another bad one
        return (
            f"data: {self.bad:,} of {read:,} samples read could not be used: {reasons}; worst shard {name} "
            f"with {worst.total():,}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain values for ``state.json``."""
        return {"samples": self.samples, "counts": {shard: dict(counts) for shard, counts in self.counts.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting where ``state_dict`` stood."""
        self.samples = int(state["samples"])
        self.counts = defaultdict(Counter, {shard: Counter(counts) for shard, counts in state["counts"].items()})
