"""I-JEPA (arXiv 2301.08243) and MAE (arXiv 2111.06377) for cosmos-ssl: masks, the predictor of what is hidden, losses,
recipes.
"""

from pathlib import Path

RECIPES = {name: str(Path(__file__).parent / f"{name}.yaml") for name in ("ijepa", "mae")}
"""The recipes by method, for ``cosmos_ssl.train`` and ``cosmos-launch --config``."""
