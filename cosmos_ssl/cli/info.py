"""``cosmos-ssl info``: versions, devices, attention backends and kernels, for bug reports."""

from __future__ import annotations

import argparse
import os
import platform
from collections import defaultdict
from typing import Any

from cosmos_ssl import API_VERSION, __version__, registry
from cosmos_ssl.cli.common import add_json, table, write_json
from cosmos_ssl.errors import EXIT_DONE


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser("info")
    add_json(parser)
    parser.set_defaults(run=_info)


def _info(arguments: argparse.Namespace) -> int:
    from cosmos_ssl.models.attention import backend_report

    facts = {"versions": _versions(), "devices": _devices(), "attention": backend_report()}
    facts |= {"kernels": _kernels(), "plugins": _plugins()}
    for title, rows in facts.items():
        print(title)
        print(table(list(rows.items()) or [("none", "")], indent="  "), end="")
    if arguments.json:
        write_json(arguments.json, facts)
    return EXIT_DONE


def _versions() -> dict[str, str]:
    from cosmos_ssl.engine.run_folder import LIBRARIES, library_versions

    found = {"cosmos-ssl": f"{__version__} (plugin API {API_VERSION})", "python": platform.python_version()}
    found |= {"system": platform.platform()}
    return found | {name: library_versions().get(name, "not installed") for name in LIBRARIES if name not in found}


def _devices() -> dict[str, str]:
    import torch

    found = {"cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"}
    if not torch.cuda.is_available():
        built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
        found["cuda"] = f"none (PyTorch was built for {built_for})"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        found[f"cuda:{index}"] = f"{device.name}, {memory}, capability {device.major}.{device.minor}"
    return found


def _kernels() -> dict[str, str]:
    import cosmos_ssl.models.fused  # noqa: F401  # makes its kernels known, as built-in augmenters do
    from cosmos_ssl.functional.kernels import kernels_report

    for record in registry.records():
        if record.own and record.group == "augmenters":
            registry.load(record)
    return kernels_report()


def _plugins() -> dict[str, str]:
    found = defaultdict(list)
    for record in registry.records():
        if not record.own:
            found[record.source].append(f"{record.group}/{record.name}")
    return {source: ", ".join(parts) for source, parts in found.items()}
