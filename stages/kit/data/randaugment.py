"""RandAugment (arXiv 1909.13719) as timm draws and paints it, without global generators.

timm draws from the global `random` and `numpy.random`, which every thread and library of the
process shares. Here timm only reads the notation, such as "rand-m9-mstd0.5-inc1", and paints: its
functions change the pixels. What is drawn between (which operations, how strong, in which
direction) is drawn here, in timm's order, from two generators of the image's own. So an image gets
the picture that timm gives after `random.seed(seed); numpy.random.seed(seed)`.

Settings that are ours: bicubic interpolation always (timm with train_interpolation=bicubic), and
grey (128) where there is no picture. Posterising to 0 bits, which timm asks for at magnitude 10 and
newer Pillows refuse, gives a black picture, as it did in older ones.
"""

from __future__ import annotations

import functools
import random
import threading

import numpy as np
from PIL import Image

GREY = (128, 128, 128)
OWN = threading.local()


def randaugment(notation: str, image: Image.Image, seed: int) -> Image.Image:
    """The augmented picture, a function of the arguments; `seed` is in [0, 2^32)."""
    for function, arguments, options in plan(notation, seed):
        image = function(image, *arguments, **options)
    return image


def plan(notation: str, seed: int) -> list[tuple]:
    """What happens to the image with this seed: (function, arguments, options) in order."""
    transform = policy(notation)
    draw, choice = _generators()
    draw.seed(seed)
    choice.seed(seed)
    weights = transform.choice_weights
    chosen = choice.choice(
        len(transform.ops), transform.num_layers, replace=weights is None, p=weights
    )
    steps = []
    for operation in (transform.ops[k] for k in chosen.tolist()):
        if operation.prob < 1 and draw.random() > operation.prob:
            continue
        level = _magnitude(operation, draw)
        arguments = argument(operation.name, level, draw.random)
        black = operation.name.startswith("Posterize") and arguments[0] < 1
        steps.append((_black if black else operation.aug_fn, arguments, operation.kwargs))
    return steps


@functools.cache
def policy(notation: str):
    """timm's RandAugment of this notation. ValueError if timm does not know the notation, or if it
    names an operation that is not known here.
    """
    from timm.data import auto_augment

    settings = {"img_mean": GREY, "interpolation": Image.Resampling.BICUBIC}
    try:
        transform = auto_augment.rand_augment_transform(notation, settings)
    except (AssertionError, AttributeError) as error:
        raise ValueError(f"timm cannot read {notation!r} ({error})") from None
    for operation in transform.ops:
        argument(operation.name, 1.0, lambda: 0.0)
    return transform


def _generators() -> tuple[random.Random, np.random.RandomState]:
    """This thread's own; to make new ones takes longer than to seed these."""
    if not hasattr(OWN, "generators"):
        OWN.generators = random.Random(), np.random.RandomState()
    return OWN.generators


def _magnitude(operation, draw: random.Random) -> float:
    """How strong an operation is this time, in [0, 10] (or up to timm's "mmax")."""
    magnitude = operation.magnitude
    if operation.magnitude_std == float("inf"):
        magnitude = draw.uniform(0, magnitude)
    elif operation.magnitude_std > 0:
        magnitude = draw.gauss(magnitude, operation.magnitude_std)
    return max(0.0, min(magnitude, operation.magnitude_max or 10.0))


def argument(name: str, magnitude: float, draw) -> tuple:
    """What timm's function for the operation `name` gets at a magnitude in [0, 10].

    `draw()` is uniform in [0, 1) and called once where the sign is random.
    """
    level = magnitude / 10.0

    def either(amount: float) -> float:
        return -amount if draw() > 0.5 else amount

    match name:
        case "AutoContrast" | "Equalize" | "Invert":
            return ()
        case "Rotate":  # degrees
            return (either(level * 30.0),)
        case "ShearX" | "ShearY":
            return (either(level * 0.3),)
        case "TranslateXRel" | "TranslateYRel":  # share of the side
            return (either(level * 0.45),)
        case "Color" | "Contrast" | "Brightness" | "Sharpness":  # 1: no change
            return (level * 1.8 + 0.1,)
        case (
            "ColorIncreasing"
            | "ContrastIncreasing"
            | "BrightnessIncreasing"
            | "SharpnessIncreasing"
        ):
            return (max(0.1, 1.0 + either(level * 0.9)),)
        case "Posterize":  # bits that are kept
            return (int(level * 4),)
        case "PosterizeIncreasing":
            return (4 - int(level * 4),)
        case "Solarize":  # grey level from which pixels are inverted
            return (min(256, int(level * 256)),)
        case "SolarizeIncreasing":
            return (256 - min(256, int(level * 256)),)
        case "SolarizeAdd":
            return (min(128, int(level * 110)),)
        case "Desaturate":
            return (_between(level, 0.5, 1.0),)
        case "GaussianBlur":  # radius in pixels
            return (_between(level, 0.1, 2.0),)
    raise ValueError(f"timm's operation {name!r} is not known here")


def _between(level: float, low: float, high: float) -> float:
    return max(low, min(high, low + (high - low) * level))


def _black(image: Image.Image, *_, **__) -> Image.Image:
    return Image.new(image.mode, image.size)
