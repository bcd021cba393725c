"""Draws labelled pictures in which only shape and texture together tell the class.

Each of the four class shapes occurs with two textures and each of the four textures on two shapes, so that the eight
classes form a closed chain: neither the shape nor the texture decides alone, and every colour is random. Around the
labelled object lie figures that must be ignored: a class shape without texture, a class texture on a shape that makes
no class with it (a triangle, or a square if it is striped), and small plain shapes.

Everything is drawn from signed distances (negative inside), evaluated in float64: picture (seed, index) is then the
same, pixel for pixel, wherever NumPy's random generator yields the same stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_CLASS_TABLE: tuple[tuple[str, str], ...] = (
    ("striped", "disc"),
    ("dotted", "disc"),
    ("dotted", "square"),
    ("checkered", "square"),
    ("checkered", "star"),
    ("zigzag", "star"),
    ("zigzag", "heart"),
    ("striped", "heart"),
)
CLASSES: tuple[str, ...] = tuple(f"{texture} {shape}" for texture, shape in _CLASS_TABLE)


@dataclass(frozen=True, eq=False)
class Picture:
    """One drawn picture.

    ``image`` is uint8 [size, size, 3] (RGB), ``mask`` is bool [size, size], true on the labelled object (its border
    included, its shadow not), and ``label`` is an index into ``CLASSES``.
    """

    image: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.bool_]
    label: int


@dataclass(frozen=True, eq=False)
class _Figure:
    """One shape to paint; lengths are fractions of the picture's side, angles are in radians."""

    shape: str
    texture: str
    centre: tuple[float, float]
    radius: float
    angle: float
    aspect: float
    period: float
    texture_angle: float
    phase: tuple[float, float]
    inks: tuple[Floats, Floats]
    border_ink: Floats
    border: float


def draw(seed: int, index: int, size: int = 224) -> Picture:
    """Draw picture ``index`` of seed ``seed`` at ``size`` x ``size`` pixels.

    The label is ``index % len(CLASSES)``. The scene depends on ``(seed, index)`` only; another ``size`` shows the same
    scene at another resolution (with other grain).

    Raises ValueError if ``seed`` or ``index`` is negative or ``size`` is below 16.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must be at least 0, got seed={seed}, index={index}")
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels, got {size}")
    generator = np.random.default_rng((seed, index))
    label = index % len(CLASSES)
    background_lightness = generator.uniform(0.3, 0.85)
    canvas = _draw_background(generator, size, background_lightness)
    labelled = _sample_object(generator, label, background_lightness)
    for figure in _sample_distractors(generator, labelled, background_lightness):
        _paint(canvas, figure)
    distance = _paint(canvas, labelled)
    canvas += generator.standard_normal((size, size)) * generator.uniform(0.0, 0.015)
    image = np.rint(np.clip(canvas, 0.0, 1.0) * 255.0).astype(np.uint8)
    return Picture(image=np.ascontiguousarray(image.transpose(1, 2, 0)), mask=distance < 0.0, label=label)


def draw_batch(
    seed: int, indices: Iterable[int], size: int = 224
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Draw several pictures: images uint8 [N, size, size, 3] and labels int64 [N]. Raises what ``draw`` raises."""
    chosen = list(indices)
    images = np.empty((len(chosen), size, size, 3), dtype=np.uint8)
    labels = np.empty(len(chosen), dtype=np.int64)
    for row, index in enumerate(chosen):
        picture = draw(seed, index, size)
        images[row], labels[row] = picture.image, picture.label
    return images, labels


# Shapes: signed distance from points (x, y) to an outline of about unit radius, negative inside.


def _length(x: Floats, y: Floats) -> Floats:
    return np.sqrt(x * x + y * y)  # several times faster than np.hypot; nothing here overflows


def _disc(x: Floats, y: Floats) -> Floats:
    return _length(x, y) - 0.92


def _square(x: Floats, y: Floats) -> Floats:
    return _box(x, y, 0.8, 0.8)


def _star(x: Floats, y: Floats) -> Floats:
    """Five points: reflect into one half-wedge, then take the distance to its only edge (after Inigo Quilez)."""
    tip, inner = 1.15, 0.55
    cosine, sine = math.cos(math.pi / 5), math.sin(math.pi / 5)
    x = np.abs(x)
    for direction in (1.0, -1.0):
        beyond = 2.0 * np.maximum(direction * x * cosine - y * sine, 0.0)
        x, y = x - direction * beyond * cosine, y + beyond * sine
    x, y = np.abs(x), y - tip
    edge_x, edge_y = inner * sine, inner * cosine - tip
    along = np.clip((x * edge_x + y * edge_y) / (edge_x**2 + edge_y**2), 0.0, 1.0)
    distance = _length(x - along * edge_x, y - along * edge_y)
    return np.copysign(distance, y * edge_x - x * edge_y) - 0.03


def _heart(x: Floats, y: Floats) -> Floats:
    """Two circular lobes over a rotated square (after Inigo Quilez), shifted so that the origin is in the middle."""
    scale = 1.75
    x, y = np.abs(x) / scale, 0.55 - y / scale
    lobe = _length(x - 0.25, y - 0.75) - math.sqrt(2.0) / 4.0
    middle = 0.5 * np.maximum(x + y, 0.0)
    below = np.minimum(_length(x, y - 1.0), _length(x - middle, y - middle))
    return scale * np.where(x + y > 1.0, lobe, np.copysign(below, x - y))


def _triangle(x: Floats, y: Floats) -> Floats:
    return np.maximum(math.sqrt(0.75) * np.abs(x) - 0.5 * y, y) - 0.52


def _cross(x: Floats, y: Floats) -> Floats:
    return np.minimum(_box(x, y, 1.0, 0.34), _box(x, y, 0.34, 1.0))


def _crescent(x: Floats, y: Floats) -> Floats:
    return np.maximum(_length(x, y) - 1.0, 0.8 - _length(x - 0.5, y))


def _pill(x: Floats, y: Floats) -> Floats:
    return _length(np.maximum(np.abs(x) - 0.6, 0.0), y) - 0.42


def _ring(x: Floats, y: Floats) -> Floats:
    return np.abs(_length(x, y) - 0.72) - 0.26


def _box(x: Floats, y: Floats, half_width: float, half_height: float) -> Floats:
    beyond_x, beyond_y = np.abs(x) - half_width, np.abs(y) - half_height
    outside = _length(np.maximum(beyond_x, 0.0), np.maximum(beyond_y, 0.0))
    return outside + np.minimum(np.maximum(beyond_x, beyond_y), 0.0) - 0.04


_CLASS_SHAPES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "disc": _disc,
    "square": _square,
    "star": _star,
    "heart": _heart,
}
_OTHER_SHAPES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "triangle": _triangle,
    "cross": _cross,
    "crescent": _crescent,
    "pill": _pill,
    "ring": _ring,
}
_SHAPES = _CLASS_SHAPES | _OTHER_SHAPES


# Textures: share of the second ink, 0 to 1, at points (u, v) counted in periods; `sharpness` is the period in pixels.


def _striped(u: Floats, v: Floats, sharpness: float) -> Floats:
    return np.clip((0.25 - np.abs(u - np.floor(u) - 0.5)) * sharpness + 0.5, 0.0, 1.0)


def _dotted(u: Floats, v: Floats, sharpness: float) -> Floats:
    row = np.floor(v)
    u = u + 0.5 * row  # every other row is shifted by half a dot
    return np.clip((0.33 - _length(u - np.floor(u) - 0.5, v - row - 0.5)) * sharpness + 0.5, 0.0, 1.0)


def _checkered(u: Floats, v: Floats, sharpness: float) -> Floats:
    # One cell is half a period; 0.75 keeps cells as wide as dots.
    first = _striped(0.75 * u, v, sharpness / 0.75)
    second = _striped(0.75 * v, u, sharpness / 0.75)
    return first + second - 2.0 * first * second


def _zigzag(u: Floats, v: Floats, sharpness: float) -> Floats:
    wave = 0.6 * u
    return _striped(0.85 * v + 1.5 * np.abs(wave - np.floor(wave) - 0.5), u, sharpness / 1.25)


_TEXTURES: dict[str, Callable[[Floats, Floats, float], Floats]] = {
    "striped": _striped,
    "dotted": _dotted,
    "checkered": _checkered,
    "zigzag": _zigzag,
}


# Scene: what is drawn where.


def _sample_object(generator: np.random.Generator, label: int, background_lightness: float) -> _Figure:
    texture, shape = _CLASS_TABLE[label]
    radius = generator.uniform(0.15, 0.26)
    margin = 1.15 * radius + 0.02
    centre = (generator.uniform(margin, 1.0 - margin), generator.uniform(margin, 1.0 - margin))
    return _sample_figure(generator, shape, texture, centre, radius, background_lightness)


def _sample_distractors(
    generator: np.random.Generator, labelled: _Figure, background_lightness: float
) -> list[_Figure]:
    """A plain class shape, a textured shape of no class, and up to two small plain shapes, clear of each other."""
    texture = _pick(generator, list(_TEXTURES))
    strangers = [shape for shape in _CLASS_SHAPES if (texture, shape) not in _CLASS_TABLE]
    textured_shape = _pick(generator, strangers if generator.random() < 0.3 else list(_OTHER_SHAPES))
    wanted = [
        (_pick(generator, list(_CLASS_SHAPES)), "plain", generator.uniform(0.09, 0.16)),
        (textured_shape, texture, generator.uniform(0.1, 0.17)),
    ]
    for _ in range(generator.integers(0, 3)):
        wanted.append((_pick(generator, list(_OTHER_SHAPES)), "plain", generator.uniform(0.04, 0.07)))
    placed = [labelled]
    for shape, texture, radius in wanted:
        centre = _free_place(generator, placed, radius)
        if centre is not None:
            placed.append(_sample_figure(generator, shape, texture, centre, radius, background_lightness))
    return placed[1:]


def _pick(generator: np.random.Generator, names: list[str]) -> str:
    return names[generator.integers(len(names))]


def _free_place(generator: np.random.Generator, placed: list[_Figure], radius: float) -> tuple[float, float] | None:
    for x, y in generator.uniform(0.6 * radius, 1.0 - 0.6 * radius, size=(60, 2)).tolist():
        if all(math.dist((x, y), other.centre) > 1.1 * (radius + other.radius) for other in placed):
            return x, y
    return None


def _sample_figure(
    generator: np.random.Generator,
    shape: str,
    texture: str,
    centre: tuple[float, float],
    radius: float,
    background_lightness: float,
) -> _Figure:
    # The first ink stands off the background and the second off the first: outline and texture can both be seen.
    room = (0.2, background_lightness - 0.2) if background_lightness > 0.57 else (background_lightness + 0.2, 0.95)
    first = generator.uniform(*room)
    second = first + generator.uniform(0.3, 0.45) * (1.0 if first < 0.58 else -1.0)
    period = max(generator.uniform(0.2, 0.34) * radius, generator.uniform(0.042, 0.05))
    return _Figure(
        shape=shape,
        texture=texture,
        centre=centre,
        radius=radius,
        angle=generator.uniform(0.0, 2.0 * math.pi),
        aspect=generator.uniform(0.94, 1.06),
        period=period,
        texture_angle=generator.uniform(0.0, 2.0 * math.pi),
        phase=(generator.random(), generator.random()),
        inks=(_sample_colour(generator, first, 0.17), _sample_colour(generator, second, 0.17)),
        border_ink=_sample_colour(generator, 0.97 if background_lightness < 0.7 else 0.25, 0.02),
        border=generator.uniform(0.008, 0.014) if generator.random() < 0.6 else 0.0,
    )


def _sample_colour(generator: np.random.Generator, lightness: float, chroma: float) -> Floats:
    """Colour of the given OKLab lightness, random hue and at most the given chroma: sRGB [3, 1, 1] in 0 to 1."""
    hue, chroma = generator.uniform(0.0, 2.0 * math.pi), chroma * generator.uniform(0.5, 1.0)
    a, b = chroma * math.cos(hue), chroma * math.sin(hue)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    return np.array([min(max(channel, 0.0), 1.0) ** (1.0 / 2.2) for channel in linear]).reshape(3, 1, 1)


# Painting.


def _draw_background(generator: np.random.Generator, size: int, lightness: float) -> Floats:
    """Gradient, clouds, soft blobs, a faint texture and thin lines, as float64 [3, size, size] in about 0 to 1."""
    y, x = _pixel_grid(0, size, 0, size, size)
    start, end = (_sample_colour(generator, lightness + shift, 0.09) for shift in (-0.06, 0.06))
    angle = generator.uniform(0.0, 2.0 * math.pi)
    slope = 0.5 + 0.7 * ((x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle))
    canvas = start + slope * (end - start)
    canvas += _clouds(generator, size) * generator.uniform(0.02, 0.1)
    for _ in range(generator.integers(1, 4)):
        centre_x, centre_y, radius = generator.random(), generator.random(), generator.uniform(0.15, 0.4)
        inside = np.clip(1.0 - ((x - centre_x) ** 2 + (y - centre_y) ** 2) / radius**2, 0.0, 1.0) ** 2
        _blend(canvas, 0.5 * inside, _sample_colour(generator, lightness, 0.1))
    if generator.random() < 0.5:
        _paint_faint_texture(generator, canvas, x, y)
    for _ in range(generator.integers(1, 5)):
        angle, offset = generator.uniform(0.0, 2.0 * math.pi), generator.uniform(-0.5, 0.5)
        distance = np.abs((x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle) - offset)
        coverage = np.clip((generator.uniform(0.002, 0.007) - distance) * size + 0.5, 0.0, 1.0)
        tone = lightness + generator.choice((-0.15, 0.15))
        _blend(canvas, coverage * generator.uniform(0.3, 0.8), _sample_colour(generator, tone, 0.1))
    return canvas


def _paint_faint_texture(generator: np.random.Generator, canvas: Floats, x: Floats, y: Floats) -> None:
    texture = _TEXTURES[_pick(generator, list(_TEXTURES))]
    angle, period = generator.uniform(0.0, 2.0 * math.pi), generator.uniform(0.05, 0.12)
    cosine, sine = math.cos(angle) / period, math.sin(angle) / period
    pattern = texture(x * cosine + y * sine, y * cosine - x * sine, period * canvas.shape[1])
    canvas += (pattern - 0.5) * generator.uniform(0.02, 0.07)


def _clouds(generator: np.random.Generator, size: int) -> Floats:
    """Smooth noise [3, size, size] in -1 to 1: a coarse random grid, interpolated."""
    knots = 6
    grid = generator.uniform(-1.0, 1.0, size=(3, knots, knots))
    position = (np.arange(size) + 0.5) / size * (knots - 1)
    weights = np.maximum(1.0 - np.abs(position[:, None] - np.arange(knots)), 0.0)  # [size, knots]
    weights = weights * weights * (3.0 - 2.0 * weights)
    return weights @ grid @ weights.T


def _paint(canvas: Floats, figure: _Figure) -> Floats:
    """Paint a figure and its shadow into ``canvas`` [3, size, size]; returns its signed distance [size, size].

    The distance is in fractions of the side, and infinite where it was not worked out, far from the figure.
    """
    size = canvas.shape[1]
    reach = 1.3 * figure.radius + 0.04
    left, right = (_clamp_pixel(figure.centre[0] + side * reach, size) for side in (-1.0, 1.0))
    top, bottom = (_clamp_pixel(figure.centre[1] + side * reach, size) for side in (-1.0, 1.0))
    window = canvas[:, top:bottom, left:right]
    y, x = _pixel_grid(top, bottom, left, right, size)
    x, y = x - figure.centre[0], y - figure.centre[1]
    distance = _figure_distance(figure, x, y)
    shadow = np.clip(0.5 - _figure_distance(figure, x - 0.01, y - 0.014) / 0.03, 0.0, 1.0)
    window *= 1.0 - 0.35 * shadow * shadow
    _blend(window, np.clip(0.5 - distance * size, 0.0, 1.0), figure.border_ink)
    inside = np.clip(0.5 - (distance + figure.border) * size, 0.0, 1.0)
    _blend(window, inside, _figure_colours(figure, x, y, size))
    whole = np.full((size, size), np.inf)
    whole[top:bottom, left:right] = distance
    return whole


def _figure_distance(figure: _Figure, x: Floats, y: Floats) -> Floats:
    cosine, sine = math.cos(figure.angle) / figure.radius, math.sin(figure.angle) / figure.radius
    along, across = x * cosine + y * sine, y * cosine - x * sine
    return _SHAPES[figure.shape](along * figure.aspect, across / figure.aspect) * figure.radius


def _figure_colours(figure: _Figure, x: Floats, y: Floats, size: int) -> Floats:
    """Ink of every point, [3, height, width], a little lighter towards the top left."""
    first, second = figure.inks
    light = 1.0 - 0.09 * (x + y) / figure.radius
    if figure.texture == "plain":
        return first * light
    cosine, sine = math.cos(figure.texture_angle) / figure.period, math.sin(figure.texture_angle) / figure.period
    u, v = x * cosine + y * sine + figure.phase[0], y * cosine - x * sine + figure.phase[1]
    share = _TEXTURES[figure.texture](u, v, figure.period * size)
    return (first + share * (second - first)) * light


def _blend(canvas: Floats, coverage: Floats, colour: Floats) -> None:
    canvas += coverage * (colour - canvas)


def _clamp_pixel(position: float, size: int) -> int:
    return min(max(int(position * size), 0), size)


def _pixel_grid(top: int, bottom: int, left: int, right: int, size: int) -> tuple[Floats, Floats]:
    """Pixel centres as fractions of the side: rows [height, 1] and columns [1, width]."""
    return (np.arange(top, bottom)[:, None] + 0.5) / size, (np.arange(left, right)[None, :] + 0.5) / size
