"""Batches on the device: the next one is copied there while this one computes."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import replace

import torch
from torch.profiler import record_function

from cosmos_ssl.data.loader import LoadedBatch


def on_device(batches: Generator[LoadedBatch], device: torch.device) -> Generator[LoadedBatch]:
    """Hand on the batches with their views on ``device``; ``batches`` is closed at the end.

    On CUDA the next one is on its way, by a stream of its own, before one is handed on. What fetching it raises is
    raised when its turn has come: the step before can still be made, and saved.
    """
    with closing(batches):
        if device.type != "cuda":
            for batch in batches:
                yield _moved(batch, device)
            return
        stream, computing, copied = torch.cuda.Stream(device), torch.cuda.current_stream(device), None
        while True:
            following, fault = None, None
            try:
                if (loaded := next(batches, None)) is not None:
                    stream.wait_stream(computing)  # it may still read memory that is free again
                    with torch.cuda.stream(stream):
                        following = _moved(loaded, device), stream.record_event()
            except Exception as error:
                fault = error
            if copied is not None:
                computing.wait_event(copied[1])
                yield copied[0]
            if fault is not None:
                raise fault
            if following is None:
                return
            copied = following


@record_function("copy to the device")
def _moved(batch: LoadedBatch, device: torch.device) -> LoadedBatch:
    return replace(batch, views=batch.views.to(device))
