"""A script of one's own: trains with a class and a writer, as one of the ranks that torchrun has started."""

import json
import sys
from pathlib import Path

from cosmos_ssl import make_trainer
from cosmos_ssl.api import Loss, LossOutput, Need
from cosmos_ssl.testing.examples import small_config


class Spread(Loss):
    """Spreads pictures."""

    def __init__(self, spec):
        super().__init__()

    def requires(self):
        return [Need(modality="image", group="global", gathered=True)]

    def forward(self, ctx):
        x = ctx.gathered["student"].image["global"].unit
        return LossOutput(terms={"spread": (x[0] @ x[1].T).exp().mean()})


class Rows:
    """A writer that keeps the losses."""

    def __init__(self):
        self.losses = []

    def scalars(self, step, values):
        if "loss" in values:
            self.losses.append(values["loss"])

    def pictures(self, step, pictures):
        pass

    sync = close = lambda self: None


def own_config(folder, name):
    """A small run with the class among its losses."""
    return {**small_config(folder, 2, {"losses": {"spread": {"type": Spread}}}), "output_dir": f"{folder}/{name}"}


if __name__ == "__main__":
    rows = Rows()
    metrics = make_trainer(own_config(sys.argv[1], "script"), writers=[rows]).train()
    if rows.losses:
        Path(sys.argv[1], "script.json").write_text(json.dumps([metrics["loss/spread"], *rows.losses]))
