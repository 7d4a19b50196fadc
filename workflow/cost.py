"""What a run of the plan will take: per job images, FLOPs, seconds on this machine, memory; and the
sum.

One job of each kind is measured for a few steps (workflow/measure.py); jobs that differ in seed or
name only share the measurement, and so do the tasks of encoders that are built alike, however they
were pretrained. The rest is arithmetic. Each is measured in a process of its own, so that its
memory is its own: the fork of one that has imported everything and done nothing else.

Seconds are those of a job alone on as many cores as it has threads, which are those that Snakemake
gives it.
"""

from __future__ import annotations

import heapq
import json
import multiprocessing
import os
import sys
from dataclasses import dataclass

from workflow import ledger
from workflow.plan import manifests

START_S = 4.0  # a process and its imports, which a manifest's wall_s does not count
REPORT_S = START_S + 2.0


@dataclass(frozen=True)
class Cost:
    """Of one job. `images`: trained on or encoded, over all epochs; `flops`: of its training, None
    where it has none; `seconds` and `memory_mb` None where `missing` says why they are not known.
    """

    images: int = 0
    flops: float | None = None
    seconds: float | None = None
    memory_mb: float | None = None
    missing: str = ""


def cost(stage: str, params: dict, found: dict, cached: bool = False) -> Cost:
    """A job's cost from what a unit of its work costs, as workflow/measure.py finds it: `step_s` (a
    training step), `once_s` (what a training does but once), `image_s` (reading, encoding or
    looking at an image), `head_s` (all epochs of the linear heads, per training image). `cached`:
    another task has encoded the images by then.
    """
    if "missing" in found:
        return Cost(missing=found["missing"])
    counts, memory = found["counts"], found["memory_mb"]
    held_out = counts["val"] + counts["test"]
    if stage == "report":
        return Cost(0, None, REPORT_S, memory)
    seconds = START_S + found.get("once_s", 0) + counts["train"] * found.get("head_s", 0)
    if "step_s" in found:
        batch = found.get("batch_size", params["train"]["batch_size"])
        steps = found.get("epochs", params["train"]["epochs"]) * (counts["train"] // batch)
        looked = {"target": counts["val"] or counts["train"], "transfer": held_out}.get(stage, 0)
        seconds += steps * found["step_s"] + looked * found.get("image_s", 0)
        return Cost(steps * batch, steps * batch * found["flops_per_image"], seconds, memory)
    passes, images = found.get("passes", 1), 0
    if stage == "data":
        images = counts["train"] + held_out
    elif stage == "target":
        images = counts["val"] or counts["train"]
    elif stage == "transfer":
        images = (0 if cached else held_out) + (
            0 if cached and passes == 1 else passes * counts["train"]
        )
    return Cost(images, None, seconds + images * found.get("image_s", 0), memory)


def kind(job, jobs: dict, encoders: dict[str, str] | None = None) -> str:
    """What a measurement depends on: the parameters of the job and of what it learns from, but for
    seed and names.

    `encoders`: {pretraining job: a digest of how its encoder is built}, which is all that a task
    sees of it.
    """
    names = ("seed", "run", "stage", *(["method"] if job.stage == "transfer" else []))
    params = {key: value for key, value in job.params.items() if key not in names}
    if job.stage == "target":
        params["target"] = {k: v for k, v in params["target"].items() if k != "name"}
    above = [
        (encoders or {}).get(i) or kind(jobs[i], jobs, encoders) for i in job.inputs if i != "data"
    ]
    return json.dumps(
        [job.stage, params, above if job.stage != "report" else []], sort_keys=True, default=str
    )


def estimate(plan, measured=None) -> dict[str, Cost]:
    """{job: Cost} of every job of the plan. `measured(job, counts)` replaces the measurement (for
    tests).
    """
    measured = measured or _measurements(plan)
    known: dict[str, dict] = {}
    encoders, counts, costs, encoded = {}, None, {}, set()
    for id, job in plan.jobs.items():
        key = kind(job, plan.jobs, encoders)
        if key not in known:
            print(f"measuring {id} ...", file=sys.stderr, flush=True)
            known[key] = measured(job, counts)
        found = known[key]
        counts = counts or found.get("counts")
        if "encoder" in found:
            encoders[id] = found["encoder"]
        features = (
            *job.inputs[1:],
            found.get("features"),
        )  # kept for the next task (stages/tasks/_features.py)
        costs[id] = cost(job.stage, job.params, found, features in encoded)
        if "features" in found and found["passes"] == 1:
            encoded.add(features)
    return costs


def _measurements(plan):
    """`measured` of `estimate`, by workflow/measure.py in a fork each."""
    # A thread that waits for another must sleep: spinning would count as work where other load
    # delays that one.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported
    from workflow import measure  # once for all: the imports take longer than most measurements

    fork, given = multiprocessing.get_context("fork"), threads(plan)

    def measured(job, counts: dict | None) -> dict:
        receive, send = fork.Pipe(duplex=False)
        process = fork.Process(
            target=lambda: send.send(measure.measured(plan, job.id, counts, given))
        )
        process.start()
        send.close()
        try:
            return receive.recv()
        except EOFError:
            process.join()
            return {
                "missing": f"measuring failed: its process ended with status {process.exitcode}"
            }
        finally:
            process.join()

    return measured


def threads(plan) -> int:
    return ledger.threads(plan.compute["threads"], ledger.cores())


def slots(plan) -> int:
    """How many jobs Snakemake runs at a time here, with `--cores all`."""
    if ledger.gpus(plan.compute["device"]):
        return max(1, ledger.gpus_here() // plan.compute["processes"])
    return max(1, ledger.cores() // threads(plan))


def schedule(plan, costs: dict[str, Cost], slots: int) -> float:
    """Seconds until the last job ends if `slots` run at a time and each begins when its inputs are
    there.
    """
    waiting, running, done, now = dict(plan.jobs), [], set(), 0.0
    while waiting or running:
        ready = [id for id, job in waiting.items() if done.issuperset(job.inputs)]
        for id in ready[: slots - len(running)]:
            del waiting[id]
            heapq.heappush(running, (now + (costs[id].seconds or 0), id))
        now, id = heapq.heappop(running)
        done.add(id)
    return now


def table(plan, costs: dict[str, Cost]) -> str:
    """The costs as lines of text; beside what jobs took that are finished and up to date, as their
    manifests say.
    """
    took = {id: manifests.seconds(plan.manifest(id)) if plan.fresh(id) else None for id in costs}
    width = max(map(len, costs))
    lines = [f"{'job':<{width}} {'images':>12} {'TFLOP':>10} {'time':>9} {'MB':>7} {'took':>9}"]
    for id, c in costs.items():
        flops = "" if c.flops is None else f"{c.flops / 1e12:.4g}"
        past = "" if took[id] is None else clock(took[id])
        if c.missing:
            lines.append(f"{id:<{width}} not known: {c.missing}")
        else:
            lines.append(
                f"{id:<{width}} {c.images:>12,} {flops:>10} {clock(c.seconds):>9} {c.memory_mb:>7.0f} {past:>9}"
            )
    seconds, flops, memory, unknown = total(costs)
    lines.append(
        f"{'all':<{width}} {'':>12} {flops / 1e12:>10.4g} {clock(seconds):>9} {memory:>7.0f}"
    )
    if unknown:
        lines.append(f"without {unknown} job(s) whose cost is not known")
    together, cores = slots(plan), threads(plan)
    lines.append(
        f"time: of each job alone, on {cores} core(s) for its {cores} thread(s); of all, one after the other"
    )
    if together > 1:
        lines.append(
            f"with {together} jobs at a time, as Snakemake runs them here: {clock(schedule(plan, costs, together))}"
        )
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
