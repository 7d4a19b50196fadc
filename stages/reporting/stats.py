"""Intervals over seeds, intervals over test images, and paired tests: what results can tell.

Two things vary when an experiment is repeated: the *seed* (initialisation, order, masks) and the
*test images*. They answer different questions, so they are never mixed into one number:

- `t_interval`: how far the mean over seeds would move if the experiment were repeated with other
  seeds (Student's t; nothing is said for a single seed).
- `image_interval`: how far the score of one trained network would move on other test images
  (right or wrong: Wilson 1927; scores in between: Student's t).
- `contrast`: the size of a difference that was declared beforehand (`grid.contrasts`), with an
  interval of either kind. It is not corrected for the number of contrasts.
- `paired_seeds`: are two methods apart when they share seeds? Paired t test on the differences; at
  least three seeds.
- `paired_images`: are two sets of trained networks apart on the same test images? One seed that is
  right or wrong: McNemar's exact test (1947). Otherwise an image's scores of several seeds are not
  independent, so each image is one cluster with its mean difference, and the t test runs over
  images (the clustered form of McNemar's test, Obuchowski 1998).

An image has a score in [0, 1]: right or wrong, the share of repetitions that were right, an IoU.
Which of these hold for a report is said in claims.py.

`rank` calls a run *best* only when both tests reject equality with every rival: the larger of the
two p values counts (an intersection-union test), and Holm's correction (1979) pays for the number
of rivals. Why both: three lucky seeds may agree on a difference of two images; ten thousand images
cannot tell that another seed would have won.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

LEVEL = 0.95
MIN_SEEDS = 3


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided interval; `low` and `high` are None where none can be given."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def half(self) -> float | None:
        """Half the width of the interval, or None."""
        return None if self.low is None else (self.high - self.low) / 2


def t_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Mean and Student-t interval of `values`; ValueError if there are none, or infinite ones."""
    x = np.asarray(values, np.float64)
    if x.size == 0:
        raise ValueError("t_interval: no values")
    if not np.isfinite(x).all():
        raise ValueError(f"t_interval: values must be finite, found {list(values)}")
    mean = float(x.mean())
    if x.size == 1:
        return Interval(mean, None, None, 1)
    half = float(stats.t.ppf((1 + level) / 2, x.size - 1) * x.std(ddof=1) / np.sqrt(x.size))
    return Interval(mean, mean - half, mean + half, int(x.size))


def wilson(correct: int, total: int, level: float = LEVEL) -> Interval:
    """Accuracy of one network on `total` test images with Wilson's score interval, which stays
    inside [0, 1].
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(
            f"wilson: need 0 <= correct <= total and total >= 1, found {correct} of {total}"
        )
    z = float(stats.norm.ppf((1 + level) / 2))
    p, shrink = correct / total, 1 + z * z / total
    centre = (p + z * z / (2 * total)) / shrink
    half = z / shrink * np.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return Interval(p, max(0.0, float(centre - half)), min(1.0, float(centre + half)), total)


def image_interval(scores: np.ndarray) -> Interval:
    """Mean score (n,) of one network over test images, with its interval inside [0, 1]."""
    if np.isin(scores, (0, 1)).all():
        return wilson(round(float(scores.sum())), len(scores))
    found = t_interval(scores)
    if found.low is None:
        return found
    return Interval(found.mean, max(0.0, found.low), min(1.0, found.high), found.n)


def paired_seeds(
    a: Mapping[int, float], b: Mapping[int, float], minimum: int = MIN_SEEDS
) -> float | None:
    """Two-sided p value of the paired t test over the seeds that `a` and `b` ({seed: score}) share.

    None with fewer than `minimum` common seeds: with two, one degree of freedom is left and the
    test is empty.
    """
    common = sorted(set(a) & set(b))
    if len(common) < minimum:
        return None
    return _t_test(np.array([a[s] - b[s] for s in common], np.float64))


def paired_images(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sided p value for a difference of `a` and `b`, (seeds, images), over the same images.

    Entries are an image's score in [0, 1].
    """
    a, b = np.atleast_2d(np.asarray(a, np.float64)), np.atleast_2d(np.asarray(b, np.float64))
    if a.shape != b.shape or a.size == 0:
        raise ValueError(
            f"paired_images: need the same seeds and images, found {a.shape} and {b.shape}"
        )
    if a.shape[0] == 1 and np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all():
        only_a, only_b = int((a > b).sum()), int((b > a).sum())
        if only_a + only_b == 0:
            return 1.0
        return float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)
    return _t_test((a - b).mean(0))


@dataclass(frozen=True)
class Contrast:
    """One group of runs minus another: over seeds, and over test images where these are known."""

    seeds: Interval
    images: Interval | None

    @property
    def sure(self) -> bool:
        """Both intervals exclude zero, on the same side."""
        both = [i for i in (self.seeds, self.images) if i is not None and i.low is not None]
        above = len(both) == 2 and all(i.low > 0 for i in both)
        below = len(both) == 2 and all(i.high < 0 for i in both)
        return above or below


def contrast(
    of: Sequence[Scores], against: Sequence[Scores], level: float = LEVEL
) -> Contrast | None:
    """Mean score of the runs `of` minus that of the runs `against`, paired by seed and by image;
    None without a common seed.

    The interval over images takes each image as one cluster of its seeds and runs, as
    `paired_images` does.
    """
    common = sorted(set.intersection(*(set(s.scores) for s in (*of, *against))))
    if not common:
        return None
    seeds = t_interval(
        [_mean(s.scores[k] for s in of) - _mean(s.scores[k] for s in against) for k in common],
        level,
    )
    sides = [
        [scores.images[k] for scores in side for k in common if k in scores.images]
        for side in (of, against)
    ]
    complete = all(
        len(found) == len(side) * len(common)
        for found, side in zip(sides, (of, against), strict=True)
    )
    if not complete or len({len(images) for found in sides for images in found}) != 1:
        return Contrast(seeds, None)
    change = np.mean(sides[0], axis=0) - np.mean(sides[1], axis=0)
    return Contrast(seeds, t_interval(change, level))


def _mean(values) -> float:
    return float(np.mean(list(values)))


def _t_test(d: np.ndarray) -> float:
    """One-sample t test of mean zero; exact zeros and constant differences need no division by a
    zero spread.
    """
    if d.size < 2 or np.ptp(d) <= 1e-12 * max(1.0, float(np.abs(d).max())):
        return 1.0 if d.size < 2 or abs(float(d.mean())) < 1e-12 else 0.0
    return float(stats.ttest_1samp(d, 0.0).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the order given."""
    order, adjusted, worst = np.argsort(p, kind="stable"), [0.0] * len(p), 0.0
    for position, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p) - position) * float(p[i])))
        adjusted[i] = worst
    return adjusted


@dataclass(frozen=True)
class Scores:
    """One run on one task, by seed: the headline, and where known the score of every test image.

    Both are in [0, 1]; `images[seed]` is (images,), in the order of the test split.
    """

    scores: Mapping[int, float]
    images: Mapping[int, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """Who leads a task, and what may be said of it.

    state: "best" (ahead of every rival, seeds and images agree), "ahead" (ahead on these test
    images, too few common seeds to say more), "tie" (at least one rival cannot be told apart),
    "alone" (no rival). p: {rival: Holm-adjusted p value, or None where nothing could be tested};
    ties: the rivals not told apart.
    """

    leader: str
    state: str
    p: Mapping[str, float | None]
    ties: tuple[str, ...]
    seeds: int


def compare(a: Scores, b: Scores) -> tuple[float | None, float | None]:
    """(p over seeds, p over images) that `a` is not ahead of `b`, two-sided.

    None where a test has too little to work on, 1 where the difference is against `a`: a headline
    such as mIoU may be higher although the single images' scores are lower.
    """
    shared = sorted(set(a.scores) & set(b.scores))
    seeds = paired_seeds(a.scores, b.scores)
    if seeds is not None and _mean(a.scores[s] - b.scores[s] for s in shared) < 0:
        seeds = 1.0
    common = [s for s in shared if s in a.images and s in b.images]
    common = [s for s in common if len(a.images[s]) == len(b.images[s])]
    if not common or len({len(a.images[s]) for s in common}) != 1:
        return seeds, None
    ours, theirs = (np.stack([side.images[s] for s in common]) for side in (a, b))
    images = paired_images(ours, theirs) if ours.mean() >= theirs.mean() else 1.0
    return seeds, images


def rank(runs: Mapping[str, Scores], alpha: float = 1 - LEVEL) -> Verdict | None:
    """The verdict on one task over `runs` ({name: Scores}); None when no run has a score."""
    runs = {name: s for name, s in runs.items() if s.scores}
    if not runs:
        return None
    leader = max(runs, key=lambda name: float(np.mean(list(runs[name].scores.values()))))
    rivals = [name for name in runs if name != leader]
    if not rivals:
        return Verdict(leader, "alone", {}, (), len(runs[leader].scores))
    tests = {name: compare(runs[leader], runs[name]) for name in rivals}
    raw = {
        name: max((p for p in pair if p is not None), default=None) for name, pair in tests.items()
    }
    known = [name for name in rivals if raw[name] is not None]
    adjusted = dict(zip(known, holm([raw[name] for name in known]), strict=True))
    p = {name: adjusted.get(name) for name in rivals}
    ties = tuple(name for name in rivals if p[name] is None or p[name] >= alpha)
    over_seeds = [seeds is not None for seeds, _ in tests.values()]
    over_images = [images is not None for _, images in tests.values()]
    both = all(over_seeds) and all(over_images)
    seeds_only = all(over_seeds) and not any(over_images)  # no image has a score: seeds must do
    state = "tie" if ties else "best" if both or seeds_only else "ahead"
    common = min(len(set(runs[leader].scores) & set(runs[name].scores)) for name in rivals)
    return Verdict(leader, state, p, ties, common)
