"""Captioned scenes of one or two shapes, drawn from a seed, and a reader that checks an image against a caption.

A scene is one object at a named place ("a small red circle on the left") or two objects in a spatial relation
("a small red circle left of a large blue square"). The reader knows nothing of the drawing: it finds the objects
from the pixels alone, so that it can judge what a model draws.
"""

import hashlib
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 165, 70),
    "blue": (45, 80, 220),
    "yellow": (240, 205, 40),
    "purple": (150, 60, 185),
    "cyan": (40, 190, 210),
}
SHAPES = ("circle", "square", "triangle")
# Side of the square of equal area, in units of the image's side: every shape of a size covers the same area.
SIZES = {"small": 0.24, "large": 0.38}
PLACES = {
    "on the left": (0.26, 0.5),
    "on the right": (0.74, 0.5),
    "at the top": (0.5, 0.26),
    "at the bottom": (0.5, 0.74),
    "in the centre": (0.5, 0.5),
}
RELATIONS = ("left of", "right of", "above", "below")
BACKGROUND = (228, 228, 224)

_OBJECT = rf"an? ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_ONE = re.compile(rf"{_OBJECT} ({'|'.join(PLACES)})")
_TWO = re.compile(rf"{_OBJECT} ({'|'.join(RELATIONS)}) {_OBJECT}")


@dataclass(frozen=True)
class Object:
    """One shape. `x`, `y`: its bounding box's centre, in units of the image's side, from the top left corner."""

    size: str
    colour: str
    shape: str
    x: float
    y: float

    @property
    def words(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One object at a place of `PLACES`, or two objects of different colours in a relation of `RELATIONS`."""

    objects: tuple[Object, ...]
    where: str

    @property
    def caption(self) -> str:
        if len(self.objects) == 1:
            return f"{self.objects[0].words} {self.where}"
        return f"{self.objects[0].words} {self.where} {self.objects[1].words}"


@dataclass(frozen=True)
class Agreement:
    """What of a caption an image shows; each is true only if it holds for every object named."""

    colour: bool
    shape: bool
    size: bool
    position: bool

    def __bool__(self) -> bool:
        return self.colour and self.shape and self.position


def make_scene(seed: int, index: int) -> Scene:
    """Scene number `index` of the series `seed`: a pure function of the two."""
    rng = np.random.default_rng((seed, index))
    jitter = rng.uniform(-0.04, 0.04, size=(2, 2))
    sizes = rng.choice(list(SIZES), size=2)
    colours = rng.choice(list(COLOURS), size=2, replace=False)
    shapes = rng.choice(SHAPES, size=2)
    if rng.random() < 0.5:
        where = str(rng.choice(list(PLACES)))
        centres = [PLACES[where]]
    else:
        where = str(rng.choice(RELATIONS))
        first, second = {
            "left of": ((0.26, 0.5), (0.74, 0.5)),
            "right of": ((0.74, 0.5), (0.26, 0.5)),
            "above": ((0.5, 0.26), (0.5, 0.74)),
            "below": ((0.5, 0.74), (0.5, 0.26)),
        }[where]
        centres = [first, second]
    objects = tuple(
        Object(str(sizes[i]), str(colours[i]), str(shapes[i]), x + jitter[i, 0], y + jitter[i, 1])
        for i, (x, y) in enumerate(centres)
    )
    return Scene(objects, where)


def is_held_out(caption: str) -> bool:
    """Whether `caption` belongs to the test split: one in ten, by its text, so that no test caption is trained on."""
    return hashlib.sha256(caption.encode()).digest()[0] % 10 == 0


def draw(scene: Scene, image_size: int = 32) -> Image.Image:
    """The scene as an RGB image of `image_size` × `image_size` pixels, anti-aliased."""
    scale = 8
    canvas = Image.new("RGB", (image_size * scale, image_size * scale), BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    for item in scene.objects:
        points = _outline(item.shape, SIZES[item.size]) + np.array([item.x, item.y])
        pen.polygon([tuple(p) for p in points * image_size * scale], fill=COLOURS[item.colour])
    return canvas.resize((image_size, image_size), Image.Resampling.BOX)


def _outline(shape: str, side: float) -> np.ndarray:
    """Corners (N, 2) of a shape with the area side², its bounding box centred on 0."""
    if shape == "square":
        half = side / 2
        return np.array([(-half, -half), (half, -half), (half, half), (-half, half)])
    if shape == "triangle":  # isosceles, as high as wide: area w²/2
        half = side * np.sqrt(2) / 2
        return np.array([(0.0, -half), (half, half), (-half, half)])
    radius = side / np.sqrt(np.pi)
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def read(image: Image.Image) -> list[Object]:
    """Objects found in an RGB image, largest first: colour by unmixing each pixel, shape by best-fitting outline."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64) - BACKGROUND
    height, width, _ = pixels.shape
    # A pixel that an object covers in part lies on the line from the background (0) to the object's colour (1), so its
    # colour is that of the nearest line. Nearest colours would see a third one in the rim of every object.
    axes = np.array(list(COLOURS.values()), dtype=np.float64) - BACKGROUND
    along, lengths = pixels @ axes.T, (axes**2).sum(axis=1)
    coverage = np.clip(along / lengths, 0, 1)  # (H, W, colours)
    nearest = (coverage * (coverage * lengths - 2 * along)).argmin(axis=-1)  # squares of distances, less the pixel's
    covered = np.take_along_axis(coverage, nearest[..., None], axis=-1)[..., 0] >= 0.5
    enough = 0.012 * height * width
    masks = {number: covered & (nearest == number) for number in range(len(axes))}
    parts = {number: _largest_component(mask) for number, mask in masks.items() if mask.sum() >= enough}
    found = []
    for number in sorted(parts, key=lambda n: -parts[n].sum()):
        if parts[number].sum() >= enough:
            found.append(_fit(coverage[..., number] * _grow(parts[number]), list(COLOURS)[number]))
    return found


def _grow(mask: np.ndarray) -> np.ndarray:
    """The mask and its four-neighbours."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


def _largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest four-connected part of a boolean mask (H, W)."""
    rest, best = mask.copy(), np.zeros_like(mask)
    while rest.any():
        part = np.zeros_like(mask)
        part[tuple(np.argwhere(rest)[0])] = True
        while True:
            grown = _grow(part) & rest
            if (grown == part).all():
                break
            part = grown
        rest &= ~part
        if part.sum() > best.sum():
            best = part
    return best


def _fit(coverage: np.ndarray, colour: str) -> Object:
    """The shape whose outline, of the same area and centre of mass, differs least from `coverage` (H, W) in [0, 1]."""
    height, width = coverage.shape
    area = coverage.sum()
    rows, columns = np.mgrid[0:height, 0:width] + 0.5
    y, x = (coverage * rows).sum() / area, (coverage * columns).sum() / area
    side = np.sqrt(area / (height * width))
    best_error, best = np.inf, None
    for shape in SHAPES:
        # A triangle's centre of mass lies one sixth of its height below its bounding box's centre.
        drop = side * np.sqrt(2) / 6 if shape == "triangle" else 0.0
        item = Object("", colour, shape, x / width, y / height - drop)
        outline = (_outline(shape, side) + np.array([item.x, item.y])) * (width, height) * 4
        stencil = Image.new("L", (width * 4, height * 4))
        ImageDraw.Draw(stencil).polygon([tuple(p) for p in outline], fill=255)
        drawn = np.asarray(stencil.resize((width, height), Image.Resampling.BOX)) / 255
        error = np.abs(drawn - coverage).sum()
        if error < best_error:
            best_error, best = error, item
    size = min(SIZES, key=lambda name: abs(SIZES[name] - side))
    return Object(size, best.colour, best.shape, best.x, best.y)


def parse(caption: str) -> Scene:
    """The scene a caption names, with the places' nominal coordinates.

    Raises:
        ValueError: the caption is not one that `make_scene` writes.
    """
    if match := _ONE.fullmatch(caption):
        size, colour, shape, where = match.groups()
        return Scene((Object(size, colour, shape, *PLACES[where]),), where)
    if match := _TWO.fullmatch(caption):
        size_a, colour_a, shape_a, where, size_b, colour_b, shape_b = match.groups()
        nowhere = (0.5, 0.5)
        return Scene((Object(size_a, colour_a, shape_a, *nowhere), Object(size_b, colour_b, shape_b, *nowhere)), where)
    raise ValueError(f"caption {caption!r} is not of the form 'a small red circle on the left' or '… left of …'")


def compare(image: Image.Image, caption: str) -> Agreement:
    """What of `caption` can be read back from `image`."""
    wanted = parse(caption)
    by_colour = {item.colour: item for item in read(image)}
    if by_colour.keys() != {item.colour for item in wanted.objects}:
        return Agreement(False, False, False, False)
    pairs = [(item, by_colour[item.colour]) for item in wanted.objects]
    if len(pairs) == 1:
        _, seen = pairs[0]
        nearest = min(PLACES, key=lambda name: np.hypot(seen.x - PLACES[name][0], seen.y - PLACES[name][1]))
        position = nearest == wanted.where
    else:
        a, b = pairs[0][1], pairs[1][1]
        across, down = b.x - a.x, b.y - a.y
        seen_relation = (
            ("left of" if across > 0 else "right of") if abs(across) > abs(down) else ("above" if down > 0 else "below")
        )
        position = seen_relation == wanted.where
    return Agreement(
        colour=True,
        shape=all(named.shape == seen.shape for named, seen in pairs),
        size=all(named.size == seen.size for named, seen in pairs),
        position=position,
    )


def matches(image: Image.Image, caption: str) -> bool:
    """Whether `image` shows the colours, shapes and positions that `caption` names, and nothing else."""
    return bool(compare(image, caption))
