"""What a Config checks of its settings: numbers in their range, counts of patches that can be.

Needs nothing but Python, as the plan reads every Config without torch; these functions are what it
may use. Each raises ValueError as "key: found ..., expected ...".
"""

from __future__ import annotations

from fractions import Fraction
from math import ceil, inf


def within(config, interval: str, *keys: str) -> None:
    """Each of the settings `keys` is a number in `interval`, such as "(0, 1]" or "[1, inf)".

    Of a list every entry counts, None is left alone.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    for key in keys:
        found = getattr(config, key)
        for number in found if isinstance(found, list | tuple) else [found]:
            if number is None:
                continue
            above = number > low or (interval[0] == "[" and number == low)
            below = number < high or (interval[-1] == "]" and number == high)
            if not (above and below):
                raise ValueError(f"{key}: found {found}, expected {_words(interval, low, high)}")


def _words(interval: str, low: float, high: float) -> str:
    if high < inf:
        return f"a number in {interval}"
    return f"{low:g} or more" if interval[0] == "[" else f"a number above {low:g}"


def spans(config, *keys: str) -> None:
    """Each of the settings `keys` is a pair (low, high) of shares with 0 < low <= high <= 1."""
    for key in keys:
        low, high = getattr(config, key)
        if not 0 < low <= high <= 1:
            raise ValueError(f"{key}: found {low}, {high}, expected 0 < low <= high <= 1")


def decoder(config) -> None:
    """decoder_dim, decoder_depth and decoder_heads can make a decoder (kit/nets/decoder.py)."""
    within(config, "[1, inf)", "decoder_dim", "decoder_depth", "decoder_heads")
    if config.decoder_dim % 4:
        raise ValueError(
            f"decoder_dim: found {config.decoder_dim}, expected a multiple of 4 (sin-cos positions)"
        )
    if config.decoder_dim % config.decoder_heads:
        raise ValueError(
            f"decoder_heads: found {config.decoder_heads}, which does not divide decoder_dim "
            f"{config.decoder_dim}"
        )


def self_distillation(config) -> None:
    """Head, temperatures, momenta and crops of DINO and what follows it (kit/parts/selfdistil.py)."""
    within(config, "[2, inf)", "prototypes")
    within(config, "[1, inf)", "hidden", "bottleneck")
    within(config, "[0, inf)", "n_local")
    within(config, "(0, inf)", "student_temp", "teacher_temp", "teacher_temp_end")
    within(
        config,
        "[0, 1]",
        "centre_momentum",
        "momentum",
        "min_information",
        "teacher_temp_warmup",
        "flip",
        "jitter_p",
        "grey",
        "solarise",
    )
    within(config, "(0, 1]", "local_size")
    spans(config, "global_scale", "local_scale")


def sincos(model: dict) -> None:
    """An encoder of `model` can have sin-cos positions."""
    if model["embed_dim"] % 4:
        raise ValueError(
            f"model.embed_dim: found {model['embed_dim']}, expected a multiple of 4 (sin-cos positions)"
        )


def keep_count(patches: int, ratio: float, what: str = "patches") -> int:
    """Patches that stay visible: patches * (1 - ratio) cut to an integer, exact for the decimal
    `ratio`.

    In floats 10 * (1 - 0.9) is 0.9999..., which would keep nothing. At least one patch must stay
    visible and one be hidden; `what` is said of them if not.
    """
    keep = int(patches * (1 - Fraction(str(ratio))))
    _both(patches, ratio, patches - keep, what)
    return keep


def unit_count(units: int, ratio: float) -> int:
    """Mask units to hide: units * ratio rounded up, exact for the decimal `ratio` (SimMIM, arXiv
    2111.09886); not all.
    """
    count = ceil(units * Fraction(str(ratio)))
    _both(units, ratio, count, "units")
    return count


def hidden_count(patches: int, ratio: float) -> int:
    """Patches to hide: patches * ratio rounded to the nearest; at least one of them, and not all."""
    count = round(patches * ratio)
    _both(patches, ratio, count)
    return count


def _both(patches: int, ratio: float, hidden: int, what: str = "patches") -> None:
    if not (0 < ratio < 1 and 0 < hidden < patches):
        raise ValueError(
            f"mask_ratio: {ratio} of {patches} {what} hides {hidden}, expected at least one hidden and one "
            "visible"
        )
