"""What a table of results may claim: intervals over seeds, intervals over test images, and paired
tests.

Two things vary when an experiment is repeated: the *seed* (initialisation, order, masks) and the
*test images*. They answer different questions, so they are never mixed into one number:

- `t_interval`: how far the mean over seeds would move if the experiment were repeated with other
  seeds (Student's t; nothing is said for a single seed).
- `wilson`: how far the accuracy of one trained network would move on other test images (Wilson
  1927).
- `contrast`: the size of a difference that was declared beforehand (`grid.contrasts`), with an
  interval of either kind. It is not corrected for the number of contrasts.
- `paired_seeds`: are two methods apart when they share seeds? Paired t test on the differences; at
  least three seeds.
- `paired_images`: are two sets of trained networks apart on the same test images? One seed:
  McNemar's exact test (1947). Several seeds: the seeds' predictions of one image are not
  independent, so each image is one cluster with its mean difference, and the t test runs over
  images (the clustered form of McNemar's test, Obuchowski 1998).

Which of these hold for a report, and what else weakens its comparisons, is said by `headline`,
`warnings` and `notes`.

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
    """A mean with its two-sided interval; `low` and `high` are None where no interval can be given."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def half(self) -> float | None:
        """Half the width of the interval, or None."""
        return None if self.low is None else (self.high - self.low) / 2


def t_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Mean and Student-t interval of `values` (one per seed). Raises ValueError when empty or not
    finite.
    """
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
    """Two-sided p value for a difference in accuracy of `a` and `b`, (seeds, images), over the same
    images.

    Entries are hits (bool), or the fraction of a task's repetitions that were right, in [0, 1].
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
    """One group of runs minus another, in units of accuracy: over seeds, and over test images where
    hits are known.
    """

    seeds: Interval
    images: Interval | None

    @property
    def sure(self) -> bool:
        """Both intervals exclude zero."""
        return all(
            i is not None and i.low is not None and i.low * i.high > 0
            for i in (self.seeds, self.images)
        )


def contrast(of: Sequence[Scores], against: Sequence[Scores]) -> Contrast | None:
    """Mean score of the runs `of` minus that of the runs `against`, paired by seed and by image;
    None without a common seed.

    The interval over images takes each image as one cluster of its seeds and runs, as
    `paired_images` does.
    """
    common = sorted(set.intersection(*(set(s.scores) for s in (*of, *against))))
    if not common:
        return None
    seeds = t_interval(
        [_mean(s.scores[k] for s in of) - _mean(s.scores[k] for s in against) for k in common]
    )
    hits = [[s.hits[k] for s in side for k in common if k in s.hits] for side in (of, against)]
    whole = [len(h) == len(side) * len(common) for h, side in zip(hits, (of, against), strict=True)]
    if not all(whole) or len({len(h) for h in hits[0] + hits[1]}) != 1:
        return Contrast(seeds, None)
    return Contrast(seeds, t_interval(np.mean(hits[0], axis=0) - np.mean(hits[1], axis=0)))


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
    """One run on one task: {seed: score in [0, 1]} and, where there are, {seed: hits (images,) in
    [0, 1]}.
    """

    scores: Mapping[int, float]
    hits: Mapping[int, np.ndarray] = field(default_factory=dict)


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
    """(p over seeds, p over images) of two runs; None where a test has too little to work on."""
    common = [s for s in sorted(set(a.hits) & set(b.hits)) if len(a.hits[s]) == len(b.hits[s])]
    images = None
    if common and len({len(a.hits[s]) for s in common}) == 1:
        images = paired_images(
            np.stack([a.hits[s] for s in common]), np.stack([b.hits[s] for s in common])
        )
    return paired_seeds(a.scores, b.scores), images


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
    both = all(seeds is not None and images is not None for seeds, images in tests.values())
    seeds_only = all(seeds is not None for seeds, _ in tests.values()) and not any(
        images is not None for _, images in tests.values()
    )  # a task without predictions: seeds must do
    state = "tie" if ties else "best" if both or seeds_only else "ahead"
    common = min(len(set(runs[leader].scores) & set(runs[name].scores)) for name in rivals)
    return Verdict(leader, state, p, ties, common)


# -------------------------------------------------------------------------------- what a report may
# say of it


@dataclass
class Row:
    """One run over all its seeds, a row of every table."""

    name: str
    facts: dict
    colour: int
    seeds: list[int] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """ "ssl" competes; "reference" is untrained or trained on labels; "taught" had a teacher
        that was.
        """
        f = self.facts
        return (
            "reference"
            if f["labels"] or not f["trains"]
            else "taught"
            if f["label_targets"]
            else "ssl"
        )

    @property
    def note(self) -> str:
        """What a reader of the table must know, in a few words."""
        f = self.facts
        notes = [
            "trained on labels" if f["labels"] else "untrained" if not f["trains"] else "",
            f"target {f['target']}" if f["target"] else "",
            f"teacher {f['teacher']}" if f["teacher"] else "",
            f"labels in {', '.join(f['label_targets'])}" if f["label_targets"] else "",
        ]
        return ", ".join(n for n in notes if n)


@dataclass
class Cell:
    """One run on one task."""

    scores: Scores
    metrics: dict[int, dict]
    interval: Interval | None
    images: Interval | None  # Wilson, for a single seed
    job: str | None


def headline(tasks: list, verdicts: dict) -> dict:
    """Who won and whether to believe it, in two sentences; level: "good", "fair" or "none"."""
    known = {task: verdicts[task] for task in tasks if verdicts[task]}
    if not known:
        return {
            "level": "none",
            "who": "Nothing to compare",
            "trust": "No run trained without labels has a score on a task.",
        }
    leaders: dict[str, list] = {}
    for task, verdict in known.items():
        leaders.setdefault(verdict.leader, []).append(task)
    sure = [task for task, verdict in known.items() if verdict.state == "best"]
    verb = "is best" if len(sure) == len(known) else "leads"
    who = "; ".join(f"{name} {verb} on {' and '.join(at)}" for name, at in leaders.items())
    if len(leaders) == 1 and len(known) > 1:
        who = f"{next(iter(leaders))} {verb} on {'both' if len(known) == 2 else f'all {len(known)}'} tasks"
    if len(sure) == len(known):
        return {
            "level": "good",
            "who": who,
            "trust": "Established: paired tests over seeds and over test images agree on every task.",
        }
    if sure:
        return {
            "level": "good",
            "who": who,
            "trust": f"Established on {' and '.join(sure)}; not on the rest.",
        }
    if all(verdict.state == "alone" for verdict in known.values()):
        return {
            "level": "none",
            "who": f"{next(iter(leaders))} has no rival",
            "trust": "It is the only run trained without labels, so nothing was compared.",
        }
    few = min(verdict.seeds for verdict in known.values())
    if few < MIN_SEEDS:
        return {
            "level": "fair",
            "who": who,
            "trust": f"{'One seed' if few == 1 else f'{few} shared seeds'}: an indication, not a result. "
            f"A ranking needs at least {MIN_SEEDS}.",
        }
    return {
        "level": "fair",
        "who": who,
        "trust": "Not established: no lead withstands the paired tests.",
    }


def warnings(
    rows: dict, tasks: list, cells: dict, costs: dict, data: dict, manifests: dict
) -> list[tuple[str, str]]:
    """(title, explanation) of everything that makes a comparison weaker than it looks; the gravest
    first.
    """
    found: list[tuple[str, str]] = []
    racing = [r for r in rows.values() if r.kind == "ssl"]
    across = {k: n for k, n in data.get("duplicates", {}).get("across", {}).items() if n}
    if any("test" in k and "train" in k for k in across):
        found.append(
            (
                "Test images also in training",
                ", ".join(f"{n} in {k}" for k, n in across.items())
                + ". Accuracies are too high by up to that share; remove the copies from the source.",
            )
        )
    fewest = min((len(r.seeds) for r in racing or rows.values()), default=0)
    if fewest == 1:
        found.append(
            (
                "One seed",
                "There is no interval over seeds, and another seed may reverse any order: "
                f"do not rank. Set grid.seeds to at least {MIN_SEEDS} numbers.",
            )
        )
    elif 1 < fewest < MIN_SEEDS:
        found.append(
            ("Two seeds", f"Their interval is very wide, and paired tests need {MIN_SEEDS}.")
        )
    if len({tuple(sorted(r.seeds)) for r in rows.values()}) > 1:
        counts = ", ".join(f"{r.name} {len(r.seeds)}" for r in rows.values())
        found.append(
            (
                "Different seeds",
                f"Paired tests use the seeds that two runs share only. Seeds per run: {counts}.",
            )
        )
    for row in (r for r in rows.values() if r.kind == "taught"):
        found.append(
            (
                f"{row.name} learnt from labels",
                f"{' and '.join(row.facts['label_targets'])}, which it learnt from, was trained with labels, "
                "so it is shown for reference and not ranked with runs that saw none.",
            )
        )
    seen = {r.name: costs[r.name]["images"] or 0 for r in racing}
    if seen and max(seen.values()) > 1.01 * min(seen.values()):
        found.append(
            (
                "Different numbers of images seen",
                ", ".join(f"{n} {v:,.0f}" for n, v in seen.items())
                + ". A longer training may be all the difference; compare at equal cost below.",
            )
        )
    for task in tasks:
        floor = max(
            (
                cells[n, task].interval.mean
                for n, r in rows.items()
                if not r.facts["trains"] and cells[n, task].interval
            ),
            default=None,
        )
        worse = [
            r.name
            for r in racing
            if floor is not None
            and cells[r.name, task].interval
            and cells[r.name, task].interval.mean <= floor
        ]
        if worse:
            found.append(
                (
                    f"No better than untrained on {task}",
                    f"{', '.join(worse)}: at or below the untrained encoder's {_percent(floor)} %. "
                    "Trained too short, badly tuned, or not suited to these images.",
                )
            )
    places = sorted(
        {
            f"{m.get('device')}, {m.get('threads')} threads"
            for i, m in manifests.items()
            if i.startswith("pretrain/")
        }
    )
    if len(places) > 1:
        found.append(
            (
                "Seconds are from different machines",
                f"{'; '.join(places)}: compare images and FLOPs rather than seconds.",
            )
        )
    return found


def notes(rows: dict, costs: dict, data: dict, manifests: dict) -> list[tuple[str, str]]:
    """(title, explanation) of what a reader should know although it takes nothing from the numbers."""
    found = [("About the data", text) for text in data.get("warnings", [])]
    if names := [n for n, k in costs.items() if k["target_images"]]:
        found.append(
            (
                "Targets cost extra",
                f"{', '.join(names)} needed a trained target; the cost table lists its share apart.",
            )
        )
    if names := [
        n
        for n, k in costs.items()
        if any(costs[b]["own_images"] for b in k["before"] if b in costs)
    ]:
        found.append(
            (
                "Teachers count",
                f"{', '.join(names)}: images seen, epochs, time and FLOPs include those of "
                "the runs whose encoders taught them, one after the other.",
            )
        )
    if data.get("quarantine", {}).get("count"):
        reasons = ", ".join(
            f"{n} {reason}" for reason, n in data["quarantine"].get("reasons", {}).items()
        )
        found.append(
            (
                "Broken images were left out",
                f"{data['quarantine']['count']} ({reasons}); quarantine.jsonl names them.",
            )
        )
    if any((m.get("git") or {}).get("dirty") for m in manifests.values()):
        found.append(
            (
                "Uncommitted code",
                "Some results were made with changes that no commit holds; their "
                "fingerprints still tell them apart.",
            )
        )
    return found


def _percent(value: float) -> str:
    return f"{value * 100:.1f}"
