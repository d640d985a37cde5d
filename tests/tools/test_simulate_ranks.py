"""The simulation of many ranks: what one of 1,024 sends in a step, by hand."""

import importlib
import json
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


def test_one_rank_of_1024(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(TOOLS))
    simulate_ranks = importlib.import_module("simulate_ranks")
    options = ["--tiny", "--ranks", "8", "1024", "--samples", "8", "--shards", "200"]
    monkeypatch.setattr(sys, "argv", ["simulate_ranks.py", *options, "--json", str(tmp_path / "rows.json")])
    code = simulate_ranks.main()
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert code == int(not all(row["ok"] for row in rows.values()))
    timed = ("order: to a step far in", "order: each further step", "step: host")
    assert all(row["ok"] for name, row in rows.items() if not name.startswith(timed))
    nothing = simulate_ranks.judged({ranks: dict.fromkeys(simulate_ranks.FIGURES, 0.0) for ranks in (8, 1024)})
    assert {row["name"].rpartition(",")[0] for row in nothing if row["ok"]} == {"order: samples of others"}
    found = {name.removesuffix(", 1024"): row["value"] for name, row in rows.items() if name.endswith(", 1024")}
    others, width = 8 * 1023, 64
    assert found["order: samples of others"] == 0
    # gather, its gradient, two sums, one bucket of gradients, the agreement on the device and on the host
    assert found["step: collectives"] == 7
    expected = {
        "step: gathered features": (2 + 4) * others * width * 4,  # two image views, four features of the teacher
        "step: gradients of the features": (2 + 4) * others * width * 4,  # gathered together, so returned together
        "step: sums of exponentials": 2 * (8 * 2 + 16 * 4) * others * 8,  # float64, by pairs of views
        "step: agreement": 2 * (2 + 4 * 8),  # two truths on the device, four float64 on the host
    }
    wanted = {name: sent / 1e6 for name, sent in expected.items()}
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=0.01)
    assert found["step: chunks of logits"] == 3  # of each loss, and of the accuracy
