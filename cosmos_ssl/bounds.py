"""Numbers with their bounds, as types of config keys and of parts' options (``layers: Few = 12``).

A number that is outside is refused before anything is built. The bounds are far from what is of use: they keep a
mistyped number from taking all memory, or from a computation that never ends. Every float of a config is finite.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Count = Annotated[int, Field(ge=1, le=10**9)]
"""Samples, steps, epochs."""
Whole = Annotated[int, Field(ge=0, le=10**9)]
"""A count that may be zero."""
Few = Annotated[int, Field(ge=1, le=1024)]
"""Layers, views, threads."""
Size = Annotated[int, Field(ge=1, le=1 << 16)]
"""Widths, heads, tokens."""
Pixels = Annotated[int, Field(ge=1, le=1 << 13)]
"""Sides of pictures and patches."""
Share = Annotated[float, Field(ge=0, le=1)]
"""Probabilities, momenta, shares of a picture's area."""
Strength = Annotated[float, Field(ge=0, le=1000)]
"""Factors, learning rates, lengths of time in epochs."""
Temperature = Annotated[float, Field(ge=1e-3, le=1000)]
"""What logits are divided by."""
