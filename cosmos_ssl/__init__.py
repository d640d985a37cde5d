"""COSMOS and other vision-language self-distillation methods as plugins on one exact, fast trainer.

    train(config, overrides=(), *, fork=None, writers=())                        train a config; the final metrics
    make_trainer(config, overrides=(), *, fork=None, writers=())                 the trainer that train runs, built
    load(checkpoint, which='student', *, device='cpu', overrides=(), trust_code=False)    a trained model
    evaluate(model, task, data=None, *, which=None, ...)                         the report of cosmos-ssl eval
    embed(model, data, output, *, what=None, ...)                                embeddings as Parquet or NumPy
    attend(model, images, texts=(), *, output, ...)                              a page of where words look in pictures
    export(model, form, output=None, *, which=None, ...)                         a folder for others, or the hub
    Trainer(assembly, config, run_dir, *, device=None, console=None, writers=(), signals=None)

They are imported when first used, so that ``import cosmos_ssl`` stays free of torch; ``help(cosmos_ssl.train)`` says
more. For writing parts: ``cosmos_ssl.api``, ``cosmos_ssl.functional``, ``cosmos_ssl.testing``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosmos_ssl.build import load, make_trainer, train
    from cosmos_ssl.build.evaluate import evaluate
    from cosmos_ssl.build.uses import attend, embed, export
    from cosmos_ssl.engine.trainer import Trainer

__version__ = "0.1.0"
API_VERSION = 2
"""Of the plugin contract: raised when it changes in meaning; parts written for the version before keep running."""

__all__ = ["Trainer", "__version__", "attend", "embed", "evaluate", "export", "load", "make_trainer", "train"]

_BUILD = "cosmos_ssl.build"
_HOMES = {"train": _BUILD, "load": _BUILD, "make_trainer": _BUILD, "Trainer": "cosmos_ssl.engine.trainer"}
_HOMES |= {"evaluate": f"{_BUILD}.evaluate", **dict.fromkeys(("attend", "embed", "export"), f"{_BUILD}.uses")}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cosmos_ssl' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
