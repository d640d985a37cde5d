"""One procedural scene: what is in it, how it looks, and true sentences about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Where: TypeAlias = NDArray[np.bool_]

# Hues a sixth of the circle apart, so that colour jitter rarely turns one into another
COLOURS = {
    "red": (220, 30, 30),
    "yellow": (235, 220, 40),
    "green": (40, 170, 50),
    "cyan": (50, 210, 220),
    "blue": (40, 60, 220),
    "purple": (180, 50, 200),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}
BACKGROUNDS = {"grey": (128, 128, 128), "sand": (196, 178, 132), "slate": (88, 100, 120), "rose": (196, 148, 152)}
TEXTURES = ("plain", "striped", "dotted", "checked")
PLACES = ("top left", "top right", "bottom left", "bottom right")
_NUMBERS = {2: "two", 3: "three", 4: "four"}
_FINE = 3
"""Points a pixel and side at which a shape's edge is sampled."""


def _cross(u: Array, v: Array) -> Where:
    return (np.minimum(abs(u), abs(v)) <= 0.33) & (np.maximum(abs(u), abs(v)) <= 0.95)


def _star(u: Array, v: Array) -> Where:
    """Five points: between a tip (radius 1) and a notch (0.4) the edge is straight."""
    sector = 2 * np.pi / 5
    angle = np.abs((np.arctan2(u, -v) + sector / 2) % sector - sector / 2)
    x, y = np.hypot(u, v) * np.cos(angle), np.hypot(u, v) * np.sin(angle)
    notch_x, notch_y = 0.4 * np.cos(sector / 2), 0.4 * np.sin(sector / 2)
    inside: Where = (x - 1) * notch_y <= (notch_x - 1) * y
    return inside


def _heart(u: Array, v: Array) -> Where:
    x, y = 1.15 * u, -1.15 * v + 0.1
    return (x**2 + y**2 - 1) ** 3 <= x**2 * y**3


SHAPES: Mapping[str, Callable[[Array, Array], Where]] = {
    "circle": lambda u, v: u**2 + v**2 <= 0.85,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) <= 0.8,
    "triangle": lambda u, v: (v <= 0.8) & (abs(u) <= (v + 1) * 0.53),
    "diamond": lambda u, v: abs(u) + abs(v) <= 1,
    "cross": _cross,
    "ring": lambda u, v: abs(np.hypot(u, v) - 0.75) <= 0.22,
    "star": _star,
    "heart": _heart,
}
CLASS_NAMES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
"""Names of the classes, by colour: ``cls`` is the number of the large object's class; a mask holds class number + 1, 0
for background.
"""


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: what it is, in which quarter of the picture, centre and radius in shares of the side."""

    colour: str
    shape: str
    texture: str
    place: int
    centre: tuple[float, float]
    radius: float
    large: bool

    @property
    def name(self) -> str:
        """Such as ``red circle``."""
        return f"{self.colour} {self.shape}"

    @property
    def full_name(self) -> str:
        """Such as ``large striped red circle``."""
        texture = f"{self.texture} " * (self.texture != "plain")
        return f"{'large' if self.large else 'small'} {texture}{self.name}"

    @property
    def label(self) -> int:
        """Number of its class in ``CLASS_NAMES``."""
        return CLASS_NAMES.index(self.name)


@dataclass(frozen=True, slots=True)
class Scene:
    """One large object and one to three small ones, each in a quarter of its own, on a lit background."""

    things: tuple[Thing, ...]
    background: str
    light: tuple[float, float]
    """How much brighter the background grows to the right and downwards, in grey levels."""


def make_scene(rng: np.random.Generator, classes: int = len(CLASS_NAMES)) -> Scene:
    """Draw a scene of the first ``classes``.

    No two of its objects share colour and shape, so that every sentence has one meaning.
    """
    count = int(rng.integers(2, 5))
    names = rng.choice(classes, count, replace=False)
    places = rng.permutation(4)[:count]
    things = []
    for i, (name, place) in enumerate(zip(names.tolist(), places.tolist(), strict=True)):
        colour, shape = CLASS_NAMES[name].split()
        radius = float(rng.uniform(0.2, 0.235) if i == 0 else rng.uniform(0.12, 0.15))
        room = 0.245 - radius
        x, y = (0.25 + 0.5 * side + float(rng.uniform(-room, room)) for side in (place % 2, place // 2))
        things.append(Thing(colour, shape, TEXTURES[rng.integers(4)], place, (x, y), radius, i == 0))
    light = (float(rng.uniform(-12, 12)), float(rng.uniform(-12, 12)))
    return Scene(tuple(things), list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))], light)


def draw(scene: Scene, size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The picture, uint8 [size, size, 3], and its mask, uint8 [size, size], exact at pixel centres."""
    ramp = (np.arange(size) + 0.5) / size - 0.5
    shade = scene.light[0] * ramp[None, :] + scene.light[1] * ramp[:, None]
    picture = np.array(BACKGROUNDS[scene.background], np.float64) + shade[..., None]
    mask = np.zeros((size, size), np.uint8)
    for thing in scene.things:
        _draw_thing(thing, picture, mask)
    return picture.round().astype(np.uint8), mask


def _draw_thing(thing: Thing, picture: Array, mask: NDArray[np.uint8]) -> None:
    size = len(mask)
    (x, y), radius = (c * size for c in thing.centre), thing.radius * size
    columns, rows = (slice(max(int(c - radius), 0), min(int(c + radius) + 1, size)) for c in (x, y))

    def axis(span: slice, centre: float, points: int) -> Array:
        places: Array = span.start + (np.arange((span.stop - span.start) * points) + 0.5) / points
        return (places - centre) / radius

    inside = SHAPES[thing.shape]
    u, v = np.meshgrid(axis(columns, x, _FINE), axis(rows, y, _FINE))
    cover = inside(u, v).reshape(len(u) // _FINE, _FINE, -1, _FINE).mean((1, 3))[..., None]
    u, v = np.meshgrid(axis(columns, x, 1), axis(rows, y, 1))
    paint = np.array(COLOURS[thing.colour], np.float64)
    faded = 0.45 * paint + 0.55 * 128
    colour = np.where(_texture(thing.texture, u, v)[..., None], faded, paint)
    picture[rows, columns] = cover * colour + (1 - cover) * picture[rows, columns]
    mask[rows, columns][inside(u, v)] = thing.label + 1


def _texture(name: str, u: Array, v: Array) -> Where:
    """Return where the colour is faded."""
    if name == "striped":
        return np.sin(7 * (u + v)) > 0.2
    if name == "dotted":
        return np.cos(8 * u) * np.cos(8 * v) > 0.4
    if name == "checked":
        return (np.sin(5 * u) > 0) ^ (np.sin(5 * v) > 0)
    return np.zeros(u.shape, np.bool_)


# ---------------------------------------------------------------------------- sentences


def caption(scene: Scene) -> str:
    """The caption that tells the scene apart: the large object in full, the others by name."""
    main, *others = scene.things
    rest = " and ".join(f"a {thing.name}" for thing in others)
    return f"a {main.full_name} at the {PLACES[main.place]} with {rest} on {scene.background}"


def sentences(scene: Scene, rng: np.random.Generator) -> dict[str, list[str]]:
    """Sentences that are all true of the scene, under the seven DreamLIP fields."""
    main, *others = scene.things
    names = [f"a {thing.name}" for thing in scene.things]
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    number = _NUMBERS[len(scene.things)]
    pairs = [(a, b) for a in scene.things for b in scene.things if a is not b]
    chosen = [pairs[i] for i in rng.permutation(len(pairs))[:4]]
    other = others[rng.integers(len(others))]
    return {
        "raw_caption": [caption(scene)],
        "shortIB_captions": [listed],
        "longIB_captions": [f"A {thing.full_name} is at the {PLACES[thing.place]}" for thing in scene.things],
        "shortSV_captions": [f"a {main.full_name} {_relation(main, other)} a {other.name}"],
        "longSV_captions": [f"The {a.name} is {_relation(a, b)} the {b.name}" for a, b in chosen],
        "shortLLA_captions": [f"{number} shapes on a {scene.background} background"],
        "longLLA_captions": [
            f"There are {number} shapes and the largest one is a {main.name}",
            *(f"The {t.shape} at the {PLACES[t.place]} is {t.colour} and {t.texture}" for t in scene.things),
        ],
    }


def _relation(a: Thing, b: Thing) -> str:
    """Return where a is, as seen from b."""
    over = {-1: ["above"], 0: [], 1: ["below"]}[a.place // 2 - b.place // 2]
    beside = {-1: ["left of"], 0: [], 1: ["right of"]}[a.place % 2 - b.place % 2]
    return " and ".join(over + beside)
