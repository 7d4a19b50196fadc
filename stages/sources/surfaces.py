"""`surfaces`: patterned surfaces rendered from a seed, for a laboratory without network or files.

Every image shows one pattern, such as bricks or dots, from edge to edge. Its kind is the class
label. Position, rotation, size, proportions, contrast, two colours, light and noise are drawn
independently of the kind. So a pixel at a fixed place says nothing about the label, its
neighbourhood does, and what is hidden can be told from what is visible. Encoders therefore learn
here within a minute. `shapes` is the harder source, which has masks and boxes, too.

An image is a pure function of (seed, split, index, options, size): its numbers come from
`kit.keyed`, never from a generator that advances. A pattern is a field over the coordinates (p, q),
in units of its period: above 0 lies one colour, below 0 the other. It is sampled SUPER x SUPER
times per pixel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from stages.sources import Found, Listing, Sample
from workflow import checks

ARGUMENT = None
GIVES = {"labels"}

SUPER = 3
POINTS = 1 << 19  # sample points rendered at once: bounds memory, about 60 MB
PATTERNS = ["stripes", "zigzag", "checks", "bricks", "dots", "mesh", "scales", "waves"]
PATTERNS += ["rings", "triangles"]


@dataclass(frozen=True)
class Config:
    train: int = 8000
    val: int = 1000
    test: int = 2000
    classes: int = 10  # the first so many of PATTERNS
    turn: float = 45.0  # largest rotation from upright, degrees
    period: tuple[float, float] = (0.2, 0.4)  # of the pattern, as a share of the image's side
    grey: bool = False  # without colours

    def __post_init__(self):
        checks.within(self, "[1, inf)", "train")
        checks.within(self, "[0, inf)", "val", "test")
        checks.within(self, "[2, 10]", "classes")
        checks.within(self, "[0, 180]", "turn")
        checks.spans(self, "period")


def read(argument: str | None, config: Config, data: dict) -> Found:
    """The splits of `config`, rendered at the size in which they are stored. A split of 0 images
    does not exist.
    """
    size = data["store_size"] or data["image_size"]
    splits = {}
    for split in ("train", "val", "test"):
        if count := getattr(config, split):
            labels = label(np.arange(count), config.classes)
            splits[split] = Listing(labels, _reader(data["seed"], split, size, config))
    return Found(splits, PATTERNS[: config.classes])


def label(index: np.ndarray, classes: int) -> np.ndarray:
    """Class of each image: they take turns, so every split is balanced."""
    return (index % classes).astype(np.int64)


def _reader(seed: int, split: str, size: int, config: Config):
    at_once = max(1, POINTS // (size * SUPER) ** 2)

    def samples(rows: np.ndarray) -> Iterator[Sample]:
        for begin in range(0, len(rows), at_once):
            index = rows[begin : begin + at_once]
            images = render(seed, split, index, size, config)
            for row, image in zip(index.tolist(), images, strict=True):
                yield Sample(f"{split}/{row:07d}.png", image)

    return samples


def render(seed: int, split: str, index: np.ndarray, size: int, config: Config) -> np.ndarray:
    """Images number `index` (B,) -> pixels uint8 (B, size, size, 3)."""
    import torch

    from stages.kit import keyed

    index = np.asarray(index, np.int64)
    rows, labels = torch.as_tensor(index), label(index, config.classes)
    table = keyed.uniform(keyed.key(seed, "surfaces", split), rows, 24).numpy().astype(np.float64)
    draws = iter(table.T)

    def draw(low: float, high: float, count: int = 1) -> np.ndarray:
        """(B,) or (B,count) numbers between low and high, (B,1,1) if it is one."""
        numbers = low + (high - low) * np.stack([next(draws) for _ in range(count)], axis=1)
        return numbers[:, :, None] if count == 1 else numbers

    axis = _centres(size * SUPER)
    x, y = axis[None, None, :], axis[None, :, None]
    turn, stretch, shift = np.radians(config.turn) * draw(-1, 1), draw(0.85, 1.18), draw(0, 7, 2)
    scale = 0.5 / draw(*config.period)
    p = (np.cos(turn) * x + np.sin(turn) * y) * scale * stretch + shift[:, :1, None]
    q = (np.cos(turn) * y - np.sin(turn) * x) * scale / stretch + shift[:, 1:, None]
    field = np.empty_like(p)
    for kind in np.unique(labels):
        mine = labels == kind
        field[mine] = _FIELDS[kind](p[mine], q[mine])
    cover = _average(np.clip(0.5 + 0.5 * draw(1.5, 4) * field, 0, 1))[..., None]

    dark, step = draw(0, 0.45, 3), draw(0.25, 0.5)[..., 0] + draw(-0.08, 0.08, 3)
    if config.grey:
        dark, step = (np.repeat(colour.mean(1, keepdims=True), 3, 1) for colour in (dark, step))
    light, axis = draw(-0.25, 0.25, 2), _centres(size)
    light = 0.85 + light[:, :1, None] * axis[None, None] + light[:, 1:, None] * axis[None, :, None]
    image = (dark[:, None, None] + cover * step[:, None, None]) * light[..., None]
    count = size * size * 3
    bits = keyed.bits(keyed.key(seed, "surfaces", split, "noise"), rows, -(-count // 4)).numpy()
    noise = bits.astype("<i8", copy=False).view("<u2")[:, :count]  # four numbers from each hash
    noise = (noise / 65536 - 0.5).reshape(image.shape)
    image = image + noise * draw(0.02, 0.06)[..., None]
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def _centres(n: int) -> np.ndarray:
    """Centres of n pixels on the side from -1 to 1."""
    return (np.arange(n) + 0.5) * (2 / n) - 1


def _average(fine: np.ndarray) -> np.ndarray:
    """(B, n SUPER, n SUPER) -> the mean of each pixel's samples, (B, n, n)."""
    total = sum(fine[:, i::SUPER, j::SUPER] for i in range(SUPER) for j in range(SUPER))
    return total / SUPER**2


def _wave(t: np.ndarray) -> np.ndarray:
    """Triangle wave of period 1 between -1 and 1."""
    return 1 - 4 * np.abs(_part(t) - 0.5)


def _part(t: np.ndarray) -> np.ndarray:
    """What lies beyond the whole number below."""
    return t - np.floor(t)


def _bricks(p, q):
    along, across = _part(0.5 * p + 0.5 * (np.floor(q) % 2)), _part(q)
    edge = np.minimum(2 * np.minimum(along, 1 - along), np.minimum(across, 1 - across))
    return 8 * (edge - 0.13)


def _scales(p, q):
    along = _part(p + 0.5 * (np.floor(1.5 * q) % 2)) - 0.5
    return 8 * (0.12 - np.abs(np.hypot(along, _part(1.5 * q) / 1.5) - 0.5))


def _mesh(p, q):
    line = np.minimum(np.abs(_part(p) - 0.5), np.abs(_part(q) - 0.5))
    return 8 * (0.14 - line)


# The patterns: (p, q), each (B, n, n) in periods -> field, above and below 0
_FIELDS = [
    lambda p, q: _wave(p),  # stripes
    lambda p, q: _wave(p + 0.8 * np.abs(_part(0.8 * q) - 0.5)),  # zigzag
    lambda p, q: 3 * _wave(p) * _wave(q),  # checks
    _bricks,
    lambda p, q: 6 * (0.32 - np.hypot(_part(p) - 0.5, _part(q) - 0.5)),  # dots
    _mesh,
    _scales,
    lambda p, q: _wave(p + 0.25 * np.sin(1.4 * np.pi * q)),  # waves
    lambda p, q: _wave(4 * np.hypot(_part(0.5 * p) - 0.5, _part(0.5 * q) - 0.5)),  # rings
    lambda p, q: np.where(_part(p) + _part(q) < 1, 1.0, -1.0),  # triangles
]
