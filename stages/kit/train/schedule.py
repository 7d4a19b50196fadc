"""Schedules as functions of the optimiser step; nothing here has state."""

from __future__ import annotations

import math


def warmup_cosine(step: float, steps: int, warmup: int, peak: float, end: float = 0.0) -> float:
    """Linear from 0 at step 0 to `peak` at step `warmup`, then half a cosine down to `end` at
    `steps`.

    The formula of MAE's official code (arXiv:2111.06377), per optimiser step: the rate at step 0 is
    exactly 0.
    """
    if step < warmup:
        return peak * step / warmup
    return cosine((step - warmup) / max(steps - warmup, 1), peak, end)


def warmup_drops(
    step: float, steps: int, warmup: int, peak: float, drops: tuple[float, ...]
) -> float:
    """Linear from 0 at step 0 to `peak` at step `warmup`, then constant but for `drops`: shares of
    the `steps` from each of which on the rate is a tenth of what it was (the long recipes of
    SimMIM, arXiv:2111.09886).
    """
    if step < warmup:
        return peak * step / warmup
    return peak * 0.1 ** sum(step >= drop * steps for drop in drops)


def cosine(fraction: float, start: float, end: float) -> float:
    """Half a cosine from `start` (fraction 0) to `end` (fraction 1); clamped outside of [0, 1]."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(max(fraction, 0.0), 1.0)))


def linear(fraction: float, start: float, end: float) -> float:
    """Straight line from `start` to `end`, clamped outside of [0, 1] (teacher temperatures)."""
    return start + (end - start) * min(max(fraction, 0.0), 1.0)
