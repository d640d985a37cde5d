"""Numbers with their bounds, as types of config keys and of parts' options (``layers: Few = 12``).

A number that is outside is refused before anything is built. The bounds are far from what is of use: they keep a
mistyped number from taking all memory, or from a computation that never ends. Every float of a config is finite.
"""

from __future__ import annotations

from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

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

Number = TypeVar("Number", bound=float)


class Curve(BaseModel, Generic[Number]):
    """A number that moves over a run from ``start`` to ``end``, in a config ``{type: linear, start: 0.04, end: 0.07}``.

    ``type`` is a schedule, and further keys are its options. As the type of an option, beside that of a number alone:
    ``temperature: Temperature | Curve[Temperature] = 0.1``.
    """

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    type: str
    start: Number
    end: Number
    _schedule: Any = PrivateAttr(None)

    @classmethod
    def model_parametrized_name(cls, params: tuple[Any, ...]) -> str:
        """The name that people read: without the bounds."""
        return cls.__name__

    @property
    def schedule(self) -> Any:
        """The ``Schedule`` that it follows: whoever builds the part has given it (``follow``)."""
        assert self._schedule is not None, "a curve without a schedule: curve.follow(schedule) comes first"
        return self._schedule

    def follow(self, schedule: Any) -> Curve[Number]:
        """This one, moved by ``schedule``."""
        self._schedule = schedule
        return self

    def at(self, progress: Any) -> float:
        """The number at this step (``Progress``)."""
        return self.end + (self.start - self.end) * float(self.schedule.left(progress))
