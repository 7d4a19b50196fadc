"""What jobs are expected to take, as `python -m stages.cost --json FILE` has written it, and how
that adds up.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from workflow import machine
from workflow.plan import Plan


@dataclass(frozen=True)
class Expected:
    """Of each job {"fingerprint", "seconds", "flops", "memory_mb", "missing"}; `start_s`: of any
    process; `gpu`: was it measured on one?
    """

    jobs: Mapping[str, dict] = field(default_factory=dict)
    start_s: float = 0.0
    gpu: bool = False

    @classmethod
    def read(cls, path: Path, plan: Plan) -> Expected:
        """What a file says of the jobs of this plan; nothing if there is none."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            jobs = {
                id: about
                for id, about in found["jobs"].items()
                if id in plan.jobs and about["fingerprint"] == plan.jobs[id].fingerprint
            }
            return cls(jobs, float(found["start_s"]), bool(found.get("gpu")))
        except (OSError, ValueError, KeyError, TypeError):
            return cls()

    def seconds(self, id: str) -> float | None:
        """Of a job, with the start of its process; None if nothing is known."""
        about = self.jobs.get(id)
        return None if about is None or about["missing"] else about["seconds"] + self.start_s

    def memory(self, id: str) -> float:
        """Of a job, in MB; 0 if nothing is known."""
        return (self.jobs.get(id) or {}).get("memory_mb") or 0.0

    def flops(self, id: str) -> float:
        """Of a job's training; 0 if it has none."""
        return (self.jobs.get(id) or {}).get("flops") or 0.0


def file(plan: Plan) -> Path:
    """Where an estimate lies: beside the work in progress, since it is of no result."""
    return plan.results.parent / "work" / "expected.json"


def slots(plan: Plan) -> int:
    """How many jobs Snakemake runs at a time here, with `--cores all`."""
    if machine.gpus(plan.compute["device"]):
        return max(1, machine.gpus_here() // plan.compute["processes"])
    cores = machine.cores()
    return max(1, cores // machine.threads(plan.compute["threads"], cores))


def remaining(
    plan: Plan, seconds: Mapping[str, float], running: Iterable[str], slots: int
) -> float:
    """Seconds until the last of these jobs ends if `slots` run at a time, each once its inputs are
    there.

    `seconds`: that each needs from now, or from its start; `running`: those that run already. Jobs
    of the plan that are not among them count as done.
    """
    done = plan.jobs.keys() - seconds.keys()
    ends = [(seconds[id], id) for id in running]
    heapq.heapify(ends)
    waiting = {id: job for id, job in plan.jobs.items() if id in seconds and id not in set(running)}
    now = 0.0
    while waiting or ends:
        ready = [id for id, job in waiting.items() if done.issuperset(job.inputs.values())]
        for id in ready[: max(0, slots - len(ends))]:
            del waiting[id]
            heapq.heappush(ends, (now + seconds[id], id))
        if not ends:  # what waits needs a job that failed
            break
        now, id = heapq.heappop(ends)
        done = done | {id}
    return now
