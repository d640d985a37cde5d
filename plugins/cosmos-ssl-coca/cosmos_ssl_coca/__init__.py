"""CoCa (arXiv 2205.01917) for cosmos-ssl: a multimodal decoder, its captioning loss, a recipe."""

from pathlib import Path

RECIPE = str(Path(__file__).parent / "coca.yaml")
"""The recipe, for ``cosmos_ssl.train`` and ``cosmos-launch --config``."""
