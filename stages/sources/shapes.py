"""`shapes`: scenes rendered from a seed, for a laboratory without network or files.

Every image shows one object on a cluttered ground. Its shape is the class label; its segmentation
mask and bounding box come with it. Colours, textures, pose, size, proportions, background, clutter,
light and noise are drawn independently of the class, so that nothing but shape gives the label
away, and pixels at fixed places say little about it. Some strokes lie over the object: the mask is
what remains visible.

An image is a pure function of (seed, split, index, options, size): its numbers come from
`kit.keyed`, never from a generator that advances. Objects are sampled SUPER x SUPER times per
pixel; strokes have an analytic edge one pixel wide.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from stages.sources import Found, Listing, Sample
from workflow import checks

ARGUMENT = None
GIVES = {"labels", "masks", "boxes"}

SUPER = 3
POINTS = 1 << 19  # sample points rendered at once: bounds memory, about 60 MB
SHAPES = ["disk", "square", "triangle", "star", "cross", "ring"]
SHAPES += ["heart", "crescent", "bar", "arrow", "ell", "fan"]
STROKES = 6  # the last two lie over the object


@dataclass(frozen=True)
class Config:
    train: int = 8000
    val: int = 1000
    test: int = 2000
    classes: int = 10  # the first so many of SHAPES, below
    clutter: float = 0.5  # probability of each of the six strokes
    turn: float = 30.0  # largest rotation of the object from upright, degrees
    lighter: bool = True  # than its ground; False: lighter or darker, much harder to learn

    def __post_init__(self):
        checks.within(self, "[1, inf)", "train")
        checks.within(self, "[0, inf)", "val", "test")
        checks.within(self, "[2, 12]", "classes")
        checks.within(self, "[0, 1]", "clutter")
        checks.within(self, "[0, 180]", "turn")


def read(argument: str | None, config: Config, data: dict) -> Found:
    """The splits of `config`, rendered at the size in which they are stored. A split of 0 images
    does not exist.
    """
    size = data["store_size"] or data["image_size"]
    splits = {}
    for split in ("train", "val", "test"):
        if count := getattr(config, split):
            labels = label(np.arange(count), config.classes)
            splits[split] = Listing(
                labels, _reader(data["seed"], split, size, config), masks=True, boxes=True
            )
    return Found(splits, SHAPES[: config.classes])


def label(index: np.ndarray, classes: int) -> np.ndarray:
    """Class of each image: they take turns, so every split is balanced."""
    return (index % classes).astype(np.int64)


def _reader(seed: int, split: str, size: int, config: Config):
    at_once = max(1, POINTS // (size * SUPER) ** 2)

    def samples(rows: np.ndarray) -> Iterator[Sample]:
        for begin in range(0, len(rows), at_once):
            index = rows[begin : begin + at_once]
            images, masks = render(seed, split, index, size, config)
            for row, image, mask in zip(index.tolist(), images, masks, strict=True):
                box = extent(mask)
                yield Sample(
                    f"{split}/{row:07d}.png",
                    image,
                    mask,
                    (box + (int(mask.max()) - 1,),) if box else (),
                )

    return samples


def extent(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """Smallest box (x, y, w, h) in pixels around the non-zero part of a mask; None if all of it is
    zero.
    """
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(ys):
        return None
    return int(xs[0]), int(ys[0]), int(xs[-1] - xs[0] + 1), int(ys[-1] - ys[0] + 1)


def render(
    seed: int, split: str, index: np.ndarray, size: int, config: Config
) -> tuple[np.ndarray, np.ndarray]:
    """Images number `index` (B,) -> pixels uint8 (B, size, size, 3), masks uint8 (B, size, size),
    which are class + 1 on the object.
    """
    import torch

    from stages.kit import keyed

    index = np.asarray(index, np.int64)
    rows, labels = torch.as_tensor(index), label(index, config.classes)
    draw = _Draws(keyed.uniform(keyed.key(seed, "shapes", split), rows, 192).numpy())
    grid, fine = _centres(size), _centres(size * SUPER)

    paint, ground = _colours(draw, config.lighter)
    # the ground has a pose of its own
    u, v = _frame(draw(0, 2 * np.pi), draw(-1, 1, 2), draw(1, 1.4), grid)
    image = _blend(ground[:, 0], ground[:, 1], _texture(draw, u, v))

    strokes = [
        _stroke(draw, grid, thin=k >= STROKES - 2, clutter=config.clutter) for k in range(STROKES)
    ]
    for cover, colour in strokes[:-2]:
        image += cover[..., None] * (colour[:, None, None] - image)

    turn, centre = draw(-1, 1) * np.float32(np.radians(config.turn)), draw(-0.27, 0.27, 2)
    radius, stretch = draw(0.4, 0.62), draw(0.88, 1.14)
    u, v = _frame(turn, centre, radius, fine, stretch)
    cover = np.empty((len(labels), size, size), np.float32)
    for k in np.unique(labels):
        cover[labels == k] = _average(_INSIDE[k](u[labels == k], v[labels == k]))
    u, v = _frame(turn, centre, radius, grid)
    image += cover[..., None] * (_blend(paint[:, 0], paint[:, 1], _texture(draw, u, v)) - image)

    visible = cover
    for over, colour in strokes[-2:]:
        image += over[..., None] * (colour[:, None, None] - image)
        visible = visible * (1 - over)
    masks = np.where(visible >= 0.5, (labels + 1)[:, None, None], 0).astype(np.uint8)

    light = draw(-0.18, 0.18, 2)
    light = 0.85 + light[:, :1, None] * grid[None, None] + light[:, 1:, None] * grid[None, :, None]
    image *= light[..., None]
    count = size * size * 3
    bits = keyed.bits(keyed.key(seed, "shapes", split, "noise"), rows, -(-count // 4)).numpy()
    noise = bits.astype("<i8", copy=False).view("<u2")[:, :count]  # four numbers from each hash
    noise = (noise.astype(np.float32) / 65536 - 0.5).reshape(image.shape)
    image += noise * draw(0.02, 0.12)[:, None, None, None]
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8), masks


def _centres(n: int) -> np.ndarray:
    """Centres of n pixels on the side from -1 to 1."""
    return ((np.arange(n, dtype=np.float32) + 0.5) * (2 / n) - 1).astype(np.float32)


class _Draws:
    """Columns of a table of uniform numbers, one row per image, always in the same order."""

    def __init__(self, table: np.ndarray):
        self.table, self.used = table, 0

    def __call__(self, low: float, high: float, *shape: int) -> np.ndarray:
        n = int(np.prod(shape))
        part = self.table[:, self.used : self.used + n]
        if part.shape[1] < n:
            raise IndexError(f"shapes: more than {self.table.shape[1]} numbers per image")
        self.used += n
        return (low + (high - low) * part).astype(np.float32).reshape(len(part), *shape)


def _frame(turn, centre, radius, axis, stretch=None):
    """Coordinates (u, v), (B, n, n) each, of all pixels in a frame that is turned by `turn`, has
    its origin at `centre` and `radius` as its unit.
    """
    cos, sin = np.cos(turn) / radius, np.sin(turn) / radius
    x, y = axis[None] - centre[:, :1], axis[None] - centre[:, 1:]
    u = (cos[:, None] * x)[:, None, :] + (sin[:, None] * y)[:, :, None]
    v = (cos[:, None] * y)[:, :, None] - (sin[:, None] * x)[:, None, :]
    if stretch is None:  # for textures, which are drawn in float64
        return u.astype(np.float64), v.astype(np.float64)
    return u / stretch[:, None, None], v * stretch[:, None, None]


def _colours(draw: _Draws, lighter: bool) -> tuple[np.ndarray, np.ndarray]:
    """Two colours for the object and two for the ground, (B, 2, 3) each. The pairs differ
    clearly.
    """
    ground = draw(0, 0.75 if lighter else 1, 1, 3) + draw(-0.15, 0.15, 2, 3)
    options = draw(0, 1, 6, 3)
    difference = options - ground.mean(1, keepdims=True)
    apart = difference.sum(2) if lighter else np.abs(difference).sum(2)
    enough = apart > 0.9  # the first option that is far enough, or the farthest
    chosen = np.where(enough.any(1), enough.argmax(1), apart.argmax(1))
    paint = options[np.arange(len(chosen)), chosen][:, None] + draw(-0.15, 0.15, 2, 3)
    return np.clip(paint, 0, 1), np.clip(ground, 0, 1)


def _texture(draw: _Draws, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Share of the second colour at each pixel, (B, n, n) in [0, 1]: plain, stripes, checks or soft
    blobs.
    """
    kind, step, turn = draw(0, 4).astype(int), draw(0.35, 1.1), draw(0, 2 * np.pi)
    phase, soft, nodes = draw(0, 1, 2), draw(1, 6), draw(-1, 1, 8)
    cos, sin, step, soft = (a[:, None, None] for a in (np.cos(turn), np.sin(turn), step, soft))
    p, q = (
        (cos * u + sin * v) / step + phase[:, :1, None],
        (cos * v - sin * u) / step + phase[:, 1:, None],
    )
    wave_p, wave_q = _wave(p), _wave(q)
    kind = kind[:, None, None]
    blobs = np.zeros_like(p)
    for k in range(0, 8, 2):  # four waves in drawn directions add up to something like clouds
        blobs += _wave(nodes[:, k, None, None] * p + nodes[:, k + 1, None, None] * q)
    chosen = np.select(
        [kind == 0, kind == 1, kind == 2], [-1.0, wave_p, wave_p * wave_q], blobs * 0.5
    )
    return np.clip(0.5 + soft * chosen, 0, 1).astype(np.float32)


def _wave(t: np.ndarray) -> np.ndarray:
    """Triangle wave of period 1 between -1 and 1."""
    return 1 - 4 * np.abs(t - np.floor(t) - 0.5)


def _blend(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    return first[:, None, None] + share[..., None] * (second - first)[:, None, None]


def _stroke(
    draw: _Draws, grid: np.ndarray, thin: bool, clutter: float
) -> tuple[np.ndarray, np.ndarray]:
    """One round-ended line, down to a dot: how much it covers of each pixel, (B, n, n), and its
    colour (B, 3).
    """
    start, turn, length = draw(-1, 1, 2), draw(0, 2 * np.pi), draw(0, 1)
    width, shown, colour = (
        draw(0.03, 0.06) if thin else draw(0.05, 0.13),
        draw(0, 1) < clutter,
        draw(0, 1, 3),
    )
    x, y = grid[None, None] - start[:, :1, None], grid[None, :, None] - start[:, 1:, None]
    cos, sin, length = (a[:, None, None] for a in (np.cos(turn), np.sin(turn), length))
    along = np.clip(cos * x + sin * y, 0, length)
    distance = np.sqrt((x - along * cos) ** 2 + (y - along * sin) ** 2)
    cover = np.clip(0.5 + (width[:, None, None] - distance) * (len(grid) / 2), 0, 1)
    return (cover * shown[:, None, None]).astype(np.float32), colour


def _average(inside: np.ndarray) -> np.ndarray:
    """bool (B, n SUPER, n SUPER) -> the share of each pixel's samples that is inside, (B, n, n)."""
    count = sum(
        inside[:, i::SUPER, j::SUPER].view(np.uint8) for i in range(SUPER) for j in range(SUPER)
    )
    return count.astype(np.float32) / SUPER**2


# The shapes, each of about the same area (2 in units of the radius): (u to the right, v down) ->
# inside?


def _star(u, v):
    wedge = np.pi / 5
    angle = np.abs(np.mod(np.arctan2(u, -v), 2 * wedge) - wedge)  # 0 at a notch, `wedge` at a tip
    r, tip, notch = np.sqrt(u * u + v * v), 1.3, 0.62
    ax, ay, bx, by = notch, 0.0, tip * np.cos(wedge), tip * np.sin(wedge)
    return (bx - ax) * (r * np.sin(angle) - ay) - (by - ay) * (r * np.cos(angle) - ax) > 0


def _heart(u, v):
    x, y = u / 0.78, 0.1 - v / 0.78
    return (x * x + y * y - 1) ** 3 < x * x * y**3


_INSIDE = [
    lambda u, v: u * u + v * v < 0.64,  # disk
    lambda u, v: np.maximum(np.abs(u), np.abs(v)) < 0.71,  # square
    lambda u, v: np.maximum(v, 0.866 * np.abs(u) - 0.5 * v) < 0.6,  # triangle
    _star,
    lambda u, v: (
        (np.minimum(np.abs(u), np.abs(v)) < 0.29) & (np.maximum(np.abs(u), np.abs(v)) < 1)
    ),  # cross
    lambda u, v: np.abs(np.sqrt(u * u + v * v) - 0.77) < 0.22,  # ring
    _heart,
    lambda u, v: ((u + 0.3) ** 2 + v * v < 1.1) & ((u - 0.25) ** 2 + v * v > 0.66),  # crescent
    lambda u, v: (np.abs(u) < 1.3) & (np.abs(v) < 0.37),  # bar
    lambda u, v: (
        ((np.abs(v) < 0.27) & (np.abs(u + 0.5) < 0.6))
        | ((u > 0) & (np.abs(v) < 0.85 * (1.2 - u) / 1.2))
    ),  # arrow
    lambda u, v: (np.maximum(np.abs(u), np.abs(v)) < 0.95) & (np.minimum(u, v) < -0.3),  # ell
    lambda u, v: (
        ((u + 0.5) ** 2 + v * v < 1.7) & (u > -0.5) & (np.abs(v) < 0.25 + 0.8 * (u + 0.5))
    ),  # fan
]
