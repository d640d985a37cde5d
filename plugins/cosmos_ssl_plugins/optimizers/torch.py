"""Any optimiser of ``torch.optim``, by its class."""

from __future__ import annotations

from typing import Any

import torch

from cosmos_ssl.api import Optimizer, Spec
from cosmos_ssl_plugins.optimizers.by_name import Options, build, check_options, nearest

REFUSED = {
    "LBFGS": "calls the model several times a step, which the engine does not do",
    "SparseAdam": "takes sparse gradients alone, and no part has any",
}


class Torch(Optimizer):
    """An optimiser by the name of its class in ``torch.optim`` (``SGD``, ``NAdam``, ``RAdam``, ...).

    ``name``: the class.
    ``options``: arguments of its constructor, such as ``{momentum: 0.9}``.

    Raises ValueError for a name or options that torch does not know, and for ``LBFGS`` and ``SparseAdam``.
    """

    def __init__(self, spec: Spec, *, name: str, options: Options | None = None) -> None:
        base = torch.optim.Optimizer
        known = {key: cls for key, cls in vars(torch.optim).items() if isinstance(cls, type) and issubclass(cls, base)}
        if name not in known or known[name] is base:
            raise ValueError(f"name: torch.optim has no optimiser '{name}'.{nearest(name, list(known))}")
        if name in REFUSED:
            raise ValueError(f"name: {name} {REFUSED[name]}. Take another one")
        self.name, self.cls, self.options = name, known[name], options or {}
        check_options(self.cls, name, self.options)

    def make(self, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
        """The class."""
        return build(self.cls, self.name, groups, self.options)
