"""The command line of a stage: `python -m stages.<stage> --... [--params FILE] [--results DIR]`."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable

from stages.kit.job.job import Run, alone, running, take_over
from stages.kit.job.launch import spread
from stages.kit.job.process import prepare, terminable, world
from workflow.params.entries import FLAT
from workflow.plan import load
from workflow.plan.job import OPTIONS
from workflow.plan.owner import claim

HELP = {
    "name": "its name in params.yaml, such as main or vqkd",
    "run": "a run of params.yaml with its seed, such as mae-s0",
    "task": "a task of params.yaml, such as linear",
}


def command(stage: str, doc: str, work: Callable[[Run], None], argv: list[str] | None) -> int:
    """Run one job of a stage as its command line says; the exit status.

    `doc` is the stage's docstring, `work` does the job. Of several processes each does so. A job
    that would make again what it has made before takes that over.
    """
    prepare()
    parser = argparse.ArgumentParser(f"python -m stages.{stage}", description=doc.splitlines()[0])
    for option in OPTIONS[stage]:
        default = FLAT if stage == "data" else None
        parser.add_argument(f"--{option}", required=not default, default=default, help=HELP[option])
    parser.add_argument("--params", default="params.yaml", help="(default: params.yaml)")
    parser.add_argument("--results", default="results", help="(default: results)")
    args = parser.parse_args(argv)
    plan = load(args.params, args.results)
    claim(plan)
    names = [getattr(args, option) for option in OPTIONS[stage]]
    job = plan.job("/".join([stage, *names]))
    with contextlib.ExitStack() as held:
        one = world() == 1
        if one:
            held.enter_context(terminable())
            held.enter_context(alone(job, plan))  # one lock for both: nobody comes between
            if take_over(job, plan):
                return 0
        spread(plan, job, argv)
        with running(job, plan, mine=one) as run:
            work(run)
    return 0
