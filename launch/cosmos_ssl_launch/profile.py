"""Profiles: where a run takes place."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cosmos_ssl.config_source import parse_overrides
from cosmos_ssl.errors import ConfigError, UserError, did_you_mean
from cosmos_ssl.registry import describe_errors


class Profile(BaseModel):
    """This machine: ``nproc`` is the number of processes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    nproc: int = Field(default=1, gt=0)


def read_profile(name: str, values: Sequence[str]) -> Profile:
    """The profile of this name with ``KEY=value`` over it. Raises UserError for others than ``local``, ConfigError for values."""
    if name not in ("local", "local.yaml"):
        raise UserError(
            f"profile '{name}': clusters come with a later release; this one trains here. Leave the profile out, or name 'local'"
        )
    faults: list[str] = []
    tree = parse_overrides(values, faults).plain()
    try:
        profile = Profile.model_validate(tree)
    except ValidationError as error:
        for found in error.errors(include_url=False):
            key = str(found["loc"][0])
            if found["type"] == "extra_forbidden":
                message = f"unknown key.{did_you_mean(key, list(Profile.model_fields))} Accepts: {', '.join(Profile.model_fields)}"
            else:
                message = describe_errors([{**found, "loc": ()}], found["input"])[0][1]
            faults.append(f"command line  profile.{key}: {message}")
    if faults:
        raise ConfigError(faults)
    return profile
