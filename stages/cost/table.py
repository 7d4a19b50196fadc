"""Costs as text: job by job, all together, and beside what finished jobs took."""

from __future__ import annotations

import heapq
import time

from stages.cost.rehearsal import Cost
from workflow import machine
from workflow.durations import duration

# Of this process until here, nearly all for imports. Every job begins so; no manifest counts it.
START_S = time.process_time()


def text(plan, costs: dict[str, Cost]) -> str:
    """A line for each job, then what they take in all."""
    took = {id: plan.manifest(id).seconds if plan.fresh(id) else None for id in costs}
    width = max(map(len, costs))

    def line(name: str, images="", flops="", seconds="", memory="", past="") -> str:
        return f"{name:<{width}} {images:>12} {flops:>10} {seconds:>12} {memory:>7} {past:>12}"

    lines = [line("job", "images", "TFLOP", "time", "MB", "taken")]
    for id, c in costs.items():
        flops = "" if c.flops is None else f"{c.flops / 1e12:.4g}"
        past = "" if took[id] is None else duration(took[id])
        cells = (f"{c.images:,}", flops, duration(START_S + c.seconds), f"{c.memory_mb:.0f}", past)
        lines.append(f"{id:<{width}} not known: {c.missing}" if c.missing else line(id, *cells))
    seconds, flops, memory, unknown = total(costs)
    lines.append(line("all", "", f"{flops / 1e12:.4g}", duration(seconds), f"{memory:.0f}"))
    if unknown:
        lines.append(f"without {unknown} job(s) whose cost is not known")
    cores = machine.threads(plan.compute["threads"], machine.cores())
    lines.append(
        f"time: of each job alone, on {cores} core(s) for its {cores} thread(s); of all, one after "
        "the other"
    )
    if (together := slots(plan)) > 1:
        spent = duration(schedule(plan, costs, together))
        lines.append(f"with {together} jobs at a time, as Snakemake runs them here: {spent}")
    both = [(costs[id].seconds, s) for id, s in took.items() if s and not costs[id].missing]
    if both:
        expected, real = map(sum, zip(*both, strict=True))
        lines.append(
            f"of {len(both)} finished jobs, without their start: {duration(expected)} expected, "
            f"{duration(real)} taken, ratio {expected / real:.2f}"
        )
    return "\n".join(lines)


def total(costs: dict[str, Cost]) -> tuple[float, float, float, int]:
    """(seconds one job after the other, FLOPs, largest memory in MB, number of jobs not known)."""
    known = [c for c in costs.values() if not c.missing]
    seconds, flops = sum(START_S + c.seconds for c in known), sum(c.flops or 0 for c in known)
    return seconds, flops, max((c.memory_mb for c in known), default=0), len(costs) - len(known)


def slots(plan) -> int:
    """How many jobs Snakemake runs at a time here, with `--cores all`."""
    if machine.gpus(plan.compute["device"]):
        return max(1, machine.gpus_here() // plan.compute["processes"])
    cores = machine.cores()
    return max(1, cores // machine.threads(plan.compute["threads"], cores))


def schedule(plan, costs: dict[str, Cost], slots: int) -> float:
    """Seconds until the last job ends if `slots` run at a time, each once its inputs are there."""
    waiting, running, done, now = dict(plan.jobs), [], set(), 0.0
    while waiting or running:
        ready = [id for id, job in waiting.items() if done.issuperset(job.inputs.values())]
        for id in ready[: slots - len(running)]:
            del waiting[id]
            spent = 0 if costs[id].missing else START_S + costs[id].seconds
            heapq.heappush(running, (now + spent, id))
        now, id = heapq.heappop(running)
        done.add(id)
    return now
