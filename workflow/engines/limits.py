"""What a job asks a cluster for: minutes and memory, from what is known of its cost.

Known is what `python -m stages.cost --json work/expected.json` found for exactly this job, in a
rehearsal with its model and its images; else what finished jobs like it took, another seed of the
same run. Where neither is there, a stage gets a fixed limit. Every number is an upper one:

    minutes = 30 + 4 * expected        a machine may be four times as slow as the one that measured
    MB      = 2000 + 1.5 * expected + 0.016 * images of the data set

A rehearsal sees a few images; 16 kB for each is what a task keeps of it: four vectors of 1024
numbers. Each further attempt of a job (`retries`) asks for as much again. `--set-resources` and a
profile's `set-resources` win over all of it. A cost that was measured without a GPU does not count
for jobs that get one, or the other way round.
"""

from __future__ import annotations

import math
from functools import cached_property

from workflow import machine
from workflow.expected import Expected, file
from workflow.plan import Job, Plan
from workflow.plan.lacks import splits

MINUTES = {"data": 240, "target": 1440, "pretrain": 4320, "transfer": 1440, "report": 60}
SLOWER, LEAST_MIN = 4, 30
MORE, LEAST_MB, IMAGE_MB = 1.5, 2000, 0.016
UNKNOWN_MB, SIDE = 8000, 64  # where nothing is known: so much for each 64 px of an image's side


class Limits:
    """Of the jobs of a plan."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.gpu = machine.gpus(plan.compute["device"]) > 0

    @cached_property
    def expected(self) -> Expected:
        """What a rehearsal on this machine found."""
        return Expected.read(file(self.plan), self.plan)

    @cached_property
    def finished(self) -> dict[tuple, tuple[float, float]]:
        """{kind: (most seconds, most MB)} of the jobs that are done, on the same kind of device."""
        most: dict[tuple, tuple[float, float]] = {}
        for id, job in self.plan.jobs.items():
            made = self.plan.manifest(id)
            if made and made.fingerprint == job.fingerprint and self._alike(made.device):
                seconds, memory = most.get(kind(job), (0.0, 0.0))
                mine = self.plan.processes(id) * made.peak_memory_mb  # which is that of one
                most[kind(job)] = (max(seconds, made.seconds), max(memory, mine))
        return most

    def _alike(self, device: str) -> bool:
        return device == "none" or device.startswith("cuda") == self.gpu

    def cost(self, id: str) -> tuple[float, float] | None:
        """(seconds, MB) as measured; None if nothing is known."""
        found = [self.finished.get(kind(self.plan.jobs[id]))]
        if (seconds := self.expected.seconds(id)) and self.expected.gpu == self.gpu:
            found.append((seconds, self.expected.memory(id)))
        known = [each for each in found if each]
        return (max(s for s, _ in known), max(m for _, m in known)) if known else None

    def minutes(self, id: str, attempt: int = 1) -> int:
        """The time limit of a job."""
        cost = self.cost(id)
        if cost is None:
            return attempt * MINUTES[self.plan.jobs[id].stage]
        return attempt * math.ceil(LEAST_MIN + SLOWER * cost[0] / 60)

    def memory(self, id: str, attempt: int = 1) -> int:
        """The memory of a job in MB, of all its processes."""
        cost, job = self.cost(id), self.plan.jobs[id]
        if cost is None or not cost[1]:  # a quick rehearsal measures none of finished jobs
            side = job.params.get("image_size") or job.params.get("data", {}).get("image_size", 0)
            return attempt * UNKNOWN_MB * max(1, math.ceil(side / SIDE))
        return attempt * math.ceil(LEAST_MB + MORE * cost[1] + IMAGE_MB * self.images(job))

    def images(self, job: Job) -> int:
        """How many images the job's data set has, once it is made."""
        data = self.plan.jobs[job.inputs["data"]].output if "data" in job.inputs else job.output
        return sum(split.get("count", 0) for split in splits(data).values())

    def unknown(self) -> list[str]:
        """The jobs that are not done and of which nothing is known."""
        todo = (id for id, job in self.plan.jobs.items() if job.stage not in ("data", "report"))
        return [id for id in todo if not self.plan.fresh(id) and self.cost(id) is None]


def kind(job: Job) -> tuple[str, ...]:
    """What jobs have in common that cost about the same: all but the seed."""
    names = job.name.split("/")
    run = names[0].rpartition("-s")[0] if job.stage in ("pretrain", "transfer") else names[0]
    return (job.stage, run, *names[1:])
