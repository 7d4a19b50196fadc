"""The first sentence of a report: what pretraining gave, or why that is not known.

It is about the first task of params.yaml on which a run that saw no labels and an untrained encoder
have scores, so no result chooses it. Of several such runs it names the best. An interval around the
best of several is too narrow, so its level pays for their number (Bonferroni). "Beats" and "does
worse" need intervals over seeds and over test images that exclude zero, and at least MIN_SEEDS
seeds; with fewer the sentence says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stages.reporting import stats
from stages.reporting.results import Cell, Row, Task
from stages.reporting.stats import LEVEL, MIN_SEEDS, Interval
from workflow.messages import listed

Cells = Mapping[tuple[str, str], Cell]


@dataclass(frozen=True)
class Sentence:
    """`text`: the sentence; `more`: whether other tasks agree, "" where there is none."""

    text: str
    more: str = ""


def sentence(
    rows: Mapping[str, Row], tasks: Sequence[Task], cells: Cells, encoders: Mapping[str, object]
) -> Sentence:
    """What the report found, for somebody who reads nothing else of it.

    encoders: of each run, how its encoder is built.
    """
    racing = {task.id: _tested(rows, task, cells, lambda row: row.kind == "ssl") for task in tasks}
    floors = {task.id: _tested(rows, task, cells, _untrained) for task in tasks}
    both = [task for task in tasks if racing[task.id] and floors[task.id]]
    if both:
        found = [Gain.of(task, racing[task.id], floors[task.id], cells, encoders) for task in both]
        return Sentence(found[0].text, _elsewhere(found))
    one = next((task for task in tasks if racing[task.id]), None)
    if one is not None:
        return Sentence(_without_floor(one, racing[one.id], cells))
    return Sentence(_without_runs(rows, tasks, cells))


def _untrained(row: Row) -> bool:
    return not row.facts["trains"]


def _tested(rows: Mapping[str, Row], task: Task, cells: Cells, wanted) -> list[str]:
    """The runs of a kind that have a score on a task, the best first."""
    known = [n for n, row in rows.items() if wanted(row) and cells[n, task.id].interval]
    return sorted(known, key=lambda name: -cells[name, task.id].interval.mean)


# ------------------------------------------------------------------------ against no training


@dataclass(frozen=True)
class Gain:
    """The best run against an untrained encoder on a task: "up", "down", or "open"."""

    task: Task
    state: str
    few: int  # seeds, where they are fewer than a ranking needs; else 0
    text: str

    @classmethod
    def of(
        cls,
        task: Task,
        racing: list[str],
        floors: list[str],
        cells: Cells,
        encoders: Mapping[str, object],
    ) -> Gain:
        """racing, floors: names of runs, the best first."""
        best = racing[0]
        alike = [name for name in floors if encoders[name] == encoders[best]]
        floor = (alike or floors)[0]
        found = Difference(task, cells[best, task.id], cells[floor, task.id], len(racing))
        what = {
            "up": "beats an untrained encoder",
            "down": "does worse than an untrained encoder",
            "open": "has not been shown to beat an untrained encoder",
        }[found.state]
        seeds = {0: "Pretraining", 1: "In one seed, pretraining"}
        start = seeds.get(found.few, f"In {found.few} seeds, pretraining")
        who = best if len(racing) == 1 else f"{best}, the best of {len(racing)} runs,"
        other = (
            "the untrained encoder" if alike else f"an untrained encoder built otherwise, {floor},"
        )
        text = (
            f"{start} without labels {what} on {task.title}: {who} {_reaches(task, found.one)}, "
            f"{other} {_also(task, found.other)} ({found.text})."
        )
        return cls(task, found.state, found.few, text)


def _elsewhere(found: list[Gain]) -> str:
    """Whether the other tasks say the same of pretraining, each of its own best run."""
    first, *others = found
    words = {
        "up": "It beats one on {}.",
        "down": "It does worse than one on {}.",
        "open": "It has not been shown to beat one on {}.",
        first.state: "The same holds on {}.",
    }
    by = {state: [g.task.title for g in others if g.state == state] for state in words}
    said = [words[state].format(listed(by[state])) for state in (first.state, *by) if by[state]]
    text = " ".join(dict.fromkeys(said))
    few = max((gain.few for gain in others), default=0)
    start = {0: "", 1: "In that seed: "}.get(few, f"In {few} seeds: ")
    return text and start + text


# ---------------------------------------------------------------------------------- without it


def _without_floor(task: Task, racing: list[str], cells: Cells) -> str:
    """No untrained encoder has a score: the best run against the next, if there is one."""
    best, *others = racing
    one = cells[best, task.id]
    if not others:
        return (
            f"On {task.title}, {best} {_reaches(task, one.interval.mean)}, and there is nothing to "
            "compare it with: no untrained encoder and no other run without labels was tested."
        )
    pairs = len(racing) * len(others) // 2
    found = Difference(task, one, cells[others[0], task.id], pairs)
    few = {0: "", 1: "in one seed "}.get(found.few, f"in {found.few} seeds ")
    ahead = "is ahead of" if found.state == "up" else "is not told apart from"
    place = f", the second of {len(racing)} runs," if len(others) > 1 else ""
    return (
        f"On {task.title}, {few}{best} {ahead} {others[0]}: it {_reaches(task, found.one)}, "
        f"{others[0]}{place} {_also(task, found.other)} ({found.text}); no untrained encoder was "
        "tested, so what pretraining gives is not known."
    )


def _without_runs(rows: Mapping[str, Row], tasks: Sequence[Task], cells: Cells) -> str:
    """No run that saw no labels has a score: others are named for reference."""
    for task in tasks:
        if known := _tested(rows, task, cells, lambda row: True):
            values = {name: cells[name, task.id].interval.mean for name in known}
            first, *rest = known
            shown = [f"{first} {_reaches(task, values[first])}"]
            shown += [f"{name} {_also(task, values[name])}" for name in rest]
            return (
                "No run that was pretrained without labels was tested, so what that gives is not "
                f"known; for reference, on {task.title} {', '.join(shown)}."
            )
    return (
        "No run was tested on a task: this report tells what training took, not what it is worth."
    )


# ---------------------------------------------------------------------------------- numbers


class Difference:
    """One run minus another on a task, by the seeds that they share.

    one, other: their means; state: "up" or "down" if every interval excludes zero, else "open";
    few: the number of common seeds if it is less than MIN_SEEDS, else 0; text: the difference with
    the least certain interval.
    """

    def __init__(self, task: Task, one: Cell, other: Cell, choices: int):
        level = 1 - (1 - LEVEL) / choices
        found = stats.contrast([one.scores], [other.scores], level)
        self.one, self.other = one.interval.mean, other.interval.mean
        self.state, self.few = "open", 0
        self.text = "no seed in common, so no interval"
        if found is None:
            return
        common = sorted(set(one.scores.scores) & set(other.scores.scores))
        self.one, self.other = (_mean(cell, common) for cell in (one, other))
        self.few = len(common) if len(common) < MIN_SEEDS else 0
        over = {f"over {len(common)} seeds": found.seeds, "over the test images": found.images}
        known = {name: i for name, i in over.items() if i is not None and i.low is not None}
        change = found.seeds.mean
        if known and change > 0 and all(i.low > 0 for i in known.values()):
            self.state = "up"
        elif known and change < 0 and all(i.high < 0 for i in known.values()):
            self.state = "down"
        # of an mIoU, say, the images' mean is another number than the headline; where all images
        # are scored alike there is no spread to tell anything from
        shown = {n: i for n, i in known.items() if abs(i.mean - change) < 1e-6 and i.half > 0}
        self.text = self._text(task, change, shown, len(common))

    def _text(self, task: Task, change: float, known: dict[str, Interval], seeds: int) -> str:
        parts = [task.change(change)]
        if known:
            name = max(known, key=lambda n: (known[n].low <= 0 <= known[n].high, known[n].half))
            span = f"{task.change(known[name].low)} to {task.change(known[name].high)}"
            parts.append(f"{LEVEL * 100:.0f} % interval {span} {name}")
        else:
            parts.append("no interval")
        text = ", ".join(parts)
        if seeds == 1:
            return f"{text}; another seed may differ"
        return text if f"over {seeds} seeds" in text else f"{text}; {seeds} seeds"


def _mean(cell: Cell, seeds: list[int]) -> float:
    return sum(cell.scores.scores[seed] for seed in seeds) / len(seeds)


def _reaches(task: Task, value: float) -> str:
    """ "is right on 41.2 % of the test images", or "reaches 0.612 AUC"."""
    if task.key == "top1":
        return f"is right on {task.show(value)} {task.unit} of the test images"
    unit = f" {task.unit}" if task.unit else ""
    return f"reaches {task.show(value)}{unit} {task.label}"


def _also(task: Task, value: float) -> str:
    """The same of a second run: "on 24.0 %", or "0.412"."""
    shown = f"{task.show(value)} {task.unit}".rstrip()
    return f"on {shown}" if task.key == "top1" else shown
