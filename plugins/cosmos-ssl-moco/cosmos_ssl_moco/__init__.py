"""MoCo for cosmos-ssl: contrast with a momentum encoder's keys, of the batch and of a queue of past ones; two recipes.

MoCo (arXiv 1911.05722), MoCo v3 (arXiv 2104.02057); of pictures and texts as ALBEF has it (arXiv 2107.07651).
"""

from pathlib import Path

RECIPE = str(Path(__file__).parent / "moco_text.yaml")
"""Pictures and texts, with queues: for ``cosmos_ssl.train`` and ``cosmos-launch --config``."""
PICTURES = str(Path(__file__).parent / "moco_v3.yaml")
"""MoCo v3 as published, of pictures alone."""
