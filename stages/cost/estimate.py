"""The cost of every job of a plan, by a rehearsal of one job of each kind."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from stages.cost.rehearsal import Cost, Rehearsal
from stages.kit.job.provenance import peak_mb

REPORT_S = 2.0  # it only reads what the others made
IMPORTED_MB = peak_mb()  # a fork's memory leaves out the code of libraries


def estimate(
    plan, rehearsed: Callable[..., Cost] | None = None, quick: bool = False
) -> dict[str, Cost]:
    """{job: Cost} of every job of the plan. rehearsed(plan, job, made): for tests.

    quick: coarse rehearsals, none of jobs that are finished, and one of a task for all encoders
    that begin from the same model, however a method changes it.
    """
    rehearsed = rehearsed or (quickly if quick else in_a_fork)
    kinds, first, made, costs = {}, {}, {}, {}
    with tempfile.TemporaryDirectory(prefix="mimlab-cost-") as folder:
        for id, job in plan.jobs.items():
            if job.stage == "report":
                costs[id] = Cost(seconds=REPORT_S, memory_mb=IMPORTED_MB)
                continue
            kinds[id] = kind(job, kinds, made, alike=quick)
            if quick and plan.fresh(id):
                made[id] = Path(folder) / id.replace("/", "-")  # where nothing lies
                costs[id] = Cost(seconds=plan.manifest(id).seconds)
                continue
            one = first.setdefault(kinds[id], id)
            made[id] = Path(folder) / one.replace("/", "-")
            if one == id:
                print(f"rehearsing {id} ...", file=sys.stderr, flush=True)
                costs[id] = rehearsed(plan, job, made)
            costs[id] = costs[one]
    return costs


def kind(job, kinds: dict[str, str], made: dict[str, Path], alike: bool = False) -> str:
    """A digest of all that the cost of a job depends on; kinds, made: of the jobs before it.

    Seeds and names are left out. All that a job sees of an encoder is how it is built; `alike`:
    of a task, not even that, but for the model in params.yaml.
    """
    inputs = {}
    for role, id in job.inputs.items():
        encoder = made[id] / "encoder" / "config.json"
        if alike and job.stage == "transfer" and role != "data":
            inputs[role] = ""
        else:
            inputs[role] = encoder.read_text() if encoder.is_file() else kinds[id]
    names = {"seed", "run", "stage"} | ({"method"} if job.stage == "transfer" else set())
    params = {key: value for key, value in job.params.items() if key not in names}
    for part in {"target", "method", "task"} & set(params):
        params[part] = {key: value for key, value in params[part].items() if key != "name"}
    text = json.dumps([job.stage, params, inputs], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def quickly(plan, job, made: dict[str, Path]) -> Cost:
    """A coarse rehearsal. What every training imports is imported once for all, and added."""
    more, found = imported(), in_a_fork(plan, job, made, quick=True)
    return found if found.flops is None else replace(found, seconds=found.seconds + more)


@lru_cache(maxsize=1)
def imported() -> float:
    """Seconds that optimisers take to import torch's compiler, which is loaded from then on."""
    before = time.process_time()
    importlib.import_module("torch._dynamo")
    return time.process_time() - before


def in_a_fork(plan, job, made: dict[str, Path], quick: bool = False) -> Cost:
    """Rehearses a job in a process of its own, so that its memory is its own."""
    fork = multiprocessing.get_context("fork")
    receive, send = fork.Pipe(duplex=False)
    process = fork.Process(target=lambda: send.send(_rehearsed(plan, job, made, quick)))
    process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        process.join()
        return Cost(missing=f"its rehearsal ended with status {process.exitcode}")
    finally:
        process.join()


def _rehearsed(plan, job, made: dict[str, Path], quick: bool) -> Cost:
    before, quiet = peak_mb(), io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(quiet),
            contextlib.redirect_stderr(quiet),
            tempfile.TemporaryDirectory(dir=made[job.id].parent) as folder,
        ):
            found = Rehearsal(plan, job, made, Path(folder), quick).cost()
    except Exception as error:  # of any plug-in; the other jobs can be rehearsed
        kind = "" if getattr(error, "plain", False) else f"{type(error).__name__}: "
        return Cost(missing=f"{kind}{error}".splitlines()[0])
    memory = IMPORTED_MB + peak_mb() - before
    return replace(found, memory_mb=plan.processes(job.id) * memory)
