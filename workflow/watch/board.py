"""Which jobs are done, run, wait or have failed, and how long the rest will take."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from workflow import progress
from workflow.expected import Expected, remaining
from workflow.manifest import Manifest
from workflow.plan import Job, Plan

STATES = ("done", "running", "waiting", "failed", "stopped")


@dataclass
class Seen:
    """What was seen last of a job. `record`: as workflow/progress.py describes it."""

    state: str = "waiting"
    began: float = 0.0  # when it began to run, seconds since 1970
    record: dict = field(default_factory=dict)
    manifest: Manifest | None = None
    stamp: tuple | None = None  # of the manifest's file, when it was read


class Board:
    """The jobs of a plan. `since`: records of failures before it do not count; `slots`: how many
    jobs run at a time.
    """

    def __init__(self, plan: Plan, expected: Expected, slots: int, since: float = 0.0):
        self.plan, self.expected, self.slots, self.since = plan, expected, slots, since
        self.jobs = {id: Seen() for id in plan.jobs}
        self.look()
        self.before = set(self.of("done"))  # what was done when this began

    def look(self) -> list[tuple[str, str]]:
        """Look at all files again; [(job, its new state)] of what changed."""
        changed = []
        for id, seen in self.jobs.items():
            before = seen.state
            seen.state = self._state(self.plan.jobs[id], seen)
            if seen.state != before:
                changed.append((id, seen.state))
        return changed

    def _state(self, job: Job, seen: Seen) -> str:
        if self._done(job, seen):
            return "done"
        record = progress.read(self.work(job))
        state = record.get("state", "waiting")
        seen.record, seen.began = record, record.get("began", 0.0)
        if state == "running":
            if progress.alive(record):
                return "running"
            if self._done(job, seen):  # it ended while this looked
                return "done"
            state = "failed" if seen.began >= self.since else "waiting"
        return state if seen.began >= self.since or state == "running" else "waiting"

    def _done(self, job: Job, seen: Seen) -> bool:
        try:
            about = job.manifest.stat()
            stamp = (about.st_ino, about.st_size, about.st_mtime_ns)
        except OSError:
            stamp = None
        if stamp != seen.stamp:
            made = self.plan.manifest(job.id) if stamp else None
            seen.stamp, seen.manifest = stamp, made if self._counts(job, made) else None
        return seen.manifest is not None

    def _counts(self, job: Job, manifest: Manifest | None) -> bool:
        """Is it that of this plan, or of a job that began after this, with files edited since?"""
        if manifest is None:
            return False
        if self.plan.fresh(job.id):
            return True
        try:
            began = datetime.fromisoformat(manifest.created).timestamp()
        except ValueError:
            return False
        return self.since > 0 and began >= self.since - 1

    def work(self, job: Job) -> Path:
        """Where a job keeps its record."""
        return self.plan.results.parent / "work" / job.fingerprint

    def of(self, state: str) -> list[str]:
        """The jobs in a state, in the plan's order."""
        return [id for id, seen in self.jobs.items() if seen.state == state]

    def counts(self) -> Counter:
        """{state: number of jobs}."""
        return Counter(seen.state for seen in self.jobs.values())

    def pace(self, id: str) -> float:
        """How much longer finished jobs like this one took than was expected; all where there is
        none like it, 1 before there is any.
        """
        took = {
            done: (self.jobs[done].manifest.seconds + self.expected.start_s, expected)
            for done in self.of("done")
            if done not in self.before and (expected := self.expected.seconds(done))
        }
        like = {done for done in took if kind(self.plan.jobs[done]) == kind(self.plan.jobs[id])}
        pairs = [took[done] for done in like or took]
        return sum(t for t, _ in pairs) / sum(e for _, e in pairs) if pairs else 1.0

    def needs(self, id: str) -> float | None:
        """Seconds that a whole job takes: as expected, else as those like it did; None: unknown."""
        expected = self.expected.seconds(id)
        if expected is not None:
            return expected * self.pace(id)
        like = [
            self.jobs[other].manifest.seconds
            for other in self.of("done")
            if kind(self.plan.jobs[other]) == kind(self.plan.jobs[id])
        ]
        return sum(like) / len(like) if like else None

    def left(self, id: str) -> float | None:
        """Seconds until a job that runs or waits is done, once it runs; None: unknown."""
        seen, now = self.jobs[id], time.time()
        if seen.state == "running" and seen.record.get("left_s") is not None:
            return max(0.0, seen.record["left_s"] - (now - seen.record["time"]))
        needs = self.needs(id)
        if needs is None or seen.state != "running":
            return needs
        return max(1.0, needs - (now - seen.began))

    def left_in_all(self) -> float | None:
        """Seconds until the last job is done; None while that of a job is unknown."""
        left = {id: self.left(id) for id in (*self.of("running"), *self.of("waiting"))}
        if None in left.values():
            return None
        return remaining(self.plan, left, self.of("running"), self.slots)

    def share(self) -> float:
        """How much of the work that there was to do is done, 0 to 1; jobs count alike where no
        time is expected of them.
        """
        todo = [id for id in self.jobs if id not in self.before]
        known = all(self.expected.seconds(id) for id in todo)
        weights = {id: self.expected.seconds(id) if known else 1.0 for id in todo}
        done = sum(weight * self._share(id) for id, weight in weights.items())
        return done / sum(weights.values()) if todo else 1.0

    def _share(self, id: str) -> float:
        seen = self.jobs[id]
        if seen.state != "running":
            return float(seen.state == "done")
        if seen.record.get("steps"):
            return min(1.0, seen.record["step"] / seen.record["steps"])
        needs = self.needs(id)
        return min(0.95, (time.time() - seen.began) / needs) if needs else 0.0


def kind(job: Job) -> tuple[str, ...]:
    """What jobs have in common that take about the same time: the stage, and the task or run."""
    part = job.name.split("/")[-1]
    return job.stage, part if job.stage != "pretrain" else part.rpartition("-s")[0]
