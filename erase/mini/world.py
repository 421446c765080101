"""The world of the embedded model: captioned 64x64 drawings of shapes and of a wooden mannequin."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from erase.words import article

SIZE = 64
SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "moon", "house", "tree", "fish")
PERSONS = ("clothed person", "nude person")
OBJECTS = (*SHAPES, *PERSONS)
COLOURS = {
    "red": (222, 38, 38),
    "yellow": (248, 208, 24),
    "green": (44, 158, 66),
    "blue": (40, 84, 224),
    "purple": (126, 44, 168),
    "pink": (252, 140, 196),
}
STYLES = ("solid", "outline", "striped", "checked")
BACKGROUNDS = {"light": 236.0, "dark": 40.0}
SYNONYMS = {
    "circle": "disc",
    "square": "box",
    "moon": "crescent",
    "house": "cottage",
    "tree": "pine",
    "purple": "violet",
    "striped": "stripy",
    "checked": "chequered",
    "outline": "outlined",
    "solid": "filled",
    "nude": "naked",
    "person": "mannequin",
}
PREFIXES = ("a photo of", "a picture of", "a drawing of", "an image of")
WORDS = sorted(
    {*SHAPES, *COLOURS, *STYLES, *BACKGROUNDS, *SYNONYMS.values()}
    | set("a an the of on in with and photo picture drawing image background".split())
    | set(
        "person people man woman nude naked clothed wearing clothes shirt dressed style object shape painting".split()
    )
)

_SCALE = 4  # antialiasing: shapes are filled at four times the size and then averaged
_WOOD = np.array((206.0, 158.0, 104.0))
_TROUSERS = np.array((70.0, 82.0, 108.0))


@dataclass(frozen=True)
class Scene:
    """The content of a drawing. A clothed person has a colour (the shirt's) but no style; a nude person has neither."""

    object: str
    colour: str | None
    style: str | None
    background: str


def sample_scene(rng: np.random.Generator, without: str | None = None) -> Scene:
    """A random scene, uniform over objects, colours, styles and backgrounds.

    without: an object, colour or style that never occurs; "nude" leaves out the nude person.
    """
    while True:
        name = str(rng.choice(OBJECTS))
        colour = None if name == "nude person" else str(rng.choice(list(COLOURS)))
        style = None if name in PERSONS else str(rng.choice(STYLES))
        scene = Scene(name, colour, style, str(rng.choice(list(BACKGROUNDS))))
        if without not in (scene.object, scene.object.split()[0], colour, style) or without is None:
            return scene


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A random caption of the scene, with varying templates, attributes left out, and synonyms."""

    def word(name: str) -> str:
        return SYNONYMS[name] if name in SYNONYMS and rng.random() < 0.2 else name

    prefix = str(rng.choice(PREFIXES))
    if scene.object == "nude person":
        text = f"a {word('nude')} {word('person')}"
    elif scene.object == "clothed person":
        person, kind = word("person"), rng.random()
        if kind < 0.35:
            text = f"a {person} wearing {word(str(scene.colour))} clothes"
        elif kind < 0.8:
            text = f"a {person} wearing clothes"
        else:
            text = f"a clothed {person}"
    else:
        kind = rng.random()
        style = "" if kind < 0.15 or kind > 0.9 else f"{word(str(scene.style))} "
        colour = "" if 0.15 <= kind < 0.25 or kind > 0.9 else f"{word(str(scene.colour))} "
        text = f"{style}{colour}{word(scene.object)}"
        text = f"{article(text)} {text}"
    if rng.random() < 0.85:
        text = f"{prefix} {text}"
    if rng.random() < 0.25:
        text = f"{text} on a {scene.background} background"
    return text


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """An image of the scene, uint8, [64, 64, 3], with random size, place, tilt and shade."""
    radius = rng.uniform(19, 24) * (0.84 if scene.object in PERSONS else 1.0)
    centre = SIZE / 2 + rng.uniform(-4, 4, 2)
    tilt = np.deg2rad(rng.uniform(-10, 10))
    ground = BACKGROUNDS[scene.background] + rng.uniform(-8, 8) + rng.uniform(-6, 6, 3)
    slope = rng.uniform(-12, 12, 2)
    axis = np.linspace(-0.5, 0.5, SIZE)
    image = ground + slope[0] * axis[:, None, None] + slope[1] * axis[None, :, None]

    def place(points) -> list[tuple[float, float]]:
        x, y = np.asarray(points, dtype=float).T
        turned = np.stack([x * np.cos(tilt) - y * np.sin(tilt), x * np.sin(tilt) + y * np.cos(tilt)], axis=1)
        return [tuple(point) for point in (turned * radius + centre) * _SCALE]

    def paint(image: np.ndarray, cover: np.ndarray, colour: np.ndarray) -> np.ndarray:
        return image + cover[..., None] * (colour - image)

    if scene.object in PERSONS:
        shirt = None if scene.colour is None else np.array(COLOURS[scene.colour]) + rng.uniform(-8, 8, 3)
        wood = _WOOD + rng.uniform(-8, 8)
        for part, points in _MANNEQUIN:
            colour = wood
            if shirt is None and part == "joint":
                colour = wood * 0.55
            elif shirt is not None and part == "joint":
                continue
            elif shirt is not None and part in ("torso", "sleeve"):
                colour = shirt
            elif shirt is not None and part == "legs":
                colour = _TROUSERS
            image = paint(image, _fill(place(points)), colour)
    else:
        points, details = _OUTLINES[scene.object]
        colour = np.array(COLOURS[str(scene.colour)]) + rng.uniform(-8, 8, 3)
        if scene.style == "outline":
            image = paint(image, _stroke(place(points), 3.4), colour)
        else:
            image = paint(image, _fill(place(points)), _texture(str(scene.style), colour, rng))
        for detail in details:
            tone = colour if scene.style == "outline" else colour * 0.35
            image = paint(image, _fill(place(detail)), tone)
    image = image + rng.normal(0, 1.0, image.shape)
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def _fill(points: list[tuple[float, float]]) -> np.ndarray:
    """How much of each pixel the polygon covers: [64, 64], 0 to 1."""
    canvas = Image.new("L", (SIZE * _SCALE, SIZE * _SCALE))
    ImageDraw.Draw(canvas).polygon(points, fill=255)
    return np.asarray(canvas.reduce(_SCALE), dtype=float) / 255


def _stroke(points: list[tuple[float, float]], width: float) -> np.ndarray:
    canvas = Image.new("L", (SIZE * _SCALE, SIZE * _SCALE))
    closed = [*points, points[0], points[1]]
    ImageDraw.Draw(canvas).line(closed, fill=255, width=round(width * _SCALE), joint="curve")
    return np.asarray(canvas.reduce(_SCALE), dtype=float) / 255


def _texture(style: str, colour: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Colour of each pixel of a filled shape: [64, 64, 3]."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(float)
    if style == "striped":
        wave = np.sin((x + y) * (2 * np.pi / 15) + rng.uniform(0, 2 * np.pi))
    elif style == "checked":
        shift = rng.uniform(0, 2 * np.pi, 2)
        wave = 1.6 * np.sin(x * (np.pi / 8) + shift[0]) * np.sin(y * (np.pi / 8) + shift[1])
    else:
        return np.broadcast_to(colour, (SIZE, SIZE, 3))
    share = np.clip(0.5 + 1.7 * wave, 0, 1)[..., None]
    return colour + share * 0.78 * (255 - colour)


def _arc(centre: tuple[float, float], radius: float, start: float, stop: float, num: int = 24) -> np.ndarray:
    angle = np.deg2rad(np.linspace(start, stop, num))
    return np.stack([centre[0] + radius * np.cos(angle), centre[1] + radius * np.sin(angle)], axis=1)


def _star() -> np.ndarray:
    angle = np.deg2rad(-90 + 36 * np.arange(10))
    length = np.where(np.arange(10) % 2 == 0, 1.12, 0.5)
    return np.stack([length * np.cos(angle), length * np.sin(angle) + 0.08], axis=1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 2], axis=1) / 16


def _moon() -> np.ndarray:
    outer = _arc((0, 0), 1.0, 55, 305, 40)
    inner = _arc((0.46, 0), 0.83, 278, 82, 32)
    return np.concatenate([outer, inner])


def _fish() -> np.ndarray:
    body = np.concatenate([_arc((-0.2, 0.62), 1.14, -147, -48, 20), _arc((-0.2, -0.62), 1.14, 48, 147, 20)])
    nose = int(np.argmin(body[:, 0]))
    body = np.roll(body, -nose, axis=0)
    join = int(np.argmax(body[:, 0]))
    tail = np.array([(1.1, -0.62), (0.86, 0.0), (1.1, 0.62)])
    return np.concatenate([body[: join + 1], tail, body[join + 1 :]])


# Corners of each shape in units of its radius (x to the right, y down), and the parts drawn on top of it.
_OUTLINES: dict[str, tuple[object, list]] = {
    "circle": (_arc((0, 0), 1.0, 0, 352, 44), []),
    "square": ([(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)], []),
    "triangle": ([(0, -1.02), (1.08, 0.86), (-1.08, 0.86)], []),
    "diamond": ([(0, -1.15), (0.74, 0), (0, 1.15), (-0.74, 0)], []),
    "star": (_star(), []),
    "heart": (_heart(), []),
    "cross": (
        [
            *[(-0.34, -1), (0.34, -1), (0.34, -0.34), (1, -0.34), (1, 0.34), (0.34, 0.34)],
            *[(0.34, 1), (-0.34, 1), (-0.34, 0.34), (-1, 0.34), (-1, -0.34), (-0.34, -0.34)],
        ],
        [],
    ),
    "moon": (_moon(), []),
    "house": (
        [(0, -1.1), (1.1, -0.2), (0.8, -0.2), (0.8, 0.95), (-0.8, 0.95), (-0.8, -0.2), (-1.1, -0.2)],
        [[(-0.24, 0.25), (0.24, 0.25), (0.24, 0.95), (-0.24, 0.95)]],
    ),
    "tree": (
        [
            *[(0, -1.2), (0.62, -0.45), (0.34, -0.45), (0.84, 0.2), (0.5, 0.2), (1.0, 0.8), (0.22, 0.8), (0.22, 1.15)],
            *[(-0.22, 1.15), (-0.22, 0.8), (-1.0, 0.8), (-0.5, 0.2), (-0.84, 0.2), (-0.34, -0.45), (-0.62, -0.45)],
        ],
        [],
    ),
    "fish": (_fish(), [_arc((-0.68, -0.13), 0.11, 0, 330, 12)]),
}


def _limb(start: tuple[float, float], stop: tuple[float, float], width: float) -> np.ndarray:
    (x, y), (u, v) = start, stop
    angle = np.rad2deg(np.arctan2(v - y, u - x))
    return np.concatenate(
        [_arc(stop, width / 2, angle - 90, angle + 90, 8), _arc(start, width / 2, angle + 90, angle + 270, 8)]
    )


_MANNEQUIN: list[tuple[str, np.ndarray]] = [
    ("legs", _limb((-0.2, 0.25), (-0.32, 1.25), 0.3)),
    ("legs", _limb((0.2, 0.25), (0.32, 1.25), 0.3)),
    ("arm", _limb((-0.4, -0.42), (-0.82, 0.36), 0.2)),
    ("arm", _limb((0.4, -0.42), (0.82, 0.36), 0.2)),
    ("sleeve", _limb((-0.4, -0.42), (-0.64, 0.02), 0.27)),
    ("sleeve", _limb((0.4, -0.42), (0.64, 0.02), 0.27)),
    ("torso", np.array([(-0.46, -0.56), (0.46, -0.56), (0.34, 0.08), (0.36, 0.36), (-0.36, 0.36), (-0.34, 0.08)])),
    ("head", _arc((0, -0.96), 0.31, 0, 345, 24)),
    ("joint", _arc((-0.62, -0.02), 0.09, 0, 330, 12)),
    ("joint", _arc((0.62, -0.02), 0.09, 0, 330, 12)),
    ("joint", _arc((-0.26, 0.72), 0.11, 0, 330, 12)),
    ("joint", _arc((0.26, 0.72), 0.11, 0, 330, 12)),
]
