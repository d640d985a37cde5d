"""Kernels of parts' own on CUDA: each set is tried once on a device before its first use, and has a plain form."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch.autograd.graph import saved_tensors_hooks

_log = logging.getLogger("cosmos_ssl")


class Kernels:
    """A set of kernels that stands for operations of PyTorch's, to the same results but for rounding.

    ``what``: the operations, in words.
    ``trial``: runs all of them on a device in a dtype, forward and back; what it raises is why they do not run there.
    ``dtypes``: those that they serve; None: they do not ask.
    """

    known: list[Kernels] = []  # noqa: RUF012
    """Those of all modules that were imported."""

    def __init__(
        self,
        what: str,
        trial: Callable[[torch.device, torch.dtype], object],
        dtypes: tuple[torch.dtype, ...] | None = None,
    ) -> None:
        self.what, self.dtypes = what, dtypes
        self._trial = trial
        self._faults: dict[tuple[torch.device, torch.dtype | None], str | None] = {}
        self.known.append(self)

    def fault(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why they do not run on a CUDA device so, of which the log is told once; None where they do."""
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"not for {str(dtype).removeprefix('torch.')}"
        key = device, dtype if self.dtypes is not None else None
        if key not in self._faults:
            self._faults[key] = fault = self._tried(device, dtype)
            if fault is not None:
                _log.warning("kernels of %s do not run on %s, PyTorch's own do: %s", self.what, device, fault)
        return self._faults[key]

    def _tried(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if not torch.backends.cuda.is_built():
            return None  # tensors of a device that is not there stand for those of a build that has Triton
        return tried(lambda: self._trial(device, dtype), device.type)


def tried(trial: Callable[[], object], device_type: str) -> str | None:
    """Why this fails, apart from what is around it: the first line of the error; None where it does not."""
    try:
        own = saved_tensors_hooks(lambda x: x, lambda x: x)  # not those of a checkpointed block around this
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device_type, enabled=False), own:
            trial()
    except Exception as error:  # no Triton or compiler, a wheel of another torch, CUDA or GPU: it fails in many ways
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


def explain_kernels(choice: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return which kernels ``training.kernels`` is on a device, by what they compute, and why, for people."""
    if choice == "plain" or device.type != "cuda":
        return "plain" if choice == "plain" else f"plain (auto on {device.type})"
    device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
    faults = {each.what: each.fault(device, dtype) for each in Kernels.known}
    return "; ".join(f"{what}: " + ("fused" if why is None else f"plain ({why})") for what, why in faults.items())


def kernels_report() -> dict[str, str]:
    """The sets of kernels that are known, each with ``available`` or why it does not run here, for bug reports."""
    if not torch.cuda.is_available():
        return {each.what: "no CUDA device" for each in Kernels.known}
    device = torch.device("cuda", torch.cuda.current_device())
    return {each.what: each.fault(device, torch.float16) or "available" for each in Kernels.known}
