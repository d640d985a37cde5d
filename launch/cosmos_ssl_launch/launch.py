"""Checks a config, decides where it runs, and runs it there."""

from __future__ import annotations

import os
from collections.abc import Sequence

from cosmos_ssl.config import LoadedConfig, check_ranks, load_config
from cosmos_ssl.config_source import dump_yaml
from cosmos_ssl.errors import EXIT_DONE, UserError
from cosmos_ssl_launch.profile import Profile, read_profile

PROFILE_VARIABLE = "COSMOS_PROFILE"


def launch(config: str, overrides: Sequence[str], *, profile: str | None = None, dry_run: bool = False) -> int:
    """Train ``config``, or say what would be done. Returns the exit code; raises UserError for what the user gave."""
    values = [text.removeprefix("profile.") for text in overrides if text.startswith("profile.")]
    loaded = load_config(config, [text for text in overrides if not text.startswith("profile.")])
    place = read_profile(profile or loaded.config.profile or os.environ.get(PROFILE_VARIABLE) or "local", values)
    _check_world(loaded, place)

    # Before torch starts its threads: a short spin between two operations is quick, while GNU OpenMP's long one slows
    # a run many times over wherever anything else uses the processors
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from cosmos_ssl import build  # after stage one, which needs no torch

    build.check(loaded)
    if dry_run:
        print(dump_yaml(loaded.tree), end="")
        print(f"# both stages of checks passed. Without --dry-run this trains here, in one process, into {loaded.config.folder}")
        return EXIT_DONE
    print(f"training here, in one process, into {loaded.config.folder}", flush=True)
    build.run(loaded)
    return EXIT_DONE


def _check_world(loaded: LoadedConfig, place: Profile) -> None:
    """Raise UserError unless the run has one process."""
    check_ranks(loaded.config, place.nproc)
    if place.nproc > 1:
        raise UserError(f"profile.nproc: {place.nproc}: this release trains in one process. Leave it at 1")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1:
        raise UserError(f"{started} processes were started (WORLD_SIZE), and this release trains in one. Start cosmos-launch by itself")
