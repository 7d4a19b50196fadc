"""Schedules as functions of the optimiser step; nothing here has state.

All recipes warm the rate up linearly and let it fall as half a cosine, or by drops. Their official
codes differ in how they count the steps (`Optimiser.schedule` in workflow/checks.py):

- "mae" (facebookresearch/mae): the step that follows the warm-up is the first at the peak;
- "beit" (microsoft/unilm for BEiT and BEiT v2, facebookresearch/dino, bytedance/ibot): the last
  step of the warm-up is at the peak already, so the warm-up is steeper; the rest is the same;
- "simmim" (microsoft/SimMIM, in pretraining and in fine-tuning): the rate is set after a step for
  the next one and lags behind: the first two steps have the same rate, and each later one the rate
  of the step before. The cosine begins with the training and not with the end of the warm-up, so
  that the peak is never quite reached.
"""

from __future__ import annotations

import math


def rate(
    kind: str,
    step: int,
    steps: int,
    warmup: int,
    peak: float,
    end: float = 0.0,
    start: float = 0.0,
    drops: tuple[float, ...] = (),
) -> float:
    """The rate in a step, by the schedule `kind`: from `start` to `peak`, from there to `end`.

    With drops (shares of the steps) it is constant after the warm-up, but a tenth from each on.
    """
    step = max(step - 1, 0) if kind == "simmim" else step
    if step < warmup:
        ramp = max(warmup - 1, 1) if kind == "beit" else warmup
        return start + (peak - start) * step / ramp
    if drops:
        return peak * 0.1 ** sum(step >= drop * steps for drop in drops)
    if kind == "simmim":
        return cosine(step / steps, peak, end)
    return warmup_cosine(step, steps, warmup, peak, end)


def warmup_cosine(step: float, steps: int, warmup: int, peak: float, end: float = 0.0) -> float:
    """Linear from 0 at step 0 to `peak` at step `warmup`, then half a cosine down to `end` at
    `steps`.

    The formula of MAE's official code (arXiv:2111.06377), per optimiser step: the rate at step 0 is
    exactly 0.
    """
    if step < warmup:
        return peak * step / warmup
    return cosine((step - warmup) / max(steps - warmup, 1), peak, end)


def cosine(fraction: float, start: float, end: float) -> float:
    """Half a cosine from `start` (fraction 0) to `end` (fraction 1); clamped outside of [0, 1]."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(max(fraction, 0.0), 1.0)))


def linear(fraction: float, start: float, end: float) -> float:
    """Straight line from `start` to `end`, clamped outside of [0, 1] (teacher temperatures)."""
    return start + (end - start) * min(max(fraction, 0.0), 1.0)
