"""What makes a run this run: a hash of the part of its config that changes the mathematics."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from pydantic import ValidationError

from cosmos_ssl.config import Config
from cosmos_ssl.registry import shown

_IGNORED = (
    *("name", "output_dir", "profile", "evaluators", "checkpoints", "logging"),
    *("loader.workers", "loader.prefetch", "loader.error_budget", "loader.changed_data"),
    *("training.micro_batch_size", "training.attention", "training.compile", "training.deterministic", "training.device"),
    *("training.max_nonfinite_steps", "training.timeout_minutes", "training.trace_steps"),
)

_PATH_KEY = re.compile(r"^cache_?|(?:^|_)(?:data|root|folder|dir|path|file|url)s?$")

_ABSENT = object()

_PRECISION = "training.precision"


def identity(config: Config) -> str:
    """Hash of all that changes what is computed: not ranks, workers, micro-batch, backends, evaluators, log or paths.

    Paths of the data are left out as well: which samples they hold is the data set's own identity.
    """
    text = json.dumps(_mathematics(config.model_dump()), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def identity_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What of the identity differs between two trees (``LoadedConfig.tree``), as ``model.image.width: 768 -> 384``.

    Keys that one of them lacks, because another version wrote it, count with their defaults. A new ``training.precision: auto``
    goes on in the old one.
    """
    before, after = (dict(_leaves(_mathematics(_complete(tree)))) for tree in (old, new))
    if after.get(_PRECISION) == "auto":
        after[_PRECISION] = before.get(_PRECISION, "auto")
    return [
        f"{path}: {_word(before.get(path, _ABSENT))} -> {_word(after.get(path, _ABSENT))}"
        for path in dict.fromkeys((*before, *after))
        if before.get(path, _ABSENT) != after.get(path, _ABSENT)
    ]


def _word(value: Any) -> str:
    return "not given" if value is _ABSENT else shown(value)


def _complete(tree: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return Config.model_validate_json(json.dumps(tree)).model_dump()
    except ValidationError:  # a key that this version no longer has: compared as it stands
        return dict(tree)


def _mathematics(tree: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = json.loads(json.dumps(tree))
    for path in _IGNORED:
        *above, key = path.split(".")
        holder = kept
        for step in above:
            holder = holder.get(step) or {}
        holder.pop(key, None)
    loader, training = kept.get("loader"), kept.get("training")
    if loader and training and loader.get("lanes") is None:
        loader["lanes"] = max(n for n in range(1, 257) if training["batch_size"] % n == 0)
    kept["data"] = {key: value for key, value in (kept.get("data") or {}).items() if not _is_path(key, value)}
    pretrained = (kept.get("model") or {}).get("pretrained")
    if isinstance(pretrained, str):  # the file may move, another file is another run
        kept["model"]["pretrained"] = PurePosixPath(pretrained).name
    return kept


def _is_path(key: str, value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return bool(_PATH_KEY.search(key)) or any(isinstance(text, str) and ("/" in text or ".tar" in text) for text in texts)


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        inner = f"{path}.{key}" if path else key
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, inner)
        else:
            yield inner, value
