"""Costs as text: job by job, all together, and beside what finished jobs took."""

from __future__ import annotations

import time
from dataclasses import asdict

from stages.cost.rehearsal import Cost
from workflow import expected, machine
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
    if (together := expected.slots(plan)) > 1:
        spent = duration(schedule(plan, costs, together))
        lines.append(f"with {together} jobs at a time, as Snakemake runs them here: {spent}")
    both = [(costs[id].seconds, s) for id, s in took.items() if s and not costs[id].missing]
    if both:
        ours, real = map(sum, zip(*both, strict=True))
        lines.append(
            f"of {len(both)} finished jobs, without their start: {duration(ours)} expected, "
            f"{duration(real)} taken, ratio {ours / real:.2f}"
        )
    return "\n".join(lines)


def total(costs: dict[str, Cost]) -> tuple[float, float, float, int]:
    """(seconds one job after the other, FLOPs, largest memory in MB, number of jobs not known)."""
    known = [c for c in costs.values() if not c.missing]
    seconds, flops = sum(START_S + c.seconds for c in known), sum(c.flops or 0 for c in known)
    return seconds, flops, max((c.memory_mb for c in known), default=0), len(costs) - len(known)


def schedule(plan, costs: dict[str, Cost], slots: int) -> float:
    """Seconds until the last job ends if `slots` run at a time, each once its inputs are there."""
    seconds = {id: 0.0 if c.missing else START_S + c.seconds for id, c in costs.items()}
    return expected.remaining(plan, seconds, (), slots)


def record(plan, costs: dict[str, Cost]) -> dict:
    """The costs as workflow/expected.py reads them."""
    prints = {id: {"fingerprint": plan.jobs[id].fingerprint} for id in costs}
    jobs = {id: prints[id] | asdict(c) for id, c in costs.items()}
    return {"start_s": START_S, "gpu": machine.gpus(plan.compute["device"]) > 0, "jobs": jobs}
