"""FLOPs of a sample of a run, counted from its resolved config."""

from __future__ import annotations

import json
from typing import Any

from cosmos_ssl.cli.runs.reading import Run
from cosmos_ssl.errors import CosmosError


def flops_per_sample(run: Run, known: dict[str, float | None]) -> float | None:
    """As ``cosmos-ssl flops`` counts them; None where that fails, or would run code that no installed package offers.

    ``known``: what was counted before, by config.
    """
    tree: dict[str, Any] = {}
    for path, value in run.config.items():
        *above, key = path.split(".")
        holder = tree
        for part in above:
            holder = holder.setdefault(part, {})
        holder[key] = value
    tree = {key: value for key, value in tree.items() if key not in ("evaluators", "logging", "callbacks", "profile")}
    for key in ("name", "output_dir", "schedule", "checkpoints"):
        tree.pop(key, None)
    digest = json.dumps(tree, sort_keys=True)
    if digest not in known:
        known[digest] = _counted(tree)
    return known[digest]


def _counted(tree: dict[str, Any]) -> float | None:
    import torch

    from cosmos_ssl.build import Builder
    from cosmos_ssl.config import load_config
    from cosmos_ssl.cost.step_cost import measure_step

    try:
        loaded = load_config(tree, ["training.attention=auto"])
        assembly = Builder(loaded, trust_code=False).assemble("measure")
        return measure_step(assembly, loaded.config, samples=2, caption_tokens=None, device=torch.device("cpu")).flops[
            "total"
        ]
    except CosmosError:
        return None
