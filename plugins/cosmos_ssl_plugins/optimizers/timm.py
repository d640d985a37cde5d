"""Any optimiser of timm, by its name."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm import optim

from cosmos_ssl.api import Optimizer, Spec
from cosmos_ssl_plugins.optimizers.by_name import Options, build, check_options, nearest


class Timm(Optimizer):
    """An optimiser by its timm name (``lion``, ``lamb``, ``muon``, ``adan``, ...).

    ``name``: its name, as ``timm.optim.list_optimizers()`` has it.
    ``options``: arguments of its constructor, such as ``{betas: [0.9, 0.99]}``.

    Raises ValueError for a name or options that timm does not know, and for optimisers that need second derivatives, a
    package that is not installed, or randomness of their own, with which no run goes on exactly.
    """

    def __init__(self, spec: Spec, *, name: str, options: Options | None = None) -> None:
        known = optim.list_optimizers()
        if name not in known:
            raise ValueError(f"name: timm has no optimiser '{name}'.{nearest(name, known)}")
        info = optim.get_optimizer_info(name)
        if info.second_order:
            raise ValueError(f"name: {name} needs second derivatives, which a step does not compute. Take another one")
        try:
            cls = optim.get_optimizer_class(name, bind_defaults=False)
        except Exception as error:
            raise ValueError(f"name: {name} needs a package that is not installed: {error}") from error
        if cls.__name__ == "Kron":
            raise ValueError(f"name: {name} draws by itself, and no run would go on exactly. Take another one")
        self.name, self.options = name, options or {}
        check_options(cls, name, self.options)

    def make(self, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
        """With timm's defaults for this name."""
        return build(partial(optim.create_optimizer_v2, opt=self.name), self.name, groups, self.options)
