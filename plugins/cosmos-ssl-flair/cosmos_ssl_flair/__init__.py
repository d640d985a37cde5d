"""FLAIR (arXiv 2412.03561) for cosmos-ssl: text-conditioned attention pooling, its losses, its retrieval score, a
recipe.
"""

from pathlib import Path

RECIPE = str(Path(__file__).parent / "flair.yaml")
"""The recipe, for ``cosmos_ssl.train`` and ``cosmos-launch --config``."""
