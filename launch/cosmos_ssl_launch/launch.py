"""Checks a config, decides where it runs, and runs it there."""

from __future__ import annotations

import os
from collections.abc import Sequence

from cosmos_ssl.config import check_ranks, load_config, started_ranks
from cosmos_ssl.config_source import dump_yaml
from cosmos_ssl.errors import EXIT_DONE
from cosmos_ssl_launch.local import run_ranks
from cosmos_ssl_launch.profile import read_profile

PROFILE_VARIABLE = "COSMOS_PROFILE"


def launch(config: str, overrides: Sequence[str], *, profile: str | None = None, dry_run: bool = False) -> int:
    """Train ``config``, or say what would be done. Returns the exit code; raises UserError for what the user gave."""
    values = [text.removeprefix("profile.") for text in overrides if text.startswith("profile.")]
    loaded = load_config(config, [text for text in overrides if not text.startswith("profile.")])
    place = read_profile(profile or loaded.config.profile or os.environ.get(PROFILE_VARIABLE) or "local", values)
    joined = started_ranks()
    ranks = joined if joined > 1 else place.nproc
    check_ranks(loaded.config, ranks)

    # Before torch starts its threads: a short spin between two operations is quick, while GNU OpenMP's long one slows
    # a run many times over wherever anything else uses the processors
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from cosmos_ssl import build  # after stage one, which needs no torch

    build.check(loaded)
    where = "in one process" if ranks == 1 else f"as one of {ranks} ranks" if joined > 1 else f"in {ranks} processes"
    if dry_run:
        print(dump_yaml(loaded.tree), end="")
        print(f"# both stages of checks passed. Without --dry-run this trains here, {where}, into {loaded.config.folder}")
        return EXIT_DONE
    if joined == 1 and ranks > 1:
        build.prepare(loaded)
    if joined == 1 or os.environ.get("RANK", os.environ.get("SLURM_PROCID")) == "0":
        print(f"training here, {where}, into {loaded.config.folder}", flush=True)
    if joined == 1 and ranks > 1:
        return run_ranks(["--config", config, *overrides], ranks)
    build.run(loaded)
    return EXIT_DONE
