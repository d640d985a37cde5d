"""What an option's type says of a run's identity: whether its value names a place, or changes nothing of what is
computed.
"""

from __future__ import annotations

import typing
from enum import Enum
from typing import Annotated, Any, TypeVar

T = TypeVar("T")


class Mark(Enum):
    """What stands in ``Annotated`` beside an option's type."""

    LOCATION = "location"
    ASIDE = "aside"


Location = Annotated[str, Mark.LOCATION]
"""The type of an option that says where something lies (``Location | None``, ``Location | list[Location]``).

What lies there is part of a run, where it lies is not: a file that was moved is the same, another one of the same name
is not.
"""

Aside = Annotated[T, Mark.ASIDE]
"""The type of an option that changes nothing of what is computed (``Aside[float]``): it may differ when a run goes on.
"""


def mark_of(annotation: Any) -> Mark | None:
    """The mark within a type, at any depth of it."""
    own = next((part for part in getattr(annotation, "__metadata__", ()) if isinstance(part, Mark)), None)
    return own or next((found for part in typing.get_args(annotation) if (found := mark_of(part))), None)
