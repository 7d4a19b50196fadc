"""What a run of the plan will take: per job images, FLOPs, seconds on this machine, memory; and the sum.

One job of each kind is measured for a few steps (workflow/measure.py, in a process of its own, so that its memory is
its own); jobs that differ in seed or name only share the measurement. The rest is arithmetic. Imports no torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

START_S = 4.0  # a process and its imports, which a manifest's wall_s does not count
REPORT_S = START_S + 2.0


@dataclass(frozen=True)
class Cost:
    """Of one job. `images`: seen, over all epochs; `flops`: of its training, None where it has none; `seconds` and
    `memory_mb` None where `missing` says why they are not known."""

    images: int = 0
    flops: float | None = None
    seconds: float | None = None
    memory_mb: float | None = None
    missing: str = ""


def cost(stage: str, params: dict, found: dict) -> Cost:
    """A job's cost from what a unit of its work costs (a line of workflow/measure.py)."""
    if "missing" in found:
        return Cost(missing=found["missing"])
    counts, memory = found["counts"], found["memory_mb"]
    pictures = counts["train"] + counts["val"] + counts["test"]
    if stage == "report":
        return Cost(0, None, REPORT_S, memory)
    if "step_s" in found:
        batch = found.get("batch_size", params["train"]["batch_size"])
        steps = found.get("epochs", params["train"]["epochs"]) * (counts["train"] // batch)
        images = steps * batch
        return Cost(images, images * found["flops_per_image"], START_S + steps * found["step_s"], memory)
    if "image_s" in found:
        images = counts["train"] * found.get("passes", 1) + counts["val"] + counts["test"] if stage == "transfer" else pictures
        return Cost(images, None, START_S + images * found["image_s"] + counts["train"] * found.get("head_s", 0), memory)
    return Cost(0, None, START_S, memory)


def kind(job, jobs: dict) -> str:
    """What a measurement depends on: the parameters of the job and of the targets above it, but for seed and names."""
    params = {key: value for key, value in job.params.items() if key not in ("seed", "run", "stage")}
    if job.stage == "target":
        params["target"] = {k: v for k, v in params["target"].items() if k != "name"}
    above = [kind(jobs[i], jobs) if i.startswith("target/") else i.split("/")[0] for i in job.inputs[:2]]
    return json.dumps([job.stage, params, above], sort_keys=True, default=str)


def estimate(plan, results: str, steps: int = 8, measured=None) -> dict[str, Cost]:
    """{job: Cost} of every job of the plan. `measured(job)` replaces the process (for tests)."""
    measured = measured or (lambda job: _measured(plan, job, results, steps))
    known: dict[str, dict] = {}
    costs = {}
    for id, job in plan.jobs.items():
        if (key := kind(job, plan.jobs)) not in known:
            print(f"measuring {id} ...", file=sys.stderr, flush=True)
            known[key] = measured(job)
        costs[id] = cost(job.stage, job.params, known[key])
    return costs


def _measured(plan, job, results: str, steps: int) -> dict:
    command = [sys.executable, "-m", "workflow.measure", "--job", job.id, "--steps", str(steps)]
    command += ["--params", str(plan.params_file), "--results", results]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"missing": f"measuring failed: {last}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(plan, costs: dict[str, Cost]) -> str:
    """The costs as lines of text; beside what jobs took that are finished and up to date, as their manifests say."""
    took = {id: plan.manifest(id)["wall_s"] if plan.fresh(id) else None for id in costs}
    width = max(map(len, costs))
    lines = [f"{'job':<{width}} {'images':>12} {'TFLOP':>10} {'time':>9} {'MB':>7} {'took':>9}"]
    for id, c in costs.items():
        flops = "" if c.flops is None else f"{c.flops / 1e12:.4g}"
        past = "" if took[id] is None else clock(took[id])
        if c.missing:
            lines.append(f"{id:<{width}} not known: {c.missing}")
        else:
            lines.append(f"{id:<{width}} {c.images:>12,} {flops:>10} {clock(c.seconds):>9} {c.memory_mb:>7.0f} {past:>9}")
    seconds, flops, memory, unknown = total(costs)
    lines.append(f"{'all, one after the other':<{width}} {'':>12} {flops / 1e12:>10.4g} {clock(seconds):>9} {memory:>7.0f}")
    if unknown:
        lines.append(f"without {unknown} job(s) whose cost is not known")
    both = [(costs[id].seconds - START_S, s) for id, s in took.items() if s and costs[id].seconds]
    if both:
        expected, real = map(sum, zip(*both, strict=True))
        times = f"{clock(expected)} expected, {clock(real)} taken, ratio {expected / real:.2f}"
        lines.append(f"of {len(both)} finished jobs, without their start: {times}")
    return "\n".join(lines)


def total(costs: dict[str, Cost]) -> tuple[float, float, float, int]:
    """(seconds one job after the other, FLOPs, largest memory in MB, number of jobs not known)."""
    known = [c for c in costs.values() if not c.missing]
    seconds, flops = sum(c.seconds for c in known), sum(c.flops or 0 for c in known)
    return seconds, flops, max((c.memory_mb for c in known), default=0), len(costs) - len(known)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
